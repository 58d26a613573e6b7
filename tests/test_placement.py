"""What a device is offered is what its accelerators run, its exporter writes and its layers can hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octoc.device import Device, find_device, load_devices
from octoc.export import exporter
from octoc.load.module import from_module
from octoc.model import Layer, Model
from octoc.placement import Offer, choices, fallbacks, offers, slowdowns, sparse_offers, uncoded
from octoc.qtensor import PALETTE_BITS, Scheme
from tests.zoo import Graph, recurrent

DEVICES = load_devices()
PAIRS = [(device, fmt) for device in DEVICES.values() for fmt in device.formats]
IDS = [f"{device.id}-{fmt}" for device, fmt in PAIRS]


class Willing:
    """An exporter that holds everything."""

    def accepts(self, scheme: Scheme, layer: Layer, integer: bool) -> str | None:
        return None


class Whole(Willing):
    """An exporter that holds 8-bit integers, and no others where activations are int8."""

    def accepts(self, scheme: Scheme, layer: Layer, integer: bool) -> str | None:
        return "too fancy" if integer and scheme.bits != 8 else None


WILLING: Any = Willing()
WHOLE: Any = Whole()


def layer(*shape: int, kind: str = "linear", axis: int = 0) -> Layer:
    return Layer("w", kind, shape, axis, 1, 4, ("node",))


def names(found: tuple[Offer, ...]) -> set[str]:
    return {str(offer.scheme) for offer in found}


def phone() -> Device:
    return find_device("iphone-15-pro", DEVICES)


@pytest.mark.parametrize(("device", "fmt"), PAIRS, ids=IDS)
def test_every_offer_comes_from_an_encoding_of_a_runner_and_none_is_made_twice(device: Device, fmt: str) -> None:
    found = offers(device, fmt)
    assert found
    assert len(set(found)) == len(found) == len(names(found))
    allowed = set()
    for accelerator in device.runners(fmt):
        for e in device.encodings(accelerator):
            for size in e.groups or ("",):
                kind = {"affine": f"int{e.bits}", "palette": f"palette{e.bits}", "float": "float16"}.get(e.kind)
                if kind is not None:
                    allowed.add(kind if kind == "float16" else f"{kind}-{e.granularity}{size}")
    assert names(found) == allowed
    assert not any(offer.scheme.sparse for offer in found)


@pytest.mark.parametrize(("device", "fmt"), PAIRS, ids=IDS)
def test_a_restriction_holds_only_where_every_accelerator_that_runs_the_encoding_has_it(
    device: Device, fmt: str
) -> None:
    for offer in offers(device, fmt):
        restrictions = [
            e.only_for
            for accelerator in device.runners(fmt)
            for e in device.encodings(accelerator)
            for size in e.groups or (0,)
            if e.kind != "sparse"
            and (e.kind == "float") == (offer.scheme.kind == "cast")
            and e.bits == offer.scheme.bits
            and e.kind in (offer.scheme.kind, "float")
            and (e.kind == "float" or (e.granularity, size) == (offer.scheme.granularity, offer.scheme.group_size))
        ]
        assert restrictions
        assert (not offer.only_for) == any(not r for r in restrictions)


@pytest.mark.parametrize(("device", "fmt"), PAIRS, ids=IDS)
def test_pruned_encodings_are_dense_ones_with_zeros_left_out(device: Device, fmt: str) -> None:
    dense = {offer.scheme: offer for offer in offers(device, fmt)}
    for offer in sparse_offers(device, fmt):
        assert offer.scheme.sparse
        below = dense[replace(offer.scheme, sparse=False)]
        assert offer.only_for == below.only_for


@pytest.mark.parametrize(("device", "fmt"), PAIRS, ids=IDS)
def test_some_weight_encoding_of_every_device_fits_its_exporter(device: Device, fmt: str) -> None:
    for shape, kind, operation in (((16, 8, 3, 3), "conv", "conv2d"), ((64, 64), "linear", "linear")):
        good, refused = choices(
            layer(*shape, kind=kind), [operation], offers(device, fmt), exporter(fmt), integer=False
        )
        assert good
        assert not {str(scheme) for scheme in good} & set(refused)


def test_a_phone_with_a_neural_engine_is_offered_palettes_and_a_board_with_a_cpu_is_not() -> None:
    found = names(offers(phone(), "coreml"))
    assert {f"palette{bits}-tensor" for bits in PALETTE_BITS} <= found
    assert {"int8-channel", "float16"} <= found
    board = find_device("raspberry-pi-5", DEVICES)
    assert {str(s) for fmt in board.formats for o in offers(board, fmt) if (s := o.scheme).kind == "palette"} == set()
    assert "int8-channel" in names(offers(board, board.formats[0]))


def test_zeros_save_bytes_on_the_neural_engine() -> None:
    assert {"float16-sparse", "palette4-tensor-sparse"} <= names(sparse_offers(phone(), "coreml"))


def test_an_older_system_is_offered_no_encoding_that_came_later() -> None:
    newest, oldest = phone(), replace(phone(), os_version="13")
    assert names(offers(oldest, "coreml")) < names(offers(newest, "coreml"))


def test_a_format_that_a_device_does_not_run_is_offered_nothing() -> None:
    missing = next(fmt for fmt in ("coreml", "tflite", "onnx") if fmt not in find_device("pixel-8", DEVICES).formats)
    assert offers(find_device("pixel-8", DEVICES), missing) == ()
    assert sparse_offers(find_device("pixel-8", DEVICES), missing) == ()


def test_choices_are_split_into_good_ones_and_refused_ones_with_the_reason_of_who_refuses() -> None:
    offered = [
        Offer(Scheme("affine", 8, "channel"), ()),
        Offer(Scheme("affine", 4, "group", 8), ()),
        Offer(Scheme("affine", 4, "channel"), ("linear",)),
        Offer(Scheme("cast", 16), ("conv2d", "linear")),
    ]
    good, refused = choices(layer(4, 10), ["conv2d"], offered, WILLING, integer=False)
    assert [str(scheme) for scheme in good] == ["int8-channel", "float16"]
    assert "10 input channels are not a multiple of groups of 8" in refused["int4-group8"]
    assert "only for linear" in refused["int4-channel"]
    assert set(refused) == {"int4-group8", "int4-channel"}


def test_a_weight_of_several_operations_takes_only_what_suits_all_of_them() -> None:
    offer = Offer(Scheme("affine", 4, "channel"), ("linear", "matmul"))
    assert offer.suits(["linear", "matmul"])
    assert not offer.suits(["linear", "embedding"])
    assert Offer(offer.scheme, ()).suits(["embedding"])
    assert choices(layer(4, 4), ["linear", "embedding"], [offer], WILLING, integer=False)[0] == []


def test_the_exporter_is_asked_last_and_told_whether_activations_are_integers() -> None:
    offered = [Offer(Scheme("affine", 8, "channel"), ()), Offer(Scheme("affine", 4, "channel"), ())]
    assert len(choices(layer(4, 4), ["linear"], offered, WHOLE, integer=False)[0]) == 2
    good, refused = choices(layer(4, 4), ["linear"], offered, WHOLE, integer=True)
    assert [scheme.bits for scheme in good] == [8]
    assert refused == {"int4-channel": "too fancy"}


class Mixed(nn.Module):
    """A convolution and operations that some accelerators refuse."""

    def __init__(self, kernel: int = 3, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, kernel, stride, dilation=dilation)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return torch.cumsum(self.linear(x.mean((2, 3))), 1)


@pytest.fixture(scope="module")
def mixed() -> Model:
    return from_module(Mixed(), [torch.zeros(1, 3, 16, 16)])


@pytest.mark.parametrize(("device", "fmt"), PAIRS, ids=IDS)
def test_every_fallback_names_an_operation_of_the_network_and_a_reason(device: Device, fmt: str, mixed: Model) -> None:
    notes = fallbacks(mixed, device, fmt, "float32")
    assert {note.what for note in notes} <= {n.name for n in mixed.graph.nodes if n.op == "call_function"}
    assert all(note.reason and "\n" not in note.reason for note in notes)
    assert len({note.what for note in notes}) == len(notes)


def test_an_operation_falls_back_exactly_where_the_first_accelerator_refuses_it(mixed: Model) -> None:
    device = phone()
    first = device.runners("coreml")[0]
    refused = {note.what for note in fallbacks(mixed, device, "coreml", "float16")}
    for node in mixed.graph.nodes:
        if node.op == "call_function":
            kind = str(node.target).split(".")[1]
            if first.refuses(kind, dtype="float16") is not None:
                assert node.name in refused


@pytest.mark.parametrize("change", [{"kernel": 15}, {"stride": 9, "kernel": 9}, {"dilation": 3}])
def test_a_window_beyond_an_accelerator_s_bounds_falls_back_with_its_number(change: dict[str, int]) -> None:
    """Kernel, stride and dilation are read from the graph, wherever the call keeps them."""
    bound = {f"max_{key}": value - 1 for key, value in change.items()}
    device = phone()
    first = device.runners("coreml")[0]
    from octoc.accelerator import Rule

    strict = replace(first, accepts=None, refusals=(Rule(("conv2d",), bound, "a test", "a test"),))
    narrow = replace(device, accelerators=(strict,))
    wide = from_module(Mixed(**change), [torch.zeros(1, 3, 64, 64)])
    found = fallbacks(wide, narrow, "coreml", "float16")
    assert [note.what for note in found] == ["conv2d"]
    assert str(next(iter(change.values()))) in found[0].reason
    assert fallbacks(from_module(Mixed(), [torch.zeros(1, 3, 64, 64)]), narrow, "coreml", "float16") == ()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_weights_of_a_recurrent_layer_are_said_to_stay_floats(kind: type[nn.LSTM] | type[nn.GRU]) -> None:
    notes = uncoded(from_module(recurrent(kind), [torch.zeros(2, 10, 8)]))
    assert {note.what for note in notes} == {"body.weight_ih_l0", "body.weight_hh_l0"}
    assert all(kind.__name__.lower() in note.reason for note in notes)


def test_a_matrix_on_the_left_of_a_product_stays_floats_and_a_mask_is_no_weight() -> None:
    network = Graph(
        lambda own, x: own.left @ own.head(x + own.mask).T,
        left=torch.randn(3, 4),
        mask=torch.zeros(1, 8),
        head=nn.Linear(8, 4),
    )
    (note,) = uncoded(from_module(network, [torch.zeros(2, 8)]))
    assert note.what == "left"
    assert "matmul" in note.reason


def test_a_network_of_known_layers_has_no_weight_that_stays_floats_unsaid(mixed: Model) -> None:
    assert uncoded(mixed) == ()


def test_a_weight_is_named_where_its_encoding_saves_bytes_but_takes_time(mixed: Model) -> None:
    """onnxruntime has a kernel for matrices of 4 bits in groups, and dequantizes convolutions on each run."""
    board = find_device("raspberry-pi-5", DEVICES)
    assert (
        slowdowns(mixed, board, "onnx", dict.fromkeys(["conv.weight", "linear.weight"], Scheme.parse("int8-channel")))
        == ()
    )
    small = dict.fromkeys(["conv.weight", "linear.weight"], Scheme.parse("int4-group16"))
    (note,) = slowdowns(mixed, board, "onnx", small)
    assert note.what == "conv.weight"
    assert "runs conv2d slower with int4-group16 than with floats" in note.reason
    assert board.runners("onnx")[0].name in note.reason
    assert slowdowns(mixed, board, "onnx", {"linear.weight": small["linear.weight"]}) == ()


def test_between_int8_values_other_kernels_are_slow(mixed: Model) -> None:
    """onnxruntime widens 4-bit codes once; LiteRT unpacks those of convolutions on each run."""
    board = find_device("raspberry-pi-5", DEVICES)
    chosen = dict.fromkeys(["conv.weight", "linear.weight"], Scheme.parse("int4-channel"))
    found = {
        (fmt, bool(integers)): [note.what for note in slowdowns(mixed, board, fmt, chosen, integers)]
        for fmt in ("onnx", "tflite")
        for integers in (set(), set(chosen))
    }
    assert found == {
        ("onnx", False): ["linear.weight"],
        ("onnx", True): [],
        ("tflite", False): ["conv.weight"],
        ("tflite", True): ["conv.weight"],
    }


def test_an_accelerator_that_is_not_known_to_compute_in_int8_is_named(mixed: Model) -> None:
    """Of an iPhone's processors the Neural Engine computes in int8, and 4-bit affine codes are known of others only."""
    chosen = {"conv.weight": Scheme.parse("int4-channel"), "linear.weight": Scheme.parse("int8-channel")}
    (note,) = slowdowns(mixed, find_device("iphone-15-pro", DEVICES), "coreml", chosen, set(chosen))
    assert note.what == "conv.weight"
    assert note.reason == "Apple GPU runs int4-channel, and is not known to compute in int8"


def test_an_encoding_is_slow_where_the_first_accelerator_that_runs_it_says_so(mixed: Model) -> None:
    board = find_device("raspberry-pi-5", DEVICES)
    slow = board.runners("onnx")[0]
    without = replace(slow, encodings=tuple(e for e in slow.encodings if e.name != "int4-group"))
    quick = replace(slow, encodings=tuple(replace(e, slow_for=()) for e in slow.encodings))
    chosen = {"conv.weight": Scheme.parse("int4-group16")}
    for accelerators, count in (((slow, quick), 1), ((quick, slow), 0), ((without, slow), 1), ((without, quick), 0)):
        assert len(slowdowns(mixed, replace(board, accelerators=accelerators), "onnx", chosen)) == count


def test_where_no_accelerator_runs_the_format_everything_falls_back(mixed: Model) -> None:
    device = replace(phone(), accelerators=())
    (note,) = fallbacks(mixed, device, "coreml", "float16")
    assert note.what == "everything"
    assert device.name in note.reason
