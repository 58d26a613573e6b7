"""The rooms of docs/architecture.md, held by reading the imports: they point downward only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "octoc"
MOST_LINES = 400

# From the ground up. A module may import its own floor and those below.
FLOORS = (
    {"errors"},
    {"units", "yaml_nodes", "accelerator", "device", "packing", "qtensor", "recipe", "reference", "progress", "metrics"}
    | {"report", "plan", "budgets", "refine", "stats", "hessian"},
    {"model", "graph", "compressed", "load", "samples", "data", "images"},
    {"quantize", "prune", "lowrank", "recover", "export", "runtime"},
    {
        "evaluate",
        "proof",
        "profile",
        "placement",
        "memory",
        "search",
        "apply",
        "sequential",
        "verify",
        "inspect",
        "bench",
        "fl_hooks",
    },
    {"options", "shared", "offering", "workbench", "summary", "artifact", "pipeline", "quantized"},
    {"demo"},
    {"commands", "cli", "__main__"},
)
METHODS = {"quantize", "prune", "lowrank", "recover"}
# Folders of one floor that may know another: an exporter shares its format's schema with what runs the format.
NEIGHBOURS = {"export": {"runtime"}}
HEAVY = {"torch", "numpy", "scipy", "rich", "yaml", "onnx", "onnxruntime", "coremltools", "litert_torch", "matplotlib"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """`octoc/export/onnx.py` -> "export", `octoc/model.py` -> "model"; the package itself is no room."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, top_level: bool = False) -> Iterator[str]:
    """Names of the modules that a file imports; `if TYPE_CHECKING:` does not count as top level."""
    nodes = ast.iter_child_nodes(tree) if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            pytest.fail(f"line {node.lineno}: imports are absolute")


def rooms_imported(path: Path) -> set[str]:
    found = (name.split(".") for name in imports(ast.parse(path.read_text())))
    names = {parts[1] for parts in found if parts[0] == "octoc" and len(parts) > 1}
    return {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


def floor(name: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if name in names)


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in modules()} - {"__init__"} <= set().union(*FLOORS)


def test_imports_point_downward() -> None:
    upward = {
        str(path.relative_to(ROOT)): above
        for path in modules()
        if path != PACKAGE / "__init__.py"
        and (above := {name for name in rooms_imported(path) if floor(name) > floor(room(path))})
    }
    assert upward == {}


def test_folders_of_methods_and_formats_do_not_know_one_another() -> None:
    for path in modules():
        mine = room(path)
        if mine in METHODS | {"export", "runtime"}:
            strangers = (METHODS | {"export", "runtime"}) - {mine} - NEIGHBOURS.get(mine, set())
            assert not rooms_imported(path) & strangers, path


def test_exporters_do_not_know_one_another() -> None:
    formats = {path.stem for path in (PACKAGE / "export").glob("*.py")} - {"__init__"}
    for path in (PACKAGE / "export").rglob("*.py"):
        own = path.relative_to(PACKAGE / "export").parts[0].removesuffix(".py").removesuffix("_lowering")
        for name in imports(ast.parse(path.read_text())):
            parts = name.split(".")
            if parts[:2] == ["octoc", "export"] and len(parts) > 2:
                other = parts[2].removesuffix("_lowering")
                assert other == own or other not in formats, path


def test_the_command_line_imports_nothing_heavy_at_start() -> None:
    for path in (PACKAGE / "__init__.py", PACKAGE / "cli.py", *PACKAGE.glob("commands/*.py")):
        found = {name.split(".")[0] for name in imports(ast.parse(path.read_text()), top_level=True)}
        assert not found & HEAVY, path


def test_no_file_is_longer_than_two_files_should_be() -> None:
    assert [path for path in modules() if len(path.read_text().splitlines()) > MOST_LINES] == []


def test_every_module_says_what_it_is() -> None:
    texts = {path: path.read_text() for path in modules()}
    assert [path for path, text in texts.items() if text.strip() and not ast.get_docstring(ast.parse(text))] == []
