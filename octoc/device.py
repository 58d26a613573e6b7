"""Device profiles: what `devices.yaml` says about each device, as plain data.

1. Every file is composed to YAML nodes, not to Python objects, because nodes keep their lines for the errors.
2. A block with `base: ID` starts from the block of that id, which stands above it or in the shipped file.
3. Accelerators are shared: a device lists ids, or `{id: ..., key: value}` to replace some of the keys.
4. Sizes are decimal where the unit is (kB = 1000 bytes); a figure that nobody published is null and predicts nothing.

An operation's kind is its ATen name without namespace and overload (`conv2d`, `gelu`), with three names of our own:
`depthwise_conv2d`, `control_flow` and the recurrent `lstm`, `gru`, `rnn`. A TFLite builtin (`CONV_2D`) is taken as well.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from octoc import yaml_nodes as nodes
from octoc.errors import HostError, UsageError

FORMATS = ("coreml", "tflite", "onnx")
DTYPES = ("float32", "float16", "int8", "int16")
PLATFORMS = ("ios", "ipados", "watchos", "android", "linux", "windows", "bare-metal", "any")
KINDS = ("npu", "gpu", "cpu")

# name -> (kind, bits of one code, granularity of the scale or table; None: the file says which)
ENCODINGS: dict[str, tuple[str, int, str | None]] = {
    "float16": ("float", 16, "tensor"),
    "int8-channel": ("affine", 8, "channel"),
    "int8-tensor": ("affine", 8, "tensor"),
    "int4-channel": ("affine", 4, "channel"),
    "int4-group": ("affine", 4, "group"),
    **{f"palette-{bits}": ("palette", bits, None) for bits in (1, 2, 3, 4, 6, 8)},
    "sparse": ("sparse", 16, "tensor"),
}

# quantity -> unit -> how many of the base unit it is
UNITS: dict[str, dict[str, float]] = {
    "bytes": {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "bytes/s": {"MB/s": 1e6, "GB/s": 1e9},
    "operations/s": {"GOPS": 1e9, "TOPS": 1e12},
    "s": {"s": 1, "ms": 1e-3, "us": 1e-6},
    "channels": {"channels": 1},
}
QUANTITIES = {
    "ram": "bytes",
    "limit": "bytes",
    "storage": "bytes",
    "model_budget": "bytes",
    "working_set": "bytes",
    "working_set_cliff": "bytes",
    "bandwidth": "bytes/s",
    "peaks": "operations/s",
    "dispatch": "s",
    "channel_multiple": "channels",
}

# condition of a rule -> (the fact it bounds, whether a fact breaks it, what to say then)
BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool], str]] = {
    **{
        f"max_{fact}": (fact, lambda fact, bound: fact > bound, f"{fact} {{fact}} is above {{bound}}")
        for fact in ("rank", "kernel", "stride", "dilation", "size", "channels")
    },
    "dtypes": ("dtype", lambda fact, bound: fact not in bound, "{fact} is not one of {bound}"),
    "static": ("dynamic", lambda fact, bound: bool(fact) and bound, "the shape is dynamic"),
    "min_api": ("api_level", lambda fact, bound: fact < bound, "needs Android API level {bound}, not {fact}"),
    "min_feature_level": (
        "feature_level",
        lambda fact, bound: fact < bound,
        "needs NNAPI feature level {bound}, and only {fact} is certain",
    ),
}


@dataclass(frozen=True)
class Figure:
    """One number with its unit and where it comes from; `value` is None where nobody published it."""

    value: float | None
    unit: str
    source: str
    estimate: bool
    dtype: str | None = None  # of a peak only

    @property
    def base(self) -> float | None:
        """The value in bytes, bytes/s, operations/s, seconds or channels."""
        scale = next(units[self.unit] for units in UNITS.values() if self.unit in units)
        return None if self.value is None else self.value * scale


@dataclass(frozen=True)
class Activation:
    """A dtype of activations that an accelerator runs well, from the OS versions in `since` on."""

    dtype: str
    since: Mapping[str, str]  # platform -> version; a platform that is not named has no lower bound


@dataclass(frozen=True)
class Encoding:
    """A way of storing weights that an accelerator runs well: `palette-4`, granularity `group`, groups (8, 16)."""

    name: str
    granularity: str  # tensor, channel or group
    source: str
    groups: tuple[int, ...] = ()  # sizes allowed; empty unless the granularity is group
    since: Mapping[str, str] = field(default_factory=dict)
    over: tuple[str, ...] = ()  # sparse only: encodings that the remaining values may have
    only_for: tuple[str, ...] = ()  # operation kinds that can take it; empty: every weighted one
    slow_for: tuple[str, ...] = ()  # it saves bytes there, but runs slower than float

    @property
    def kind(self) -> str:
        """float, affine, palette or sparse."""
        return ENCODINGS[self.name][0]

    @property
    def bits(self) -> int:
        """Bits of one stored code."""
        return ENCODINGS[self.name][1]


@dataclass(frozen=True)
class Rule:
    """Operation kinds and the bounds within which they run; without bounds a refusal is unconditional."""

    operations: tuple[str, ...]  # ATen kinds or TFLite builtins; empty: all
    bounds: Mapping[str, Any]  # keys of BOUNDS
    source: str
    reason: str = ""
    disputed: bool = False

    def broken_by(self, facts: Mapping[str, Any]) -> str | None:
        """The first bound that the known facts break, in words."""
        for key, bound in self.bounds.items():
            name, breaks, words = BOUNDS[key]
            if facts[name] is not None and breaks(facts[name], bound):
                return words.format(fact=facts[name], bound=", ".join(bound) if key == "dtypes" else bound)
        return None


@dataclass(frozen=True)
class Accelerator:
    """What one processor runs well, through one or more formats, and what falls back from it."""

    id: str
    name: str
    kind: str  # npu, gpu or cpu
    source: str
    estimate: bool
    formats: tuple[str, ...]
    activations: tuple[Activation, ...]  # in order of preference
    encodings: tuple[Encoding, ...]
    accepts: tuple[Rule, ...] | None  # None: no list is published, and what no refusal names is taken to run
    refusals: tuple[Rule, ...]
    peaks: tuple[Figure, ...]
    dispatch: tuple[Figure, ...]  # cost of starting one graph
    working_set: tuple[Figure, ...]  # fast memory, and where speed collapses
    working_set_cliff: tuple[Figure, ...]
    channel_multiple: tuple[Figure, ...]  # widths that the kernels like
    builtins: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)  # ATen kind -> TFLite

    def refuses(
        self,
        op_kind: str,
        *,
        rank: int | None = None,
        kernel: int | None = None,
        stride: int | None = None,
        dilation: int | None = None,
        size: int | None = None,
        channels: int | None = None,
        dtype: str | None = None,
        dynamic: bool | None = None,
        api_level: int | None = None,
        feature_level: int | None = None,
    ) -> str | None:
        """Why an operation falls back from this accelerator, or None. A fact left out breaks no bound.

        Args:
            op_kind: ATen kind or TFLite builtin.
            rank, kernel, stride, dilation, size, channels: the largest over axes and operands; size is W or H.
            dtype: of the activations.
            dynamic: whether any shape is unknown before the run.
            api_level: of Android; it stands for NNAPI's feature level up to 31, later ones promise level 5 only,
                because levels 6 and up come with updates between releases (NeuralNetworksTypes.h).
            feature_level: of NNAPI, where it is known.

        Returns:
            One line; it begins with `disputed: ` where sources disagree.
        """
        facts = {name: value for name, value in locals().items() if name not in ("self", "op_kind")}
        if feature_level is None and api_level is not None:
            facts["feature_level"] = min(api_level, 31) - 26
        names = self.builtins.get(op_kind, (op_kind,))
        if self.accepts is not None:
            accepted = {name: rule for rule in self.accepts for name in rule.operations}
            for name in names:
                broken = accepted[name].broken_by(facts) if name in accepted else "is not among what it accepts"
                if broken:
                    return f"{self.name}: {name}: {broken}"
        for rule in self.refusals:
            broken = rule.broken_by(facts)
            concerns = not rule.operations or not {op_kind, *names}.isdisjoint(rule.operations)
            if concerns and (broken or not rule.bounds):
                detail = f" ({broken})" if broken else ""
                return f"{'disputed: ' if rule.disputed else ''}{self.name}: {op_kind}: {rule.reason}{detail}"
        return None


@dataclass(frozen=True)
class MemoryLimit:
    """What one app may use, from an OS version on, with or without the entitlement for more."""

    since: str | None
    entitled: bool
    limit: tuple[Figure, ...]


@dataclass(frozen=True)
class Device:
    """One device, class or tier. Of several figures for one thing the first is preferred."""

    id: str
    name: str
    platform: str
    os_version: str | None  # taken for granted where the user names none
    api_level: int | None  # of Android
    ram: tuple[Figure, ...]
    memory: tuple[MemoryLimit, ...]
    storage: tuple[Figure, ...]
    model_budget: tuple[Figure, ...]  # bytes of a model, where a class or a tier says so
    bandwidth: tuple[Figure, ...]
    formats: tuple[str, ...]  # the first is the default
    accelerators: tuple[Accelerator, ...]  # in order of preference

    def app_memory_bytes(self, os_version: str | None = None, entitled: bool = False) -> float | None:
        """Bytes that one app may use, or None where nobody published a limit.

        An unknown OS version means the smallest limit over versions, so that a plan holds on each of them.
        """
        known = [entry for entry in self.memory if entry.limit and entry.limit[0].base is not None]
        entries = [entry for entry in known if entry.entitled == entitled] or [e for e in known if not e.entitled]
        if os_version is not None:
            reached = [e for e in entries if _version(e.since or "0") <= _version(os_version)]
            entries = sorted(reached, key=lambda e: _version(e.since or "0"))[-1:]
        return min((entry.limit[0].base or 0.0 for entry in entries), default=None)

    def runners(self, format: str) -> tuple[Accelerator, ...]:
        """The accelerators that run a format here, in order of preference."""
        return tuple(accelerator for accelerator in self.accelerators if format in accelerator.formats)

    def encodings(self, accelerator: Accelerator, os_version: str | None = None) -> tuple[Encoding, ...]:
        """The weight encodings that an accelerator of this device runs well under an OS version."""
        return tuple(encoding for encoding in accelerator.encodings if self._has(encoding.since, os_version))

    def activations(self, accelerator: Accelerator, os_version: str | None = None) -> tuple[str, ...]:
        """The dtypes of activations that an accelerator of this device runs well under an OS version."""
        return tuple(a.dtype for a in accelerator.activations if self._has(a.since, os_version))

    def _has(self, since: Mapping[str, str], os_version: str | None) -> bool:
        version = os_version or self.os_version
        return version is None or _version(since.get(self.platform, "0")) <= _version(version)


def load_devices(extra: Path | None = None) -> dict[str, Device]:
    """Every shipped device by id, and those of the user's file, which may replace shipped ones.

    Raises:
        UsageError: a file breaks the form; the message begins with `FILE:LINE:`.
        HostError: the shipped file is missing.
    """
    here = Path(__file__).parent
    shipped = next((path for path in (here / "devices.yaml", here.parent / "devices.yaml") if path.is_file()), None)
    if shipped is None:
        raise HostError(f"devices.yaml is missing beside {here}; install octoc again")
    accelerators: dict[str, nodes.Fields] = {}
    devices: dict[str, nodes.Fields] = {}
    builtins: dict[str, tuple[str, ...]] = {}
    for path in (shipped, extra) if extra else (shipped,):
        root = nodes.compose(path)
        sections = nodes.fields(root, "the file", ("devices",), ("accelerators", "tflite_builtins", "sources"))
        for key, node in nodes.entries(sections.get("sources")).items():
            nodes.value(node, f"source {key!r}", str)
        for kind, node in nodes.entries(sections.get("tflite_builtins")).items():
            builtins[kind] = nodes.texts(node, f"builtins of {kind!r}")
        _expand(sections.get("accelerators"), "accelerator", Accelerator, accelerators)
        _expand(sections["devices"], "device", Device, devices)
    reader = _Reader(accelerators, builtins)
    return {id: reader.device(id, fields) for id, fields in devices.items()}


def find_device(name: str, devices: Mapping[str, Device]) -> Device:
    """The device of that id.

    Raises:
        UsageError: there is none; the message names the nearest ids.
    """
    if name in devices:
        return devices[name]
    typed = "-".join(name.lower().replace("_", " ").split())
    nearest = difflib.get_close_matches(typed, devices, n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "`octoc devices` lists them all"
    raise UsageError(f"no device is named {name!r}; {hint}")


def _version(text: str) -> tuple[int, ...]:
    """`26.4` -> (26, 4), which compares as versions do."""
    try:
        return tuple(int(part) for part in text.split("."))
    except ValueError:
        raise UsageError(f"{text!r} is not an OS version; write it like 17 or 26.4") from None


def _keys(noun: type) -> tuple[str, ...]:
    return tuple(entry.name for entry in dataclasses.fields(noun) if entry.name not in ("id", "builtins"))


def _expand(section: yaml.Node | None, what: str, noun: type, known: dict[str, nodes.Fields]) -> None:
    """Add a section's blocks to the known ones, each laid over its base."""
    for id, node in nodes.entries(section).items():
        base_node = nodes.entries(node).get("base")
        base = None if base_node is None else known[nodes.choice(base_node, f"base of {what} {id!r}", known)]
        known[id] = nodes.fields(node, f"{what} {id!r}", _keys(noun), ("base",), base)


