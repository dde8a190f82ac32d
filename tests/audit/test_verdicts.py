"""What the audit makes of a compiler's figures, and what it says to the user; no libtpu needed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sim.audit
from backends.protocol import BackendUnavailableError
from backends.tpu_audit import Compiled
from backends.tpu_targets import FAMILIES, GIB, Target, UnknownTargetError, find_target, known_targets, prepare
from sim.audit import FunctionReport, TargetReport, faults, mesh_of
from sim.cli import main
from sim.cli.audit_command import lines_of
from sim.scenario import ScenarioError, load_scenario

EXAMPLE = Path("scenarios/audit-llama3-8b.yaml").resolve()
MIB = 2**20
GOOD: dict[str, Any] = {
    "name": "write_decodes",
    "only_writes": True,
    "alias_bytes": 512 * MIB,
    "pool_bytes": 512 * MIB,
    "pool_array_bytes": 128 * MIB,
    "hbm_bytes": 513 * MIB,
    "temp_bytes": MIB,
}


def why(head_dim: int = 128, **changes: Any) -> str:
    return "; ".join(faults(Compiled(**{**GOOD, **changes}), 16 * GIB, head_dim))


def test_a_write_in_place_passes() -> None:
    assert why() == ""
    # A step's donated state lies in place as well; its sums over heads go round the devices.
    assert (
        why(only_writes=False, alias_bytes=513 * MIB, collectives=("all-reduce",), largest_collective_bytes=512) == ""
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pool_copies": ("copy of a pool",) * 2}, "2 copies of a whole pool: copy of a pool"),
        ({"alias_bytes": 0, "unaliased_pools": 4}, "donation is lost for 4 arrays"),
        ({"unaliased_pools": 1}, "donation is lost for 1 array of the pools"),
        ({"alias_bytes": 384 * MIB}, "384.0 MiB of 512.0 MiB are written in place"),
        ({"temp_bytes": 128 * MIB}, "temporaries of 128.0 MiB"),
        ({"collectives": ("all-gather of x",)}, "1 collective in a function that only writes: all-gather of x"),
        ({"only_writes": False, "largest_collective_bytes": 128 * MIB}, "a collective moves 128.0 MiB"),
        ({"hbm_bytes": 17 * GIB}, "needs 17.00 GiB of each device's 16.00 GiB"),
        ({"refused": "RESOURCE_EXHAUSTED: too much"}, "there is no program: RESOURCE_EXHAUSTED: too much"),
        ({"head_dim": 64}, "cache.head_dim 64 is no multiple of 128"),
        ({"head_dim": 192}, "pad it to 256"),
    ],
)
def test_each_fault_is_told_in_a_sentence(changes: dict[str, Any], words: str) -> None:
    assert words in why(**changes)


@given(
    st.fixed_dictionaries(
        {
            "alias_bytes": st.integers(0, 2**31),
            "temp_bytes": st.integers(0, 2**31),
            "unaliased_pools": st.integers(0, 4),
            "hbm_bytes": st.integers(0, 2**36),
            "pool_copies": st.lists(st.just("copy")).map(tuple),
            "collectives": st.lists(st.just("send")).map(tuple),
        }
    )
)
def test_a_write_passes_exactly_if_every_figure_is_as_it_should_be(figures: dict[str, Any]) -> None:
    clean = (
        figures["alias_bytes"] >= 512 * MIB
        and figures["unaliased_pools"] == 0
        and figures["temp_bytes"] < 128 * MIB
        and figures["hbm_bytes"] <= 16 * GIB
        and not figures["pool_copies"]
        and not figures["collectives"]
    )
    assert (why(**figures) == "") == clean


def test_every_family_is_found_by_its_example_with_or_without_tpu_before_it() -> None:
    assert [find_target(name).family for name in known_targets()] == list(FAMILIES)
    assert find_target("v5e:2x4").topology == find_target("tpu-v5e:2x4").topology == (2, 4)
    assert find_target("tpu7x:2x2x1").hbm_bytes > 90 * GIB


@pytest.mark.parametrize(
    "name", ["tpu-v9:2x2", "v5e", "v5e:0x2", "v5e:2", "v5e:2x2x2", "tpu-v5e:2x2x", "v4:100x100x100", ""]
)
def test_an_unknown_target_ends_with_status_2_and_the_known_ones(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownTargetError):
        find_target(name)
    with pytest.raises(SystemExit) as end:
        main(["audit", str(EXAMPLE), "--target", name])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert all(known in err for known in known_targets())
    assert "Traceback" not in err


def test_an_unknown_function_ends_with_status_2_and_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["audit", str(EXAMPLE), "--target", "v5e:2x2", "--only", "write_all"])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert "write_prefill" in err


def test_without_libtpu_the_status_is_6_and_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else found(name, *rest)
    )
    with pytest.raises(BackendUnavailableError):
        prepare()
    with pytest.raises(SystemExit) as end:
        main(["audit", str(EXAMPLE), "--target", "tpu-v5e:2x2", "--json"])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (6, "")
    assert "--extra tpu" in err


def report(target: str, **changes: Any) -> TargetReport:
    compiled = Compiled(**{**GOOD, **changes})
    return TargetReport(
        find_target(target), {"heads": 4}, (FunctionReport(compiled, tuple(faults(compiled, 16 * GIB, 128))),)
    )


def kvproof_audit(monkeypatch: pytest.MonkeyPatch, targets: list[str], **changes: Any) -> int:
    """Run the command with compiled figures given; the exit status."""

    def given_figures(scenario: Any, target: Target, progress: Any, only: Any) -> TargetReport:
        progress(f"{target.name}: compiling")
        return report(target.name, **(changes if target.family == "v6e" else {}))

    monkeypatch.setattr(sim.audit, "audit", given_figures)
    monkeypatch.setattr("backends.tpu_targets.prepare", lambda: None)
    options = [word for target in targets for word in ("--target", target)]
    with pytest.raises(SystemExit) as end:
        main(["audit", str(EXAMPLE), "--json", *options])
    return int(end.value.code or 0)


def test_one_target_prints_an_object_and_several_a_list(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kvproof_audit(monkeypatch, ["v5e:2x2"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert set(one) >= {"target", "passed", "functions"}
    keys = "name passed alias_bytes pool_bytes temp_bytes pool_copies collectives hbm_bytes seconds"
    assert set(one["functions"][0]) >= set(keys.split())
    assert kvproof_audit(monkeypatch, ["v5e:2x2", "v6e:2x2"], pool_copies=("copy of x",)) == 1
    out, err = capsys.readouterr()
    assert [(each["target"], each["passed"]) for each in json.loads(out)] == [("v5e:2x2", True), ("v6e:2x2", False)]
    assert "write_decodes: 1 copy of a whole pool: copy of x" in err


def test_the_table_has_a_row_for_each_function_and_ends_with_the_verdict() -> None:
    lines = lines_of(report("tpu-v5e:2x2", cycles=13624))
    assert lines[1].split() == ["write_decodes", "pass", "512/512", "1.0", "0", "0", "0.50", "13,624", "0.0"]
    assert lines[-1].startswith("IN PLACE: tpu-v5e:2x2 (heads over 4")
    assert lines_of(report("tpu-v5e:2x2", refused="no"))[-1].startswith("FAILED")


@pytest.mark.parametrize(("heads", "devices", "mesh"), [(8, 4, 4), (8, 8, 8), (8, 16, 1), (6, 4, 1), (1, 1, 1)])
def test_heads_lie_on_all_devices_where_they_divide_else_on_one(heads: int, devices: int, mesh: int) -> None:
    scenario = load_scenario(EXAMPLE, [f"cache.kv_heads={heads}"])
    assert mesh_of(scenario, find_target("v5e:2x2"), devices) == {"heads": mesh}


def test_a_scenarios_own_mesh_counts_and_must_fit_the_target() -> None:
    scenario = load_scenario(EXAMPLE, ["backend.mesh={heads: 2}"])
    assert mesh_of(scenario, find_target("v5e:2x2"), 4) == {"heads": 2}
    with pytest.raises(UnknownTargetError, match="has 1 devices"):
        mesh_of(scenario, find_target("v5e:1x1"), 1)


def test_the_example_holds_gigabytes_of_pages_and_no_run_allocates_them_by_accident(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = load_scenario(EXAMPLE).cache
    words = cache.layers * cache.num_pages * cache.page_size * cache.kv_heads * cache.head_dim
    assert (cache.layers, cache.kv_heads, cache.head_dim, 2 * 2 * words) == (32, 8, 128, 32 * GIB)
    monkeypatch.setattr("sim.scenario.checks.physical_memory", lambda: 24 * GIB)
    with pytest.raises(ScenarioError, match="GiB of memory"):
        load_scenario(EXAMPLE, ["backend.platform=cpu"])
    with pytest.raises(SystemExit) as end:
        main(["run", str(EXAMPLE), "--out", str(tmp_path / "run"), "-q"])
    assert end.value.code == 6
    assert "platform 'tpu' is not there" in capsys.readouterr().err
