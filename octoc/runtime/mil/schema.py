"""The protobuf classes of Core ML packages, without importing coremltools.

`import coremltools` takes seconds; its generated `*_pb2` modules need only protobuf. They are loaded from
coremltools' folder as a package of their own. protobuf keeps one copy of identical file descriptors, so this
and a real `import coremltools` may happen in the same process, in either order.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from octoc.errors import HostError

_PACKAGE = "octoc_coreml_proto"


@cache
def model_class() -> Any:
    """The protobuf message class `CoreML.Specification.Model`.

    Raises:
        HostError: coremltools is not installed.
    """
    return _proto_module("Model_pb2").Model


@cache
def data_type_names() -> dict[int, str]:
    """Name of each MIL data type by its number, such as {11: "FLOAT32"}."""
    return {number: name for name, number in _proto_module("MIL_pb2").DataType.items()}


def _proto_module(name: str) -> ModuleType:
    if _PACKAGE not in sys.modules:
        spec = importlib.util.find_spec("coremltools")  # finds the folder, runs nothing
        if spec is None or not spec.submodule_search_locations:
            raise HostError("coremltools is not installed; Core ML packages need its protobuf classes")
        package = ModuleType(_PACKAGE)
        package.__path__ = [str(Path(spec.submodule_search_locations[0]) / "proto")]
        sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.{name}")
