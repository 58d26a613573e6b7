"""Activations are quantized where integer kernels stand, over the best range, and the graph says what that means."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from octoc.apply import quantize_activations
from octoc.load.module import from_module
from octoc.model import Model, aten
from octoc.qtensor import Affine
from octoc.quantize.activations import (
    calibrate,
    encode_bias,
    integer_layers,
    make_room,
    quantization_points,
    rewrite,
    separate_biases,
    share_grid,
)
from octoc.quantize.ranges import HIGH, LOW, Range, choose_range
from octoc.stats import Histogram

Floats = NDArray[np.float64]


class Calls(nn.Module):
    """A network given as a function of its parts and its input."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class NamedInput(nn.Module):
    """Its argument has the name of a Python builtin, so that its node has another one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.linear(input)


def model_of(function: Callable[..., Any], *shape: int, **parts: nn.Module) -> Model:
    return from_module(Calls(function, **parts), [torch.zeros(1, *shape)])


def node_of(model: Model, target: Any, index: int = 0) -> str:
    return [node.name for node in model.graph.nodes if node.target is target][index]


def fake(x: Tensor, found: Range) -> Tensor:
    """What int8 with this range leaves of a value, by the definition."""
    codes = torch.clamp(torch.round(x / found.scale) + found.zero_point, LOW, HIGH)
    return (codes - found.zero_point) * found.scale


def filled(values: Any) -> Histogram:
    histogram = Histogram()
    histogram.update(np.asarray(values, np.float32))
    return histogram


def test_inputs_and_results_of_integer_operations_become_int8_after_their_activation() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.softmax(m.linear(F.relu(m.conv(x)).mean((2, 3))), 1)

    model = model_of(forward, 3, 8, 8, conv=nn.Conv2d(3, 4, 3), linear=nn.Linear(4, 5))
    names = {"x": "x", "relu": "relu", "mean": "mean", "linear": "linear"}
    assert quantization_points(model) == names


def test_an_activation_that_is_not_fused_reads_and_gives_floats() -> None:
    model = model_of(lambda m, x: m.two(F.gelu(m.one(x))), 4, one=nn.Linear(4, 4), two=nn.Linear(4, 4))
    assert quantization_points(model) == {n: n for n in ("x", "linear", "gelu", "linear_1")}


def test_a_result_with_two_readers_is_quantized_before_the_activation_and_after() -> None:
    model = model_of(lambda m, x: (y := m.one(x)) + F.relu(y), 4, one=nn.Linear(4, 4))
    points = quantization_points(model)
    assert {"linear", "relu", "add"} <= set(points)


def test_padded_sliced_pooled_and_reshaped_values_share_the_range_of_where_they_come_from() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.conv(x))
        y = F.max_pool2d(F.pad(y[:, :, ::2, ::2], (1, 1, 1, 1)), 2)
        return m.linear(y.permute(0, 2, 3, 1).flatten(1))

    model = model_of(forward, 3, 8, 8, conv=nn.Conv2d(3, 4, 1), linear=nn.Linear(36, 5))
    points = quantization_points(model)
    moved = [node.name for node in model.graph.nodes if points.get(node.name) == "relu"]
    targets = {str(model.nodes()[name].target).split(".")[1] for name in moved}
    assert {"relu", "slice", "pad", "max_pool2d", "permute", "flatten"} <= targets
    ranges = calibrate(model, [(torch.randn(4, 3, 8, 8),)], steps=10)
    assert len({ranges[name] for name in moved}) == 1


def test_a_pad_that_brings_other_values_than_zero_is_no_move() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.two(F.pad(m.one(x), (1, 1), value=3.0))

    model = model_of(forward, 4, one=nn.Linear(4, 4), two=nn.Linear(6, 2))
    points = quantization_points(model)
    pad = node_of(model, aten.pad.default)
    assert points[pad] == pad


def test_a_moved_value_shares_its_source_s_range_although_the_source_is_read_by_an_integer_operation_later() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        z = y.reshape(-1, 2, 2)
        return m.one(y) + m.two(z).flatten(1)

    model = model_of(forward, 4, one=nn.Linear(4, 4), two=nn.Linear(2, 2))
    points = quantization_points(model)
    moved = node_of(model, aten.reshape.default)
    assert points[moved] == points["tanh"] == "tanh"


def test_whole_numbers_stay_whole_numbers() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(300, 4)
            self.linear = nn.Linear(4, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.linear(self.embedding(tokens + 200))

    model = from_module(Shifted(), [torch.zeros(1, 3, dtype=torch.int64)])
    x = torch.randint(0, 100, (4, 3))
    points = quantization_points(model)
    assert set(points) == {"embedding", "linear"}
    result = quantize_activations(model, calibrate(model, [(x,)], steps=50))
    reference = model.run(x)[0]
    assert float((result.run(x)[0] - reference).abs().max()) < 0.03 * float(reference.abs().max())


def test_an_input_called_input_is_calibrated_like_any_other() -> None:
    torch.manual_seed(0)
    module = NamedInput()
    model = from_module(module, [torch.zeros(1, 4)])
    assert model.inputs[0].name == "input"
    x = torch.randn(64, 4)
    ranges = calibrate(model, [(x,)], steps=20)
    assert model.placeholders[0].name in ranges
    result = rewrite(model, ranges)
    expected = fake(module.linear(fake(x, ranges[model.placeholders[0].name])), ranges["linear"])
    torch.testing.assert_close(result.run(x)[0], expected, rtol=0, atol=1e-6)


class Hand(nn.Module):
    """Every kind of place: fused activations, a residual, a move, a pool, a leaky ReLU, an operation in floats."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.one(x))
        y = F.relu6(y + self.two(y))
        y = F.leaky_relu(F.max_pool2d(y, 2) * 0.5, 0.1)
        return torch.sigmoid(self.head(y.flatten(1)))


