"""Layers are encoded against what is left of their inputs; sums over unfolded inputs are those by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octoc.apply import Encoder, encode_weights
from octoc.errors import DataError, UsageError
from octoc.graph import fold_batch_norm
from octoc.load.module import from_module
from octoc.model import Model
from octoc.qtensor import Affine
from octoc.recipe import Encode
from octoc.sequential import encode_sequentially, gather, unfold


class Net(nn.Module):
    """Every kind of layer, a residual block, and two layers that read the same values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.left, self.right = nn.Linear(6, 7), nn.Linear(6, 7, bias=False)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.point(F.relu(self.deep(x))))
        x = self.up(x).mean((2, 3))
        return self.head(torch.tanh(self.left(x)) * torch.sigmoid(self.right(x)))


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return fold_batch_norm(from_module(Net(), [torch.zeros(2, 3, 6, 6)]))


def calls(count: int, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(8, 3, 6, 6, generator=generator)] for _ in range(count)]


def steps_of(model: Model, scheme: str = "int3-channel", method: str | None = "gptq") -> list[Encode]:
    return [Encode(layer.name, scheme, "float32", layer.axis, method) for layer in model.layers()]


@pytest.mark.parametrize(
    ("groups", "stride", "padding", "dilation"),
    [(1, 1, 1, 1), (2, 2, 0, 1), (4, 1, "same", 2), (1, (2, 1), (0, 2), 1), (2, 1, "valid", 1)],
)
def test_unfolded_inputs_times_the_filters_are_the_convolution(groups, stride, padding, dilation):
    torch.manual_seed(1)
    layer = nn.Conv2d(4, 8, (3, 2), stride, padding, dilation, groups, bias=False)
    model = from_module(layer, [torch.zeros(2, 4, 9, 8)])
    node = model.nodes()[model.layers()[0].nodes[0]]
    x = torch.randn(3, 4, 9, 8)
    columns = unfold(node, x, layer.weight.shape)
    rows = layer.weight.detach().reshape(groups, 8 // groups, -1)
    outputs = layer(x).detach().movedim(1, -1).reshape(-1, groups, 8 // groups).movedim(0, 1)
    torch.testing.assert_close(columns @ rows.transpose(1, 2), outputs)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_convolutions_of_one_and_three_dimensions_unfold_too(kind):
    layer = kind(2, 4, 3, padding=1, bias=False)
    size = [5] * (layer.weight.dim() - 2)
    model = from_module(layer, [torch.zeros(2, 2, *size)])
    x = torch.randn(2, 2, *size)
    columns = unfold(model.nodes()[model.layers()[0].nodes[0]], x, layer.weight.shape)
    outputs = layer(x).detach().movedim(1, -1).reshape(1, -1, 4)
    torch.testing.assert_close(columns @ layer.weight.detach().reshape(1, 4, -1).transpose(1, 2), outputs)


def test_the_hessian_of_a_depthwise_convolution_is_that_by_brute_force(model):
    layer = next(layer for layer in model.layers() if layer.name == "deep.weight")
    batches = calls(2)
    hessian = gather(model, model, [layer], batches)[layer.name]
    net = Net()
    net.load_state_dict({name: model.tensors[name] for name in net.state_dict()})
    expected = np.zeros((8, 9, 9))
    for (x,) in batches:
        padded = F.pad(F.relu(net.stem(x)), (1, 1, 1, 1)).detach().double().numpy()
        for sample, channel, i, j in itertools.product(range(8), range(8), range(6), range(6)):
            patch = padded[sample, channel, i : i + 3, j : j + 3].ravel()
            expected[channel] += np.outer(patch, patch)
    np.testing.assert_allclose(hessian.matrix, expected, rtol=1e-4, atol=1e-3)
    assert not hessian.cross.any()


def test_batches_of_any_size_give_the_same_sums(model):
    layer = model.layers()[0]
    x = torch.randn(12, 3, 6, 6)
    one = gather(model, model, [layer], [[x]])[layer.name]
    many = gather(model, model, [layer], [[x[:5]], [x[5:6]], [x[6:]]])[layer.name]
    assert many.count == one.count == 12 * 36
    np.testing.assert_allclose(many.matrix, one.matrix, rtol=1e-5, atol=1e-3)


def distance(model: Model, other: Model) -> float:
    return sum(float((model.run(*c)[0] - other.run(*c)[0]).square().sum()) for c in calls(6, seed=9))


def test_outputs_move_far_less_than_by_rounding(model):
    small, _ = encode_sequentially(model, steps_of(model), Encoder(model), calls(12))
    coded = encode_weights(model, steps_of(model, method=None), Encoder(model))
    rounded = model.with_tensors({n: torch.from_numpy(q.dequantize().copy()) for n, q in coded.items()})
    assert distance(model, small.decoded) < 0.5 * distance(model, rounded)


def test_biases_make_the_means_of_the_original(model):
    batches = calls(12)
    small, _ = encode_sequentially(model, steps_of(model), Encoder(model), batches)
    assert {"stem.bias", "deep.bias", "head.bias"} <= set(small.shifts)
    outputs = [torch.cat([m.run(*c)[0] for c in batches]).mean(0) for m in (model, small.decoded)]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-3)


def test_what_is_not_gathered_is_encoded_as_usual_and_reported(model):
    small, notes = encode_sequentially(model, steps_of(model), Encoder(model), calls(1))
    assert [note.what for note in notes] == ["up.weight"]
    assert "conv_transpose" in notes[0].reason
    usual = Encoder(model)(next(x for x in model.layers() if x.name == "up.weight"), *_scheme(small, "up.weight"))
    np.testing.assert_array_equal(small.qtensors["up.weight"].dequantize(), usual.dequantize())


def _scheme(small, name):
    from octoc.qtensor import Scheme

    assert isinstance(small.qtensors[name], Affine)
    return Scheme.parse("int3-channel"), "float32"


def test_layers_without_a_step_stay_float_and_usual_methods_need_no_samples(model):
    steps = steps_of(model, method=None)[:2]
    small, notes = encode_sequentially(model, steps, Encoder(model), [])
    assert set(small.qtensors) == {step.tensor for step in steps}
    assert not notes
    assert not small.shifts


def test_the_same_samples_give_the_same_codes(model):
    one, other = (encode_sequentially(model, steps_of(model), Encoder(model), calls(2))[0] for _ in range(2))
    for name, tensor in one.qtensors.items():
        np.testing.assert_array_equal(tensor.dequantize(), other.qtensors[name].dequantize())


def test_proven_codes_are_taken_as_they_are(model):
    small, _ = encode_sequentially(model, steps_of(model), Encoder(model), calls(2))
    again = encode_weights(model, steps_of(model), Encoder(model, small.qtensors))
    assert all(again[name] is tensor for name, tensor in small.qtensors.items())


def test_no_samples_bad_samples_and_unknown_weights_are_refused(model):
    with pytest.raises(DataError, match="no calibration samples"):
        encode_sequentially(model, steps_of(model), Encoder(model), [])
    with pytest.raises(DataError, match="NaN"):
        encode_sequentially(model, steps_of(model), Encoder(model), [[torch.full((1, 3, 6, 6), torch.nan)]])
    with pytest.raises(UsageError, match="absent"):
        encode_sequentially(model, [Encode("absent", "int4-channel", "float32", 0, "gptq")], Encoder(model), calls(1))
    with pytest.raises(UsageError, match="needs the Hessian"):
        encode_weights(model, steps_of(model), Encoder(model))


def test_a_single_or_constant_sample_still_gives_finite_codes(model):
    for sample in (torch.randn(1, 3, 6, 6), torch.ones(4, 3, 6, 6), torch.zeros(4, 3, 6, 6)):
        small, _ = encode_sequentially(model, steps_of(model), Encoder(model), [[sample]])
        assert all(np.isfinite(tensor.dequantize()).all() for tensor in small.qtensors.values())
