"""What the user asked for, parsed and checked for what cannot be meant together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from octoc.errors import UsageError
from octoc.metrics import Drop, parse_drop
from octoc.proof import NAME as PROOF
from octoc.proof import Proof, read_proof
from octoc.qtensor import Scheme
from octoc.quantize import encoder
from octoc.recipe import Recipe, read_recipe
from octoc.units import parse_seconds, parse_size

# int8 leaves a start in floats where that pays (octoc/quantize/start.py), int8-all does not.
ACTIVATIONS = ("float", "int8", "int8-all")


@dataclass(frozen=True)
class Asked:
    """Which encodings the user asked for.

    Args:
        text: a whole scheme, the beginning of schemes such as "int4", "auto", or None.
        bits: width of the codes.
        group_size: weights a scale, or channels a table.
    """

    text: str | None
    bits: int | None
    group_size: int | None

    @property
    def names_codes(self) -> bool:
        return self.bits is not None or self.group_size is not None

    def means(self, scheme: Scheme) -> bool:
        """Whether a scheme is one of those; `int8` stands for every encoding that begins so."""
        text = str(scheme)
        named = self.text in (None, "auto") or text == self.text or text.startswith(f"{self.text}-")
        if self.names_codes and scheme.kind == "cast":
            return False
        return named and self.bits in (None, scheme.bits) and self.group_size in (None, scheme.group_size)

    def __str__(self) -> str:
        parts = {"weights": self.text, "bits": self.bits, "group-size": self.group_size}
        return " ".join(f"--{name} {value}" for name, value in parts.items() if value is not None)


@dataclass(frozen=True)
class Options:
    """See `compress_model`; `proof` holds the codes of the recipe that is replayed."""

    formats: tuple[str, ...] = ()
    max_size: int | None = None
    max_drop: Drop | None = None
    avg_bits: float | None = None
    weights: str | None = None
    bits: int | None = None
    group_size: int | None = None
    method: str | None = None
    sensitivity: Path | None = None
    activations: str | None = None
    recover: float | None = None
    sparsity: float | None = None
    rank: float | None = None
    seed: int = 0
    recipe: Recipe | None = None
    dry_run: bool = False
    proof: Proof | None = None

    @property
    def asked(self) -> Asked:
        return Asked(self.weights, self.bits, self.group_size)


def parse_options(
    *,
    formats: tuple[str, ...],
    max_size: str | float | None,
    max_drop: str | float | None,
    avg_bits: float | None,
    weights: str | None,
    bits: int | None,
    group_size: int | None,
    method: str | None,
    sensitivity: str | Path | None,
    activations: str | None,
    recover: str | float | None,
    sparsity: float | None,
    rank: float | None,
    seed: int,
    recipe: str | Path | None,
    recompute: bool,
    dry_run: bool,
) -> Options:
    """The arguments of `compress_model`; a recipe brings its own seed, and its codes where a proof lies beside it.

    Raises:
        UsageError: a value cannot be meant, or would be ignored beside another.
        ArtifactError: the proof beside the recipe is damaged.
    """
    if activations not in (None, *ACTIVATIONS):
        raise UsageError(f"activations {activations!r}: choose {', '.join(ACTIVATIONS)}")
    if bits is not None and not 1 <= bits <= 8:
        raise UsageError(f"--bits {bits}: codes have 1 to 8 bits")
    if group_size is not None and group_size < 1:
        raise UsageError(f"--group-size {group_size}: a group holds at least 1 weight")
    if weights not in (None, "auto") and (bits is not None or group_size is not None):
        raise UsageError(f"--weights {weights} beside --bits or --group-size: it says both; leave one of them out")
    if method is not None:
        encoder(method)
    replayed = None
    if recipe is None:
        if recompute:
            raise UsageError("--recompute computes the codes of a recipe anew; give one with --recipe")
    else:
        steering = {
            "weights": weights,
            "bits": bits,
            "group-size": group_size,
            "avg-bits": avg_bits,
            "method": method,
            "sensitivity": sensitivity,
            "recover": recover,
            "activations": activations,
            "sparsity": sparsity,
            "rank": rank,
        }
        for name, value in steering.items():
            if value is not None:
                raise UsageError(f"--{name} {value} beside --recipe: the recipe decides that; leave one of them out")
        replayed = read_recipe(Path(recipe))
        if seed not in (0, replayed.seed):
            raise UsageError(f"--seed {seed} beside --recipe: the recipe's seed is {replayed.seed}; leave --seed out")
    return Options(
        formats=formats,
        max_size=_size(max_size),
        max_drop=None if max_drop is None else parse_drop(max_drop),
        avg_bits=_positive("avg-bits", avg_bits, 32),
        weights=_encoding(weights),
        bits=bits,
        group_size=group_size,
        method=method,
        sensitivity=None if sensitivity is None else Path(sensitivity),
        activations=activations,
        recover=_time(recover),
        sparsity=_fraction("sparsity", sparsity),
        rank=_fraction("rank", rank),
        seed=seed if replayed is None else replayed.seed,
        recipe=replayed,
        dry_run=dry_run,
        proof=None if recipe is None or recompute else _proof_beside(Path(recipe)),
    )


def _size(size: str | float | None) -> int | None:
    if size is None or isinstance(size, str):
        return None if size is None else parse_size(size)
    if not 1 <= size < float("inf"):
        raise UsageError(f"a budget of {size} bytes holds nothing; give a size such as 150kB")
    return int(size)


def _time(recover: str | float | None) -> float | None:
    """Seconds of training, None for none."""
    if recover is None or recover == "none":
        return None
    if isinstance(recover, str):
        return parse_seconds(recover)
    if not 0 < recover < float("inf"):
        raise UsageError(f"--recover {recover}: training takes some seconds; write a time such as 15min, or none")
    return float(recover)


def _proof_beside(recipe: Path) -> Proof | None:
    path = recipe.with_name(PROOF)
    return read_proof(path) if path.exists() else None


def _fraction(name: str, value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        raise UsageError(f"{name} {value} is not between 0 and 1")
    return value


def _positive(name: str, value: float | None, most: float) -> float | None:
    if value is not None and not 0 < value <= most:
        raise UsageError(f"--{name} {value} is not between 0 and {most:g}")
    return value


def _encoding(text: str | None) -> str | None:
    """Checks what was asked for: "auto", a whole scheme, or the beginning of schemes such as "int4"."""
    if text not in (None, "auto") and not re.fullmatch(r"(int|palette)\d+(-tensor|-channel)?", text):
        return str(Scheme.parse(text))
    if text not in (None, "auto"):
        Scheme.parse(text if "-" in text else f"{text}-tensor")
    return text
