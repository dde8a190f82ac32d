import json

import pytest

from reports.diff import METRICS, compare, figure
from reports.record import RecordError


@pytest.fixture
def two(run_maker, tmp_path):
    return run_maker(tmp_path, name="before"), run_maker(tmp_path, name="after", num_pages=40, rate=12.0)


def change(run, **entries):
    path = run / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_run_compared_with_itself_has_ratios_of_one(two):
    comparison = compare(two[0], two[0])
    assert {row.ratio for row in comparison.rows if row.a} == {1.0}
    assert comparison.differing == ()
    assert comparison.same_trace


def test_ratios_are_those_of_the_second_run_to_the_first(two):
    a, b = (json.loads((run / "summary.json").read_text()) for run in two)
    rows = {row.metric: row for row in compare(*two).rows}
    ttft = rows["time_to_first_token_seconds.p99"]
    assert ttft.a == a["time_to_first_token_seconds"]["p99"]
    assert ttft.b == b["time_to_first_token_seconds"]["p99"]
    assert ttft.ratio == pytest.approx(ttft.b / ttft.a)
    assert ttft.ratio > 1
    assert rows["num_preemptions"].ratio is None


def test_rows_keep_their_order_and_leave_out_what_neither_run_has(two):
    for run in two:
        change(run, tokens={})
    metrics = [row.metric for row in compare(*two).rows]
    assert metrics == [m for m in METRICS if not m.startswith("tokens.")]


def test_a_figure_that_only_one_run_has_is_shown_without_a_ratio(two):
    change(two[0], output_throughput=None)
    row = next(row for row in compare(*two).rows if row.metric == "output_throughput")
    assert (row.a, row.ratio) == (None, None)
    assert row.b > 0


def test_what_was_run_differently_is_told(two):
    change(two[1], seed=8, trace_hash="0")
    comparison = compare(*two)
    assert ("seed", "7", "8") in comparison.differing
    assert not comparison.same_trace


def test_the_table_is_aligned_and_names_both_runs(two):
    lines = compare(*two).lines()
    assert lines[0].split() == ["metric", "before", "after", "b", "/", "a"]
    assert set(lines[1]) == {"-", " "}
    assert len({len(line) for line in lines[:4]}) == 1
    assert json.loads(json.dumps(compare(*two).to_json()))["name_b"] == "after"


def test_a_missing_run_is_named(two, tmp_path):
    with pytest.raises(RecordError, match=r"nowhere: no such run folder"):
        compare(two[0], tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0, "0"), (12345, "12,345"), (12345.6, "12,346"), (0.0123456, "0.01235")]
)
def test_figures_are_written_with_four_digits_or_whole(value, text):
    assert figure(value) == text
