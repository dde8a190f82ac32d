import itertools
import os
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.plots import PLOTS, draw, page_map, style, timeline
from reports.record import FENCED, FREE, RecordError, RunRecord, Violation

UNITS = re.compile(r"\[(%|s|ms|µs|ns|h|% of owned places)\]$|/ s$|^requests |^preemptions\b|^page id$|^request id\b")
"""What ends in a unit, or is a count or a name and needs none."""


@pytest.fixture(scope="module")
def drawn(run_maker, tmp_path_factory):
    run = run_maker(tmp_path_factory.mktemp("drawn"), name="busy", num_pages=40, rate=12.0, violate_at=60, cancel=(4,))
    return run, draw(run)


@pytest.fixture(scope="module")
def figures(drawn):
    record = RunRecord.load(drawn[0])
    with style.applied():
        made = {plot.stem: plot.figure(record) for plot in PLOTS}
        for figure in made.values():
            style.settle(figure)
    return made


def test_every_plot_is_drawn_as_png_and_svg(drawn):
    run, files = drawn
    assert files == [run / "plots" / f"{plot.stem}.{form}" for plot in PLOTS for form in ("png", "svg")]
    for file in files:
        if file.suffix == ".png":
            assert file.read_bytes().startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(file.read_bytes()).tag.endswith("svg")


def test_the_same_record_gives_the_same_bytes(drawn, tmp_path):
    run, files = drawn
    again = shutil.copytree(run, tmp_path / run.name, ignore=shutil.ignore_patterns("plots"))
    for first, second in zip(files[1::2], draw(again, ("svg",)), strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


@pytest.mark.slow
def test_another_process_with_another_hash_seed_gives_the_same_bytes(drawn, tmp_path):
    run, files = drawn
    again = shutil.copytree(run, tmp_path / run.name, ignore=shutil.ignore_patterns("plots"))
    code = "import sys, pathlib, reports.plots; reports.plots.draw(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(again)], check=True, env={**os.environ, "PYTHONHASHSEED": "4711"})
    for file in files:
        assert file.read_bytes() == (again / "plots" / file.name).read_bytes(), file.name


def test_plots_carry_no_date_and_no_program_version(drawn):
    for file in drawn[1]:
        text = file.read_bytes()
        for word in (b"Software", b"<dc:date>", b"Matplotlib v"):
            assert word not in text, (file.name, word)


@pytest.mark.parametrize("stem", [plot.stem for plot in PLOTS])
def test_every_axis_has_a_unit(figures, stem):
    for axes in figures[stem].axes:
        assert UNITS.search(axes.get_ylabel()), axes.get_ylabel()
        # Axes that share their time axis with those below them are labelled there.
        label = axes.get_xlabel() or figures[stem].axes[-1].get_xlabel()
        assert UNITS.search(label), label


@pytest.mark.parametrize("stem", [plot.stem for plot in PLOTS])
def test_titles_say_which_scenario_and_which_clock(figures, stem):
    texts = [text.get_text() for text in figures[stem].texts]
    assert texts[0]
    assert "scenario busy" in texts[1]
    assert "simulated time" in texts[1]


@pytest.mark.parametrize("stem", [plot.stem for plot in PLOTS])
def test_legends_hide_no_data_and_stay_on_the_page(figures, stem):
    figure = figures[stem]
    page = figure.bbox.padded(1)
    for axes in figure.axes:
        legend = axes.get_legend()
        if legend is not None:
            box = legend.get_window_extent()
            assert not any(box.overlaps(other.bbox) for other in figure.axes)
            assert page.contains(box.x0, box.y0)
            assert page.contains(box.x1, box.y1)


@pytest.mark.parametrize("stem", [plot.stem for plot in PLOTS if plot.stem != "latency"])
def test_a_violation_is_marked_by_its_id_at_its_time(figures, drawn, stem):
    record = RunRecord.load(drawn[0])
    axes = figures[stem].axes[0]
    mark = next(text for text in axes.texts if text.get_text() == "P1 violated")
    assert mark.get_position()[0] == pytest.approx(record.violations[0].time_ns * 1e-9)


def test_a_thousand_violations_leave_the_figure_readable(run_maker, tmp_path):
    record = RunRecord.load(run_maker(tmp_path, violate_at=3))
    times = np.linspace(*np.array([record.series.start_ns[0], record.series.end_ns[-1]]), 1000).astype(int).tolist()
    violations = tuple(type(record.violations[0])(f"P{i % 5}", i, t, "", {}) for i, t in enumerate(times))
    crowded = RunRecord(record.folder, record.scenario, record.summary, violations, record.requests, record.series)
    with style.applied():
        axes = PLOTS[0].figure(crowded).axes[0]
    assert 1 <= len(axes.lines) <= style.MAX_MARKS
    assert 1 <= sum("violated" in text.get_text() for text in axes.texts) <= style.MAX_MARKS


def test_the_label_of_an_early_violation_stays_right_of_the_axis(run_maker, tmp_path):
    record = RunRecord.load(run_maker(tmp_path, violate_at=1))
    with style.applied():
        figure = PLOTS[0].figure(record)
        style.settle(figure)
        figure.canvas.draw()
    axes = figure.axes[0]
    (mark,) = (text for text in axes.texts if "violated" in text.get_text())
    assert mark.get_window_extent().x0 >= axes.get_window_extent().x0


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 9)), max_size=80))
def test_the_first_violation_of_each_statement_is_marked_near_its_time_and_marks_lie_apart(found):
    class Record:
        violations = tuple(Violation(f"P{number}", 0, time_ns, "", {}) for time_ns, number in found)

    marks = style.marked_moments(Record(), style.TimeAxis(0.0, 10_000.0, style.time_unit(1), "simulated"))
    near = style.MARK_WIDTH * 10_000
    assert len(marks) <= style.MAX_MARKS
    assert all(after[0] - before[0] > near for before, after in itertools.pairwise(marks))
    for name in {f"P{number}" for _, number in found}:
        first = min(time_ns for time_ns, number in found if f"P{number}" == name)
        assert 0 <= first - next(moment for moment, ids in marks if name in ids) <= near


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"num_requests": 0}, id="empty"),
        pytest.param({"num_requests": 1, "max_steps": 1}, id="one step"),
        pytest.param({"num_requests": 3, "base_ns": 0, "token_ns": 0}, id="no time passes"),
        pytest.param({"num_requests": 1}, id="one request", marks=pytest.mark.slow),
        pytest.param({"num_requests": 3, "num_pages": 3}, id="all rejected", marks=pytest.mark.slow),
        pytest.param({"num_requests": 60, "rate": 300.0, "max_steps": 40}, id="stopped early", marks=pytest.mark.slow),
    ],
)
def test_odd_runs_are_drawn_too(run_maker, tmp_path, shape):
    run = run_maker(tmp_path, **shape)
    files = draw(run, ("svg",))
    assert len(files) == len(PLOTS)
    for file in files:
        assert b"nan" not in file.read_bytes().lower().split(b"<image")[0]


