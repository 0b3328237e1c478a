"""Sphinx: `make docs` builds the site from these pages, the Markdown at the repository's root and our docstrings."""

import os
import re
from pathlib import Path

import typer.cli
import typer.main

from tree_attention import __version__
from tree_attention.cli.app import app

ROOT = Path(__file__).parents[1]
FORGE = "https://github.com/tree-attention/tree-attention"
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.md"))
PAGES = {  # Markdown outside of this folder -> the page of the site that shows it
    "DESIGN.md": "design",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "SECURITY.md": "security",
    **{f"benchmarks/results/{file.name}": f"reports/{file.stem}" for file in RESULTS},
}
LINK = re.compile(r"(!?)(\[[^\]]*\])\(([^)\s:#]+)(#[^)\s]*)?\)")

project = "tree-attention"
author = "The tree-attention authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"tree-attention {release}"
html_theme_options = {"source_repository": FORGE, "source_branch": "main", "source_directory": "docs/"}

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # single backticks in our docstrings hold code
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures show them; the docstrings give shapes, dtypes and units
napoleon_numpy_docstring = False


def setup(app_of_sphinx):
    app_of_sphinx.connect("source-read", read_source)


def read_source(_, page, source):
    """Fill the pages whose text lies elsewhere, and point their links to pages of the site or to the forge."""
    file = next((file for file, shown_as in PAGES.items() if shown_as == page), f"docs/{page}.md")
    if file in PAGES:
        source[0] = (ROOT / file).read_text(encoding="utf-8")
    if page == "command-line":
        source[0] += "\n" + command_reference()
    source[0] = LINK.sub(lambda link: resolve(link, file, page), source[0])


def resolve(link, file, page):
    """Rewrite a link of `file` for `page`. One to a file that does not exist stays as it is, and Sphinx warns."""
    image, label, path, anchor = link.groups(default="")
    target = os.path.normpath(Path(file).parent / path)
    if image:
        return f"!{label}({os.path.relpath(ROOT / target, (ROOT / 'docs' / page).parent)})"
    if target in PAGES:
        return f"{label}(/{PAGES[target]}.md{anchor})"
    if target.startswith("docs/"):
        return f"{label}(/{target.removeprefix('docs/')}{anchor})"
    return f"{label}({FORGE}/blob/main/{target}{anchor})" if (ROOT / target).exists() else link[0]


def command_reference():
    """The help of every command, as Markdown."""
    command = typer.main.get_command(app)
    text = typer.cli.get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="tree-attention"))
    return text.partition("**Commands**")[2].partition("\n\n")[2]  # its title and list are ours to write
