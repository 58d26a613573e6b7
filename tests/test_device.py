"""Device profiles: the facts that they hold, what falls back where, and errors that name the file and the line."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octoc.accelerator import ENCODINGS
from octoc.device import Accelerator, Device, Figure, find_device, load_devices
from octoc.errors import UsageError

SHIPPED = Path(__file__).parent.parent / "devices.yaml"
LINES = SHIPPED.read_text().splitlines()
DEVICES = load_devices()
# fmt: off
NAMES = [
    "iphone-12-mini", "iphone-13-pro", "iphone-14-pro", "iphone-15-pro", "iphone-16-pro", "ipad-pro-m4",
    "apple-watch-s9", "pixel-6", "pixel-8", "pixel-8-pro", "pixel-9", "galaxy-s22", "galaxy-s24", "budget-android",
    "raspberry-pi-4", "raspberry-pi-5", "jetson-orin-nano", "x86-laptop", "mcu-stm32l4r5", "class-iphone-15-pro",
    "class-pixel-8-pro", "class-budget-android", "class-iot-sensor", "tier-flagship", "tier-high", "tier-mid",
    "tier-low",
]
# fmt: on


def accelerator(device: str, id: str) -> Accelerator:
    return next(found for found in DEVICES[device].accelerators if found.id == id)


def figures(noun: object) -> Iterator[Figure]:
    """Every figure inside a noun, however deep."""
    if isinstance(noun, Figure):
        yield noun
    elif isinstance(noun, tuple):
        for item in noun:
            yield from figures(item)
    elif dataclasses.is_dataclass(noun):
        for entry in dataclasses.fields(noun):
            yield from figures(getattr(noun, entry.name))


def test_every_device_class_and_tier_is_there() -> None:
    assert set(DEVICES) == set(NAMES)


def test_every_figure_has_a_source_and_a_unit() -> None:
    found = list(figures(tuple(DEVICES.values())))
    assert len(found) > 200
    assert all(figure.source and figure.unit for figure in found)
    peaks = [peak for device in DEVICES.values() for chip in device.accelerators for peak in chip.peaks]
    assert peaks
    assert all(peak.dtype for peak in peaks)


@pytest.mark.parametrize(
    ("name", "ram", "app", "entitled", "bandwidth"),
    [
        ("iphone-12-mini", 4, 2.1, 2.4, 34),
        ("iphone-13-pro", 6, 3.12, 4.2, 34),
        ("iphone-14-pro", 6, 3, 3, 51.2),
        ("iphone-15-pro", 8, 3, 6, 51.2),
        ("iphone-16-pro", 8, 3, 6, 60),
        ("apple-watch-s9", 1, 0.1, 0.1, None),
        ("pixel-6", 8, 4, 4, 51.2),
        ("pixel-8", 8, 4, 4, None),
        ("pixel-9", 12, 6, 6, 60),
        ("galaxy-s22", 8, 4, 4, 51.2),
        ("galaxy-s24", 8, 4, 4, 76.8),
        ("budget-android", 4, 1, 1, 17),
        ("raspberry-pi-4", 4, None, None, 12.8),
        ("raspberry-pi-5", 4, None, None, 17.1),
        ("jetson-orin-nano", 8, None, None, 68),
        ("x86-laptop", 8, None, None, 51.2),
    ],
)
def test_memory_and_bandwidth_are_the_published_ones(
    name: str, ram: float, app: float | None, entitled: float | None, bandwidth: float | None
) -> None:
    device = DEVICES[name]
    giga = [None if value is None else pytest.approx(value * 1e9) for value in (ram, app, entitled, bandwidth)]
    published = device.bandwidth[0].base if device.bandwidth else None
    limits = [device.app_memory_bytes(), device.app_memory_bytes(entitled=True)]
    assert [device.ram[0].base, *limits, published] == giga


@pytest.mark.parametrize(
    ("version", "gigabytes"), [(None, 3), ("17", 6), ("26.3", 6), ("26.4", 3), ("26.10", 3), ("27", 3)]
)
def test_the_ipad_limit_follows_its_system_version(version: str | None, gigabytes: float) -> None:
    assert DEVICES["ipad-pro-m4"].app_memory_bytes(version) == gigabytes * 1e9


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [
        ("class-iphone-15-pro", 2000),
        ("class-pixel-8-pro", 3000),
        ("class-budget-android", 500),
        ("class-iot-sensor", 50),
        ("tier-flagship", 2048),
        ("tier-high", 1024),
        ("tier-mid", 500),
        ("tier-low", 200),
    ],
)
def test_classes_and_tiers_carry_a_model_budget(name: str, megabytes: float) -> None:
    assert DEVICES[name].model_budget[0].base == megabytes * 1e6


def test_the_microcontroller_has_its_sram_and_flash() -> None:
    device = DEVICES["mcu-stm32l4r5"]
    assert (device.app_memory_bytes(), device.storage[0].base) == (640 * 1024, 2 * 1024**2)


@pytest.mark.parametrize(
    ("name", "tops"),
    [
        ("iphone-12-mini", [11]),
        ("iphone-13-pro", [15.8]),
        ("iphone-14-pro", [17]),
        ("iphone-15-pro", [35, 17]),
        ("ipad-pro-m4", [38, 19]),
        ("apple-watch-s9", []),
    ],
)
def test_neural_engine_peaks_keep_each_source(name: str, tops: list[float]) -> None:
    assert [peak.value for peak in DEVICES[name].accelerators[0].peaks] == tops


@pytest.mark.parametrize("name", NAMES)
def test_the_first_format_is_the_platforms_own_and_every_format_has_a_runner(name: str) -> None:
    device = DEVICES[name]
    own = {"ios": "coreml", "ipados": "coreml", "watchos": "coreml", "linux": "onnx"}.get(device.platform, "tflite")
    assert device.formats[0] == ("tflite" if name == "class-iot-sensor" else own)
    assert all(device.runners(format) for format in device.formats)
    assert all(device.activations(chip) and device.encodings(chip) for chip in device.accelerators)


def test_palettes_are_per_tensor_from_ios_16_and_grouped_or_of_3_bits_from_ios_18() -> None:
    phone = DEVICES["iphone-13-pro"]
    engine = phone.runners("coreml")[0]
    found = {version: phone.encodings(engine, version) for version in ("15", "16", "17.6", "18")}
    palettes = {v: {(e.bits, e.granularity) for e in found[v] if e.kind == "palette"} for v in found}
    tensor = {(bits, "tensor") for bits in (1, 2, 4, 6, 8)}
    assert palettes["15"] == set()
    assert palettes["16"] == palettes["17.6"] == tensor
    assert palettes["18"] == {(bits, how) for bits in (1, 2, 3, 4, 6, 8) for how in ("tensor", "group")}
    assert not any(encoding.name == "int4-group" for encoding in found["18"])


def test_only_recent_neural_engines_run_int8_activations() -> None:
    fast = {
        name for name in NAMES for chip in DEVICES[name].runners("coreml")[:1] if chip.activations[-1].dtype == "int8"
    }
    assert fast == {"iphone-15-pro", "iphone-16-pro", "ipad-pro-m4", "class-iphone-15-pro"}
    phone = DEVICES["iphone-15-pro"]
    assert phone.activations(phone.accelerators[0], "16.7") == ("float16",)
    assert phone.activations(phone.accelerators[0], "17") == ("float16", "int8")


@pytest.mark.parametrize(
    ("kind", "facts", "reason"),
    [
        ("conv2d", {"kernel": 13, "rank": 4, "channels": 65536, "size": 16384, "dtype": "float16"}, None),
        ("conv2d", {"kernel": 14}, "kernel 14 is above 13"),
        ("add", {"rank": 6}, "rank 6 is above 5"),
        ("add", {"size": 16385}, "size 16385 is above 16384"),
        ("add", {"channels": 65537}, "channels 65537 is above 65536"),
        ("add", {"dtype": "int32"}, "int32 is not one of"),
        ("add", {"dtype": "float32"}, "float32 is not one of"),
        ("add", {"dynamic": True}, "shape is dynamic"),
        ("gather", {}, "gather"),
        ("lstm", {}, "recurrent"),
        ("gru", {}, "recurrent"),
        ("control_flow", {}, "control flow"),
        ("gelu", {}, None),
        ("max_pool2d", {"kernel": 3, "stride": 2}, None),
    ],
)
def test_the_neural_engine_refuses_what_falls_off_it(kind: str, facts: dict[str, int], reason: str | None) -> None:
    said = accelerator("iphone-15-pro", "apple-neural-engine-w8a8").refuses(kind, **facts)  # type: ignore[arg-type]
    assert said is None if reason is None else reason in (said or "")


@pytest.mark.parametrize(("kind", "facts"), [("conv2d", {"dilation": 2}), ("max_pool2d", {"stride": 3})])
def test_what_sources_dispute_is_said_to_be_disputed(kind: str, facts: dict[str, int]) -> None:
    said = accelerator("iphone-15-pro", "apple-neural-engine-w8a8").refuses(kind, **facts)  # type: ignore[arg-type]
    assert (said or "").startswith("disputed: ")


def test_nnapi_accepts_94_builtins_in_the_published_levels() -> None:
    rules = accelerator("pixel-8", "android-nnapi").accepts or ()
    levels = [
        rule.bounds.get("min_api", rule.bounds.get("min_feature_level")) for rule in rules for _ in rule.operations
    ]
    assert [levels.count(level) for level in (27, 28, 29, 30, 6, 7)] == [30, 10, 45, 6, 1, 2]
    assert len({name for rule in rules for name in rule.operations}) == 94


@pytest.mark.parametrize("kind", ["gelu", "gather", "where", "cumsum", "GATHER_ND", "WHERE", "an_unheard_of_operation"])
def test_nnapi_refuses_what_it_does_not_list(kind: str) -> None:
    assert accelerator("pixel-8", "android-nnapi").refuses(kind, api_level=34)


@pytest.mark.parametrize(
    ("kind", "facts", "runs"),
    [
        ("mean", {"api_level": 27}, False),
        ("mean", {"api_level": 28}, True),
        ("elu", {"api_level": 29}, False),
        ("elu", {"api_level": 30}, True),
        ("bmm", {"api_level": 34}, False),
        ("bmm", {"api_level": 34, "feature_level": 6}, True),
        ("reflection_pad2d", {"feature_level": 6}, False),
        ("reflection_pad2d", {"feature_level": 7}, True),
        ("rsqrt", {"dtype": "int8"}, False),
        ("conv2d", {"dtype": "int8", "rank": 4, "api_level": 29}, True),
        ("add", {"rank": 5}, False),
    ],
)
def test_nnapi_follows_levels_dtypes_and_rank(kind: str, facts: dict[str, int], runs: bool) -> None:
    assert (accelerator("pixel-8", "android-nnapi").refuses(kind, **facts) is None) == runs  # type: ignore[arg-type]


def test_xnnpack_takes_quantized_and_half_operations_where_they_are_listed() -> None:
    fast, old = accelerator("raspberry-pi-5", "xnnpack-cpu"), accelerator("raspberry-pi-4", "xnnpack-cpu-armv8.0")
    assert fast.refuses("conv2d", dtype="int8") is None
    assert fast.refuses("softmax", dtype="float32") is None
    assert fast.refuses("softmax", dtype="int8") is not None
    assert fast.refuses("conv2d", dtype="int16") is not None
    assert fast.refuses("conv2d", dtype="float16") is None
    assert "half-precision" in (old.refuses("conv2d", dtype="float16") or "")
    assert all(e.only_for for e in fast.encodings if e.bits == 4)


@pytest.mark.parametrize("kind", ["dropout", "contiguous", "detach"])
def test_what_is_no_operation_runs_anywhere(kind: str) -> None:
    assert accelerator("mcu-stm32l4r5", "cmsis-nn").refuses(kind) is None


@settings(deadline=None)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(["drop", "add", "swap", "replace"]),
    st.data(),
    st.sampled_from(string.ascii_lowercase),
)
def test_any_typo_of_a_name_suggests_it(name: str, slip: str, data: st.DataObject, letter: str) -> None:
    at = data.draw(st.integers(0, len(name) - 2))
    typed = {
        "drop": name[:at] + name[at + 1 :],
        "add": name[:at] + letter + name[at:],
        "swap": name[:at] + name[at + 1] + name[at] + name[at + 2 :],
        "replace": name[:at] + letter + name[at + 1 :],
    }[slip]
    if typed in DEVICES:
        assert find_device(typed, DEVICES).id == typed
        return
    with pytest.raises(UsageError, match=rf"[ ]{re.escape(name)}[,?]"):
        find_device(typed, DEVICES)


@pytest.mark.parametrize("typed", ["iPhone 15 Pro", "IPHONE_15_PRO", "iphone15pro"])
def test_a_name_as_people_write_it_suggests_the_id(typed: str) -> None:
    with pytest.raises(UsageError, match="did you mean iphone-15-pro") as caught:
        find_device(typed, DEVICES)
    assert caught.value.exit_code == 2


@settings(max_examples=50, deadline=None)
@given(st.text(string.printable + "é智", max_size=40))
def test_an_unknown_name_is_an_error_of_one_line(typed: str) -> None:
    if typed not in DEVICES:
        with pytest.raises(UsageError) as caught:
            find_device(typed, DEVICES)
        assert len(str(caught.value).splitlines()) == 1


def load_text(folder: Path, text: str) -> dict[str, Device]:
    path = folder / "mine.yaml"
    path.write_text(text)
    return load_devices(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("devices")


KEY = re.compile(r"^(\s{4,}(?:- )?\{?)(\w+)(?=: |:$)")
KEY_LINES = [at for at, line in enumerate(LINES) if KEY.match(line)]


@settings(max_examples=25, deadline=None)
@given(at=st.sampled_from(KEY_LINES))
def test_a_renamed_key_is_an_error_at_its_line(folder: Path, at: int) -> None:
    lines = [*LINES]
    lines[at] = KEY.sub(r"\1\2x", lines[at])
    with pytest.raises(UsageError, match=rf"^{re.escape(str(folder))}/mine\.yaml:{at + 1}: .* has no key"):
        load_text(folder, "\n".join(lines))


def whole_block_keys() -> list[tuple[int, int, int]]:
    """(first line of the block, first and last line + 1 of a key) for the blocks that have no base."""
    found = []
    starts = [at for at, line in enumerate(LINES) if re.match(r"^  [a-z][\w.-]*:$", line)]
    for start in starts:
        end = next((at for at in range(start + 1, len(LINES)) if re.match(r"^ {0,3}[^ ]", LINES[at])), len(LINES))
        keys = [at for at in range(start + 1, end) if re.match(r"^    \w", LINES[at])]
        if not LINES[keys[0]].startswith("    base:"):
            found += [(keys[0], at, stop) for at, stop in zip(keys, [*keys[1:], end], strict=True)]
    return [(block, at, stop) for block, at, stop in found if "&" not in "".join(LINES[at:stop])]


@settings(max_examples=25, deadline=None)
@given(where=st.sampled_from(whole_block_keys()))
def test_a_deleted_key_is_an_error_at_its_block(folder: Path, where: tuple[int, int, int]) -> None:
    block, at, stop = where
    key = LINES[at].split(":")[0].strip()
    with pytest.raises(UsageError, match=rf"mine\.yaml:{block + 1}: .* lacks the key '{key}'"):
        load_text(folder, "\n".join(LINES[:at] + LINES[stop:]))


MINE = """\
devices:
  my-board:
    name: my board
    platform: linux
    os_version: null
    api_level: null
    ram: {value: 2, unit: GB, source: label, estimate: false}
    memory: null
    storage: null
    model_budget: null
    bandwidth: null
    formats: [tflite]
    accelerators:
      - id: xnnpack-cpu
        channel_multiple: {value: 4, unit: channels, source: measured, estimate: true}
