"""The seam between the simulator and a backend: where the K/V of a planned step is really written and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from jaxtyping import UInt, UInt32
from numpy import ndarray

from paged_attention.decoder_spec import EXACT_DTYPES, DecoderSpec
from paged_attention.plan import CacheBuffers, Evidence, Ints, ModelRows, StepOutcome, StepPlan, WrongPlace

Words = UInt[ndarray, "places layers 2 kv_heads head_dim"]
"""The raw words of each place, in the word dtype of the cache."""


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Shape and dtype of the cache and of the device batch around it."""

    layers: int
    kv_heads: int
    num_pages: int
    """Page 0, the dummy, included."""
    page_size: int
    head_dim: int
    dtype: str
    """A key of paged_attention.fingerprint.WORD_MASK."""
    max_sequence_length: int
    batch_size: int
    prefill_chunk: int
    lag: int = 0
    layout: Literal["heads_first", "pages_first"] = "heads_first"
    writer: str | None = None
    """"module:function" of a user's own write kernel; None: the views' own write methods."""
    quantize: bool = False
    """True: pages are stored as int8 with one scale per token and head (`dtype` is then the input's)."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The model. `echo` and `reader` are scripted; `tiny` is a real decoder (`paged_attention.decoder_spec`).

    `echo` reads nothing; `reader` reads through the device's page table what was written.

    Whenever a row yields a token, the reader reads `lanes` words of the K/V of every position below the row's length:
    one lane each of as many vectors (layer, K or V, head). Which ones moves on from position to position and from step
    to step, so that all vectors have their turn (`backends.words.read_vector` and `read_lane`). A token grows by one
    for each word that is wrong, so that a stale, freed or foreign page at any position changes it.
    """

    kind: Literal["echo", "reader", "tiny"] = "reader"
    vocab_size: int = 32_000
    lanes: int = 1
    """How many words of each position the reader compares, each in another vector."""
    query_heads: int = 0
    """Of the decoder; 0: twice the kv_heads."""
    seed: int = 0
    """Of the decoder's weights."""
    eos: bool = False
    """Whether an EOS that the decoder draws ends an output; if not, it draws none."""

    def decoder(self, cache: CacheSpec) -> DecoderSpec:
        """The decoder over such a cache. ValueError: it would not be exact, or makes no sense."""
        if cache.quantize or cache.dtype not in EXACT_DTYPES:
            what = "a quantised cache" if cache.quantize else f"dtype {cache.dtype!r}"
            raise ValueError(
                f"the decoder's K and V fit without loss into {', '.join(EXACT_DTYPES)} only: found {what}"
            )
        return DecoderSpec(
            layers=cache.layers,
            query_heads=self.query_heads or 2 * cache.kv_heads,
            kv_heads=cache.kv_heads,
            head_dim=cache.head_dim,
            vocab_size=self.vocab_size,
            max_positions=cache.max_sequence_length,
            seed=self.seed,
            eos=self.eos,
        )


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """Where to run: a JAX platform, and the mesh axes with their sizes (empty: one device)."""

    platform: Literal["cpu", "gpu", "tpu"] = "cpu"
    mesh: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, slots=True)
class ProcessShare:
    """Which of several processes this is, where one mesh lies over the devices of all."""

    index: int
    count: int
    coordinator: str
    """host:port at which process 0 listens."""


class BackendUnavailableError(Exception):
    """The asked backend or device is not there; the message lists those that are (exit code 6)."""


class Pending(Protocol):
    """A dispatched step."""

    def result(self) -> StepOutcome:
        """Wait for the step and return what it yielded."""
        ...


class Backend(Protocol):
    """Executes plans in order. Everything it returns is a copy."""

    def open(self, cache: CacheSpec, model: ModelSpec, devices: DeviceSpec) -> None:
        """Make the cache. BackendUnavailableError: the platform or the devices are not there."""
        ...

    def execute(self, plan: StepPlan, rows: ModelRows) -> Pending:
        """Dispatch a step. ValueError: a page id outside the pool; nothing was written then."""
        ...

    def evidence(self, slots: Ints, pages: Ints) -> Evidence | None:
        """What lies on the device now, after every dispatched step. None: this backend holds no cache."""
        ...

    def buffers(self) -> CacheBuffers | None:
        """The arrays that hold the cache after every dispatched step. None: this backend holds no cache."""
        ...

    def verify(
        self, pages: Ints, offsets: Ints, kv_ids: UInt32[ndarray, " places"], limit: int = 8
    ) -> tuple[WrongPlace, ...]:
        """Compare places with the fingerprints of `kv_ids` (0: never written, all words zero); the first wrong ones."""
        ...

    def verify_words(self, pages: Ints, offsets: Ints, words: Words, limit: int = 8) -> tuple[WrongPlace, ...]:
        """The same with the raw words themselves, which K/V that is no fingerprint is compared with."""
        ...

    def poison(self, pages: Ints, how: Literal["nan", "big"]) -> None:
        """Overwrite whole pages with NaN or with a large finite value, in every layer and head."""
        ...

    def describe(self) -> Mapping[str, str]:
        """Name, platform, device kind and versions, for the run record."""
        ...

    def close(self) -> None:
        """Give the cache back."""
        ...
