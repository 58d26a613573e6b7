"""GPTQ of one layer: octoc's against the public algorithm, on the same processor in the same run.

    python benchmarks/gptq.py [width]

The public algorithm is the blocked loop that GPTQModel and llm-compressor share, written again from its description:
in torch, float32, activation order, 1 % damping, the Cholesky factor of the inverse Hessian, 128 columns a block,
each column rounded in turn and its error spread to the rest of the block, each block's to the rest of the layer. Both
take 4-bit codes with one scale an output channel; the public algorithm's is min-max, as it is there by default.
They take turns, and the fastest turn of each counts.
The error is that of the outputs, relative to the outputs, by the undamped Hessian.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from torch import Tensor

from octoc.hessian import Hessian
from octoc.qtensor import Scheme
from octoc.quantize import encode

BLOCK = 128
TURNS = 3


def public_gptq(weight: Tensor, matrix: Tensor) -> Tensor:
    """Decoded weights [outputs, inputs]."""
    w, h = weight.clone(), matrix.clone()
    scale = (w.abs().amax(1) / 7).clamp_min(1e-12)
    order = torch.argsort(torch.diag(h), descending=True)
    w, h = w[:, order], h[order][:, order]
    h += 0.01 * torch.diag(h).mean() * torch.eye(len(h))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    decoded = torch.empty_like(w)
    for start in range(0, len(h), BLOCK):
        stop = min(start + BLOCK, len(h))
        part, factor = w[:, start:stop].clone(), inverse[start:stop, start:stop]
        errors = torch.empty_like(part)
        for j in range(stop - start):
            column = part[:, j]
            rounded = torch.clamp(torch.round(column / scale), -8, 7) * scale
            decoded[:, start + j] = rounded
            errors[:, j] = (column - rounded) / factor[j, j]
            part[:, j:] -= errors[:, j : j + 1] @ factor[j : j + 1, j:]
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return decoded[:, torch.argsort(order)]


def main() -> None:
    width = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((width // 8, width), np.float32)
    hessian = Hessian(1, width, width)
    for _ in range(4):
        noise = generator.standard_normal((1, width, width), np.float32)
        hessian.update(generator.standard_normal((1, width, width // 8), np.float32) @ mixing + 3 * noise)
    weight = generator.standard_normal((width, width), np.float32) / width**0.5
    matrix = hessian.matrix[0].astype(np.float32)

    def error(decoded: np.ndarray) -> float:
        rest = (decoded - weight).astype(np.float32)
        return float(np.sqrt(np.vdot(rest @ matrix, rest) / np.vdot(weight @ matrix, weight)))

    scheme = Scheme.parse("int4-channel")
    public = own = float("inf")
    for _ in range(TURNS):
        start = time.perf_counter()
        with torch.no_grad():
            theirs = public_gptq(torch.from_numpy(weight), torch.from_numpy(matrix)).numpy()
        public = min(public, time.perf_counter() - start)
        start = time.perf_counter()
        ours = encode(weight, scheme, 0, method="gptq", hessian=hessian)
        own = min(own, time.perf_counter() - start)
    print(f"{width} x {width}, 4 bits, {torch.get_num_threads()} threads")
    print(f"rounding to nearest     error {error(encode(weight, scheme, 0).dequantize()):.5f}")
    print(f"public algorithm {public:6.2f} s error {error(theirs):.5f}")
    print(f"octoc            {own:6.2f} s error {error(ours.dequantize()):.5f}   {public / own:.2f}x as fast")


if __name__ == "__main__":
    main()
