"""What a user reads when a scenario file is wrong: exact text, line and column."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.scenario import ScenarioError, load_scenario

GOOD = """\
schema: kvproof/v1
name: small
core: {batch_size: 4, prefill_chunk: 8}
cache: {page_size: 4, num_pages: 33, max_sequence_length: 64, kv_heads: 2}
workload:
  arrivals: {kind: poisson, request_rate: 10.0}
  prompt_tokens: {kind: fixed, value: 5}
  output_tokens: {kind: uniform, min: 1, max: 10}
  num_requests: 50
cost: {kind: fixed, step_ns: 1e3}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(text: str | bytes, *overrides: str, seed: int | None = None) -> list[str]:
    Path("s.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ScenarioError) as caught:
        load_scenario("s.yaml", overrides, seed)
    return list(caught.value.problems)


def edited(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "batch_size: 4",
            "batchsize: 4, batch_size: 4",
            "3:8: core.batchsize: unknown key (did you mean 'batch_size'?)",
        ),
        ("{batch_size: 4, ", "{", "3:1: core.batch_size: the key is missing"),
        (
            "name: small",
            "name: small\ninvariants: {only: [P1, P99]}",
            "3:25: invariants.only.1: unknown value 'P99' (did you mean 'P9'?)",
        ),
        ("page_size: 4", "page_size: 0", "4:9: cache.page_size: expected at least 1, found 0"),
        ("num_pages: 33", "num_pages: 1", "4:23: cache.num_pages: expected at least 2, found 1"),
        ("prefill_chunk: 8", "prefill_chunk: 8, lag: 3", "3:41: core.lag: expected at most 2, found 3"),
        ("prefill_chunk: 8", "prefill_chunk: 8.5", "3:23: core.prefill_chunk: expected a whole number, found 8.5"),
        ("prefill_chunk: 8", "prefill_chunk: true", "3:23: core.prefill_chunk: expected a whole number, found true"),
        ("prefill_chunk: 8", "prefill_chunk: '8'", "3:23: core.prefill_chunk: expected a whole number, found '8'"),
        ("name: small", "name: a/b", "2:1: name: expected text that matches ^[A-Za-z0-9][A-Za-z0-9_.-]*$, found 'a/b'"),
        ("name: small", "name:", "2:1: name: expected text, found nothing"),
        (
            "kind: poisson",
            "kind: poison",
            "6:14: workload.arrivals.kind: unknown kind 'poison' (did you mean 'poisson'?)",
        ),
        (
            "{kind: fixed, step_ns: 1e3}",
            "{step_ns: 1e3}",
            "10:1: cost: the key 'kind' is missing (known: fixed, linear, roofline, measured)",
        ),
        (
            "request_rate: 10.0",
            "request_rate: 0",
            "6:29: workload.arrivals.request_rate: expected more than 0.0, found 0",
        ),
        (
            "request_rate: 10.0",
            "request_rate: .nan",
            "6:29: workload.arrivals.request_rate: expected a finite number, found nan",
        ),
        (
            "kv_heads: 2}",
            "kv_heads: 2}\nmodel: {kind: readr}",
            "5:9: model.kind: unknown value 'readr' (did you mean 'reader'?)",
        ),
        (
            "kv_heads: 2}",
            "kv_heads: 2}\nbackend: {mesh: {head: 2}}",
            "5:18: backend.mesh.head: unknown key 'head' (did you mean 'heads'?)",
        ),
        (
            "kv_heads: 2}",
            "kv_heads: 2}\nexpect: {finished: [3]}",
            "5:10: expect.finished: expected 'all', a whole number or {min: ..., max: ...}, found a list",
        ),
        (
            "kv_heads: 2}",
            "kv_heads: 2}\nexpect: {time_to_first_token_seconds: {p98: 1}}",
            "5:40: expect.time_to_first_token_seconds.p98: unknown key (did you mean 'p99'?)",
        ),
        (
            "kv_heads: 2}",
            "kv_heads: 2}\nfaults:\n  - {kind: cancel, request: 3, at_stp: 1}",
            "6:32: faults.0.at_stp: unknown key (did you mean 'at_step'?)",
        ),
        ("step_ns: 1e3", "step_ns: 1e16", f"10:21: cost.step_ns: expected at most {10**15}, found {10**16}"),
        (
            "kind: fixed, step_ns: 1e3",
            f"kind: linear, base_ns: {10**15 + 1}, per_token_ns: 1",
            f"10:22: cost.base_ns: expected at most {10**15}, found {10**15 + 1}",
        ),
        (
            "kind: fixed, step_ns: 1e3",
            f"kind: linear, base_ns: 1, per_token_ns: {2**62}",
            f"10:34: cost.per_token_ns: expected at most {10**15}, found {2**62}",
        ),
        (
            "kind: fixed, step_ns: 1e3",
            f"kind: roofline, model: llama-3-8b, device: h100, overhead_ns: {2**62}",
            f"10:57: cost.overhead_ns: expected at most {10**15}, found {2**62}",
        ),
        ("cost: {kind: fixed, step_ns: 1e3}", "cost: 3", "10:1: cost: expected a mapping of keys, found 3"),
    ],
)
def test_one_wrong_key_is_one_line_with_place_path_and_hint(old: str, new: str, problem: str) -> None:
    assert refusal(edited(old, new)) == [f"s.yaml:{problem}"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "kv_heads: 2}",
            "kv_heads: 6}\nbackend: {mesh: {heads: 4}}",
            "5:18: backend.mesh.heads: 4 devices do not divide cache.kv_heads 6",
        ),
        (
            "kv_heads: 2}",
            "kv_heads: 2}\nbackend: {kind: numpy, mesh: {heads: 2}}",
            "5:24: backend.mesh: the backend 'numpy' has no devices to shard over",
        ),
        (
            "kv_heads: 2}",
            "kv_heads: 2}\nbackend: {kind: numpy, writer: 'mine:write'}",
            "5:24: backend.writer: the backend 'numpy' takes no write kernel; "
            "choose backend.kind jax or one of your own",
        ),
        (
            "kv_heads: 2}",
            "kv_heads: 2}\nbackend: {kind: none, writer: 'mine:write'}",
            "5:23: backend.writer: the backend 'none' takes no write kernel; "
            "choose backend.kind jax or one of your own",
        ),
        (
            "value: 5",
            "value: 65",
            "7:3: workload.prompt_tokens: every prompt (65 tokens or more) is longer than cache.max_sequence_length "
            "64, so all are rejected; set workload.too_long: clip, or say with expect.rejected that this is meant",
        ),
        (
            "num_pages: 33, max_sequence_length: 64",
            "num_pages: 2, max_sequence_length: 64",
            "7:3: workload.prompt_tokens: every prompt (5 tokens or more) is more than the 4 tokens of all 1 usable "
            "pages, so all are rejected; set workload.too_long: clip, or say with expect.rejected that this is meant",
        ),
        ("min: 1, max: 10", "min: 11, max: 10", "8:34: workload.output_tokens.min: min 11 is more than max 10"),
        (
            "  num_requests: 50\n",
            "",
            "5:1: workload.num_requests: missing; arrivals of kind poisson never end",
        ),
        (
            "  prompt_tokens: {kind: fixed, value: 5}\n",
            "",
            "5:1: workload.prompt_tokens: missing; only arrivals of kind trace bring lengths, not poisson",
        ),
        (
            "kv_heads: 2}",
            "kv_heads: 2}\nfaults: [{kind: fail, at_step: 1, at_seconds: 2}]",
            "5:10: faults.0: give exactly one of at_step and at_seconds",
        ),
        (
            "kv_heads: 2}",
            "kv_heads: 2}\nfaults: [{kind: cancel, at_step: 1, request: 50}]",
            "5:37: faults.0.request: there is no request 50: they are 0 to 49",
        ),
        (
            "workload:",
            "faults: [{kind: resubmit, at_step: 1, request: 8}]\nworkload:\n  first_request_id: 9",
            "5:39: faults.0.request: there is no request 8: they are 9 to 58",
        ),
        (
            "num_requests: 50",
            "num_requests: 50\n  first_request: 9",
            "10:3: workload.first_request: unknown key (did you mean 'first_request_id'?)",
        ),
        (
            "num_requests: 50",
            "num_requests: 50\n  first_request_id: -1",
            "10:3: workload.first_request_id: expected at least 0, found -1",
        ),
        (
            "num_requests: 50",
            "num_requests: 50\n  first_request_id: 2e6",
            "10:3: workload.first_request_id: expected at most 1000000, found 2000000",
        ),
        (
            "num_requests: 50",
            "num_requests: 50\n  first_request_id: nine",
            "10:3: workload.first_request_id: expected a whole number, found 'nine'",
        ),
        (
            "kv_heads: 2}",
            "kv_heads: 2}\nexpect: {violations: 0, violated: [P1]}",
            "5:10: expect.violations: 0 violations, but expect.violated names P1",
        ),
        (
            "kv_heads: 2}",
            "kv_heads: 2}\nmodel: {lanes: 17}",
            "5:9: model.lanes: 17 lanes, but cache.head_dim is 16",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_named_at_the_one_to_change(old: str, new: str, problem: str) -> None:
    assert refusal(edited(old, new)) == [f"s.yaml:{problem}"]


@pytest.mark.usefixtures("folder")
def test_prompts_that_are_all_too_long_are_legal_when_the_rejections_are_expected() -> None:
    Path("s.yaml").write_text(edited("value: 5", "value: 65") + "expect: {rejected: 50}\n")
    assert load_scenario("s.yaml").workload.too_long == "reject"


@pytest.mark.usefixtures("folder")
def test_prompts_of_exactly_the_longest_sequence_fit() -> None:
    Path("s.yaml").write_text(edited("value: 5", "value: 64"))
    assert load_scenario("s.yaml").cache.max_sequence_length == 64


@pytest.mark.usefixtures("folder")
def test_all_problems_come_at_once_in_the_order_of_the_file() -> None:
    text = (
        edited("page_size: 4", "page_size: 0").replace("name: small", "nam: small").replace("kind: fixed, step", "step")
    )
    assert refusal(text) == [
        "s.yaml:1:1: name: the key is missing",
        "s.yaml:2:1: nam: unknown key (did you mean 'name'?)",
        "s.yaml:4:9: cache.page_size: expected at least 1, found 0",
        "s.yaml:10:1: cost: the key 'kind' is missing (known: fixed, linear, roofline, measured)",
    ]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "s.yaml:1:1: the file is empty: expected a scenario"),
        ("# only a comment\n", "s.yaml:1:1: the file is empty: expected a scenario"),
        ("- 1\n", "s.yaml:1:1: expected a mapping of keys, found a list"),
        ("name: a\nname: b\n", "s.yaml:2:1: name: the key stands here a second time"),
        ("core:\n\tlag: 1\n", "s.yaml:2:1: not YAML: a tab; YAML indents with spaces"),
        (b"name: caf\xe9\n", "s.yaml:1:10: not UTF-8 text: invalid continuation byte"),
        ("name: a\nseed: \x01\n", "s.yaml:2:1: not YAML: a control character"),
        ("name: [a\n", "s.yaml:2:1: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("name: " + "[" * 600, "s.yaml:1:1: nested too deeply"),
        (
            "name: a\n---\nname: b\n",
            "s.yaml:2:1: not YAML: expected a single document in the stream but found another document",
        ),
        (
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in ["ab", "bc", "cd", "de"]),
            "s.yaml:1:1: more than 100000 values, aliases counted each time",
        ),
    ],
)
def test_a_file_that_is_no_scenario_gives_one_line(text: str | bytes, problem: str) -> None:
    assert refusal(text) == [problem]


