from __future__ import annotations

import warnings

import loadable
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octoc.errors import ModelError, UsageError
from octoc.load import load_model
from octoc.load.module import from_module
from octoc.model import Model, aten

IMAGES = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([[1, 2, 3], [4, 5, 10], [0, 0, 7]])

CASES: dict[str, tuple[type[nn.Module], tuple[Tensor, ...]]] = {
    "in-place ReLU and dropout": (loadable.Classifier, (IMAGES,)),
    "in-place on the input": (loadable.InPlaceOnInput, (ROWS,)),
    "in-place through a view": (loadable.InPlaceThroughView, (ROWS,)),
    "in-place under a view": (loadable.InPlaceUnderView, (ROWS,)),
    "a block under no_grad": (loadable.WithoutGradient, (ROWS,)),
    "a variadic forward": (loadable.Variadic, (ROWS, ROWS + 1)),
    "an -inf mask": (loadable.Masked, (torch.randn(3, 3, 4),)),
    "tied weights": (loadable.Tied, (IDS,)),
    "a recurrent layer": (loadable.Recurrent, (torch.randn(3, 6, 4),)),
    "two outputs": (loadable.Pair, (ROWS,)),
}


def _targets(model: Model) -> set[str]:
    return {str(node.target) for node in model.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("case", CASES)
def test_the_model_computes_what_the_module_computes_at_any_batch_size(case: str) -> None:
    kind, inputs = CASES[case]
    module = kind().eval()
    model = from_module(module, inputs)
    assert model.dynamic_batch
    for count in (1, 3):
        rows = [x[:count] for x in inputs]
        with torch.no_grad():
            expected = module(*[x.clone() for x in rows])
        expected = expected if isinstance(expected, tuple) else (expected,)
        kept = [x.clone() for x in rows]
        for got, wanted in zip(model.run(*rows), expected, strict=True):
            torch.testing.assert_close(got, wanted)
        assert all(torch.equal(x, before) for x, before in zip(rows, kept, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_no_operation_of_the_graph_writes_into_its_input(case: str) -> None:
    kind, inputs = CASES[case]
    model = from_module(kind(), inputs)
    calls = [node.target for node in model.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert not [call for call in calls if call._schema.is_mutable]


def test_batch_norm_stays_whole_and_dropout_goes() -> None:
    assert aten.batch_norm.default in {n.target for n in from_module(loadable.Classifier(), (IMAGES,)).graph.nodes}
    assert not any("dropout" in target for target in _targets(from_module(loadable.Classifier(), (IMAGES,))))


def test_batch_norm_stays_whole_where_torch_has_to_functionalize() -> None:
    module = nn.Sequential(loadable.Classifier(), loadable.InPlaceThroughView())
    assert "aten.batch_norm.default" in _targets(from_module(module, (IMAGES,)))


def test_a_block_under_no_grad_is_put_in_line() -> None:
    model = from_module(loadable.WithoutGradient(), (ROWS,))
    assert not model.subgraphs
    assert [layer.name for layer in model.layers()] == ["body.weight", "head.weight"]


def test_a_block_under_autocast_is_put_in_line_in_float32() -> None:
    module = loadable.Mixed()
    model = from_module(module, (ROWS,))
    assert not model.subgraphs
    torch.testing.assert_close(model.run(ROWS)[0], module.body(ROWS).detach() + 1)


def test_an_input_keeps_a_builtins_name() -> None:
    assert [spec.name for spec in from_module(loadable.Classifier(), (IMAGES,)).inputs] == ["input"]


def test_one_output_is_called_output_and_several_are_numbered() -> None:
    assert from_module(loadable.Classifier(), (IMAGES,)).outputs == ("output",)
    assert from_module(loadable.Pair(), (ROWS,)).outputs == ("output_0", "output_1")


def test_outputs_take_the_keys_of_a_dict_without_colliding_with_inputs() -> None:
    model = from_module(loadable.NamedOutputs(), (ROWS,))
    assert model.outputs == ("logits", "x_0", "x_1", "aux_loss")
    torch.testing.assert_close(model.run(ROWS)[2], ROWS + 2)


def test_an_output_with_an_inputs_name_gets_another() -> None:
    class Echo(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x * 2}

    assert from_module(Echo(), (ROWS,)).outputs == ("x_output",)


def test_arguments_that_must_be_named_follow_the_others_and_integers_stay_integers() -> None:
    module, mask = loadable.TwoInputs(), torch.rand(3, 3)
    model = from_module(module, (IDS, mask))
    assert [(spec.name, spec.shape, spec.dtype) for spec in model.inputs] == [
        ("ids", (1, 3), torch.int64),
        ("mask", (1, 3), torch.float32),
    ]
    assert model.dynamic_batch
    assert model.notes == ()
    torch.testing.assert_close(model.run(IDS, mask)[0], module(IDS, mask=mask).detach())


def test_an_input_without_dimensions_fixes_the_batch() -> None:
    model = from_module(loadable.Scaled(), (ROWS, torch.tensor(2.0)))
    assert not model.dynamic_batch
    assert model.notes == ("the number of samples is fixed, 1 to a call: an input has no samples, only one value",)
    assert [spec.shape for spec in model.inputs] == [(1, 4), ()]
    torch.testing.assert_close(model.run(ROWS[:1], torch.tensor(3.0))[0], ROWS[:1] * 3)


@pytest.mark.parametrize("kind", [loadable.Mean, loadable.BatchOfOne])
def test_a_module_without_a_free_batch_is_read_for_one_sample(kind: type[nn.Module]) -> None:
    inputs = torch.randn(3, 12)
    model = from_module(kind(), (inputs,))
    assert not model.dynamic_batch
    assert model.notes[0].startswith("the number of samples is fixed, 1 to a call: ")
    torch.testing.assert_close(model.run(inputs[:1])[0], kind()(inputs[:1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floating_dtypes_become_float32_and_the_module_keeps_its_own(dtype: torch.dtype) -> None:
    module = loadable.Classifier().eval().to(dtype)
    model = from_module(module, (IMAGES,))
    assert {tensor.dtype for tensor in model.tensors.values() if tensor.is_floating_point()} == {torch.float32}
    assert model.inputs[0].dtype == torch.float32
    (got,) = model.run(IMAGES)
    assert got.dtype == torch.float32
    assert module.conv.weight.dtype == dtype
    torch.testing.assert_close(got, _as_float32(module)(IMAGES))


def _as_float32(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module).float().requires_grad_(False)


def test_casts_between_floating_dtypes_leave_the_graph() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.half().mul(3).to(torch.float32) + torch.ones(4, dtype=torch.float64).sum()

    model = from_module(Half(), (ROWS,))
    assert not any(".to." in target or "_to_copy" in target for target in _targets(model))
    torch.testing.assert_close(model.run(ROWS)[0], ROWS * 3 + 4)


def test_a_cast_to_integers_stays() -> None:
    class Truncated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 10).to(torch.int32).float()

    torch.testing.assert_close(from_module(Truncated(), (ROWS,)).run(ROWS)[0], (ROWS * 10).int().float())


def test_tied_weights_are_one_weight() -> None:
    assert [layer.name for layer in from_module(loadable.Tied(), (IDS,)).layers()] == ["table.weight"]


def test_the_module_is_left_as_it_was() -> None:
    module = loadable.Classifier().train()
    module.norm.eval()  # a frozen part
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    from_module(module, (IMAGES,))
    assert [module.training, module.norm.training, module.conv.training] == [True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_modes_are_restored_where_the_export_fails() -> None:
    module = loadable.DataDependent().train()
    with pytest.raises(ModelError, match="cannot trace DataDependent"):
        from_module(module, (ROWS,))
    assert module.training


def test_channels_last_examples_and_weights_give_the_same_graph_as_contiguous_ones() -> None:
    module = loadable.Classifier().eval()
    plain = from_module(module, (IMAGES,))
    last = from_module(module.to(memory_format=torch.channels_last), (IMAGES.to(memory_format=torch.channels_last),))
    assert str(plain.graph) == str(last.graph)
    assert all(tensor.is_contiguous() for tensor in last.tensors.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_parameter_that_is_not_finite_is_refused_by_name_and_count(value: float) -> None:
    module = loadable.Classifier()
    with torch.no_grad():
        module.head.weight[0, :2] = value
    with pytest.raises(ModelError, match=r"^weight head\.weight: 2 of 20 values are NaN or infinite$"):
        from_module(module, (IMAGES,))


def test_a_buffer_with_nan_or_plus_infinity_is_refused_and_minus_infinity_passes() -> None:
    module = loadable.Classifier()
    module.norm.running_var[1] = float("inf")  # type: ignore[index]
    with pytest.raises(ModelError, match=r"norm\.running_var: 1 of 4"):
        from_module(module, (IMAGES,))
    assert torch.isinf(from_module(loadable.Masked(), (torch.randn(2, 3, 4),)).tensors["mask"]).sum() == 3


def test_a_float64_value_beyond_float32_is_refused() -> None:
    module = nn.Linear(4, 2).double()
    module.register_buffer("low", torch.full((1,), -1e300, dtype=torch.float64))
    module.forward = lambda x: nn.functional.linear(x, module.weight) + module.low  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="weight low: 1 of 1 values are beyond float32"):
        from_module(module, (ROWS,))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(4, 2, device="meta"), "meta tensors"),
        (loadable.Counting(), "changes its buffer calls"),
        (loadable.Shape(), "returns output_1, which is a number"),
        (loadable.DataDependent(), "cannot trace DataDependent"),
        (nn.Linear(5, 2), "cannot trace Linear"),
    ],
)
def test_a_module_that_cannot_be_read_is_refused_on_one_line(module: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        from_module(module, (ROWS,))
    assert "\n" not in str(caught.value)


def test_lazy_layers_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature")
        module = nn.LazyLinear(3)
    with pytest.raises(ModelError, match="lazy layers"):
        from_module(module, (ROWS,))


def test_without_examples_the_modules_own_are_taken_or_asked_for() -> None:
    module = nn.Linear(4, 2)
    with pytest.raises(UsageError, match="input shapes of Linear are not known"):
        load_model(module)
    module.example_inputs = (ROWS,)  # type: ignore[assignment]
    assert load_model(module).inputs[0].shape == (1, 4)


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot trace TwoInputs"):
        from_module(loadable.TwoInputs(), (IDS,))


def test_integers_for_a_network_of_floats_are_left_for_the_datas_check_to_refuse() -> None:
    model = from_module(module := loadable.Classifier(), ((IMAGES * 50).to(torch.uint8),))
    assert model.inputs[0].dtype == torch.float32
    assert module.conv.weight.dtype == torch.float32


def test_a_module_in_a_wrapper_of_data_parallel_training_is_taken_out() -> None:
    assert from_module(nn.DataParallel(nn.Linear(4, 2)), (ROWS,)).tensors.keys() == {"weight", "bias"}


def test_a_pooling_without_a_stride_moves_by_its_kernel() -> None:
    class Pools(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(F.max_pool2d(x, 2), (1, 3), padding=(0, 1)) + F.max_pool2d(x, 2, stride=(2, 6))

    model = from_module(Pools(), [torch.randn(2, 3, 4, 18)])
    strides = [node.args[2] for node in model.graph.nodes if "pool" in str(node.target)]
    assert [list(stride) for stride in strides] == [[2, 2], [1, 3], [2, 6]]
    x = torch.randn(3, 3, 4, 18)
    assert torch.equal(model.run(x)[0], Pools()(x))
