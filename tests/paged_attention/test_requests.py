import dataclasses
import queue

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

from paged_attention import InitialSequenceRequest, PagedAttentionCacheMetaData, SamplingParams
from paged_attention.requests import Fifo

SIZES = {
    "batch_size": 2,
    "num_hidden_layers": 3,
    "max_sequences": 20,
    "page_size": 4,
    "num_kv_heads": 4,
    "kv_head_dim_size": 8,
}
META = PagedAttentionCacheMetaData(2, 3, 11, 5, 20, 4, 4, 8, 0.5)


def create(length: int, chunk: int = 4, **kwargs) -> InitialSequenceRequest:
    return InitialSequenceRequest.create("r", None, META, chunk, list(range(1, length + 1)), **kwargs)


# Metadata.


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(META) if f.name != "hbm_utilization"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_seed_26_every_size_must_be_a_positive_integer(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
        META.replace(**{name: value})


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan"), True])
def test_seed_26_hbm_utilization_lies_above_0_and_up_to_1(share: float):
    with pytest.raises(ValueError, match="hbm_utilization"):
        META.replace(hbm_utilization=share)
    with pytest.raises(ValueError, match="hbm_utilization"):
        PagedAttentionCacheMetaData.create(None, **SIZES, hbm_utilization=share, num_pages=9)


def test_seed_26_a_pool_of_one_page_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        META.replace(num_pages_per_layer=1)


def test_the_table_width_must_be_that_of_the_longest_sequence():
    with pytest.raises(ValueError, match=r"ceil\(20 / 4\) = 5: found 6"):
        META.replace(num_pages_per_sequence=6)


def test_seed_26_create_wants_room_for_one_longest_sequence_and_the_dummy():
    assert PagedAttentionCacheMetaData.create(None, **SIZES, hbm_utilization=1.0, num_pages=6).num_pages_per_layer == 6
    with pytest.raises(ValueError, match="needs 5 pages of 4 and the dummy page one more: found 5"):
        PagedAttentionCacheMetaData.create(None, **SIZES, hbm_utilization=1.0, num_pages=5)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1])
def test_seed_26_create_refuses_sizes_that_are_not_positive(name: str, value: int):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer: found {value}"):
        PagedAttentionCacheMetaData.create(None, **(SIZES | {name: value}), hbm_utilization=1.0, num_pages=9)


@pytest.mark.parametrize("budget", [0, -1, 2.5])
def test_seed_26_a_budget_must_be_a_positive_number_of_bytes(budget: float):
    with pytest.raises(ValueError, match="memory_budget_bytes must be a positive integer"):
        PagedAttentionCacheMetaData.create(None, **SIZES, hbm_utilization=1.0, memory_budget_bytes=budget)


def test_seed_26_a_platform_without_memory_statistics_asks_for_a_budget():
    with pytest.raises(ValueError, match="num_pages or memory_budget_bytes"):
        PagedAttentionCacheMetaData.create(None, **SIZES, hbm_utilization=1.0)
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("tp",))
    with pytest.raises(ValueError, match="'cpu' reports no memory; give num_pages or memory_budget_bytes"):
        PagedAttentionCacheMetaData.create(mesh, **SIZES, hbm_utilization=1.0)


@given(st.integers(1, 1 << 24), st.sampled_from([0.25, 0.5, 1.0]))
def test_seed_26_a_budget_gives_as_many_whole_pages_of_k_and_v_as_fit(budget: int, share: float):
    page_bytes = 4 * 4 * 8 * 2 * 2  # page_size, heads, head_dim, bytes of bfloat16, K and V
    fits = int(budget * share) // (3 * page_bytes)
    if fits < 6:
        with pytest.raises(ValueError, match="found"):
            PagedAttentionCacheMetaData.create(None, **SIZES, hbm_utilization=share, memory_budget_bytes=budget)
        return
    meta = PagedAttentionCacheMetaData.create(None, **SIZES, hbm_utilization=share, memory_budget_bytes=budget)
    assert meta.num_pages_per_layer == fits
    assert meta.num_pages_per_sequence == 5


class FakeDevice:
    platform = "tpu"

    def __init__(self, limit: int, used: int):
        self.stats = {"bytes_limit": limit, "bytes_in_use": used}

    def memory_stats(self):
        return self.stats


class FakeMesh:
    def __init__(self, devices, shape):
        self.devices, self.shape = np.array(devices), shape


@pytest.mark.parametrize(("heads", "shards"), [(4, 2), (3, 1)])
def test_memory_in_use_counts_and_only_devices_that_share_the_heads_add_up(heads: int, shards: int):
    mesh = FakeMesh([FakeDevice(100_000, 10_000), FakeDevice(100_000, 40_000)], {"tp": 2})
    sizes = SIZES | {"num_kv_heads": heads}
    meta = PagedAttentionCacheMetaData.create(mesh, **sizes, hbm_utilization=0.9)
    page_bytes = 4 * heads * 8 * 2 * 2
    assert meta.num_pages_per_layer == shards * 50_000 // 3 // page_bytes


