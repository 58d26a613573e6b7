"""ONNX files compute what the network computes, and hold its codes bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octoc.compressed import Compressed
from octoc.errors import ArtifactError, ModelError
from octoc.export import onnx as exporter
from octoc.graph import fold_batch_norm
from octoc.load.module import from_module
from octoc.model import KINDS, Layer, Model
from octoc.packing import pack_codes
from octoc.qtensor import Affine, Cast, Palette, QTensor, Scheme, Sparse, difference, expand
from octoc.quantize.activations import calibrate, encode_bias, integer_layers, rewrite
from octoc.runtime import onnx as runtime
from tests.networks import trained_resnet20

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default


class Calls(nn.Module):
    """A network given as a function of its parts and its input."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part) if isinstance(part, nn.Module) else self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner = kind(5, 7, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).tanh())


def rounded(weight: Tensor, scheme: Scheme, axis: int, signed: bool = True, dtype: Any = np.float32) -> Affine:
    """Codes of any grid; every channel but one gets its own scale, one is all zeros with scale 1."""
    values = weight.numpy()
    grid = scheme.grid(values.shape, axis)
    tiles = values.reshape([size for g, s in zip(grid, values.shape, strict=True) for size in (g, s // g)])
    inner = tuple(range(1, tiles.ndim, 2))
    high = 2 ** (scheme.bits - 1) - 1
    scale = (np.abs(tiles).max(axis=inner) / high).astype(dtype)
    scale = np.where(scale == 0, dtype(1), scale)
    codes = np.clip(np.round(values / expand(scale.astype(np.float32), values.shape)), -high - 1, high).astype(np.int8)
    if signed:
        return Affine(codes, scale, None, scheme.bits, True)
    middle = np.full(scale.shape, high + 1, np.uint8)
    return Affine((codes + np.int16(high + 1)).astype(np.uint8), scale, middle, scheme.bits, False)


def quantized(model: Model, scheme: Scheme, **options: Any) -> Compressed:
    codes = {
        layer.name: rounded(model.tensors[layer.name], scheme, layer.axis, **options)
        for layer in model.layers()
        if exporter.accepts(scheme, layer, False) is None
    }
    assert codes
    return Compressed(model, codes)


def integer(model: Model, x: Tensor, granularity: str = "channel", bits: int = 8) -> Compressed:
    """8-bit activations, weights of 4 or 8 bits, 32-bit biases."""
    result = rewrite(model, calibrate(model, [(x,)], steps=10))
    codes: dict[str, QTensor] = {}
    for name, uses in integer_layers(result).items():
        ((node, source),) = uses
        weight = rounded(model.tensors[name], Scheme("affine", bits, granularity), KINDS[node.target].axis)
        bias = str(node.args[2].target)
        codes[name] = weight
        codes[bias] = encode_bias(model.tensors[bias].numpy(), weight, source.scale)
    return Compressed(result, codes)


def written(small: Compressed, path: Path) -> Path:
    exporter.write(exporter.convert(small.model), small, path)
    return path


def outputs(path: Path, x: Tensor) -> list[np.ndarray]:
    session = runtime.open_session(path, 1)
    return list(session.run({session.inputs[0].name: x.numpy()}).values())


def assert_exact(base: exporter.Base, small: Compressed, path: Path, x: Tensor) -> None:
    """Codes come back bit for bit, and the file computes what they mean."""
    exporter.write(base, small, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    found = exporter.read_codes(path)
    assert found.keys() == small.qtensors.keys()
    for name, tensor in small.qtensors.items():
        assert difference(tensor, found[name]) is None
    for ours, theirs in zip(outputs(path, x), small.decoded.run(x), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def small_network() -> tuple[Model, exporter.Base, Tensor]:
    """One layer of each kind and layout."""
    torch.manual_seed(1)
    parts = {
        "conv": nn.Conv2d(8, 16, 3, padding=1),
        "depth": nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16),
        "up": nn.ConvTranspose2d(16, 8, 2, stride=2),
        "inner": nn.Linear(8, 24),
        "last": nn.Linear(24, 12),
    }

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.up(F.relu(self.depth(F.relu(self.conv(x)))))
        return self.last(self.inner(y.flatten(2).transpose(1, 2)).tanh().mean(1))

    module = Calls(forward, **parts)
    with torch.no_grad():
        module.conv.weight[3] = 0
    model = from_module(module, [torch.zeros(2, 8, 6, 6)])
    return model, exporter.convert(model), torch.randn(3, 8, 6, 6)


@pytest.fixture(scope="module")
def resnet20() -> tuple[Model, exporter.Base]:
    model = fold_batch_norm(from_module(trained_resnet20(), [torch.zeros(2, 3, 32, 32)]))
    return model, exporter.convert(model)


SCHEMES = ["int8-channel", "int8-tensor", "int8-group4", "int4-channel", "int4-tensor", "int4-group8", "int2-group4"]


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("signed", [True, False])
def test_every_accepted_grid_is_written_exactly(
    small_network: tuple[Model, exporter.Base, Tensor], tmp_path: Path, text: str, signed: bool
) -> None:
    model, base, x = small_network
    assert_exact(base, quantized(model, Scheme.parse(text), signed=signed), tmp_path / "m.onnx", x)


def test_float16_weights_and_scales_are_written_exactly(
    small_network: tuple[Model, exporter.Base, Tensor], tmp_path: Path
) -> None:
    model, base, x = small_network
    halves = {layer.name: Cast(model.tensors[layer.name].numpy().astype(np.float16)) for layer in model.layers()}
    assert_exact(base, Compressed(model, halves), tmp_path / "half.onnx", x)
    small = quantized(model, Scheme.parse("int4-group8"), dtype=np.float16)
    assert_exact(base, small, tmp_path / "scales.onnx", x)


def test_one_conversion_serves_weights_that_changed_since(
    small_network: tuple[Model, exporter.Base, Tensor], tmp_path: Path
) -> None:
    model, base, x = small_network
    changed = model.with_tensors({"last.bias": model.tensors["last.bias"] + 1})
    assert_exact(base, Compressed(changed, {}), tmp_path / "m.onnx", x)


def test_the_same_codes_give_the_same_bytes(small_network: tuple[Model, exporter.Base, Tensor], tmp_path: Path) -> None:
    model, base, _ = small_network
    small = quantized(model, Scheme.parse("int4-group8"))
    exporter.write(base, small, tmp_path / "one.onnx")
    exporter.write(exporter.convert(model), small, tmp_path / "two.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_onnxruntime_multiplies_by_coded_matrices_directly(
    small_network: tuple[Model, exporter.Base, Tensor], tmp_path: Path
) -> None:
    model, base, _ = small_network
    exporter.write(base, quantized(model, Scheme.parse("int4-channel")), tmp_path / "channel.onnx")
    found = runtime.optimized_operations(tmp_path / "channel.onnx")
    assert found["MatMulNBits"] == 2
    assert found["DequantizeLinear"] == 0
    wide = from_module(nn.Linear(64, 16), [torch.zeros(2, 64)])
    path = written(quantized(wide, Scheme.parse("int4-group32")), tmp_path / "wide.onnx")
    assert runtime.optimized_operations(path) == {"MatMulNBits": 1}


def test_packed_codes_are_what_onnx_reads() -> None:
    codes = np.arange(-8, 7, dtype=np.int8)
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=[15], raw_data=pack_codes(codes, 4).tobytes())
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), codes)


LAYER = Layer("w", "linear", (12, 10), 0, 120, 48, ("linear",))


@pytest.mark.parametrize(
    ("text", "layer", "integer", "reason"),
    [
        ("palette4-tensor", LAYER, False, "look-up tables"),
        ("int8-channel-sparse", LAYER, False, "zeros save no bytes"),
        ("int3-channel", LAYER, False, "no 3-bit integers"),
        ("int6-tensor", LAYER, False, "no 6-bit integers"),
        ("int4-group8", LAYER, False, "10 input channels are not a multiple of groups of 8"),
        ("int2-channel", LAYER, True, "weights of 4 or 8 bits"),
        ("int4-group5", LAYER, True, "one scale per channel or tensor"),
        ("float16", LAYER, True, "weights of 4 or 8 bits"),
        ("int8-channel", Layer("w", "embedding", (12, 10), 0, 0, 48, ("e",)), True, "no embedding in integers"),
        ("int2-channel", Layer("w", "linear", (10, 8), 0, 80, 40, ("l",)), False, "no multiple of 4"),
    ],
)
def test_what_onnx_cannot_hold_is_refused_with_a_reason(text: str, layer: Layer, integer: bool, reason: str) -> None:
    refused = exporter.accepts(Scheme.parse(text), layer, integer)
    assert refused is not None
    assert reason in refused


@pytest.mark.parametrize("text", ["int8-channel", "int4-tensor", "int2-group5", "float16"])
def test_what_onnx_can_hold_is_accepted(text: str) -> None:
    assert exporter.accepts(Scheme.parse(text), LAYER, False) is None


@pytest.mark.parametrize("text", ["int8-channel", "int8-tensor", "int4-channel", "int4-tensor"])
def test_what_runs_in_integers_is_accepted(text: str) -> None:
    assert exporter.accepts(Scheme.parse(text), LAYER, True) is None


def test_a_tensor_without_onnx_form_is_an_error(
    small_network: tuple[Model, exporter.Base, Tensor], tmp_path: Path
) -> None:
    model, base, _ = small_network
    shape = tuple(model.tensors["last.weight"].shape)
    table = Palette(np.zeros(shape, np.uint8), np.zeros((1, 1, 4), np.float32), 2)
    for tensor in (table, Sparse(np.ones(shape, np.bool_), table)):
        with pytest.raises(ArtifactError, match=r"last\.weight: ONNX cannot hold"):
            exporter.write(base, Compressed(model, {"last.weight": tensor}), tmp_path / "m.onnx")
    with pytest.raises(ArtifactError, match="nobody are not in the converted graph"):
        exporter.write(base, Compressed(model, {"nobody": table}), tmp_path / "m.onnx")


MASK = torch.full((6, 6), float("-inf")).triu(1)


def _attention(self: Any, x: Tensor) -> Tensor:
    q, k, v = self.linear(x).chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


# 0 where x + 1e-12 must not be dropped
NEAR_ZERO = torch.tensor([[0.0, 1.0, 1e-12], [3.0, 4.0, 0.0]])
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "gelu": (lambda: Calls(lambda _, x: F.gelu(x, approximate="tanh")), torch.linspace(-4, 4, 18).view(2, 9)),
    "epsilon": (lambda: Calls(lambda _, x: x / (x + 1e-12)), NEAR_ZERO),
    "factor": (lambda: Calls(lambda _, x: x * (1 + 1e-6)), torch.linspace(1, 2, 10).view(2, 5)),
    "scalar": (lambda: Calls(lambda self, x: self.l(x).sum(), l=nn.Linear(4, 3)), torch.ones(2, 4)),
    "clamp": (lambda: Calls(lambda _, x: x.clamp(0.1, 1)), torch.linspace(-2, 2, 10).view(2, 5)),
    "channels_last": (
        lambda: Calls(lambda self, x: self.c(x), c=nn.Conv2d(3, 4, 3)),
        torch.linspace(-1, 1, 384).view(2, 3, 8, 8).to(memory_format=torch.channels_last),
    ),
    "mask": (
        lambda: Calls(_attention, linear=nn.Linear(8, 24), mask=MASK),
        torch.linspace(-2, 2, 96).view(2, 6, 8).sin(),
    ),
    "lstm": (lambda: Recurrent(nn.LSTM), torch.linspace(-1, 1, 40).view(2, 4, 5)),
    "gru": (lambda: Recurrent(nn.GRU), torch.linspace(-1, 1, 40).view(2, 4, 5)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
def test_the_file_computes_what_torch_computes(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    make, x = NETWORKS[name]
    model = from_module(make().eval(), [x])
    path = written(Compressed(model, {}), tmp_path / "m.onnx")
    x = x if model.dynamic_batch else x[:1]
    (ours,), (theirs,) = outputs(path, x), model.run(x)
    assert ours.shape == tuple(theirs.shape)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, atol=1e-6)
    assert capfd.readouterr() == ("", "")


def test_a_shared_weight_is_stored_once(tmp_path: Path) -> None:
    model = from_module(Tied(), [torch.zeros(2, 5, dtype=torch.int64)])
    base, x = exporter.convert(model), torch.arange(10).view(2, 5)
    (layer,) = model.layers()
    small = Compressed(model, {layer.name: rounded(model.tensors[layer.name], Scheme.parse("int8-channel"), 0)})
    assert_exact(base, small, tmp_path / "m.onnx", x)
    assert sum(t.data_type == onnx.TensorProto.INT8 for t in onnx.load(tmp_path / "m.onnx").graph.initializer) == 1


def test_an_operation_without_onnx_form_is_named() -> None:
    model = from_module(Calls(lambda _, x: torch.linalg.svd(x)[1]), [torch.ones(2, 4, 4)])
    with pytest.raises(ModelError, match="_linalg_svd") as caught:
        exporter.convert(model)
    assert "\n" not in str(caught.value)


def test_a_narrow_range_of_activation_codes_is_refused() -> None:
    model = from_module(Calls(lambda _, x: x.relu() * 2), [torch.ones(2, 4)]).copy()
    relu = model.nodes()["relu"]
    with model.graph.inserting_after(relu):
        codes = model.graph.call_function(QUANTIZE, (relu, 0.1, 0, -127, 127, torch.int8))
    next(user for user in relu.users if user is not codes).replace_input_with(relu, codes)
    with pytest.raises(ModelError, match=r"-127\.\.127"):
        exporter.convert(model)


def test_operations_keep_their_aten_names(small_network: tuple[Model, exporter.Base, Tensor]) -> None:
    model, base, _ = small_network
    found = {node.name for node in base.proto.graph.node}
    assert {node.name for node in model.graph.nodes if node.op == "call_function"} - found == set()


def test_inputs_outputs_and_weights_keep_their_names(small_network: tuple[Model, exporter.Base, Tensor]) -> None:
    model, base, _ = small_network
    assert [value.name for value in base.proto.graph.input] == [spec.name for spec in model.inputs]
    assert [value.name for value in base.proto.graph.output] == list(model.outputs)
    assert base.weights == model.tensors.keys()


def test_resnet20_costs_little_beyond_its_weights(resnet20: tuple[Model, exporter.Base], tmp_path: Path) -> None:
    model, base = resnet20
    floats = sum(4 * tensor.numel() for tensor in model.tensors.values())
    exporter.write(base, Compressed(model, {}), tmp_path / "float.onnx")
    assert (tmp_path / "float.onnx").stat().st_size - floats < 8_000
    small = quantized(model, Scheme.parse("int4-channel"))
    rest = sum(4 * tensor.numel() for name, tensor in model.tensors.items() if name not in small.qtensors)
    exporter.write(base, small, tmp_path / "int4.onnx")
    codes = sum(tensor.nbytes for tensor in small.qtensors.values())
    assert (tmp_path / "int4.onnx").stat().st_size - codes - rest < 15_000
    assert runtime.optimized_operations(tmp_path / "int4.onnx")["DequantizeLinear"] == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_resnet20_runs_in_integers(
    resnet20: tuple[Model, exporter.Base], tmp_path: Path, granularity: str, bits: int
) -> None:
    """Weights of 4 bits take 4 in the file, and the kernels of 8-bit ones."""
    model, _ = resnet20
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32)
    small = integer(model, x, granularity, bits)
    path = written(small, tmp_path / "m.onnx")
    assert path.stat().st_size < {4: 180_000, 8: 320_000}[bits]
    onnx.checker.check_model(onnx.load(path), full_check=True)
    found = exporter.read_codes(path)
    assert all(difference(tensor, found[name]) is None for name, tensor in small.qtensors.items())
    operations = runtime.optimized_operations(path)
    assert (operations["QLinearConv"], operations["QLinearAdd"], operations["QGemm"]) == (19, 9, 1)
    assert operations["Conv"] == operations["Add"] == operations["Gemm"] == 0
    (ours,), (theirs,) = outputs(path, x), small.decoded.run(x)
    # Sums that torch rounds to float32 and onnxruntime keeps as integers land on another code now and then.
    assert np.abs(ours - theirs.numpy()).max() < 0.05 * np.abs(theirs.numpy()).max()


class Mixed(nn.Module):
    """A convolution of odd size, a depthwise one, and a linear layer without a zero point of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 7, 3, groups=7, stride=2)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.relu(self.deep(F.relu(self.first(x)))).mean((2, 3)))
        return y


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_four_bit_weights_run_where_eight_bit_ones_do(tmp_path: Path, granularity: str) -> None:
    torch.manual_seed(4)
    x = torch.randn(8, 3, 9, 9)
    small = integer(from_module(Mixed(), [x]), x, granularity, 4)
    path = written(small, tmp_path / "m.onnx")
    assert runtime.integer_operations(path) == 3
    assert sum(t.data_type == onnx.TensorProto.INT4 for t in onnx.load(path).graph.initializer) == 3
    (ours,), (theirs,) = outputs(path, x), small.decoded.run(x)
    assert np.abs(ours - theirs.numpy()).max() < 0.02 * np.abs(theirs.numpy()).max()
    # The optimiser computes the same as the file says.
    last = runtime.open_session(path).trace({"x": x.numpy()})[-1]
    np.testing.assert_allclose(next(iter(last.outputs.values())), ours, atol=0.02 * np.abs(ours).max())
    found = exporter.read_codes(path)
    assert all(difference(tensor, found[name]) is None for name, tensor in small.qtensors.items())


def test_a_changed_nibble_between_int8_values_is_read_back(tmp_path: Path) -> None:
    torch.manual_seed(4)
    x = torch.randn(8, 3, 9, 9)
    small = integer(from_module(Mixed(), [x]), x, "channel", 4)
    path = written(small, tmp_path / "m.onnx")
    weight = small.qtensors["first.weight"]
    assert isinstance(weight, Affine)
    stored = pack_codes(weight.codes, 4).tobytes()
    assert path.read_bytes().count(stored) == 1
    path.write_bytes(path.read_bytes().replace(stored, bytes([stored[0] ^ 16]) + stored[1:]))
    assert difference(weight, exporter.read_codes(path)["first.weight"]) is not None
