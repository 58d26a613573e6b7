"""TFLite files compute what the network computes, hold its codes bit for bit, and run in integers where they should."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("litert_torch", reason="the extra tflite is not installed")

from octoc.compressed import Compressed
from octoc.errors import ArtifactError, ModelError
from octoc.export import tflite
from octoc.export.tflite_lowering.flat import Graph, read_graph
from octoc.graph import fold_batch_norm
from octoc.load.module import from_module
from octoc.model import KINDS, Layer, Model
from octoc.qtensor import Affine, Array, Cast, Palette, QTensor, Scheme, Sparse, difference
from octoc.quantize import encode
from octoc.quantize.activations import calibrate, encode_bias, integer_layers, rewrite, separate_biases
from octoc.runtime.tflite import integer_operations, open_session
from tests.networks import trained_resnet20

LAYER = Layer("w", "conv", (16, 8, 3, 3), 0, 0, 0, ("conv2d",))


def write(base: tflite.Base, small: Compressed, folder: Path, name: str = "model.tflite") -> Path:
    path = folder / name
    path.unlink(missing_ok=True)
    tflite.write(base, small, path)
    return path


def run(path: Path, feeds: tuple[Tensor, ...]) -> list[Array]:
    session = open_session(path, 1)
    outputs = session.run({spec.name: feed.numpy() for spec, feed in zip(session.inputs, feeds, strict=True)})
    return [outputs[spec.name] for spec in session.outputs]


def assert_computes(path: Path, model: Model, feeds: tuple[Tensor, ...], tolerance: float = 1e-4) -> None:
    for found, expected in zip(run(path, feeds), model.run(*feeds), strict=True):
        assert found.shape == tuple(expected.shape)
        np.testing.assert_allclose(found, expected.numpy(), rtol=tolerance, atol=tolerance)


def assert_holds(path: Path, tensors: Mapping[str, QTensor]) -> None:
    found = tflite.read_codes(path)
    assert found.keys() == tensors.keys()
    assert {name: difference(tensor, found[name]) for name, tensor in tensors.items()} == dict.fromkeys(tensors)


def coded(model: Model, text: str, names: frozenset[str]) -> dict[str, QTensor]:
    """Every layer that takes the scheme; per channel where its groups do not divide."""
    schemes = (Scheme.parse(text), Scheme.parse(text.split("-")[0] + "-channel" if "-" in text else text))
    tensors = {}
    for layer in model.layers():
        if layer.name in names:
            scheme = next(s for s in schemes if s.unfit(layer.shape, layer.axis) is None)
            tensors[layer.name] = encode(model.tensors[layer.name].numpy(), scheme, layer.axis)
    return tensors


def in_integers(model: Model, samples: Tensor, granularity: str = "channel", bits: int = 8) -> Compressed:
    """Activations in int8, weights in int8 or int4, biases in int32."""
    model = separate_biases(model)
    model = rewrite(model, calibrate(model, [(samples,)], steps=4))
    tensors: dict[str, QTensor] = {}
    for name, uses in integer_layers(model).items():
        for node, source in uses:
            kind = KINDS[node.target]
            weight = encode(model.tensors[name].numpy(), Scheme("affine", bits, granularity), kind.axis)
            assert isinstance(weight, Affine)
            tensors[name] = weight
            if kind.bias is not None and len(node.args) > kind.bias and node.args[kind.bias] is not None:
                bias = str(node.args[kind.bias].target)  # type: ignore[union-attr]
                tensors[bias] = encode_bias(model.tensors[bias].numpy(), weight, source.scale)
    return Compressed(model, tensors)


def graph_of(path: Path) -> Graph:
    return read_graph(path.read_bytes())[0]


def kinds(path: Path) -> list[str]:
    return [operation.kind for operation in graph_of(path).operations]


# A trained network


@dataclass(frozen=True)
class Trained:
    model: Model
    base: tflite.Base
    images: Tensor


@pytest.fixture(scope="module")
def resnet() -> Trained:
    model = fold_batch_norm(from_module(trained_resnet20(), [torch.zeros(2, 3, 32, 32)]))
    return Trained(model, tflite.convert(model), torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def integer_resnet(resnet: Trained) -> tuple[Compressed, tflite.Base]:
    small = in_integers(resnet.model, resnet.images)
    return small, tflite.convert(small.model)


@pytest.mark.parametrize(
    ("scheme", "most_bytes"),
    [("int8-channel", 320_000), ("int4-channel", 185_000), ("int4-group16", 205_000), ("float16", 575_000)],
)
def test_compressed_weights_are_computed_exactly_and_read_back_bit_for_bit(
    resnet: Trained, tmp_path: Path, scheme: str, most_bytes: int
) -> None:
    small = Compressed(resnet.model, coded(resnet.model, scheme, resnet.base.names))
    assert len(small.qtensors) == len(resnet.model.layers())
    path = write(resnet.base, small, tmp_path)
    assert path.stat().st_size < most_bytes
    assert_holds(path, small.qtensors)
    assert_computes(path, small.decoded, (resnet.images[:1],))


def test_the_same_codes_give_the_same_bytes(resnet: Trained, tmp_path: Path) -> None:
    small = Compressed(resnet.model, coded(resnet.model, "int8-channel", resnet.base.names))
    first, second = write(resnet.base, small, tmp_path, "a"), write(resnet.base, small, tmp_path, "b")
    assert first.read_bytes() == second.read_bytes()


def test_an_integer_network_runs_in_integers_from_the_first_operation_to_the_last(
    integer_resnet: tuple[Compressed, tflite.Base], tmp_path: Path
) -> None:
    small, base = integer_resnet
    path = write(base, small, tmp_path)
    graph = graph_of(path)
    assert [op.kind for op in graph.operations if any(v.is_float for v in op.outputs)] == ["DEQUANTIZE"]
    assert [op.kind for op in graph.operations if any(v and v.is_float for v in op.inputs)] == ["QUANTIZE"]
    assert path.stat().st_size < 325_000
    assert_holds(path, small.qtensors)


def test_an_integer_network_agrees_with_its_definition_within_a_few_steps(
    integer_resnet: tuple[Compressed, tflite.Base], resnet: Trained, tmp_path: Path
) -> None:
    small, base = integer_resnet
    path = write(base, small, tmp_path)
    session = open_session(path, 1)
    found = session.run_many({session.inputs[0].name: resnet.images.numpy()[:, None]})[session.outputs[0].name][:, 0]
    expected = np.stack([small.decoded.run(image[None])[0].numpy()[0] for image in resnet.images])
    final = graph_of(path).operations[-1].inputs[0]
    assert final is not None
    assert final.grid is not None
    assert np.max(np.abs(found - expected)) < 6 * final.grid.scale[0]
    assert np.mean(found.argmax(1) == expected.argmax(1)) > 0.9


def test_a_trained_network_keeps_its_input_and_output(resnet: Trained, tmp_path: Path) -> None:
    session = open_session(write(resnet.base, Compressed(resnet.model, {}), tmp_path))
    assert [(spec.name, spec.shape, spec.dtype) for spec in session.inputs] == [("x", (1, 3, 32, 32), "float32")]
    assert [(spec.name, spec.shape) for spec in session.outputs] == [(resnet.model.outputs[0], (1, 10))]


def test_floats_that_changed_after_the_conversion_are_written(resnet: Trained, tmp_path: Path) -> None:
    name = resnet.model.layers()[0].name
    changed = resnet.model.with_tensors({name: resnet.model.tensors[name] * 0.5})
    path = write(resnet.base, Compressed(changed, {}), tmp_path)
    assert_computes(path, changed, (resnet.images[:1],))


# Every kind of layer


class Mixed(nn.Module):
    """A weight of every kind, a tied one, and a mask of -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3, padding=1)
        self.deep = nn.Conv2d(6, 12, 3, groups=6, padding=2, dilation=2)
        self.grouped = nn.Conv2d(12, 8, 3, groups=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 5, 4, stride=2, padding=1)
        self.linear = nn.Linear(5, 8)
        self.embedding = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.product = nn.Parameter(torch.randn(8, 6))
        self.mask = nn.Buffer(torch.full((6, 6), float("-inf")).triu(1))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        y = self.line(x)[:, :, None].expand(-1, -1, 8, -1)
        y = self.up(self.grouped(F.relu(self.deep(y))))
        y = self.linear(y.permute(0, 2, 3, 1)) @ self.product
        e = F.gelu(self.embedding(ids), approximate="tanh")
        a = F.scaled_dot_product_attention(e, e, e, attn_mask=self.mask)
        return y, self.head(a), a.mean(), (e * 1e-13 + 1e-12) * 1e12


