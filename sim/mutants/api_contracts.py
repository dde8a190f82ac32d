"""What a user of `paged_attention` may rely on, from the rules alone: calls that no run of a scenario makes.

Each contract calls the public API and says in sentences what is broken; [] where all holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Float32, Int32

from paged_attention.batch import ActiveSequenceBatch
from paged_attention.cache import PagedAttentionCacheView
from paged_attention.engine import PagedAttentionEngine
from paged_attention.metadata import PagedAttentionCacheMetaData
from paged_attention.model_io import ModelIOProcessor, PagedAttentionMetadata
from paged_attention.pages import HBMPageManager
from paged_attention.plan import CoreSnapshot, Request, StepOutcome, StepPlan
from paged_attention.requests import (
    AllocatedPrefillPages,
    InitialSequenceRequest,
    NextIterationPlan,
    SlotPageAssignment,
)
from paged_attention.sampling import SamplingParams, sample
from paged_attention.scheduler import SchedulingPolicy

Contract = Callable[[], list[str]]

SIZES: Final[dict[str, int]] = {
    "batch_size": 3,
    "num_hidden_layers": 2,
    "num_pages_per_layer": 10,
    "num_pages_per_sequence": 5,
    "max_sequences": 20,
    "page_size": 4,
    "num_kv_heads": 2,
    "kv_head_dim_size": 3,
}


def _metadata(**changes: Any) -> PagedAttentionCacheMetaData:
    sizes: dict[str, Any] = {**SIZES, "hbm_utilization": 0.5, **changes}
    return PagedAttentionCacheMetaData(**sizes)


def _engine(
    lag: int = 0, preemption: Literal["none", "recompute"] = "recompute", **changes: Any
) -> PagedAttentionEngine:
    policy = SchedulingPolicy(preemption=preemption)
    return PagedAttentionEngine(_metadata(**changes), prefill_chunk=3, policy=policy, lag=lag)


def _request(number: int, prompt: int, max_tokens: int) -> Request:
    return Request(number, np.arange(1, prompt + 1, dtype=np.int32), max_tokens)


def _outcome(plan: StepPlan) -> StepOutcome:
    """An outcome in which nothing ends early: token 7 wherever one is sampled."""
    return StepOutcome(plan.step, np.where(plan.samples > 0, 7, -1).astype(np.int32), np.zeros_like(plan.samples))


def _refuses(what: str, call: Callable[..., object], *args: Any, **kwargs: Any) -> Iterator[str]:
    """A sentence unless the call raises ValueError."""
    try:
        call(*args, **kwargs)
    except ValueError:
        return
    except Exception as error:
        yield f"{what}: expected a ValueError, found {type(error).__name__}: {error}"
        return
    yield f"{what}: expected a ValueError, found none"


# ---- sampling


def _draw(
    probabilities: list[float], seeds: Any, positions: Any, *, temperature: float = 1.0, top_p: float = 1.0
) -> Int32[np.ndarray, " rows"]:
    seed, position = np.broadcast_arrays(np.asarray(seeds, np.uint32), np.asarray(positions, np.int32))
    rows = len(position)
    logits: Float32[np.ndarray, "rows vocab"] = np.tile(np.log(np.array(probabilities, np.float32)), (rows, 1))
    params = SamplingParams(
        top_p=np.full(rows, top_p, np.float32),
        max_tokens=np.full(rows, 1, np.int32),
        temperature=np.full(rows, temperature, np.float32),
        seed=seed,
    )
    return np.asarray(sample(logits, params, position))


def sampler() -> list[str]:
    """SEED-09, SEED-10, SEED-31: what is drawn, and what it depends on."""
    broken: list[str] = []
    odds, many = [0.15, 0.5, 0.05, 0.3], np.arange(400)
    greedy = set(_draw(odds, many, many, temperature=0.0).tolist())
    if greedy != {1}:
        broken.append(f"temperature 0 takes the likeliest token, 1: found {sorted(greedy)}")
    nucleus = set(_draw(odds, 5, many, top_p=0.6).tolist())
    if nucleus != {1, 3}:
        broken.append(f"top_p 0.6 keeps 0.5 and the 0.3 that crosses it, tokens 1 and 3: found {sorted(nucleus)}")
    everywhere = set(_draw([1 / 64] * 64, np.arange(1500), 3).tolist())
    if everywhere != set(range(64)):
        broken.append(f"an even distribution reaches all of 64 tokens: found {len(everywhere)}")
    together = _draw(odds, many, many + 7)
    alone = np.concatenate([_draw(odds, [row], [row + 7]) for row in many[:40]])
    if (together[:40] != alone).any():
        broken.append("a row draws the same token alone and among others: found different ones")
    for what, seeds, positions in (("seeds", many, 9), ("positions", 9, many)):
        if len(set(_draw(odds, seeds, positions).tolist())) < len(odds):
            broken.append(f"rows of different {what} draw independently: found {_draw(odds, seeds, positions)[:8]}")
    return broken


# ---- prompts on their way to the device


def _chunk_plan(request: InitialSequenceRequest, chunk: int) -> NextIterationPlan:
    return NextIterationPlan(
        prefill_request=request.replace(chunk_idx=chunk),
        schedule_prefill=True,
        schedule_decodes=False,
        prefill_pages_update=AllocatedPrefillPages([]),
        new_decodes_requests=[],
        decodes_state_page_updates=[],
    )


def _fed(request: InitialSequenceRequest, chunk: int) -> list[tuple[int, int]]:
    """(position, token) of the real rows of a chunk."""
    metadata = _metadata()
    made = ModelIOProcessor.build_input(
        _chunk_plan(request, chunk), metadata, ActiveSequenceBatch.create(metadata, None)
    )
    meta = made.attn_meta
    real = np.flatnonzero(np.asarray(meta.prefill_position) < np.asarray(meta.prefill_length))
    positions, tokens = np.asarray(meta.prefill_position)[real], np.asarray(made.input_ids)[real]
    return list(zip(positions.tolist(), tokens.tolist(), strict=True))


def _prompt(number: int, length: int, chunk_size: int, bucket: int | None = None) -> InitialSequenceRequest:
    tokens = list(range(100 * number, 100 * number + length))
    return InitialSequenceRequest.create(number, None, _metadata(), chunk_size, tokens, bucket)


def chunk_sizes() -> list[str]:
    """SEED-11: two chunk sizes in one process, in turn."""
    broken: list[str] = []
    prompts = [(_prompt(1, 12, 4), 4), (_prompt(2, 12, 6), 6)]
    for chunk in range(2):
        for request, size in prompts:
            start = chunk * size
            expected = [(p, 100 * int(request.id or 0) + p) for p in range(start, start + size)]
            found = _fed(request, chunk)
            if found != expected:
                broken.append(f"chunk {chunk} of {size} tokens feeds {expected}: found {found}")
    return broken


def padding_buckets() -> list[str]:
    """SEED-12: every token once, at its own position, whatever the bucket."""
    broken: list[str] = []
    for length, bucket, size in ((9, 10, 4), (3, 3, 8), (16, 17, 5), (8, 8, 4)):
        request = _prompt(1, length, size, bucket)
        expected = [(p, 100 + p) for p in range(length)]
        found = [pair for chunk in range(-(-length // size)) for pair in _fed(request, chunk)]
        if found != expected:
            broken.append(
                f"{length} tokens in a bucket of {bucket}, chunks of {size}: expected {expected}, found {found}"
            )
    return broken


def refusals() -> list[str]:
    """SEED-07, SEED-08, SEED-24: what can never run is refused, and nothing is queued then."""
    engine = _engine()
    broken = [
        *_refuses("an empty prompt", engine.submit, _request(1, 0, 4)),
        *_refuses("max_tokens 0", engine.submit, _request(2, 3, 0)),
        *_refuses("a prompt longer than max_sequences", engine.submit, _request(3, 21, 1)),
        *_refuses("more pages than the pool has", _engine(num_pages_per_layer=4).submit, _request(4, 10, 9)),
        *_refuses("creating an empty prompt", _prompt, 5, 0, 4),
    ]
    if engine.pending():
        broken.append(f"a refused request is not queued: found {dict(engine.pending())}")
    return broken


# ---- pages


def pages() -> list[str]:
    """SEED-19: nothing is freed but what is owned, once."""
    manager = HBMPageManager(_metadata())
    mine, others = manager.alloc_hbm_pages(2), manager.alloc_hbm_pages(3)
    manager.free_hbm_pages(others)
    before = manager.free_pages
    broken = [
        *_refuses("freeing a page twice in one call", manager.free_hbm_pages, [mine[0], mine[0]]),
        *_refuses("freeing a page that is free", manager.free_hbm_pages, [mine[0], others[0]]),
        *_refuses("freeing a page past the end", manager.free_hbm_pages, [10]),
        *_refuses("freeing page -1", manager.free_hbm_pages, [-1]),
    ]
    if manager.free_pages != before:
        broken.append(f"a refused release changes nothing: expected {before} free, found {manager.free_pages}")
    manager.free_hbm_pages([0])
    if 0 in manager.free_pages:
        broken.append("freeing the dummy is ignored: found page 0 among the free ones")
    return broken


def page_ids() -> list[str]:
    """SEED-25: a page outside the pool is an error before anything is written."""
    metadata = _metadata()
    view = PagedAttentionCacheView.init(None, np.float32, metadata, 0)
    rows = np.ones((3, 2, 3), np.float32)
    empty = PagedAttentionMetadata.init_empty()
    broken: list[str] = []
    for page in (10, 99, -1):
        table = np.full((3, 5), page, np.int32)
        decodes = empty.replace(decodes_position=np.array([0, -1, 7], np.int32), decodes_page_table=table)
        broken += _refuses(f"a decode into page {page}", view.write_decodes_to_cache, rows, rows, decodes)
        prefill = empty.replace(
            prefill_length=np.array(3, np.int32),
            prefill_position=np.arange(3, dtype=np.int32),
            prefill_page_table=table[0],
        )
        broken += _refuses(f"a chunk into page {page}", view.write_prefill_to_cache, rows, rows, prefill)
        update = NextIterationPlan(
            prefill_request=InitialSequenceRequest.init_empty(),
            schedule_prefill=False,
            schedule_decodes=True,
            prefill_pages_update=AllocatedPrefillPages([]),
            new_decodes_requests=[],
            decodes_state_page_updates=[SlotPageAssignment(0, 1, page)],
        )
        batch = ActiveSequenceBatch.create(metadata, None)
        broken += _refuses(f"telling the device of page {page}", ModelIOProcessor.build_input, update, metadata, batch)
        if np.asarray(batch.page_table).any():
            broken.append(f"a refused update of page {page} changes nothing: found {np.asarray(batch.page_table)}")
    return broken


def metadata() -> list[str]:
    """SEED-26: sizes make sense wherever metadata is made."""
    broken: list[str] = []
    for name in SIZES:
        for value in (0, -1):
            broken += _refuses(f"{name}={value}", _metadata, **{name: value})
    for share in (0, -0.5, 1.5, float("nan")):
        broken += _refuses(f"hbm_utilization={share}", _metadata, hbm_utilization=share)
    broken += _refuses("a pool of the dummy page alone", _metadata, num_pages_per_layer=1)
    sizes = {name: SIZES[name] for name in SIZES if not name.startswith("num_pages")}
    create: Any = PagedAttentionCacheMetaData.create
    broken += _refuses("pages for less than one sequence", create, None, **sizes, hbm_utilization=1.0, num_pages=5)
    broken += _refuses("no memory to measure and no budget", create, None, **sizes, hbm_utilization=1.0)
    # 2 layers of K and V: 4 tokens x 2 heads x 3 words of 2 bytes make pages of 96 bytes.
    made = create(None, **sizes, hbm_utilization=0.5, memory_budget_bytes=2 * (2 * 96 * 7 + 95))
    if made.num_pages_per_layer != 7:
        broken.append(f"half of the budget holds 7 pages a layer: found {made.num_pages_per_layer}")
    return broken


# ---- engines


def locks() -> list[str]:
    """SEED-27: what one batch does blocks no other."""
    first, second = (ActiveSequenceBatch.init_numpy(_metadata()).context_lock for _ in range(2))
    if first is None or second is None:
        return ["a batch has a lock of its own: found none"]
    with first:
        free = second.acquire(blocking=False)
        if free:
            second.release()
    return [] if free else ["two batches have two locks: found that holding one blocks the other"]


def shutdown() -> list[str]:
    """SEED-21: after a shutdown and the steps in flight, every page and slot is back and nobody is left."""
    broken: list[str] = []
    for lag in range(3):
        engine = _engine(lag, num_pages_per_layer=16)
        for number in range(6):
            engine.submit(_request(number, 4, 9))
        flights: list[StepPlan] = []
        for _ in range(8):
            if len(flights) > lag:
                engine.apply(_outcome(flights.pop(0)))
            plan = engine.plan()
            flights += [] if plan is None else [plan]
        engine.shutdown()
        for plan in flights:
            engine.apply(_outcome(plan))
        broken += [f"lag {lag}: {left}" for left in _left(engine.snapshot(), 15)]
        if engine.pending() or engine.plan() is not None:
            broken.append(f"lag {lag}: nothing is left to do after a shutdown: found {dict(engine.pending())}")
        broken += _refuses("submitting after a shutdown", engine.submit, _request(99, 2, 2))
    return broken


def _left(snapshot: CoreSnapshot, num_pages: int) -> Iterator[str]:
    if sorted(snapshot.free.tolist()) != list(range(1, num_pages + 1)) or len(snapshot.fenced):
        yield f"every page is back after a shutdown: found {len(snapshot.free)} of {num_pages} free"
    if snapshot.slot_of or (snapshot.positions != -1).any() or snapshot.rows.any():
        yield f"every slot is back after a shutdown: found {dict(snapshot.slot_of)}"
    if any(len(queue) for queue in snapshot.queues.values()):
        yield f"every queue is empty after a shutdown: found {dict(snapshot.queues)}"


def _crowd(preemption: Literal["none", "recompute"]) -> PagedAttentionEngine:
    """Three sequences that start together and outgrow a pool of nine pages."""
    engine = _engine(preemption=preemption)
    for number in range(3):
        engine.submit(_request(number, 4, 16))
    return engine


def no_policy() -> list[str]:
    """SEED-15, SEED-16: want of pages raises where no policy is configured, and then nothing has changed."""
    broken: list[str] = []
    engine = _crowd("none")
    for _ in range(100):
        before = engine.snapshot()
        try:
            plan = engine.plan()
        except NotImplementedError:
            after = engine.snapshot()
            if _words(before) != _words(after):
                broken.append(f"a plan that raises changes nothing: expected {before}, found {after}")
            break
        if plan is None:
            return ["three sequences outgrow the pool: found that they came to an end"]
        if any(effect.kind == "preempted" for effect in plan.effects):
            return ["without a policy nobody is preempted: found a preemption"]
        engine.apply(_outcome(plan))
    else:
        broken.append("want of pages raises NotImplementedError: found that it never did")
    engine = _crowd("recompute")
    while (plan := engine.plan()) is not None:
        engine.apply(_outcome(plan))
    if engine.pending():
        broken.append(f"with preemption everybody finishes: found {dict(engine.pending())}")
    return broken


def _words(snapshot: CoreSnapshot) -> Any:
    arrays = (snapshot.free, snapshot.fenced, snapshot.rows, snapshot.positions)
    maps = (snapshot.pages, snapshot.queues)
    return (
        [array.tolist() for array in arrays],
        dict(snapshot.slot_of),
        [{key: value.tolist() for key, value in each.items()} for each in maps],
    )


def pipeline() -> list[str]:
    """SEED-32: the engine plans lag + 1 steps ahead of their outcomes and no further."""
    broken: list[str] = []
    for lag in range(3):
        engine = _engine(lag)
        engine.submit(_request(1, 12, 6))
        ahead = 0
        while ahead < 9 and engine.plan() is not None:
            ahead += 1
        if ahead != lag + 1:
            broken.append(f"lag {lag} allows {lag + 1} steps without an outcome: found {ahead}")
    return broken


API_CONTRACTS: Final[dict[str, Contract]] = {
    "sampler": sampler,
    "chunk-sizes": chunk_sizes,
    "padding-buckets": padding_buckets,
    "refusals": refusals,
    "pages": pages,
    "page-ids": page_ids,
    "metadata": metadata,
    "locks": locks,
    "shutdown": shutdown,
    "no-policy": no_policy,
    "pipeline": pipeline,
}
"""By name."""
