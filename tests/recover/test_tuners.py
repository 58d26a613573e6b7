"""What every method that trains keeps to, whichever files the folder holds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octoc.apply import encode_biases, recover, set_vectors
from octoc.compressed import Compressed
from octoc.errors import ArtifactError, DataError, HostError, UsageError
from octoc.qtensor import Affine, Palette, Sparse, describe, difference
from octoc.recover import Tuned, tuner, tuners
from tests.recover.nets import compressed, network, samples

STEPS = 60


def trained(name: str, small: Compressed | None = None, **more: Any) -> Tuned:
    given = {"classes": True, "encode_biases": encode_biases, "steps": STEPS, "seed": 3, **more}
    inputs = given.pop("inputs", [samples()])
    original = given.pop("original", network())
    return tuner(name).tune(small or compressed(network()), original, inputs, **given)


def same(one: Tuned, other: Tuned) -> bool:
    a, b = one.compressed, other.compressed
    return (
        a.qtensors.keys() == b.qtensors.keys()
        and all(difference(q, b.qtensors[name]) is None for name, q in a.qtensors.items())
        and all(torch.equal(tensor, b.model.tensors[name]) for name, tensor in a.model.tensors.items())
        and (one.before, one.after, one.steps, one.run) == (other.before, other.after, other.steps, other.run)
    )


class KilledError(Exception):
    """The process is ended from outside."""


def killed_with(state: Path, least: float = 0.0) -> Any:
    """A callback that ends the process once there is a state and at least this part of the steps is done."""

    def step(done: int, total: int) -> None:
        if state.exists() and done >= least * total:
            raise KilledError

    return step


@pytest.mark.parametrize("name", tuners())
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_training_brings_the_outputs_nearer_and_keeps_every_form(name: str, dtype: str) -> None:
    small = compressed(network(), dtype)
    came = {n: {k: a.copy() for k, a in q.arrays().items()} for n, q in small.qtensors.items()}
    tuned = trained(name, small)
    assert 0 < tuned.after < 0.7 * tuned.before
    assert tuned.compressed.qtensors.keys() == small.qtensors.keys()
    for key, tensor in tuned.compressed.qtensors.items():
        before = small.qtensors[key]
        assert describe(tensor) == describe(before)
        assert {k: (a.dtype, a.shape) for k, a in tensor.arrays().items()} == {
            k: (a.dtype, a.shape) for k, a in before.arrays().items()
        }
        assert np.isfinite(tensor.dequantize()).all()
        dense = tensor.dense if isinstance(tensor, Sparse) else tensor
        if isinstance(dense, Affine) and dense.bits < 32:
            assert np.abs(dense.codes.astype(int)).max() <= 2 ** (dense.bits - 1) - (dense.bits > 4)
            assert (dense.scale >= np.finfo(dense.scale.dtype).smallest_normal).all()
        if isinstance(dense, Palette):
            assert (np.diff(dense.table, axis=-1) >= 0).all()
            assert dense.codes.max() < 2**dense.bits
        if isinstance(tensor, Sparse) and isinstance(before, Sparse):
            np.testing.assert_array_equal(tensor.mask, before.mask)
            assert not tensor.arrays()["codes"][~tensor.mask].any()
        for part, array in before.arrays().items():
            np.testing.assert_array_equal(array, came[key][part])


@pytest.mark.parametrize("name", tuners())
def test_integer_biases_are_those_of_the_trained_network(name: str) -> None:
    tuned = trained(name).compressed
    weights = {n: q for n, q in tuned.qtensors.items() if q.bits != 32}
    expected = encode_biases(tuned.model, weights)
    assert "last.bias" in expected
    assert all(difference(q, tuned.qtensors[n]) is None for n, q in expected.items())


@pytest.mark.parametrize("name", tuners())
def test_no_steps_change_nothing_and_say_so(name: str) -> None:
    small = compressed(network())
    tuned = trained(name, small, steps=0)
    assert tuned.compressed is small
    assert tuned.before == tuned.after
    assert tuned.vectors == {}
    assert any("did not help" in note for note in tuned.notes)


@pytest.mark.parametrize("name", tuners())
def test_the_same_seed_gives_the_same_network_and_another_seed_another(name: str) -> None:
    one = trained(name)
    assert same(one, trained(name))
    assert not same(one, trained(name, seed=-1))


@pytest.mark.parametrize("name", tuners())
@pytest.mark.parametrize("at", [0.0, 0.3, 0.45])
def test_a_killed_training_resumes_to_what_an_uninterrupted_one_gives(name: str, at: float, tmp_path: Path) -> None:
    state = tmp_path / "state"
    whole = trained(name)
    with pytest.raises(KilledError):
        trained(name, state=state, step=killed_with(state, at))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    told: list[int] = []
    resumed = trained(name, state=state, step=lambda done, total: told.append(done))
    assert same(whole, resumed)
    assert at == 0 or told[0] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", tuners())
def test_the_state_of_other_work_and_a_damaged_one_are_refused(name: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with pytest.raises(KilledError):
        trained(name, state=state, step=killed_with(state))
    for other in ({"seed": 4}, {"steps": STEPS + 1}, {"inputs": [samples(39)]}, {"classes": False}):
        with pytest.raises(ArtifactError, match="another"):
            trained(name, state=state, **other)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="no state"):
        trained(name, state=state)
    with pytest.raises(HostError, match="cannot write"):
        trained(name, state=tmp_path / "absent" / "state")


@pytest.mark.parametrize("name", tuners())
def test_seconds_become_steps_that_a_replay_runs_again(name: str) -> None:
    timed = trained(name, steps=None, seconds=0.3)
    assert timed.steps >= 1
    assert same(timed, trained(name, steps=timed.steps))


@pytest.mark.parametrize("name", tuners())
def test_a_network_with_a_fixed_batch_is_trained_in_calls_of_it(name: str) -> None:
    model = replace(network(), dynamic_batch=False)
    model = replace(model, inputs=(replace(model.inputs[0], shape=(4, 2, 6, 6)),))
    tuned = trained(name, compressed(model), original=model, inputs=[samples(26)])
    assert tuned.after < tuned.before


@pytest.mark.parametrize("name", tuners())
def test_requests_that_contradict_themselves_and_too_few_samples_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="not both"):
        trained(name, seconds=1.0)
    with pytest.raises(UsageError, match="-1 steps"):
        trained(name, steps=-1)
    with pytest.raises(UsageError, match="0 seconds"):
        trained(name, steps=None, seconds=0.0)
    with pytest.raises(DataError, match="got 1"):
        trained(name, inputs=[samples(1)])
    with pytest.raises(DataError, match="1 arrays"):
        trained(name, inputs=[samples(8), samples(8)])


@pytest.mark.parametrize("name", tuners())
def test_the_decision_of_a_training_holds_what_the_codes_do_not(name: str) -> None:
    small = compressed(network())
    tuned, step = recover(small, network(), [samples()], name, classes=False, seed=3, steps=STEPS)
    assert (step.method, step.steps, step.seed) == (name, STEPS, 3)
    assert "first.bias" in step.vectors
    model = set_vectors(small.model, step.vectors)
    assert all(torch.equal(tensor, tuned.compressed.model.tensors[n]) for n, tensor in model.tensors.items())
    assert tuned.after < tuned.before


def test_only_files_that_train_are_listed_and_listing_imports_none() -> None:
    code = "import sys, octoc.recover as r; print(*r.tuners()); print([m for m in sys.modules if 'recover.' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, loaded = done.stdout.splitlines()
    assert names.split() == ["distill", "reconstruct"]
    assert loaded == "[]"
    with pytest.raises(UsageError, match="distill, reconstruct"):
        tuner("blocks")
