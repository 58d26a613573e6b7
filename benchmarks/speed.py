"""Quantizers against their peers, side by side in one run: weights a second, and the memory's own speed beside them.

Each takes turns with its peer, so that whatever else the machine does hits both; of all turns the fastest counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from octoc.packing import pack_codes
from octoc.qtensor import Affine, Array, Scheme
from octoc.quantize import encode
from octoc.quantize.palette import cluster

OUTPUTS, INPUTS, GROUP = 4096, 4096, 32


def fastest(calls: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Seconds of a call of each."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(turns):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def int4_groups() -> None:
    """int4 codes with a float32 scale for 32 weights, against onnxruntime's kernel for MatMulNBits."""
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    weight = np.random.default_rng(0).standard_normal((OUTPUTS, INPUTS)).astype(np.float32)
    turned = np.ascontiguousarray(weight.T)  # as onnxruntime holds it
    blocks = INPUTS // GROUP
    packed = np.zeros((OUTPUTS, blocks, GROUP // 2), np.uint8)
    scales, zeros = np.zeros((OUTPUTS, blocks), np.float32), np.zeros((OUTPUTS, -(-blocks // 2)), np.uint8)
    target = np.empty_like(weight)
    scheme = Scheme("affine", 4, "group", GROUP)

    def ours(method: str) -> Affine:
        found = encode(weight, scheme, 0, method=method)
        assert isinstance(found, Affine)
        return found

    spent = fastest(
        {
            "onnxruntime": lambda: quantize_matmul_4bits(packed, turned, scales, zeros, GROUP, OUTPUTS, INPUTS, True),
            "octoc minmax": lambda: ours("minmax"),
            "octoc minmax, packed": lambda: pack_codes(ours("minmax").codes, 4),
            "copy of the weight": lambda: np.copyto(target, weight),
            "largest weight": lambda: weight.max(),
        },
        turns=7,
    ) | fastest({"octoc rtn, least error": lambda: ours("rtn")}, turns=1)
    print(f"int4 in groups of {GROUP}, {OUTPUTS} x {INPUTS} weights, {torch.get_num_threads()} threads of torch")
    for name, seconds in spent.items():
        line = f"  {name:24} {weight.size / seconds / 1e6:8.0f} M weights/s  {spent['onnxruntime'] / seconds:6.2f}x"
        traffic = {"copy of the weight": 2, "largest weight": 1}.get(name)
        print(line + (f"  {traffic * weight.nbytes / seconds / 1e9:.1f} GB/s" if traffic else ""))


def kmeans() -> None:
    """The best 16 centres of a million weights, against coremltools' exact clustering."""
    from coremltools._deps import _kmeans1d

    weight = np.random.default_rng(1).standard_normal(1_000_000).astype(np.float32)
    found: dict[str, Array] = {}

    def theirs() -> None:
        found["coremltools"] = np.asarray(_kmeans1d.cluster(weight, 16).centroids)

    def ours() -> None:
        found["octoc"] = cluster(weight, 16)

    spent = fastest({"coremltools": theirs, "octoc": ours}, turns=3)
    print("exact k-means of 1 M weights, 16 centres")
    for name, seconds in spent.items():
        centres = np.sort(found[name].astype(np.float64))
        codes = np.searchsorted((centres[1:] + centres[:-1]) / 2, weight)
        error = float(np.square(centres[codes] - weight).sum())
        print(f"  {name:24} {seconds:8.3f} s  {spent['coremltools'] / seconds:6.2f}x  squared error {error:.6f}")


def main() -> None:
    kmeans()
    int4_groups()


if __name__ == "__main__":
    main()
