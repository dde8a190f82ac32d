from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from paged_attention import (
    ActiveSequenceBatch,
    AllocatedPrefillPages,
    GenerationStepTask,
    InitialSequenceRequest,
    ModelInputBatch,
    ModelIOProcessor,
    ModelOutputBatch,
    ModelOutputSummary,
    NextIterationPlan,
    PagedAttentionCacheMetaData,
    PagedAttentionMetadata,
    SamplingParams,
    SlotPageAssignment,
)
from paged_attention.model_io import _compiled_merge, feed_back, sampled_positions, sampled_rows

META = PagedAttentionCacheMetaData(3, 1, 40, 6, 24, 4, 1, 8, 0.5)
NO_PREFILL = InitialSequenceRequest.init_empty()
ON_DEVICE = pytest.mark.parametrize("on_device", [False, True])


def device_batch(on_device: bool = True) -> ActiveSequenceBatch:
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",)) if on_device else None
    return ActiveSequenceBatch.create(META, mesh)


def prompt(length: int, chunk: int = 4, seed: int = 0, name: str = "p") -> InitialSequenceRequest:
    params = SamplingParams(0.9, 5, 0.5, seed)
    request = InitialSequenceRequest.create(
        name, None, META, chunk, list(range(101, 101 + length)), sampling_params=params
    )
    pages = -(-length // 4)
    request.page_indices[:pages] = np.arange(20, 20 + pages)
    return request


def task(slot: int, position: int = 5, token=7, pages=(1, 2), name: str | None = None) -> GenerationStepTask:
    token = np.int32(token) if isinstance(token, int) else token
    return GenerationStepTask(
        name or f"t{slot}", slot, position, list(pages), token, SamplingParams(0.8, 9, 0.7, 50 + slot)
    )


def plan(prefill=NO_PREFILL, decodes=True, tasks=(), updates=(), released=()) -> NextIterationPlan:
    return NextIterationPlan(
        prefill,
        prefill.is_active,
        decodes,
        AllocatedPrefillPages([]),
        list(tasks),
        [SlotPageAssignment(*update) for update in updates],
        released_slots=list(released),
    )


def build(batch: ActiveSequenceBatch, **what) -> ModelInputBatch:
    return ModelIOProcessor.build_input(plan(**what), META, batch)


def output(meta: PagedAttentionMetadata, tokens: list[int], complete: list[int]) -> ModelOutputBatch:
    rows = SamplingParams(*(np.arange(len(tokens)) for _ in range(4)))
    return ModelIOProcessor.prepare_model_output(np.array(tokens, np.int32), np.array(complete, np.bool_), meta, rows)


def plain(array) -> list:
    return np.asarray(array).tolist()


# What goes in.


@ON_DEVICE
def test_a_mixed_step_is_the_chunk_then_one_row_per_slot(on_device: bool):
    batch = device_batch(on_device)
    request = prompt(6, seed=33)
    request.chunk_idx = 1
    step = build(batch, prefill=request, tasks=[task(1, position=8, pages=[4, 5])], updates=[(1, 2, 6)])
    assert plain(step.input_ids) == [105, 106, 0, 0, 0, 7, 0]
    assert plain(step.positions) == [4, 5, 6, 7, -1, 8, -1]
    meta = step.attn_meta
    assert (int(meta.prefill_length), plain(meta.prefill_position)) == (6, [4, 5, 6, 7])
    assert plain(meta.prefill_page_table) == request.page_indices.tolist()
    assert plain(meta.decodes_position) == [-1, 8, -1]
    assert plain(meta.decodes_page_table) == [[0] * 6, [4, 5, 6, 0, 0, 0], [0] * 6]
    assert not meta.is_prefill_mode()
    assert not meta.is_decode_mode()
    kinds = jax.Array if on_device else np.ndarray
    assert all(isinstance(array, kinds) for array in (step.input_ids, batch.page_table, meta.prefill_length))
    assert plain(batch.page_table) == plain(meta.decodes_page_table)


@ON_DEVICE
def test_seed_10_every_sampled_row_has_its_own_requests_parameters(on_device: bool):
    batch = device_batch(on_device)
    step = build(batch, prefill=prompt(3, seed=33), tasks=[task(2), task(0)])
    assert plain(step.sampling_params.seed) == [33, 50, 0, 52]
    assert plain(step.sampling_params.max_tokens) == [5, 9, 32, 9]
    np.testing.assert_allclose(step.sampling_params.top_p, [0.9, 0.8, 1.0, 0.8], rtol=1e-6)
    np.testing.assert_allclose(step.sampling_params.temperature, [0.5, 0.7, 0.0, 0.7], rtol=1e-6)
    assert plain(build(batch).sampling_params.seed) == [50, 0, 52]
    assert plain(build(batch, prefill=prompt(3, seed=34), decodes=False).sampling_params.seed) == [34]


def test_seed_10_a_token_is_drawn_at_the_position_where_it_will_stand():
    batch = device_batch(False)
    step = build(batch, prefill=prompt(3), tasks=[task(1, position=8)])
    assert plain(sampled_positions(step.attn_meta)) == [3, 0, 9, 0]


@ON_DEVICE
def test_without_decodes_the_input_has_a_placeholder_and_the_batch_still_hears_its_news(on_device: bool):
    batch = device_batch(on_device)
    build(batch, tasks=[task(0), task(2)])
    step = build(batch, prefill=prompt(3), decodes=False, tasks=[task(1)], updates=[(0, 3, 9)], released=[2])
    assert step.attn_meta.decodes_position.shape == step.attn_meta.decodes_page_table.shape == ()
    assert step.attn_meta.is_prefill_mode()
    assert plain(step.input_ids) == [101, 102, 103, 0]
    assert plain(batch.positions) == [5, 5, -1]
    assert plain(batch.page_table) == [[1, 2, 0, 9, 0, 0], [1, 2, 0, 0, 0, 0], [0] * 6]


def test_without_a_prefill_its_part_is_a_placeholder_of_length_zero():
    step = build(device_batch(), tasks=[task(1)])
    assert int(step.attn_meta.prefill_length) == 0
    assert step.attn_meta.prefill_position.shape == step.attn_meta.prefill_page_table.shape == ()
    assert step.attn_meta.is_decode_mode()


def test_metadata_of_neither_part_is_in_no_mode():
    meta = PagedAttentionMetadata.init_empty()
    assert not meta.is_prefill_mode()
    assert not meta.is_decode_mode()
    step = build(device_batch(False), decodes=False)
    assert step.input_ids.shape == step.positions.shape == (0,)


@ON_DEVICE
def test_seed_03_a_released_slot_has_no_position_and_an_all_dummy_row_before_its_next_owner_comes(on_device: bool):
    batch = device_batch(on_device)
    build(batch, tasks=[task(0, pages=[1, 2, 3]), task(1, pages=[4, 5, 6])])
    step = build(batch, tasks=[task(1, position=4, pages=[7])], released=[0, 1])
    assert plain(step.attn_meta.decodes_position) == [-1, 4, -1]
    assert plain(step.attn_meta.decodes_page_table) == [[0] * 6, [7, 0, 0, 0, 0, 0], [0] * 6]


@settings(max_examples=60)
@given(length=st.integers(1, 24), chunk=st.integers(1, 9), mixed=st.booleans())
def test_seed_02_and_12_every_token_is_fed_once_and_the_last_real_row_of_the_last_chunk_is_sampled(
    length: int, chunk: int, mixed: bool
):
    batch, request = device_batch(False), prompt(length, chunk)
    fed: list[tuple[int, int]] = []
    for index in range(-(-length // chunk)):
        request.chunk_idx = index
        step = build(batch, prefill=request, decodes=mixed)
        meta = step.attn_meta
        assert int(meta.prefill_length) == min(length, (index + 1) * chunk)
        real = plain(meta.prefill_position < meta.prefill_length)
        fed += [(p, t) for p, t, r in zip(plain(step.positions), plain(step.input_ids), real, strict=False) if r]
        rows = plain(sampled_rows(meta))
        assert len(rows) == 1 + 3 * mixed == len(plain(step.sampling_params.seed))
        assert rows[1:] == list(range(chunk, chunk + 3 * mixed))
    assert fed == [(position, 101 + position) for position in range(length)]
    assert plain(step.input_ids)[rows[0]] == 100 + length
    assert plain(step.positions)[rows[0]] == length - 1


def test_seed_11_each_request_gets_its_own_chunk_size_from_one_compiled_program():
    batch = device_batch()
    for size in (4, 6, 4):
        request = prompt(11, size)
        request.chunk_idx = 1
        step = build(batch, prefill=request, decodes=False)
        assert plain(step.positions) == list(range(size, 2 * size))
        assert int(step.attn_meta.prefill_length) == min(11, 2 * size)


def test_steps_of_one_shape_compile_once_whatever_they_say():
    batch = device_batch()
    build(batch, tasks=[task(0)])
    build(batch)
    known = _compiled_merge()._cache_size()
    build(batch, tasks=[task(1, position=9, token=3, pages=[8])], updates=[(1, 1, 9)], released=[2])
    for _ in range(3):
        build(batch, updates=[(0, 2, 3), (1, 2, 4)])
    assert _compiled_merge()._cache_size() == known


def test_more_page_updates_than_slots_all_arrive():
    batch = device_batch(False)
    build(batch, tasks=[task(0, pages=[1])], updates=[(0, 1, 11), (0, 2, 12), (0, 3, 13), (0, 4, 14)])
    assert plain(batch.page_table)[0] == [1, 11, 12, 13, 14, 0]


@pytest.mark.parametrize("page", [40, -1, 2**31 - 1])
@pytest.mark.parametrize("where", ["update", "task", "prefill"])
def test_seed_25_a_page_outside_the_pool_is_an_error_before_anything_changes(page: int, where: str):
    batch = device_batch()
    build(batch, tasks=[task(0)])
    before = batch.to_dict()
    request = prompt(3)
    request.page_indices[0] = page
    what = {
        "update": {"updates": [(0, 2, page)]},
        "task": {"tasks": [task(1, pages=[page])]},
        "prefill": {"prefill": request},
    }
    with pytest.raises(ValueError, match=rf"page ids must lie in 0..39: found \[{page}\]"):
        build(batch, **what[where])
    assert batch.to_dict() == before


@pytest.mark.parametrize("what", [{"tasks": [task(3)]}, {"updates": [(-1, 0, 1)]}, {"released": [7]}])
def test_seed_25_a_slot_outside_the_batch_is_an_error(what: dict):
    with pytest.raises(ValueError, match=r"slots must lie in 0..2"):
        build(device_batch(False), **what)


def test_a_chunk_outside_its_prompt_is_an_error():
    request = prompt(4)
    request.chunk_idx = 1
    with pytest.raises(ValueError, match="chunk 1 of 4 tokens lies outside its prompt of 4 tokens"):
        build(device_batch(False), prefill=request)


def test_a_new_decode_whose_token_nobody_knows_is_an_error():
    with pytest.raises(ValueError, match="request 't1': its first token is unknown"):
        build(device_batch(), tasks=[task(1, token=-1)])


# The first token may still be on the device.


@ON_DEVICE
@pytest.mark.parametrize(("eos", "expected"), [(False, (77, 6)), (True, (77, -1))])
def test_a_first_token_on_the_device_is_taken_with_its_position_and_an_eos_leaves_the_slot_dead(
    on_device: bool, eos: bool, expected: tuple[int, int]
):
    batch = device_batch(on_device)
    request = prompt(6, 6)
    step = build(batch, prefill=request, decodes=False)
    first = output(step.attn_meta, [77], [eos])
    news = plan(tasks=[task(2, token=5), task(1, position=6, token=-1, name="p")])
    step = ModelIOProcessor.build_input(news, META, batch, prefill_outputs={"p": first})
    assert plain(step.positions) == [-1, expected[1], 5]
    assert plain(step.input_ids) == [0, expected[0], 5]


def test_a_jax_scalar_as_first_token_is_taken_at_the_tasks_own_position():
    step = build(device_batch(), tasks=[task(1, position=6, token=jnp.int32(9))])
    assert plain(step.input_ids) == [0, 9, 0]
    assert plain(step.positions) == [-1, 6, -1]


# The public pieces.


def test_prepare_model_input_cuts_chunks_by_a_traced_number_and_inserts_updates():
    batch, request = device_batch(), prompt(6)
    update = ActiveSequenceBatch.create(META.replace(batch_size=2), None)
    update.insert_from_task(0, task(1, position=8, token=3, pages=[4]))
    slots = np.array([2, 3], np.int32)

    @jax.jit
    def prepare(chunk_id):
        return ModelIOProcessor.prepare_model_input(
            PagedAttentionMetadata.init_empty(), request, chunk_id, 4, batch, update, slots
        )

    for chunk_id in (0, 1):
        input_ids, decodes_token_ids, positions, meta = prepare(chunk_id)
        assert plain(positions) == [*range(4 * chunk_id, 4 * chunk_id + 4), -1, -1, 8]
        assert plain(input_ids)[:2] == [101 + 4 * chunk_id, 102 + 4 * chunk_id]
        assert plain(decodes_token_ids) == [0, 0, 3]
        assert int(meta.prefill_length) == min(6, 4 * chunk_id + 4)
        assert plain(meta.decodes_page_table)[2] == [4, 0, 0, 0, 0, 0]


def test_seed_12_a_prompt_that_is_no_multiple_of_the_chunk_is_refused_not_clamped():
    request = prompt(6)
    request.token_ids = request.token_ids[:6]
    with pytest.raises(ValueError, match="6 tokens is no multiple of chunk_size=4"):
        ModelIOProcessor.prepare_model_input(
            PagedAttentionMetadata.init_empty(),
            request,
            1,
            4,
            ActiveSequenceBatch.init_empty(),
            ActiveSequenceBatch.init_empty(),
            np.zeros(0, np.int32),
        )


@ON_DEVICE
def test_outputs_are_taken_apart_and_dead_slots_say_nothing(on_device: bool):
    step = build(device_batch(on_device), prefill=prompt(6, 6), tasks=[task(0, position=5), task(2, position=9)])
    out = output(step.attn_meta, [70, 71, 72, 73], [False, True, True, False])
    assert (int(out.prefill_token_id), bool(out.prefill_complete), int(out.prefill_next_position)) == (70, False, 6)
    assert plain(out.decodes_token_ids) == [71, -1, 73]
    assert plain(out.decodes_completes) == [True, False, False]
    assert plain(out.decodes_next_position) == [-1, -1, 10]
    assert plain(out.next_sampling_params.seed) == [1, 2, 3]
    assert int(output(step.attn_meta, [70, 1, 1, 1], [True, False, False, False]).prefill_next_position) == -1


def test_an_absent_part_of_the_output_is_neutral():
    batch = device_batch(False)
    out = output(build(batch, tasks=[task(1)]).attn_meta, [1, 2, 3], [True] * 3)
    assert (int(out.prefill_token_id), bool(out.prefill_complete), int(out.prefill_next_position)) == (-1, False, -1)
    out = output(build(batch, prefill=prompt(3), decodes=False).attn_meta, [9], [False])
    assert out.decodes_token_ids.shape == out.decodes_completes.shape == (0,)
    before = plain(batch.positions)
    feed_back(batch, out)
    assert plain(batch.positions) == before


def test_outputs_of_the_wrong_number_of_rows_are_refused():
    meta = build(device_batch(False), prefill=prompt(3)).attn_meta
    with pytest.raises(ValueError, match=r"1 \+ 3 rows, \[prefill\]\[slots\]: found shapes \(3,\)"):
        output(meta, [1, 2, 3], [0, 0, 0])


def test_a_summary_has_the_outputs_arrays_and_names_nobody_yet():
    meta = build(device_batch(False), prefill=prompt(3), tasks=[task(1)]).attn_meta
    out = output(meta, [70, 71, 72, 73], [True, False, True, False])
    summary = ModelOutputSummary.from_output(out)
    assert (summary.prefill_request_id, summary.decodes_active_slots, summary.decodes_active_request_ids) == (
        None,
        [],
        [],
    )
    assert (int(summary.prefill_token_id), bool(summary.prefill_complete)) == (70, True)
    assert plain(summary.decodes_token_ids) == [-1, 72, -1]
    assert plain(summary.decodes_completes) == [False, True, False]


# Whole runs: the host counts, the device counts, and both agree.


@dataclass
class Host:
    """What the host knows: each slot's position and pages, by the rules alone."""

    positions: list[int] = field(default_factory=lambda: [-1] * 3)
    pages: list[list[int]] = field(default_factory=lambda: [[] for _ in range(3)])
    tokens: list[int] = field(default_factory=lambda: [0] * 3)

    def table(self) -> list[list[int]]:
        return [pages + [0] * (6 - len(pages)) for pages in self.pages]


def run(on_device: bool, script: list[tuple[int, int, int]]) -> None:
    """Play a script: each step (slot, what it does: 0 nothing, 1 join, 2 leave, 3 EOS, 4 a step without decodes, n)."""
    batch, host, dead = device_batch(on_device), Host(), [True] * 3
    for step, (slot, act, length) in enumerate(script):
        tasks, updates, released = [], [], []
        free = host.positions[slot] < 0
        if act in (1, 2) and not free:
            released, host.positions[slot], host.pages[slot] = [slot], -1, []
        if act == 1:
            pages = [1 + (step + i) % 39 for i in range(-(-length // 4))]
            tasks = [task(slot, position=length, token=step + 1, pages=pages)]
            host.positions[slot], host.pages[slot], host.tokens[slot], dead[slot] = length, list(pages), step + 1, False
        runs = act != 4
        for at, position in enumerate(host.positions):
            if runs and position >= 0 and position // 4 >= len(host.pages[at]):
                updates.append((at, len(host.pages[at]), 1 + step % 39))
                host.pages[at].append(1 + step % 39)
        given = build(batch, decodes=runs, tasks=tasks, updates=updates, released=released)
        alive = [p >= 0 and not d for p, d in zip(host.positions, dead, strict=True)]
        found = plain(batch.positions)
        assert [p for p, a in zip(found, alive, strict=True) if a] == [
            p for p, a in zip(host.positions, alive, strict=True) if a
        ]
        assert all(p == -1 for p, a in zip(found, alive, strict=True) if not a)
        assert plain(batch.page_table) == host.table()
        if not runs:
            continue
        fed = plain(given.input_ids)
        assert [fed[at] for at in range(3) if alive[at]] == [host.tokens[at] for at in range(3) if alive[at]]
        eos = [act == 3 and at == slot for at in range(3)]
        out = output(given.attn_meta, [1000 + 3 * step + at for at in range(3)], eos)
        feed_back(batch, out)
        for at in range(3):
            dead[at] = dead[at] or (eos[at] and alive[at])
            host.tokens[at] = 1000 + 3 * step + at
            # A host that has not seen the EOS goes on counting, up to the longest sequence.
            if host.positions[at] >= 0:
                host.positions[at] += 1
            if host.positions[at] == 24:
                host.positions[at], host.pages[at] = -1, []
                build(batch, decodes=False, released=[at])


SCRIPTS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(1, 20)), max_size=30)


@settings(max_examples=150, deadline=None)
@given(SCRIPTS)
def test_seed_18_the_device_agrees_with_the_host_at_every_step(script: list[tuple[int, int, int]]):
    run(False, script)


def test_seed_18_the_compiled_device_agrees_with_the_host_too():
    rng = np.random.default_rng(5)
    run(True, [tuple(row) for row in rng.integers((0, 0, 1), (3, 5, 21), (60, 3)).tolist()])
