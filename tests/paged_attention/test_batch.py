import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from paged_attention import (
    ActiveSequenceBatch,
    GenerationStepTask,
    PagedAttentionCacheMetaData,
    SamplingParams,
    SlotPageAssignment,
)

META = PagedAttentionCacheMetaData(4, 1, 33, 5, 20, 4, 1, 8, 0.5)


def task(slot: int, pages: list[int], token: int = 7, position: int = 6) -> GenerationStepTask:
    return GenerationStepTask(f"r{slot}", slot, position, pages, np.int32(token), SamplingParams(0.5, 9, 1.0, 11))


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]), ("tp",))


def rows(slots: list[int], pages: list[list[int]]) -> tuple[np.ndarray, ActiveSequenceBatch]:
    """An update that inserts a sequence with those pages at each slot; token 70 + row, position 10 + row."""
    update = ActiveSequenceBatch.create(META.replace(batch_size=len(slots)), None)
    for row, own in enumerate(pages):
        update.insert_from_task(row, task(row, own, token=70 + row, position=10 + row))
    return np.array(slots, np.int32), update


def test_a_new_host_batch_is_all_free():
    batch = ActiveSequenceBatch.init_numpy(META)
    assert batch.positions.tolist() == [-1] * 4
    assert batch.page_table.shape == (4, 5)
    assert not batch.page_table.any()
    assert batch.token_ids == []
    assert list(batch.available_slots) == [0, 1, 2, 3]
    assert batch.active_slot_requests_map == {}
    assert not batch.is_active
    assert batch.positions.dtype == batch.page_table.dtype == np.int32
    assert batch.sampling_params.seed.shape == (4,)


def test_a_device_batch_lies_on_the_mesh_and_is_active():
    batch = ActiveSequenceBatch.create(META, mesh())
    assert isinstance(batch.page_table, jax.Array)
    assert isinstance(batch.sampling_params.top_p, jax.Array)
    assert batch.is_active
    assert np.asarray(batch.positions).tolist() == [-1] * 4
    assert not ActiveSequenceBatch.init_empty().is_active


def test_seed_27_every_batch_has_a_lock_of_its_own():
    one, other = ActiveSequenceBatch.init_numpy(META), ActiveSequenceBatch.init_numpy(META)
    bare = [
        ActiveSequenceBatch(b.token_ids, b.positions, b.page_table, b.sampling_params, None, None) for b in [one, other]
    ]
    locks = [b.context_lock for b in (one, other, copy.deepcopy(one), *bare)]
    assert len({id(lock) for lock in locks}) == 5
    with one.context_lock:
        assert other.context_lock.acquire(blocking=False)


def test_a_task_fills_its_row_and_leaves_no_page_of_whoever_was_there():
    batch = ActiveSequenceBatch.init_numpy(META)
    batch.insert_from_task(2, task(2, [5, 6, 7]))
    batch.insert_from_task(2, task(2, [8]))
    assert batch.page_table.tolist() == [[0] * 5, [0] * 5, [8, 0, 0, 0, 0], [0] * 5]
    assert batch.positions.tolist() == [-1, -1, 6, -1]
    assert [int(token) for token in batch.token_ids] == [0, 0, 7]
    assert batch.sampling_params.seed.tolist() == [0, 0, 11, 0]
    assert batch.sampling_params.max_tokens.tolist() == [32, 32, 9, 32]


def test_seed_28_a_row_does_not_share_the_tasks_page_list():
    batch, source = ActiveSequenceBatch.init_numpy(META), task(0, [5])
    batch.insert_from_task(0, source)
    source.page_indices.append(6)
    assert batch.page_table[0].tolist() == [5, 0, 0, 0, 0]


@pytest.mark.parametrize(("slot", "pages"), [(4, [1]), (-1, [1]), (0, [1] * 6)])
def test_seed_25_a_task_outside_the_batch_is_refused_before_anything_is_written(slot: int, pages: list[int]):
    batch = ActiveSequenceBatch.init_numpy(META)
    with pytest.raises(ValueError, match=f"request 'r{slot}'"):
        batch.insert_from_task(slot, task(slot, pages))
    assert batch.token_ids == []
    assert not batch.page_table.any()


