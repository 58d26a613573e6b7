"""One module per format. The file's name is the format's name; only the one asked for is imported.

A format is a file `octoc/export/NAME.py` with

    FILE                                    what the artefact is called inside its folder; the ending is its alone
    accepts(scheme, layer, integer) -> str | None
                                            why the format cannot hold the weight so, or None; the planner asks first.
                                            `integer` is True where the operation's activations are int8.
    convert(model) -> Base                  the converter library's own, slow call. It depends on the graph, not on the
                                            codes, so that one conversion serves every recipe tried on the graph.
    write(base, small, path) -> None        the base with `small.qtensors` in place of floats, exactly; same codes,
                                            same bytes. `path` does not exist before.
    read_codes(path) -> dict[str, QTensor]  what the file holds, by the names of `small.qtensors`

What `convert` returns is the exporter's own, and may have

    names: frozenset[str]                   tensors that `write` takes codes for, where the converter has transformed
                                            some of the model's; all, where the attribute is missing
    compute: str                            dtype that the file computes in, and that its scales have; "float32"
                                            where it is missing
    notes: tuple[str, ...]                  what the report must say of the conversion, a line each

A module of the same name in `octoc/runtime/` runs it: `open_session(path, threads)` and `integer_operations(path)`; see
`octoc/runtime/__init__.py`. An accelerator of `devices.yaml` names the formats that it takes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from octoc.accelerator import FORMATS
from octoc.errors import UsageError


class Exporter(Protocol):
    """What every module of this folder provides; see above."""

    FILE: str

    def accepts(self, scheme: Any, layer: Any, integer: bool) -> str | None: ...

    def convert(self, model: Any) -> Any: ...

    def write(self, base: Any, small: Any, path: Path) -> None: ...

    def read_codes(self, path: Path) -> Mapping[str, Any]: ...


def formats() -> tuple[str, ...]:
    """Names of all formats, without importing them."""
    return FORMATS


def exporter(name: str) -> Exporter:
    """The module that writes format `name`. Raises UsageError where there is none."""
    if name not in formats():
        raise UsageError(f"no format {name!r}; there are {', '.join(formats())}")
    return cast(Exporter, importlib.import_module(f"{__name__}.{name}"))
