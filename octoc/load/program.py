"""A `.pt2` file of torch.export.save -> `Model`, without running anything that the file says.

torch.export.load trusts its file in five places; each is closed here before torch reads the archive:
1. pickles (example inputs, old weights, `use_pickle` payloads): torch is held to `weights_only`;
2. pickled objects of custom classes, and compiled libraries of AOTInductor: refused by name;
3. symbolic sizes, which sympy evaluates as Python: only the arithmetic that torch writes passes;
4. operations, which torch looks up by dotted name: only ATen's, Python's operators and torch.sym_* pass;
5. tree specifications that import a module by name: refused.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch.export import ExportedProgram

from octoc.errors import ModelError, reason
from octoc.load.graph import from_program
from octoc.model import Model, aten

_OLD = ("serialized_exported_program.json", "serialized_state_dict.pt", "serialized_constants.pt")
_OLD_EXAMPLES = "serialized_example_inputs.pt"
_CODE_FOLDERS = ("data/aotinductor/", "executorch/", "mtia/")
_WAY_OUT = "export the network again with torch.export.export and torch.export.save"

# What sympy's srepr writes of sizes: its constructors and torch's functions, symbols, numbers, operators.
_FUNCTIONS = (
    "Symbol|Integer|Rational|Float|Add|Mul|Pow|Mod|Max|Min|Abs|And|Or|Not|Piecewise|ExprCondPair|Tuple|Equality|"
    "Unequality|LessThan|StrictLessThan|GreaterThan|StrictGreaterThan|Eq|Ne|Le|Lt|Ge|Gt|true|false|True|False|floor|"
    "ceiling|oo|int_oo|positive|nonnegative|negative|nonpositive|integer|real|zero|nonzero|finite|precision|FloorDiv|"
    "ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|FloatPow|"
    "FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|"
    "ToFloat|Identity|BooleanTrue|BooleanFalse"
)
_SIZE = re.compile(
    rf"(?:\b(?:{_FUNCTIONS})\b|\b[a-z]{{1,4}}[0-9]+\b|'[A-Za-z][A-Za-z0-9_]*'|'-?[0-9.]+(?:e[+-]?[0-9]+)?'"
    r"|\b[0-9]{1,20}(?:\.[0-9]*)?(?:e[+-]?[0-9]{1,3})?\b|[-+*/(),=<>&|~ ])*"
)
_BLOCKS = "cond|while_loop|scan|associative_scan|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast"
_OPERATION = re.compile(
    rf"torch\.ops\.(aten|prims)\.\w+\.\w+|torch\.ops\.higher_order\.({_BLOCKS})"
    r"|_operator\.\w+|math\.\w+|torch\.sym_\w+"
)
_FILE_OPERATIONS = re.compile(r"torch\.ops\.aten\.(from_file|save)\b.*")  # ATen's only ways to the disk


def is_archive(path: Path) -> bool:
    """Whether a file is a torch.export archive of either form, whatever its name."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError):
        return False
    return _OLD[0] in names or any(re.fullmatch(r"[^/]*/models/[^/]+\.json", name) for name in names)


def from_archive(path: Path) -> Model:
    """Reads a torch.export archive.

    Raises:
        ModelError: missing, damaged, no archive of torch.export, or it would have to run code.
    """
    if not path.is_file():
        raise ModelError(f"{path}: {'a folder, not a .pt2 file' if path.is_dir() else 'no such file'}")
    size = path.stat().st_size
    if size == 0:
        raise ModelError(f"{path}: the file is empty")
    if not zipfile.is_zipfile(path):
        raise ModelError(f"{path} ({size} bytes) is truncated, or not a torch.export archive; {_WAY_OUT}")
    if not is_archive(path):
        raise ModelError(f"{path} ({size} bytes) holds no exported program; {_WAY_OUT}")
    try:
        program = _read(path)
    except ModelError as error:
        raise ModelError(f"{path}: {error}; {_WAY_OUT}") from error
    except Exception as error:
        # torch raises whatever its parts raise: RuntimeError, KeyError, AssertionError, json's and zipfile's
        raise ModelError(f"{path} ({size} bytes) is damaged, or of another torch: {reason(error)}") from error
    if _is_laid_out(program) and any(node.target is aten.as_strided.default for node in program.graph.nodes):
        raise ModelError(f"{path}: as_strided reads a channels_last input by its strides; {_WAY_OUT}, contiguous")
    return from_program(program)


