"""The weight in float16: rounded to nearest even. Weights beyond its range are an error, never an infinity.

1. Refuse weights larger than float16's largest value, 65504.
2. Round. Weights below 6e-8 become 0.
"""

from __future__ import annotations

import numpy as np

from octoc.qtensor import Array, Cast, Scheme
from octoc.quantize import require

KIND = "encode"
ENCODES = ("cast",)
NEEDS = ()


def encode(weight: Array, scheme: Scheme, axis: int, *, dtype: str, importance: Array | None = None) -> Cast:
    """Rounds a weight to float16.

    Args:
        weight: float32, any shape.
        scheme: of kind "cast".
        axis: not used: nothing is shared between elements.
        dtype: not used: there is no scale.
        importance: not used: every element is rounded for itself.

    Raises:
        ModelError: a weight is larger than 65504.
    """
    require(scheme, ENCODES, weight, "float16")
    return Cast(weight.astype(np.float16))
