"""Where a network can be cut, checked by taking values away and looking for a path around them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from octoc.graph import fold_batch_norm
from octoc.load import load_model
from octoc.model import InputSpec, Model, aten
from octoc.recover.blocks import Block, blocks, cuts, sizes
from octoc.recover.network import free_floats, outputs_of, training_network
from tests.networks import CifarResNet, MobileNet
from tests.recover.nets import compressed, network, samples
from tests.stories import Stories


def loaded(module: nn.Module, *examples: Tensor) -> Model:
    torch.manual_seed(0)
    return fold_batch_norm(load_model(module.eval(), examples=list(examples)))


NETWORKS = {
    "resnet": lambda: loaded(CifarResNet(1), torch.zeros(2, 3, 16, 16)),
    "mobilenet": lambda: loaded(MobileNet(), torch.zeros(2, 3, 32, 32)),
    "transformer": lambda: loaded(Stories(16, 20, 2, 2, 1, 11), torch.zeros(2, 6, dtype=torch.long)),
    "int8": lambda: compressed(network()).model,
}


def separating(model: Model) -> list[str]:
    """Values without which no input reaches an output."""
    inputs, outputs = model.placeholders, set(outputs_of(model))
    tensors = sizes(model, 3)[0].keys() | tensor_nodes(model)

    def connected(without: fx.Node | None) -> set[fx.Node]:
        reached = [node for node in inputs if node is not without]
        for node in reached:
            reached += [u for u in node.users if u in tensors and u is not without and u not in reached]
        return set(reached)

    whole = connected(None)
    return [node.name for node in model.graph.nodes if node in whole and not connected(node) & outputs]


def tensor_nodes(model: Model) -> set[fx.Node]:
    found: set[fx.Node] = set()
    model.run(*model.examples(3), observe=lambda node, value: found.add(node) if isinstance(value, Tensor) else None)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_cuts_are_the_values_that_no_path_goes_around(name: str) -> None:
    model = NETWORKS[name]()
    expected = separating(model)
    assert [node.name for node in cuts(model, sizes(model, 3)[1])] == expected
    assert len(expected) > 4


@st.composite
def graphs(draw: st.DrawFn) -> Model:
    """Sums of earlier values, some of them dead, with one or two inputs and outputs."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(draw(st.integers(1, 2)))]
    values = list(inputs)
    for _ in range(draw(st.integers(1, 8))):
        recent = st.sampled_from(values[-3:])
        values.append(graph.call_function(aten.add.Tensor, (draw(recent), draw(recent))))
    count = draw(st.integers(1, 2))
    graph.output(tuple(values[-count:]))
    specs = tuple(InputSpec(node.name, (3, 2), torch.float32) for node in inputs)
    return Model(graph, {}, specs, tuple(f"y{i}" for i in range(count)), True)


@given(model=graphs())
@settings(deadline=None)
def test_cuts_of_any_graph_are_the_values_that_no_path_goes_around(model: Model) -> None:
    assert [node.name for node in cuts(model, ())] == separating(model)


def test_a_residual_block_is_one_block_and_what_has_one_layer_is_paired() -> None:
    model = compressed(network()).model
    found = blocks(model, network(), {layer.name for layer in model.layers()}, 4)
    assert found == (
        Block(("x",), ("relu",), ("first.weight",)),
        Block(("relu",), ("relu_2",), ("second.weight", "third.weight")),
        Block(("relu_2",), ("relu_3",), ("fourth.weight",)),
        Block(("relu_3",), ("linear",), ("last.weight",)),
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_follow_one_another_and_hold_each_layer_once(name: str) -> None:
    model = NETWORKS[name]()
    layers = [layer.name for layer in model.layers()]
    found = blocks(model, model, layers, 3)
    assert [block.sources for block in found[1:]] == [block.results for block in found[:-1]]
    assert sorted(name for block in found for name in block.layers) == sorted(layers)
    assert len(found) > 2


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_run_one_after_another_compute_the_network(name: str) -> None:
    model = NETWORKS[name]()
    layers = [layer.name for layer in model.layers()]
    inputs = model.examples(3)
    if inputs[0].is_floating_point():
        inputs = (torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0)),)
    numbers, nodes, values = sizes(model, 3)[1], model.nodes(), inputs
    found = blocks(model, model, layers, 3)
    for block in found:
        sources = [nodes[n] for n in block.sources]
        results = [nodes[n] for n in block.results] or None
        part = training_network(model, block.layers, sources, results, numbers)
        values = part(*values, *(model.tensors[layer] for layer in block.layers))
    rest = training_network(model, (), [nodes[n] for n in found[-1].results], None, numbers)(*values)
    torch.testing.assert_close(rest, model.run(*inputs))


def test_gradients_go_through_the_quantizers_within_their_ranges_alone() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    rest = (0.5, 0, -128, 127, torch.int8)
    ops = torch.ops.quantized_decomposed
    code = graph.call_function(ops.quantize_per_tensor.default, (x, *rest))
    graph.output((graph.call_function(ops.dequantize_per_tensor.default, (code, *rest)),))
    model = Model(graph, {}, (InputSpec("x", (1, 3), torch.float32),), ("y",), True)
    value = torch.tensor([[0.6, 63.4, 64.0]], requires_grad=True)
    (out,) = training_network(model, ())(value)
    out.sum().backward()
    torch.testing.assert_close(out, model.run(value.detach())[0])
    assert value.grad is not None
    assert value.grad.tolist() == [[1.0, 1.0, 0.0]]


def test_trained_tensors_are_arguments_and_nothing_else_changes() -> None:
    model, x = network(), torch.from_numpy(samples(3))
    run = training_network(model, ["first.weight", "last.bias"])
    changed = {"first.weight": model.tensors["first.weight"] * 2, "last.bias": model.tensors["last.bias"] + 1}
    torch.testing.assert_close(run(x, *changed.values()), model.run(x, overrides=changed))


def test_biases_and_weights_of_norms_are_free_and_tables_are_not() -> None:
    model = NETWORKS["transformer"]()
    assert set(free_floats(model, ())) == {name for name in model.tensors if "norm" in name}
    small = compressed(network())
    assert set(free_floats(small.model, ())) == {"first.bias", "second.bias", "fourth.bias", "last.bias"}
    assert "last.bias" not in free_floats(small.model, ("last.bias",))
