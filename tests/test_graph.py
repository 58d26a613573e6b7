"""Graph edits keep the function of the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octoc.graph import bias_of, fold_batch_norm, fresh_name, set_bias, sweep
from octoc.load.module import from_module
from octoc.model import KINDS, Model, aten


class Calls(nn.Module):
    """A network given as a function of its parts and its input."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def shaken(norm: nn.Module) -> nn.Module:
    """A batch norm with statistics as after training; one channel hardly varies, one is switched off."""
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.2 if name == "running_var" else torch.randn_like(tensor))
    norm.running_var[0] = 1e-10
    if norm.weight is not None:
        norm.weight.data[-1] = 0
    return norm


def count(model: Model, target: Any) -> int:
    return sum(node.target is target for node in model.graph.nodes)


def exact(model: Model, x: Tensor) -> tuple[Tensor, ...]:
    """The outputs in float64, so that folding is compared and not rounding."""
    return model.with_tensors({n: t.double() if t.is_floating_point() else t for n, t in model.tensors.items()}).run(
        x.double() if x.is_floating_point() else x
    )


def assert_same(one: Model, other: Model, x: Tensor) -> None:
    for a, b in zip(exact(one, x), exact(other, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: nn.BatchNorm1d(6), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6), (4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), lambda: nn.BatchNorm3d(6), (4, 5, 5, 5)),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), lambda: nn.BatchNorm2d(6), (4, 7, 7)),
    "same padding": (lambda: nn.Conv2d(4, 6, 3, padding="same"), lambda: nn.BatchNorm2d(6), (4, 7, 7)),
    "no affine": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6, affine=False), (4, 7, 7)),
    "no affine, no bias": (lambda: nn.Conv2d(4, 6, 1, bias=False), lambda: nn.BatchNorm2d(6, affine=False), (4, 7, 7)),
    "own epsilon": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6, eps=0.5), (4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: nn.BatchNorm2d(8), (4, 7, 7)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), lambda: nn.BatchNorm1d(6), (4, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), lambda: nn.BatchNorm2d(6), (4, 5, 5)),
    "transposed, grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
        lambda: nn.BatchNorm2d(6),
        (4, 5, 5),
    ),
    "transposed, depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), lambda: nn.BatchNorm2d(4), (4, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2, groups=2), lambda: nn.BatchNorm3d(6), (4, 3, 3, 3)),
    "linear": (lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), (4,)),
    "linear, no bias": (lambda: nn.Linear(4, 6, bias=False), lambda: nn.BatchNorm1d(6), (4,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_folded_network_computes_what_the_unfolded_one_does(name: str) -> None:
    torch.manual_seed(0)
    layer, norm, shape = LAYERS[name]
    model = from_module(nn.Sequential(layer(), shaken(norm()), nn.ReLU()), [torch.zeros(1, *shape)])
    folded = fold_batch_norm(model)
    assert count(model, aten.batch_norm.default) == 1
    assert count(folded, aten.batch_norm.default) == 0
    assert_same(model, folded, torch.randn(3, *shape))
    assert len(folded.tensors) == 2  # a weight and a bias; what the batch norm read is gone
    assert all(tensor.dtype == torch.float32 for tensor in folded.tensors.values())


def test_folding_leaves_the_model_that_it_was_given_alone() -> None:
    model = from_module(nn.Sequential(nn.Conv2d(2, 3, 1), shaken(nn.BatchNorm2d(3))), [torch.zeros(1, 2, 4, 4)])
    x = torch.randn(2, 2, 4, 4)
    before, tensors = model.run(x)[0], {name: tensor.clone() for name, tensor in model.tensors.items()}
    fold_batch_norm(model)
    assert torch.equal(model.run(x)[0], before)
    assert tensors.keys() == model.tensors.keys()
    assert all(torch.equal(tensor, model.tensors[name]) for name, tensor in tensors.items())


def test_a_chain_of_batch_norms_folds_into_one_layer() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 1), shaken(nn.BatchNorm2d(3)), shaken(nn.BatchNorm2d(3)))
    model = from_module(module, [torch.zeros(1, 2, 4, 4)])
    folded = fold_batch_norm(model)
    assert count(folded, aten.batch_norm.default) == 0
    assert_same(model, folded, torch.randn(3, 2, 4, 4))


