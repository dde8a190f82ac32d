"""How a request's tokens are drawn: its parameters, and the sampler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np

from paged_attention import pytree
from paged_attention.arrays import put_rows
from paged_attention.pytree import SerializableTree

if TYPE_CHECKING:
    from jax.sharding import Sharding
    from jaxtyping import Int32

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
