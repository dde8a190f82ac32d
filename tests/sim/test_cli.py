"""The command line: exit statuses, one-line errors, machine output on stdout."""

from __future__ import annotations

import errno
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import sim.run
from reports.plots import PLOTS
from sim.cli import main
from sim.scenario import dump_scenario, load_scenario
from tests.sim.run_parts import planned_only


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    dump_scenario(planned_only(workload__num_requests=5), path)
    return path


def test_help_needs_neither_jax_nor_matplotlib_nor_simpy() -> None:
    program = (
        "import sys\nfrom sim.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'jax', 'matplotlib', 'simpy', 'numpy', 'pydantic'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "kvproof run scenarios/quickstart.yaml" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "plot",
        "report",
        "diff",
        "replay",
        "judge",
        "list",
        "explain",
        "init",
        "schema",
        "doctor",
        "bench",
        "selftest",
    ],
)
def test_every_command_has_help_with_an_example(command: str, kvproof: Any) -> None:
    status, out, _ = kvproof(command, "--help")
    assert status == 0
    assert f"Example: kvproof {command}" in " ".join(out.split())


def test_the_version_is_told(kvproof: Any) -> None:
    assert kvproof("--version") == (0, f"kvproof {version('kvproof')}\n", "")


def test_a_run_shows_a_table_and_a_verdict_and_writes_its_folder(kvproof: Any, scenario: Path) -> None:
    status, out, _ = kvproof("run", scenario, "--no-plots")
    assert status == 0
    assert "Successful requests:" in out
    assert "P99 TTFT (ms):" in out
    assert out.splitlines()[-1].startswith("HELD: small: ")
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("small-")
    assert {path.name for path in folder.iterdir()} == {"scenario.yaml", "summary.json", "requests.jsonl", "series.npz"}
    assert load_scenario(folder / "scenario.yaml") == load_scenario(scenario)


def test_json_is_one_object_on_stdout_or_a_list_where_several_ran(kvproof: Any, scenario: Path, tmp_path: Path) -> None:
    status, out, err = kvproof("run", scenario, "--json", "--no-plots", "--out", tmp_path / "a")
    one = json.loads(out)
    assert (status, one["name"], one["exit_code"]) == (0, "small", 0)
    assert one["run_folder"] == str(tmp_path / "a")
    assert "HELD" in err
    other = tmp_path / "other.yaml"
    dump_scenario(planned_only(name="other", workload__num_requests=3), other)
    status, out, _ = kvproof("run", scenario, other, "--json", "--no-plots", "--quiet", "--out", tmp_path / "b")
    assert [run["name"] for run in json.loads(out)] == ["small", "other"]
    assert (tmp_path / "b" / "other" / "summary.json").exists()


def test_quiet_says_nothing(kvproof: Any, scenario: Path) -> None:
    assert kvproof("run", scenario, "--quiet", "--no-plots") == (0, "", "")


def test_seed_and_set_change_the_run(kvproof: Any, scenario: Path) -> None:
    def trace(*options: str) -> str:
        _, out, _ = kvproof("run", scenario, "--json", "--quiet", "--no-plots", *options)
        return json.loads(out)["trace_hash"]

    assert trace() == trace("--seed", "5")
    assert len({trace(), trace("--seed", "6"), trace("--set", "core.lag=1")}) == 3


def test_the_worst_of_several_runs_decides_the_exit_status(kvproof: Any, scenario: Path) -> None:
    bad = scenario.with_name("bad.yaml")
    dump_scenario(planned_only(name="bad", workload__num_requests=3, expect={"steps": 1}), bad)
    status, out, _ = kvproof("run", bad, scenario, "--no-plots")
    assert status == 1
    assert "not as expected: steps is" in out


def test_a_missed_latency_objective_alone_exits_with_4(kvproof: Any, scenario: Path) -> None:
    bound = "expect.time_to_first_token_seconds.max=0"
    assert kvproof("run", scenario, "--quiet", "--no-plots", "--set", bound)[0] == 4