@dataclass(frozen=True)
class _Reader:
    """Turns checked nodes into the nouns above."""

    blocks: Mapping[str, nodes.Fields]  # of the accelerators that devices refer to
    builtins: Mapping[str, tuple[str, ...]]

    def device(self, id: str, fields: nodes.Fields) -> Device:
        formats = nodes.texts(fields["formats"], "formats", FORMATS)
        entries = nodes.items(fields["accelerators"], f"accelerators of {id!r}")
        accelerators = tuple(self.accelerator(entry) for entry in entries)
        for format in formats:
            if not any(format in accelerator.formats for accelerator in accelerators):
                nodes.fail(fields["formats"], f"no accelerator of {id!r} runs {format}")
        memory = fields["memory"]
        return Device(
            id=id,
            name=nodes.value(fields["name"], "name", str),
            platform=nodes.choice(fields["platform"], "platform", PLATFORMS),
            os_version=_os_version(fields["os_version"]),
            api_level=nodes.value(fields["api_level"], "api_level", int, type(None)),
            memory=() if nodes.is_null(memory) else tuple(_memory(n) for n in nodes.items(memory, "memory")),
            formats=formats,
            accelerators=accelerators,
            **{key: _figures(fields[key], key) for key in _keys(Device) if key in QUANTITIES},
        )