@pytest.mark.usefixtures("folder")
def test_a_huge_file_is_refused_before_it_is_parsed() -> None:
    assert refusal(b"#" * (2**20 + 1)) == [
        "s.yaml: 1048577 bytes, but a scenario has at most 1048576; traces are files apart"
    ]


def test_a_missing_file_a_near_name_and_a_directory_give_one_line(folder: Path) -> None:
    (folder / "quickstart.yaml").write_text(GOOD)
    for path, problem in [
        ("quikstart.yaml", "quikstart.yaml: no such file (did you mean 'quickstart.yaml'?)"),
        ("nowhere/x.yaml", "nowhere/x.yaml: no such file"),
        (".", ".: is a directory: expected a scenario file"),
    ]:
        with pytest.raises(ScenarioError) as caught:
            load_scenario(path)
        assert caught.value.problems == (problem,)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("core.lag", "--set core.lag: expected key.path=value"),
        ("=3", "--set =3: expected key.path=value"),
        ("core..lag=1", "--set core..lag=1: expected key.path=value"),
        ("name.x=3", "--set name.x=3: name is no mapping, so it has no key 'x'"),
        ("faults=[", "--set faults=[: the value is not YAML: expected the node content, but found '<stream end>'"),
        ("core.lag=5", "--set core.lag=5: core.lag: expected at most 2, found 5"),
        ("core.lagg=1", "--set core.lagg=1: core.lagg: unknown key (did you mean 'lag'?)"),
        ("core={lag: 7, batch_size: 1, prefill_chunk: 1}", None),
    ],
)
def test_an_error_in_an_override_names_the_flag(override: str, problem: str | None) -> None:
    problem = problem or f"--set {override}: core.lag: expected at most 2, found 7"
    assert refusal(GOOD, override) == [problem]


