import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports import curves
from reports.curves import Sample, Stairs
from reports.record import FENCED, FREE, RunRecord, Series

STEPS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60), st.integers(0, 500)), min_size=1, max_size=30)
"""(pause before, duration, tokens) of each step."""


def series_of(steps, **events):
    start, end, now = [], [], 0
    for pause, duration, _ in steps:
        start.append(now + pause)
        end.append(now := now + pause + duration)
    count = len(steps)
    columns = {name: np.zeros(count, np.int64) for name in Series.__dataclass_fields__}
    empty = dict.fromkeys([n for n in columns if n.startswith(("itl_", "page_", "seg_"))], np.zeros(0, np.int64))
    given = {"start_ns": start, "end_ns": end, "prefill_tokens": [t for _, _, t in steps]} | events
    scalars = {"num_pages": 9, "page_size": 4, "batch_size": 4}
    return Series(**columns | empty | {name: np.asarray(value, np.int64) for name, value in given.items()} | scalars)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(1, 5)), min_size=1, max_size=20), st.floats(0, 1))
def test_quantiles_are_those_of_the_observations_written_out(observed, q):
    counts = {}
    for value, count in observed:
        counts[value] = counts.get(value, 0) + count
    values = sorted(counts)
    sample = Sample(np.array(values, np.int64), np.array([counts[v] for v in values], np.int64))
    written_out = np.repeat(sample.values, sample.counts)
    assert sample.total == len(written_out)
    assert sample.quantile(q) == pytest.approx(np.quantile(written_out, q), rel=1e-9)


@settings(deadline=None)
@given(STEPS, st.integers(1, 17))
def test_bins_show_mean_least_and_greatest_of_what_happened_in_them(steps, count):
    series = series_of(steps)
    stairs = curves.held(series, series.prefill_tokens)
    first, last = curves.span_ns(series)
    edges = np.linspace(first, last, count + 1)
    shown = curves.binned(stairs, edges)
    for i in range(count):
        within = [
            (value, min(right, edges[i + 1]) - max(left, edges[i]))
            for value, left, right in zip(stairs.values, stairs.edges_ns[:-1], stairs.edges_ns[1:], strict=True)
            if min(right, edges[i + 1]) > max(left, edges[i])
        ]
        mean = sum(v * w for v, w in within) / sum(w for _, w in within)
        assert shown.mean[i] == pytest.approx(mean, rel=1e-6, abs=1e-6)
        assert shown.low[i] <= min(v for v, _ in within)
        assert shown.high[i] >= max(v for v, _ in within)
        assert {shown.low[i], shown.high[i]} <= set(stairs.values)


@settings(deadline=None)
@given(STEPS, st.integers(1, 17))
def test_no_token_is_lost_or_counted_twice_in_the_throughput(steps, count):
    series = series_of(steps)
    first, last = curves.span_ns(series)
    # One ns more: a step of no duration at the very end is spread over the ns after it.
    edges = np.linspace(first, last + 1, count + 1)
    rate = curves.tokens_per_second(series, series.prefill_tokens, edges)
    assert (rate * np.diff(edges) * 1e-9).sum() == pytest.approx(sum(t for _, _, t in steps), abs=1e-6)
    assert rate.min() > -1e-3


def test_a_steps_tokens_are_spread_evenly_over_its_duration():
    series = series_of([(0, 10, 40), (10, 20, 30)])
    rate = curves.tokens_per_second(series, series.prefill_tokens, np.array([0.0, 5.0, 15.0, 20.0, 30.0, 40.0]))
    assert (rate * 1e-9).tolist() == pytest.approx([4.0, 2.0, 0.0, 1.5, 1.5])


def test_nothing_runs_in_a_pause_that_is_longer_than_the_step_before():
    stairs = curves.while_running(series_of([(0, 10, 0), (2, 10, 0), (50, 10, 0)]), np.array([3, 5, 7]))
    assert stairs.edges_ns.tolist() == [0, 12, 22, 72, 82]
    assert stairs.values.tolist() == [3, 5, 0, 7]


@pytest.mark.parametrize(("span", "bins", "width"), [(1, 1, 1), (1000, 10, 100), (1001, 10, 200), (2001, 10, 500)])
def test_bins_have_round_widths(span, bins, width):
    assert curves.nice_width_ns(span, bins) == width


@settings(deadline=None)
@given(st.integers(1, 10**15), st.integers(1, 400))
def test_bins_of_a_round_width_are_never_more_than_asked_for(span, bins):
    width = curves.nice_width_ns(span, bins)
    assert width * bins >= span
    assert str(width).rstrip("0") in ("1", "2", "5")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 8), st.integers(-2, 5)), max_size=40),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5),
)
def test_page_states_are_those_of_events_replayed_one_by_one(events, moments):
    times = np.cumsum([0, *(gap for gap, _, _ in events)])[1:]
    series = series_of(
        [(0, 100, 0)],
        page_time_ns=times,
        page_id=[page for _, page, _ in events],
        page_owner=[owner for _, _, owner in events],
    )
    owned, fenced = curves.page_states(series)
    for moment in (m * 100 for m in moments):
        pages = {}
        for time, (_, page, owner) in zip(times, events, strict=True):
            if time <= moment:
                pages[page] = owner
        assert value_at(owned, moment) == sum(owner >= 0 for owner in pages.values())
        assert value_at(fenced, moment) == sum(owner == FENCED for owner in pages.values())


def value_at(stairs: Stairs, moment):
    return stairs.values[np.searchsorted(stairs.edges_ns, moment, "right") - 1]


def test_pages_counted_from_events_are_those_that_the_steps_report(run_maker, tmp_path):
    record = RunRecord.load(run_maker(tmp_path, num_requests=30, num_pages=40, rate=30.0, output=80))
    series = record.series
    assert series.preemptions.sum() > 0
    assert (series.page_owner == FREE).any()
    owned, fenced = curves.page_states(series)
    assert [value_at(owned, t) for t in series.start_ns] == series.pages_owned.tolist()
    assert [value_at(fenced, t) for t in series.start_ns] == series.pages_fenced.tolist()


def test_latency_samples_agree_with_the_summary(small_run):
    record = RunRecord.load(small_run)
    for sample, name in (
        (curves.first_token_waits(record.requests), "time_to_first_token_seconds"),
        (curves.token_gaps(record.series), "inter_token_latency_seconds"),
    ):
        assert sample.total == record.number(f"{name}.count")
        for q, figure in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99")):
            assert sample.quantile(q) * 1e-9 == pytest.approx(record.number(f"{name}.{figure}"))
