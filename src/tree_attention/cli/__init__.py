"""The command `tree-attention`. `app.py` has the options, and each command its work in a file of its own."""

import sys
from importlib.util import find_spec


def main() -> None:
    """Entry point of the console script."""
    for package in ("rich", "transformers", "typer"):
        if find_spec(package) is None:
            sys.exit(f"tree-attention needs {package}: pip install 'tree-attention[cli]'")
    from .app import app

    app()
