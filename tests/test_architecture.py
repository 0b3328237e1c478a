"""The rules of the design that a machine can check: who imports whom, what an import loads, how long a file is."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tree_attention

SOURCE = Path(tree_attention.__file__).parent
CORE = {"decode", "energy", "errors", "fused", "group", "layout", "local", "packets", "partial", "reduce", "route"}
MAY_IMPORT = {  # unit (a file or folder of the package) -> the units it may import
    "__init__": {"api"},
    "__main__": {"cli"},
    "api": CORE,
    "errors": set(),
    "host": set(),
    "partial": {"errors"},
    "packets": set(),
    "layout": {"errors"},
    "group": {"errors"},
    "local": {"errors", "layout", "packets", "partial"},
    "reduce": {"errors", "group", "host", "layout", "packets", "partial"},
    "fused": {"fused_kernels", "local", "reduce"},
    "fused_kernels": {"local", "packets", "reduce"},
    "decode": {"errors", "fused", "group", "local", "partial", "reduce", "route"},
    "route": {"errors", "group", "local", "reduce"},
    "energy": {"errors", "local", "partial"},
    "testing": {"local", "partial"},
    "cost": set(),
    "hf": CORE,
    "bench": CORE | {"cost", "hf", "testing"},
    "cli": CORE | {"__init__", "bench", "cost", "hf", "host", "testing"},
}
UNITS = sorted({path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()})


def imported_units(file, source=SOURCE):
    """The units of ours that a file imports, wherever in it; "__init__" for the package's own names."""
    package = ("tree_attention", *file.relative_to(source).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            paths = [name.name.split(".") for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            stem = [*base, *(node.module.split(".") if node.module else ())]
            paths = [[*stem, name.name] for name in node.names]
        else:
            continue
        for path in paths:
            if path[0] == "tree_attention":
                yield path[1] if len(path) > 1 and path[1] in UNITS else "__init__"


@pytest.mark.parametrize("unit", UNITS)
def test_units_import_only_what_they_may(unit):
    assert unit in MAY_IMPORT, f"say in MAY_IMPORT what {unit} may import"
    files = [SOURCE / f"{unit}.py"] if (SOURCE / f"{unit}.py").exists() else (SOURCE / unit).rglob("*.py")
    for file in files:
        assert set(imported_units(file)) <= MAY_IMPORT[unit] | {unit}, file


def test_the_rule_sees_every_kind_of_import(tmp_path):
    (tmp_path / "cli").mkdir()
    file = tmp_path / "cli" / "new.py"
    file.write_text(
        "import os, tree_attention.bench.generation\nfrom . import app\nfrom .launch import run\nfrom .. import merge\n"
        "from ..hf.cache import TreeCache\nfrom torch import hf\n"
        "def late():\n    from .. import local\n    from tree_attention.partial import Partial\n"
    )
    assert set(imported_units(file, tmp_path)) == {"bench", "cli", "__init__", "hf", "local", "partial"}


def test_files_do_not_import_each_other_in_circles():
    files = {_module(file): file for file in SOURCE.rglob("*.py")}
    graph = {}
    for module, file in files.items():
        package = _module(file.parent / "__init__.py").split(".")
        graph[module] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
                imported = {f"{base}.{alias.name}" for alias in node.names}
                graph[module] |= {name if name in files else base for name in imported} & files.keys()
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle
    assert "tree_attention.group" in graph["tree_attention.decode"]


def _module(file):
    return ".".join(["tree_attention", *file.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


def test_ranks_exchange_no_pickled_objects():
    """With pickle, anyone who reaches a port of a rank could make it run arbitrary code."""
    for file in SOURCE.rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"_object(_list)?\(|pickle\.loads?|Unpickler\b|torch\.load\(", text), file


def test_functions_take_at_most_twelve_arguments():
    """Kernels and the public attention calls excepted."""
    for file in SOURCE.rglob("*.py"):
        if file.name.endswith("_kernels.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name not in ("attend", "tree_decode"):
                of_node = node.args
                count = len(of_node.posonlyargs + of_node.args + of_node.kwonlyargs)
                assert count <= 12, (file, node.name, count)


def test_importing_the_package_loads_nothing_heavy():
    unwanted = (
        "torch",
        "triton",
        "transformers",
        "matplotlib",
        "rich",
        "typer",
        "tree_attention.hf",
        "tree_attention.cli",
    )
    code = f"import sys, tree_attention; print(*[name for name in {unwanted} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_the_public_names_load_torch_alone():
    unwanted = ("triton", "transformers", "matplotlib", "rich", "typer", "tree_attention.hf", "tree_attention.cli")
    code = (
        f"import sys\nfrom tree_attention import *\nprint(*[name for name in {unwanted} if name in sys.modules], merge)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("<function merge")


@pytest.mark.slow
def test_what_only_starts_ranks_does_not_load_transformers():
    """Its import takes seconds, and the ranks wait for their parent's before they begin their own."""
    imports = "from tree_attention.cli import bench_generate, chat, generate"
    code = f"import sys\n{imports}\nprint('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_cost_is_plain_python():
    """NumPy, but neither torch nor anything else that is not Python's own, and of ours nothing but itself."""
    for file in (SOURCE / "cost").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{file} line {node.lineno} leaves the folder"
                names = [] if node.level else [node.module or ""]
            assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "numpy"}, (file, names)


def test_only_kernels_load_triton_and_only_when_they_run():
    """Files of kernels import Triton at their head, other files import kernels within functions."""
    for file in SOURCE.rglob("*.py"):
        at_head = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {
            name for node in at_head for name in [getattr(node, "module", None) or "", *(n.name for n in node.names)]
        }
        loads = {name for name in names if name.split(".")[0] == "triton" or name.split(".")[-1].endswith("_kernels")}
        assert not loads or file.name.endswith("_kernels.py") or file.name == "packets.py", (file, loads)


def test_public_names_are_sorted_and_documented():
    assert tree_attention.__all__ == sorted(set(tree_attention.__all__))
    for name in tree_attention.__all__:
        text = getattr(tree_attention, name).__doc__
        assert text, f"{name} has no docstring"
        assert not text.startswith(f"{name}("), f"{name} has the docstring that dataclasses and named tuples are given"


def test_files_are_short():
    lines = {file: len(file.read_text().splitlines()) for file in SOURCE.rglob("*.py")}
    limits = {file: 400 if file.name.endswith("_kernels.py") else 300 for file in lines}
    assert lines
    assert {file: count for file, count in lines.items() if count > limits[file]} == {}


def test_one_version():
    """`__init__.py` is the only place that has it; the build reads it there."""
    root = Path(__file__).parents[1]
    pyproject = tomllib.loads((root / "pyproject.toml").read_text())
    assert "version" not in pyproject["project"]
    assert pyproject["project"]["dynamic"] == ["version"]
    source = root / pyproject["tool"]["hatch"]["version"]["path"]
    assert source.read_text().count(f'__version__ = "{tree_attention.__version__}"') == 1