def test_the_rewritten_graph_computes_what_quantizing_by_hand_gives() -> None:
    torch.manual_seed(0)
    net = Hand().eval()
    x = torch.randn(16, 3, 4, 4)
    model = from_module(net, [x[:1]])
    ranges = calibrate(model, [(x[:8],), (x[8:],)], steps=30)
    result = rewrite(model, ranges)
    taken: set[str] = set()

    def q(value: Tensor, target: Any, index: int = 0) -> Tensor:
        name = target if isinstance(target, str) else node_of(model, target, index)
        taken.add(name)
        return fake(value, ranges[name])

    with torch.no_grad():
        v = q(x, "x")
        y = q(F.relu(net.one(v)), aten.relu.default)
        added = F.relu6(y + q(net.two(y), aten.conv2d.default, 1))
        six = next(n for n in model.graph.nodes if n.target in (aten.relu6.default, aten.hardtanh.default)).name
        y = q(F.max_pool2d(q(added, six), 2), aten.max_pool2d.default)
        y = q(F.leaky_relu(q(y * 0.5, aten.mul.Tensor), 0.1), aten.leaky_relu.default)
        y = q(y.flatten(1), aten.flatten.using_ints)
        expected = torch.sigmoid(q(net.head(y), aten.linear.default))
    assert taken == set(ranges)
    torch.testing.assert_close(result.run(x)[0], expected, rtol=1e-6, atol=1e-6)
    # int8 is close to the floats, or the ranges are wrong
    assert float((expected - model.run(x)[0]).abs().max()) < 0.05


def test_an_output_that_other_operations_read_too_is_int8_everywhere() -> None:
    torch.manual_seed(0)
    model = model_of(lambda m, x: ((y := m.one(x)), m.two(y)), 4, one=nn.Linear(4, 4), two=nn.Linear(4, 2))
    x = torch.randn(32, 4)
    ranges = calibrate(model, [(x,)], steps=10)
    first, second = rewrite(model, ranges).run(x)
    torch.testing.assert_close(first, fake(model.run(fake(x, ranges["x"]))[0], ranges["linear"]))
    assert len(torch.unique(first)) <= 256
    two = model.run(x, overrides={})[1]
    assert float((second - two).abs().max()) < 0.1 * float(two.abs().max())


def test_without_ranges_nothing_is_rewritten_and_the_given_model_never_is() -> None:
    model = from_module(Hand(), [torch.zeros(1, 3, 4, 4)])
    x = torch.randn(2, 3, 4, 4)
    before = [node.name for node in model.graph.nodes]
    assert [node.name for node in rewrite(model, {}).graph.nodes] == before
    changed = rewrite(model, calibrate(model, [(x,)], steps=5))
    assert len(changed.graph.nodes) > len(before)
    assert [node.name for node in model.graph.nodes] == before


