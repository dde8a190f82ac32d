"""The plan log: what is written can be judged, and what is malformed is named by its line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_attention.plan import EFFECT_KINDS, Effect
from sim.judge import PlanLogError, judge
from sim.planlog import pack
from sim.planlog_lines import effects_of
from sim.run import run
from tests.sim.run_parts import planned_only, scenarios

effects = st.builds(
    Effect,
    st.sampled_from(EFFECT_KINDS),
    st.integers(0, 99),
    st.integers(0, 9),
    slot=st.integers(-1, 9),
    first_page=st.integers(0, 9),
    pages=st.lists(st.integers(1, 99), max_size=3).map(tuple),
    reason=st.sampled_from(["", "eos"]),
)


@given(st.lists(effects))
def test_effects_survive_the_log(made: list[Effect]) -> None:
    assert effects_of({"effects": json.loads(json.dumps(pack(made)))}) == tuple(made)


@settings(max_examples=15, deadline=None)
@given(scenario=scenarios())
def test_a_judged_log_gives_the_trace_of_the_run(scenario: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    log = tmp_path_factory.mktemp("log") / "run.jsonl.gz"
    report = run(scenario, plan_log=log)
    judgement = judge(log)
    assert judgement.complete
    assert judgement.recorder.hash.hexdigest == report.trace_hash
    assert judgement.recorder.hash.step_digests == report.recorder.hash.step_digests
    assert judgement.auditor.violations == []


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    log = tmp_path_factory.mktemp("log") / "run.jsonl"
    run(planned_only(workload__num_requests=4), plan_log=log)
    return log.read_text().splitlines()


def first(lines: list[str], kind: str) -> int:
    return next(index for index, line in enumerate(lines) if kind in json.loads(line))


def edited(lines: list[str], kind: str, change: Callable[[dict[str, Any]], object]) -> tuple[str, int]:
    """The log with its first line of a kind changed, and that line's number."""
    index = first(lines, kind)
    line = json.loads(lines[index])
    change(line)
    return "\n".join([*lines[:index], json.dumps(line), *lines[index + 1 :]]), index + 1


