"""`Answer`: a thread that generates an answer, and the iterator over its text."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from transformers import TextIteratorStreamer

Generate = Callable[[TextIteratorStreamer], Tensor]
Listener = Callable[[int], None] | None  # called with the id of a token, or with a number of tokens


class Answer(Iterator[str]):
    """Yield an answer piece by piece while a thread of its own generates it.

    The thread starts here and always runs to the end. Closing or dropping the iterator does not stop it, so ranks may
    stop reading at different pieces. The thread calls `generate` once, which passes each token to the streamer and
    returns all tokens, and `on_token` with the id of each. The first `close` calls `keep` with all tokens.
    """

    def __init__(self, generate: Generate, tokenizer: Any, keep: Callable[[Tensor], None], on_token: Listener) -> None:
        streamer = _Streamer(tokenizer, on_token)
        self._pieces, self._keep = (piece for piece in streamer), keep
        self._outcome: Tensor | BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(generate, streamer))
        self._thread.start()

    def __next__(self) -> str:
        piece = next(self._pieces, None)
        if piece is None:
            self.close()
            raise StopIteration
        return piece

    def close(self) -> None:
        """Wait until the answer is complete and keep it. The first call raises the error that ended it, if any."""
        if self._thread is threading.current_thread():  # called by a finalizer that the garbage collector ran here
            return
        self._thread.join()
        self._pieces.close()
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome is not None:
            self._keep(outcome)

    def _run(self, generate: Generate, streamer: TextIteratorStreamer) -> None:
        try:
            self._outcome = generate(streamer)
        except BaseException as error:  # raised again by `close`, in the thread of the reader
            self._outcome = error
            streamer.on_finalized_text("", stream_end=True)


class _Streamer(TextIteratorStreamer):
    """Also report the id of each token, which the text does not show."""

    def __init__(self, tokenizer: Any, on_token: Listener) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_token = on_token

    def put(self, value: Tensor) -> None:
        if self.on_token is not None and not self.next_tokens_are_prompt:
            self.on_token(int(value))
        super().put(value)