def test_padding_brings_the_token_list_to_the_length_asked_for():
    batch = ActiveSequenceBatch.init_numpy(META)
    batch.token_ids = [np.int32(3)]
    batch.pad_tokens(4)
    assert [int(token) for token in batch.token_ids] == [3, 0, 0, 0]
    batch.pad_tokens(2)
    assert len(batch.token_ids) == 4


def test_assignments_replace_those_of_the_step_before():
    batch = ActiveSequenceBatch.init_numpy(META)
    batch.apply_assignment([SlotPageAssignment(1, 2, 9), SlotPageAssignment(3, 0, 8)])
    batch.apply_assignment([SlotPageAssignment(2, 1, 7)])
    assert batch.page_update_slots.tolist() == [2, 4, 4, 4]
    assert (batch.page_update_page_idxs[0], batch.page_update_mapped_idxs[0]) == (1, 7)
    with pytest.raises(ValueError, match="5 page updates, but the batch holds 4"):
        batch.apply_assignment([SlotPageAssignment(0, 0, 1)] * 5)


@pytest.mark.parametrize("on_device", [False, True])
def test_inserts_go_to_their_slots_then_page_updates_and_padding_is_dropped(on_device: bool):
    batch = ActiveSequenceBatch.create(META, mesh() if on_device else None)
    slots, update = rows([2, 4, 0], [[5, 6], [9, 9], [3]])
    update.page_update_slots = np.array([2, 4], np.int32)
    update.page_update_page_idxs = np.array([2, 1], np.int32)
    update.page_update_mapped_idxs = np.array([8, 31], np.int32)
    new = batch.insert_decode_state(slots, update)
    assert isinstance(new.page_table, jax.Array) == on_device
    assert np.asarray(new.page_table).tolist() == [[3, 0, 0, 0, 0], [0] * 5, [5, 6, 8, 0, 0], [0] * 5]
    assert np.asarray(new.positions).tolist() == [12, -1, 10, -1]
    assert np.asarray(new.token_ids).tolist() == [72, 0, 70, 0]
    assert np.asarray(new.sampling_params.seed).tolist() == [11, 0, 11, 0]


def test_inserting_leaves_the_old_batch_as_it_was_and_leaks_no_tracer():
    batch = ActiveSequenceBatch.create(META, mesh())
    slots, update = rows([1], [[5]])

    @jax.jit
    def insert(batch: ActiveSequenceBatch) -> ActiveSequenceBatch:
        return batch.insert_decode_state(slots, update)

    new = insert(batch)
    assert np.asarray(new.positions).tolist() == [-1, 10, -1, -1]
    assert np.asarray(batch.positions).tolist() == [-1] * 4
    assert jnp.array_equal(batch.page_table, jnp.zeros((4, 5), jnp.int32))


def test_seed_28_copies_share_no_array_queue_or_map():
    batch = ActiveSequenceBatch.init_numpy(META)
    batch.insert_from_task(0, task(0, [5]))
    deep, taken = copy.deepcopy(batch), ActiveSequenceBatch.init_numpy(META)
    taken.copy_decode(batch)
    batch.insert_from_task(0, task(0, [9], token=1, position=2))
    batch.available_slots.get()
    for other in (deep, taken):
        assert other.page_table[0, 0] == 5
        assert other.positions[0] == 6
        assert int(other.token_ids[0]) == 7
        assert other.available_slots.qsize() == 4


def test_a_tree_of_a_batch_holds_arrays_only_and_traces_once():
    batch = ActiveSequenceBatch.create(META, mesh())
    leaves = jax.tree.leaves(batch)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert len(leaves) == 7
    traced = []

    @jax.jit
    def step(batch: ActiveSequenceBatch) -> ActiveSequenceBatch:
        traced.append(1)
        return batch

    assert step(batch).context_lock is None
    step(ActiveSequenceBatch.create(META, mesh()))
    assert traced == [1]
