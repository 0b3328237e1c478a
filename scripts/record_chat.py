"""Record `tree-attention chat` at a terminal, as text and as a picture: docs/figures/chat.txt and chat.svg.

    python scripts/record_chat.py                      the demo's model and text, two ranks on the CPU

It types the questions below, and notes when the command first shows something, when it is ready for a question, and
when each answer begins and ends. Pieces that the terminal erases later, such as progress bars, are not in the text.
"""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from smollm2 import fetch, long_text

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "figures"
BYTES, COLUMNS = 14_000, 90
ASKED = ["What does the assert statement do?", "/rewind", "What is an assignment?", "/help"]
PROMPT, CTRL_D = "> ", b"\x04"


class Recording:
    """A command at a terminal of its own."""

    def __init__(self, words):
        self.start_s, self.said, self.times = time.monotonic(), "", []
        self.terminal, ours = pty.openpty()
        environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), ours)
        self.command = subprocess.Popen(words, **streams, env=environment, start_new_session=True)
        os.close(ours)

    def note(self, what):
        self.times.append((time.monotonic() - self.start_s, what))

    def read_until(self, ending, first=None):
        """Read up to a text, or to the end; note when the first piece arrives."""
        piece = ""
        while not piece.endswith(ending) or not ending:
            try:
                if not select.select([self.terminal], [], [], 300)[0]:
                    raise TimeoutError(self.said)
                read = os.read(self.terminal, 4096).decode()
            except OSError:  # the command has ended
                break
            if first and read:
                self.note(first)
                first = None
            piece += read
        self.said += piece

    def type(self, line):
        os.write(self.terminal, line)


def shown(text):
    """What remains on the screen: without lines that were erased, cursors and carriage returns."""
    text = re.sub(r"[^\n]*\x1b\[\?25h\r?\x1b\[1A\x1b\[2K", "", text.replace("\r\n", "\n"))
    text = re.sub(r"\x1b\[\?25[hl]|\x1b\[\?2004[hl]|\x1b\[1A|\x1b\[2K|\r", "", text)
    return "\n".join(line for line in text.splitlines() if "━" not in line and "⠋" not in line) + "\n"


def main():
    page = ROOT / ".venv" / "page.txt"
    page.write_bytes(long_text().encode()[:BYTES])
    words = ["chat", "--model", str(fetch()), "--file", str(page), "--nproc", "2", "--max-new-tokens", "60"]
    recording = Recording([str(Path(sys.executable).with_name("tree-attention")), *words])
    recording.read_until(PROMPT, "first sign")
    recording.note("ready for a question")
    for line in ASKED:
        recording.type(line.encode() + b"\n")
        recording.read_until(PROMPT)
        recording.note(f"answered {line!r}")
    recording.type(CTRL_D)
    recording.read_until("")
    recording.command.wait()
    command = "tree-attention chat --model smollm2 --file page.txt --nproc 2 --max-new-tokens 60"
    text = f"$ {command}\n{shown(recording.said)}"
    (OUT / "chat.txt").write_text(text)
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text.from_ansi(text))
    drawn = console.export_svg(title="tree-attention chat", unique_id="chat")
    (OUT / "chat.svg").write_text(re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.S))  # they would be downloaded
    for seconds, what in recording.times:
        print(f"{seconds:6.2f} s  {what}")


if __name__ == "__main__":
    main()
