"""`Recipe`: an ordered list of decisions, JSON in and out. Beside every artefact lies the recipe that rebuilds it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from octoc.errors import UsageError
from octoc.qtensor import Scheme


@dataclass(frozen=True)
class Prune:
    """Set the smallest weights of a tensor to zero.

    Args:
        tensor: its name.
        sparsity: fraction of weights that become zero, in [0, 1).
        method: a file of octoc/prune/.
    """

    tensor: str
    sparsity: float
    method: str = "magnitude"
    step: ClassVar[str] = "prune"


@dataclass(frozen=True)
class Factorize:
    """Replace a layer by two thinner ones.

    Args:
        tensor: the layer's weight.
        rank: width between the two.
        method: a file of octoc/lowrank/.
    """

    tensor: str
    rank: int
    method: str = "svd"
    step: ClassVar[str] = "factorize"


@dataclass(frozen=True)
class FoldBatchNorm:
    """Fold every batch norm into the layer before it."""

    step: ClassVar[str] = "fold_batch_norm"


@dataclass(frozen=True)
class Equalize:
    """Rescale channels between neighbouring layers by powers of two.

    Args:
        powers: name of the first layer's operation -> one exponent a channel.
        method: a file of octoc/quantize/.
    """

    powers: Mapping[str, tuple[int, ...]]
    method: str = "equalize"
    step: ClassVar[str] = "equalize"


@dataclass(frozen=True)
class QuantizeActivations:
    """Run in integers what can.

    Args:
        ranges: node name -> (scale, zero point) of its int8 value.
        method: a file of octoc/quantize/.
    """

    ranges: Mapping[str, tuple[float, int]]
    method: str = "activations"
    step: ClassVar[str] = "quantize_activations"


@dataclass(frozen=True)
class CorrectBiases:
    """Add to biases what quantization took from the means of their channels.

    Args:
        shifts: name of a bias -> one number a channel.
        method: a file of octoc/quantize/.
    """

    shifts: Mapping[str, tuple[float, ...]]
    method: str = "bias"
    step: ClassVar[str] = "correct_biases"


@dataclass(frozen=True)
class Recover:
    """Train the compressed network towards the original's outputs.

    Args:
        method: a file of octoc/recover/.
        steps: batches to learn from; of a method that goes block by block, for each block.
        seed: of everything random in it.
        vectors: float tensors that were trained too, as they became; the codes that it made stand in the proof.
    """

    method: str
    steps: int
    seed: int
    vectors: Mapping[str, tuple[float, ...]]
    step: ClassVar[str] = "recover"


@dataclass(frozen=True)
class Encode:
    """Store a weight compressed.

    Args:
        tensor: its name.
        scheme: text form of a `Scheme`.
        dtype: of scales or tables, "float32" or "float16".
        axis: output-channel axis of the weight.
        method: a file of octoc/quantize/; the usual one of the scheme where None.
    """

    tensor: str
    scheme: str
    dtype: str
    axis: int
    method: str | None = None
    step: ClassVar[str] = "encode"


Decision = Prune | Factorize | FoldBatchNorm | Equalize | QuantizeActivations | CorrectBiases | Encode | Recover
_STEPS: dict[str, type[Any]] = {
    kind.step: kind
    for kind in (Prune, Factorize, FoldBatchNorm, Equalize, QuantizeActivations, CorrectBiases, Encode, Recover)
}


@dataclass(frozen=True)
class Recipe:
    """All decisions for one artefact.

    Args:
        model: fingerprint of the network the recipe was made for.
        format: of the artefact.
        device: the profile it was planned for.
        seed: of everything random.
        steps: in the order in which they are applied.
        version: of octoc.
    """

    model: str
    format: str
    device: str
    seed: int
    steps: tuple[Decision, ...]
    version: str

    def of(self, kind: type[Any]) -> tuple[Any, ...]:
        """The decisions of one kind."""
        return tuple(step for step in self.steps if isinstance(step, kind))

    def to_json(self) -> str:
        head = {name: getattr(self, name) for name in ("version", "model", "format", "device", "seed")}
        steps = [
            {"step": step.step, **{key: value for key, value in asdict(step).items() if value is not None}}
            for step in self.steps
        ]
        return json.dumps({"octoc": head.pop("version"), **head, "steps": steps}, indent=1) + "\n"


def read_recipe(path: Path) -> Recipe:
    """The inverse of `Recipe.to_json`.

    Raises:
        UsageError: no such file, not JSON, or a key, step or value that is not known.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:  # a ValueError also of a number with thousands of digits
        raise UsageError(f"recipe {path} cannot be read: {error}") from error
    known = {"octoc", "model", "format", "device", "seed", "steps"}
    if not isinstance(data, dict) or set(data) != known or not isinstance(data["steps"], list):
        wrong = sorted(set(data) ^ known) if isinstance(data, dict) else type(data).__name__
        raise UsageError(f"recipe {path}: expected the keys {', '.join(sorted(known))}; differs in {wrong}")
    if type(data["seed"]) is not int or not all(
        isinstance(data[k], str) for k in ("octoc", "model", "format", "device")
    ):
        raise UsageError(f"recipe {path}: seed is a whole number, octoc, model, format and device are texts")
    steps = tuple(_decision(path, i, entry) for i, entry in enumerate(data["steps"]))
    return Recipe(data["model"], data["format"], data["device"], data["seed"], steps, data["octoc"])


