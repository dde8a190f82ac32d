"""How a request's tokens are drawn: its parameters, and the sampler."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
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

LEAST_TEMPERATURE = 1e-6
"""Temperatures above 0 count as at least this."""


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

    Equal logits give equal tokens on every backend: behind one correctly rounded quotient and one product per token all
    arithmetic is that of integers (see `_weights`), whose sums depend on no order.
    """
    xp = array_module(logits)
    top_p, temperature = xp.asarray(params.top_p)[:, None], xp.asarray(params.temperature)[:, None]
    logits = logits.astype(xp.float32)
    order = xp.argsort(-logits, axis=1, stable=True)
    ranked = xp.take_along_axis(logits, order, axis=1)
    weight = _weights(ranked[:, :1] - ranked, xp.where(temperature > 0, temperature, 1), xp)
    reached = xp.cumsum(weight, axis=1, dtype=xp.uint32)
    before = reached - weight
    threshold = _share(xp.clip(top_p, 0, 1 - 2**-24), reached[:, -1:], xp)
    kept = ((before < threshold) | (top_p >= 1)) & (weight > 0)
    last = xp.maximum(kept.sum(axis=1, keepdims=True) - 1, 0)
    target = _share(uniform(params.seed, positions)[:, None], xp.take_along_axis(reached, last, axis=1), xp)
    drawn = xp.minimum((reached <= target).sum(axis=1, keepdims=True), last)
    rank = xp.where(temperature > 0, drawn, 0)
    return xp.take_along_axis(order, rank, axis=1)[:, 0].astype(xp.int32)


_COARSE = np.round(2.0**16 * 2.0 ** (-np.arange(256) / 2**8)).clip(max=2**16 - 1).astype(np.uint32)
_FINE = np.round(2.0**16 * 2.0 ** (-np.arange(256) / 2**16)).clip(max=2**16 - 1).astype(np.uint32)

_POWERS = np.uint32(2) ** np.arange(13, 32, dtype=np.uint32)


def _weights(below: Any, temperature: Any, xp: ModuleType) -> Any:
    """exp(-below / temperature) as uint32 of a scale common to each row, whose sum stays below 2**31.

    A power of two: `halvings` counts 2**-16ths of its exponent, whose upper bits shift and whose lower 16 look up two
    tables of 8 bits each. Off by less than 5 parts in 100,000; each row takes the largest scale that fits.
    """
    # Bounded, since 0 * inf is no number.
    slope = xp.float32(2**16 / np.log(2)) / xp.maximum(temperature, xp.float32(LEAST_TEMPERATURE))
    halvings = xp.minimum(below * slope, 2.0**21).astype(xp.uint32)
    part = xp.asarray(_COARSE)[(halvings >> xp.uint32(8)) & xp.uint32(0xFF)]
    part = part * xp.asarray(_FINE)[halvings & xp.uint32(0xFF)]
    shift = halvings >> xp.uint32(16)
    weight = xp.where(shift < 32, part >> xp.minimum(shift, xp.uint32(31)), xp.uint32(0))
    # The sum is less than 2**18 times this one, which fits for vocabularies of up to 2**17 tokens.
    upper = xp.sum(weight >> xp.uint32(18), axis=1, keepdims=True, dtype=xp.uint32) + xp.uint32(weight.shape[1])
    scale = (upper >= _POWERS).sum(axis=1, keepdims=True).astype(xp.uint32)
    return weight >> scale


def _share(fraction: Any, whole: Any, xp: ModuleType) -> Any:
    """floor(fraction * whole) of uint32, for fractions in [0, 1) of 24 bits: the upper half of a 64-bit product."""
    a = (fraction * xp.float32(2**24)).astype(xp.uint32) << xp.uint32(8)
    half, low = xp.uint32(16), xp.uint32(0xFFFF)
    first = (a >> half) * (whole & low) + ((a & low) * (whole & low) >> half)
    second = (a & low) * (whole >> half) + (first & low)
    return (a >> half) * (whole >> half) + (first >> half) + (second >> half)


def uniform(seed: Any, position: Any) -> Float[Array, " rows"]:
    """A float32 in [0, 1) for each (seed, position): the upper 24 bits of a hash of both."""
    xp = array_module(seed, position)
    mixed = mix32(xp.asarray(seed).astype(xp.uint32) + xp.uint32(GOLDEN), xp)
    mixed = mix32(mixed ^ mix32(xp.asarray(position).astype(xp.uint32) * xp.uint32(GOLDEN), xp), xp)
    return (mixed >> xp.uint32(8)).astype(xp.float32) * xp.float32(2**-24)
