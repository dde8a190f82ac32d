"""The JAX backend: pages on a device (or sharded over a mesh), written in place, read back on the device."""

# JAX's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import UInt32

from backends import jax_roads as roads
from backends.fed_tokens import FedTokens
from backends.jax_inspect import cache_buffers, first_other, first_wrong, padded, page_words, parts
from backends.jax_probe import PAGES_PER_CALL
from backends.jax_programs import programs_for
from backends.jax_step import Pools
from backends.protocol import CacheSpec, DeviceSpec, ModelSpec, Words
from backends.words import check_plan
from paged_attention.model_io import ModelOutputBatch, batch_of
from paged_attention.plan import CacheBuffers, Evidence, Ints, ModelRows, StepOutcome, StepPlan, WrongPlace
from paged_attention.requests import NextIterationPlan
from paged_attention.step_news import pack

Road = Literal["auto", "rows"]

_NOTHING_YIELDED = ModelOutputBatch.init_empty()


class DispatchedStep(NamedTuple):
    """A step on the device; a part is (rows of the plan, where they stand in the array, the array [token, eos, ..])."""

    step: int
    num_rows: int
    parts: tuple[tuple[Any, Any, Any], ...]
    logits_at: int | None = None
    """Which row of the array has the digests of a decoder's logits."""

    def result(self) -> StepOutcome:
        """Wait for the device and return what the step yielded."""
        rows, places, yielded = self.parts[0]
        wanted = slice(2) if self.logits_at is None else [0, 1, self.logits_at]
        if rows is roads.EVERY_ROW:
            found = np.asarray(yielded)[wanted][:, places]
        else:
            found = np.empty((2 if self.logits_at is None else 3, self.num_rows), np.int32)
            for rows, places, yielded in self.parts:
                found[:, rows] = np.asarray(yielded)[wanted][:, places]
        found.setflags(write=False)
        return StepOutcome(self.step, found[0], found[1], None if self.logits_at is None else found[2].view(np.uint32))


