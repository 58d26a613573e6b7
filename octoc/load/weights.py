"""A file of weights -> a module's state, without running code from the file.

Accepted: safetensors, and what `torch.save` writes of a state_dict or of a dict that holds one under `state_dict`,
`model_state_dict` or `model`. Wrappers' prefixes (`module.` of DataParallel, `_orig_mod.` of torch.compile) go.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octoc.errors import ModelError, reason

_HOLDERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_CODE = re.compile(r"unsupported (global|class)|is blocked", re.IGNORECASE)  # in torch's own words
_WAY_OUT = "save it again with torch.save(model.state_dict(), FILE) or as safetensors"


def load_weights(module: nn.Module, path: Path) -> None:
    """Puts a file's weights into a module; every name must match.

    Raises:
        ModelError: the file cannot be read, or its names or shapes are not the module's.
    """
    wanted = module.state_dict()
    given = _unwrapped(read_weights(path), wanted)
    missing = sorted(wanted.keys() - given.keys() - _optional(module, wanted, given))
    unexpected = sorted(given.keys() - wanted.keys())
    if missing or unexpected:
        parts = [_listed(names, word) for names, word in ((missing, "missing"), (unexpected, "unexpected")) if names]
        raise ModelError(f"{path} does not fit {type(module).__name__}: {'; '.join(parts)}")
    for name, tensor in given.items():
        # a lazy module takes its shape from the file
        shape = None if nn.parameter.is_lazy(wanted[name]) else tuple(wanted[name].shape)
        if shape is not None and shape != tuple(tensor.shape):
            raise ModelError(f"{path}: {name} is {list(tensor.shape)}, {type(module).__name__} has {list(shape)}")
    meta = any(tensor.is_meta for tensor in wanted.values())
    module.load_state_dict(given, strict=False, assign=meta)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file by name, on the CPU.

    Raises:
        ModelError: the file is missing, damaged, holds no state_dict, or would have to run code.
    """
    if not path.is_file():
        raise ModelError(f"weights {path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    size = path.stat().st_size
    if size == 0:
        raise ModelError(f"weights {path}: the file is empty")
    try:
        return _safetensors(path) if path.suffix.lower() == ".safetensors" else _state(_torch_file(path), path)
    except OSError as error:
        raise ModelError(f"weights {path} ({size} bytes) cannot be read: {reason(error)}") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path, device="cpu"))
    except SafetensorError as error:
        size = path.stat().st_size
        raise ModelError(f"weights {path} ({size} bytes) is damaged or no safetensors file: {reason(error)}") from error


def _torch_file(path: Path) -> Any:
    size = path.stat().st_size
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'torch.load' received a zip file", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # torch raises half a dozen types for a damaged file; only the text says that code would have run
        text = str(error)
        if isinstance(error, pickle.UnpicklingError) and _CODE.search(text):
            raise ModelError(f"weights {path}: reading it would run code from the file; {_WAY_OUT}") from error
        if "TorchScript" in text:
            raise ModelError(f"weights {path} is a TorchScript archive, which holds code; {_WAY_OUT}") from error
        raise ModelError(f"weights {path} ({size} bytes) is damaged, or neither torch's nor safetensors") from error


def _state(content: Any, path: Path) -> dict[str, Tensor]:
    """The state_dict in what a torch file holds."""
    found = content
    if isinstance(found, Mapping) and not _is_state(found):
        held = [found[key] for key in _HOLDERS if isinstance(found.get(key), Mapping)]
        found = held[0] if held else found
    if isinstance(found, Mapping) and _is_state(found):
        return {str(name): tensor for name, tensor in found.items()}
    what = type(content).__name__
    if isinstance(content, Mapping):
        what = f"a dict of {', '.join(str(key) for key in list(content)[:6])}" if content else "an empty dict"
    raise ModelError(f"weights {path} holds {what}, no state_dict; {_WAY_OUT}")


def _is_state(found: Mapping[Any, Any]) -> bool:
    return bool(found) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())


def _unwrapped(given: dict[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names without the prefixes that every one of them has and the module does not."""
    names = given
    while names.keys() != wanted.keys():
        prefix = next((p for p in _PREFIXES if names and all(name.startswith(p) for name in names)), None)
        if prefix is None:
            break
        names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
    return names


def _optional(module: nn.Module, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> set[str]:
    """Names that may be missing: batch counters that old files lack, and names tied to one that is given.

    safetensors stores a shared weight once.
    """
    counters = {name for name in wanted if name.rpartition(".")[2] == "num_batches_tracked"}
    places: dict[int, set[str]] = {}
    for entries in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in entries:
            places.setdefault(id(tensor), set()).add(name)
    tied = {name for names in places.values() if names & given.keys() for name in names}
    return counters | tied


def _listed(names: list[str], word: str) -> str:
    return f"{len(names)} {word} ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