def set_policy(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda line: line["policy"].update({name: value})


def gap(line: dict[str, Any]) -> dict[str, Any]:
    """A line of a plan log in which every request has ten times its id."""
    effects = [[kind, 10 * request, *rest] for kind, request, *rest in line.get("effects", [])]
    changed = {**line, "effects": effects}
    if "submit" in line:
        changed["submit"] = {**line["submit"], "id": 10 * line["submit"]["id"]}
    if "plan" in line:
        changed["plan"] = {**line["plan"], "request": [10 * request for request in line["plan"]["request"]]}
    if "cancel" in line:
        changed["cancel"] = 10 * line["cancel"]
    return changed


def test_a_plan_log_of_an_engine_whose_ids_have_gaps_breaks_nothing(good: list[str], tmp_path: Path) -> None:
    header, *lines = map(json.loads, good)
    path = tmp_path / "gaps.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [{**header, "vocab_size": None}, *map(gap, lines)]))
    judgement = judge(path)
    assert [str(violation) for violation in judgement.auditor.violations] == []
    assert judgement.recorder.num_requests == 4


MALFORMED: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "another schema": ("schema", lambda line: line.update(schema="v0"), "expected a header with schema"),
    "unknown policy": ("policy", lambda line: line["policy"].update(pages=3), "policy: unknown pages; known are"),
    "policy without a size": ("policy", lambda line: line["policy"].pop("page_size"), "page_size"),
    "no page": ("policy", lambda line: line["policy"].update(num_pages=0), "policy.num_pages: expected a whole"),
    "a text for the lag": ("policy", set_policy("lag", "x"), "policy.lag: expected a whole number, found 'x'"),
    "nothing for the lag": ("policy", set_policy("lag", None), "policy.lag: expected a whole number, found None"),
    "an object for a word": (
        "policy",
        set_policy("free_list", {}),
        "policy.free_list: expected 'fifo', 'lifo', 'lowest' or 'any', found {}",
    ),
    "true for a number": (
        "policy",
        set_policy("page_size", True),
        "policy.page_size: expected a whole number, found True",
    ),
    "a number for true": ("policy", set_policy("fence", 1), "policy.fence: expected true or false, found 1"),
    "a list for a number": (
        "policy",
        set_policy("lookahead", []),
        "policy.lookahead: expected a whole number, found []",
    ),
    "a text for a number of tokens": (
        "policy",
        set_policy("max_step_tokens", "x"),
        "policy.max_step_tokens: expected a whole number, found 'x'",
    ),
    "nothing for a number": (
        "policy",
        set_policy("max_prefill_rows", None),
        "policy.max_prefill_rows: expected a whole number, found None",
    ),
    "a batch beyond all bounds": (
        "policy",
        set_policy("batch_size", 2**31),
        "policy.batch_size: expected a whole number from 1 to 65536, found 2147483648",
    ),
    "a pool beyond all bounds": (
        "policy",
        set_policy("num_pages", 2**24 + 1),
        "policy.num_pages: expected a whole number from 1 to 16777216, found 16777217",
    ),
    "a length beyond all bounds": (
        "policy",
        set_policy("max_sequence_length", 2**31 - 1),
        "policy.max_sequence_length: expected a whole number from 1 to 16777216, found 2147483647",
    ),
    "bounds that multiply": (
        "policy",
        lambda line: line["policy"].update(batch_size=2**16, max_sequence_length=2**24),
        "policy: expected batch_size * max_sequence_length of at most 1073741824, found 1099511627776",
    ),
    "pages that multiply": (
        "policy",
        lambda line: line["policy"].update(num_pages=2**24, page_size=2**24),
        "policy: expected num_pages * page_size of at most 1073741824, found 281474976710656",
    ),
    "no vocabulary": (
        "policy",
        lambda line: line.update(vocab_size=0),
        "vocab_size: expected a whole number from 2 to 2147483647, found 0",
    ),
    "time beyond int64": (
        "apply",
        lambda line: line.update(time_ns=10**19),
        f"time_ns: expected a whole number from {-(2**62)} to {2**62}, found {10**19}",
    ),
    "a prompt of less than nothing": (
        "submit",
        lambda line: (line["submit"].pop("prompt"), line["submit"].update(prompt_tokens=-1)),
        "prompt_tokens: expected a whole number from 0 to 16777216, found -1",
    ),
    "a pending request without a number": (
        "end",
        lambda line: line["end"].update(pending={"abc": "x"}),
        "end.pending: expected request ids as keys, found 'abc'",
    ),
    "a pending request without a reason": (
        "end",
        lambda line: line["end"].update(pending={"1": 2}),
        "1: expected a text, found 2",
    ),
    "a step of less than nothing": (
        "plan",
        lambda line: line["plan"].update(count=[-3]),
        "plan.count: expected a sum from 0 to 16777216, found -3",
    ),
    "half a character": (
        "policy",
        set_policy("mix", "\ud800"),
        "policy: expected valid Unicode, found half of a surrogate pair",
    ),
    "no kind": ("plan", lambda line: line.pop("plan"), "expected one of submit, cancel, plan"),
    "no rows": ("plan", lambda line: line["plan"].pop("slot"), "expected the key 'slot'"),
    "too few rows": ("plan", lambda line: line["plan"]["slot"].append(1), "plan.slot: expected 1 entries"),
    "a text for a number": ("plan", lambda line: line["plan"].update(start=["0"]), "start: expected a list of whole"),
    "a number beyond int32": ("plan", lambda line: line["plan"].update(start=[2**31]), "whole numbers (int32)"),
    "a table without rows": ("plan", lambda line: line["plan"].update(table=[]), "plan.table: expected 1 rows"),
    "too many tokens": ("plan", lambda line: line["plan"]["tokens"].append(1), "plan.tokens: expected"),
    "a stranger": ("plan", lambda line: line["plan"].update(request=[99]), "never submitted"),
    "an unknown effect": ("plan", lambda line: line["effects"].append(["moved", 0, 1]), "unknown kind 'moved'"),
    "a short effect": ("plan", lambda line: line["effects"].append(["freed"]), "expected [kind, request, admission"),
    "another step's outcome": ("outcome", lambda line: line["outcome"].update(step=9), "oldest step in flight is 0"),
    "too many outcomes": ("outcome", lambda line: line["outcome"]["token"].append(1), "one per row"),
    "apply before its outcome": ("apply", lambda line: line.update(apply=7), "whose outcome came last"),
    "time that runs backwards": ("apply", lambda line: line.update(time_ns=-1), "time_ns: expected at least"),
    "a request without an id": ("submit", lambda line: line["submit"].pop("id"), "expected the key 'id'"),
    "a negative id": (
        "submit",
        lambda line: line["submit"].update(id=-4),
        "id: expected a whole number from 0 to 2147483647, found -4",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_line_is_named_with_what_is_wrong(case: str, good: list[str], tmp_path: Path) -> None:
    kind, change, message = MALFORMED[case]
    text, number = edited(good, kind, change)
    log = tmp_path / "log.jsonl"
    log.write_text(text)
    with pytest.raises(PlanLogError) as caught:
        judge(log)
    assert str(caught.value).startswith(f"{log}:{number}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ":1: the file is empty"),
        (b"{", ":1: column 2: no JSON"),
        (b"[]", ":1: expected an object, found list"),
        (b"\xff\xfe", ":1: no UTF-8"),
        (b"[" * 200_000, ":1: expected JSON, found lists nested too deeply or a number of thousands of digits"),
        (b"1" * 5000, ":1: expected JSON, found lists nested too deeply or a number of thousands of digits"),
    ],
)
def test_a_file_that_is_no_log_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(content)
    with pytest.raises(PlanLogError) as caught:
        judge(log)
    assert message in str(caught.value)


def test_a_gzip_that_is_cut_short_is_named(good: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl.gz"
    log.write_bytes(gzip.compress("\n".join(good).encode())[:-200])
    with pytest.raises(PlanLogError, match="cut short"):
        judge(log)


def test_a_gz_that_is_no_gzip_is_named(good: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl.gz"
    log.write_text("\n".join(good))
    with pytest.raises(PlanLogError) as caught:
        judge(log)
    assert str(caught.value) == f"{log}: the name ends in .gz, but the file is not gzip; rename or compress it"


def test_nothing_may_follow_the_end(good: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join([*good, good[-1]]))
    with pytest.raises(PlanLogError, match=f":{len(good) + 1}: nothing may follow"):
        judge(log)


def test_a_log_without_an_end_is_judged_so_far(good: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(good[:-5]))
    assert not judge(log).complete
