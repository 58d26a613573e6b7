"""Device profiles: what `devices.yaml` says about each device, as plain data.

1. The shipped file and the user's are read with the line of everything kept, for the errors.
2. A block with `base: ID` starts from the block of that id, which stands above it or in the shipped file.
3. Accelerators are shared: a device lists ids, or `{id: ..., key: value}` to replace some of an accelerator's keys.
4. Sizes are decimal where the unit is (kB = 1000 bytes); a figure that nobody published is null and predicts nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from octoc import yaml_nodes as nodes
from octoc.accelerator import (
    ACCELERATOR_KEYS,
    ENCODINGS,
    FORMATS,
    PLATFORMS,
    QUANTITIES,
    Accelerator,
    Activation,
    Encoding,
    Figure,
    Rule,
    read_accelerator,
    read_figures,
    read_version,
)
from octoc.errors import HostError, UsageError

__all__ = [
    "ENCODINGS",
    "FORMATS",
    "Accelerator",
    "Activation",
    "Device",
    "Encoding",
    "Figure",
    "MemoryLimit",
    "Rule",
    "find_device",
    "load_devices",
]


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
        _expand(sections.get("accelerators"), "accelerator", ACCELERATOR_KEYS, accelerators)
        _expand(sections["devices"], "device", DEVICE_KEYS, devices)
    reader = _Reader(accelerators, builtins)
    return {id: reader.device(id, keys) for id, keys in devices.items()}


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


DEVICE_KEYS = tuple(entry.name for entry in fields(Device) if entry.name != "id")


def _expand(section: yaml.Node | None, what: str, keys: tuple[str, ...], known: dict[str, nodes.Fields]) -> None:
    """Add a section's blocks to the known ones, each laid over its base."""
    for id, node in nodes.entries(section).items():
        base_node = nodes.entries(node).get("base")
        base = None if base_node is None else known[nodes.choice(base_node, f"base of {what} {id!r}", known)]
        known[id] = nodes.fields(node, f"{what} {id!r}", keys, ("base",), base)


class _Reader:
    """Builds devices from checked nodes; an accelerator that several devices share is built once."""

    def __init__(self, blocks: Mapping[str, nodes.Fields], builtins: Mapping[str, tuple[str, ...]]) -> None:
        self.blocks = blocks
        self.builtins = builtins
        self.shared = {id: read_accelerator(id, keys, builtins) for id, keys in blocks.items()}

    def device(self, id: str, keys: nodes.Fields) -> Device:
        formats = nodes.texts(keys["formats"], "formats", FORMATS)
        listed = nodes.items(keys["accelerators"], f"accelerators of {id!r}")
        accelerators = tuple(self.accelerator(node) for node in listed)
        for format in formats:
            if not any(format in accelerator.formats for accelerator in accelerators):
                nodes.fail(keys["formats"], f"no accelerator of {id!r} runs {format}")
        version, memory = keys["os_version"], keys["memory"]
        return Device(
            id=id,
            name=nodes.value(keys["name"], "name", str),
            platform=nodes.choice(keys["platform"], "platform", PLATFORMS),
            os_version=None if nodes.is_null(version) else read_version(version, "os_version"),
            api_level=nodes.value(keys["api_level"], "api_level", int, type(None)),
            memory=() if nodes.is_null(memory) else tuple(_memory(node) for node in nodes.items(memory, "memory")),
            formats=formats,
            accelerators=accelerators,
            **{key: read_figures(keys[key], key) for key in DEVICE_KEYS if key in QUANTITIES},
        )

    def accelerator(self, node: yaml.Node) -> Accelerator:
        if isinstance(node, yaml.ScalarNode):
            return self.shared[nodes.choice(node, "accelerator", self.shared)]
        own = nodes.fields(node, "accelerator", ("id",), ACCELERATOR_KEYS)
        id = nodes.choice(own.pop("id"), "accelerator", self.shared)
        return read_accelerator(id, {**self.blocks[id], **own}, self.builtins)


def _memory(node: yaml.Node) -> MemoryLimit:
    keys = nodes.fields(node, "memory limit", ("since", "entitled", "limit"))
    return MemoryLimit(
        since=None if nodes.is_null(keys["since"]) else read_version(keys["since"], "since"),
        entitled=nodes.value(keys["entitled"], "entitled", bool),
        limit=read_figures(keys["limit"], "limit"),
    )