def test_metadata_is_hashable_and_equal_by_value():
    assert {META: 1}[META.replace()] == 1


# Prompts.


@pytest.mark.parametrize("length", [0, 21])
@pytest.mark.parametrize("max_prefill_length", [None, 64])
def test_seed_24_and_07_an_impossible_prompt_is_refused_with_both_lengths(length: int, max_prefill_length: int | None):
    with pytest.raises(ValueError, match="request 'r'") as refused:
        create(length, max_prefill_length=max_prefill_length)
    assert f"{length} tokens" in str(refused.value)
    assert "max_sequences=20" in str(refused.value)


def test_a_prompt_longer_than_max_prefill_length_is_refused_not_cut():
    with pytest.raises(ValueError, match="9 tokens, more than max_prefill_length=8"):
        create(9, max_prefill_length=8, prefill_lengths=[4, 16])


@given(
    length=st.integers(1, 20),
    chunk=st.integers(1, 23),
    buckets=st.none() | st.lists(st.integers(1, 24), max_size=4),
)
def test_seed_12_chunks_feed_every_token_once_at_its_own_position(length: int, chunk: int, buckets: list[int] | None):
    request = create(length, chunk, prefill_lengths=buckets)
    assert len(request.token_ids) % chunk == 0
    fed = {}
    for start in range(0, length, chunk):
        rows = slice(start, start + chunk)
        assert len(request.token_ids[rows]) == chunk
        fed |= {
            int(p): int(t)
            for p, t in zip(request.positions[rows], request.token_ids[rows], strict=True)
            if p < request.length
        }
    assert fed == {position: position + 1 for position in range(length)}
    assert (request.positions[length:] >= length).all()


def test_a_prompt_is_padded_to_the_smallest_bucket_and_max_prefill_length_is_the_last():
    assert len(create(3, 1, prefill_lengths=[16, 4, 8]).token_ids) == 4
    assert len(create(9, 1, prefill_lengths=[4, 8]).token_ids) == 20
    assert len(create(9, 1, max_prefill_length=12, prefill_lengths=[4, 8]).token_ids) == 12
    assert len(create(5, 3, prefill_lengths=[8]).token_ids) == 9


def test_a_new_request_is_at_its_first_chunk_without_pages():
    prompt = [7, 8, 9]
    request = InitialSequenceRequest.create("r", None, META, 2, prompt, sampling_params=SamplingParams(0.5, 3, 1.0, 9))
    assert (request.chunk_idx, request.chunk_size, request.prompt_token_ids) == (0, 2, [7, 8, 9])
    assert request.page_indices.tolist() == [0] * 5
    assert request.length == 3
    params = request.sampling_params
    assert [float(x) for x in (params.top_p, params.max_tokens, params.temperature, params.seed)] == [0.5, 3, 1.0, 9]
    assert request.is_active
    prompt.append(1)
    assert request.prompt_token_ids == [7, 8, 9]


def test_on_a_mesh_the_arrays_are_jax_arrays_with_the_same_values():
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    host, device = create(6), InitialSequenceRequest.create("r", mesh, META, 4, list(range(1, 7)))
    for name in ("token_ids", "positions", "page_indices", "length"):
        assert isinstance(getattr(device, name), jax.Array)
        np.testing.assert_array_equal(getattr(device, name), getattr(host, name))
    assert isinstance(device.sampling_params.seed, jax.Array)


def test_the_placeholder_is_not_active():
    assert not InitialSequenceRequest.init_empty().is_active


def test_seed_28_copy_prefill_takes_values_not_references():
    source, copy = create(6), InitialSequenceRequest.init_empty()
    copy.id = "other"
    source.page_indices[:2] = [3, 4]
    copy.copy_prefill(source)
    source.page_indices[0] = 9
    source.token_ids[0] = 99
    assert copy.page_indices.tolist() == [3, 4, 0, 0, 0]
    assert copy.token_ids[0] == 1
    assert copy.id == "other"


# The queue.


def test_a_fifo_is_first_in_first_out_and_reading_changes_nothing():
    fifo = Fifo([1, 2])
    fifo.put(3)
    fifo.put_first(0)
    assert list(fifo) == [0, 1, 2, 3] == list(fifo)
    copied = fifo.copy()
    assert [fifo.get(), fifo.get_nowait(), fifo.peek(), fifo.qsize()] == [0, 1, 2, 2]
    fifo.remove(2)
    assert list(fifo) == [3]
    assert list(copied) == [0, 1, 2, 3]


def test_an_empty_fifo_raises_at_once():
    for take in (Fifo().get, Fifo().get_nowait, Fifo().peek):
        with pytest.raises(queue.Empty):
            take()
    assert Fifo().empty()
