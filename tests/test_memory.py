"""A device's limits in bytes of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import octoc
from octoc.device import Device, load_devices
from octoc.memory import model_limit, peak_activation_bytes
from octoc.model import Model


class Graph(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def model(function: Callable[[Tensor], Tensor], *shape: int) -> Model:
    return octoc.load_model(Graph(function), examples=[torch.zeros(2, *shape)])


@pytest.fixture(scope="module")
def devices() -> dict[str, Device]:
    return load_devices()


def test_a_chain_needs_two_neighbours_at_once() -> None:
    assert peak_activation_bytes(model(lambda x: x.relu().sigmoid().tanh(), 10), 4) == 2 * 10 * 4


def test_a_shortcut_stays_alive_until_it_is_added() -> None:
    assert peak_activation_bytes(model(lambda x: x.relu().sigmoid().tanh() + x, 10), 4) == 3 * 10 * 4


def test_a_reshape_takes_nothing_and_keeps_its_source_alive() -> None:
    def function(x: Tensor) -> Tensor:
        flat = x.relu().reshape(-1, 10)  # [n, 10]
        return flat.sigmoid().tanh() + flat

    assert peak_activation_bytes(model(function, 2, 5), 4) == 3 * 10 * 4


def test_half_precision_takes_half() -> None:
    chain = model(lambda x: x.relu().sigmoid(), 7)
    assert peak_activation_bytes(chain, 2) * 2 == peak_activation_bytes(chain, 4)


def test_activations_are_taken_off_what_an_app_gets(devices: dict[str, Device]) -> None:
    phone = devices["iphone-12-mini"]
    (alone, beside) = (model_limit(phone, 0), model_limit(phone, 10**8))
    assert alone is not None
    assert beside is not None
    assert alone.nbytes == 2_100_000_000
    assert beside.nbytes == alone.nbytes - 10**8
    assert "2.10 GB for one app on iphone-12-mini, less 100 MB of activations" in beside.why


def test_a_budget_of_models_binds_where_it_is_less(devices: dict[str, Device]) -> None:
    limit = model_limit(devices["tier-low"], 0)
    assert limit is not None
    assert (limit.nbytes, limit.why) == (200_000_000, "the budget of a model of tier-low")


def test_a_microcontroller_reads_weights_from_its_flash_and_computes_in_its_memory(devices: dict[str, Device]) -> None:
    chip = devices["mcu-stm32l4r5"]
    fits, bursts = model_limit(chip, 600 * 1024), model_limit(chip, 700 * 1024)
    assert fits is not None
    assert bursts is not None
    assert fits.nbytes == 2 * 2**20
    assert bursts.nbytes == 0
    assert "less 717 kB of activations" in bursts.why


def test_a_device_without_figures_has_no_limit(devices: dict[str, Device]) -> None:
    bare = replace(devices["iphone-12-mini"], memory=(), storage=(), model_budget=())
    assert model_limit(bare, 0) is None


def test_peak_equals_a_replay_of_every_moment() -> None:
    """The second implementation asks at each step which results are still to be read."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        steps = [tuple(generator.integers(0, i + 1, 2)) for i in range(6)]

        def function(x: Tensor, steps: list[tuple[int, int]] = steps) -> Tensor:
            values = [x]
            for a, b in steps:
                values.append(values[a] + values[b])
            return values[-1]

        found = model(function, 3)
        order = [node for node in found.graph.nodes if node.op in ("placeholder", "call_function")]
        order = [node for node in order if "sym_size" not in str(node.target)]
        moments = []
        for step, current in enumerate(order):
            later = set(order[step:])
            alive = [
                node
                for node in order[: step + 1]
                if node is current or any(user in later or user.op == "output" for user in node.users)
            ]
            moments.append(len(alive) * 3 * 4)
        assert peak_activation_bytes(found, 4) == max(moments)
