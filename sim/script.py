"""What every request of a run is: its seed, its prompt, its limits, and where its EOS token stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from jaxtyping import Float32, Int32, UInt32

from paged_attention.fingerprint import GOLDEN, kv_base, mix32
from paged_attention.plan import ModelRows, Request, StepPlan
from sim.scenario import Scenario
from sim.workload.arrival import Arrival

NO_EOS: Final = -1
_FIRST_ADMISSION: Final = np.int32(1).tobytes()
_NOTHING_DRAWN: Final = np.zeros(0, np.float32)
_BLOCK = 256
"""Seeds and bases are made for this many requests at a time: one call each in place of one per request."""

PromptMaker = Callable[[int, int, int, int], Int32[np.ndarray, " prompt_tokens"]]
"""(scenario seed, request id, length, vocab size) to token ids."""


def request_seeds(seed: int, requests: Any) -> Any:
    """The uint32 sampling seed of each request id: a function of the scenario seed and the id alone."""
    folded = np.uint32((seed ^ (seed >> 32)) & 0xFFFFFFFF)
    ids = np.asarray(requests).astype(np.uint32)
    return mix32(mix32(ids + np.uint32(GOLDEN)) ^ folded)


class RequestScript:
    """Makes requests from arrivals, and from each plan the rows that its model computes."""

    def __init__(self, scenario: Scenario, make_prompt: PromptMaker) -> None:
        self._seed = scenario.seed
        self._vocab_size = scenario.model.vocab_size
        self._draws = scenario.model.kind == "tiny"
        self._workload = scenario.workload
        cache = scenario.cache
        self._longest = min(cache.max_sequence_length, (cache.num_pages - 1) * cache.page_size)
        self._make_prompt = make_prompt
        self._newest = ModelRows(np.zeros(0, np.uint32), np.zeros(0, np.uint32), np.zeros(0, np.int32))
        """The rows of the newest plan, and whose they are: a plan with the very same columns has the same."""
        self._request = self._admission = np.zeros(0, np.int32)
        self._bases: UInt32[np.ndarray, " capacity"] = np.zeros(0, np.uint32)
        self._seeds: UInt32[np.ndarray, " capacity"] = np.zeros(0, np.uint32)
        self._eos_position: Int32[np.ndarray, " capacity"] = np.zeros(0, np.int32)
        self._temperature: Float32[np.ndarray, " capacity"] = np.zeros(0, np.float32)
        self._top_p: Float32[np.ndarray, " capacity"] = np.zeros(0, np.float32)

    def request(self, arrival: Arrival) -> Request:
        """The request of an arrival.

        Where outputs end by EOS, the token at position prompt + output - 1 is one, and max_tokens leaves room up to the
        longest sequence that fits; else max_tokens ends the output. A decoder draws its EOS itself, and earlier.
        """
        request, num_prompt, max_tokens = arrival.request, arrival.prompt_tokens, arrival.output_tokens
        if request >= len(self._bases):
            self._reserve(request)
        if arrival.eos_after:
            self._eos_position[request] = num_prompt + arrival.eos_after - 1
        elif self._workload.end_by == "eos" and not self._draws:
            self._eos_position[request] = num_prompt + max_tokens - 1
            max_tokens = max(max_tokens, self._longest - num_prompt + 1)
        return Request(
            id=request,
            prompt=self._make_prompt(self._seed, request, num_prompt, self._vocab_size),
            max_tokens=max_tokens,
            temperature=self._temperature.item(request),
            top_p=self._top_p.item(request),
            seed=self._seeds.item(request),
        )

    def eos_position(self, request: int) -> int:
        """The position of the request's EOS token; -1 where no EOS ends it."""
        return int(self._eos_position[request])

    def rows(self, plan: StepPlan) -> ModelRows:
        """What the model computes for each row of a plan."""
        if plan.request is not self._request or plan.admission is not self._admission:
            self._request, self._admission = plan.request, plan.admission
            self._newest = self._rows(plan)
        return self._newest

    def _rows(self, plan: StepPlan) -> ModelRows:
        # As an index, int32 costs several times what intp does.
        request = plan.request.astype(np.intp)
        if plan.admission.tobytes() == _FIRST_ADMISSION * len(request):
            bases = self._bases[request]
        else:
            bases = kv_base(request, plan.admission)
        seeds, eos = self._seeds[request], self._eos_position[request]
        if self._draws:
            return ModelRows(bases, seeds, eos, self._temperature[request], self._top_p[request])
        return ModelRows(bases, seeds, eos, _NOTHING_DRAWN, _NOTHING_DRAWN)

    def _reserve(self, request: int) -> None:
        while request >= len(self._bases):
            ids = np.arange(len(self._bases), max(2 * len(self._bases), _BLOCK))
            self._bases = np.concatenate((self._bases, kv_base(ids, np.ones_like(ids))))
            self._seeds = np.concatenate((self._seeds, request_seeds(self._seed, ids)))
            self._eos_position = np.concatenate((self._eos_position, np.full(len(ids), NO_EOS, np.int32)))
            settings = self._workload
            self._temperature = np.concatenate((self._temperature, self._choices(settings.temperature, 1, ids)))
            self._top_p = np.concatenate((self._top_p, self._choices(settings.top_p, 2, ids)))

    def _choices(self, some: float | tuple[float, ...], stream: int, ids: Any) -> Float32[np.ndarray, " requests"]:
        """One value for each request id, a function of the scenario seed and the id alone."""
        values = np.atleast_1d(np.array(some, np.float32))
        if len(values) == 1:
            return values.repeat(len(ids))
        drawn = mix32(request_seeds(self._seed, ids) ^ np.uint32(stream * GOLDEN & 0xFFFFFFFF))
        return values[drawn % len(values)]
