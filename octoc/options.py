"""What the user asked for, parsed."""

from __future__ import annotations

from dataclasses import dataclass

from octoc.metrics import Drop
from octoc.proof import Proof
from octoc.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """See `compress_model`; `proof` holds the codes of the recipe that is replayed."""

    formats: tuple[str, ...] = ()
    max_size: int | None = None
    max_drop: Drop | None = None
    weights: str | None = None
    activations: str = "float"
    sparsity: float | None = None
    rank: float | None = None
    seed: int = 0
    recipe: Recipe | None = None
    dry_run: bool = False
    proof: Proof | None = None
