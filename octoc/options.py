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
from octoc.recipe import Recipe, read_recipe
from octoc.units import parse_size


@dataclass(frozen=True)
class Options:
    """See `compress_model`; `proof` holds the codes of the recipe that is replayed."""

    formats: tuple[str, ...] = ()
    max_size: int | None = None
    max_drop: Drop | None = None
    weights: str | None = None
    activations: str | None = None
    sparsity: float | None = None
    rank: float | None = None
    seed: int = 0
    recipe: Recipe | None = None
    dry_run: bool = False
    proof: Proof | None = None


def parse_options(
    *,
    formats: tuple[str, ...],
    max_size: str | float | None,
    max_drop: str | float | None,
    weights: str | None,
    activations: str | None,
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
    if activations not in (None, "float", "int8"):
        raise UsageError(f"activations {activations!r}: choose float or int8")
    replayed = None
    if recipe is None:
        if recompute:
            raise UsageError("--recompute computes the codes of a recipe anew; give one with --recipe")
    else:
        steering = {
            "weights": weights,
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
        weights=_encoding(weights),
        activations=activations,
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


def _proof_beside(recipe: Path) -> Proof | None:
    path = recipe.with_name(PROOF)
    return read_proof(path) if path.exists() else None


def _fraction(name: str, value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        raise UsageError(f"{name} {value} is not between 0 and 1")
    return value


def _encoding(text: str | None) -> str | None:
    """Checks what was asked for: "auto", a whole scheme, or the beginning of schemes such as "int4"."""
    if text not in (None, "auto") and not re.fullmatch(r"(int|palette)\d+(-tensor|-channel)?", text):
        return str(Scheme.parse(text))
    if text not in (None, "auto"):
        Scheme.parse(text if "-" in text else f"{text}-tensor")
    return text
