"""`Compressed`: the transformed network and its compressed weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from octoc.model import Model
from octoc.qtensor import QTensor


@dataclass(frozen=True)
class Compressed:
    """What an exporter writes.

    Args:
        model: the graph after every rewrite (batch norm folded, factorized, `quantize_per_tensor` and
            `dequantize_per_tensor` around integer operations); its weights are still floats.
        qtensors: compressed weights by tensor name. A name that is absent stays float. Where an operation runs in
            integers its bias stands here too, as 32-bit codes whose scale is input scale times weight scale.
        shifts: what was added to biases of `model` after the rewrites, by name.
    """

    model: Model
    qtensors: Mapping[str, QTensor]
    shifts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @cached_property
    def decoded(self) -> Model:
        """The network that every artefact must compute: each weight is what its codes mean."""
        return self.model.with_tensors(
            {name: torch.from_numpy(q.dequantize().copy()) for name, q in self.qtensors.items()}
        )