@dataclass(frozen=True)
class Converted:
    model: Model
    base: tflite.Base
    feeds: tuple[Tensor, ...]


@pytest.fixture(scope="module")
def mixed() -> Converted:
    torch.manual_seed(1)
    network = Mixed()
    network.grouped.weight.data[3] = 0
    model = from_module(network, [torch.zeros(2, 4, 8), torch.zeros(2, 6, dtype=torch.long)])
    return Converted(model, tflite.convert(model), (torch.randn(1, 4, 8), torch.randint(0, 12, (1, 6))))


@pytest.mark.parametrize("scheme", ["int8-tensor", "int8-channel", "int4-channel", "int4-group2", "int2-group4"])
def test_each_kind_of_layer_takes_codes(mixed: Converted, tmp_path: Path, scheme: str) -> None:
    small = Compressed(mixed.model, coded(mixed.model, scheme, mixed.base.names))
    assert {layer.name for layer in mixed.model.layers()} == small.qtensors.keys()
    path = write(mixed.base, small, tmp_path)
    assert_holds(path, small.qtensors)
    assert_computes(path, small.decoded, mixed.feeds)


def test_scalars_tiny_constants_and_masks_survive(mixed: Converted, tmp_path: Path) -> None:
    path = write(mixed.base, Compressed(mixed.model, {}), tmp_path)
    outputs = run(path, mixed.feeds)
    assert outputs[2].shape == ()
    assert outputs[3].min() > 0.5
    assert_computes(path, mixed.model, mixed.feeds, 1e-5)


