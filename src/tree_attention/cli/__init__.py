"""The command `tree-attention`: the commands are in app.py, their options in options.py."""

import gc


def main() -> None:
    """Entry point of the console script. Ends at once, since Python takes a second to unload transformers."""
    gc.disable()  # until ranks begin their work: it makes loading transformers a sixth slower
    from .app import app
    from .terminal import end_process

    try:
        app()
    except SystemExit as end:
        if isinstance(end.code, int):
            end_process(end.code)
        raise
