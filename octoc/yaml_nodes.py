"""Read YAML into checked values whose errors name the file and the line.

A file is composed to YAML nodes rather than loaded to Python objects, because nodes keep their positions and show
repeated keys. Each function takes a node and what to call it in an error, and raises `UsageError("FILE:LINE: ...")`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import yaml

from octoc.errors import UsageError

Fields = dict[str, yaml.Node]  # the value nodes of a mapping by key

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's parser is ten times faster
_TYPE_NAMES = {str: "text (in quotes if it looks like a number)", bool: "true or false", int: "a whole number"}


def fail(node: yaml.Node, message: str) -> NoReturn:
    """Raise a UsageError that points at the node."""
    raise UsageError(f"{node.start_mark.name}:{node.start_mark.line + 1}: {message}")


def compose(path: Path) -> yaml.Node:
    """The root node of a file that holds one YAML document."""
    try:
        with path.open("rb") as stream:
            node: yaml.Node | None = yaml.compose(stream, Loader=_LOADER)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise UsageError(f"{path}:1: the YAML is nested too deeply") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UsageError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}") from error
    if node is None:
        raise UsageError(f"{path}:1: the file is empty")
    return node


def entries(node: yaml.Node | None) -> Fields:
    """A mapping's value nodes by key; no node, no entries."""
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        fail(node, "expected `key: value` pairs")
    found: Fields = {}
    for key, child in node.value:
        name = value(key, "a key", str)
        if name in found:
            fail(key, f"the key {name!r} is here twice")
        found[name] = child
    return found


def fields(
    node: yaml.Node, what: str, required: Collection[str], optional: Collection[str] = (), base: Fields | None = None
) -> Fields:
    """A mapping's value nodes laid over those of its base; unknown and missing keys are errors."""
    own = entries(node)
    for key, _ in node.value:
        if key.value not in (*required, *optional):
            fail(key, f"{what} has no key {key.value!r}{_nearest(key.value, (*required, *optional))}")
    merged = {**(base or {}), **own}
    missing = [key for key in required if key not in merged]
    if missing:
        fail(node, f"{what} lacks the key {missing[0]!r}")
    return merged


def value(node: yaml.Node, what: str, *types: type) -> Any:
    """A scalar of one of the types; numbers are finite and not negative, texts not empty."""
    found: Any = None if not isinstance(node, yaml.ScalarNode) else _construct(node)
    if type(found) not in types or not isinstance(node, yaml.ScalarNode):
        fail(node, f"{what} must be {' or '.join(_type_name(kind) for kind in types)}")
    if type(found) in (int, float) and not (math.isfinite(found) and found >= 0):
        fail(node, f"{what} must be finite and not negative")
    if type(found) is str and not found.strip():
        fail(node, f"{what} must not be empty")
    return found


def choice(node: yaml.Node, what: str, allowed: Collection[str]) -> str:
    """A text that is one of the allowed ones."""
    found: str = value(node, what, str)
    if found not in allowed:
        fail(node, f"{what}: {found!r} is not known{_nearest(found, allowed)}")
    return found


def is_null(node: yaml.Node) -> bool:
    """Whether the node is `null` (or nothing at all)."""
    return node.tag == "tag:yaml.org,2002:null"


def items(node: yaml.Node, what: str) -> list[yaml.Node]:
    """The nodes of a list that is not empty."""
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        fail(node, f"{what} must be a list of at least one item")
    found: list[yaml.Node] = node.value
    return found


def texts(node: yaml.Node, what: str, allowed: Collection[str] | None = None) -> tuple[str, ...]:
    """A list of different texts; it may be empty only if anything is allowed."""
    nodes = node.value if allowed is None and isinstance(node, yaml.SequenceNode) else items(node, what)
    found: list[str] = []
    for item in nodes:
        text = value(item, what, str) if allowed is None else choice(item, what, allowed)
        if text in found:
            fail(item, f"{what}: {text!r} is here twice")
        found.append(text)
    return tuple(found)


def _construct(node: yaml.ScalarNode) -> Any:
    """The Python value, or the node itself where the text is not of its tag (`!!int x`, `!!python/object`)."""
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (yaml.YAMLError, ValueError, OverflowError):
        return node


def _nearest(text: str, allowed: Collection[str]) -> str:
    near = difflib.get_close_matches(text, allowed, n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; known: {', '.join(sorted(allowed)[:8])}"


def _type_name(kind: type) -> str:
    return {**_TYPE_NAMES, float: "a number", type(None): "null"}[kind]
