from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import loadable
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from octoc.errors import ModelError
from octoc.load.weights import load_weights, read_weights


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (self.path,)


def _state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return loadable.Classifier().state_dict()


def _holds(module: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("holder", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_is_read_in_each_usual_form(tmp_path: Path, holder: str | None, prefix: str, zipped: bool) -> None:
    state = _state()
    renamed: Any = {prefix + name: tensor for name, tensor in state.items()}
    content = renamed if holder is None else {holder: renamed, "epoch": 3, "best": 91.5}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    module = loadable.Classifier()
    load_weights(module, tmp_path / "w.pth")
    assert _holds(module, state)


def test_safetensors_are_read(tmp_path: Path) -> None:
    state = _state()
    save_file(state, tmp_path / "w.safetensors")
    module = loadable.Classifier()
    load_weights(module, tmp_path / "w.safetensors")
    assert _holds(module, state)


def test_a_tied_weight_that_the_file_holds_once_is_not_missing(tmp_path: Path) -> None:
    original, module = loadable.Tied(), loadable.Tied()
    save_model(original, str(tmp_path / "w.safetensors"))
    load_weights(module, tmp_path / "w.safetensors")
    assert torch.equal(module.head.weight, original.table.weight)


def test_batch_counters_may_be_missing(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in _state().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "w.pth")
    load_weights(loadable.Classifier(), tmp_path / "w.pth")


def test_a_meta_module_takes_its_weights_from_the_file(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 2).state_dict(), tmp_path / "w.pth")
    module = nn.Linear(4, 2, device="meta")
    load_weights(module, tmp_path / "w.pth")
    assert not module.weight.is_meta


def test_names_that_do_not_match_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    state = _state()
    renamed = {name.replace("conv.", "stem."): tensor for name, tensor in state.items()}
    torch.save(renamed, tmp_path / "w.pth")
    with pytest.raises(ModelError) as caught:
        load_weights(loadable.Classifier(), tmp_path / "w.pth")
    assert str(caught.value).endswith(
        "does not fit Classifier: 2 missing (conv.bias, conv.weight); 2 unexpected (stem.bias, stem.weight)"
    )


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    torch.save(nn.Linear(5, 2).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"weight is \[2, 5\], Linear has \[2, 4\]"):
        load_weights(nn.Linear(4, 2), tmp_path / "w.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_needs_code_is_refused_with_the_way_out_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    torch.save({"w": Trap(tmp_path / "ran")}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"would run code from the file; save it again with torch\.save\(model\.state"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 2), tmp_path / "w.pth")
    with pytest.raises(ModelError, match="would run code"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "holds Tensor, no state_dict"),
        ({}, "holds an empty dict"),
        ({"epoch": 1, "loss": 0.5}, "holds a dict of epoch, loss, no state_dict"),
        ([1, 2], "holds list"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=message):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02", b"PK\x03\x04" + b"x" * 100, os.urandom(1000), b"hello" * 50])
def test_empty_truncated_and_random_files_are_refused_on_one_line(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_cut_in_half_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    state = _state()
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match="damaged"):
        read_weights(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(ModelError, match="a folder"):
        read_weights(tmp_path)
