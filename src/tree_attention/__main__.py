"""`python -m tree_attention` is the command `tree-attention`."""

from .cli import main

main()