def test_calibrating_in_batches_of_any_size_gives_the_same_ranges() -> None:
    torch.manual_seed(0)
    model = from_module(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), [torch.zeros(1, 6)])
    x = torch.randn(24, 6)
    x[0] = 4.0  # the first batch holds the largest magnitude of the input
    whole = calibrate(model, [(x,)], steps=20)["input_1" if "input_1" in model.nodes() else "input"]
    parts = calibrate(model, [(part,) for part in x.split(5)], steps=20)
    assert parts[model.placeholders[0].name] == whole


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40), st.sampled_from([1.0, 0.1, 0.0, 3.0]))
def test_a_range_holds_zero_exactly_and_costs_no_more_than_the_range_of_all_values(
    values: list[float], slope: float
) -> None:
    array = np.array(values, np.float32)
    histogram = filled(array)
    found = choose_range(histogram, slope, steps=20)
    assert found.scale > 0
    assert LOW <= found.zero_point <= HIGH
    assert naive(np.zeros(1), found.scale, found.zero_point)[0] == 0
    low, high = min(float(array.min()), 0.0), max(float(array.max()), 0.0)
    if high - low > 1e-29:
        scale = float(np.float32((high - low) / 255))
        plain = cost(histogram, scale, int(np.clip(round(LOW - low / scale), LOW, HIGH)), slope)
        assert cost(histogram, found.scale, found.zero_point, slope) <= plain * (1 + 1e-9)


def naive(values: Floats, scale: float, zero_point: int) -> Floats:
    codes = np.clip(np.round(values / scale) + zero_point, LOW, HIGH)
    return (codes - zero_point) * scale


def cost(histogram: Histogram, scale: float, zero_point: int, slope: float = 1.0) -> float:
    """Squared error of all counted values, bin by bin."""
    total = 0.0
    low, high = min(histogram.lowest, 0.0), max(histogram.highest, 0.0)
    for centre, count in zip(histogram.centres, histogram.counts, strict=True):
        if count:
            value = min(max(float(centre), low), high)
            weight = slope * slope if value < 0 else 1.0
            total += count * weight * float(naive(np.array([value]), scale, zero_point)[0] - value) ** 2
    return total


SHAPES: dict[str, Callable[[np.random.Generator], Floats]] = {
    "normal": lambda g: g.normal(size=4000),
    "long tails": lambda g: g.standard_t(2, size=4000),
    "positive": lambda g: g.exponential(size=4000),
    "negative": lambda g: -g.exponential(size=4000),
    "skewed": lambda g: g.gumbel(size=4000),
    "one outlier": lambda g: np.append(g.normal(size=4000), 60.0),
    "two bumps": lambda g: np.concatenate([g.normal(-1, 0.1, 3000), g.normal(5, 1, 1000)]),
}


@pytest.mark.parametrize("slope", [1.0, 0.1])
@pytest.mark.parametrize("name", SHAPES)
def test_a_chosen_range_is_as_good_as_the_best_of_trying_every_pair_of_ends(name: str, slope: float) -> None:
    histogram = filled(SHAPES[name](np.random.default_rng(0)))
    found = choose_range(histogram, slope, steps=25)
    low, high = min(histogram.lowest, 0.0), max(histogram.highest, 0.0)
    ratios = np.linspace(1.0, 0.02, 25)
    used = histogram.counts > 0
    centres = np.clip(histogram.centres[used], low, high)
    weights = histogram.counts[used] * np.where(centres < 0, slope * slope, 1.0)
    best = np.inf
    for a, b in itertools.product(low * ratios if low else [0.0], high * ratios if high else [0.0]):
        scale = float(np.float32((b - a) / 255))
        zero_point = int(np.clip(round(LOW - a / scale), LOW, HIGH))
        best = min(best, float(weights @ (naive(centres, scale, zero_point) - centres) ** 2))
    mine = float(weights @ (naive(centres, found.scale, found.zero_point) - centres) ** 2)
    assert mine == pytest.approx(cost(histogram, found.scale, found.zero_point, slope), rel=1e-6)
    assert mine <= best * 1.1


def test_negative_values_before_a_leaky_relu_count_by_what_is_left_of_them() -> None:
    """The range of what only a leaky ReLU reads spends its codes on the positive side."""
    torch.manual_seed(0)
    x = torch.randn(4000, 4)
    plain = model_of(lambda m, x: m.one(x) * 1.0, 4, one=nn.Linear(4, 4))
    leaky = model_of(lambda m, x: F.leaky_relu(m.one(x), 0.01), 4, one=nn.Linear(4, 4))
    leaky = leaky.with_tensors(plain.tensors)
    a, b = calibrate(plain, [(x,)])["linear"], calibrate(leaky, [(x,)])["linear"]
    assert b.scale < a.scale
    assert b.zero_point < a.zero_point


