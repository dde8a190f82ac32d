"""The decoder's step times: of steps in which the whole batch decodes."""

from __future__ import annotations

import pytest

from sim.bench_decoder import FULL_STEPS, PROMPT, decoder_steps


@pytest.mark.slow
def test_every_timed_step_is_a_decode_of_the_whole_batch() -> None:
    (found,) = decoder_steps((3,))
    assert found.batch == 3
    assert found.steps >= FULL_STEPS
    # Each sequence reads its prompt and at most what it has yielded.
    assert 3 * PROMPT < found.context_tokens <= 3 * (PROMPT + 3 + FULL_STEPS)
    assert min(found.decoder_ns, found.echo_ns) > 0