def _decision(path: Path, index: int, entry: Any) -> Decision:
    where = f"recipe {path}, step {index + 1}"
    kind = _STEPS.get(str(entry.get("step"))) if isinstance(entry, dict) else None
    if kind is None:
        raise UsageError(f"{where}: unknown step {entry!r:.80}; there are {', '.join(_STEPS)}")
    given = {key: value for key, value in entry.items() if key != "step"}
    allowed = {f.name for f in fields(kind)}
    if not set(given) <= allowed:
        raise UsageError(f"{where} ({kind.step}): unknown {sorted(set(given) - allowed)}; there are {sorted(allowed)}")
    for key, value in given.items():
        expected = _TYPES[key]
        if not isinstance(value, expected) or isinstance(value, bool):
            raise UsageError(f"{where} ({kind.step}): {key} is {value!r:.60}, expected {_NAMES[key]}")
    try:
        decision: Decision = kind(**given)
    except TypeError as error:
        raise UsageError(f"{where} ({kind.step}): {str(error).split('__init__() ')[-1]}") from error
    if isinstance(decision, Prune) and not 0 <= decision.sparsity < 1:
        raise UsageError(f"{where} (prune): sparsity {decision.sparsity} is not in [0, 1)")
    if isinstance(decision, Factorize) and decision.rank < 1:
        raise UsageError(f"{where} (factorize): rank {decision.rank} is less than 1")
    if isinstance(decision, Encode):
        try:
            Scheme.parse(decision.scheme)
        except UsageError as error:
            raise UsageError(f"{where} (encode): {error}") from error
        if decision.dtype not in ("float16", "float32") or decision.axis not in (0, 1):
            raise UsageError(f"{where} (encode): dtype {decision.dtype!r} or axis {decision.axis} is not known")
    if isinstance(decision, Recover) and decision.steps < 0:
        raise UsageError(f"{where} (recover): {decision.steps} steps are less than none")
    where = f"{where} ({kind.step})"
    if isinstance(decision, Recover):
        vectors = _numbers(where, "values", decision.vectors)
        return Recover(decision.method, decision.steps, decision.seed, vectors)
    if isinstance(decision, Equalize):
        return Equalize(_powers(where, decision.powers), decision.method)
    if isinstance(decision, CorrectBiases):
        return CorrectBiases(_numbers(where, "shifts", decision.shifts), decision.method)
    if isinstance(decision, QuantizeActivations):
        return QuantizeActivations(_ranges(where, decision.ranges), decision.method)
    return decision


def _is_whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any) -> bool:
    """A finite number that a float holds: JSON also has NaN, infinities and integers of any length."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _ranges(where: str, ranges: Mapping[str, Any]) -> dict[str, tuple[float, int]]:
    found: dict[str, tuple[float, int]] = {}
    for node, pair in ranges.items():
        match pair:
            case [scale, zero_point] if _is_number(scale) and scale > 0 and _is_whole(zero_point, -128, 127):
                found[node] = (float(scale), zero_point)
            case _:
                raise UsageError(
                    f"{where}: the range of {node} is {pair!r:.60}, expected [scale > 0, zero point of int8]"
                )
    return found


def _powers(where: str, powers: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    for node, exponents in powers.items():
        if not isinstance(exponents, list) or not all(_is_whole(e, -32, 32) for e in exponents):
            raise UsageError(
                f"{where}: the powers of {node} are {exponents!r:.60}, expected a list of small whole numbers"
            )
    return {node: tuple(exponents) for node, exponents in powers.items()}


def _numbers(where: str, what: str, given: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    for name, values in given.items():
        if not isinstance(values, list) or not all(_is_number(v) for v in values):
            raise UsageError(f"{where}: the {what} of {name} are {values!r:.60}, expected a list of finite numbers")
    return {name: tuple(float(v) for v in values) for name, values in given.items()}


_TYPES: dict[str, Any] = {
    "shifts": dict,
    "powers": dict,
    "tensor": str,
    "method": str,
    "scheme": str,
    "dtype": str,
    "sparsity": (int, float),
    "rank": int,
    "axis": int,
    "ranges": dict,
    "steps": int,
    "seed": int,
    "vectors": dict,
}
_NAMES = {str: "a text", int: "a whole number", (int, float): "a number", dict: "a table"}
_NAMES = {key: _NAMES[kind] for key, kind in _TYPES.items()}