@pytest.mark.parametrize("values", [[], [0.0], [np.nan], [np.inf, -np.inf], [1e-44], [-1e-44, 1e-45], [1e-39]])
def test_values_that_span_nothing_get_a_range_that_keeps_zero(values: list[float]) -> None:
    found = choose_range(filled(values))
    assert np.isfinite(found.scale)
    assert found.scale >= np.finfo(np.float32).tiny
    assert naive(np.zeros(1), found.scale, found.zero_point)[0] == 0


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e10, 1e37])
def test_a_range_follows_the_scale_of_its_values(scale: float) -> None:
    values = np.random.default_rng(0).normal(size=2000)
    one, other = choose_range(filled(values)), choose_range(filled(values * scale))
    assert other.scale == pytest.approx(one.scale * scale, rel=0.02)
    assert abs(other.zero_point - one.zero_point) <= 1


def test_values_minus_infinity_of_an_attention_mask_do_not_widen_a_range() -> None:
    assert choose_range(filled([-np.inf, 1.0, -2.0, np.nan])) == choose_range(filled([1.0, -2.0]))


def test_a_layer_runs_in_integers_where_its_input_does_and_a_shared_one_where_all_its_inputs_do() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.one(x)
        return m.one(torch.tanh(y)) + m.two(y)

    model = model_of(forward, 4, one=nn.Linear(4, 4), two=nn.Linear(4, 4))
    ranges = calibrate(model, [(torch.randn(8, 4),)], steps=5)
    assert set(integer_layers(model)) == set()
    everything = integer_layers(rewrite(model, ranges))
    assert {name: len(uses) for name, uses in everything.items()} == {"one.weight": 2, "two.weight": 1}
    found = {node.name: taken for _, uses in everything.items() for node, taken in uses}
    assert found["linear"] == ranges["x"]
    assert found["linear_1"] == ranges["tanh"]
    del ranges["tanh"]
    assert set(integer_layers(rewrite(model, ranges))) == {"two.weight"}


def test_a_bias_that_layers_share_becomes_one_of_each() -> None:
    torch.manual_seed(0)
    one, two, three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    two.bias = one.bias
    model = model_of(lambda m, x: m.one(m.two(m.one(x))) + m.three(x), 4, one=one, two=two, three=three)
    x = torch.randn(5, 4)
    separate = separate_biases(model)
    biases = [n.args[2].target for n in separate.graph.nodes if n.target is aten.linear.default]
    assert len(set(biases)) == 4
    assert len(separate.tensors) == len(model.tensors) + 2
    assert torch.equal(separate.run(x)[0], model.run(x)[0])
    assert separate_biases(separate).tensors.keys() == separate.tensors.keys()


def test_a_network_with_shared_layers_computes_the_same_with_its_integer_biases() -> None:
    """The same weight under two input scales needs two biases in integers."""
    torch.manual_seed(0)
    model = model_of(lambda m, x: m.one(m.one(x) * 8), 4, one=nn.Linear(4, 4))
    x = torch.randn(64, 4)
    result = quantize_activations(model, calibrate(model, [(x,)], steps=10))
    ((name, uses),) = integer_layers(result).items()
    weight = Affine(np.zeros((4, 4), np.int8), np.full((4, 1), 0.01, np.float32))
    coded = {
        str(node.args[2].target): encode_bias(result.tensors[str(node.args[2].target)].numpy(), weight, taken.scale)
        for node, taken in uses
    }
    assert name == "one.weight"
    assert len(coded) == 2
    for bias in coded.values():
        np.testing.assert_allclose(bias.dequantize(), model.tensors["one.bias"].numpy(), atol=0.01)


scales = st.floats(2.0**-13, 10.0, width=32)


@given(st.lists(st.tuples(scales, st.floats(-100, 100, width=32)), min_size=1, max_size=6), scales, st.booleans())
def test_bias_codes_are_the_nearest_whole_numbers_on_the_accumulator_s_grid(
    channels: list[tuple[float, float]], input_scale: float, one: bool
) -> None:
    bias = np.array([b for _, b in channels], np.float32)
    each = np.array([[s] for s, _ in channels], np.float32)
    weight = Affine(np.zeros((len(channels), 3), np.int8), each[:1] if one else each)
    coded = encode_bias(bias, weight, input_scale)
    assert coded.codes.dtype == np.int32
    assert (coded.bits, coded.signed, coded.zero_point) == (32, True, None)
    for i, value in enumerate(bias):
        scale = float(np.float32(input_scale) * (each[0, 0] if one else each[i, 0]))
        assert coded.scale[i] == np.float32(scale)
        exact = float(value) / scale
        wanted = np.clip(np.round(exact), -(2**31 - 1), 2**31 - 1)
        assert coded.codes[i] == wanted