USER_ERRORS: dict[str, tuple[list[str], int, str]] = {
    "no scenario": (["run", "missing.yaml"], 2, "missing.yaml: no such file"),
    "unknown key": (["run", "small.yaml", "--set", "core.lagg=1"], 2, "did you mean 'lag'?"),
    "unknown core": (
        ["run", "small.yaml", "--set", "core.kind=mine"],
        2,
        "there is no core 'mine'; give 'module:function', or one of paged",
    ),
    "unknown option": (["run", "small.yaml", "--set", "core.options={x: 1}"], 2, "core.options"),
    "unknown mutant": (["run", "small.yaml", "--set", "plant=leak"], 2, "there is no mutant 'leak'"),
    "unknown backend": (["run", "small.yaml", "--set", "backend.kind=mine"], 6, "none, numpy"),
    "a file as run folder": (["run", "small.yaml", "--out", "small.yaml"], 2, "small.yaml: File exists"),
    "no run": (["plot", "nothing"], 2, "no such run folder"),
    "no run to compare": (["diff", "nothing", "nothing"], 2, "no such run folder"),
    "a process alone": (["run", "small.yaml", "--process", "0/2"], 2, "each needs the other"),
    "no log": (["judge", "nothing.jsonl"], 2, "nothing.jsonl: No such file"),
    "no record": (["replay", "."], 2, "give a run folder"),
    "unknown list": (["list", "invariant"], 2, "did you mean 'invariants'?"),
    "unknown id": (["explain", "Q99"], 2, "there is no invariant or mutant 'Q99'"),
    "unknown case": (["bench", "--only", "x"], 2, "no case 'x'"),
    "an existing file": (["init", "small.yaml"], 2, "small.yaml exists already"),
    "no scenarios": (["list", "scenarios", "--folder", "nowhere"], 5, "no scenarios found in nowhere"),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_a_user_error_is_one_sentence_with_its_exit_status(case: str, kvproof: Any, scenario: Path) -> None:
    arguments, expected, message = USER_ERRORS[case]
    status, out, err = kvproof(*arguments)
    assert status == expected
    assert message in err
    assert out == ""
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if not line.startswith(("Usage:", "Try "))]) <= 2
    assert not list(Path().glob("runs/*")), "a run that never began leaves no folder"


def test_a_full_disk_is_one_sentence(kvproof: Any, scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "series.npz")

    monkeypatch.setattr(sim.run, "write_record", full)
    status, _, err = kvproof("run", scenario, "--no-plots")
    assert status == 3
    assert err.strip() == "series.npz: No space left on device; free some space or write to another disk"


