"""What is judged of the device beyond its rows: codec faults, shards and series, each by itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariants.buffers import shard_fault
from invariants.codec import codec_fault
from invariants.contents import ContentJudge
from invariants.findings import Findings
from invariants.ledger import Ledger
from invariants.owners import Decoder
from invariants.series import BLOCK, SeriesLog
from invariants.shadow import PLACE, ids_of
from paged_attention.fingerprint import WORD_MASK, kv_base, kv_id, salts, words
from paged_attention.plan import DeclaredPolicy, Evidence, Request, ShardedArray, WrongPlace

LAYERS, HEADS, DIM = 2, 3, 8
SALTS = salts(LAYERS, HEADS, DIM)
ONE = int(np.float32(1).view(np.uint32))


def decoder_for(dtype):
    page = np.zeros((LAYERS, HEADS, 1, 4, DIM), WORD_MASK[dtype][0])
    none = np.zeros(0, np.int32)
    return Decoder(Evidence(none, none, np.zeros((0, 1), np.int32), none, page, page))


def token_of(kv_id):
    return np.array([(kv_id, 5, 1, 0)], PLACE)[0]


def held(kv_id, layer, kind, head, dtype):
    return words(np.array([kv_id], np.uint32)[:, None], SALTS[layer, kind, head], dtype)[0]


def place_with(found, kv_id, dtype, scales=((), ())):
    expected = held(kv_id, 1, 0, 2, dtype).tolist()
    wrong = WrongPlace(1, "K", 2, 3, 0, (*found, *scales[0]), (*expected, *scales[1]))
    decoder = decoder_for(dtype)
    decoder.learn(wrong, kv_id)
    return wrong, decoder


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2**32 - 1), st.sampled_from(sorted(WORD_MASK)), st.integers(0, 1), st.integers(0, HEADS - 1))
def test_another_stream_or_head_of_the_same_token_is_named(kv_id, dtype, kind, head):
    if (kind, head) == (0, 2):
        return
    wrong, decoder = place_with(held(kv_id, 1, kind, head, dtype).tolist(), kv_id, dtype)
    assert codec_fault(wrong, token_of(kv_id), decoder) == f"the {'KV'[kind]} words of head {head} of the same token"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2**31), st.integers(1, 2**31), st.sampled_from(sorted(WORD_MASK)))
def test_another_tokens_words_and_nothing_at_all_are_no_codec_fault(kv_id, other, dtype):
    if other != kv_id:
        wrong, decoder = place_with(held(other, 1, 0, 2, dtype).tolist(), kv_id, dtype)
        assert codec_fault(wrong, token_of(kv_id), decoder) == ""
    wrong, decoder = place_with([0] * DIM, kv_id, dtype)
    assert codec_fault(wrong, token_of(kv_id), decoder) == ""
    assert codec_fault(wrong, token_of(0), decoder) == ""


def test_right_values_under_a_wrong_scale_are_named():
    half = int(np.float32(0.5).view(np.uint32))
    values = held(77, 1, 0, 2, "int8").tolist()
    wrong, decoder = place_with(values, 77, "int8", ((half,), (ONE,)))
    assert codec_fault(wrong, token_of(77), decoder) == "the right values under scale 0.5, not 1.0"


def test_an_int8_value_that_was_rounded_down_is_named():
    values = held(77, 1, 0, 2, "int8").view(np.int8)
    lower = np.where(values > 0, values - 1, values).astype(np.int8).view(np.uint8).tolist()
    wrong, decoder = place_with(lower, 77, "int8", ((ONE,), (ONE,)))
    assert codec_fault(wrong, token_of(77), decoder) == "its own values, rounded another way"


@pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
def test_values_that_passed_through_a_narrower_type_are_named(narrow):
    import ml_dtypes

    right = held(77, 1, 0, 2, "float32").view(np.float32)
    with np.errstate(over="ignore"):
        found = right.astype(getattr(ml_dtypes, narrow, narrow)).astype(np.float32).view(np.uint32).tolist()
    wrong, decoder = place_with(found, 77, "float32")
    assert codec_fault(wrong, token_of(77), decoder) == f"its own values rounded to {narrow}"


def test_lanes_in_another_order_are_named():
    wrong, decoder = place_with(held(77, 1, 0, 2, "bfloat16")[::-1].tolist(), 77, "bfloat16")
    assert codec_fault(wrong, token_of(77), decoder) == "its own words in another order of lanes"


@st.composite
def grids(draw):
    shape = tuple(draw(st.lists(st.sampled_from([2, 4, 6]), min_size=1, max_size=3)))
    parts = [draw(st.sampled_from([1, 2])) for _ in shape]
    boxes = [()]
    for size, count in zip(shape, parts, strict=True):
        step = size // count
        boxes = [(*box, (at, at + step)) for box in boxes for at in range(0, size, step)]
    return ShardedArray(shape, tuple(boxes) * draw(st.integers(1, 3)))


@given(grids(), st.randoms())
def test_shards_that_hold_each_position_as_often_as_declared_are_right_and_no_others(array, random):
    copies = len(array.boxes) // len(set(array.boxes))
    declared = ShardedArray(array.shape, tuple(random.sample(array.boxes, len(array.boxes))), copies)
    assert shard_fault(declared) == ""
    assert "times, not" in shard_fault(ShardedArray(array.shape, array.boxes, copies + 1))
    lost = tuple(box for box in array.boxes if box != array.boxes[0])
    assert "places" in shard_fault(ShardedArray(array.shape, lost, copies))
    first = array.boxes[0]
    wider = tuple(((0, array.shape[0]), *box[1:]) if box == first else box for box in array.boxes)
    if wider != array.boxes:
        assert "overlap" in shard_fault(ShardedArray(array.shape, wider, copies))
    outside = tuple((*box[:-1], (box[-1][0] + 1, box[-1][1] + 1)) for box in array.boxes)
    assert "reach outside" in shard_fault(ShardedArray(array.shape, outside, copies))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2 * BLOCK + 5), st.data())
def test_a_series_with_one_other_entry_is_told_by_block_and_column(count, data):
    log, rows = SeriesLog(("step", "free")), [(i, i * 7 % 13) for i in range(count)]
    for row in rows:
        log.note(row)
    series = dict(zip(("step", "free"), np.array(rows, np.int64).reshape(-1, 2).T, strict=True))
    assert log.difference(series) == ""
    at = data.draw(st.integers(0, count - 1))
    changed = series["free"].copy()
    changed[at] += 1
    first = at // BLOCK * BLOCK
    assert log.difference({**series, "free": changed}).startswith(
        f"tells another 'free' among the completed steps {first} to "
    )
    shorter = {name: column[:-1] for name, column in series.items()}
    assert log.difference(shorter) == f"has {count - 1} steps, and {count} were completed"


def test_a_slot_taken_by_a_later_admission_of_its_request_holds_that_ones_words():
    policy = DeclaredPolicy(batch_size=1, page_size=4, num_pages=8, max_sequence_length=16, prefill_chunk=4)
    ledger = Ledger(policy, 100)
    judge = ContentJudge(ledger, Findings(frozenset({"K1"}), 1))
    live = ledger.submit(Request(3, np.arange(1, 5, dtype=np.int32), 2), 0)
    for number in (1023, 1024, 1025):
        admission = ledger.admit(live, number, 0)
        admission.position = 4
        ledger.join(live, admission, 0)
        judge._seat()
        assert ids_of(judge.slot_tokens[0, 4:5])[0] == kv_id(kv_base([3], [number]), 4)[0]
        ledger.leave_slot(admission)
