"""Steps of a recipe change the network as they say; what does not belong to the network is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octoc.apply import (
    Encoder,
    encode_biases,
    encode_weights,
    fingerprint,
    quantize_activations,
    restructure,
    runs_in_integers,
)
from octoc.compressed import Compressed
from octoc.errors import ModelError, UsageError
from octoc.load.module import from_module
from octoc.model import Layer, Model, aten
from octoc.prune.magnitude import prune
from octoc.qtensor import Affine, Cast, QTensor, Scheme
from octoc.quantize.activations import Range, calibrate
from octoc.recipe import (
    CorrectBiases,
    Encode,
    Equalize,
    Factorize,
    FoldBatchNorm,
    Prune,
    QuantizeActivations,
    Recover,
)

ROOT = Path(__file__).parents[1]


class Net(nn.Module):
    """Two convolutions with batch norm between them, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3)
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.norm(self.conv1(x)))))
        return self.linear(x.mean((2, 3)))


class Branch(nn.Module):
    """A network whose control flow depends on its input."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        nn.init.ones_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.cond(x.sum() > 0, lambda a: a * self.factor, lambda a: a - 1, (x,)))


def network(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return from_module(Net(), [torch.zeros(1, 3, 9, 9)])


@pytest.fixture(scope="module")
def model() -> Model:
    return network()


def test_no_steps_change_nothing(model: Model) -> None:
    assert restructure(model, []) is model


def test_a_pruned_weight_has_the_zeros_that_its_step_asks_for_and_the_others_none(model: Model) -> None:
    small = restructure(model, [Prune("conv2.weight", 0.25), Prune("linear.weight", 0.5)])
    for name, share in (("conv2.weight", 0.25), ("linear.weight", 0.5)):
        assert int((small.tensors[name] == 0).sum()) == round(share * small.tensors[name].numel())
        np.testing.assert_array_equal(small.tensors[name].numpy(), prune(model.tensors[name].numpy(), share))
    assert torch.equal(small.tensors["conv1.weight"], model.tensors["conv1.weight"])
    assert (model.tensors["conv2.weight"] != 0).all()


def test_a_factorized_layer_becomes_two_whose_product_is_the_weight_s_best_of_that_rank(model: Model) -> None:
    small = restructure(model, [Factorize("conv2.weight", 4)])
    assert "conv2.weight" not in small.tensors
    a, b = small.tensors["conv2.weight_a"], small.tensors["conv2.weight_b"]
    product = b.reshape(12, 4) @ a.reshape(4, -1)
    left, values, right = torch.linalg.svd(model.tensors["conv2.weight"].reshape(12, -1), full_matrices=False)
    torch.testing.assert_close(product, (left[:, :4] * values[:4]) @ right[:4], rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 3, 9, 9)
    whole = model.run(x, overrides={"conv2.weight": product.reshape(12, 8, 3, 3)})[0]
    torch.testing.assert_close(small.run(x)[0], whole, rtol=1e-4, atol=1e-5)


def test_steps_are_applied_in_their_order(model: Model) -> None:
    """Pruning before folding sees the weights before the batch norm scaled their channels."""
    steps = [Prune("conv1.weight", 0.5), FoldBatchNorm()]
    first, second = restructure(model, steps), restructure(model, steps[::-1])
    assert int((first.tensors["conv1.weight"] == 0).sum()) == int((second.tensors["conv1.weight"] == 0).sum())
    by_hand = restructure(restructure(model, steps[:1]), steps[1:])
    assert torch.equal(first.tensors["conv1.weight"], by_hand.tensors["conv1.weight"])
    with pytest.raises(UsageError, match=r"conv2\.weight"):
        restructure(model, [Factorize("conv2.weight", 2), Prune("conv2.weight", 0.5)])
    pruned = restructure(model, [Factorize("conv2.weight", 2), Prune("conv2.weight_a", 0.5)])
    assert int((pruned.tensors["conv2.weight_a"] == 0).sum()) == pruned.tensors["conv2.weight_a"].numel() // 2


def test_encodings_are_no_business_of_restructure(model: Model) -> None:
    assert restructure(model, [Encode("conv1.weight", "int8-channel", "float32", 0)]) is model


def test_a_factorized_weight_that_two_operations_share_keeps_its_batch_norms_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.one, self.two = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            for norm, low in ((self.one, 0.2), (self.two, 3.0)):
                nn.init.uniform_(norm.running_var, low, low + 1)
                nn.init.normal_(norm.running_mean)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.conv(F.relu(self.one(self.conv(x)))))

    torch.manual_seed(0)
    shared = from_module(Twice(), [torch.zeros(1, 8, 6, 6)])
    x = torch.randn(2, 8, 6, 6)
    thin = restructure(shared, [Factorize("conv.weight", 3)])
    torch.testing.assert_close(restructure(thin, [FoldBatchNorm()]).run(x)[0], thin.run(x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Prune("absent", 0.5), "absent"),
        (Factorize("absent", 2), "absent"),
        (Prune("conv1.weight", 0.5, "absent"), "no method 'absent' in octoc/prune"),
        (Factorize("conv1.weight", 2, "absent"), "no method 'absent' in octoc/lowrank"),
        (Prune("conv1.weight", 0.5, "../cli"), "no method"),
        (Prune("conv1.weight", 0.5, "magnitude.prune"), "no method"),
        (Equalize({}, "absent"), "no method 'absent' in octoc/quantize"),
        (QuantizeActivations({}, "absent"), "no method 'absent' in octoc/quantize"),
        (CorrectBiases({}, "absent"), "no method 'absent' in octoc/quantize"),
        (QuantizeActivations({"absent": (0.5, 0)}), "absent"),
        (Equalize({"absent": (1, 2)}), "absent"),
        (Equalize({"conv2d": (1, 2)}), "2 channels of conv2d"),
        (CorrectBiases({"absent": (0.5,)}), "absent"),
        (CorrectBiases({"conv2.bias": (0.5,)}), "1 values of the bias conv2.bias"),
        (Recover("distill", 1, 0, {"absent": (0.5,)}), "absent"),
        (Recover("distill", 1, 0, {"conv2.bias": (0.5,)}), "1 values of the vector conv2.bias"),
    ],
)
def test_a_step_that_names_what_is_not_there_is_refused_with_the_name(model: Model, step: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        restructure(model, [step])


def test_a_rank_that_saves_nothing_is_refused(model: Model) -> None:
    with pytest.raises((ModelError, UsageError)):
        restructure(model, [Factorize("linear.weight", 5)])


def test_weights_are_encoded_as_their_steps_say_each_once(model: Model) -> None:
    seen: list[tuple[str, str, str]] = []

    def encoder(layer: Layer, scheme: Scheme, dtype: str) -> QTensor:
        seen.append((layer.name, str(scheme), dtype))
        return Cast(model.tensors[layer.name].numpy().astype(np.float16))

    steps = [Encode("linear.weight", "float16", "float16", 0), Encode("conv1.weight", "int4-channel", "float32", 0)]
    assert list(encode_weights(model, steps, encoder)) == ["linear.weight", "conv1.weight"]
    assert seen == [("linear.weight", "float16", "float16"), ("conv1.weight", "int4-channel", "float32")]
    with pytest.raises(UsageError, match="absent"):
        encode_weights(model, [Encode("absent", "float16", "float16", 0)], encoder)


def test_an_encoder_computes_each_weight_scheme_and_dtype_once(model: Model) -> None:
    encoder = Encoder(model)
    layers = {layer.name: layer for layer in model.layers()}
    first = encoder(layers["conv2.weight"], Scheme.parse("int8-channel"), "float32")
    assert encoder(layers["conv2.weight"], Scheme.parse("int8-channel"), "float32") is first
    assert encoder(layers["conv2.weight"], Scheme.parse("int8-channel"), "float16") is not first
    assert encoder(layers["conv2.weight"], Scheme.parse("int8-tensor"), "float32") is not first
    assert encoder(layers["linear.weight"], Scheme.parse("int8-channel"), "float32") is not first


CHANNEL = Scheme.parse("int8-channel")


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ("int4-channel", "affine of 4 bits"),
        ("int8-tensor", r"a grid of \[1, 1\], not \[5, 1\]"),
        ("int8-group4", r"a grid of \[5, 3\], not \[5, 1\]"),
        ("palette8-channel", "palette of 8 bits"),
        ("float16", "cast of 16 bits"),
        ("int8-channel-sparse", "with a mask"),
    ],
)
def test_codes_of_another_encoding_than_the_recipe_s_are_refused(model: Model, held: str, reason: str) -> None:
    layer = next(layer for layer in model.layers() if layer.name == "linear.weight")
    scheme = Scheme.parse(held)
    tensor = Encoder(model)(layer, scheme, "float32")
    assert Encoder(model, {layer.name: tensor})(layer, scheme, "float32") is tensor
    with pytest.raises(UsageError, match=rf"linear\.weight as int8-channel, .*{reason}.*--recompute"):
        Encoder(model, {layer.name: tensor})(layer, CHANNEL, "float32")


@pytest.mark.parametrize("held", ["int8-channel", "palette4-tensor"])
def test_codes_with_scales_of_another_dtype_are_refused(model: Model, held: str) -> None:
    layer = next(layer for layer in model.layers() if layer.name == "linear.weight")
    tensor = Encoder(model)(layer, Scheme.parse(held), "float16")
    assert Encoder(model, {layer.name: tensor})(layer, Scheme.parse(held), "float16") is tensor
    with pytest.raises(UsageError, match=r"in float16, not float32.*--recompute"):
        Encoder(model, {layer.name: tensor})(layer, Scheme.parse(held), "float32")


def test_a_weight_of_another_shape_or_that_the_proof_lacks_is_refused_not_computed(model: Model) -> None:
    layers = {layer.name: layer for layer in model.layers()}
    tensor = Encoder(model)(layers["conv1.weight"], CHANNEL, "float32")
    with pytest.raises(UsageError, match=r"linear\.weight .*shape .*--recompute"):
        Encoder(model, {"linear.weight": tensor})(layers["linear.weight"], CHANNEL, "float32")
    for proven in ({}, {"conv1.weight": tensor}):
        with pytest.raises(UsageError, match=r"linear\.weight .*does not hold it.*--recompute"):
            Encoder(model, proven)(layers["linear.weight"], CHANNEL, "float32")


def integer_network(bias: float = 0.0, tiny: float = 1.0) -> tuple[Compressed, Model, Tensor]:
    """A network in int8 throughout; the first channel of its convolution is multiplied by `tiny` and its bias set."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    module[0].weight.data[0] *= tiny
    module[0].bias.data[0] = bias
    x = torch.randn(32, 3, 6, 6)
    model = from_module(module, [x[:1]])
    result = quantize_activations(model, calibrate(model, [(x,)], steps=20))
    encoder = Encoder(result)
    steps = [Encode(layer.name, "int8-channel", "float32", layer.axis) for layer in result.layers()]
    coded = encode_weights(result, steps, encoder)
    return Compressed(result, {**coded, **encode_biases(result, coded)}), model, x