@pytest.mark.usefixtures("folder")
def test_an_override_inside_a_list_needs_an_index_that_is_there() -> None:
    text = GOOD + "faults: [{kind: fail, at_step: 1}]\n"
    assert refusal(text, "faults.1.at_step=2") == [
        "--set faults.1.at_step=2: faults is a list of 1: expected an index, found '1'"
    ]
    Path("s.yaml").write_text(text)
    assert load_scenario("s.yaml", ["faults.0.at_step=2"]).faults[0].at_step == 2


@pytest.mark.usefixtures("folder")
def test_a_wrong_seed_names_the_flag() -> None:
    assert refusal(GOOD, seed=-1) == ["--seed -1: seed: expected at least 0, found -1"]


def test_a_missing_trace_names_the_key_and_the_whole_path(folder: Path) -> None:
    trace = "{kind: trace, format: azure, path: t.csv}"
    text = edited("{kind: poisson, request_rate: 10.0}", trace)
    missing = f"workload.arrivals.path: no such file: '{(folder / 't.csv').resolve()}'"
    assert refusal(text) == [f"s.yaml:6:42: {missing}"]
    override = f"workload.arrivals={trace}"
    assert refusal(GOOD, override) == [f"--set {override}: {missing}"]
    (folder / "t.csv").mkdir()
    assert refusal(text) == ["s.yaml:6:42: workload.arrivals.path: 't.csv' is a directory: expected a file"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("old", "new", "place", "needed"),
    [
        ("num_pages: 33", "num_pages: 2000000000", "4:23: cache.num_pages", "1192.1"),
        ("batch_size: 4", "batch_size: 999999999", "3:8: core.batch_size", "1795.6"),
        (
            "max_sequence_length: 64",
            "max_sequence_length: 2147483647",
            "4:38: cache.max_sequence_length",
            "208.0",
        ),
        ("page_size: 4", "page_size: 2147483647", "4:9: cache.page_size", "9504.0"),
        ("prefill_chunk: 8", "prefill_chunk: 2000000000", "3:23: core.prefill_chunk", "29.8"),
        ("num_requests: 50", "num_requests: 2000000000", "9:3: workload.num_requests", "186.3"),
        ("kv_heads: 2", "kv_heads: 2147483647", "4:63: cache.kv_heads", "16896.0"),
    ],
)
def test_a_run_that_exceeds_the_machine_names_the_key_and_both_sizes(
    old: str, new: str, place: str, needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sim.scenario.checks.physical_memory", lambda: 8 * 2**30)
    assert refusal(edited(old, new)) == [
        f"s.yaml:{place}: the run needs {needed} GiB of memory, but this machine has 8.0 GiB"
    ]


@pytest.mark.usefixtures("folder")
def test_pools_on_another_device_and_unknown_memory_refuse_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("s.yaml").write_text(edited("kv_heads: 2}", "kv_heads: 2147483647}\nbackend: {kind: jax, platform: gpu}"))
    monkeypatch.setattr("sim.scenario.checks.physical_memory", lambda: 8 * 2**30)
    assert load_scenario("s.yaml").cache.kv_heads == 2**31 - 1
    Path("s.yaml").write_text(edited("kv_heads: 2", "kv_heads: 2147483647"))
    monkeypatch.setattr("sim.scenario.checks.physical_memory", lambda: None)
    assert load_scenario("s.yaml").cache.kv_heads == 2**31 - 1
