"""Scenarios as values and files: what loads, what comes back, what is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sim.scenario import Scenario, dump_scenario, load_scenario, scenario_hash, scenario_text, schema_text
from sim.workload import concrete_faults, generate
from tests.sim.scenario_parts import changed, small

LIBRARY = Path(__file__).parents[2] / "scenarios"
SHIPPED = sorted(LIBRARY.glob("*.yaml"))
NAMES = {
    "audit-llama3-8b",
    "quickstart",
    "chat-poisson",
    "chat-burst",
    "long-context",
    "chunked-prefill",
    "page-starved",
    "single-slot",
    "lag-two",
    "calibrate-tiny",
    "cancel-storm",
    "code-completion-azure-shaped",
    "mooncake-shaped",
    "sharded-8",
    "tiny-decoder",
    "must-fail-delayed-release",
    "must-fail-double-allocation",
    "must-fail-wrong-offset",
}

lengths = st.one_of(
    st.builds(lambda n: {"kind": "fixed", "value": n}, st.integers(1, 60)),
    st.builds(lambda a, b: {"kind": "uniform", "min": a, "max": a + b}, st.integers(1, 60), st.integers(0, 90)),
    st.builds(
        lambda mean, sigma: {"kind": "lognormal", "mean": mean, "sigma": sigma},
        st.floats(1e-3, 1e6),
        st.floats(0, 10),
    ),
    st.builds(lambda e: {"kind": "zipf", "exponent": e, "min": 2, "max": 30}, st.floats(0, 20)),
)
arrivals = st.one_of(
    st.builds(lambda r: {"kind": "constant", "request_rate": r}, st.floats(1e-6, 1e9)),
    st.builds(
        lambda r, b: {"kind": "gamma", "request_rate": r, "burstiness": b}, st.floats(1e-6, 1e9), st.floats(0.1, 9)
    ),
    st.builds(lambda n: {"kind": "concurrent", "concurrency": n}, st.integers(1, 1000)),
    st.builds(
        lambda rates: {"kind": "stages", "stages": [{"request_rate": r, "duration_seconds": 1.5} for r in rates]},
        st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=3),
    ),
)
faults = st.lists(
    st.one_of(
        st.builds(lambda n, s: {"kind": "cancel", "request": n, "at_step": s}, st.integers(0, 49), st.integers(0, 99)),
        st.builds(lambda s: {"kind": "fail", "at_seconds": s}, st.floats(0, 1e9)),
    ),
    max_size=3,
)
scenarios = st.builds(
    lambda arrival, prompt, output, fault, seed, text: small(
        seed=seed,
        description=text,
        workload__arrivals=arrival,
        workload__prompt_tokens=prompt,
        workload__output_tokens=output,
        faults=fault,
    ),
    arrivals,
    lengths,
    lengths,
    faults,
    st.integers(0, 2**63 - 1),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30),
)


@given(scenarios)
@settings(max_examples=25, deadline=None)
def test_a_dumped_scenario_loads_as_an_equal_one(tmp_path_factory: pytest.TempPathFactory, scenario: Scenario) -> None:
    path = tmp_path_factory.mktemp("dump") / "scenario.yaml"
    dump_scenario(scenario, path)
    again = load_scenario(path)
    assert again == scenario
    assert scenario_hash(again) == scenario_hash(scenario)


def test_a_dumped_scenario_and_its_trace_can_move_together(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    (before / "traces").mkdir(parents=True)
    (before / "traces" / "t.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,3,4\n")
    trace = {"kind": "trace", "format": "vidur", "path": "traces/t.csv"}
    (before / "a.yaml").write_text(json.dumps(changed(workload__arrivals=trace)))
    scenario = load_scenario(before / "a.yaml")
    dump_scenario(scenario, before / "b.yaml")
    before.rename(after)
    moved = load_scenario(after / "b.yaml")
    assert moved.workload.arrivals.path == str((after / "traces" / "t.csv").resolve())
    assert scenario_hash(moved) == scenario_hash(scenario)


def test_an_override_names_files_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, here = tmp_path / "library", tmp_path / "here"
    library.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (library / "t.csv").touch()
    (here / "t.csv").touch()
    trace = {"kind": "trace", "format": "vidur", "path": "t.csv"}
    (library / "s.yaml").write_text(json.dumps(changed(workload__arrivals=trace)))
    assert load_scenario(library / "s.yaml").workload.arrivals.path == str((library / "t.csv").resolve())
    overridden = load_scenario("../library/s.yaml", ["workload.arrivals.path=t.csv"])
    assert overridden.workload.arrivals.path == str((here / "t.csv").resolve())


def test_the_hash_changes_with_any_key() -> None:
    variants = [
        small(),
        small(seed=6),
        small(core__lag=1),
        small(cost__step_ns=1001),
        small(plant="x"),
        small(name="b"),
    ]
    assert len({scenario_hash(variant) for variant in variants}) == len(variants)


def test_a_scenario_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        small().core.lag = 1


def test_yaml_is_version_1_2(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(changed()).replace('"small"', "on").replace("1000}", "1e3}"))
    scenario = load_scenario(path, ["cost.step_ns=85e6", "core.options={flag: yes, on: off}"])
    assert scenario.name == "on"
    assert scenario.cost.step_ns == 85_000_000
    assert scenario.core.options == {"flag": "yes", "on": "off"}


def test_overrides_win_in_order_and_make_the_sections_they_need(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(changed()))
    overrides = ["core.lag=1", "core.lag=2", "expect.finished=all", "expect.preemptions.min=3", "plant="]
    scenario = load_scenario(path, overrides, seed=99)
    assert (scenario.core.lag, scenario.seed, scenario.plant) == (2, 99, None)
    assert (scenario.expect.finished, scenario.expect.preemptions.min) == ("all", 3)


def test_a_scenario_built_in_python_is_checked_like_a_file() -> None:
    with pytest.raises(ValidationError, match=r"model\.lanes: 17 lanes, but cache\.head_dim is 16"):
        small(model__lanes=17)


def test_every_key_is_described() -> None:
    schema = json.loads(schema_text())
    sections = [schema, *schema["$defs"].values()]
    missing = [
        f"{section['title']}.{key}"
        for section in sections
        for key, field in section.get("properties", {}).items()
        if not {"description", "$ref"} & set(field)
    ]
    assert missing == []


def test_the_schema_carries_the_bounds() -> None:
    fields = json.loads(schema_text())["$defs"]["CacheSettings"]["properties"]
    assert fields["num_pages"]["minimum"] == 2
    assert fields["page_size"]["minimum"] == 1
    assert '"ge"' not in schema_text()


def test_the_shipped_schema_is_the_generated_one() -> None:
    shipped = (LIBRARY / "schema.json").read_text()
    assert shipped == schema_text(), "scenarios/schema.json is stale: write sim.scenario.schema_text() to it"


def test_the_library_is_complete() -> None:
    assert {path.stem for path in SHIPPED} == NAMES


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_scenario_loads_says_its_purpose_and_yields_work(path: Path) -> None:
    scenario = load_scenario(path)
    lines = path.read_text().splitlines()
    assert scenario.name == path.stem
    assert lines[:2] == [f"# {scenario.description}", "# yaml-language-server: $schema=schema.json"]
    arrivals = list(generate(scenario))
    assert 5 <= len(arrivals) <= 500
    assert all(fault.at_step is not None or fault.at_ns is not None for fault in concrete_faults(scenario))
    assert scenario.expect.finished == "all" or scenario.expect.violated


def test_a_text_names_files_absolutely_unless_told_a_folder() -> None:
    scenario = load_scenario(LIBRARY / "mooncake-shaped.yaml")
    assert str(LIBRARY / "traces" / "mooncake-small.jsonl") in scenario_text(scenario)
    assert "path: traces/mooncake-small.jsonl" in scenario_text(scenario, LIBRARY)
