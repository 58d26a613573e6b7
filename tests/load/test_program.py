from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loadable
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from octoc.errors import ModelError
from octoc.load import load_model, program
from octoc.load.module import from_module
from octoc.load.program import from_archive

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (self.path,)


def _save(module: nn.Module, path: Path, example: torch.Tensor = IMAGES, free: bool = True) -> Path:
    shapes = ({0: torch.export.Dim("batch")},) if free else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(torch.export.export(module.eval(), (example,), dynamic_shapes=shapes), path)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(loadable.Classifier(), tmp_path_factory.mktemp("archive") / "net.pt2")


@pytest.fixture(scope="module")
def old_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The form of torch up to 2.7."""
    from torch._export.serde.serialize import serialize

    path = tmp_path_factory.mktemp("old") / "net.pt2"
    parts = serialize(torch.export.export(loadable.Classifier().eval(), (IMAGES,)))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("version", "8.1")
        file.writestr("serialized_exported_program.json", parts.exported_program)
        file.writestr("serialized_state_dict.pt", parts.state_dict)
        file.writestr("serialized_constants.pt", parts.constants)
        file.writestr("serialized_example_inputs.pt", parts.example_inputs)
    return path


def _edited(source: Path, target: Path, edit: Callable[[str, bytes], bytes | None], **added: bytes) -> Path:
    """A copy of an archive with some records changed, removed or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            content = edit(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
        for name, content in added.items():
            new.writestr(f"{root}/{name}", content)
    return target


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_program_computes_what_its_module_computes(archive: Path) -> None:
    torch.manual_seed(0)
    model = load_model(archive)
    assert model.dynamic_batch
    assert [spec.name for spec in model.inputs] == ["input"]
    restored = torch.export.load(archive).module()
    for count in (1, 2):
        torch.testing.assert_close(model.run(IMAGES[:count])[0], restored(IMAGES[:count].clone()).detach())


def test_the_old_form_is_read(old_archive: Path) -> None:
    model = load_model(old_archive)
    assert (model.inputs[0].shape, model.dynamic_batch) == ((2, 3, 6, 6), False)
    assert model.run(IMAGES)[0].shape == (2, 5)


def test_an_archive_is_known_by_its_content_whatever_its_name(archive: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "net.pt"
    renamed.write_bytes(archive.read_bytes())
    assert load_model(renamed).inputs[0].name == "input"


def test_an_archive_of_channels_last_inputs_runs_on_contiguous_ones(tmp_path: Path) -> None:
    module = loadable.Flattened().eval()
    last = IMAGES.to(memory_format=torch.channels_last)
    path = _save(module.to(memory_format=torch.channels_last), tmp_path / "last.pt2", last)
    model = load_model(path)
    expected = module(last).detach()
    for inputs in (IMAGES, last):
        torch.testing.assert_close(model.run(inputs)[0], expected)
    assert all(tensor.is_contiguous() for tensor in model.tensors.values())


def test_an_archive_in_half_precision_becomes_float32(tmp_path: Path) -> None:
    model = load_model(_save(loadable.Classifier().half(), tmp_path / "half.pt2", IMAGES.half()))
    assert model.run(IMAGES)[0].dtype == torch.float32


def test_a_decomposed_archive_keeps_its_layers(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")
        exported = torch.export.export(loadable.Classifier().eval(), (IMAGES,)).run_decompositions()
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(exported, tmp_path / "core.pt2")
    model = load_model(tmp_path / "core.pt2")
    torch.testing.assert_close(model.run(IMAGES)[0], exported.module()(IMAGES.clone()).detach())
    assert [(layer.name, layer.kind) for layer in model.layers()] == [
        ("conv.weight", "conv"),
        ("head.weight", "linear"),
    ]


def test_nan_weights_are_refused_by_name(tmp_path: Path) -> None:
    module = loadable.Classifier()
    with torch.no_grad():
        module.conv.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"weight conv\.weight: 1 of 108 values"):
        load_model(_save(module, tmp_path / "nan.pt2"))


@pytest.mark.parametrize("cut", [0, 1, 100, 3000, -1, -30])
def test_a_truncated_file_is_refused_on_one_line(archive: Path, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.pt2"
    path.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_model(tmp_path / "none.pt2")
    with pytest.raises(ModelError, match="a folder"):
        load_model(_folder(tmp_path / "folder.pt2"))


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_random_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "random.pt2"
    path.write_bytes(content)
    with pytest.raises(ModelError):
        load_model(path)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_graph_is_read_or_refused_and_never_crashes(
    archive: Path, tmp_path: Path, data: st.DataObject
) -> None:
    def damage(name: str, content: bytes) -> bytes:
        if not name.endswith("model.json"):
            return content
        place = data.draw(st.integers(0, len(content) - 20))
        return content[:place] + data.draw(st.sampled_from([b"", b"}", b"7", b'"x"', b"null"])) + content[place + 9 :]

    with contextlib.suppress(ModelError):
        load_model(_edited(archive, tmp_path / "damaged.pt2", damage))


def test_a_zip_that_is_no_export_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "state.pt2")
    with pytest.raises(ModelError, match="holds no exported program"):
        load_model(tmp_path / "state.pt2")


def test_example_inputs_that_would_run_code_are_refused(archive: Path, tmp_path: Path) -> None:
    trap = _pickled(((Trap(tmp_path / "ran"),), {}))
    path = _edited(archive, tmp_path / "evil.pt2", lambda n, c: trap if "sample_inputs" in n else c)
    with pytest.raises(ModelError):
        load_model(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "record", ["serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt"]
)
def test_an_old_archive_that_would_run_code_is_refused(old_archive: Path, tmp_path: Path, record: str) -> None:
    trap = _pickled({"x": Trap(tmp_path / "ran")})
    with zipfile.ZipFile(old_archive) as old, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as new:
        for name in old.namelist():
            new.writestr(name, trap if name == record else old.read(name))
    with pytest.raises(ModelError):
        load_model(tmp_path / "evil.pt2")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["weights", "constants"])
def test_legacy_and_pickled_payloads_that_would_run_code_are_refused(archive: Path, tmp_path: Path, name: str) -> None:
    trap = _pickled({"x": Trap(tmp_path / "ran")})
    path = _edited(archive, tmp_path / "legacy.pt2", lambda n, c: c, **{f"data/{name}/model.pt": trap})
    with pytest.raises(ModelError):
        load_model(path)
    payload = {"path_name": "weight_9" if name == "weights" else "tensor_9", "is_param": False, "use_pickle": True}
    payload["tensor_meta"] = None
    path = _edited(
        archive,
        tmp_path / "pickled.pt2",
        lambda n, c: json.dumps({"config": {"x": payload}}).encode() if n.endswith(f"model_{name}_config.json") else c,
        **{f"data/{name}/{payload['path_name']}": trap},
    )
    with pytest.raises(ModelError):
        load_model(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("prefix", ["custom_obj_0", "opaque_obj_0"])
def test_pickled_objects_of_custom_classes_are_refused(archive: Path, tmp_path: Path, prefix: str) -> None:
    payload = {"path_name": prefix, "is_param": False, "use_pickle": True, "tensor_meta": None}
    path = _edited(
        archive,
        tmp_path / "object.pt2",
        lambda n, c: json.dumps({"config": {"x": payload}}).encode() if n.endswith("constants_config.json") else c,
        **{f"data/constants/{prefix}": pickle.dumps(Trap(tmp_path / "ran"))},
    )
    with pytest.raises(ModelError, match="custom class, and reading it would run code"):
        load_model(path)
    assert not (tmp_path / "ran").exists()


def test_compiled_code_is_refused(archive: Path, tmp_path: Path) -> None:
    path = _edited(archive, tmp_path / "so.pt2", lambda n, c: c, **{"data/aotinductor/model/model.so": b"\x7fELF"})
    with pytest.raises(ModelError, match="compiled code"):
        load_model(path)


def _with_graph(archive: Path, path: Path, change: Callable[[Any], None]) -> Path:
    def edit(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        graph = json.loads(content)
        change(graph)
        return json.dumps(graph).encode()

    return _edited(archive, path, edit)


def test_a_size_that_is_python_code_is_refused(archive: Path, tmp_path: Path) -> None:
    code = f"__import__('os').mkdir({str(tmp_path / 'ran')!r})"

    def change(graph: Any) -> None:
        for key, value in program._entries(graph):
            if isinstance(value, dict) and "expr_str" in value:
                value["expr_str"] = code
            assert key

    with pytest.raises(ModelError, match="is not arithmetic, and reading it would run code"):
        load_model(_with_graph(archive, tmp_path / "evil.pt2", change))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torch.ops.aten.save.default", "reads or writes files"),
        ("torch.ops.aten.from_file.default", "reads or writes files"),
        ("torch.serialization.os.system", "not ATen's"),
        ("torch.ops.evil.run.default", "not ATen's"),
        ("_operator.methodcaller.x", "not ATen's"),
    ],
)
def test_an_operation_that_is_not_arithmetic_is_refused(
    archive: Path, tmp_path: Path, target: str, message: str
) -> None:
    def change(graph: Any) -> None:
        graph["graph_module"]["graph"]["nodes"][0]["target"] = target

    with pytest.raises(ModelError, match=message):
        load_model(_with_graph(archive, tmp_path / "evil.pt2", change))


def test_a_tree_that_names_a_module_to_import_is_refused(archive: Path, tmp_path: Path) -> None:
    def change(graph: Any) -> None:
        spec = {"type": "builtins.dict", "context": json.dumps([{"__enum__": True, "fqn": "this:x", "name": "y"}])}
        signature = graph["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = json.dumps([1, {**spec, "children_spec": []}])

    with pytest.raises(ModelError, match="name a Python module to import"):
        load_model(_with_graph(archive, tmp_path / "evil.pt2", change))


@pytest.mark.parametrize(
    "size",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(Mul(Integer(2), Symbol('s77', positive=True, integer=True)), Integer(-1))",
        "FloorDiv(Symbol('s0', integer=True), Integer(4))",
        "s0 + 3",
        "Max(1, s0*u1)",
    ],
)
def test_sizes_that_torch_writes_pass(size: str) -> None:
    assert program._SIZE.fullmatch(size)


@pytest.mark.parametrize(
    "size",
    [
        "exec('x')",
        "Symbol.__class__",
        "s0.free_symbols",
        "eval(Symbol('x'))",
        "lambda: 0",
        "[x for x in ()]",
        "Symbol('a b')",
        "Symbol('__import__(\"os\")')",
        "open(chr(97))",
        "Integer(s0)['x']",
        "Symbol('s0')\n",
    ],
)
def test_sizes_that_are_more_than_arithmetic_do_not_pass(size: str) -> None:
    assert not program._SIZE.fullmatch(size)


def test_the_environment_is_as_before_after_reading(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    from_archive(archive)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_fixed_batch_stays_fixed(tmp_path: Path) -> None:
    model = load_model(_save(loadable.Classifier(), tmp_path / "fixed.pt2", free=False))
    assert (model.dynamic_batch, model.inputs[0].shape) == (False, (2, 3, 6, 6))


def test_an_archive_and_its_live_module_give_the_same_graph(tmp_path: Path) -> None:
    module = loadable.Classifier().eval()
    archived = load_model(_save(module, tmp_path / "net.pt2"))
    live = from_module(module, (IMAGES,))
    assert str(archived.graph) == str(live.graph)
    assert archived.tensors.keys() == live.tensors.keys()
