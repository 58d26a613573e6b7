"""Accelerators: what one processor runs well, and which operations fall back from it, as plain data.

An operation's kind is its ATen name without namespace and overload (`conv2d`, `gelu`), with two names of our own,
`depthwise_conv2d` and `control_flow`. A TFLite builtin (`CONV_2D`) is taken as well. An accelerator that takes TFLite
files knows builtins only; `tflite_builtins` in devices.yaml says which builtins a kind becomes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import yaml

from octoc import yaml_nodes as nodes

# The exporters' names, by their files alone: importing one takes seconds, or a package that is not installed.
FORMATS = tuple(sorted(m.name for m in iter_modules([str(Path(__file__).parent / "export")]) if not m.ispkg))
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
    since: Mapping[str, str] = field(hash=False)  # platform -> version; a platform that is not named has no lower bound


@dataclass(frozen=True)
class Encoding:
    """A way of storing weights that an accelerator runs well: `palette-4`, granularity `group`, groups (8, 16)."""

    name: str
    granularity: str  # tensor, channel or group
    source: str
    groups: tuple[int, ...] = ()  # sizes allowed; empty unless the granularity is group
    since: Mapping[str, str] = field(default_factory=dict, hash=False)
    over: tuple[str, ...] = ()  # sparse only: encodings that the remaining values may have
    only_for: tuple[str, ...] = ()  # operation kinds that can take it; empty: every weighted one
    slow_for: tuple[str, ...] = ()  # it saves bytes there, but runs slower than float; offered, and said
    slow_int8_for: tuple[str, ...] = ()  # the same between int8 values

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
    bounds: Mapping[str, Any] = field(hash=False)  # keys of BOUNDS
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
    builtins: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict, repr=False, compare=False
    )  # ATen kind -> TFLite

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


ACCELERATOR_KEYS = tuple(entry.name for entry in fields(Accelerator) if entry.name not in ("id", "builtins"))


def read_accelerator(id: str, keys: nodes.Fields, builtins: Mapping[str, tuple[str, ...]]) -> Accelerator:
    """The accelerator that a block of devices.yaml describes; `builtins` maps ATen kinds to TFLite's."""
    activations, encodings = (nodes.items(keys[key], key) for key in ("activations", "encodings"))
    accepts, refusals = keys["accepts"], keys["refusals"]
    formats = nodes.texts(keys["formats"], "formats", FORMATS)
    return Accelerator(
        id=id,
        name=nodes.value(keys["name"], "name", str),
        kind=nodes.choice(keys["kind"], "kind", KINDS),
        source=nodes.value(keys["source"], "source", str),
        estimate=nodes.value(keys["estimate"], "estimate", bool),
        formats=formats,
        activations=tuple(_activation(node) for node in activations),
        encodings=tuple(_encoding(node) for node in encodings),
        accepts=None if nodes.is_null(accepts) else tuple(_acceptance(n) for n in nodes.items(accepts, "accepts")),
        refusals=() if nodes.is_null(refusals) else tuple(_refusal(n) for n in nodes.items(refusals, "refusals")),
        builtins=builtins if "tflite" in formats else {},
        **{key: read_figures(keys[key], key) for key in ACCELERATOR_KEYS if key in QUANTITIES},
    )


def read_figures(node: yaml.Node, key: str) -> tuple[Figure, ...]:
    """A figure, a list of figures that disagree (the preferred one first), or null."""
    if nodes.is_null(node):
        return ()
    listed = nodes.items(node, key) if isinstance(node, yaml.SequenceNode) else [node]
    return tuple(_figure(item, key) for item in listed)


def read_since(node: yaml.Node | None) -> dict[str, str]:
    """Platform -> the OS version from which something is there."""
    found = nodes.entries(node)
    for platform, version in found.items():
        if platform not in PLATFORMS:
            nodes.fail(version, f"{platform!r} is not a platform; known: {', '.join(PLATFORMS)}")
    return {platform: read_version(version, f"since {platform}") for platform, version in found.items()}


