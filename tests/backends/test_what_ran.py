"""What a backend tells of the step that ran and of the arrays that hold the cache."""

import numpy as np
import pytest

from paged_attention.model_io import PagedAttentionMetadata, query_starts
from tests.backends.harness import EngineRun, JaxBackend, NoneBackend, NumpyBackend, cache_spec, opened

pytestmark = pytest.mark.device


def test_query_starts_leave_padding_out_and_repeat_for_slots_without_a_sequence():
    decodes = PagedAttentionMetadata.init_empty().replace(
        decodes_position=np.array([4, -1, 0, -1], np.int32), decodes_page_table=np.zeros((4, 2), np.int32)
    )
    assert query_starts(decodes).tolist() == [0, 1, 1, 2, 2]
    mixed = decodes.replace(prefill_length=np.array(9, np.int32), prefill_position=np.arange(6, 12, dtype=np.int32))
    assert query_starts(mixed).tolist() == [0, 3, 4, 4, 5, 5]
    assert query_starts(PagedAttentionMetadata.init_empty()).tolist() == [0]


def test_a_native_step_says_what_its_rows_ran_with():
    cache = cache_spec(lag=1)
    backend, seen = opened(JaxBackend(), cache), 0
    run = EngineRun(cache, 3, 1)

    def execute(plan, rows):
        nonlocal seen
        outcome = backend.execute(plan, rows).result()
        ran = backend.evidence(np.zeros(0, np.int32), np.zeros(0, np.int32)).ran
        seen += 1
        assert ran.step == plan.step
        alive = (outcome.token >= 0) | (plan.samples == 0)
        at = ran.device_row[alive]
        assert ((ran.query_starts[1:] - ran.query_starts[:-1])[at] == plan.count[alive]).all()
        assert ran.query_starts[-1] == plan.count[alive].sum()
        assert (ran.sampled_row[at] == ran.input_start[at] + plan.count[alive] - 1).all()
        assert (ran.seed[at] == rows.token_seed[alive]).all()
        return outcome

    run.run(execute)
    assert seen > 10


def test_steps_take_the_pools_that_they_are_given_and_leave_as_many():
    cache = cache_spec()
    backend = opened(JaxBackend(), cache)
    before = backend.buffers()
    sizes = {(before.num_buffers, before.num_bytes)}
    assert before.num_bytes % sum(2 * np.prod(a.shape) for a in before.arrays) == 0

    def execute(plan, rows):
        outcome = backend.execute(plan, rows).result()
        after = backend.buffers()
        sizes.add((after.num_buffers, after.num_bytes))
        assert after.num_not_donated == 0
        assert [a.boxes for a in after.arrays] == [(tuple((0, n) for n in a.shape),) for a in after.arrays]
        return outcome

    EngineRun(cache, 3, 0).run(execute)
    assert len(sizes) == 1


def test_backends_without_a_device_say_what_they_hold():
    assert opened(NoneBackend(), cache_spec()).buffers() is None
    quantised = opened(NumpyBackend(), cache_spec(quantize=True)).buffers()
    assert (quantised.num_buffers, quantised.num_not_donated) == (2, 0)
