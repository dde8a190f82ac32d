"""The search: what is drawn is legal and repeatable, what breaks is found, and what is found is shrunk and replayed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sim.cli import main
from sim.mutants import MUTANTS
from sim.scenario import Scenario, load_scenario
from sim.search.bold import bold_moves, operations_of, requests_of
from sim.search.campaign import can_be_shown, hunt
from sim.search.concrete import concrete
from sim.search.failure import as_regression, failure_text
from sim.search.fuzz import FuzzOptions, fuzz, work
from sim.search.probe import probe
from sim.search.shrink import NothingToShrinkError, Shrunk, shrink
from sim.search.swarm import DEVICE_SETUPS, SETUP_FOR, Limits, draw
from tests.sim.run_parts import planned_only, replayed_elsewhere
from tests.sim.scenario_parts import ids_from


def planted(scenario: Scenario, mutant: str | None) -> Scenario:
    return scenario.model_copy(update={"plant": mutant})


def first_broken(mutant: str, seed: int = 3) -> Scenario:
    small = Limits(max_requests=6)
    candidates = (planted(draw(seed, number, limits=small), mutant) for number in range(300))
    return next(scenario for scenario in candidates if probe(scenario).id)


def test_a_scenario_of_the_search_is_the_same_wherever_it_is_drawn() -> None:
    program = (
        "from sim.search.swarm import draw; from sim.scenario import scenario_hash; print(scenario_hash(draw(4, 9)))"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(hashes) == 1
    assert draw(4, 9) != draw(4, 10)


def test_nothing_breaks_in_the_first_scenarios_of_the_unmodified_core() -> None:
    findings = [probe(draw(1, number)) for number in range(25)]
    assert [finding.message for finding in findings if finding.id] == []
    assert sum(finding.plans for finding in findings) > 500


def test_extremes_are_drawn() -> None:
    drawn = [draw(0, number) for number in range(400)]
    assert {s.core.lag for s in drawn} == {0, 1, 2}
    assert {s.core.mix for s in drawn} == {"mixed", "prefill_first", "decode_first"}
    assert min(s.cache.num_pages for s in drawn) == 2
    assert min(s.cache.page_size for s in drawn) == 1
    assert min(s.core.batch_size for s in drawn) == 1
    assert min(s.core.prefill_chunk for s in drawn) == 1
    kinds = {fault.kind for s in drawn for fault in s.faults}
    assert kinds == {"cancel", "fail", "fork", "poll", "resubmit", "stall"}


def test_a_scenario_spelled_out_breaks_the_same_statement() -> None:
    scenario = planned_only(workload__num_requests=12, plant="MP04", invariants={"full_every": 1})
    spelled_out, finding = concrete(scenario)
    assert finding.id == "P2"
    assert spelled_out.workload.arrivals.kind == "script"
    assert probe(spelled_out).id == "P2"


def smaller_by_one(scenario: Scenario) -> list[dict[str, Any]]:
    """The scenario without each single request or fault."""
    data = scenario.model_dump(by_alias=True)
    requests = data["workload"]["arrivals"]["requests"]
    found: list[dict[str, Any]] = []
    if not any(fault["kind"] == "cancel" for fault in data["faults"]) and len(requests) > 1:
        for gone in range(len(requests)):
            arrivals = {"kind": "script", "requests": [r for at, r in enumerate(requests) if at != gone]}
            found.append({**data, "workload": {**data["workload"], "arrivals": arrivals}})
    for gone in range(len(data["faults"])):
        found.append({**data, "faults": [f for at, f in enumerate(data["faults"]) if at != gone]})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["MS06", "MS31"])
def test_no_operation_of_a_shrunk_scenario_can_be_left_out(mutant: str) -> None:
    shrunk = shrink(first_broken(mutant))
    smaller = [Scenario.model_validate(data) for data in smaller_by_one(shrunk.scenario)]
    assert smaller
    assert all(probe(candidate).id != shrunk.finding.id for candidate in smaller)


def test_a_scenario_that_holds_cannot_be_shrunk() -> None:
    with pytest.raises(NothingToShrinkError, match="nothing to shrink"):
        shrink(draw(1, 1))


@pytest.fixture(scope="module")
def shrunk() -> Shrunk:
    return shrink(first_broken("MT10"))


def test_what_breaks_is_shrunk_to_a_few_operations_and_breaks_the_same_statement_first(shrunk: Shrunk) -> None:
    before, again = probe(first_broken("MT10")), probe(shrunk.scenario)
    assert (again.id, again.step, again.trace_hash) == (before.id, shrunk.finding.step, shrunk.finding.trace_hash)
    assert shrunk.num_requests <= 4
    assert shrunk.num_operations <= 12


def test_a_failure_file_loads_as_the_scenario_that_was_shrunk(shrunk: Shrunk, tmp_path: Path) -> None:
    path = tmp_path / "failure.yaml"
    path.write_text(failure_text(shrunk))
    assert load_scenario(path) == as_regression(shrunk)


def test_a_failure_file_is_replayed_bit_for_bit_in_two_other_processes(shrunk: Shrunk, tmp_path: Path) -> None:
    path = tmp_path / "failure.yaml"
    path.write_text(failure_text(shrunk))
    for seed in (1, 2):
        status, found = replayed_elsewhere(path, hash_seed=seed)
        assert (status, found["same"], found["trace_hash"]) == (0, True, shrunk.finding.trace_hash)


def test_a_failure_file_passes_as_long_as_it_breaks_like_that_and_fails_once_it_is_fixed(
    shrunk: Shrunk, tmp_path: Path
) -> None:
    path = tmp_path / "failure.yaml"
    path.write_text(failure_text(shrunk))
    for plant, status in (("MT10", 0), ("MP04", 1)):
        out = str(tmp_path / plant)
        with pytest.raises(SystemExit) as end:
            main(["run", str(path), "--set", f"plant={plant}", "--no-plots", "-q", "--out", out])
        assert end.value.code == status


def test_shrinking_a_file_keeps_the_comments_of_what_is_left(tmp_path: Path) -> None:
    path, out = tmp_path / "mine.yaml", tmp_path / "small.yaml"
    path.write_text(
        "# mine\nschema: kvproof/v1\nname: mine\ncore: {batch_size: 4, prefill_chunk: 5}\n"
        "cache:\n  page_size: 3 # small pages\n  num_pages: 14\n  max_sequence_length: 36\n"
        "backend: {kind: none}\nworkload:\n  arrivals:\n    kind: script\n    requests:\n"
        "      - {prompt_tokens: 3, output_tokens: 2} # the first\n"
        "      - {prompt_tokens: 9, output_tokens: 4} # the second\n"
        "cost: {kind: fixed, step_ns: 1e3}\nplant: MP04\n"
    )
    with pytest.raises(SystemExit) as end:
        main(["shrink", str(path), "--out", str(out), "-q"])
    text = out.read_text()
    assert end.value.code == 0
    assert "# mine" in text
    assert "# small pages" in text
    assert text.count("# the ") == 1
    assert load_scenario(out).expect.first is not None


def test_jobs_and_shards_share_the_same_scenarios() -> None:
    options = FuzzOptions(seed=2, runs=6)
    whole = work(options, 0, 0, 1, 6, 1e9)
    parts = [work(options, job, job, 2, 3, 1e9) for job in (0, 1)]
    assert whole.plans == sum(part.plans for part in parts)


def test_the_fuzzer_writes_a_minimal_file_for_each_statement_that_breaks(tmp_path: Path) -> None:
    result = fuzz(FuzzOptions(seed=1, runs=3, plant="MP04", seconds=1e9), tmp_path, lambda result: None)
    found = result.to_json(0.4)
    assert result.canary_caught
    assert [violation["id"] for violation in found["violations"]] == sorted(result.shrunk)
    assert all(Path(violation["file"]).is_file() for violation in found["violations"])
    assert found["violations"]


@pytest.fixture
def search(capsys: pytest.CaptureFixture[str]) -> Any:
    """`kvproof fuzz` with some flags; its status and what it says."""

    def call(*flags: str) -> tuple[int, dict[str, Any]]:
        with pytest.raises(SystemExit) as end:
            main(["fuzz", "--json", "-q", *flags])
        return int(end.value.code or 0), json.loads(capsys.readouterr().out)

    return call


def test_a_search_goes_on_where_it_ended_and_still_tells_what_it_found_before(search: Any, tmp_path: Path) -> None:
    status, first = search("--runs", "3", "--seed", "7", "--out", str(tmp_path))
    assert (status, first["searched"], first["violations"]) == (0, 3, [])
    earlier = {"id": "Q1", "file": "Q1.yaml"}
    met = {**first["sometimes"], "two-victims": 1000}
    (tmp_path / "fuzz.json").write_text(json.dumps({**first, "violations": [earlier], "sometimes": met}))
    status, second = search("--runs", "2", "--resume", str(tmp_path))
    assert (status, second["searched"], second["seed"]) == (1, 5, 7)
    assert second["violations"] == [earlier]
    assert second["sometimes"]["two-victims"] >= 1000
    assert second == json.loads((tmp_path / "fuzz.json").read_text())


def test_a_search_that_ctrl_c_ends_says_what_it_did_and_goes_on_from_there(
    search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_turn(*arguments: Any, **options: Any) -> Any:
        if turns:
            raise KeyboardInterrupt
        turns.append(work(*arguments, **options))
        return turns[0]

    turns: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr("sim.search.fuzz.SLICE_SECONDS", 0.01)
        patch.setattr("sim.search.fuzz.work", one_turn)
        status, first = search("--runs", "500", "--seed", "7", "--out", str(tmp_path))
    assert (status, first["interrupted"], first["searched"]) == (130, True, turns[0].done)
    status, second = search("--runs", "2", "--resume", str(tmp_path))
    assert (status, second["interrupted"], second["searched"]) == (0, False, turns[0].done + 2)


def test_what_ctrl_c_keeps_from_being_shrunk_is_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("sim.search.fuzz.shrink", interrupted)
    result = fuzz(FuzzOptions(seed=1, runs=3, plant="MP04", seconds=1e9), tmp_path, lambda result: None)
    assert (result.interrupted, result.searched, result.shrunk) == (True, 0, {})


@pytest.mark.parametrize(
    "option", [["--seed", "8"], ["--core", "mine"], ["--plant", "MP05"], ["--shard", "1/2"], ["--out", "other"]]
)
def test_a_resumed_search_refuses_what_it_did_not_begin_with(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"seed": 7, "shard": "2/2", "searched": 3, "backend": "none", "plant": None, "core": "paged_attention"}
    (tmp_path / "fuzz.json").write_text(json.dumps({**state, "violations": [], "sometimes": {}}))
    with pytest.raises(SystemExit) as end:
        main(["fuzz", "--resume", str(tmp_path), *option])
    assert end.value.code == 2
    assert "goes on with what it began with" in " ".join(capsys.readouterr().err.split())


def test_a_search_counts_the_situations_that_it_met() -> None:
    counted = work(FuzzOptions(seed=2, runs=5), 0, 0, 1, 5, 1e9).sometimes
    assert counted["all-slots-used"] > 0
    assert counted["end-by-max-tokens"] > 0


def test_a_single_request_that_ends_by_eos_is_shrunk() -> None:
    data = draw(1, 1).model_dump(by_alias=True)
    requests = [{"prompt_tokens": 2, "output_tokens": 5, "eos_after": 2}]
    data |= {"faults": [], "plant": "MP04", "workload": {"arrivals": {"kind": "script", "requests": requests}}}
    assert shrink(Scenario.model_validate(data)).num_operations == 1


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("sizes", [True, False])
def test_a_bold_move_takes_one_operation_away_and_what_names_a_request_still_does(number: int, sizes: bool) -> None:
    data = ids_from(7, draw(6, number, limits=Limits(max_requests=5))).model_dump(by_alias=True)
    data["faults"] = list(data["faults"])
    before = len(operations_of(data))
    for moved, kept in bold_moves(data, sizes=sizes):
        assert len(operations_of(moved)) < before
        assert len(kept) == len(requests_of(moved))
        assert all(7 <= fault.get("request", 7) < 7 + len(kept) for fault in moved["faults"])
        assert sizes or (moved["core"], moved["cache"]) == (data["core"], data["cache"])


def test_device_set_ups_are_few_and_each_comes_up() -> None:
    drawn = [draw(0, number, backend="jax") for number in range(SETUP_FOR * len(DEVICE_SETUPS))]
    shapes = {f"{s.cache} {s.core.batch_size} {s.core.prefill_chunk} {s.model} {s.backend}" for s in drawn}
    assert len(shapes) == len(DEVICE_SETUPS) <= 8
    assert {s.model.kind for s in drawn} == {"reader", "tiny", "echo"}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["MP30", "MT10", "MS16", "MS26", "MI02", "MI05", "SEED-22", "KS01", "MD09"])
def test_a_planted_bug_is_found_without_a_hint_and_shrinks_to_a_few_operations(mutant: str) -> None:
    # Pools so wide that MP30 can show are rare: from seed 0 it takes 247 scenarios.
    found = hunt(mutant, 1 if mutant == "MP30" else 0, seconds=1e9, runs=400)
    assert found.id
    assert found.replayed
    assert found.is_small


def test_a_stuck_run_names_each_unfinished_request_and_why() -> None:
    data = draw(1, 1).model_dump(by_alias=True)
    requests = [{"prompt_tokens": 2, "output_tokens": 3}] * 3
    data |= {"faults": [], "plant": "KP06", "workload": {"arrivals": {"kind": "script", "requests": requests}}}
    data["core"] |= {"batch_size": 1, "mix": "mixed", "lag": 0}
    data["cache"] |= {"page_size": 4, "num_pages": 9, "max_sequence_length": 8}
    finding = probe(Scenario.model_validate(data))
    assert finding.id == "S11"
    assert "request 1: waits for a slot" in finding.message
    assert "request 2: waits for a slot" in finding.message


def test_a_crash_is_shrunk_to_the_same_class_of_error_and_its_file_replays(tmp_path: Path) -> None:
    options = FuzzOptions(seed=1, seconds=1e9, plant="MS24", stop="first")
    result = fuzz(options, tmp_path, lambda result: None)
    ((pin, (number, shrunk)),) = result.shrunk.items()
    before = probe(planted(draw(1, number), "MS24"))
    assert before.id == shrunk.finding.id == "crash"
    assert pin == before.pin == shrunk.finding.pin == f"crash-{before.cause}"
    assert before.cause
    assert shrunk.num_requests <= 4
    assert shrunk.num_operations <= 12
    with pytest.raises(SystemExit) as end:
        main(["replay", str(result.files[pin]), "-q"])
    assert end.value.code == 0


def test_a_hunt_is_what_the_command_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = hunt("MP04", 5)
    with pytest.raises(SystemExit) as end:
        main(["fuzz", "--plant", "MP04", "--seed", "5", "--stop", "first", "--json", "-q", "--out", str(tmp_path)])
    assert end.value.code == 1
    told = json.loads(capsys.readouterr().out)
    (violation,) = told["violations"]
    assert (told["scenarios"], violation["id"]) == (found.scenarios, found.id)
    assert (violation["requests"], violation["operations"]) == (found.requests, found.operations)
    assert found.replayed


def test_nobody_complains_about_legal_variants_in_what_the_search_draws() -> None:
    variants = [mutant for mutant in MUTANTS.values() if mutant.benign and mutant.where == "host"]
    found = [probe(planted(draw(11, number), variants[number % len(variants)].id)) for number in range(34)]
    assert [(finding.id, finding.message) for finding in found if finding.id] == []
    assert len(variants) > 10


def test_bugs_are_hunted_that_the_search_can_draw() -> None:
    hunted = {name for name, mutant in MUTANTS.items() if can_be_shown(mutant)}
    assert {"MP04", "MI01", "MK01", "ML06", "KK26"} <= hunted
    assert hunted.isdisjoint({"KK27", "MW01", "MD13", "benign-lifo"})


@pytest.mark.slow
def test_hunts_are_printed_as_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["selftest", "--hunt", "--only", "MP04", "--only", "MP05", "--seed", "5", "--seed", "6", "--json", "-q"])
    found = json.loads(capsys.readouterr().out)
    assert end.value.code == 0
    assert [(one["mutant"], one["seed"]) for one in found["hunts"]] == [
        (m, s) for m in ("MP04", "MP05") for s in (5, 6)
    ]
    assert all(one["id"] and one["replayed"] and one["seconds"] < 60 for one in found["hunts"])
    assert (found["missed"], found["not_replayed"], found["large"]) == ([], [], [])


@pytest.mark.slow
def test_a_hunt_that_finds_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["selftest", "--hunt", "--only", "benign-lifo", "--seconds", "1", "--json", "-q"])
    found = json.loads(capsys.readouterr().out)
    assert end.value.code == 1
    assert found["missed"] == ["benign-lifo from seed 0"]
    assert found["medians"]["seconds"] is None
