"""The JAX backend: pages on a device (or sharded over a mesh), written in place, read back on the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int32, UInt32

from backends import jax_probe as probe
from backends import jax_roads as roads
from backends.jax_devices import make_mesh
from backends.jax_step import Pools, ScriptedModel
from backends.protocol import CacheSpec, DeviceSpec, ModelSpec
from backends.words import KINDS, ONE_BITS, check_places, check_plan, stored_dtype
from paged_attention import pytree
from paged_attention.batch import ActiveSequenceBatch
from paged_attention.cache import PagedAttentionCache, data_movement_options, page_sharding
from paged_attention.fingerprint import words
from paged_attention.layout import LAYOUTS
from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.model_io import ModelInputBatch, ModelIOProcessor, ModelOutputBatch, feed_back
from paged_attention.plan import UNKNOWN_TOKEN, Evidence, Ints, ModelRows, StepOutcome, StepPlan, WrongPlace
from paged_attention.quantize import Int8PerTokenHead
from paged_attention.requests import NextIterationPlan

Road = Literal["auto", "rows"]


@dataclass(frozen=True, slots=True)
class DispatchedStep:
    """A step on the device: (row of the plan, its place in a result) for each array of results."""

    step: int
    num_rows: int
    parts: tuple[tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"], Any], ...]

    def result(self) -> StepOutcome:
        """Wait for the device and return what the step yielded."""
        token = np.full(self.num_rows, UNKNOWN_TOKEN, np.int32)
        eos = np.zeros(self.num_rows, np.int32)
        for row, place, yielded in self.parts:
            token[row], eos[row] = np.asarray(yielded)[:, place]
        token.setflags(write=False)
        eos.setflags(write=False)
        return StepOutcome(self.step, token, eos)


class Programs:
    """Compiled programs by name; counts how often one is made, so that a run can show that it stopped compiling."""

    def __init__(self, options: Mapping[str, str] | None) -> None:
        self._options = None if options is None else dict(options)
        self._made: dict[tuple[Any, ...], Any] = {}
        self.num_compiled = 0

    def get(self, key: tuple[Any, ...], body: Callable[..., Any], donate: bool, out_shardings: Any = None) -> Any:
        """The program of this key; `body` is its function, its first argument the pools, donated or not."""
        if key not in self._made:

            def counted(*args: Any) -> Any:
                self.num_compiled += 1  # runs while JAX traces, which is once for each program that it compiles
                return body(*args)

            more = {} if out_shardings is None else {"out_shardings": out_shardings}
            self._made[key] = jax.jit(
                counted, donate_argnums=(0,) if donate else (), compiler_options=self._options, **more
            )
        return self._made[key]


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
        dtype = stored_dtype(cache)
        self._mesh, heads = make_mesh(devices, cache)
        pytree.register()
        self._cache = cache
        self._metadata = PagedAttentionCacheMetaData(
            batch_size=cache.batch_size,
            num_hidden_layers=cache.layers,
            num_pages_per_layer=cache.num_pages,
            num_pages_per_sequence=-(-cache.max_sequence_length // cache.page_size),
            max_sequences=cache.max_sequence_length,
            page_size=cache.page_size,
            num_kv_heads=cache.kv_heads,
            kv_head_dim_size=cache.head_dim,
            hbm_utilization=1.0,
        )
        quantizer = Int8PerTokenHead(cache.dtype) if cache.quantize else None
        layout = LAYOUTS[cache.layout]
        whole = PagedAttentionCache.init_cache(self._mesh, cache.dtype, self._metadata, heads, quantizer, layout=layout)
        pools, tree = jax.tree.flatten(whole)
        self._pools: Pools = tuple(pools)
        tile_pages = 256 if devices.platform == "cpu" else 4096
        self._model = ScriptedModel(cache, model, self._metadata, tree, tile_pages)
        self._programs = Programs(data_movement_options(devices.platform, cache.dtype))
        self._pool_shardings = tuple(
            page_sharding(self._mesh, layout, pool.shape, cache.kv_heads, heads) for pool in self._pools
        )
        self._replicated = NamedSharding(self._mesh, PartitionSpec())
        self._dtype = dtype
        self._batch = ActiveSequenceBatch.create(self._metadata, self._mesh)
        self._prefill_outputs: OrderedDict[int, tuple[str | int, ModelOutputBatch]] = OrderedDict()
        self._last_rows: tuple[StepPlan, ModelRows] | None = None
        small = cache.batch_size // 4
        self._decode_buckets = [small, cache.batch_size] if small >= 16 else [cache.batch_size]

    def execute(self, plan: StepPlan, rows: ModelRows) -> DispatchedStep:
        """Dispatch a step. ValueError: a page id outside the pool; nothing was written then."""
        check_plan(plan, self._cache)
        if plan.native is not None and self._road == "auto":
            return self._execute_native(plan, rows, cast("NextIterationPlan", plan.native))
        return self._execute_rows(plan, rows)

    # The core's own road.

    def _execute_native(self, plan: StepPlan, rows: ModelRows, native: NextIterationPlan) -> DispatchedStep:
        self._last_rows = None
        held = dict(self._prefill_outputs.values())
        model_input = ModelIOProcessor.build_input(native, self._metadata, self._batch, prefill_outputs=held)
        num_slots = self._cache.batch_size if native.schedule_decodes else 0
        facts = roads.pack_facts(plan, rows, num_slots)
        output, yielded = self._native_step(model_input, facts)
        feed_back(self._batch, output)
        self._keep_prefill_output(plan, native, output)
        where = roads.device_rows(plan, num_slots)
        return DispatchedStep(plan.step, plan.num_rows, ((np.arange(plan.num_rows), where, yielded),))

    def _native_step(self, model_input: ModelInputBatch, facts: Any) -> tuple[ModelOutputBatch, Any]:
        shape = (model_input.attn_meta.prefill_position.shape, model_input.attn_meta.decodes_position.shape)
        shardings = (self._pool_shardings, self._replicated, self._replicated)
        program = self._programs.get(("native", shape), partial(roads.native_step, self._model), True, shardings)
        self._pools, output, yielded = program(self._pools, model_input, facts)
        return output, yielded

    def _keep_prefill_output(self, plan: StepPlan, native: NextIterationPlan, output: ModelOutputBatch) -> None:
        """Keep what a prefill yielded for as long as the host may not have seen it when the sequence joins."""
        if native.schedule_prefill and plan.samples[0] and native.prefill_request.id is not None:
            self._prefill_outputs[plan.step] = (native.prefill_request.id, output)
        while self._prefill_outputs and next(iter(self._prefill_outputs)) < plan.step - self._cache.lag - 1:
            self._prefill_outputs.popitem(last=False)

    # Neutral rows.

    def _execute_rows(self, plan: StepPlan, rows: ModelRows) -> DispatchedStep:
        self._last_rows = (plan, rows)
        is_decode = (plan.slot >= 0) & (plan.count == 1)
        decodes, prefills = np.flatnonzero(is_decode), np.flatnonzero(~is_decode)
        groups = [prefills[at : at + 1] for at in range(len(prefills))] or [prefills]
        parts: list[tuple[Any, Any, Any]] = []
        for nth, prefill in enumerate(groups):
            # All decode rows run with the last prefill row.
            group = np.concatenate([prefill, decodes]) if nth == len(groups) - 1 else prefill
            parts.append((group, np.arange(len(group)), self._rows_step(plan, rows, group, len(prefill))))
        return DispatchedStep(plan.step, plan.num_rows, tuple(parts))

    def _rows_step(self, plan: StepPlan, rows: ModelRows, group: Any, num_prefills: int) -> Any:
        num_decodes = len(group) - num_prefills
        bucket = next((size for size in self._decode_buckets if size >= num_decodes), num_decodes)
        chunk = self._chunk_rows(int(plan.count[group[0]])) if num_prefills else 0
        packed = roads.pack_rows(plan, rows, group, num_prefills + bucket, self._metadata.num_pages_per_sequence)
        shardings = (self._pool_shardings, self._replicated)
        program = self._programs.get(
            ("rows", chunk, bucket), partial(roads.rows_step, self._model, chunk), True, shardings
        )
        self._pools, yielded = program(self._pools, packed)
        return yielded

    def _chunk_rows(self, count: int) -> int:
        """The padded length of a prefill row: prefill_chunk, or a multiple of it for a foreign core's longer rows."""
        chunk = self._cache.prefill_chunk
        return -(-count // chunk) * chunk

    # What lies on the device.

    def evidence(self, slots: Ints, pages: Ints) -> Evidence | None:
        """Copies of the slots' state and the pages' raw words.

        After a step from neutral rows, a slot that did not run in it shows position -1 and an all-dummy row.
        """
        positions, rows = self._slot_state()
        offsets = np.arange(self._cache.page_size, dtype=np.int32)
        held = [
            self._fetch(np.repeat(part, len(offsets)), np.tile(offsets, len(part)), probe.PAGES_PER_CALL * len(offsets))
            for part in _parts(pages, probe.PAGES_PER_CALL)
        ]
        stacked = np.concatenate([found for found, _ in held]) if held else self._no_words()
        # (pages x page, layers, 2, heads, head_dim) to (2, layers, heads, pages, page, head_dim)
        by_page = stacked.reshape(len(pages), len(offsets), *stacked.shape[1:])
        keys, values = np.ascontiguousarray(by_page.transpose(3, 2, 4, 0, 1, 5))
        return Evidence(slots, positions[slots], rows[slots], pages, keys, values)

    def _no_words(self) -> Any:
        found, _ = self._fetch(np.zeros(0, np.int32), np.zeros(0, np.int32), probe.DETAILS_PER_CALL)
        return found

    def _slot_state(self) -> tuple[Any, Any]:
        if self._last_rows is None:
            return np.array(self._batch.positions), np.array(self._batch.page_table)
        plan, rows = self._last_rows
        positions = np.full(self._cache.batch_size, -1, np.int32)
        table = np.zeros((self._cache.batch_size, self._metadata.num_pages_per_sequence), np.int32)
        running = plan.slot >= 0
        end = (plan.start + plan.count)[running]
        ended = (rows.eos_position[running] >= 0) & (end >= rows.eos_position[running])
        positions[plan.slot[running]] = np.where(ended, -1, end)
        table[plan.slot[running], : plan.table.shape[1]] = plan.table[running]
        return positions, table

    def _fetch(self, pages: Any, offsets: Any, width: int) -> tuple[Any, Any]:
        """Raw words and scale bits of up to `width` places, as copies."""
        program = self._programs.get(("words", width), partial(probe.place_words, self._model), False)
        found, scales = program(self._pools, _padded(pages, width), _padded(offsets, width))
        count = len(pages)
        return np.array(found[:count]), None if scales is None else np.array(scales[:count])

    def verify(
        self, pages: Ints, offsets: Ints, kv_ids: UInt32[np.ndarray, " places"], limit: int = 8
    ) -> tuple[WrongPlace, ...]:
        """The first wrong places, by place, then layer, K before V, then head."""
        check_places(pages, offsets, self._cache)
        packed = np.stack([pages, offsets, kv_ids.view(np.int32)])
        wrong: list[WrongPlace] = []
        for part in _parts(np.arange(len(pages)), probe.PLACES_PER_CALL[-1]):
            wrong += self._wrong_among(packed[:, part], limit - len(wrong))
            if len(wrong) >= limit:
                break
        return tuple(wrong)

    def _wrong_among(self, packed: Int32[np.ndarray, "3 places"], limit: int) -> list[WrongPlace]:
        count = packed.shape[1]
        width = next(size for size in probe.PLACES_PER_CALL if size >= count)
        program = self._programs.get(("wrong", width), partial(probe.wrong_places, self._model), False)
        num_wrong, flags = program(self._pools, _padded(packed, width), np.int32(count))
        if not int(num_wrong):
            return []
        places = packed[:, np.flatnonzero(np.asarray(flags))[:limit]]
        wrong: list[WrongPlace] = []
        for part in _parts(np.arange(places.shape[1]), probe.DETAILS_PER_CALL):
            wrong += self._details(places[:, part])
        return wrong[:limit]

    def _details(self, places: Int32[np.ndarray, "3 places"]) -> list[WrongPlace]:
        pages, offsets, kv_ids = places
        found, scales = self._fetch(pages, offsets, probe.DETAILS_PER_CALL)
        ids = kv_ids.view(np.uint32)
        expected = words(ids[:, None, None, None, None], self._model.salts, self._dtype)
        if scales is not None:
            one = np.where(ids == 0, 0, ONE_BITS).astype(np.uint32)[:, None, None, None, None]
            found = np.concatenate([found, scales[..., None]], axis=-1)
            expected = np.concatenate([expected, np.broadcast_to(one, (*scales.shape, 1))], axis=-1)
        wrong: list[WrongPlace] = []
        for place, layer, kind, head in np.argwhere((found != expected).any(axis=-1)).tolist():
            held, wanted = (tuple(array[place, layer, kind, head].tolist()) for array in (found, expected))
            wrong.append(WrongPlace(layer, KINDS[kind], head, int(pages[place]), int(offsets[place]), held, wanted))
        return wrong

    def poison(self, pages: Ints, how: Literal["nan", "big"]) -> None:
        """Overwrite whole pages."""
        program = self._programs.get(
            ("spoil", how), lambda pools, page: probe.spoil_pages(self._model, pools, page, how), True
        )
        for part in _parts(pages, probe.PAGES_PER_CALL):
            self._pools = program(self._pools, _padded(part, probe.PAGES_PER_CALL, self._cache.num_pages))

    def describe(self) -> Mapping[str, str]:
        """Name, platform, device kind, mesh and versions."""
        mesh = cast("Mesh", self._mesh)
        device = mesh.devices.flat[0]
        return {
            "name": "jax",
            "platform": str(device.platform),
            "device_kind": str(device.device_kind),
            "mesh": ",".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
            "jax": jax.__version__,
            "numpy": np.__version__,
        }

    def close(self) -> None:
        """Give the cache back."""
        for pool in self._pools:
            pool.delete()
        self._pools = ()


def _parts(array: Any, size: int) -> list[Any]:
    return [array[at : at + size] for at in range(0, len(array), size)]


def _padded(array: Any, width: int, value: int = 0) -> Any:
    """`array` with its last axis padded to `width`."""
    padded = np.full((*array.shape[:-1], width), value, array.dtype)
    padded[..., : array.shape[-1]] = array
    return padded