class JaxBackend:
    """Executes plans on a CPU, GPU or TPU, on one device or with the heads sharded over a mesh.

    Plans with `native` go through `build_input`, the views' write methods and `prepare_model_output`, with a decode
    batch that stays on the device; others (and all with road "rows") are executed from their rows. On one CPU device
    `open` makes JAX's client with one thread (`jax_devices.one_thread`), if nobody has made it yet.
    """

    def __init__(self, road: Road = "auto") -> None:
        self._road = road

    @property
    def num_compiled(self) -> int:
        """How many programs of this backend have been compiled so far."""
        return self._programs.num_compiled

    def open(self, cache: CacheSpec, model: ModelSpec, devices: DeviceSpec) -> None:
        """Make the cache and the device batch.

        BackendUnavailableError: the platform or the devices are not there. ValueError: cache, mesh or writer make no
        sense.
        """
        self._cache = cache
        # Programs don't depend on how far the device runs ahead.
        self._programs = programs_for(replace(cache, lag=0), model, devices.platform, tuple(devices.mesh.items()))
        self._pools: Pools = self._programs.new_pools()
        self._state = self._programs.new_state()
        self._prefill_outputs: OrderedDict[int, tuple[str | int, ModelOutputBatch]] = OrderedDict()
        self._last_rows: tuple[StepPlan, ModelRows] | None = None
        self._last_native: tuple[StepPlan, Any, int] | None = None
        """The newest plan of the core's own road, what it yielded, and the length of its padded chunk."""
        self._given: Pools = ()
        """The pools that the newest step was given; deleted, if it took them."""
        self._fed = FedTokens() if model.kind == "tiny" else None

    def execute(self, plan: StepPlan, rows: ModelRows) -> DispatchedStep:
        """Dispatch a step. ValueError: a page id outside the pool; nothing was written then."""
        check_plan(plan, self._cache)
        if plan.native is not None and self._road == "auto":
            return self._execute_native(plan, rows, cast("NextIterationPlan", plan.native))
        return self._execute_rows(plan, rows)

    # The core's own road.

    def _execute_native(self, plan: StepPlan, rows: ModelRows, native: NextIterationPlan) -> DispatchedStep:
        self._last_rows, self._given = None, self._pools
        news = pack(native, self._programs.model.metadata, dict(self._prefill_outputs.values()))
        facts = roads.pack_facts(plan, rows, self._cache.batch_size if native.schedule_decodes else 0)
        step = self._programs.native_step(news.shape)
        self._pools, self._state, prefill_output, yielded = step(
            self._pools, self._state, news.packed, news.held, facts
        )
        self._keep_prefill_output(plan, native, prefill_output)
        self._last_native = plan, yielded, news.shape.chunk_size
        part = (roads.EVERY_ROW, roads.device_rows(plan), yielded)
        return DispatchedStep(plan.step, plan.num_rows, (part,), None if self._fed is None else roads.LOGITS_ROW)

    def _keep_prefill_output(self, plan: StepPlan, native: NextIterationPlan, output: tuple[Any, Any]) -> None:
        """Keep what a prefill yielded for as long as the host may not have seen it when the sequence joins."""
        if native.schedule_prefill and plan.samples[0] and native.prefill_request.id is not None:
            token, position = output
            kept = _NOTHING_YIELDED.replace(prefill_token_id=token, prefill_next_position=position)
            self._prefill_outputs[plan.step] = (native.prefill_request.id, kept)
        while self._prefill_outputs and next(iter(self._prefill_outputs)) < plan.step - self._cache.lag - 1:
            self._prefill_outputs.popitem(last=False)

    # Neutral rows.

    def _execute_rows(self, plan: StepPlan, rows: ModelRows) -> DispatchedStep:
        self._last_rows, self._last_native, self._given = (plan, rows), None, self._pools
        results = [
            (chosen, slice(num_rows), self._rows_step(plan, rows, chosen, num_rows, chunk_tokens))
            for chosen, num_rows, chunk_tokens in roads.groups(plan)
        ]
        step = DispatchedStep(plan.step, plan.num_rows, tuple(results), None if self._fed is None else 2)
        if self._fed is not None:
            # The next step's rows may name tokens that nobody has seen: this road waits for each step.
            self._fed.note(plan, step.result())
        return step

    def _rows_step(self, plan: StepPlan, rows: ModelRows, chosen: Any, num_rows: int, chunk_tokens: int) -> Any:
        num_prefills = int(chunk_tokens > 0)
        num_decodes, chunk = num_rows - num_prefills, self._cache.prefill_chunk
        # A foreign core's prefill row may be longer than a chunk.
        chunk_rows = -(-chunk_tokens // chunk) * chunk
        bucket = next((size for size in self._programs.decode_buckets if size >= num_decodes), num_decodes)
        num_pages = self._programs.model.metadata.num_pages_per_sequence
        packed = roads.pack_rows(plan, rows, chosen, num_prefills + bucket * (num_decodes > 0), num_pages)
        chunk = None if self._fed is None else roads.pack_fed(plan, self._fed, chosen, packed, chunk_rows)
        self._pools, yielded = self._programs.rows_step(chunk_rows, packed.shape[0])(self._pools, packed, chunk)
        return yielded

    # What lies on the device.

    def evidence(self, slots: Ints, pages: Ints) -> Evidence | None:
        """Copies of the slots' state and the pages' raw words.

        After a step from neutral rows, a slot that did not run in it shows position -1 and an all-dummy row.
        """
        positions, rows = self._slot_state(slots)
        keys, values = page_words(self._programs, self._pools, pages)
        ran = None
        if self._last_native is not None:
            plan, yielded, chunk = self._last_native
            ran = roads.step_input(plan, np.asarray(yielded), chunk)
        return Evidence(slots, positions, rows, pages, keys, values, ran)

    def buffers(self) -> CacheBuffers:
        """Every array of this process that looks like a part of the pools, and how ours are spread over the mesh."""
        return cache_buffers(self._programs, self._pools, self._given)

    def _slot_state(self, slots: Ints) -> tuple[Any, Any]:
        """Positions and page tables of some slots."""
        if self._last_rows is None:
            batch = batch_of(self._state)
            return np.array(batch.positions)[slots], np.array(batch.page_table)[slots]
        plan, rows = self._last_rows
        row_of = np.full(self._cache.batch_size, -1)
        running = np.flatnonzero(plan.slot >= 0)
        row_of[plan.slot[running]] = running
        asked = row_of[slots]
        runs, chosen = asked >= 0, asked[asked >= 0]
        end = (plan.start + plan.count)[chosen]
        ended = (rows.eos_position[chosen] >= 0) & (end >= rows.eos_position[chosen])
        if self._fed is not None:
            ended |= self._fed.ended(plan)[chosen]
        positions = np.full(len(slots), -1, np.int32)
        table = np.zeros((len(slots), self._programs.model.metadata.num_pages_per_sequence), np.int32)
        positions[runs] = np.where(ended, -1, end)
        table[runs, : plan.table.shape[1]] = plan.table[chosen]
        return positions, table

    def verify(
        self, pages: Ints, offsets: Ints, kv_ids: UInt32[np.ndarray, " places"], limit: int = 8
    ) -> tuple[WrongPlace, ...]:
        """The first wrong places, by place, then layer, K before V, then head."""
        return tuple(first_wrong(self._programs, self._pools, pages, offsets, kv_ids, limit))

    def verify_words(self, pages: Ints, offsets: Ints, words: Words, limit: int = 8) -> tuple[WrongPlace, ...]:
        """The first wrong places, in the same order."""
        return tuple(first_other(self._programs, self._pools, pages, offsets, words, limit))

    def poison(self, pages: Ints, how: Literal["nan", "big"]) -> None:
        """Overwrite whole pages."""
        for part in parts(pages, PAGES_PER_CALL):
            ids = padded(part, PAGES_PER_CALL, self._cache.num_pages)
            (self._pools,) = self._programs.spoil_pages(how)(self._pools, ids)

    def describe(self) -> Mapping[str, str]:
        """Name, platform, device kind, mesh, number of processes that share it, and versions."""
        mesh = self._programs.mesh
        device = mesh.devices.flat[0]
        return {
            "name": "jax",
            "platform": str(device.platform),
            "device_kind": str(device.device_kind),
            "mesh": ",".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
            "processes": str(len({device.process_index for device in mesh.devices.flat})),
            "jax": jax.__version__,
            "numpy": np.__version__,
        }

    def close(self) -> None:
        """Give the cache back."""
        for pool in self._pools:
            pool.delete()
        self._pools = self._given = ()
