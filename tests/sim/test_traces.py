"""Trace files: each format read and written, times exact to the nanosecond, errors with file, row and column."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate, islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.workload import Arrival, TraceError, generate, read_lengths, read_trace, write_trace
from sim.workload.rows import clock_ns, decimal_ns
from sim.workload.shipped import shipped_traces, write_shipped
from tests.sim.scenario_parts import small

LIBRARY = Path(__file__).parents[2] / "scenarios" / "traces"
FORMATS = ("azure", "burstgpt", "mooncake", "vidur", "jsonl")
TICK_NS = {"azure": 100, "burstgpt": 10**9, "mooncake": 10**6, "vidur": 1, "jsonl": 1}
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(form: str, text: str | bytes) -> str:
    Path("t").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TraceError) as caught:
        list(read_trace(form, "t"))
    (problem,) = caught.value.problems
    return problem


gaps = st.lists(st.integers(0, 10**13), min_size=1, max_size=8)
tokens = st.integers(1, 10**6)


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    times = list(accumulate(draw(gaps)))
    return [
        Arrival(time, i, draw(tokens), draw(tokens), tuple(draw(st.lists(st.integers(0, 99), min_size=1, max_size=3))))
        for i, time in enumerate(times)
    ]


@pytest.mark.parametrize("form", FORMATS)
@given(written=arrivals())
@settings(max_examples=25, deadline=None)
def test_what_is_written_is_read_back_to_the_tick_of_the_format(
    form: str, written: list[Arrival], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"trace-{form}"
    write_trace(form, path, written)
    tick = TICK_NS[form]
    origin = written[0].time_ns // tick * tick if form in {"azure", "burstgpt"} else 0
    kept = form in {"mooncake", "jsonl"}
    expected = [
        a._replace(time_ns=a.time_ns // tick * tick - origin, prefix_hashes=a.prefix_hashes if kept else ())
        for a in written
    ]
    assert list(read_trace(form, path)) == expected


@given(st.integers(0, 10**15), st.integers(0, 6))
def test_decimal_digits_become_nanoseconds_half_to_even_without_a_float(whole: int, digits: int) -> None:
    text = f"{whole // 10**digits}.{whole % 10**digits:0{digits}d}" if digits else str(whole)
    unit = 9 if whole < 10**9 else 3
    assert decimal_ns(text, unit) == round(Fraction(whole, 10**digits) * 10**unit)


def test_a_binary_float_printed_in_full_rounds_to_the_nanosecond_it_meant() -> None:
    assert decimal_ns("5.8926549999999995", 9) == 5_892_655_000


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "inf", "1e999999999", "1e19", "0x10"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        decimal_ns(text, 9)


def test_azure_clocks_cross_midnight_and_years() -> None:
    before, after = clock_ns("2023-12-31 23:59:59.9999999"), clock_ns("2024-01-01T00:00:00Z")
    assert after - before == 100
    assert clock_ns("2024-05-10 00:00:00.009930+00:00") % 10**9 == 9_930_000


@pytest.mark.usefixtures("folder")
def test_a_byte_order_mark_and_any_line_end_are_fine() -> None:
    rows = ["arrived_at,num_prefill_tokens,num_decode_tokens", "0,1,2", "1,3,4", ""]
    for end in ("\n", "\r\n"):
        Path("t").write_bytes(b"\xef\xbb\xbf" + end.join(rows).encode())
        assert list(read_trace("vidur", "t")) == [Arrival(0, 0, 1, 2), Arrival(10**9, 1, 3, 4)]


@pytest.mark.usefixtures("folder")
def test_azure_is_rebased_to_its_first_row() -> None:
    Path("t").write_bytes(
        (AZURE + "2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.0319600,3180,8\r\n").encode()
    )
    assert list(read_trace("azure", "t")) == [Arrival(0, 0, 4808, 10), Arrival(52_000_000, 1, 3180, 8)]


@pytest.mark.usefixtures("folder")
def test_failed_calls_are_skipped_and_counted_and_the_rest_numbered_without_gaps() -> None:
    Path("t").write_text(BURST + "5,A,472,18,490,C\n45,A,0,0,0,C\n46,A,9,0,9,C\n118,B,417,276,693,C\n")
    skipped: dict[str, int] = {}
    assert list(read_trace("burstgpt", "t", skipped=skipped)) == [
        Arrival(0, 0, 472, 18),
        Arrival(113 * 10**9, 1, 417, 276),
    ]
    assert skipped == {"0 prompt or output tokens": 2}


@pytest.mark.usefixtures("folder")
def test_mooncake_keeps_its_prefix_hashes_and_milliseconds() -> None:
    Path("t").write_text(
        '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]}\n\n'
        '{"timestamp": 2.5, "input_length": 1, "output_length": 1, "hash_ids": []}\n'
    )
    assert list(read_trace("mooncake", "t")) == [Arrival(0, 0, 600, 5, (7, 8)), Arrival(2_500_000, 1, 1, 1)]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("line", "time_ns"),
    [
        ({"arrival_time_ns": 46926808, "input_toks": 3, "output_toks": 4}, 46926808),
        ({"arrival_time_ms": 1.5, "input_tokens": 3, "output_tokens": 4}, 1_500_000),
        ({"arrival_time": 0.25, "prompt_len": 3, "output_len": 4}, 250_000_000),
        ({"timestamp": 61.114, "input_length": 3, "output_length": 4, "chat_id": 9}, 61_114_000_000),
        ({"arrived_at": 2, "num_prefill_tokens": 3, "num_decode_tokens": 4}, 2 * 10**9),
        ({"arrival_time": 1, "prompt_tokens": 3, "max_tokens": 4}, 10**9),
    ],
)
def test_timed_jsonl_takes_the_field_names_in_use(line: dict[str, object], time_ns: int) -> None:
    Path("t").write_text(json.dumps(line))
    assert list(read_trace("jsonl", "t")) == [Arrival(time_ns, 0, 3, 4)]


@pytest.mark.usefixtures("folder")
def test_scale_and_limit_are_exact() -> None:
    Path("t").write_text(VIDUR + "".join(f"{i}.1,1,1\n" for i in range(9)) + "broken\n")
    times = [arrival.time_ns for arrival in read_trace("vidur", "t", time_scale=0.1, limit=9)]
    assert times == [i * 10**8 + 10**7 for i in range(9)]
    assert list(read_trace("vidur", "t", time_scale=0, limit=2)) == [Arrival(0, 0, 1, 1), Arrival(0, 1, 1, 1)]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("form", "text", "problem"),
    [
        (
            "azure",
            AZURE + "2023-11-16 18:17:03.9,4808,10\r\n2023-11-16 18:17:04.0,x,10\r\n",
            "t:3: row 2, column ContextTokens: expected a whole number of tokens, found 'x'",
        ),
        (
            "azure",
            AZURE + "16.11.2023 18:17,4808,10\r\n",
            "t:2: row 1, column TIMESTAMP: expected a time like 2023-11-16 18:17:03.9799600, found '16.11.2023 18:17'",
        ),
        (
            "azure",
            AZURE + "2023-02-30 18:17:03.9,4808,10\r\n",
            "t:2: row 1, column TIMESTAMP: expected a time like 2023-11-16 18:17:03.9799600, "
            "found '2023-02-30 18:17:03.9'",
        ),
        (
            "azure",
            AZURE + "2023-11-16 18:17:03.9,4808,10\r\n2023-11-16 18:17:03.8,1,1\r\n",
            "t:3: row 2: it arrives 0.1 s before the row above: sort the file by time",
        ),
        (
            "azure",
            "TIMESTAMP,ContextTokens\n",
            "t:1: the header lacks GeneratedTokens: expected ContextTokens, GeneratedTokens, TIMESTAMP, "
            "found TIMESTAMP, ContextTokens",
        ),
        (
            "vidur",
            "",
            "t:1: the header lacks num_prefill_tokens and num_decode_tokens and arrived_at: expected "
            "num_prefill_tokens, num_decode_tokens, arrived_at, found nothing",
        ),
        ("vidur", VIDUR + "0.5,1\n", "t:2: row 1: expected 3 cells, found 2"),
        (
            "vidur",
            VIDUR + "\n0,1,1\n0.5,-1,1\n",
            "t:4: row 2, column num_prefill_tokens: expected a whole number of tokens, found '-1'",
        ),
        (
            "vidur",
            VIDUR + "0.5,1,4294967296\n",
            "t:2: row 1, column num_decode_tokens: expected a whole number of tokens up to 2147483647, "
            "found 4294967296",
        ),
        ("vidur", VIDUR + "soon,1,1\n", "t:2: row 1, column arrived_at: expected a number of seconds, found 'soon'"),
        (
            "burstgpt",
            BURST + "-5,A,1,1,2,C\n",
            "t:2: row 1, column Timestamp: expected a number of seconds, found '-5'",
        ),
        (
            "burstgpt",
            (BURST + "5,A,1,1,2,C\n5,caf").encode() + b"\xe9,1,1,2,C\n",
            "t:3: the trace is not UTF-8 text: invalid continuation byte",
        ),
        (
            "mooncake",
            '{"timestamp": 0}\n',
            "t:1: row 1: no prompt length: expected one of the fields input_length, found timestamp",
        ),
        ("mooncake", '{"timestamp": 0\n', "t:1: row 1: not JSON: Expecting ',' delimiter at column 16"),
        ("mooncake", "[1]\n", "t:1: row 1, column all: expected a JSON object, found [1]"),
        (
            "mooncake",
            '{"timestamp": 0, "input_length": 3.5, "output_length": 1}\n',
            "t:1: row 1, column input_length: expected a whole number of tokens, found 3.5",
        ),
        (
            "mooncake",
            '{"timestamp": 0, "input_length": true, "output_length": 1}\n',
            "t:1: row 1, column input_length: expected a whole number of tokens, found True",
        ),
        (
            "mooncake",
            '{"timestamp": "0", "input_length": 3, "output_length": 1}\n',
            "t:1: row 1, column timestamp: expected a number, 0 or more, found '0'",
        ),
        (
            "mooncake",
            '{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [1, "a"]}\n',
            "t:1: row 1, column hash_ids: expected a list of whole numbers, found [1, 'a']",
        ),
        ("jsonl", '{"arrival_time": NaN}\n', "t:1: row 1: not JSON: NaN is not a number"),
        (
            "jsonl",
            '{"input_toks": 1, "output_toks": 1}\n',
            "t:1: row 1: no arrival time: expected one of the fields arrival_time_ns, arrival_time_ms, arrival_time, "
            "arrived_at, timestamp, found input_toks, output_toks",
        ),
    ],
)
def test_a_corrupt_trace_names_file_line_row_and_column(form: str, text: str | bytes, problem: str) -> None:
    assert refusal(form, text) == problem


@pytest.mark.usefixtures("folder")
def test_a_missing_trace_and_an_empty_one_are_one_line_before_the_run() -> None:
    with pytest.raises(TraceError, match=r"^nowhere: cannot read the trace: No such file or directory$"):
        next(read_trace("azure", "nowhere"))
    trace = {"kind": "trace", "format": "vidur", "path": "t"}
    Path("t").write_text(VIDUR + "0,0,5\n")
    with pytest.raises(TraceError, match=r"^t: there is no request in the trace$"):
        generate(small(workload__arrivals=trace))
    with pytest.raises(TraceError, match=r"^t: no row has both a prompt and an output length$"):
        read_lengths("vidur", "t")
    Path("t").write_text(VIDUR + "x,1,5\n")
    with pytest.raises(TraceError, match=r"^t:2: row 1, column arrived_at"):
        generate(small(workload__arrivals=trace))


@pytest.mark.usefixtures("folder")
def test_a_trace_brings_lengths_unless_the_workload_gives_them() -> None:
    write_trace("mooncake", "t", [Arrival(0, 0, 9, 3, (5,)), Arrival(10**6, 1, 8, 2, (5,))])
    trace = {"kind": "trace", "format": "mooncake", "path": "t"}
    both = small(workload__arrivals=trace, workload__prompt_tokens=None, workload__output_tokens=None)
    assert list(generate(both)) == [Arrival(0, 0, 9, 3, (5,)), Arrival(10**6, 1, 8, 2, (5,))]
    fixed = small(
        workload__arrivals=trace, workload__prompt_tokens={"kind": "fixed", "value": 4}, workload__output_tokens=None
    )
    assert list(generate(fixed)) == [Arrival(0, 0, 4, 3), Arrival(10**6, 1, 4, 2)]


@pytest.mark.usefixtures("folder")
def test_num_requests_and_limit_both_bound_a_trace() -> None:
    write_trace("vidur", "t", [Arrival(i, i, 1, 1) for i in range(9)])
    for count, limit, total in [(None, 4, 4), (3, 4, 3), (5, 4, 4), (3, None, 3), (50, None, 50)]:
        trace = {"kind": "trace", "format": "vidur", "path": "t", "limit": limit}
        workload = generate(small(workload__arrivals=trace, workload__num_requests=count))
        assert workload.total == total
        assert len(list(workload)) == min(total, 9)


@pytest.mark.usefixtures("folder")
def test_a_long_trace_is_read_in_bounded_memory() -> None:
    def peak(rows: int) -> int:
        def lines() -> Iterator[Arrival]:
            return (Arrival(i * 1000, i, 100 + i % 7, 10) for i in range(rows))

        write_trace("azure", "t", lines())
        tracemalloc.start()
        try:
            assert sum(arrival.prompt_tokens > 0 for arrival in read_trace("azure", "t")) == rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(20_000) < peak(2_000) + 20_000


def test_the_shipped_traces_are_what_the_generator_writes(tmp_path: Path) -> None:
    write_shipped(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shipped = {path.name: path.read_bytes() for path in LIBRARY.iterdir()}
    assert written == shipped


def test_the_shipped_traces_cover_every_format_and_its_peculiarities() -> None:
    assert {form for form, _ in shipped_traces().values()} == set(FORMATS)
    skipped: dict[str, int] = {}
    burst = list(read_trace("burstgpt", LIBRARY / "burstgpt-small.csv", skipped=skipped))
    assert (len(burst), sum(skipped.values())) == (95, 5)
    chats = list(read_trace("mooncake", LIBRARY / "mooncake-small.jsonl"))
    assert all(len(chat.prefix_hashes) == -(-chat.prompt_tokens // 512) for chat in chats)
    seen: set[int] = set()
    hits = 0
    for chat in chats:
        hits += sum(page in seen for page in chat.prefix_hashes)
        seen.update(chat.prefix_hashes)
    assert hits > 20


PUBLIC = [
    ("azure", "azure2023_conv_first6000.csv", 6000, 0, (1151, 14_050), (253, 1000)),
    ("azure", "azure2023_code_first3000.csv", 3000, 0, (2006, 7437), (28, 1899)),
    ("mooncake", "mooncake_fast25_conversation_first3000.jsonl", 3000, 0, (13_517, 123_192), (350, 2000)),
    ("mooncake", "mooncake_fast25_synthetic_first1000.jsonl", 1000, 0, (11_852, 134_773), (196, None)),
    ("burstgpt", "burstgpt1_first100.csv", 95, 5, None, None),
    ("vidur", "vidur_splitwise_conv_first2000.csv", 2000, 0, None, None),
    ("jsonl", "llmservingsim_sharegpt_llama31_300_lengths.jsonl", 300, 0, (857, None), (653, None)),
]


@pytest.fixture
def public() -> Path:
    folder = os.environ.get("KVPROOF_TRACES")
    if not folder:
        pytest.skip("KVPROOF_TRACES names no folder with public trace extracts")
    return Path(folder)


@pytest.mark.parametrize(("form", "name", "rows", "failed", "prompt", "output"), PUBLIC, ids=lambda value: value)
def test_public_traces_have_the_published_figures(
    public: Path,
    form: str,
    name: str,
    rows: int,
    failed: int,
    prompt: tuple[int, int | None] | None,
    output: tuple[int, int | None] | None,
) -> None:
    skipped: dict[str, int] = {}
    read = list(read_trace(form, public / name, skipped=skipped))
    assert (len(read), sum(skipped.values())) == (rows, failed)
    for figures, lengths in [(prompt, [a.prompt_tokens for a in read]), (output, [a.output_tokens for a in read])]:
        if figures is not None:
            assert sum(lengths) / rows == pytest.approx(figures[0], abs=1)
            assert figures[1] is None or max(lengths) == figures[1]


def test_the_public_azure_trace_and_its_vidur_form_are_the_same_requests(public: Path) -> None:
    azure = islice(read_trace("azure", public / "azure2023_conv_first6000.csv"), 2000)
    vidur = list(read_trace("vidur", public / "vidur_splitwise_conv_first2000.csv"))
    for ours, theirs in zip(azure, vidur, strict=True):
        assert ours[1:] == theirs[1:]
        assert abs(ours.time_ns - theirs.time_ns) <= 1000


def test_public_lengths_without_times_can_be_drawn_from(public: Path) -> None:
    prompt, output = read_lengths("vidur", public / "vidur_arxiv_lengths_first5000.csv")
    assert len(prompt) == len(output) == 5000
    assert (prompt + output).max() <= 4096