def test_integer_biases_stand_on_the_grid_of_input_scale_times_weight_scale() -> None:
    small, model, _ = integer_network()
    nodes = small.model.nodes()
    for name, node in (("0", "conv2d"), ("3", "linear")):
        weight, bias = small.qtensors[f"{name}.weight"], small.qtensors[f"{name}.bias"]
        assert isinstance(weight, Affine)
        assert isinstance(bias, Affine)
        source: Any = nodes[node].args[0]
        np.testing.assert_allclose(bias.scale, np.float32(source.args[1]) * weight.scale.ravel(), rtol=1e-7)
        assert bias.bits == 32
        error = np.abs(bias.dequantize() - model.tensors[f"{name}.bias"].numpy())
        assert (error <= bias.scale / 2 * 1.001).all()


@pytest.mark.parametrize("tiny", [1.0, 1e-6, 1e-12, 1e-20, 1e-36, 1e-44, 0.0])
def test_a_channel_of_tiny_weights_keeps_its_bias(tiny: float) -> None:
    """Its weight scale would be so small that 32 bits of bias end far below the bias itself."""
    small, model, x = integer_network(bias=0.7, tiny=tiny)
    ours, theirs = small.decoded.run(x)[0], model.run(x)[0]
    assert float((ours - theirs).abs().max()) < 0.05 * float(theirs.abs().max())
    bias = small.qtensors["0.bias"]
    assert bias.dequantize()[0] == pytest.approx(0.7, abs=0.02)
    weight = small.qtensors["0.weight"]
    assert isinstance(weight, Affine)
    assert isinstance(bias, Affine)
    source: Any = small.model.nodes()["conv2d"].args[0]
    np.testing.assert_allclose(bias.scale, np.float32(source.args[1]) * weight.scale.ravel(), rtol=1e-6)


