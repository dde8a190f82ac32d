"""The oracle: executes the rows of a plan in plain NumPy, slowly and obviously."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int32, UInt32

from backends.fed_tokens import FedTokens
from backends.none import DoneStep
from backends.numpy_tiny import PlainDecoder
from backends.protocol import CacheSpec, DeviceSpec, ModelSpec, Words
from backends.words import (
    KINDS,
    check_places,
    check_plan,
    differing,
    lane_words,
    poison_scale,
    poison_word,
    read_lane,
    read_vector,
    scale_bits,
    stored_dtype,
)
from paged_attention.fingerprint import WORD_MASK, kv_id, logits_digest, salts, token, words
from paged_attention.plan import (
    EOS_TOKEN,
    UNKNOWN_TOKEN,
    CacheBuffers,
    Evidence,
    Ints,
    ModelRows,
    ShardedArray,
    StepOutcome,
    StepPlan,
    WrongPlace,
)
from paged_attention.sampling import SamplingParams, sample


class NumpyBackend:
    """Holds raw words, axes (layers, K|V, heads, pages, page_size, head_dim), and what each slot last ran.

    A slot that did not run in the newest step shows position -1 and an all-dummy row: plans don't say who merely waits.
    """

    def open(self, cache: CacheSpec, model: ModelSpec, devices: DeviceSpec) -> None:
        """Make a cache of zeros; the devices are not looked at. ValueError: the cache's dtypes make no sense."""
        self._cache, self._model = cache, model
        self._dtype = stored_dtype(cache)
        self._salts = salts(cache.layers, cache.kv_heads, cache.head_dim)
        places = (cache.layers, 2, cache.kv_heads, cache.num_pages, cache.page_size)
        self._words = np.zeros((*places, cache.head_dim), WORD_MASK[self._dtype][0])
        self._scales = np.zeros(places if cache.quantize else (0,), np.float32)
        self._num_table_pages = -(-cache.max_sequence_length // cache.page_size)
        self._ended: set[tuple[int, int]] = set()
        self._decoder = PlainDecoder(model.decoder(cache)) if model.kind == "tiny" else None
        self._fed = FedTokens()
        self._clear_slots()

    def execute(self, plan: StepPlan, rows: ModelRows) -> DoneStep:
        """Write all rows, then read. ValueError: a page id outside the pool; nothing was written then."""
        check_plan(plan, self._cache)
        self._clear_slots()
        token, eos = np.full(plan.num_rows, UNKNOWN_TOKEN, np.int32), np.zeros(plan.num_rows, np.int32)
        admissions = list(zip(plan.request.tolist(), plan.admission.tolist(), strict=True))
        alive = [row for row, admission in enumerate(admissions) if admission not in self._ended]
        logits = self._feed(plan, alive) if self._decoder is not None else {}
        for row in alive if self._decoder is None else ():
            self._write(plan, rows, row)
        for row in range(plan.num_rows):
            self._note_slot(plan, row, -1)
        for row in alive:
            end = int(plan.start[row] + plan.count[row])
            if plan.samples[row] and row in logits:
                token[row] = self._draw(logits[row], rows, row, end)
                eos[row] = token[row] == EOS_TOKEN
            elif plan.samples[row]:
                token[row], eos[row] = self._sample(plan, rows, row, end)
            if eos[row]:
                self._ended.add(admissions[row])
            else:
                self._note_slot(plan, row, end)
        token.setflags(write=False)
        eos.setflags(write=False)
        if self._decoder is None:
            return DoneStep(StepOutcome(plan.step, token, eos))
        digests = np.zeros(plan.num_rows, np.uint32)
        for row, found in logits.items():
            digests[row] = logits_digest(found)
        outcome = StepOutcome(plan.step, token, eos, digests)
        self._fed.note(plan, outcome)
        return DoneStep(outcome)

    def _feed(self, plan: StepPlan, alive: list[int]) -> dict[int, Float32[np.ndarray, " vocab"]]:
        """Run the decoder over every position of the rows; the logits behind each row's last one."""
        tokens = np.split(self._fed.tokens(plan), plan.count.cumsum()[:-1])
        return {row: self._feed_row(plan, row, tokens[row]) for row in alive}

    def _feed_row(self, plan: StepPlan, row: int, tokens: Int32[np.ndarray, " fed"]) -> Float32[np.ndarray, " vocab"]:
        assert self._decoder is not None
        pages, size, kind = self._table_row(plan, row), self._cache.page_size, np.dtype(self._cache.dtype)
        logits = np.zeros(0, np.float32)
        for position, fed in enumerate(tokens.tolist(), int(plan.start[row])):
            upto = np.arange(position + 1)
            page, offset = pages[upto // size], upto % size

            def write(layer: int, key: Any, value: Any, page: Any = page, offset: Any = offset) -> None:
                vectors = np.stack([key, value]).astype(np.float32).astype(kind)
                self._words[layer, :, :, page[-1], offset[-1]] = vectors.view(self._words.dtype)

            def read(layer: int, page: Any = page, offset: Any = offset) -> tuple[Any, Any]:
                held = self._words[layer].view(kind)[:, :, page, offset].astype(np.float32).astype(np.int64)
                return held[0].swapaxes(0, 1), held[1].swapaxes(0, 1)

            logits = self._decoder.logits(fed, position, write, read)
        return logits

    def _draw(self, logits: Float32[np.ndarray, " vocab"], rows: ModelRows, row: int, end: int) -> int:
        only = slice(row, row + 1)
        params = SamplingParams(top_p=rows.top_p[only], temperature=rows.temperature[only], seed=rows.token_seed[only])
        return int(sample(logits[None], params, np.array([end], np.int32))[0])

    def _table_row(self, plan: StepPlan, row: int) -> Int32[np.ndarray, " pages"]:
        pages = np.zeros(self._num_table_pages, np.int32)
        pages[: plan.num_pages[row]] = plan.table[row, : plan.num_pages[row]]
        return pages

    def _write(self, plan: StepPlan, rows: ModelRows, row: int) -> None:
        pages = self._table_row(plan, row)
        for position in range(int(plan.start[row]), int(plan.start[row] + plan.count[row])):
            page, offset = pages[position // self._cache.page_size], position % self._cache.page_size
            identity = kv_id(rows.kv_base[row : row + 1], np.array([position]))
            self._words[..., page, offset, :] = words(identity, self._salts, self._dtype)
            if self._cache.quantize:
                self._scales[..., page, offset] = scale_bits(identity, self._salts[..., 0]).view(np.float32)

    def _sample(self, plan: StepPlan, rows: ModelRows, row: int, end: int) -> tuple[int, bool]:
        eos = end == rows.eos_position[row]
        seed = rows.token_seed[row : row + 1]
        scripted = EOS_TOKEN if eos else int(token(seed, np.array([end]), self._model.vocab_size)[0])
        wrong = self._wrong_words(plan, rows, row, end) if self._model.kind == "reader" else 0
        return scripted + wrong, bool(eos)

    def _wrong_words(self, plan: StepPlan, rows: ModelRows, row: int, end: int) -> int:
        position = np.arange(end)
        page, offset = self._table_row(plan, row)[position // self._cache.page_size], position % self._cache.page_size
        identity = kv_id(rows.kv_base[row], position)
        vectors = self._words.reshape(-1, *self._words.shape[3:])
        salts_of = self._salts.reshape(-1, self._cache.head_dim)
        wrong = 0
        for nth in range(self._model.lanes):
            vector = read_vector(position, end, nth, len(vectors))
            lane = read_lane(position, nth, self._cache.head_dim, self._dtype)
            expected = lane_words(identity, salts_of[vector, lane], lane, self._dtype)
            wrong += int(np.count_nonzero(vectors[vector, page, offset, lane] != expected))
        return wrong

    def _clear_slots(self) -> None:
        self._positions = np.full(self._cache.batch_size, -1, np.int32)
        self._rows = np.zeros((self._cache.batch_size, self._num_table_pages), np.int32)

    def _note_slot(self, plan: StepPlan, row: int, position: int) -> None:
        slot = plan.slot[row]
        if slot >= 0:
            self._positions[slot] = position
            self._rows[slot] = self._table_row(plan, row)

    def evidence(self, slots: Ints, pages: Ints) -> Evidence | None:
        """Copies of the slots' state and of the pages' raw words."""
        held = self._words[:, :, :, pages]
        return Evidence(slots, self._positions[slots], self._rows[slots], pages, held[:, 0].copy(), held[:, 1].copy())

    def buffers(self) -> CacheBuffers:
        """The words and the scales, written in place: nothing is ever given away."""
        arrays = [array for array in (self._words, self._scales) if array.size]
        whole = tuple(ShardedArray(array.shape, (tuple((0, size) for size in array.shape),)) for array in arrays)
        return CacheBuffers(len(arrays), sum(array.nbytes for array in arrays), 0, whole)

    def verify(
        self, pages: Ints, offsets: Ints, kv_ids: UInt32[np.ndarray, " places"], limit: int = 8
    ) -> tuple[WrongPlace, ...]:
        """The first wrong places, by place, then layer, K before V, then head."""
        check_places(pages, offsets, self._cache)
        wrong: list[WrongPlace] = []
        for page, offset, identity in zip(pages.tolist(), offsets.tolist(), kv_ids, strict=True):
            found = self._words[:, :, :, page, offset]
            expected = words(identity[None], self._salts, self._dtype)
            if self._cache.quantize:
                bits = self._scales[:, :, :, page, offset].view(np.uint32)
                scale = scale_bits(identity, self._salts[..., 0])
                found = np.concatenate([found, bits[..., None]], axis=-1)
                expected = np.concatenate([expected, scale[..., None]], axis=-1)
            for layer, kind, head in np.argwhere((found != expected).any(axis=-1)).tolist():
                held, wanted = found[layer, kind, head], expected[layer, kind, head]
                wrong.append(
                    WrongPlace(layer, KINDS[kind], head, page, offset, tuple(held.tolist()), tuple(wanted.tolist()))
                )
                if len(wrong) == limit:
                    return tuple(wrong)
        return tuple(wrong)

    def verify_words(self, pages: Ints, offsets: Ints, words: Words, limit: int = 8) -> tuple[WrongPlace, ...]:
        """The first wrong places, in the same order."""
        check_places(pages, offsets, self._cache)
        found = np.moveaxis(self._words[:, :, :, pages, offsets], 3, 0)
        return tuple(differing(found, words, pages, offsets, limit))

    def poison(self, pages: Ints, how: Literal["nan", "big"]) -> None:
        """Overwrite whole pages."""
        self._words[:, :, :, pages] = poison_word(self._dtype, how)
        if self._cache.quantize:
            self._scales[:, :, :, pages] = poison_scale(how)

    def describe(self) -> Mapping[str, str]:
        """Name, platform and NumPy's version."""
        return {"name": "numpy", "platform": "cpu", "device_kind": "numpy", "numpy": np.__version__}

    def close(self) -> None:
        """Give the cache back."""
        del self._words, self._scales
