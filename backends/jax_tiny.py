"""The small decoder on the device: writes K/V of each layer into its pages, attends through the page table, samples.

The arithmetic is that of `paged_attention.decoder_spec`, in int32 throughout: the same bits on every backend.
"""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from backends.jax_step import Fed, PagedModel, Pools, RowFacts, Sampled, parts_of
from paged_attention.cache import PagedAttentionCacheView
from paged_attention.decoder_spec import (
    HIDDEN,
    KV_LIMIT,
    LOGIT_SCALE,
    NO_EOS_LOGIT,
    RESIDUAL_LIMIT,
    SILU,
    WEIGHT,
    DecoderSpec,
    LayerWeights,
    Weights,
    make_weights,
)
from paged_attention.fingerprint import logits_digest
from paged_attention.model_io import PagedAttentionMetadata, sampled_positions, sampled_rows
from paged_attention.plan import EOS_TOKEN, UNKNOWN_TOKEN
from paged_attention.sampling import sample

_HIDDEN_PLACE = -(2**30)
"""The score of what a row must not see."""


@dataclass(frozen=True)
class DecoderModel(PagedModel):
    """A decoder-only transformer over the pages."""

    spec: DecoderSpec = field(init=False)
    weights: Weights = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "spec", self.model.decoder(self.cache))
        object.__setattr__(self, "weights", make_weights(self.spec))

    def step(self, pools: Pools, attn_meta: PagedAttentionMetadata, facts: RowFacts, fed: Fed) -> tuple[Pools, Sampled]:
        """See PagedModel."""
        prefill, decodes = parts_of(attn_meta)
        views = self.views(pools)
        x = jnp.asarray(self.weights.embedding)[jnp.clip(fed.token, 0, self.spec.vocab_size - 1)]
        for layer, weights in enumerate(self.weights.layers):
            views[layer], mixed = self._attention(views[layer], weights, x, prefill, decodes)
            x = _bounded(x + ((mixed @ weights.output) >> self.spec.output_shift))
            n = _norm(x, weights.mlp_gain)
            opened = jnp.asarray(SILU)[jnp.clip((n @ weights.gate) >> 5, -128, 127) + 128]
            x = _bounded(x + ((((opened * ((n @ weights.up) >> 5)) >> 4) @ weights.down) >> 6))
        logits = self._logits(x[sampled_rows(attn_meta)])
        return tuple(jax.tree.leaves(views)), self._sample(
            logits, jnp.asarray(sampled_positions(attn_meta)), facts, fed
        )

    def _attention(
        self, view: PagedAttentionCacheView, weights: LayerWeights, x: Int32[Array, "tokens hidden"], *parts: Any
    ) -> tuple[PagedAttentionCacheView, Int32[Array, "tokens query_features"]]:
        """Write K and V of all rows of a layer, part by part, and only then read."""
        prefill, decodes = parts
        n = _norm(x, weights.attention_gain)
        query, key, value = (
            jnp.clip((n @ matrix) >> 5, -KV_LIMIT, KV_LIMIT).reshape(len(x), -1, self.spec.head_dim)
            for matrix in (weights.query, weights.key, weights.value)
        )
        chunk = 0 if prefill is None else prefill.prefill_position.shape[0]
        place = _positions(prefill, decodes)
        query, key = self._rope(query, place), self._rope(key, place)
        if decodes is not None:
            view = self.writer(view, self._stored(key[chunk:]), self._stored(value[chunk:]), decodes)
        if prefill is not None:
            view = self.writer(view, self._stored(key[:chunk]), self._stored(value[:chunk]), prefill)
        mixed: list[Any] = []
        if prefill is not None:
            table = prefill.prefill_page_table[None, : self.metadata.num_pages_per_sequence]
            mixed.append(self._attend(view, query[None, :chunk], table, place[None, :chunk]))
        if decodes is not None:
            mixed.append(self._attend(view, query[chunk:, None], decodes.decodes_page_table, place[chunk:, None]))
        return view, jnp.concatenate([part.reshape(-1, self.spec.query_heads * self.spec.head_dim) for part in mixed])

    def _stored(self, vectors: Int32[Array, "tokens kv_heads head_dim"]) -> Any:
        return vectors.astype(jnp.float32).astype(jnp.dtype(self.cache.dtype))

    def _rope(self, vectors: Int32[Array, "tokens heads head_dim"], position: Int32[Array, " tokens"]) -> Any:
        place = jnp.clip(position, 0, self.spec.max_positions - 1)
        cos, sin = (jnp.asarray(table)[place][:, None] for table in (self.weights.cos, self.weights.sin))
        a, b = jnp.split(vectors, 2, axis=-1)
        turned = jnp.concatenate([(a * cos - b * sin) >> 7, (a * sin + b * cos) >> 7], axis=-1)
        return jnp.clip(turned, -KV_LIMIT, KV_LIMIT)

    def _attend(
        self,
        view: PagedAttentionCacheView,
        query: Int32[Array, "sequences rows query_heads head_dim"],
        table: Int32[Array, "sequences pages"],
        position: Int32[Array, "sequences rows"],
    ) -> Int32[Array, "sequences rows kv_heads group head_dim"]:
        """Each row reads what its sequence's pages hold at the positions up to its own."""
        sequences, rows, _, head_dim = query.shape
        grouped = query.reshape(sequences, rows, self.spec.kv_heads, -1, head_dim)
        key, value = (self._read(pages, table) for pages in (view.key_pages, view.value_pages))
        score = jnp.einsum("srkgd,slkd->srkgl", grouped, key) >> self.spec.score_shift
        seen = (jnp.arange(key.shape[1]) <= position[..., None])[:, :, None, None]
        score = jnp.where(seen, score, _HIDDEN_PLACE)
        below = jnp.minimum(score.max(axis=-1, keepdims=True) - score, len(WEIGHT) - 1)
        weight = jnp.where(seen, jnp.asarray(WEIGHT)[below], 0)
        # A padding row sees nothing.
        total = jnp.maximum(weight.sum(axis=-1), 1)[..., None]
        return 16 * jnp.einsum("srkgl,slkd->srkgd", weight, value) // total

    def _read(self, pages: Any, table: Int32[Array, "sequences pages"]) -> Int32[Array, "sequences places heads dim"]:
        """Every place of each sequence's pages, as whole numbers."""
        size = self.cache.page_size
        page, offset = jnp.repeat(table, size, axis=1), jnp.tile(jnp.arange(size), table.shape[1])
        index = self.layout.index(page.reshape(-1), jnp.tile(offset, table.shape[0]))
        held = self.layout.to_tokens(pages[index]).astype(jnp.float32).astype(jnp.int32)
        return held.reshape(table.shape[0], -1, self.spec.kv_heads, self.spec.head_dim)

    def _logits(self, x: Int32[Array, "rows hidden"]) -> Any:
        logits = _norm(x, self.weights.final_gain) @ self.weights.unembedding
        if not self.spec.eos:
            logits = logits.at[:, EOS_TOKEN].set(NO_EOS_LOGIT)
        return logits.astype(jnp.float32) * jnp.float32(LOGIT_SCALE)

    def _sample(self, logits: Any, position: Int32[Array, " rows"], facts: RowFacts, fed: Fed) -> Sampled:
        yields: Bool[Array, " rows"] = facts.samples & (position > 0)
        drawn = sample(logits, fed.params, position)
        token = jnp.where(yields, drawn, UNKNOWN_TOKEN)
        return Sampled(token, token == EOS_TOKEN, jnp.where(yields, logits_digest(logits, jnp), 0))


def _positions(prefill: Any, decodes: Any) -> Int32[Array, " tokens"]:
    """Of every row [prefill chunk][decodes]."""
    rows = [] if prefill is None else [prefill.prefill_position]
    return jnp.concatenate(rows if decodes is None else [*rows, decodes.decodes_position])


def _norm(x: Int32[Array, "tokens hidden"], gain: Any) -> Int32[Array, "tokens hidden"]:
    root = jnp.maximum(_isqrt((x * x).sum(axis=-1, keepdims=True) // HIDDEN), 1)
    return ((64 * x // root) * gain) >> 6


def _isqrt(square: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """The whole part of the square root of numbers below 2**24: wherever that of float32 rounds to, it is set right."""
    root = jnp.sqrt(square.astype(jnp.float32)).astype(jnp.int32)
    root -= root * root > square
    return root + ((root + 1) * (root + 1) <= square)


def _bounded(x: Int32[Array, "tokens hidden"]) -> Int32[Array, "tokens hidden"]:
    return jnp.clip(x, -RESIDUAL_LIMIT, RESIDUAL_LIMIT)
