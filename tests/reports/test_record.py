import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from reports.record import NEVER, RecordError, RunRecord


@pytest.fixture
def run(small_run, tmp_path):
    return shutil.copytree(small_run, tmp_path / "run")


def change_series(run, **arrays):
    with np.load(run / "series.npz") as archive:
        kept = {name: archive[name] for name in archive.files}
    kept.update(arrays)
    np.savez(run / "series.npz", **{name: array for name, array in kept.items() if array is not None})


def change_summary(run, **entries):
    path = run / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def change_request(run, line, **entries):
    path = run / "requests.jsonl"
    lines = path.read_text().splitlines()
    lines[line] = json.dumps(json.loads(lines[line]) | entries)
    path.write_text("\n".join(lines) + "\n")


def error_of(run):
    with pytest.raises(RecordError) as caught:
        RunRecord.load(run)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_loaded_record_holds_what_the_files_say(run_maker, tmp_path):
    run = run_maker(tmp_path, cancel=(4,), violate_at=10)
    record = RunRecord.load(run)
    rows = [json.loads(line) for line in (run / "requests.jsonl").read_text().splitlines()]
    assert record.requests.id.tolist() == [row["id"] for row in rows]
    expected = [NEVER if row["first_token_ns"] is None else row["first_token_ns"] for row in rows]
    assert record.requests.first_token_ns.tolist() == expected
    assert record.requests.state[4] == "cancelled"
    assert len(record.series.step) == record.summary["steps"]
    assert record.series.allocatable_pages == record.series.num_pages - 1
    assert [(v.id, v.step) for v in record.violations] == [("P1", 10)]
    assert record.violations[0].evidence == {"evidence": {"page": 7, "owners": [3, 5]}}
    assert record.number("time_to_first_token_seconds.p50") > 0
    assert record.number("time_to_first_token_seconds.p12") is None
    assert record.number("name") is None


def test_a_folder_that_is_not_there_says_which_to_give(tmp_path):
    assert error_of(tmp_path / "nowhere").endswith("give the folder that `kvproof run` printed")


@pytest.mark.parametrize("name", ["scenario.yaml", "summary.json", "requests.jsonl", "series.npz"])
def test_a_missing_file_is_named_with_what_to_do(run, name):
    (run / name).unlink()
    message = error_of(run)
    assert message.startswith(str(run / name))
    assert "run the scenario again" in message


@pytest.mark.parametrize("name", ["summary.json", "requests.jsonl", "series.npz"])
@pytest.mark.parametrize("kept", [1, 0.5])
def test_a_file_cut_short_is_named_with_what_to_do(run, name, kept):
    path = run / name
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if kept == 1 else int(len(whole) * kept)])
    message = error_of(run)
    assert message.startswith(str(path))
    assert "run the scenario again" in message


def test_bytes_that_are_no_text_are_named(run):
    (run / "requests.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "no UTF-8 text at byte 0" in error_of(run)


def test_a_record_of_another_schema_is_refused(run):
    change_summary(run, schema="kvproof/summary-v9")
    assert "expected schema 'kvproof/summary-v1', found 'kvproof/summary-v9'" in error_of(run)


@pytest.mark.parametrize(
    ("entries", "told"),
    [({"steps": "many"}, "expected 'steps' (int), found 'many'"), ({"violations": [3]}, "expected violations[0]")],
)
def test_a_wrong_summary_entry_is_named(run, entries, told):
    change_summary(run, **entries)
    assert told in error_of(run)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"state": "lost"}, "line 3: expected a state among finished, cancelled, rejected, live, found 'lost'"),
        ({"prompt_tokens": 1.5}, "expected whole numbers or null in 'prompt_tokens'"),
        ({"arrival_ns": "noon"}, "expected whole numbers or null in 'arrival_ns'"),
    ],
)
def test_a_wrong_request_entry_is_named(run, entries, told):
    change_request(run, 2, **entries)
    assert told in error_of(run)


def test_a_request_line_that_is_no_object_is_named(run):
    (run / "requests.jsonl").write_text("[1]\n")
    assert "line 1: expected an object, found '[1]'" in error_of(run)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"pages_owned": None}, "expected an array 'pages_owned', found none"),
        ({"waiting": np.zeros(3, np.int64)}, "entries in 'waiting', found shape (3,)"),
        ({"itl_gap_ns": np.zeros(2)}, "expected whole numbers in 'itl_gap_ns', found float64"),
        ({"page_size": np.int64(0)}, "expected one positive number in 'page_size', found 0"),
        ({"num_pages": np.int64(3)}, "a page id lies outside 0..2"),
    ],
)
def test_a_wrong_array_is_named(run, arrays, told):
    change_series(run, **arrays)
    assert told in error_of(run)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("start_ns", "a step starts before the one before it"),
        ("page_time_ns", "page events are out of order"),
    ],
)
def test_time_that_runs_backwards_is_refused(run, name, told):
    with np.load(run / "series.npz") as archive:
        backwards = archive[name][::-1]
    change_series(run, **{name: backwards})
    assert told in error_of(run)


def test_reading_and_comparing_records_needs_no_plotting_library():
    code = "import sys, reports.record, reports.diff, reports.html, reports.perfetto, reports.curves\n"
    code += "print([m for m in ('matplotlib', 'jinja2', 'jax') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
