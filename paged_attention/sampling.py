"""How a request's tokens are drawn: its parameters, and the sampler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from paged_attention import pytree
from paged_attention.arrays import array_module, put_rows
from paged_attention.fingerprint import GOLDEN, mix32
from paged_attention.pytree import SerializableTree

if TYPE_CHECKING:
    from jax.sharding import Sharding
    from jaxtyping import Float, Int32

    from paged_attention.arrays import Array
    from paged_attention.batch import ActiveSequenceBatch
    from paged_attention.metadata import PagedAttentionCacheMetaData
    from paged_attention.requests import GenerationStepTask

DEFAULTS = {"top_p": 1.0, "max_tokens": 32, "temperature": 0.0, "seed": 0}
DTYPES = {"top_p": np.float32, "max_tokens": np.int32, "temperature": np.float32, "seed": np.uint32}


@dataclass(eq=False)
class SamplingParams(SerializableTree):
    """How tokens are drawn: scalars for one request, arrays of width batch_size for a decode batch.

    top_p         float32; the smallest set of tokens with at least this probability is drawn from; 1.0: all of them
    max_tokens    int32; tokens to generate, the first included
    temperature   float32; 0.0: the likeliest token
    seed          uint32; with the position it decides what is drawn
    """

    tree_leaves: ClassVar[tuple[str, ...]] = ("top_p", "max_tokens", "temperature", "seed")

    top_p: Array | float = field(default_factory=lambda: DEFAULTS["top_p"])
    max_tokens: Array | int = field(default_factory=lambda: cast("int", DEFAULTS["max_tokens"]))
    temperature: Array | float = field(default_factory=lambda: DEFAULTS["temperature"])
    seed: Array | int = field(default_factory=lambda: cast("int", DEFAULTS["seed"]))

    @classmethod
    def init_empty(cls) -> SamplingParams:
        """A placeholder: the defaults as arrays of shape ()."""
        return cls(**{name: np.array(DEFAULTS[name], DTYPES[name]) for name in cls.tree_leaves})

    @classmethod
    def init_numpy(cls, metadata: PagedAttentionCacheMetaData) -> SamplingParams:
        """The defaults for every slot, as NumPy arrays of width batch_size."""
        return cls(**{name: np.full(metadata.batch_size, DEFAULTS[name], DTYPES[name]) for name in cls.tree_leaves})

    @classmethod
    def init_jax(cls, metadata: PagedAttentionCacheMetaData, sharding: Sharding) -> SamplingParams:
        """The defaults for every slot, as JAX arrays of width batch_size under `sharding`."""
        import jax

        pytree.register()
        return jax.device_put(cls.init_numpy(metadata), sharding)

    def insert_decode_state(self, insert_slots: Int32[Array, " rows"], update: ActiveSequenceBatch) -> SamplingParams:
        """New parameters: row i of `update` at slot insert_slots[i]; slots past the end are dropped."""
        source = update.sampling_params
        return SamplingParams(
            **{n: put_rows(getattr(self, n), insert_slots, getattr(source, n)) for n in self.tree_leaves}
        )

    def insert_from_task(self, slot: int, task: GenerationStepTask) -> None:
        """Write the task's parameters into row `slot`, in place (NumPy arrays only)."""
        for name in self.tree_leaves:
            getattr(self, name)[slot] = getattr(task.sampling_params, name)


def sample(
    logits: Float[Array, "rows vocab"], params: SamplingParams, positions: Int32[Array, " rows"]
) -> Int32[Array, " rows"]:
    """Draw one token per row from the whole vocabulary; under `jax.jit` for JAX arrays, at once for NumPy ones.

    Temperature 0 takes the likeliest token. Otherwise one is drawn from the smallest set of likeliest tokens whose
    probability reaches top_p (the token that crosses it included), by inverting the cumulative distribution at a number
    that depends on (seed, position) alone; `positions` is where each sampled token will stand.
    """
    xp = array_module(logits)
    top_p, temperature = xp.asarray(params.top_p)[:, None], xp.asarray(params.temperature)[:, None]
    logits = logits.astype(xp.float32)
    order = xp.argsort(-logits, axis=1, stable=True)
    ranked = xp.take_along_axis(logits, order, axis=1)
    weight = xp.exp((ranked - ranked[:, :1]) / xp.where(temperature > 0, temperature, 1))
    probability = weight / weight.sum(axis=1, keepdims=True)
    reached = xp.cumsum(probability, axis=1)
    before = xp.concatenate([xp.zeros_like(reached[:, :1]), reached[:, :-1]], axis=1)
    # Rounding may bring the sum to 1 before the last token: top_p 1 leaves out nothing that has a probability.
    kept = ((before < top_p) | (top_p >= 1)) & (probability > 0)
    last = xp.maximum(kept.sum(axis=1, keepdims=True) - 1, 0)
    target = uniform(params.seed, positions)[:, None] * xp.take_along_axis(reached, last, axis=1)
    drawn = xp.minimum((reached <= target).sum(axis=1, keepdims=True), last)
    rank = xp.where(temperature > 0, drawn, 0)
    return xp.take_along_axis(order, rank, axis=1)[:, 0].astype(xp.int32)


def uniform(seed: Any, position: Any) -> Float[Array, " rows"]:
    """A float32 in [0, 1) for each (seed, position): the upper 24 bits of a hash of both."""
    xp = array_module(seed, position)
    mixed = mix32(xp.asarray(seed).astype(xp.uint32) + xp.uint32(GOLDEN), xp)
    mixed = mix32(mixed ^ mix32(xp.asarray(position).astype(xp.uint32) * xp.uint32(GOLDEN), xp), xp)
    return (mixed >> xp.uint32(8)).astype(xp.float32) * xp.float32(2**-24)