LEFT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "the layer's output has another use": (
        lambda: Calls(
            lambda m, x: (y := m.conv(x)) + m.norm(y), conv=nn.Conv2d(2, 3, 1), norm=shaken(nn.BatchNorm2d(3))
        ),
        (2, 4, 4),
    ),
    "the layer's output is an output of the network": (
        lambda: Calls(
            lambda m, x: ((y := m.conv(x)), m.norm(y)), conv=nn.Conv2d(2, 3, 1), norm=shaken(nn.BatchNorm2d(3))
        ),
        (2, 4, 4),
    ),
    "several operations share the weight": (
        lambda: Calls(
            lambda m, x: m.one(m.conv(x)) + m.two(m.conv(F.relu(x))),
            conv=nn.Conv2d(2, 3, 1),
            one=shaken(nn.BatchNorm2d(3)),
            two=shaken(nn.BatchNorm2d(3)),
        ),
        (2, 4, 4),
    ),
    "an activation stands between": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), shaken(nn.BatchNorm2d(3))),
        (2, 4, 4),
    ),
    "the batch norm comes first": (lambda: nn.Sequential(shaken(nn.BatchNorm2d(2)), nn.Conv2d(2, 3, 1)), (2, 4, 4)),
    "its channels are not the linear layer's": (
        lambda: nn.Sequential(nn.Linear(4, 6), shaken(nn.BatchNorm1d(5))),
        (5, 4),
    ),
    "its channels happen to be as many as the linear layer's": (
        lambda: nn.Sequential(nn.Linear(4, 6), shaken(nn.BatchNorm1d(6))),
        (6, 4),
    ),
    "its statistics are those of the batch": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
        (2, 4, 4),
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_batch_norm_stays_where(name: str) -> None:
    torch.manual_seed(0)
    module, shape = LEFT[name]
    model = from_module(module(), [torch.zeros(2, *shape)])
    norms = count(model, aten.batch_norm.default)
    assert norms >= 1
    folded = fold_batch_norm(model)
    assert count(folded, aten.batch_norm.default) == norms
    assert_same(model, folded, torch.randn(model.inputs[0].shape if not model.dynamic_batch else (3, *shape)))


def test_a_bias_that_another_layer_reads_too_keeps_its_values_there() -> None:
    torch.manual_seed(0)
    one, two = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)
    two.bias = one.bias
    norm = shaken(nn.BatchNorm2d(3))
    model = from_module(
        Calls(lambda m, x: m.norm(m.one(x)) + m.two(x), one=one, two=two, norm=norm), [torch.zeros(1, 2, 4, 4)]
    )
    folded = fold_batch_norm(model)
    assert count(folded, aten.batch_norm.default) == 0
    assert_same(model, folded, torch.randn(2, 2, 4, 4))


@pytest.mark.parametrize("biased", [True, False])
def test_a_layer_takes_a_bias_wherever_the_call_keeps_it(biased: bool) -> None:
    for layer, shape in ((nn.Linear(4, 3, bias=biased), (4,)), (nn.Conv1d(4, 3, 1, bias=biased), (4, 5))):
        model = from_module(layer, [torch.zeros(1, *shape)]).copy()
        node = next(n for n in model.graph.nodes if n.target in KINDS)
        assert (bias_of(node) is not None) == biased
        x = torch.randn(2, *shape)
        plain = model.run(x)[0]
        tensors = {**model.tensors, "ten": torch.full((3,), 10.0)}
        with model.graph.inserting_before(node):
            bias = model.graph.get_attr("ten")
        set_bias(node, bias)
        assert bias_of(node) is bias
        shifted = model.with_tensors(tensors).run(x)[0]
        old = next((t for n, t in model.tensors.items() if "bias" in n), torch.zeros(3))
        old = old.reshape(-1, *[1] * (len(shape) - 1))
        torch.testing.assert_close(shifted, plain + 10 - old)
    embedding = from_module(nn.Embedding(4, 3), [torch.zeros(1, 2, dtype=torch.int64)])
    assert all(bias_of(n) is None for n in embedding.graph.nodes if n.target in KINDS)


def test_sweeping_drops_what_nothing_uses_and_nothing_else() -> None:
    model = from_module(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), [torch.zeros(1, 4)]).copy()
    x = torch.randn(2, 4)
    expected, names = model.run(x)[0], [node.name for node in model.graph.nodes]
    relu = next(node for node in model.graph.nodes if node.target is aten.relu.default)
    with model.graph.inserting_after(relu):
        dead = model.graph.call_function(aten.tanh.default, (relu,))
    with model.graph.inserting_after(dead):
        unused = model.graph.get_attr("unused")
    with model.graph.inserting_after(unused):
        model.graph.call_function(aten.add.Tensor, (dead, unused))
    cluttered = model.with_tensors({"unused": torch.ones(3), "unread": torch.ones(2)})
    swept = sweep(cluttered)
    assert [node.name for node in swept.graph.nodes] == names
    assert swept.tensors.keys() == model.tensors.keys()
    assert torch.equal(swept.run(x)[0], expected)


def test_a_fresh_name_is_free() -> None:
    taken: dict[str, int] = {}
    for _ in range(5):
        name = fresh_name("w", taken)
        assert name not in taken
        taken[name] = 0
    assert list(taken) == ["w", "w_2", "w_3", "w_4", "w_5"]
