"""Factorization: the best error there is, the same function as the truncated weight, never larger than before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from octoc.errors import ModelError, UsageError
from octoc.load.module import from_module
from octoc.lowrank.svd import costs, factorize, planned_ranks, refusal, rewrite, saves

SHAPES = [(8, 12), (8, 6, 3), (10, 4, 3, 3), (6, 4, 2, 3, 2)]


def weight_of(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def product(factors, shape):
    """The dense weight that two factors stand for."""
    second = factors.second.reshape(factors.second.shape[:2]).astype(np.float64)
    return (second @ factors.first.reshape(len(factors.first), -1)).reshape(shape)


def network(*modules, example):
    torch.manual_seed(0)
    return from_module(nn.Sequential(*modules), [example])


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_gives_the_weight_back(shape):
    weight = weight_of(shape)
    factors = factorize(weight, min(shape[0], weight.size // shape[0]))
    np.testing.assert_allclose(product(factors, shape), weight, atol=1e-5)
    assert factors.error == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_the_error_is_the_tail_of_the_singular_values(shape, rank):
    weight = weight_of(shape)
    factors = factorize(weight, rank)
    values = np.linalg.svd(weight.reshape(shape[0], -1).astype(np.float64), compute_uv=False)
    assert factors.error == pytest.approx(np.sqrt(np.square(values[rank:]).sum()), rel=1e-12)
    assert np.linalg.norm(product(factors, shape) - weight) == pytest.approx(factors.error, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_factors_have_the_same_norm_and_the_layers_shapes(shape):
    factors = factorize(weight_of(shape), 2)
    assert factors.first.shape == (2, *shape[1:])
    assert factors.second.shape == (shape[0], 2, *[1] * (len(shape) - 2))
    assert factors.first.dtype == factors.second.dtype == np.float32
    assert np.linalg.norm(factors.first) == pytest.approx(np.linalg.norm(factors.second), rel=1e-5)


def test_the_other_axis_is_the_transpose():
    weight = weight_of((7, 9))
    plain, turned = factorize(weight, 3), factorize(weight.T.copy(), 3, axis=1)
    np.testing.assert_allclose(turned.first @ turned.second, (plain.second @ plain.first).T, atol=1e-5)


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_a_rank_out_of_range_is_refused_with_the_range(rank):
    with pytest.raises(UsageError, match=r"1 \.\.\. 8"):
        factorize(weight_of((8, 12)), rank)


def test_costs_count_the_weights_of_both_factors():
    for shape in SHAPES:
        weight = weight_of(shape)
        factors = factorize(weight, 2)
        assert costs(shape, 2) == (weight.size, factors.first.size + factors.second.size)
    assert saves((16, 16), 7)
    assert not saves((16, 16), 8)


LAYERS = {
    "linear": (nn.Linear(10, 12), (10,)),
    "linear without bias": (nn.Linear(10, 12, bias=False), (10,)),
    "linear on three dimensions": (nn.Linear(10, 12), (5, 10)),
    "conv1d": (nn.Conv1d(6, 8, 3, stride=2, padding=1), (6, 11)),
    "conv1d same": (nn.Conv1d(6, 8, 4, padding="same"), (6, 11)),
    "conv2d": (nn.Conv2d(6, 8, 3), (6, 9, 9)),
    "conv2d strided and dilated": (nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=2), (6, 9, 9)),
    "conv2d without bias": (nn.Conv2d(6, 8, 3, padding=1, bias=False), (6, 9, 9)),
    "conv2d same": (nn.Conv2d(6, 8, 3, padding="same", dilation=2), (6, 9, 9)),
    "conv2d valid": (nn.Conv2d(6, 8, 3, padding="valid"), (6, 9, 9)),
    "conv2d same without bias": (nn.Conv2d(6, 8, 3, padding="same", bias=False), (6, 9, 9)),
    "conv3d": (nn.Conv3d(4, 8, 3, padding=1), (4, 5, 5, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", list(LAYERS))
def test_two_operations_compute_what_the_truncated_weight_does(case):
    module, shape = LAYERS[case]
    model = network(module, nn.ReLU(), example=torch.randn(2, *shape))
    layer = model.layers()[0]
    small = rewrite(model, layer, 3)
    truncated = product(factorize(model.tensors[layer.name].numpy(), 3), layer.shape)
    dense = model.with_tensors({layer.name: torch.from_numpy(truncated.astype(np.float32))})
    x = torch.randn(3, *shape)
    torch.testing.assert_close(small.run(x)[0], dense.run(x)[0], rtol=1e-5, atol=1e-5)
    assert [found.name for found in small.layers()] == [layer.name + "_a", layer.name + "_b"]
    assert sum(found.size for found in small.layers()) == costs(layer.shape, 3)[1] < layer.size
    assert sum(found.macs for found in small.layers()) < layer.macs
    assert layer.name in model.tensors
    assert layer.name not in small.tensors


class Twice(nn.Module):
    """One weight, used by two operations."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, x):
        return self.inner(torch.relu(self.inner(x)))


class Tied(nn.Module):
    """One weight, used by an embedding and by the output."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)

    def forward(self, x):
        return nn.functional.linear(self.table(x), self.table.weight)


def test_every_use_of_a_shared_weight_is_replaced():
    torch.manual_seed(1)
    model = from_module(Twice(), [torch.randn(2, 12)])
    layer = model.layers()[0]
    small = rewrite(model, layer, 4)
    truncated = product(factorize(model.tensors[layer.name].numpy(), 4), layer.shape).astype(np.float32)
    dense = model.with_tensors({layer.name: torch.from_numpy(truncated)})
    x = torch.randn(3, 12)
    torch.testing.assert_close(small.run(x)[0], dense.run(x)[0], rtol=1e-5, atol=1e-5)
    assert [len(found.nodes) for found in small.layers()] == [2, 2]


def test_a_weight_that_an_embedding_also_reads_is_refused():
    torch.manual_seed(1)
    model = from_module(Tied(), [torch.zeros(2, 3, dtype=torch.int64)])
    with pytest.raises(ModelError, match="embedding"):
        rewrite(model, model.layers()[0], 2)


def test_groups_are_refused_with_their_number():
    model = network(nn.Conv2d(8, 8, 3, groups=4), example=torch.randn(2, 8, 6, 6))
    with pytest.raises(ModelError, match="4 groups"):
        rewrite(model, model.layers()[0], 1)


def test_a_rank_that_saves_nothing_is_refused_with_the_numbers():
    model = network(nn.Linear(8, 8), example=torch.randn(2, 8))
    with pytest.raises(ModelError, match="64 weights in place of 64"):
        rewrite(model, model.layers()[0], 4)


def test_planned_ranks_leave_out_what_cannot_be_factorized_or_would_not_save():
    model = network(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.ConvTranspose2d(16, 8, 2),
        nn.Flatten(),
        nn.Linear(8 * 49, 2),
        example=torch.randn(2, 8, 6, 6),
    )
    assert planned_ranks(model, 0.5) == {"0.weight": 8, "4.weight": 1}
    assert "4.weight" not in planned_ranks(model, 1.0)
    assert [refusal(model, layer) is None for layer in model.layers()] == [True, False, False, True]
    with pytest.raises(UsageError, match="share"):
        planned_ranks(model, 0)
