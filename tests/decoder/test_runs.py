"""The decoder on the pages gives what its oracle gives alone, however it is scheduled."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from invariants.reference_decoder import ReferenceDecoder
from sim.build import cache_spec, model_spec
from sim.run import run
from sim.scenario import load_scenario
from sim.script import RequestScript
from sim.workload import generate, prompt_tokens
from tests.decoder.harness import LayerForgotten, OtherLogits, TokenMisplaced, decoding, outputs, planted

LIVE = ("K1", "K2", "K3", "K7", "K9", "O1", "O2", "O3", "O10")


def alone(scenario) -> dict[int, list[int]]:
    """What every request yields by itself, from the oracle."""
    decoder = ReferenceDecoder(model_spec(scenario).decoder(cache_spec(scenario)))
    script = RequestScript(scenario, prompt_tokens)
    requests = [script.request(arrival) for arrival in generate(scenario)]
    return {request.id: list(decoder.run(request, request.max_tokens).tokens) for request in requests}


@st.composite
def scenarios(draw):
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return decoding(
        seed=draw(st.integers(0, 10_000)),
        core__lag=draw(st.integers(0, 2)),
        core__batch_size=draw(st.integers(1, 5)),
        core__prefill_chunk=draw(st.sampled_from([1, 3, 8])),
        core__mix=draw(st.sampled_from(["mixed", "prefill_first", "decode_first"])),
        cache__page_size=draw(st.sampled_from([1, 3, 4])),
        cache__num_pages=draw(st.sampled_from([32, 40])),
        cache__layers=draw(st.integers(1, 3)),
        cache__kv_heads=kv_heads,
        cache__head_dim=draw(st.sampled_from([2, 6, 8])),
        cache__dtype=draw(st.sampled_from(["bfloat16", "float16", "float32", "int8"])),
        model={
            "kind": "tiny",
            "vocab_size": draw(st.sampled_from([8, 64, 300])),
            "seed": draw(st.integers(0, 100)),
            "query_heads": kv_heads * draw(st.integers(1, 3)),
        },
        workload__num_requests=draw(st.integers(1, 6)),
        workload__end_by=draw(st.sampled_from(["max_tokens", "eos"])),
        workload__temperature=draw(st.lists(st.floats(0, 4), min_size=1, max_size=3)),
        workload__top_p=draw(st.lists(st.floats(0.01, 1), min_size=1, max_size=2)),
        faults=[{"kind": "fail", "at_step": draw(st.integers(0, 20))}],
        expect={"rejected": {"min": 0}},
    )


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenarios())
def test_whatever_the_schedule_every_request_gets_the_tokens_that_it_gets_alone(scenario):
    report, tokens = outputs(scenario)
    assert report.violations == ()
    assert report.summary["crash"] is None
    expected = alone(scenario)
    assert tokens == {request: expected[request] for request in tokens}
    counters = report.summary["invariants"]
    assert counters["O2"]["nontrivial"] == sum(map(len, tokens.values())) > 0
    assert counters["K1"]["nontrivial"] > 0


VARIANTS = [
    {"core__prefill_chunk": 3, "core__lag": 2},
    {"core__prefill_chunk": 64, "cache__num_pages": 65},
    {"core__batch_size": 1, "cache__dtype": "float32"},
    {"cache__page_size": 5, "cache__num_pages": 9, "core__mix": "decode_first"},
]


@pytest.mark.slow
def test_chunks_batch_pages_preemption_and_lag_change_no_token():
    report, tokens = outputs(decoding())
    assert report.summary["num_preemptions"] > 0
    found = [outputs(decoding(**changes))[1] for changes in VARIANTS]
    assert found == [tokens] * len(VARIANTS)


def test_an_eos_that_is_drawn_ends_an_output_and_none_is_drawn_where_max_tokens_do():
    keys = {"workload__num_requests": 16, "model": {"kind": "tiny", "vocab_size": 8}, "workload__temperature": 2.0}
    report, tokens = outputs(decoding(workload__end_by="eos", core__lag=1, **keys))
    assert report.violations == ()
    ended = [output for output in tokens.values() if output[-1] == 0]
    assert 2 < len(ended) < 16
    assert not any(0 in output[:-1] for output in tokens.values())
    report, tokens = outputs(decoding(**keys))
    assert not any(0 in output for output in tokens.values())
    expected = [arrival.output_tokens for arrival in generate(decoding(**keys))]
    assert [len(output) for output in tokens.values()] == expected


def violated(scenario) -> set[str]:
    return {violation.id for violation in run(scenario).violations}


def test_o2_tells_logits_that_are_not_the_oracles(monkeypatch):
    planted(monkeypatch, OtherLogits)
    report = run(decoding())
    assert {violation.id for violation in report.violations} == {"O2"}
    assert "from other logits" in report.violations[0].message


def test_k9_tells_a_layer_that_was_not_written_from_a_token_in_the_wrong_place(monkeypatch):
    planted(monkeypatch, LayerForgotten)
    assert {"K1", "K9"} <= violated(decoding())
    monkeypatch.undo()
    planted(monkeypatch, TokenMisplaced)
    found = violated(decoding())
    assert found & {"K1", "K2"}
    assert "K9" not in found


def test_jax_gives_the_oracles_tokens_and_the_numpy_backends_bits():
    scenario = load_scenario("scenarios/gauntlet/device-tiny.yaml")
    on_jax = run(scenario)
    on_numpy = run(scenario.model_copy(update={"backend": scenario.backend.model_copy(update={"kind": "numpy"})}))
    for report in (on_jax, on_numpy):
        assert report.violations == ()
        assert [check for check in report.checks if not check.held] == []
        counters = report.summary["invariants"]
        assert [name for name in LIVE if not counters[name]["nontrivial"]] == []
    assert on_jax.trace_hash == on_numpy.trace_hash
    assert on_jax.summary["cache_hash"] == on_numpy.summary["cache_hash"] is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"core__lag": 1, "workload__end_by": "eos"},
        {"core__lag": 2, "backend__road": "rows", "workload__end_by": "eos"},
        {"core__prefill_chunk": 3, "cache__page_size": 5, "cache__num_pages": 9, "cache__dtype": "float16"},
        {"cache__kv_heads": 3, "cache__dtype": "int8", "cache__layers": 3, "backend__road": "rows"},
        {"cache__kv_heads": 1, "cache__dtype": "float32", "cache__head_dim": 6, "core__mix": "decode_first"},
    ],
    ids=str,
)
def test_jax_gives_the_oracles_tokens_and_bits_on_both_roads(keys):
    reports = [
        run(decoding(backend__kind=kind, workload__num_requests=40, invariants__full_every=16, **keys))
        for kind in ("jax", "numpy")
    ]
    assert [report.violations for report in reports] == [(), ()]
    assert reports[0].trace_hash == reports[1].trace_hash
    assert reports[0].summary["cache_hash"] == reports[1].summary["cache_hash"]