def test_an_unknown_format_is_refused_with_those_that_exist(small_run):
    with pytest.raises(RecordError, match=r"unknown plot format 'pdf'; choose among png, svg"):
        draw(small_run, ("pdf",))


def test_plots_that_cannot_be_written_are_named(run_maker, tmp_path):
    run = run_maker(tmp_path, num_requests=0)
    (run / "plots").write_text("in the way")
    with pytest.raises(FileExistsError, match=r"page_usage\.png"):
        draw(run)


def test_every_colour_is_told_apart_from_every_other():
    palette = np.round(page_map.colours(), 3)
    assert len(np.unique(palette, axis=0)) == len(palette) == len(page_map.HUES) * len(page_map.TINTS)
    assert not (palette == 1.0).all(axis=1).any()
    assert not (palette == 0.0).all(axis=1).any()


def test_the_page_map_is_what_the_events_say_page_by_page(small_run):
    series = RunRecord.load(small_run).series
    time = style.TimeAxis(float(series.start_ns[0]), float(series.end_ns[-1]), style.time_unit(1e9), "simulated")
    times, pages = page_map.grid(series, time)
    assert pages.tolist() == list(range(1, series.num_pages))
    shown = page_map.owners(series, times, pages)
    state, event = dict.fromkeys(pages.tolist(), FREE), 0
    for column, moment in enumerate(times):
        while event < len(series.page_id) and series.page_time_ns[event] <= moment:
            state[int(series.page_id[event])] = int(series.page_owner[event])
            event += 1
        assert shown[:, column].tolist() == [state[p] for p in pages.tolist()]
    assert (shown == FENCED).any()


@settings(deadline=None)
@given(st.integers(2, 5000))
def test_sampled_pages_are_distinct_ordered_and_in_the_pool(num_pages):
    class Pool:
        allocatable_pages = num_pages - 1

    _, pages = page_map.grid(Pool(), style.TimeAxis(0.0, 1.0, style.time_unit(1), "simulated"))
    assert len(pages) == min(num_pages - 1, page_map.GRID_PAGES)
    assert pages[0] >= 1
    assert pages[-1] < num_pages
    assert (np.diff(pages) > 0).all()


@settings(deadline=None)
@given(st.integers(1, 10_000), st.integers(2, 60))
def test_a_sample_of_requests_is_spread_from_the_first_to_the_last(count, most):
    chosen = timeline.spread(count, most)
    assert len(chosen) == min(count, most)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    if count > 1:
        assert np.diff(chosen).max() - np.diff(chosen).min() <= 1


def test_the_timeline_draws_each_segment_of_the_chosen_requests_in_its_row(small_run):
    record = RunRecord.load(small_run)
    chosen = np.array([7, 2, 11])
    row, segment = timeline.rows_of_segments(record.requests, record.series, chosen)
    drawn = {(int(chosen[r]), int(record.series.seg_start_ns[s])) for r, s in zip(row, segment, strict=True)}
    wanted = {
        (int(r), int(start))
        for r, start in zip(record.series.seg_request, record.series.seg_start_ns, strict=True)
        if int(r) in (7, 2, 11)
    }
    assert drawn == wanted
    assert len(row) == len(wanted) > 3


def test_a_long_timeline_says_which_requests_it_shows(run_maker, tmp_path):
    record = RunRecord.load(run_maker(tmp_path, num_requests=90, rate=40.0, num_pages=300, batch_size=32))
    with style.applied():
        figure = timeline.figure(record)
    titles = [axes.get_legend().get_title().get_text() for axes in figure.axes]
    assert titles[0].startswith("40 of 90 requests,\nneighbours by arrival")
    assert titles[1].startswith("40 of 90 requests,\nevenly spread")
    order = np.lexsort((record.requests.id, record.requests.arrival_ns))
    chosen, why = timeline.busiest(record, order)
    assert why == "at the busiest moment"
    assert np.diff(np.searchsorted(record.requests.arrival_ns[order], record.requests.arrival_ns[chosen])).tolist() == [
        1
    ] * (len(chosen) - 1)
