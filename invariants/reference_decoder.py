"""The decoder's oracle: one request by itself, its prompt in one piece, its cache one contiguous array.

It reads the definition, the weights and the tables of `paged_attention.decoder_spec`, as values, and shares no code
with what it judges. Everything is int64 (products of matrices float64, whose 53 bits hold them), so that nothing can
overflow where the device's int32 would; sampling is done in Python's own integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Float32, Int8, Int64
from numpy import ndarray

from paged_attention import decoder_spec, fingerprint
from paged_attention.decoder_spec import DecoderSpec, LayerWeights, Weights
from paged_attention.plan import EOS_TOKEN, Request


@dataclass(frozen=True, slots=True)
class Written:
    """What a request by itself yields and leaves in its cache, up to its last token or its EOS."""

    tokens: tuple[int, ...]
    """Generated ones, in order; the last may be an EOS."""
    kv: Int8[ndarray, "positions layers 2 kv_heads head_dim"]
    """K and V of every position that is fed: all but that of the last token."""
    digests: tuple[int, ...]
    """`fingerprint.logits_digest` of the logits that each token was drawn from."""


class ReferenceDecoder:
    """Runs requests one at a time."""

    def __init__(self, spec: DecoderSpec) -> None:
        self.spec = spec
        self._weights = decoder_spec.make_weights(spec)

    def run(self, request: Request, max_tokens: int) -> Written:
        """Feed the prompt, then one token after another, until `max_tokens` are drawn or an EOS ends it."""
        length = len(request.prompt) + max_tokens - 1
        cache = np.zeros((length, self.spec.layers, 2, self.spec.kv_heads, self.spec.head_dim), np.int64)
        fed = request.prompt.astype(np.int64)
        start = 0
        tokens: list[int] = []
        digests: list[int] = []
        while True:
            logits = self.forward(fed, start, cache)
            start += len(fed)
            tokens.append(draw(logits, request.temperature, request.top_p, request.seed, start))
            digests.append(int(fingerprint.logits_digest(logits)))
            if len(tokens) == max_tokens or tokens[-1] == EOS_TOKEN:
                return Written(tuple(tokens), cache[:start].astype(np.int8), tuple(digests))
            fed = np.array(tokens[-1:], np.int64)

    def forward(
        self,
        tokens: Int64[ndarray, " fed"],
        start: int,
        cache: Int64[ndarray, "positions layers 2 kv_heads head_dim"],
    ) -> Float32[ndarray, " vocab"]:
        """The logits behind the last of `tokens`, which stand at `start` and on; their K and V go into the cache."""
        position = np.arange(start, start + len(tokens))
        x = self._weights.embedding[tokens].astype(np.int64)
        for nth, layer in enumerate(self._weights.layers):
            mixed = self._attention(layer, _normed(x, layer.attention_gain), position, cache[:, nth])
            x = _within(x + (_product(mixed, layer.output) >> self.spec.output_shift), decoder_spec.RESIDUAL_LIMIT)
            n = _normed(x, layer.mlp_gain)
            gate, up = (_product(n, matrix) >> 5 for matrix in (layer.gate, layer.up))
            opened = decoder_spec.SILU.astype(np.int64)[_clamped(gate, -128, 127) + 128] * up >> 4
            x = _within(x + (_product(opened, layer.down) >> 6), decoder_spec.RESIDUAL_LIMIT)
        logits = _product(_normed(x[-1:], self._weights.final_gain), self._weights.unembedding)[0]
        if not self.spec.eos:
            logits[EOS_TOKEN] = decoder_spec.NO_EOS_LOGIT
        return (logits * decoder_spec.LOGIT_SCALE).astype(np.float32)

    def _attention(
        self,
        layer: LayerWeights,
        n: Int64[ndarray, "fed hidden"],
        position: Int64[ndarray, " fed"],
        cache: Int64[ndarray, "positions 2 kv_heads head_dim"],
    ) -> Int64[ndarray, "fed features"]:
        spec, limit = self.spec, decoder_spec.KV_LIMIT
        query, key, value = (
            _within(_product(n, matrix) >> 5, limit).reshape(len(n), -1, spec.head_dim)
            for matrix in (layer.query, layer.key, layer.value)
        )
        cache[position, 0] = _within(_turned(key, position, self._weights), limit)
        cache[position, 1] = value
        query = _within(_turned(query, position, self._weights), limit)
        mixed = np.empty_like(query)
        keys, values = cache[: position[-1] + 1, 0], cache[: position[-1] + 1, 1]
        later = np.arange(len(keys)) > position[:, None]
        for head in range(spec.query_heads):
            shared = head * spec.kv_heads // spec.query_heads
            score = _product(query[:, head], keys[:, shared].T) >> spec.score_shift
            score[later] = np.iinfo(np.int64).min // 2
            below = np.minimum(score.max(axis=1, keepdims=True) - score, len(decoder_spec.WEIGHT) - 1)
            weight = decoder_spec.WEIGHT.astype(np.int64)[below]
            weight[later] = 0
            mixed[:, head] = 16 * _product(weight, values[:, shared]) // weight.sum(axis=1, keepdims=True)
        return mixed.reshape(len(n), -1)


def draw(logits: Float32[ndarray, " vocab"], temperature: float, top_p: float, seed: int, position: int) -> int:
    """The token that `seed` draws at `position`, token by token in whole numbers.

    A weight is 2 ** -(h / 2 ** 16) where h counts 2**-16ths of a halving, from 16-bit tables of 2 ** -(i / 2 ** 8) and
    2 ** -(j / 2 ** 16). All weights of a row are shifted until they sum up to less than 2 ** 31. Temperatures above 0
    count as at least 1e-6.
    """
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if temperature == 0:
        return ranked[0]
    slope = np.float32(2**16 / np.log(2)) / np.float32(max(temperature, 1e-6))
    best = logits[ranked[0]]
    weights = [_power(int(min((best - logits[token]) * slope, np.float32(2**21)))) for token in ranked]
    bits = (sum(weight >> 18 for weight in weights) + len(weights)).bit_length()
    weights = [weight >> max(bits - 13, 0) for weight in weights]
    enough = sum(weights)
    if np.float32(top_p) < 1:
        enough = int(Fraction(float(np.float32(top_p))) * 2**24) * enough >> 24
    kept: list[int] = []
    for weight in weights:
        if kept and (sum(kept) >= enough or not weight):
            break
        kept.append(weight)
    target = int(_uniform(seed, position) * sum(kept)) >> 24
    for token, weight in zip(ranked, kept, strict=False):
        if target < weight:
            return token
        target -= weight
    return ranked[len(kept) - 1]


def _power(halvings: int) -> int:
    """2 ** -(halvings / 2 ** 16) in 2**-32ths."""
    coarse, fine = halvings // 256 % 256, halvings % 256
    factors = [min(round(2**16 * 2 ** (-part)), 2**16 - 1) for part in (coarse / 2**8, fine / 2**16)]
    return factors[0] * factors[1] >> (halvings // 2**16)


def _uniform(seed: int, position: int) -> int:
    """24 random bits of (seed, position)."""
    golden = fingerprint.GOLDEN
    mixed = _mixed((_mixed((seed + golden) % 2**32)) ^ _mixed(position * golden % 2**32))
    return mixed >> 8


def _mixed(x: int) -> int:
    """The lowbias32 finaliser, on Python's integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def _product(a: Int64[ndarray, "..."], b: ndarray) -> Int64[ndarray, "..."]:
    """The matrix product; float64 holds each of its sums exactly, and is much faster."""
    return np.rint(a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)


def _normed(x: Int64[ndarray, "fed hidden"], gain: ndarray) -> Int64[ndarray, "fed hidden"]:
    mean = (x**2).sum(axis=1, keepdims=True) // decoder_spec.HIDDEN
    root = np.sqrt(mean.astype(np.float64)).astype(np.int64)
    return 64 * x // np.maximum(root, 1) * gain >> 6


def _turned(
    vectors: Int64[ndarray, "fed heads head_dim"], position: Int64[ndarray, " fed"], weights: Weights
) -> Int64[ndarray, "fed heads head_dim"]:
    """RoPE."""
    half = vectors.shape[-1] // 2
    cos, sin = (table[position].astype(np.int64)[:, None, :] for table in (weights.cos, weights.sin))
    first, second = vectors[..., :half], vectors[..., half:]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1) >> 7


def _clamped(x: Int64[ndarray, "..."], low: int, high: int) -> Int64[ndarray, "..."]:
    return np.minimum(np.maximum(x, low), high)


def _within(x: Int64[ndarray, "..."], limit: int) -> Int64[ndarray, "..."]:
    return _clamped(x, -limit, limit)