def test_unsigned_codes_and_zero_points_are_exact(mixed: Converted, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shape, scale = (8, 5), rng.uniform(0.01, 0.1, (8, 1)).astype(np.float32)
    points = rng.integers(0, 16, (8, 1)).astype(np.uint8)
    tensor = Affine(rng.integers(0, 16, shape).astype(np.uint8), scale, points, 4, signed=False)
    small = Compressed(mixed.model, {"linear.weight": tensor})
    path = write(mixed.base, small, tmp_path)
    assert_holds(path, small.qtensors)
    assert_computes(path, small.decoded, mixed.feeds)


@pytest.mark.parametrize(
    "tensor",
    [
        Palette(np.zeros((8, 5), np.uint8), np.zeros((1, 1, 16), np.float32), 4),
        Affine(np.zeros((8, 5), np.int8), np.ones((1, 1), np.float16)),
        Affine(np.zeros((8, 5), np.int8), np.ones((1, 1), np.float32), bits=3),
    ],
)
def test_what_no_constant_holds_is_an_error(mixed: Converted, tmp_path: Path, tensor: QTensor) -> None:
    with pytest.raises(ModelError, match=r"linear\.weight"):
        write(mixed.base, Compressed(mixed.model, {"linear.weight": tensor}), tmp_path)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "extra"),
    [
        (3, 2, 1, 1),
        (3, 2, 1, 0),
        (5, 3, 1, 2),
        (4, 2, 1, 0),
        (5, 2, (2, 0), (1, 0)),
        (4, (2, 1), (1, 2), 0),
        (3, 2, 0, 1),
    ],
)
def test_transposed_convolutions_of_any_padding_take_codes(
    tmp_path: Path, kernel: int, stride: int, padding: int, extra: int
) -> None:
    torch.manual_seed(3)
    samples = torch.randn(1, 3, 5, 6)
    up = nn.ConvTranspose2d(4, 6, kernel, stride, padding, extra)
    model = from_module(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), up, nn.ReLU()), [samples])
    base = tflite.convert(model)
    small = Compressed(model, coded(model, "int8-channel", base.names))
    assert small.qtensors.keys() == {"0.weight", "2.weight"}
    path = write(base, small, tmp_path)
    assert_holds(path, small.qtensors)
    assert_computes(path, small.decoded, (samples,))


def test_a_transposed_convolution_along_one_axis_takes_padding(tmp_path: Path) -> None:
    torch.manual_seed(3)
    samples = torch.randn(1, 4, 9)
    model = from_module(nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), [samples])
    path = write(tflite.convert(model), Compressed(model, {}), tmp_path)
    assert_computes(path, model, (samples,))


def test_a_transposed_convolution_with_its_edges_cut_off_runs_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(3)
    samples = torch.randn(4, 3, 6, 6)
    up = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1)
    small = in_integers(from_module(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), up, nn.ReLU()), [samples]), samples)
    path = write(tflite.convert(small.model), small, tmp_path)
    assert integer_operations(path) == 2
    (found,), (expected,) = run(path, (samples[:1],)), small.decoded.run(samples[:1])
    step = next(iter(integer_layers(small.model)["2.weight"]))[1].scale
    assert np.abs(found - expected.numpy()).max() <= 2 * expected.abs().max().item() / 127 + step


# Integer operations one by one


