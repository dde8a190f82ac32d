"""What annotations say is checked while tests run: types, dtypes, numbers of axes, and axes that arrays share."""

import numpy as np
import pytest
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import jaxtyped

from backends import scripted
from backends.protocol import ModelSpec
from backends.scripted import TokenScript
from paged_attention.fingerprint import salts
from tests.backends.harness import NoneBackend, cache_spec, engine_for, opened
from tests.backends.planner import Planner

SEED, POSITION = np.zeros(3, np.uint32), np.arange(3, dtype=np.int32)


@pytest.mark.parametrize(
    "wrong_call",
    [
        pytest.param(lambda: salts(2, 2, 8.0), id="type"),
        pytest.param(lambda: engine_for(cache_spec(), 0).submit("request"), id="class"),
        pytest.param(lambda: TokenScript(9, 7).tokens(SEED, POSITION.astype(np.int64)), id="dtype"),
        pytest.param(lambda: TokenScript(9, 7).tokens(SEED, POSITION[None]), id="axes"),
        pytest.param(lambda: NoneBackend().open(cache_spec(), None, ModelSpec()), id="backend"),
    ],
)
def test_a_call_that_contradicts_its_annotations_is_refused(wrong_call):
    with pytest.raises(BeartypeCallHintViolation):
        wrong_call()


def test_the_arrays_of_a_scripted_step_have_an_entry_for_each_row(monkeypatch):
    """The one module where axes of several arrays of a call have the same name."""
    related = jaxtyped(typechecker=beartype)
    for name in ("tokens", "outcome", "_with_ends"):
        # Annotations that are texts are those of the function underneath.
        monkeypatch.setattr(TokenScript, name, related(vars(TokenScript)[name].__wrapped__))
    monkeypatch.setattr(scripted, "dead_rows", related(scripted.dead_rows.__wrapped__))
    planner, backend = Planner(cache_spec(), 3, eos=True), opened(NoneBackend(), cache_spec())
    assert sum(int(backend.execute(*planner.plan()).result().eos.sum()) for _ in range(40)) > 1
    with pytest.raises(TypeError, match="position"):
        TokenScript(9, 7).tokens(SEED, POSITION[:1])