@given(
    st.lists(st.tuples(st.floats(2.0**-126, 10.0, width=32), st.floats(-100, 100, width=32)), min_size=1, max_size=6),
    st.floats(2.0**-20, 10.0, width=32),
    st.booleans(),
)
def test_with_room_made_every_bias_fits_and_the_weights_mean_what_they_meant(
    channels: list[tuple[float, float]], input_scale: float, one: bool
) -> None:
    generator = np.random.default_rng(0)
    bias = np.array([b for _, b in channels], np.float32)
    scale = np.array([[s] for s, _ in channels], np.float32)
    codes = generator.integers(-127, 128, (len(channels), 5)).astype(np.int8)
    weight = Affine(codes, scale[:1] if one else scale)
    roomy = make_room(weight, [(bias, input_scale)])
    coded = encode_bias(bias, roomy, input_scale)
    assert np.abs(coded.codes.astype(np.int64)).max() <= 2**30 + 2**8
    assert (np.abs(coded.dequantize() - bias) <= coded.scale * 0.51 + np.abs(bias) * 2.0**-22 + 1e-28).all()
    assert make_room(roomy, [(bias, input_scale)]) is roomy
    # What the weights lost is nothing beside the bias they stand next to.
    lost = np.abs(roomy.dequantize().astype(np.float64) - weight.dequantize()) * input_scale * 255
    largest = np.abs(bias).max() if one else np.abs(bias)[:, None]
    assert (lost <= np.maximum(largest, 1e-28) * 2.0**-22).all()


def test_room_is_made_only_in_the_channels_that_need_it() -> None:
    weight = Affine(np.full((3, 2), 100, np.int8), np.array([[0.1], [1e-12], [0.2]], np.float32))
    assert make_room(weight, [(np.zeros(3, np.float32), 0.5)]) is weight
    roomy = make_room(weight, [(np.ones(3, np.float32), 0.5), (np.full(3, 4.0, np.float32), 0.5)])
    np.testing.assert_array_equal(roomy.codes[[0, 2]], weight.codes[[0, 2]])
    np.testing.assert_array_equal(roomy.scale[[0, 2]], weight.scale[[0, 2]])
    assert roomy.scale[1, 0] == pytest.approx(4.0 / (0.5 * 2**30))


def test_a_grouped_transposed_convolution_has_the_same_scales_in_each_group() -> None:
    weight = Affine(np.zeros((4, 3, 2, 2), np.int8), np.array([0.1, 0.2, 1e-12], np.float32).reshape(1, 3, 1, 1))
    bias = np.array([1, 2, 3, 4, 5, 6], np.float32)
    roomy = make_room(weight, [(bias, 0.5)])
    assert roomy.scale.ravel()[2] == pytest.approx(6 / (0.5 * 2**30))
    coded = encode_bias(bias, roomy, 0.5)
    np.testing.assert_array_equal(coded.scale, np.tile(np.float32(0.5) * roomy.scale.ravel(), 2))
    np.testing.assert_allclose(coded.dequantize(), bias, atol=0.05)


@given(st.floats(1.0, 2.0), st.integers(-128, 0), st.sampled_from([0.1, 0.2, 0.25]))
def test_behind_a_leaky_relu_8_bit_multipliers_compute_what_the_graph_says(
    quotient: float, zero_point: int, slope: float
) -> None:
    before, behind = Range(0.05, 7), Range(0.05 / quotient, zero_point)
    found = share_grid(before, behind, slope)
    assert found.scale == pytest.approx(behind.scale, rel=0.031)
    codes = np.arange(LOW, HIGH + 1)
    scale = before.scale / found.scale
    multiplier = np.where(codes < before.zero_point, np.rint(256 * scale * slope), np.rint(256 * scale))
    kernel = np.clip(((codes - before.zero_point) * multiplier + 128) // 256 + found.zero_point, LOW, HIGH)
    values = (codes - before.zero_point) * before.scale
    said = np.where(values < 0, slope * values, values) / found.scale
    exact = np.abs(said - np.floor(said) - 0.5) > 1e-4  # halves may fall to either side
    np.testing.assert_array_equal(kernel[exact], np.clip(np.rint(said) + found.zero_point, LOW, HIGH)[exact])


def test_a_range_far_coarser_than_the_one_before_a_leaky_relu_stays() -> None:
    assert share_grid(Range(1e-6, 0), Range(1.0, 5), 0.1) == Range(1.0, 5)
