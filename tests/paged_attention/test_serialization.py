import json
import threading
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paged_attention import (
    ActiveSequenceBatch,
    AllocatedPrefillPages,
    GenerationStepTask,
    InitialSequenceRequest,
    ModelInputBatch,
    ModelOutputBatch,
    ModelOutputSummary,
    NextIterationPlan,
    PagedAttentionCache,
    PagedAttentionCacheMetaData,
    PagedAttentionMetadata,
    SamplingParams,
    SlotPageAssignment,
)
from paged_attention.pytree import Fifo, SerializableTree, register

META = PagedAttentionCacheMetaData(2, 2, 6, 3, 12, 4, 1, 8, 0.5)
DTYPES = [np.int32, np.uint32, np.float32, np.bool_, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]), ("tp",))


def task() -> GenerationStepTask:
    return GenerationStepTask("a", 1, 5, [2, 3], jnp.int32(7), SamplingParams(0.5, 3, 0.1, 2**32 - 1))


def batch(where: Mesh | None) -> ActiveSequenceBatch:
    made = ActiveSequenceBatch.create(META, where)
    made.active_slot_requests_map[1] = task()
    made.available_slots.get()
    return made


def instances() -> list[SerializableTree]:
    request = InitialSequenceRequest.create(5, None, META, 4, [1, 2, 3])
    output = ModelOutputBatch.init_empty()
    host = ActiveSequenceBatch.init_numpy(META)
    host.insert_from_task(1, task())
    return [
        META,
        SamplingParams(),
        SamplingParams.init_jax(META, NamedSharding(mesh(), PartitionSpec())),
        request,
        InitialSequenceRequest.create("b", mesh(), META, 4, [1, 2, 3]),
        task(),
        SlotPageAssignment(1, 2, 3),
        AllocatedPrefillPages([4, 5]),
        NextIterationPlan(
            request, True, False, AllocatedPrefillPages([1]), [task()], [SlotPageAssignment(0, 1, 2)], ["c", 3], [1]
        ),
        host,
        batch(None),
        batch(mesh()),
        PagedAttentionMetadata.init_empty(),
        output,
        ModelOutputSummary.from_output(output).replace(prefill_request_id="a", decodes_active_slots=[0]),
        PagedAttentionCache.init_cache(mesh(), jnp.bfloat16, META, None),
        PagedAttentionCache.init_cache(None, ml_dtypes.bfloat16, META, None),
    ]


def assert_same(one: Any, other: Any) -> None:
    """Same types, dtypes, shapes and bits, all the way down; a lock is like any other unlocked one."""
    assert type(one) is type(other)
    if isinstance(one, SerializableTree):
        assert vars(one).keys() == vars(other).keys()
        for name in vars(one):
            assert_same(vars(one)[name], vars(other)[name])
    elif isinstance(one, np.ndarray | np.generic | jax.Array):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    elif isinstance(one, dict):
        assert_same(list(one), list(other))
        assert_same(list(one.values()), list(other.values()))
    elif isinstance(one, list | tuple | Fifo):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, type(threading.Lock())):
        assert one is not other
        assert not other.locked()
    else:
        assert one == other


@pytest.mark.parametrize("value", instances(), ids=lambda value: type(value).__name__)
def test_dictionaries_and_json_bring_everything_back(value: SerializableTree):
    assert_same(value, type(value).from_dict(value.to_dict()))
    assert_same(value, type(value).from_json(value.to_json(indent=2)))
    assert json.loads(value.to_json()) == value.to_dict()


@given(
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(np.uint8, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)).map(
            lambda raw: (raw % 2 if dtype is np.bool_ else raw).astype(dtype)
        )
    )
)
def test_arrays_of_every_dtype_and_shape_keep_their_bits(array: np.ndarray):
    assert_same(array, SamplingParams.from_json(SamplingParams(top_p=array).to_json()).top_p)


def test_nan_bits_survive():
    array = np.array([0x7FC1, 0xFF81, 0x7F80], np.uint16).view(ml_dtypes.bfloat16)
    assert_same(array, SamplingParams.from_json(SamplingParams(top_p=array).to_json()).top_p)


def test_what_was_read_back_can_be_written_to():
    again = ActiveSequenceBatch.from_json(ActiveSequenceBatch.init_numpy(META).to_json())
    again.insert_from_task(0, task())
    assert again.positions[0] == 5


def test_missing_and_unknown_fields_are_named():
    data = SlotPageAssignment(1, 2, 3).to_dict()
    with pytest.raises(ValueError, match=r"missing \['slot'\], unknown \['slott'\]"):
        SlotPageAssignment.from_dict({"slott": 1, **{k: v for k, v in data.items() if k != "slot"}})


def test_what_cannot_be_written_down_is_a_type_error():
    with pytest.raises(TypeError, match="cannot serialise a value of type object"):
        SamplingParams(top_p=object()).to_json()


def test_replace_changes_the_named_fields_of_a_new_instance():
    one = SlotPageAssignment(1, 2, 3)
    assert one.replace(slot=9) == SlotPageAssignment(9, 2, 3)
    assert one.slot == 1
    with pytest.raises(TypeError):
        one.replace(slott=9)


@pytest.mark.parametrize("value", instances(), ids=lambda value: type(value).__name__)
def test_trees_of_every_class_have_only_arrays_and_numbers_as_leaves(value: SerializableTree):
    register()
    leaves, treedef = jax.tree.flatten(value)
    assert all(isinstance(leaf, np.ndarray | np.generic | jax.Array | int | float) for leaf in leaves)
    again = jax.tree.unflatten(treedef, leaves)
    assert type(again) is type(value)
    hash(treedef)
    assert_same(leaves, jax.tree.leaves(again))
    for name in value.tree_static:
        assert_same(getattr(value, name), getattr(again, name))


def test_a_model_input_is_a_tree_too():
    register()
    meta = PagedAttentionMetadata.init_empty()
    value = ModelInputBatch(np.arange(3), np.arange(3), meta, SamplingParams.init_empty())
    assert len(jax.tree.leaves(value)) == 2 + 5 + 4
    assert value.replace(input_ids=np.arange(4)).input_ids.shape == (4,)


def test_metadata_is_static_and_has_no_leaves():
    register()
    assert jax.tree.leaves(META) == []
    assert jax.tree.structure(META) == jax.tree.structure(META.replace())
    assert jax.tree.structure(META) != jax.tree.structure(META.replace(batch_size=3))
