"""A small trained language model, its tokenizer and its texts (llama2.c's `stories260K`)."""

from __future__ import annotations

import struct

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octoc.qtensor import Array
from tests.networks import asset

BOS = 1
_LENGTH = 512


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class _Attention(nn.Module):
    """Grouped-query attention with interleaved rotary positions."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.size, self.heads, self.kv_heads = width // heads, heads, kv_heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.size, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.size, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = _rotated(self.wq(x).view(batch, length, self.heads, self.size), cos, sin)
        k = _rotated(self.wk(x).view(batch, length, self.kv_heads, self.size), cos, sin)
        v = self.wv(x).view(batch, length, self.kv_heads, self.size)
        shared = self.heads // self.kv_heads
        k, v = (t.repeat_interleave(shared, 2).transpose(1, 2) for t in (k, v))
        scores = q.transpose(1, 2) @ k.transpose(2, 3) / self.size**0.5 + mask
        mixed: Tensor = self.wo((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))
        return mixed


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attention = _Attention(width, heads, kv_heads)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.attention_norm, self.ffn_norm = _Norm(width), _Norm(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        y = self.ffn_norm(x)
        result: Tensor = x + self.w2(F.silu(self.w1(y)) * self.w3(y))
        return result


class Stories(nn.Module):
    """Llama 2's architecture with 260,032 parameters: tokens [batch, length] -> logits [batch, length, 512]."""

    def __init__(
        self, width: int = 64, hidden: int = 172, blocks: int = 5, heads: int = 8, kv_heads: int = 4, words: int = 512
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.ModuleList([_Block(width, hidden, heads, kv_heads) for _ in range(blocks)])
        self.norm = _Norm(width)
        angle = torch.outer(torch.arange(_LENGTH), 10000.0 ** -(torch.arange(0, width // heads, 2) * heads / width))
        self.register_buffer("cos", angle.cos()[:, None], persistent=False)
        self.register_buffer("sin", angle.sin()[:, None], persistent=False)
        mask = torch.full((_LENGTH, _LENGTH), -1e9).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length], self.mask[:length, :length])
        return F.linear(self.norm(x), self.embedding.weight)


def trained_stories() -> Stories:
    """The network with its trained weights."""
    raw = asset("stories260k/stories260K.bin").read_bytes()
    width, hidden, blocks, heads, kv_heads, words, _ = struct.unpack("7i", raw[:28])
    network = Stories(width, hidden, blocks, heads, kv_heads, words)
    floats = np.frombuffer(raw, np.float32, offset=28)
    each = list(network.blocks)
    order = [
        network.embedding,
        *[b.attention_norm for b in each],
        *[layer for name in ("wq", "wk", "wv", "wo") for layer in (getattr(b.attention, name) for b in each)],
        *[b.ffn_norm for b in each],
        *[layer for name in ("w1", "w2", "w3") for layer in (getattr(b, name) for b in each)],
        network.norm,
    ]
    start = 0
    with torch.no_grad():
        for module in order:
            weight = module.weight
            weight.copy_(torch.from_numpy(floats[start : start + weight.numel()].copy()).reshape(weight.shape))
            start += weight.numel()
    return network.eval()


def stories(first: int, count: int, length: int = _LENGTH) -> Array:
    """Tokens [count, length] int64 of some validation stories, BOS first, -1 behind the end of a story."""
    text = asset("stories260k/tinystories_val.txt").read_text()
    starts = text.split("\n\nOnce upon a time")
    blocks = [starts[0], *("Once upon a time" + rest for rest in starts[1:])][first : first + count]
    vocabulary, scores = _vocabulary()
    tokens = np.full((count, length), -1, np.int64)
    for i, block in enumerate(blocks):
        found = [BOS, *_encoded(block.replace("\n\n", "\n").strip(), vocabulary, scores)][:length]
        tokens[i, : len(found)] = found
    return tokens


def _vocabulary() -> tuple[dict[bytes, int], list[float]]:
    raw = asset("stories260k/tok512.bin").read_bytes()
    words: dict[bytes, int] = {}
    scores = []
    place = 4
    while place < len(raw):
        score, size = struct.unpack("fi", raw[place : place + 8])
        words.setdefault(raw[place + 8 : place + 8 + size], len(scores))
        scores.append(score)
        place += 8 + size
    return words, scores


def _encoded(text: str, words: dict[bytes, int], scores: list[float]) -> list[int]:
    """Byte-pair merges, best score first; a character that is no word becomes its bytes."""
    spelled = {index: word for word, index in words.items()}
    tokens: list[int] = []
    for character in " " + text:
        raw = character.encode()
        tokens += [words[raw]] if raw in words else [byte + 3 for byte in raw]
    while True:
        merges = [
            (scores[index], -i, index)
            for i in range(len(tokens) - 1)
            if (index := words.get(spelled.get(tokens[i], b"") + spelled.get(tokens[i + 1], b""))) is not None
        ]
        if not merges:
            return tokens
        _, place, index = max(merges)
        tokens[-place : -place + 2] = [index]


def story_loss(logits: Array | Tensor, tokens: Array) -> float:
    """Mean cross entropy a token, in nats, of logits [count, length, words] against the next tokens."""
    following = torch.from_numpy(tokens[:, 1:])
    loss = F.cross_entropy(torch.as_tensor(logits)[:, :-1].flatten(0, 1).float(), following.flatten(), ignore_index=-1)
    return float(loss)