def test_an_internal_error_hides_its_traceback_unless_asked(
    kvproof: Any, scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(sim.run, "run_figures", broken)
    status, _, err = kvproof("run", scenario)
    assert status == 3
    assert err.startswith("internal error: ZeroDivisionError: oh")
    monkeypatch.setenv("KVPROOF_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["run", str(scenario)])


def test_ctrl_c_saves_what_was_done_and_exits_with_130(
    kvproof: Any, scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object, now_ns: int, plan: Any) -> None:
        if plan.step == 7:
            raise KeyboardInterrupt
        original(self, now_ns, plan)

    original = sim.run.EventLog.planned
    monkeypatch.setattr(sim.run.EventLog, "planned", interrupted)
    status, out, _ = kvproof("run", scenario, "--json", "--no-plots", "--out", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert status == 130
    assert (summary["verdict"], summary["steps"]) == ("interrupted", 7)
    assert json.loads(out)["trace_hash"] == summary["trace_hash"]


def command(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """`kvproof` as a process of its own, with pipes."""
    program = [sys.executable, "-m", "sim.cli", *map(str, arguments)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_the_record_and_exit_with_130(number: signal.Signals, tmp_path: Path) -> None:
    path, log, out = tmp_path / "long.yaml", tmp_path / "log.jsonl", tmp_path / "run"
    dump_scenario(planned_only(workload__num_requests=500_000), path)
    with command("run", path, "--no-plots", "--quiet", "--out", out, "--plan-log", log) as process:
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate()
    summary = json.loads((out / "summary.json").read_text())
    assert (process.returncode, summary["verdict"]) == (130, "interrupted")
    assert summary["steps"] > 0
    assert summary["cache_hash"] is None
    assert "Traceback" not in err


def test_ctrl_c_during_the_imports_of_the_command_line_is_one_word() -> None:
    program = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from sim.cli import main\n"
        "main(['list', 'invariants'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_outside_a_run_says_so(kvproof: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("sim.scenario.schema_text", interrupted)
    assert kvproof("schema") == (130, "", "interrupted\n")


@pytest.mark.parametrize("name", ["full", "full.gz"])
def test_a_full_disk_under_the_plan_log_leaves_the_record(name: str, kvproof: Any, scenario: Path) -> None:
    Path(name).symlink_to("/dev/full")
    status, _, err = kvproof("run", scenario, "--no-plots", "--quiet", "--out", "run", "--plan-log", name)
    assert status == 3
    assert err == f"{name}: No space left on device; free some space or write to another disk\n"
    assert json.loads(Path("run/summary.json").read_text())["verdict"] == "plan log not written"


def test_a_full_disk_under_the_plots_leaves_the_record(kvproof: Any, scenario: Path) -> None:
    kvproof("run", scenario, "--no-plots", "--quiet", "--out", "run")
    Path("run/plots").mkdir()
    for plot in PLOTS:
        Path(f"run/plots/{plot.stem}.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    for file, drawn in (("report.html", "report"), ("plots/page_usage.png", "plot")):
        path = Path("run") / file
        path.symlink_to("/dev/full")
        status, _, err = kvproof(drawn, "run")
        assert status == 3
        assert err == f"{path}: No space left on device; free some space or write to another disk\n"


def test_a_logged_run_can_be_judged(kvproof: Any, scenario: Path) -> None:
    _, out, _ = kvproof("run", scenario, "--json", "--quiet", "--no-plots", "--plan-log", "log.jsonl.gz")
    status, judged, _ = kvproof("judge", "log.jsonl.gz", "--json")
    assert status == 0
    assert json.loads(judged)["trace_hash"] == json.loads(out)["trace_hash"]
    assert kvproof("judge", "log.jsonl.gz")[1].startswith("HELD: ")


def test_a_log_of_a_wrong_engine_is_judged_so(kvproof: Any, scenario: Path) -> None:
    kvproof("run", scenario, "--quiet", "--no-plots", "--plan-log", "log.jsonl", "--set", "plant=leak-on-finish")
    status, out, _ = kvproof("judge", "log.jsonl")
    assert status == 1
    assert "violated P10 at step" in out


def test_a_run_replays_the_same_and_a_changed_one_does_not(kvproof: Any, scenario: Path) -> None:
    kvproof("run", scenario, "--quiet", "--no-plots", "--out", "run")
    assert kvproof("replay", "run")[:2][0] == 0
    assert kvproof("replay", scenario)[0] == 0
    summary = json.loads(Path("run/summary.json").read_text())
    Path("run/summary.json").write_text(json.dumps({**summary, "trace_hash": "0" * 16}))
    status, out, _ = kvproof("replay", "run", "--json")
    assert status == 1
    assert json.loads(out)["differences"] == [
        f"the runs part after the last completed step {summary['steps'] - 1}: "
        f"recorded is trace {'0' * 16}, found {summary['trace_hash']}"
    ]


def test_a_failing_run_names_the_command_that_replays_it(kvproof: Any, scenario: Path) -> None:
    status, out, _ = kvproof("run", scenario, "--no-plots", "--out", "run dir", "--set", "plant=leak-on-finish")
    assert status == 1
    (line,) = (line for line in out.splitlines() if line.startswith("replay it with: "))
    program, *arguments = shlex.split(line.removeprefix("replay it with: "))
    assert program == "kvproof"
    status, out, _ = kvproof(*arguments)
    assert status == 0
    assert "violated P10 at step" in out


def test_a_violation_that_was_expected_is_told_as_such(kvproof: Any, scenario: Path) -> None:
    wanted = ["plant=leak-on-finish", "expect={violations: 1, violated: [P10]}"]
    status, out, _ = kvproof("run", scenario, "--no-plots", *(word for key in wanted for word in ("--set", key)))
    assert status == 0
    assert re.search(r"^HELD: .* 1 violation \(expected\), trace", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "content"),
    [("series.npz", b"PK"), ("series.npz", b""), ("summary.json", b"{"), ("summary.json", b"{}")],
)
def test_a_damaged_record_is_named_when_it_is_replayed(name: str, content: bytes, kvproof: Any, scenario: Path) -> None:
    kvproof("run", scenario, "--quiet", "--no-plots", "--out", "run")
    Path("run", name).write_bytes(content)
    status, out, err = kvproof("replay", "run")
    assert (status, out) == (2, "")
    assert err.startswith(f"run: the record is damaged ({name}: ")


def test_diff_tells_what_differs(kvproof: Any, scenario: Path) -> None:
    kvproof("run", scenario, "--quiet", "--no-plots", "--out", "a")
    kvproof("run", scenario, "--quiet", "--no-plots", "--out", "b", "--seed", "9")
    status, out, _ = kvproof("diff", "a", "b")
    assert status == 0
    assert "trace_hash" in out
    assert kvproof("diff", "a", "b", "--same-trace")[0] == 1
    assert kvproof("diff", "a", "a", "--same-trace")[0] == 0


def test_the_starter_scenario_is_valid_and_holds(kvproof: Any) -> None:
    assert kvproof("init", "--quiet") == (0, "", "")
    status, _, _ = kvproof("run", "scenario.yaml", "--quiet", "--no-plots", "--set", "backend.kind=none")
    assert status == 0


def test_the_shipped_schema_is_the_one_that_is_printed(kvproof: Any) -> None:
    shipped = Path(__file__).parents[2] / "scenarios" / "schema.json"
    assert kvproof("schema")[1] == shipped.read_text()


@pytest.mark.parametrize("what", ["invariants", "sometimes", "backends", "cores", "mutants"])
def test_what_there_is_can_be_listed(what: str, kvproof: Any) -> None:
    status, out, _ = kvproof("list", what)
    _, as_json, _ = kvproof("list", what, "--json")
    assert status == 0
    assert len(out.splitlines()) == len(json.loads(as_json)) > 0


def test_scenarios_are_listed_with_their_purpose(kvproof: Any) -> None:
    folder = Path(__file__).parents[2] / "scenarios"
    _, out, _ = kvproof("list", "scenarios", "--folder", folder, "--json")
    purposes = json.loads(out)
    assert str(folder / "quickstart.yaml") in purposes
    assert all(purposes.values())


def test_invariants_and_mutants_are_explained(kvproof: Any) -> None:
    assert "why: " in kvproof("explain", "p1")[1]
    assert "Caught by P10" in kvproof("explain", "leak-on-finish")[1]


def test_the_doctor_names_devices_and_what_missing_extras_would_give(kvproof: Any) -> None:
    status, out, _ = kvproof("doctor", "--json")
    found = json.loads(out)
    assert status == 0
    assert {"platform": "cpu", "id": 0, "kind": "cpu"} in found["devices"]
    assert {"none", "numpy", "jax"} <= set(found["backends"])
    assert all(extra["gives"] for extra in found["extras"].values())


@pytest.mark.slow
def test_a_sharded_scenario_runs_in_a_process_with_its_devices(kvproof: Any, tmp_path: Path) -> None:
    path = tmp_path / "sharded.yaml"
    mesh = {"heads": 2}
    dump_scenario(planned_only(backend__kind="jax", backend__mesh=mesh, workload__num_requests=3), path)
    status, out, _ = kvproof("run", path, "--json", "--quiet", "--no-plots", "--out", tmp_path / "run")
    assert status == 0
    assert json.loads(out)["trace_hash"] == json.loads((tmp_path / "run" / "summary.json").read_text())["trace_hash"]
    assert kvproof("replay", tmp_path / "run", "--quiet")[0] == 0
