"""The command `tree-attention`. `app.py` has the options, and each command its work in a file of its own."""

import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        import rich  # noqa: F401
        import transformers  # noqa: F401
        import typer  # noqa: F401
    except ImportError as missing:
        sys.exit(f"tree-attention needs {missing.name}: pip install 'tree-attention[cli]'")
    from .app import app

    app()
