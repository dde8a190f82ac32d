"""The small decoder, position by position, for the NumPy backend: the slow obvious reading of its definition."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray
from numpy.typing import NDArray

from paged_attention import decoder_spec
from paged_attention.decoder_spec import DecoderSpec
from paged_attention.plan import EOS_TOKEN

Vectors = Int64[ndarray, "heads head_dim"]
Write = Callable[[int, Vectors, Vectors], None]
"""(layer, K, V): put them where the position lies."""
Read = Callable[[int], tuple[NDArray[np.int64], NDArray[np.int64]]]
"""Layer to K and V of every position up to this one, each (positions, heads, head_dim)."""


class PlainDecoder:
    """One position at a time, in int64."""

    def __init__(self, spec: DecoderSpec) -> None:
        self.spec = spec
        self.weights = decoder_spec.make_weights(spec)

    def logits(self, token: int, position: int, write: Write, read: Read) -> Float32[ndarray, " vocab"]:
        """Feed `token` at `position`; return the logits of the next."""
        spec, weights = self.spec, self.weights
        x = weights.embedding[token].astype(np.int64)
        for nth, layer in enumerate(weights.layers):
            n = self._norm(x, layer.attention_gain)
            query = self._rope(self._heads(n, layer.query), position)
            write(nth, self._rope(self._heads(n, layer.key), position), self._heads(n, layer.value))
            mixed = self._attend(query, *read(nth))
            x = self._bounded(x + ((mixed @ layer.output) >> spec.output_shift))
            n = self._norm(x, layer.mlp_gain)
            gate, up = (n @ layer.gate) >> 5, (n @ layer.up) >> 5
            opened = decoder_spec.SILU[np.clip(gate, -128, 127) + 128]
            x = self._bounded(x + ((((opened * up) >> 4) @ layer.down) >> 6))
        logits = self._norm(x, weights.final_gain) @ weights.unembedding
        if not spec.eos:
            logits[EOS_TOKEN] = decoder_spec.NO_EOS_LOGIT
        return logits.astype(np.float32) * np.float32(decoder_spec.LOGIT_SCALE)

    def _heads(self, n: Int64[ndarray, " hidden"], matrix: ndarray) -> Vectors:
        limit = decoder_spec.KV_LIMIT
        return np.clip((n @ matrix) >> 5, -limit, limit).reshape(-1, self.spec.head_dim)

    def _rope(self, vectors: Vectors, position: int) -> Vectors:
        cos, sin = self.weights.cos[position], self.weights.sin[position]
        half = self.spec.head_dim // 2
        turned = np.empty_like(vectors)
        turned[:, :half] = (vectors[:, :half] * cos - vectors[:, half:] * sin) >> 7
        turned[:, half:] = (vectors[:, :half] * sin + vectors[:, half:] * cos) >> 7
        return np.clip(turned, -decoder_spec.KV_LIMIT, decoder_spec.KV_LIMIT)

    def _attend(
        self, query: Vectors, keys: NDArray[np.int64], values: NDArray[np.int64]
    ) -> Int64[ndarray, " features"]:
        mixed = np.empty_like(query)
        for head, wanted in enumerate(query):
            shared = head // (self.spec.query_heads // self.spec.kv_heads)
            score = (keys[:, shared] @ wanted) >> self.spec.score_shift
            weight = decoder_spec.WEIGHT[np.minimum(score.max() - score, len(decoder_spec.WEIGHT) - 1)].astype(np.int64)
            mixed[head] = 16 * (weight @ values[:, shared]) // weight.sum()
        return mixed.reshape(-1)

    def _norm(self, x: Int64[ndarray, " hidden"], gain: ndarray) -> Int64[ndarray, " hidden"]:
        root = max(isqrt(int(x @ x) // decoder_spec.HIDDEN), 1)
        return ((64 * x // root) * gain) >> 6

    def _bounded(self, x: Int64[ndarray, " hidden"]) -> Int64[ndarray, " hidden"]:
        return np.clip(x, -decoder_spec.RESIDUAL_LIMIT, decoder_spec.RESIDUAL_LIMIT)