class Pooled(nn.Module):
    """Joins, pools and a layer that two operations with different inputs share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, groups=8, padding=1, stride=2)
        self.up = nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.relu6(self.first(x))
        d = F.leaky_relu(self.deep(y), 0.1)
        p = F.avg_pool2d(y, 2)
        c = torch.cat([F.max_pool2d(y, 2), p + d], 1)
        u = self.up(c) * y[:, :4]
        return u.flatten(2), self.linear(d.mean((2, 3))), x.flatten(1)


@pytest.fixture(scope="module", params=["channel", "tensor"])
def pooled(request: pytest.FixtureRequest) -> tuple[Compressed, tflite.Base, Tensor]:
    torch.manual_seed(2)
    network = Pooled()
    network.first.weight.data[1] = 0
    samples = torch.randn(4, 3, 16, 16)
    model = from_module(network, [samples.to(memory_format=torch.channels_last)])
    small = in_integers(model, samples, request.param)
    return small, tflite.convert(small.model), samples


def test_integer_kernels_agree_with_the_definition_within_two_steps(
    pooled: tuple[Compressed, tflite.Base, Tensor], tmp_path: Path
) -> None:
    small, base, samples = pooled
    path = write(base, small, tmp_path)
    assert_holds(path, small.qtensors)
    graph = graph_of(path)
    assert {op.kind for op in graph.operations if op.outputs[0].is_float} == {"DEQUANTIZE"}
    assert {"CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "ADD", "MUL", "LEAKY_RELU", "MEAN"} <= set(kinds(path))
    producers = graph.producers()
    scales = []
    for value in graph.outputs.values():
        integers = producers[value].inputs[0]
        assert integers is not None
        assert integers.grid is not None
        scales.append(float(integers.grid.scale[0]))
    each = [(run(path, (one,)), small.decoded.run(one)) for one in samples.split(1)]
    for i, scale in enumerate(scales):
        error = np.abs(np.stack([found[i] - expected[i].numpy() for found, expected in each]))
        assert np.max(error) <= 2.01 * scale
        assert np.mean(error) < 0.25 * scale


def test_a_layer_whose_codes_do_not_fit_integer_kernels_stays_float(
    pooled: tuple[Compressed, tflite.Base, Tensor], tmp_path: Path
) -> None:
    small, base, samples = pooled
    weight = small.qtensors["linear.weight"]
    assert isinstance(weight, Affine)
    codes = weight.codes.copy()
    codes[0, 0] = -128
    small = Compressed(small.model, {**small.qtensors, "linear.weight": Affine(codes, weight.scale)})
    path = write(base, small, tmp_path)
    kept = [op for op in graph_of(path).operations if op.kind == "FULLY_CONNECTED"]
    assert [op.outputs[0].is_float for op in kept] == [True]
    assert_holds(path, small.qtensors)
    np.testing.assert_allclose(run(path, (samples[:1],))[1], small.decoded.run(samples[:1])[1].numpy(), atol=0.02)


# 4-bit weights between int8 values


SHAPES = {
    "filters": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, 2)), (3, 16, 16)),
    "points": (lambda: nn.Sequential(nn.Conv2d(8, 16, 1)), (8, 9, 9)),
    "an odd number of codes": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3)), (3, 9, 9)),
    "groups": (lambda: nn.Sequential(nn.Conv2d(8, 16, 3, groups=2)), (8, 9, 9)),
    "holes": (lambda: nn.Sequential(nn.Conv2d(8, 16, 3, dilation=2)), (8, 12, 12)),
    "one axis": (lambda: nn.Sequential(nn.Conv1d(8, 16, 3)), (8, 12)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(5, 5, 3, padding=1, groups=5)), (5, 9, 9)),
    "depthwise with holes": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)), (8, 9, 9)),
    "two filters a channel": (lambda: nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, groups=8)), (8, 9, 9)),
    "rows": (lambda: nn.Sequential(nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 4, bias=False)), (32,)),
    "odd rows": (lambda: nn.Sequential(nn.Linear(33, 7)), (33,)),
    "rows of tokens": (lambda: nn.Sequential(nn.Linear(32, 8)), (5, 32)),
}
_INT4_VERSIONS = {"CONV_2D": 7, "DEPTHWISE_CONV_2D": 7, "FULLY_CONNECTED": 10}  # those that take 4-bit weights


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_of_four_bit_weights_agree_with_the_definition_within_a_step(
    name: str, granularity: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make, shape = SHAPES[name]
    samples = torch.randn(8, *shape)
    small = in_integers(from_module(make(), [samples]), samples, granularity, 4)
    path = write(tflite.convert(small.model), small, tmp_path)
    assert_holds(path, small.qtensors)
    graph = graph_of(path)
    layers = [op for op in graph.operations if op.kind in _INT4_VERSIONS]
    assert integer_operations(path) == len(layers) == len(integer_layers(small.model))
    assert all(op.version >= _INT4_VERSIONS[op.kind] for op in layers)
    last = graph.operations[-1].inputs[0]
    assert last is not None
    assert last.grid is not None
    for sample in samples.split(1):
        (found,), (expected,) = run(path, (sample,)), small.decoded.run(sample)
        assert np.abs(found - expected.numpy()).max() <= 1.01 * last.grid.scale[0]


def test_a_trained_network_of_four_bit_weights_takes_half_the_bytes(resnet: Trained, tmp_path: Path) -> None:
    small = in_integers(resnet.model, resnet.images, bits=4)
    path = write(tflite.convert(small.model), small, tmp_path)
    assert path.stat().st_size < 190_000
    assert integer_operations(path) == 20
    assert_holds(path, small.qtensors)
    found = np.concatenate([run(path, (image,))[0] for image in resnet.images.split(1)])
    expected = np.concatenate([small.decoded.run(image)[0].numpy() for image in resnet.images.split(1)])
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


# What is refused


@pytest.mark.parametrize(
    ("scheme", "integer", "reason"),
    [
        ("palette4-tensor", False, "look-up"),
        ("int4-channel-sparse", False, "zeros save no bytes"),
        ("int3-channel", False, "2, 4 or 8 bits"),
        ("int2-channel", True, "4 or 8 bits"),
        ("float16", True, "4 or 8 bits"),
        ("int8-group4", True, "per tensor or output channel"),
        ("int4-group4", True, "per tensor or output channel"),
        ("int4-group5", False, "not a multiple"),
    ],
)
def test_the_planner_is_told_why_an_encoding_does_not_fit(scheme: str, integer: bool, reason: str) -> None:
    assert reason in (tflite.accepts(Scheme.parse(scheme), LAYER, integer) or "")


@pytest.mark.parametrize(
    ("scheme", "integer"),
    [
        ("int8-channel", True),
        ("int8-tensor", True),
        ("int4-channel", True),
        ("int4-tensor", True),
        ("int4-group4", False),
        ("int2-channel", False),
        ("float16", False),
    ],
)
def test_the_planner_is_offered_what_files_can_hold(scheme: str, integer: bool) -> None:
    assert tflite.accepts(Scheme.parse(scheme), LAYER, integer) is None


def test_a_transposed_convolution_has_no_kernel_for_four_bit_weights() -> None:
    layer = Layer("w", "conv_transpose", (8, 4, 2, 2), 1, 0, 0, ("up",))
    assert "4-bit weights of kind conv_transpose" in (tflite.accepts(Scheme.parse("int4-channel"), layer, True) or "")
    assert tflite.accepts(Scheme.parse("int8-channel"), layer, True) is None


def test_an_operation_that_the_converter_lacks_is_named_on_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    class Spectral(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values: Tensor = torch.linalg.svdvals(x)
            return values

    with pytest.raises(ModelError, match=r"_linalg_svd") as caught:
        tflite.convert(from_module(Spectral(), [torch.zeros(1, 4, 4)]))
    assert "\n" not in str(caught.value)
    assert "LiteRT" not in capfd.readouterr().out


def test_a_weight_that_the_converter_transforms_cannot_be_coded(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    model = from_module(network, [torch.zeros(2, 3, 6, 6)])
    base = tflite.convert(model)
    assert "0.weight" not in base.names
    assert_computes(write(base, Compressed(model, {}), tmp_path), model, (torch.randn(1, 3, 6, 6),))
    with pytest.raises(ModelError, match=r"0\.weight"):
        write(base, Compressed(model, coded(model, "int8-channel", frozenset(["0.weight"]))), tmp_path)
    changed = model.with_tensors({"0.weight": model.tensors["0.weight"] * 2})
    with pytest.raises(ModelError, match=r"0\.weight"):
        write(base, Compressed(changed, {}), tmp_path)


def test_a_file_of_another_hand_holds_no_codes(resnet: Trained, tmp_path: Path) -> None:
    assert tflite.read_codes(write(resnet.base, Compressed(resnet.model, {}), tmp_path)) == {}
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    with pytest.raises(ArtifactError, match="no TFLite file"):
        tflite.read_codes(tmp_path / "noise")


def test_sparse_weights_are_refused(mixed: Converted, tmp_path: Path) -> None:
    dense = Cast(np.zeros((8, 5), np.float16))
    with pytest.raises(ModelError, match=r"linear\.weight"):
        write(mixed.base, Compressed(mixed.model, {"linear.weight": Sparse(np.zeros((8, 5), bool), dense)}), tmp_path)
