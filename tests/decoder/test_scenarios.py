"""What a scenario with the decoder may not ask for, and what each of its requests draws with."""

import pytest
from pydantic import ValidationError

from backends.none import NoneBackend
from backends.protocol import DeviceSpec
from sim.build import cache_spec, model_spec
from sim.script import RequestScript
from sim.workload import generate, prompt_tokens
from tests.decoder.harness import decoding
from tests.sim.scenario_parts import small


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"backend__kind": "none"}, "backend.kind: none computes nothing"),
        ({"cache__quantize": True}, "cache.quantize: the tiny decoder's K and V are compared bit for bit"),
        ({"cache__dtype": "float8_e5m2"}, "cache.dtype: float8_e5m2 does not hold"),
        ({"cache__head_dim": 7}, "cache.head_dim: the tiny decoder turns pairs of lanes: 7 is odd"),
        ({"cache__max_sequence_length": 5000}, "cache.max_sequence_length: the tiny decoder is exact up to 4096"),
        ({"model": {"kind": "tiny"}}, "model.vocab_size: the tiny decoder knows 4 to 1024 tokens, found 32000"),
        (
            {"model": {"kind": "tiny", "vocab_size": 64, "query_heads": 3}},
            "model.query_heads: 3 cannot share cache.kv_heads 2",
        ),
        ({"model": {"kind": "reader", "query_heads": 4}}, "model.query_heads: the model 'reader' has none"),
        ({"workload__temperature": []}, "at least 1 item"),
        ({"workload__temperature": "hot"}, "expected a number or a list of numbers"),
    ],
    ids=str,
)
def test_what_the_decoder_cannot_do_is_refused_with_its_key(keys, problem):
    with pytest.raises(ValidationError) as caught:
        decoding(**keys)
    assert problem in str(caught.value)


def test_the_backend_that_computes_nothing_has_no_decoder():
    scenario = decoding()
    with pytest.raises(ValueError, match="choose numpy or jax"):
        NoneBackend().open(cache_spec(scenario), model_spec(scenario), DeviceSpec())


def test_each_request_draws_one_of_the_listed_parameters_by_its_id_alone():
    lists = {"workload__temperature": [0.0, 0.5, 1.5], "workload__top_p": [1.0, 0.25]}
    many, few = (
        {
            arrival.request: script.request(arrival)
            for script in [RequestScript(scenario, prompt_tokens)]
            for arrival in generate(scenario)
        }
        for scenario in (small(**lists, workload__num_requests=60), small(**lists, workload__num_requests=5))
    )
    assert {request.temperature for request in many.values()} == {0.0, 0.5, 1.5}
    assert {request.top_p for request in many.values()} == {1.0, 0.25}
    # Temperatures and thresholds are drawn apart from one another.
    assert len({(request.temperature, request.top_p) for request in many.values()}) == 6
    assert [(few[n].temperature, few[n].top_p) for n in few] == [(many[n].temperature, many[n].top_p) for n in few]
