"""stories260K without data: rounding, HQQ and HIGGS at no more bits in all than rounding takes.

The linear layers of the blocks are encoded, embedding and head stay float. Rounding has groups of 32 inputs (43 of
`w2`'s 172) with float16 scales. What the others hold besides (zero points, tables, the rotation's constants) is
counted, and made up for by wider groups in some layers.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.peers import require_assets
from octoc.compressed import Compressed
from octoc.load import load_model
from octoc.model import Model
from octoc.qtensor import Array, QTensor, Scheme
from octoc.quantize import encode
from octoc.quantize.rotate import rewrite, rotatable
from tests.stories import stories, story_loss, trained_stories

# Kind of scheme, and groups of the layers that do not have 32.
METHODS: dict[str, tuple[str, dict[str, int]]] = {
    "minmax": ("affine", {"w2": 43}),
    "rtn": ("affine", {"w2": 43}),
    "hqq": ("asymmetric", {"w2": 86, "w1": 64}),
    "higgs": ("codebook", {"w2": 86, "wo": 64}),
}


def compress(model: Model, method: str, bits: int) -> Compressed:
    """The blocks' linear layers encoded, their inputs rotated for HIGGS."""
    names = [name for name in rotatable(model) if name.startswith("blocks.")]
    if method == "higgs":
        model = rewrite(model, names)
    kind, groups = METHODS[method]
    coded: dict[str, QTensor] = {}
    for name in names:
        scheme = Scheme(kind, bits, "group", groups.get(name.split(".")[-2], 32))
        coded[name] = encode(model.tensors[name].numpy(), scheme, 0, dtype="float16", method=method)
    return Compressed(model, coded)


def bits_in_all(small: Compressed, before: Model) -> float:
    """Bits a weight of codes, scales, zero points, tables and constants that the graph gained."""
    gained = sum(4 * tensor.numel() for name, tensor in small.model.tensors.items() if name not in before.tensors)
    weights = sum(before.tensors[name].numel() for name in small.qtensors)
    return 8 * (sum(tensor.nbytes for tensor in small.qtensors.values()) + gained) / weights


def loss(model: Model, tokens: Array) -> float:
    """Mean cross entropy a token, ten stories at a time."""
    parts = torch.from_numpy(tokens.clip(0)).split(10)
    return story_loss(torch.cat([model.run(part)[0] for part in parts]), tokens)


def main() -> None:
    require_assets()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    given = parser.parse_args()
    tokens = stories(0, given.stories)
    model = load_model(trained_stories(), examples=(torch.zeros(2, tokens.shape[1], dtype=torch.int64),))
    print(f"float32: loss {loss(model, tokens):.3f}", flush=True)
    for bits in given.bits:
        for method in METHODS:
            small = compress(model, method, bits)
            found = loss(small.decoded, tokens)
            print(f"{bits} bits, {method:7} {bits_in_all(small, model):.3f} bits in all, loss {found:.3f}", flush=True)


if __name__ == "__main__":
    main()