def read_version(node: yaml.Node, what: str) -> str:
    """An OS version as text."""
    text: str = nodes.value(node, what, str)
    if not all(part.isdecimal() for part in text.split(".")):
        nodes.fail(node, f"{what}: {text!r} is not a version like '17' or '26.4'")
    return text


def _figure(node: yaml.Node, what: str) -> Figure:
    keys = nodes.fields(node, what, ("value", "unit", "source", "estimate", *(("dtype",) if what == "peaks" else ())))
    return Figure(
        value=nodes.value(keys["value"], f"value of {what}", float, int, type(None)),
        unit=nodes.choice(keys["unit"], f"unit of {what}", UNITS[QUANTITIES[what]]),
        source=nodes.value(keys["source"], f"source of {what}", str),
        estimate=nodes.value(keys["estimate"], f"estimate of {what}", bool),
        dtype=nodes.choice(keys["dtype"], f"dtype of {what}", DTYPES) if "dtype" in keys else None,
    )


def _activation(node: yaml.Node) -> Activation:
    keys = nodes.fields(node, "activation", ("dtype",), ("since",))
    return Activation(nodes.choice(keys["dtype"], "dtype", DTYPES), read_since(keys.get("since")))


def _encoding(node: yaml.Node) -> Encoding:
    keys = nodes.fields(node, "encoding", ("encoding", "source"), ("granularity", "groups", "since", *_ENCODING_LISTS))
    name = nodes.choice(keys["encoding"], "encoding", ENCODINGS)
    granularity = ENCODINGS[name][2]
    if granularity is None:
        if "granularity" not in keys:
            nodes.fail(node, f"{name} lacks the key 'granularity'")
        granularity = nodes.choice(keys["granularity"], "granularity", ("tensor", "group"))
    elif "granularity" in keys:
        nodes.fail(keys["granularity"], f"{name} has its granularity in its name")
    if ("groups" in keys) != (granularity == "group"):
        nodes.fail(node, f"{name}: 'groups' goes with granularity group, and only with it")
    sizes = nodes.items(keys["groups"], "groups") if "groups" in keys else []
    return Encoding(
        name=name,
        granularity=granularity,
        source=nodes.value(keys["source"], "source", str),
        groups=tuple(nodes.value(size, "a group size", int) for size in sizes),
        since=read_since(keys.get("since")),
        over=nodes.texts(keys["over"], "over", ENCODINGS) if "over" in keys else (),
        only_for=nodes.texts(keys["only_for"], "only_for") if "only_for" in keys else (),
        slow_for=nodes.texts(keys["slow_for"], "slow_for") if "slow_for" in keys else (),
        slow_int8_for=nodes.texts(keys["slow_int8_for"], "slow_int8_for") if "slow_int8_for" in keys else (),
    )


_ENCODING_LISTS = ("over", "only_for", "slow_for", "slow_int8_for")
_BOUND_TYPES: dict[str, type] = {"static": bool}


def _acceptance(node: yaml.Node) -> Rule:
    keys = nodes.fields(node, "acceptance", ("operations", "source"), BOUNDS)
    operations = nodes.texts(keys["operations"], "operations")
    return Rule(operations, _bounds(keys), nodes.value(keys["source"], "source", str))


def _refusal(node: yaml.Node) -> Rule:
    keys = nodes.fields(node, "refusal", ("operations", "reason", "source"), ("disputed", *BOUNDS))
    everything = isinstance(keys["operations"], yaml.ScalarNode) and keys["operations"].value == "all"
    bounds = _bounds(keys)
    if everything and not bounds:
        nodes.fail(node, "a refusal of all operations needs a bound")
    return Rule(
        operations=() if everything else nodes.texts(keys["operations"], "operations"),
        bounds=bounds,
        source=nodes.value(keys["source"], "source", str),
        reason=nodes.value(keys["reason"], "reason", str),
        disputed="disputed" in keys and nodes.value(keys["disputed"], "disputed", bool),
    )


def _bounds(keys: nodes.Fields) -> dict[str, Any]:
    return {
        key: nodes.texts(keys[key], key) if key == "dtypes" else nodes.value(keys[key], key, _BOUND_TYPES.get(key, int))
        for key in BOUNDS
        if key in keys
    }
