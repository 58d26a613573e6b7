"""Which samples are learned from, and the score that decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octoc import profile
from octoc.apply import encode_biases
from octoc.recover.task import Task, divergence, task
from tests.recover.nets import compressed, network, samples

SMALL = compressed(network())


def made(count: int, seed: int = 0) -> Task:
    return task(SMALL, network(), [samples(count)], 8, True, encode_biases, seed)


@given(count=st.integers(2, 600), seed=st.integers(-(2**63), 2**63))
def test_every_sample_is_either_learned_from_or_held_out(count: int, seed: int) -> None:
    job = task(SMALL, network(), [np.zeros((count, 1))], 8, True, encode_biases, seed)
    assert sorted([*job.learn, *job.held]) == list(range(count))
    assert 1 <= len(job.held) <= 64
    assert len(job.learn) >= len(job.held)


def test_an_epoch_goes_through_the_samples_once_and_never_through_those_held_out() -> None:
    job = made(40)
    each = len(job.learn) // 8
    epoch = np.concatenate([job.shuffled(step, 5) for step in range(each)])
    assert len(set(epoch)) == len(epoch) == 8 * each
    assert not set(epoch) & set(job.held)
    np.testing.assert_array_equal(job.shuffled(1, 5), epoch[8:16])
    assert list(job.shuffled(each, 5)) != list(job.shuffled(0, 5))


@pytest.mark.parametrize("classes", [True, False])
def test_the_divergence_is_the_planners(classes: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(5, 3, 7, generator=generator), torch.randn(5, 3, 7, generator=generator)
    expected = profile.divergence([one], [other], classes)
    assert float(divergence([one], [other], classes)) == pytest.approx(expected, rel=1e-5)


def test_masked_logits_and_outputs_of_whole_numbers_diverge_by_nothing() -> None:
    masked = torch.tensor([[0.0, -torch.inf, 1.0]])
    whole = torch.tensor([[1, 2]])
    assert float(divergence([masked, whole], [masked.clone(), whole + 1], True)) == 0


def test_outputs_that_are_not_finite_are_never_better() -> None:
    job = made(16)
    assert job.divergence(lambda x: (torch.full((len(x), 5), torch.nan),)) == float("inf")