"""


def test_a_users_device_refers_to_shipped_accelerators_and_overrides_them(folder: Path) -> None:
    board = load_text(folder, MINE)["my-board"]
    assert board.accelerators[0].encodings == accelerator("raspberry-pi-5", "xnnpack-cpu").encodings
    assert board.accelerators[0].channel_multiple[0].value == 4


def test_a_users_file_may_override_a_shipped_device(folder: Path) -> None:
    bandwidth = "bandwidth: {value: 60, unit: GB/s, source: mine, estimate: true}"
    text = f"devices:\n  pixel-8:\n    base: pixel-8\n    {bandwidth}\n"
    loaded = load_text(folder, text)
    assert loaded["pixel-8"].bandwidth[0].base == 60e9
    assert loaded["pixel-8"].accelerators == DEVICES["pixel-8"].accelerators
    assert loaded["pixel-6"] == DEVICES["pixel-6"]


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("value: 2,", "value: -2,", 7, "not negative"),
        ("value: 2,", "value: .nan,", 7, "finite"),
        ("value: 2,", "value: two,", 7, "a number"),
        ("value: 2,", "value: true,", 7, "a number"),
        ("unit: GB", "unit: GB/s", 7, "'GB/s' is not known"),
        ("unit: GB, ", "", 7, "lacks the key 'unit'"),
        ("source: label, ", "", 7, "lacks the key 'source'"),
        ("source: label", 'source: ""', 7, "empty"),
        ("estimate: false", "estimate: maybe", 7, "true or false"),
        ("[tflite]", "[pickle]", 12, "'pickle' is not known"),
        ("[tflite]", "tflite", 12, "must be a list"),
        ("[tflite]", "[tflite, onnx]", 12, "no accelerator of 'my-board' runs onnx"),
        ("id: xnnpack-cpu", "id: xnnpack-gpu", 14, "did you mean 'xnnpack-cpu'"),
        ("platform: linux", "platform: linx", 4, "did you mean 'linux'"),
        ("os_version: null", "os_version: 26.4", 5, "text"),
        ("os_version: null", 'os_version: "new"', 5, "not a version"),
        ("memory: null", "storage: null", 9, "'storage' is here twice"),
        ("my board", "!!python/object/apply:os.system [ls]", 3, "must be text"),
        ("my board", "[", 5, "not valid YAML"),
        ("  my-board:", "  my-board: 3\n  other:", 2, "key: value"),
        ("    name", "    base: nobody\n    name", 3, "base of device 'my-board'"),
        ("channel_multiple", "encodings: [{encoding: int5, source: x}]\n        dispatch", 15, "'int5' is not known"),
        ("channel_multiple", "encodings: [{encoding: palette-4, source: x}]\n        dispatch", 15, "'granularity'"),
        ("channel_multiple", "encodings: [{encoding: int4-group, source: x}]\n        dispatch", 15, "'groups'"),
    ],
)
def test_a_mistake_is_named_with_its_line(folder: Path, old: str, new: str, line: int, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_text(folder, MINE.replace(old, new, 1))
    message = str(caught.value)
    assert re.search(rf"mine\.yaml:{line}: ", message), message
    assert words in message
    assert len(message.splitlines()) == 1


def test_a_device_given_twice_names_the_second_line(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"mine\.yaml:16: the key 'my-board' is here twice"):
        load_text(folder, MINE + MINE.removeprefix("devices:\n"))


@settings(max_examples=25, deadline=None)
@given(content=st.binary(max_size=60))
def test_a_random_file_is_a_usage_error(folder: Path, content: bytes) -> None:
    path = folder / "random.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"random\.yaml:\d+: "):
        load_devices(path)


def test_a_missing_file_is_a_usage_error(folder: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_devices(folder / "nowhere.yaml")


def test_encodings_are_hashable_and_of_the_known_vocabulary() -> None:
    found = {encoding for device in DEVICES.values() for chip in device.accelerators for encoding in chip.encodings}
    assert {encoding.name for encoding in found} == set(ENCODINGS)
