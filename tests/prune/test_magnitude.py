"""Magnitude pruning: exact counts, the smallest go first, ties in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from octoc.errors import UsageError
from octoc.load.module import from_module
from octoc.prune.magnitude import global_threshold, prune, rewrite

FEW = st.sampled_from([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0])
SPARSITY = st.floats(0, 0.999)


@given(hnp.arrays(np.float32, hnp.array_shapes(max_side=6), elements=FEW), SPARSITY)
def test_exactly_the_share_is_zero_and_nothing_kept_is_smaller_than_what_went(weight, sparsity):
    pruned = prune(weight, sparsity)
    gone = pruned == 0
    assert gone.sum() == round(sparsity * weight.size)
    np.testing.assert_array_equal(pruned[~gone], weight[~gone])
    if gone.any() and not gone.all():
        assert np.abs(weight[gone]).max() <= np.abs(weight[~gone]).min()


def test_of_equal_weights_the_first_go():
    np.testing.assert_array_equal(prune(np.float32([[1, -1], [1, 1]]), 0.5), [[0, 0], [1, 1]])


def test_the_weight_given_is_left_alone():
    weight = np.float32([1, 2, 3])
    prune(weight, 0.5)
    np.testing.assert_array_equal(weight, [1, 2, 3])


def test_importance_is_weighed_against_the_square():
    weight, importance = np.float32([1, 2, 3]), np.float32([10, 1, 1])
    np.testing.assert_array_equal(prune(weight, 1 / 3, importance), [1, 0, 3])


def test_pruning_again_to_the_same_share_changes_nothing():
    weight = np.random.default_rng(0).standard_normal((8, 9)).astype(np.float32)
    once = prune(weight, 0.6)
    np.testing.assert_array_equal(prune(once, 0.6), once)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(sparsity):
    with pytest.raises(UsageError, match=r"\[0, 1\)"):
        prune(np.ones(4), sparsity)
    with pytest.raises(UsageError, match=r"\[0, 1\)"):
        global_threshold({"a": np.ones(4)}, sparsity)


@given(st.lists(hnp.arrays(np.float32, st.integers(2, 20), elements=FEW), min_size=1, max_size=4), st.floats(0, 0.5))
def test_one_threshold_over_all_gives_the_exact_count_and_empties_no_weight(arrays, sparsity):
    weights = {f"w{i}": array for i, array in enumerate(arrays)}
    shares = global_threshold(weights, sparsity)
    pruned = {name: prune(weight, shares[name]) for name, weight in weights.items()}
    assert sum(int((p == 0).sum()) for p in pruned.values()) == round(sparsity * sum(a.size for a in arrays))
    assert all(p.any() for p in pruned.values())


def test_one_threshold_over_all_takes_what_is_smallest_anywhere():
    small, large = np.float32([0.1, 0.2, 0.3, 0.4]), np.float32([5, 6, 7, 0.15])
    assert global_threshold({"small": small, "large": large}, 0.5) == {"small": 0.75, "large": 0.25}


def test_a_share_that_would_empty_a_weight_says_what_is_reachable():
    with pytest.raises(UsageError, match=r"at most 0\.75"):
        global_threshold({"a": np.ones(4), "b": np.ones(4)}, 0.9)


def test_the_rewritten_model_computes_with_the_pruned_weight():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))
    model = from_module(module, [torch.randn(2, 3, 6, 6)])
    layer = model.layers()[1]
    pruned = rewrite(model, layer, 0.5)
    with torch.no_grad():
        module[3].weight.copy_(torch.from_numpy(prune(module[3].weight.numpy(), 0.5)))
    x = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(pruned.run(x)[0], module(x))
    assert (pruned.tensors[layer.name] == 0).float().mean() == 0.5
