"""The command `tree-attention`: the commands are in app.py, their options in options.py."""


def main() -> None:
    """Entry point of the console script."""
    from .app import app

    app()
