"""Core ML packages: what is stored, what it computes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from octoc.compressed import Compressed
from octoc.errors import ArtifactError, HostError, ModelError
from octoc.export import coreml, exporter, formats
from octoc.export.coreml_lowering import program
from octoc.export.coreml_lowering.fingerprint import Place
from octoc.export.coreml_lowering.storage import to_bytes
from octoc.graph import fold_batch_norm
from octoc.load.module import from_module
from octoc.model import Layer, Model
from octoc.qtensor import Affine, Array, Cast, Palette, QTensor, Scheme, Sparse, difference
from octoc.quantize.activations import Range, calibrate, rewrite
from octoc.runtime.coreml import integer_operations, open_session
from octoc.runtime.mil.reader import read_program
from octoc.runtime.mil.storage import decode
from tests.networks import trained_resnet20

DRAW = np.random.default_rng(0)


# ------------------------------------------------------------------ encoders, plain and independent of octoc's methods


def affine(weight: Array, scheme: Scheme, axis: int, dtype: str, shifted: bool = False) -> Affine:
    grid = scheme.grid(weight.shape, axis)
    tiles = _tiles(weight, grid)
    low, high = tiles.min(-1), tiles.max(-1)
    if shifted:
        scale = ((high - low) / (2**scheme.bits - 1) + (high == low)).astype(dtype)
        zero = np.clip(np.round(-low / scale.astype(np.float64)), 0, 2**scheme.bits - 1).astype(np.uint8)
        codes = np.clip(np.round(weight / _over(scale, weight)) + _over(zero, weight), 0, 2**scheme.bits - 1)
        return Affine(codes.astype(np.uint8), scale, zero, scheme.bits, signed=False)
    largest = 2 ** (scheme.bits - 1) - 1
    scale = (np.maximum(-low, high) / largest).astype(dtype)
    codes = np.round(weight / np.where(_over(scale, weight) == 0, 1, _over(scale, weight)))
    return Affine(np.clip(codes, -largest - 1, largest).astype(np.int8), scale, None, scheme.bits, signed=True)


def palette(weight: Array, scheme: Scheme, axis: int, dtype: str) -> Palette:
    grid = scheme.grid(weight.shape, axis)
    steps = np.linspace(0, 1, 2**scheme.bits)
    table = np.quantile(_tiles(weight, grid), steps, axis=-1)  # [entries, *grid]
    table = np.moveaxis(table, 0, -1).astype(dtype)
    spread = np.stack([_over(table[..., i], weight) for i in range(2**scheme.bits)], -1)
    return Palette(np.abs(weight[..., None] - spread).argmin(-1).astype(np.uint8), table, scheme.bits)


def encode(weight: Array, text: str, axis: int, dtype: str) -> QTensor:
    scheme = Scheme.parse(text)
    if scheme.sparse:
        mask = np.abs(weight) > np.median(np.abs(weight))
        dense = encode(weight, text.removesuffix("-sparse"), axis, dtype)
        parts = {"codes": dense.arrays().get("codes"), "values": dense.arrays().get("values")}
        if isinstance(dense, Affine):
            dense = Affine(parts["codes"] * mask, dense.scale, dense.zero_point, dense.bits, dense.signed)
        elif isinstance(dense, Palette):
            dense = Palette(parts["codes"] * mask, dense.table, dense.bits)
        else:
            dense = Cast(np.where(mask, parts["values"], np.float16(0)))
        return Sparse(mask, dense)
    if scheme.kind == "cast":
        return Cast(weight.astype(np.float16))
    return (palette if scheme.kind == "palette" else affine)(weight, scheme, axis, dtype)


def _tiles(weight: Array, grid: tuple[int, ...]) -> Array:
    """[*grid, elements of a tile]."""
    split = [size for g, w in zip(grid, weight.shape, strict=True) for size in (g, w // g)]
    rank = weight.ndim
    order = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]
    return weight.reshape(split).transpose(order).reshape(*grid, -1)


def _over(grid: Array, weight: Array) -> Array:
    for axis, size in enumerate(weight.shape):
        grid = np.repeat(grid, size // grid.shape[axis], axis)
    return grid


# -------------------------------------------------------------------------------------------------------- what is run


def compress(base: coreml.Base, model: Model, choose: Callable[[Layer], str | None]) -> Compressed:
    coded = {}
    for layer in model.layers():
        text = choose(layer)
        if text is not None:
            coded[layer.name] = encode(model.tensors[layer.name].detach().numpy(), text, layer.axis, base.compute)
    return Compressed(model, coded)


def package(base: coreml.Base, small: Compressed, folder: Path) -> Path:
    path = folder / coreml.FILE
    coreml.write(base, small, path)
    return path


def feeds(model: Model) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(spec.shape, generator=generator)
        if spec.dtype.is_floating_point
        else torch.randint(0, 7, spec.shape, generator=generator)
        for spec in model.inputs
    )


def run(path: Path, model: Model, inputs: tuple[Tensor, ...]) -> dict[str, Array]:
    given = {
        spec.name: value.numpy().astype(np.float32 if value.is_floating_point() else np.int32)
        for spec, value in zip(model.inputs, inputs, strict=True)
    }
    return dict(open_session(path).run(given))


def error(path: Path, small: Compressed) -> float:
    """Largest difference from torch over all outputs, relative to the largest magnitude."""
    inputs = feeds(small.model)
    found = run(path, small.model, inputs)
    worst = 0.0
    for name, expected in zip(small.model.outputs, small.decoded.run(*inputs), strict=True):
        wanted = expected.detach().numpy().astype(np.float64)
        assert found[name].shape == wanted.shape
        assert np.isfinite(found[name]).all()
        worst = max(worst, float(np.abs(found[name] - wanted).max() / np.abs(wanted).max()))
    return worst


def same_codes(path: Path, expected: Mapping[str, QTensor]) -> bool:
    found = coreml.read_codes(path)
    assert found.keys() == expected.keys()
    differences = {name: difference(q, found[name]) for name, q in expected.items()}
    assert not any(differences.values()), differences
    return True


def coremltools_takes(path: Path) -> bool:
    """coremltools' own reader rebuilds the program, which checks every operation's types and shapes."""
    ct = program.load_coremltools()
    from coremltools.converters.mil.frontend.milproto.load import load

    loaded = ct.models.MLModel(str(path), skip_model_load=True)
    rebuilt = load(
        loaded.get_spec(),
        specification_version=loaded.get_spec().specificationVersion,
        file_weights_dir=loaded.weights_dir,
    )
    return "main" in rebuilt.functions


def kinds(path: Path) -> list[str]:
    return [op.kind for op in read_program(path).main.operations if op.kind != "const"]


def weight_bytes(path: Path) -> int:
    return (path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size


def converted(network: nn.Module, *examples: Tensor) -> tuple[Model, coreml.Base]:
    model = from_module(network.eval(), examples)
    return model, coreml.convert(model)


# ----------------------------------------------------------------------------------------------------------- ResNet-20


@pytest.fixture(scope="module")
def resnet() -> tuple[Model, coreml.Base]:
    model = fold_batch_norm(from_module(trained_resnet20(), [torch.zeros(1, 3, 32, 32)]))
    return model, coreml.convert(model)


@pytest.mark.parametrize("text", [None, "int8-channel", "palette4-tensor", "int4-channel-sparse"])
def test_resnet_20_is_written_exactly_and_computes_the_decoded_network(resnet, tmp_path, text):
    model, base = resnet
    small = compress(base, model, lambda layer: text)
    path = package(base, small, tmp_path)
    assert same_codes(path, small.qtensors)
    assert error(path, small) < 1e-2


def test_resnet_20_computes_in_float16_and_every_layer_takes_codes(resnet):
    model, base = resnet
    assert (base.compute, base.notes) == ("float16", ())
    assert {layer.name for layer in model.layers()} <= base.names
    assert base.inputs == ("x",)
    assert base.outputs == model.outputs


def test_a_resnet_20_package_has_less_than_60_kb_beside_its_weights(resnet, tmp_path):
    model, base = resnet
    small = compress(base, model, lambda layer: "int8-channel")
    path = package(base, small, tmp_path)
    whole = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    floats = sum(2 * t.numel() for name, t in model.tensors.items() if name not in small.qtensors)
    assert whole - sum(q.nbytes for q in small.qtensors.values()) - floats < 60_000
    assert not list(path.rglob("executorch*"))


def test_the_same_codes_give_the_same_bytes(resnet, tmp_path):
    model, base = resnet
    small = compress(base, model, lambda layer: "int4-channel")
    contents = []
    for name, made in (("a", base), ("b", coreml.convert(model))):
        path = package(made, small, tmp_path / name)
        contents.append({f.relative_to(path): f.read_bytes() for f in path.rglob("*") if f.is_file()})
    assert contents[0] == contents[1]


def test_changed_biases_reach_the_file_without_another_conversion(resnet, tmp_path):
    model, base = resnet
    changed = model.with_tensors({"linear.bias": torch.arange(10.0)})
    path = package(base, Compressed(changed, {}), tmp_path)
    assert error(path, Compressed(changed, {})) < 1e-2


# --------------------------------------------------------------------------------------------------------- every layer


class EveryLayer(nn.Module):
    """Each kind of weight, with an all-zero channel in each."""

    def __init__(self) -> None:
        super().__init__()
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)
        self.upwards = nn.ConvTranspose2d(4, 8, 3, stride=2)
        self.line = nn.Conv1d(8, 12, 3)
        self.dense = nn.Linear(12, 16)
        self.right = nn.Parameter(torch.randn(16, 8))  # x @ w: Core ML wants its transpose
        self.table = nn.Embedding(10, 8)
        with torch.no_grad():
            for weight in (self.dilated.weight, self.line.weight, self.dense.weight, self.table.weight):
                weight[1] = 0
            self.upwards.weight[:, 1] = 0

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = self.line(F.relu(self.upwards(self.dilated(x))).mean(-1))
        y = torch.tanh(self.dense(y.transpose(1, 2)))
        return y @ self.right + self.table(ids).mean(1, keepdim=True)


@pytest.fixture(scope="module")
def every() -> tuple[Model, coreml.Base]:
    torch.manual_seed(0)
    return converted(EveryLayer(), torch.randn(2, 4, 6, 6), torch.zeros(2, 3, dtype=torch.int64))


@pytest.fixture(scope="module")
def every_in_float32() -> tuple[Model, coreml.Base]:
    class Tiny(EveryLayer):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return super().forward(x, ids) + 1e-12

    torch.manual_seed(0)
    return converted(Tiny(), torch.randn(2, 4, 6, 6), torch.zeros(2, 3, dtype=torch.int64))


SCHEMES = [
    *(f"int{bits}-{grain}{sparse}" for bits in (4, 8) for grain in ("tensor", "channel") for sparse in ("", "-sparse")),
    *(f"palette{bits}-tensor" for bits in (1, 2, 3, 4, 6, 8)),
    *(f"palette{bits}-channel-sparse" for bits in (1, 2, 3, 4, 6, 8)),
    "int4-group4",
    "palette3-group2",
    "float16",
    "float16-sparse",
]


@pytest.mark.parametrize("text", SCHEMES)
def test_every_scheme_is_read_back_exactly_and_computes_what_it_means(every, tmp_path, text):
    model, base = every
    scheme = Scheme.parse(text)
    small = compress(base, model, lambda layer: None if scheme.unfit(layer.shape, layer.axis) else text)
    assert len(small.qtensors) >= 5
    path = package(base, small, tmp_path)
    assert same_codes(path, small.qtensors)
    assert error(path, small) < 1e-2


@pytest.mark.parametrize(
    "text", ["int8-channel", "int4-tensor-sparse", "palette4-channel", "float16", "float16-sparse"]
)
def test_a_float32_program_agrees_to_rounding(every_in_float32, tmp_path, text):
    model, base = every_in_float32
    assert base.compute == "float32"
    small = compress(base, model, lambda layer: text)
    path = package(base, small, tmp_path)
    assert same_codes(path, small.qtensors)
    assert error(path, small) < 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_unsigned_codes_with_zero_points_are_read_back_exactly(every, tmp_path, bits):
    model, base = every
    layers = {layer.name: layer for layer in model.layers()}
    coded = {
        name: affine(
            model.tensors[name].detach().numpy(), Scheme("affine", bits, "channel"), layers[name].axis, "float16", True
        )
        for name in ("upwards.weight", "right")
    }
    small = Compressed(model, coded)
    path = package(base, small, tmp_path)
    assert same_codes(path, coded)
    assert error(path, small) < 1e-2


@pytest.mark.parametrize(
    "text", ["int4-group4", "palette3-channel", "int8-channel-sparse", "palette4-tensor-sparse", "float16"]
)
def test_coremltools_takes_what_is_written(every, tmp_path, text):
    model, base = every
    scheme = Scheme.parse(text)
    small = compress(base, model, lambda layer: None if scheme.unfit(layer.shape, layer.axis) else text)
    assert coremltools_takes(package(base, small, tmp_path))


def test_coremltools_takes_a_float32_program(every_in_float32, tmp_path):
    model, base = every_in_float32
    texts = iter(["float16", "float16-sparse", "int4-tensor-sparse", "palette2-channel", "int8-channel", "float16"])
    assert coremltools_takes(package(base, compress(base, model, lambda layer: next(texts)), tmp_path))


def test_a_transposed_weight_is_read_back_in_its_own_layout(every, tmp_path):
    model, base = every
    layouts = dict(base.places.values())
    assert not layouts["right"].is_plain
    small = compress(base, model, lambda layer: "int8-channel" if layer.name == "right" else None)
    path = package(base, small, tmp_path)
    assert coreml.read_codes(path)["right"].shape == (16, 8)
    assert kinds(path).count("constexpr_blockwise_shift_scale") == 1


def test_four_bit_codes_take_half_the_bytes_of_eight(every, tmp_path):
    model, base = every
    sizes = [
        weight_bytes(package(base, compress(base, model, lambda layer, t=text: t), tmp_path / text))
        for text in ("int8-tensor", "int4-tensor")
    ]
    codes = sum(layer.size for layer in model.layers())
    assert abs(sizes[0] - sizes[1] - codes / 2) <= 64 * 6  # each record ends on a multiple of 64


# ------------------------------------------------------------------------------------------------------------ packing


@given(st.sampled_from([1, 2, 3, 4, 6, 8]), st.data())
def test_packed_codes_are_what_the_runtime_unpacks(bits, data):
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), np.uint8)
    packed = to_bytes(codes, f"UINT{bits}")
    assert len(packed) == -(-codes.size * bits // 8)
    assert np.array_equal(decode(np.frombuffer(packed, np.uint8), f"UINT{bits}", codes.shape), codes)


@given(st.lists(st.integers(-8, 7), max_size=70))
def test_signed_four_bit_codes_keep_their_sign(values):
    codes = np.array(values, np.int8)
    packed = np.frombuffer(to_bytes(codes, "INT4"), np.uint8)
    assert np.array_equal(decode(packed, "INT4", codes.shape), codes)


@given(st.permutations(range(3)), st.integers(0, 3), st.booleans())
def test_a_layout_is_undone_by_its_inverse(order, position, table):
    axes = [*order]
    axes.insert(position, -1)
    place = Place(tuple(axes), 3)
    array = np.arange(2 * 3 * 5 * (4 if table else 1)).reshape((2, 3, 5, 4) if table else (2, 3, 5))
    assert np.array_equal(place.restore(place.store(array)), array)


# --------------------------------------------------------------------------------------------- operations that go wrong


class Gelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh") - F.gelu(x)


def test_both_forms_of_gelu_are_kept_apart(tmp_path):
    model, base = converted(Gelu(), torch.zeros(2, 400))
    path = package(base, Compressed(model, {}), tmp_path)
    assert kinds(path).count("gelu") == 2
    x = torch.linspace(-4, 4, 400)[None]
    (found,) = run(path, model, (x,)).values()
    exact, other = F.gelu(x), F.gelu(x, approximate="tanh")
    assert np.abs(found - (other - exact).numpy()).max() < 4e-3  # both are rounded to float16
    modes = [op.inputs["mode"][0] for op in read_program(path).main.operations if op.kind == "gelu"]
    assert len(set(map(str, modes))) == 2


class Scaled(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.sub(torch.add(x, y, alpha=3), x * x, alpha=0.5)


def test_the_factor_of_a_sum_is_not_dropped(tmp_path):
    model, base = converted(Scaled(), torch.zeros(2, 4), torch.zeros(2, 4))
    small = Compressed(model, {})
    assert error(package(base, small, tmp_path), small) < 1e-2


class Ratio(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x + 1e-12)


def test_a_constant_that_vanishes_in_float16_makes_the_program_float32(tmp_path):
    model, base = converted(Ratio(), torch.zeros(2, 4))
    assert base.compute == "float32"
    assert len(base.notes) == 1
    assert "1e-12" in base.notes[0]
    assert "vanishes" in base.notes[0]
    (found,) = run(package(base, Compressed(model, {}), tmp_path), model, (torch.tensor([[0.0, 1, -2, 3]]),)).values()
    assert np.allclose(found, [[0, 1, 1, 1]])


class Masked(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((5, 5), value).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(1, 2) + self.mask).softmax(-1) @ x


@pytest.mark.parametrize(("value", "compute"), [(float("-inf"), "float16"), (-1e9, "float32")])
def test_an_infinite_mask_stays_in_float16_and_a_finite_one_beyond_it_does_not(tmp_path, value, compute):
    model, base = converted(Masked(value), torch.zeros(2, 5, 4))
    assert base.compute == compute
    assert any("overflows" in note and "mask" in note for note in base.notes) == (compute == "float32")
    small = Compressed(model, {})
    assert error(package(base, small, tmp_path), small) < 1e-2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 16)
        self.head = nn.Linear(16, 100, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


def test_a_shared_weight_is_stored_once(tmp_path):
    model, base = converted(Tied(), torch.zeros(2, 5, dtype=torch.int64))
    small = compress(base, model, lambda layer: "int8-channel")
    path = package(base, small, tmp_path)
    assert same_codes(path, small.qtensors)
    assert kinds(path).count("constexpr_blockwise_shift_scale") == 1
    assert weight_bytes(path) < 2 * 100 * 16
    assert error(path, small) < 1e-2


class Total(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().sum()


def test_a_scalar_output_stays_a_scalar(tmp_path):
    model, base = converted(Total(), torch.zeros(1, 8))
    small = compress(base, model, lambda layer: "int8-tensor")
    assert error(package(base, small, tmp_path), small) < 1e-2


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.cell = cell(6, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
def test_recurrent_layers_convert_and_their_folded_first_step_keeps_true_weights(tmp_path, cell):
    torch.manual_seed(0)
    model, base = converted(Recurrent(cell), torch.randn(2, 2, 6))
    small = compress(base, model, lambda layer: "int8-channel")
    path = package(base, small, tmp_path)
    assert same_codes(path, small.qtensors)
    assert error(path, small) < 1e-2


class Standardised(nn.Module):
    """A weight that is used as it is and computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.other = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, centred) + 2 * F.conv2d(x, self.weight) + self.other(x)


