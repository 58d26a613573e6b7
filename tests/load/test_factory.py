from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from octoc.errors import ModelError, UsageError
from octoc.load import load_model

SOURCE = """
import torch
from torch import nn

raise_later = RuntimeError

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.example_inputs = torch.zeros(1, 4)

    def forward(self, features):
        return self.layer(features)

def number():
    return 7

def broken():
    raise RuntimeError("no such\\ncheckpoint")

def quits():
    raise SystemExit(3)

def needs(width):
    return nn.Linear(width, 2)

made = Net()
"""
ROWS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's project as the current directory."""
    (tmp_path / "nets_here").mkdir()
    (tmp_path / "nets_here" / "nets.py").write_text(SOURCE)
    (tmp_path / "nets_here" / "half.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "nets_here" / "wrong.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "nets_here"]:
        del sys.modules[name]


def test_a_function_is_found_in_the_current_directory() -> None:
    model = load_model("nets_here.nets:small", examples=[ROWS])
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    torch.testing.assert_close(model.run(ROWS)[0], expected(ROWS).detach())


def test_a_class_and_an_object_build_a_network_too_and_bring_their_examples() -> None:
    assert load_model("nets_here.nets:Net").inputs[0].name == "features"
    assert load_model("nets_here.nets:made").inputs[0].shape == (1, 4)


def test_weights_of_a_file_replace_those_of_the_function(project: Path) -> None:
    original = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    torch.save({"state_dict": original.state_dict()}, project / "w.pth")
    model = load_model("nets_here.nets:small", weights="w.pth", examples=[ROWS])
    torch.testing.assert_close(model.run(ROWS)[0], original(ROWS).detach())


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("nets_nowhere:f", UsageError, "no module nets_nowhere in .* or among the installed packages"),
        ("nets_here.nowhere:f", UsageError, r"no module nets_here\.nowhere"),
        ("nets_here.nets:nothing", UsageError, r"nets_here\.nets has no nothing; it has Net, broken"),
        ("nets_here.nets:number", ModelError, r"nets_here\.nets:number returned int, not an nn\.Module"),
        ("nets_here.nets:broken", ModelError, r"broken\(\) failed: RuntimeError: no such checkpoint"),
        ("nets_here.nets:quits", ModelError, r"quits\(\) failed: SystemExit: 3"),
        ("nets_here.nets:needs", ModelError, "missing 1 required positional argument: 'width'"),
        ("nets_here.half:f", ModelError, r"importing nets_here\.half failed: .*a_package_that_is_not_there"),
        ("nets_here.wrong:f", ModelError, r"importing nets_here\.wrong failed: SyntaxError"),
    ],
)
def test_each_way_to_fail_has_its_own_line(source: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        load_model(source, examples=[ROWS])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net.pth", "holds weights without the network; name the function .* --weights-file"),
        ("net.th", "holds weights without the network"),
        ("net.safetensors", "holds weights without the network"),
        ("net.onnx", r"octoc writes and does not read; give the network it was made from: a \.pt2 file"),
        ("net.tflite", "octoc writes and does not read"),
        ("net.mlpackage", "octoc writes and does not read"),
        ("net.h5", r"not a format that octoc reads; give a \.pt2 file"),
        ("net.txt", "not a format that octoc reads"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_is_accepted(project: Path, name: str, message: str) -> None:
    (project / name).write_bytes(b"anything")
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_a_name_that_is_neither_file_nor_function_is_refused() -> None:
    with pytest.raises(ModelError, match="no such file; MODEL is"):
        load_model("resnet")


def test_weights_go_with_a_function_alone(project: Path) -> None:
    with pytest.raises(UsageError, match="given with a live module"):
        load_model(nn.Linear(4, 2), weights="w.pth")
    with pytest.raises(UsageError, match=r"they go with package\.module:function alone"):
        load_model(project / "net.pt2", weights="w.pth")


def test_importing_the_readers_imports_no_torch() -> None:
    import subprocess

    code = "import sys, octoc.load, octoc.data, octoc.metrics, octoc.units; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "False"