def _read(path: Path) -> ExportedProgram:
    with path.open("rb") as file, _weights_only(), warnings.catch_warnings():
        # torch warns that records are read-only buffers; nothing here writes into a weight
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        with zipfile.ZipFile(file) as archive:
            old = _OLD[0] in archive.namelist()
        file.seek(0)
        return _read_old(file) if old else _read_new(file)


def _read_new(file: IO[bytes]) -> ExportedProgram:
    from torch.export.pt2_archive._package import PT2ArchiveReader, load_pt2

    reader = PT2ArchiveReader(file)
    names = reader.get_file_names()
    for name in names:
        if name.startswith(_CODE_FOLDERS):
            raise ModelError(f"record {name} is compiled code")
        if re.fullmatch(r"models/[^/]+\.json", name):
            _check_program(json.loads(reader.read_string(name)))
        elif re.fullmatch(r"data/(weights|constants)/[^/]+_config\.json", name):
            _check_payloads(json.loads(reader.read_string(name)))
    file.seek(0)
    programs = load_pt2(file).exported_programs
    if len(programs) != 1 and "model" not in programs:
        raise ModelError(f"the archive holds {len(programs)} programs ({', '.join(sorted(programs))}), not one")
    program: ExportedProgram = programs["model"] if "model" in programs else next(iter(programs.values()))
    return program


def _read_old(file: IO[bytes]) -> ExportedProgram:
    """The form that torch wrote until 2.7."""
    from torch._export.serde.serialize import SerializedArtifact, deserialize

    with zipfile.ZipFile(file) as archive:
        graph, state, constants = (archive.read(name) for name in _OLD)
        examples = archive.read(_OLD_EXAMPLES) if _OLD_EXAMPLES in archive.namelist() else b""
    _check_program(json.loads(graph))
    return deserialize(SerializedArtifact(graph, state, constants, examples))


@contextmanager
def _weights_only() -> Iterator[None]:
    """Holds every torch.load inside to `weights_only`, also where torch itself asks for less."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        os.environ.pop(names[0])
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _check_payloads(config: Any) -> None:
    for name, payload in config["config"].items():
        if not re.fullmatch(r"(weight|tensor)_\w+(\.pt)?", str(payload["path_name"])):
            raise ModelError(f"constant {name} is an object of a custom class, and reading it would run code")


def _check_program(content: Any) -> None:
    """Refuses what torch would evaluate, import or call."""
    for key, value in _entries(content):
        if key == "expr_str" and not (isinstance(value, str) and len(value) < 10_000 and _SIZE.fullmatch(value)):
            raise ModelError(f"size {str(value)[:60]!r} is not arithmetic, and reading it would run code")
        if key == "target" and isinstance(value, str) and _FILE_OPERATIONS.fullmatch(value):
            raise ModelError(f"operation {value[:60]} reads or writes files")
        if key == "nodes" and isinstance(value, list):
            for node in value:
                if isinstance(node, dict) and not _OPERATION.fullmatch(str(node.get("target"))):
                    raise ModelError(f"operation {str(node.get('target'))[:60]} is not ATen's, and no format holds it")
        if key in ("in_spec", "out_spec") and isinstance(value, str):
            _check_tree(value)


def _check_tree(text: str) -> None:
    """Refuses a tree specification whose contexts, JSON inside JSON, name something to import."""
    for key, value in _entries(json.loads(text)):
        if key in ("__enum__", "default_factory_module"):
            raise ModelError("its inputs or outputs name a Python module to import")
        if key == "context" and isinstance(value, str):
            _check_tree(value)


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested JSON."""
    stack = [content]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from item.items()
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _is_laid_out(program: ExportedProgram) -> bool:
    """Whether the program was traced with inputs in another memory format, such as channels_last."""
    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    return any(isinstance(value, torch.Tensor) and not value.is_contiguous() for value in values)