@pytest.fixture(scope="module")
def standardised() -> tuple[Model, coreml.Base]:
    return converted(Standardised(), torch.zeros(2, 3, 6, 6))


def test_a_weight_that_the_converter_computes_with_keeps_its_value_and_takes_no_codes(standardised, tmp_path):
    model, base = standardised
    assert "weight" not in base.names
    small = compress(base, model, lambda layer: "int8-channel" if layer.name in base.names else None)
    assert small.qtensors.keys() == {"other.weight"}
    assert error(package(base, small, tmp_path), small) < 1e-2
    with pytest.raises(ModelError, match="weight weight is not a plain constant"):
        package(base, compress(base, model, lambda layer: "int8-channel"), tmp_path / "refused")


def test_a_weight_that_was_computed_with_cannot_change_without_a_conversion(standardised, tmp_path):
    model, base = standardised
    changed = model.with_tensors({"weight": model.tensors["weight"] + 1})
    with pytest.raises(ModelError, match="tensor weight changed since the conversion"):
        package(base, Compressed(changed, {}), tmp_path)


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.hardswish(self.norm(self.conv(x)))
        return y.flatten(1).argmax(-1), F.interpolate(y, scale_factor=2.0, mode="bilinear")


def test_channels_last_examples_leave_no_order_of_axes_in_the_graph(tmp_path):
    model, base = converted(Image(), torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last))
    assert not any("dim_order" in str(node.target) for node in model.graph.nodes)
    small = compress(base, model, lambda layer: "palette4-tensor")
    path = package(base, small, tmp_path)
    assert error(path, small) < 1e-2
    assert {spec.name: spec.dtype for spec in open_session(path).outputs} == dict(
        zip(model.outputs, ("int32", "float32"), strict=True)
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        y = F.relu(self.second(y) + y)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


@pytest.mark.parametrize("text", ["int8-channel", "int4-channel", "int4-tensor"])
def test_integer_activations_feed_every_layer_and_biases_hold_what_32_bit_codes_mean(tmp_path, text):
    torch.manual_seed(0)
    model = from_module(Residual().eval(), [torch.randn(2, 3, 8, 8)])
    model = rewrite(model, calibrate(model, [(torch.randn(16, 3, 8, 8),)]))
    base = coreml.convert(model)
    weights = compress(base, model, lambda layer: text).qtensors
    step = np.full(4, 1e-3, np.float32)
    codes = np.round(model.tensors["first.bias"].detach().numpy() / step).astype(np.int32)
    small = Compressed(model, {**weights, "first.bias": Affine(codes, step, None, 32)})
    path = package(base, small, tmp_path)
    assert same_codes(path, weights)
    main = read_program(path).main
    made = {name: op.kind for op in main.operations for name in op.outputs}
    layers = [op for op in main.operations if op.kind in ("conv", "linear")]
    assert [(made[op.inputs["x"][0]], made[op.inputs["weight"][0]]) for op in layers] == [
        ("dequantize", "constexpr_blockwise_shift_scale")
    ] * 3
    stored = {name: op.inputs["val"][0] for op in main.operations if op.kind == "const" for name in op.outputs}
    bias = stored[layers[0].inputs["bias"][0]]
    assert np.array_equal(bias, small.qtensors["first.bias"].dequantize().astype(np.float16))
    assert error(path, small) < 2e-2  # one step of the output's 255 may be rounded the other way
    assert integer_operations(path) == 3
    assert coremltools_takes(path)


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_a_requantization_around_a_reshape_is_kept(tmp_path):
    model = from_module(Flat(), [torch.zeros(2, 3, 4)])
    model = rewrite(model, {"x": Range(0.02, 3), "flatten": Range(0.25, -5)})
    small = Compressed(model, {})
    path = package(coreml.convert(model), small, tmp_path)
    assert kinds(path).count("quantize") == 2
    assert error(path, small) < 1e-2


class Copies(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.relu()
        return y, x, y


def test_an_input_or_an_output_may_be_returned_again(tmp_path):
    model, base = converted(Copies(), torch.zeros(2, 3))
    small = Compressed(model, {})
    assert error(package(base, small, tmp_path), small) < 1e-2


def test_names_keep_to_core_mls_rules(tmp_path):
    model = replace(from_module(Total().eval(), [torch.zeros(1, 8)]), outputs=("a/b.c",))
    base = coreml.convert(model)
    assert base.outputs == ("a_b_c",)
    assert [spec.name for spec in open_session(package(base, Compressed(model, {}), tmp_path)).outputs] == ["a_b_c"]


# ------------------------------------------------------------------------------------------------- refusals and errors


def layer(*shape: int, axis: int = 0, kind: str = "conv") -> Layer:
    return Layer("w", kind, shape, axis, 0, 0, ("op",))


@pytest.mark.parametrize(
    ("text", "shape", "integer", "reason"),
    [
        ("int8-channel", (10, 12, 3, 3), False, None),
        ("int8-channel", (10, 12, 3, 3), True, None),
        ("palette6-group2", (10, 12), False, None),
        ("float16-sparse", (10, 12), False, None),
        ("int3-channel", (10, 12), False, "4 or 8 bits, not 3"),
        ("int4-group8", (8, 10), False, "10 input channels are not a multiple of groups of 8"),
        ("int4-channel", (10, 12), True, None),
        ("int2-channel", (10, 12), True, "4 or 8 bits, not 2"),
        ("int4-group4", (10, 12), True, "one scale a tensor or channel"),
        ("palette8-tensor", (10, 12), True, "integer weights"),
        ("int8-channel", (2, 2, 2, 2, 2, 2), False, "at most 5 axes"),
    ],
)
def test_schemes_are_accepted_or_refused_with_the_numbers(text, shape, integer, reason):
    found = coreml.accepts(Scheme.parse(text), layer(*shape), integer)
    assert found is None if reason is None else reason in found


def wrong(every: tuple[Model, coreml.Base], name: str) -> dict[str, QTensor]:
    weight = every[0].tensors["dense.weight"].detach().numpy()
    good = affine(weight, Scheme("affine", 8, "channel"), 0, "float16")
    return {
        "float32 scales": {"dense.weight": Affine(good.codes, good.scale.astype(np.float32))},
        "float32 tables": {"dense.weight": palette(weight, Scheme("palette", 2), 0, "float32")},
        "three bits": {"dense.weight": Affine(good.codes, good.scale, None, 3)},
        "another shape": {"dense.weight": Affine(good.codes[:8], good.scale[:8])},
        "no such weight": {"dense.wait": good},
        "nothing but zeros": {"dense.weight": Sparse(np.zeros(weight.shape, bool), good)},
    }[name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("float32 scales", "computes in float16, the scales are float32"),
        ("float32 tables", "computes in float16, the table is float32"),
        ("three bits", "4 or 8 bits, not 3"),
        ("another shape", r"\[8, 12\] does not fit the program's \[16, 12\]"),
        ("no such weight", "dense.wait is not a plain constant"),
        ("nothing but zeros", "zeros only"),
    ],
)
def test_what_cannot_be_stored_as_given_is_refused_and_leaves_nothing_behind(every, tmp_path, name, reason):
    model, base = every
    with pytest.raises(ModelError, match=reason) as caught:
        package(base, Compressed(model, wrong(every, name)), tmp_path)
    assert "\n" not in str(caught.value)
    assert "dense." in str(caught.value)
    assert not list(tmp_path.iterdir())


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_an_operation_without_a_counterpart_is_named_on_one_line():
    with pytest.raises(ModelError, match="bessel_j0") as caught:
        converted(Unknown(), torch.zeros(2, 3))
    assert "\n" not in str(caught.value)


def test_a_value_beyond_float16_is_refused_rather_than_made_infinite(every, tmp_path):
    model, base = every
    changed = model.with_tensors({"dense.bias": torch.full((16,), 1e6)})
    with pytest.raises(ModelError, match=r"dense\.bias has a value beyond 65504"):
        package(base, Compressed(changed, {}), tmp_path)


def test_conversion_and_writing_print_nothing(tmp_path, capfd):
    model, base = converted(Total(), torch.zeros(1, 8))
    package(base, Compressed(model, {}), tmp_path)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_a_missing_coremltools_is_the_machines_fault(monkeypatch):
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    with pytest.raises(HostError, match="coremltools"):
        program.load_coremltools()


def test_damaged_packages_are_reported(every, tmp_path):
    model, base = every
    path = package(base, compress(base, model, lambda layer: "int8-channel"), tmp_path)
    weights = path / "Data/com.apple.CoreML/weights/weight.bin"
    weights.write_bytes(weights.read_bytes()[:-200])
    with pytest.raises(ArtifactError):
        coreml.read_codes(path)
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(b"no protobuf")
    with pytest.raises(ArtifactError, match="no Core ML package"):
        coreml.read_codes(path)


def test_the_folder_names_no_format_but_modules_of_the_contract():
    assert "coreml" in formats()
    assert "coreml_lowering" not in formats()
    module: Any = exporter("coreml")
    assert all(hasattr(module, name) for name in ("FILE", "accepts", "convert", "write", "read_codes"))


def test_a_folder_that_exists_is_left_alone(every, tmp_path):
    path = package(every[1], Compressed(every[0], {}), tmp_path)
    with pytest.raises(FileExistsError):
        package(every[1], Compressed(every[0], {}), tmp_path)
    assert coreml.read_codes(path) == {}


def test_a_program_of_another_graph_is_refused(every, tmp_path):
    model, base = every
    other = replace(model, tensors={name: t for name, t in model.tensors.items() if name != "line.bias"})
    with pytest.raises(ModelError, match=r"line\.bias is missing"):
        package(base, Compressed(other, {}), tmp_path)


def test_the_manifest_is_coremls(every, tmp_path):
    path = package(every[1], Compressed(every[0], {}), tmp_path)
    manifest = json.loads((path / "Manifest.json").read_text())
    assert manifest["rootModelIdentifier"] in manifest["itemInfoEntries"]
    assert {entry["path"] for entry in manifest["itemInfoEntries"].values()} == {
        "com.apple.CoreML/model.mlmodel",
        "com.apple.CoreML/weights",
    }