def test_a_grouped_transposed_convolution_keeps_its_biases_in_integers() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4, 5, 5)
    model = from_module(nn.ConvTranspose2d(4, 6, 3, groups=2), [x[:1]])
    result = quantize_activations(model, calibrate(model, [(x,)], steps=20))
    (layer,) = result.layers()
    coded = encode_weights(result, [Encode(layer.name, "int8-channel", "float32", layer.axis)], Encoder(result))
    biases = encode_biases(result, coded)
    assert list(biases) == ["bias"]
    np.testing.assert_allclose(biases["bias"].dequantize(), model.tensors["bias"].numpy(), atol=1e-3)
    ours, theirs = Compressed(result, {**coded, **biases}).decoded.run(x)[0], model.run(x)[0]
    assert float((ours - theirs).abs().max()) < 0.05 * float(theirs.abs().max())


def test_layers_that_do_not_run_in_integers_keep_float_biases(model: Model) -> None:
    folded = restructure(model, [FoldBatchNorm()])
    encoder = Encoder(folded)
    steps = [Encode(layer.name, "int8-channel", "float32", layer.axis) for layer in folded.layers()]
    assert encode_biases(folded, encode_weights(folded, steps, encoder)) == {}


def test_only_symmetric_4_and_8_bit_weights_of_one_scale_a_channel_run_in_integers() -> None:
    codes, scale = np.zeros((4, 6), np.int8), np.ones((4, 1), np.float32)
    assert runs_in_integers(Affine(codes, scale))
    assert runs_in_integers(Affine(codes, scale[:1]))
    assert runs_in_integers(Affine(codes, scale, None, 4, True))
    assert not runs_in_integers(Affine(codes, scale, None, 2, True))
    assert not runs_in_integers(Affine(codes, scale, np.ones((4, 1), np.int8)))
    assert not runs_in_integers(Affine(codes.astype(np.uint8), scale, None, 8, False))
    assert not runs_in_integers(Affine(codes, np.ones((4, 2), np.float32)))
    assert not runs_in_integers(Cast(codes.astype(np.float16)))
    assert not runs_in_integers(None)


