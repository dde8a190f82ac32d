"""The small decoder as a value: its sizes, weights and tables, and the integer arithmetic that defines its output.

A decoder-only transformer (RMS norm, grouped-query attention with RoPE, gated MLP) in whole numbers: sums of integers
depend on no order, shape or backend, so that its tokens and its K/V bits are exact. `//` and `>>` round down.

    norm(x, gain)   ((64 * x // max(isqrt(sum(x * x) // HIDDEN), 1)) * gain) >> 6
    rope(v, p)      halves (a, b) of a head turn into (a * cos[p] - b * sin[p]) >> 7, (a * sin[p] + b * cos[p]) >> 7

    x = embedding[token]
    in each layer, with n = norm(x, attention_gain):
        q, k, v = clip((n @ query, key, value) >> 5);  q, k = clip(rope(q, k))           clip: to +-KV_LIMIT
        score   = (q . k) >> score_shift, for each earlier position and the row's own
        mixed   = 16 * sum(w * v) // sum(w), where w = WEIGHT[min(highest score - score, len(WEIGHT) - 1)]
        x       = bounded(x + ((mixed @ output) >> output_shift))                        bounded: to +-RESIDUAL_LIMIT
    and then, with n = norm(x, mlp_gain):
        g, u    = (n @ gate) >> 5, (n @ up) >> 5
        x       = bounded(x + ((((SILU[clip(g, -128, 127) + 128] * u) >> 4) @ down) >> 6))
    logits = (norm(x, final_gain) @ unembedding) * LOGIT_SCALE

Query head h reads K and V of head h // (query_heads // kv_heads). Every sum stays below 2**31 (the largest is that of
attention: 255 * 127 * 16 * MAX_POSITIONS), every logit below 2**24 before it is scaled, so int32 and float32 are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Int32

from paged_attention.fingerprint import GOLDEN, mix32

HIDDEN: Final = 32
"""Width of the residual stream."""
GATED: Final = 64
"""Width of the MLP."""
KV_LIMIT: Final = 127
"""Largest magnitude in Q, K and V: 7 bits, which bfloat16, float16, float32 and int8 hold without loss."""
RESIDUAL_LIMIT: Final = 4095
LOGIT_SCALE: Final = 2.0**-9
"""Makes logits of a few units."""
MAX_POSITIONS: Final = 4096
MAX_VOCAB: Final = 1024
EXACT_DTYPES: Final = ("bfloat16", "float16", "float32", "int8")
"""Cache dtypes that hold every K and V without loss."""
NO_EOS_LOGIT: Final = -(2**22)
"""What EOS has before scaling where no EOS may end an output: it is never drawn."""

WEIGHT: Final = np.round(255 * np.exp(-np.arange(101) / 16)).astype(np.int32)
"""exp of a negative difference of scores, in 16ths; the last one is 0."""
SILU: Final = np.round(np.arange(-128, 128) / (1 + np.exp(-np.arange(-128, 128) / 16))).astype(np.int32)
"""x * sigmoid(x), in 16ths."""


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """The sizes of a decoder, and the seed of its weights. ValueError: it would not be exact, or makes no sense."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    seed: int = 0
    eos: bool = False
    """Whether an EOS (token 0) that is drawn ends an output; if not, it is never drawn."""

    def __post_init__(self) -> None:
        if self.query_heads % self.kv_heads:
            raise ValueError(f"{self.query_heads} query heads cannot share {self.kv_heads} kv_heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"RoPE turns pairs of lanes: head_dim must be even, found {self.head_dim}")
        if self.vocab_size > MAX_VOCAB:
            raise ValueError(f"the small decoder knows at most {MAX_VOCAB} tokens: found vocab_size {self.vocab_size}")
        if self.max_positions > MAX_POSITIONS:
            raise ValueError(
                f"attention of the small decoder is exact up to {MAX_POSITIONS} positions: found {self.max_positions}"
            )

    @property
    def score_shift(self) -> int:
        """Brings the product of two heads to 16ths of a natural exponent."""
        return 6 + self.head_dim.bit_length() // 2

    @property
    def output_shift(self) -> int:
        """Brings what attention adds to the size of an embedding."""
        return 5 + (self.query_heads * self.head_dim).bit_length() // 2


class LayerWeights(NamedTuple):
    """One layer; matrices are (inputs, outputs)."""

    attention_gain: Int32[np.ndarray, " hidden"]
    query: Int32[np.ndarray, "hidden query_features"]
    key: Int32[np.ndarray, "hidden kv_features"]
    value: Int32[np.ndarray, "hidden kv_features"]
    output: Int32[np.ndarray, "query_features hidden"]
    mlp_gain: Int32[np.ndarray, " hidden"]
    gate: Int32[np.ndarray, "hidden gated"]
    up: Int32[np.ndarray, "hidden gated"]
    down: Int32[np.ndarray, "gated hidden"]


class Weights(NamedTuple):
    """All of them, and the RoPE tables, in 128ths."""

    embedding: Int32[np.ndarray, "vocab hidden"]
    layers: tuple[LayerWeights, ...]
    final_gain: Int32[np.ndarray, " hidden"]
    unembedding: Int32[np.ndarray, "hidden vocab"]
    cos: Int32[np.ndarray, "positions half_head_dim"]
    sin: Int32[np.ndarray, "positions half_head_dim"]


def make_weights(spec: DecoderSpec) -> Weights:
    """Weights drawn by hashing: matrices in -7..7, embeddings in -127..127, gains in 48..80 (64 is one)."""
    arrays = 0

    def draw(shape: tuple[int, ...], low: int, high: int) -> Int32[np.ndarray, "..."]:
        nonlocal arrays
        arrays += 1
        stream = mix32(mix32(np.array([arrays], np.uint32)) ^ np.uint32(spec.seed & 0xFFFFFFFF))
        count = np.arange(int(np.prod(shape)), dtype=np.uint32)
        mixed = mix32(stream + count * np.uint32(GOLDEN))
        return (low + (mixed % np.uint32(high - low + 1)).astype(np.int32)).reshape(shape)

    def matrix(inputs: int, outputs: int) -> Int32[np.ndarray, "inputs outputs"]:
        return draw((inputs, outputs), -7, 7)

    def gain() -> Int32[np.ndarray, " hidden"]:
        return draw((HIDDEN,), 48, 80)

    query, kv = spec.query_heads * spec.head_dim, spec.kv_heads * spec.head_dim
    embedding = draw((spec.vocab_size, HIDDEN), -127, 127)
    layers = tuple(
        LayerWeights(
            attention_gain=gain(),
            query=matrix(HIDDEN, query),
            key=matrix(HIDDEN, kv),
            value=matrix(HIDDEN, kv),
            output=matrix(query, HIDDEN),
            mlp_gain=gain(),
            gate=matrix(HIDDEN, GATED),
            up=matrix(HIDDEN, GATED),
            down=matrix(GATED, HIDDEN),
        )
        for _ in range(spec.layers)
    )
    turns = np.arange(spec.max_positions)[:, None] * 10_000.0 ** (-np.arange(spec.head_dim // 2) / (spec.head_dim / 2))
    cos, sin = (np.round(128 * part).astype(np.int32) for part in (np.cos(turns), np.sin(turns)))
    return Weights(embedding, layers, gain(), matrix(HIDDEN, spec.vocab_size), cos, sin)
