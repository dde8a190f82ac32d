import gzip
import json
from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from reports import perfetto
from reports.record import RunRecord


@pytest.fixture(scope="module")
def run(run_maker, tmp_path_factory):
    return run_maker(tmp_path_factory.mktemp("trace"), num_pages=40, rate=12.0, violate_at=60, cancel=(4,))


@pytest.fixture(scope="module")
def events(run):
    with gzip.open(perfetto.write(run)) as file:
        return json.load(file)["traceEvents"]


def test_every_event_has_the_fields_that_its_phase_asks_for(events):
    wanted = {"M": {"args"}, "X": {"ts", "dur", "tid"}, "C": {"ts", "args"}, "i": {"ts", "s"}}
    for event in events:
        assert wanted[event["ph"]] | {"pid", "name"} <= event.keys()
        assert event.get("dur", 0) >= 0
    assert {event["ph"] for event in events} == set(wanted)


def test_steps_and_counters_are_those_of_the_record_in_microseconds(run, events):
    series = RunRecord.load(run).series
    steps = [event for event in events if event.get("cat") == "step"]
    assert [event["ts"] * 1000 for event in steps] == pytest.approx(series.start_ns.tolist())
    assert [event["dur"] * 1000 for event in steps] == pytest.approx((series.end_ns - series.start_ns).tolist())
    counters = defaultdict(list)
    for event in events:
        if event["ph"] == "C":
            counters[event["name"]].append(event["args"])
    assert [c["owned"] for c in counters["pages"]] == series.pages_owned.tolist()
    assert {sum(c.values()) for c in counters["pages"]} == {series.allocatable_pages}
    assert [c["requests"] for c in counters["waiting"]] == series.waiting.tolist()
    assert [c["requests"] for c in counters["running"]] == series.running.tolist()
    assert [c["used"] for c in counters["slots"]] == series.slots_used.tolist()


def test_each_request_has_a_track_with_its_segments(run, events):
    record = RunRecord.load(run)
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 2}
    assert set(names) == set(record.requests.id.tolist())
    assert names[4] == "request 4 (cancelled)"
    slices = Counter(e["tid"] for e in events if e.get("cat") == "request" and e["ph"] == "X")
    assert slices == Counter(record.series.seg_request.tolist())
    firsts = {e["tid"]: e["ts"] for e in events if e["name"] == "first token"}
    assert firsts[0] * 1000 == pytest.approx(int(record.requests.first_token_ns[0]))
    assert 4 not in firsts


def test_slices_of_one_track_never_overlap(events):
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append((event["ts"], event["dur"]))
    for slices in tracks.values():
        slices.sort()
        for (start, duration), (following, _) in pairwise(slices):
            assert start + duration <= following + 1e-6


def test_violations_are_marked_with_their_message(events):
    (mark,) = [event for event in events if event.get("cat") == "violation"]
    assert mark["name"] == "P1 violated"
    assert mark["args"]["step"] == 60


def test_the_same_record_gives_the_same_bytes(run):
    first = perfetto.write(run).read_bytes()
    assert perfetto.write(run).read_bytes() == first
    # Bytes 4..7 of a gzip header are the modification time.
    assert first[4:8] == b"\0\0\0\0"


def test_a_trace_that_cannot_be_written_is_named(run_maker, tmp_path):
    run = run_maker(tmp_path, num_requests=0)
    (run / "trace.json.gz").mkdir()
    with pytest.raises(IsADirectoryError, match=r"trace\.json\.gz"):
        perfetto.write(run)