def test_ranges_belong_to_values_of_the_network(model: Model) -> None:
    with pytest.raises(UsageError, match="2 values the network lacks, such as a"):
        quantize_activations(model, {"a": Range(1.0, 0), "b": Range(1.0, 0)})


def test_the_fingerprint_changes_with_every_weight_and_with_the_graph(model: Model) -> None:
    original = fingerprint(model)
    assert fingerprint(model.copy()) == original
    seen = {original}
    for name, tensor in model.tensors.items():
        changed = tensor.clone()
        changed.view(-1)[-1] += 1
        seen.add(fingerprint(model.with_tensors({name: changed})))
    assert len(seen) == 1 + len(model.tensors)
    signed = model.with_tensors({"linear.bias": torch.zeros(5)})
    assert fingerprint(signed) != fingerprint(model.with_tensors({"linear.bias": -torch.zeros(5)}))
    seen.add(fingerprint(restructure(model, [FoldBatchNorm()])))
    for change in ("target", "args"):
        copy = model.copy()
        if change == "target":
            node = next(n for n in copy.graph.nodes if n.target is aten.relu.default)
            node.target = aten.tanh.default
        else:
            node = next(n for n in copy.graph.nodes if n.target is aten.mean.dim)
            node.args = (node.args[0], [3, 2], *node.args[2:])
        seen.add(fingerprint(copy))
    assert len(seen) == 4 + len(model.tensors)


def test_the_fingerprint_changes_with_what_stands_inside_control_flow() -> None:
    two, again, three = (from_module(Branch(f), [torch.ones(1, 3)]) for f in (2.0, 2.0, 3.0))
    x = torch.ones(1, 3)
    assert not torch.equal(two.run(x)[0], three.run(x)[0])
    assert fingerprint(two) == fingerprint(again)
    assert fingerprint(two) != fingerprint(three)


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    code = (
        "import torch; from tests.test_apply import *; "
        "print(fingerprint(network(3)), fingerprint(from_module(Branch(2.0), [torch.ones(1, 3)])))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = [fingerprint(network(3)), fingerprint(from_module(Branch(2.0), [torch.ones(1, 3)]))]
    assert done.stdout.split() == ours
