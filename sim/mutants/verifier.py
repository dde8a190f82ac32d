"""Planted bugs in the simulator and the verifier themselves (MD)."""

from __future__ import annotations

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_RECORDER = "sim.record:Recorder"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "MD01",
        "The time at which a request ends is read off the wall clock.",
        ("M4", "O9"),
        edits=(
            Edit(
                f"{_RECORDER}._gone",
                "self._rows.finish_ns[effect.request] = now_ns",
                "self._rows.finish_ns[effect.request] = __import__('time').perf_counter_ns()",
            ),
        ),
    ),
    Mutant(
        "MD02",
        "Decodes that grow are taken from a set of their names, so that each gets its page in the set's order.",
        ("D1",),
        where="deep",
        edits=(
            Edit(
                "paged_attention.scheduler:InferenceScheduler._growing_slots",
                "(self._capacity <= positions).nonzero()[0].tolist()",
                "[int(name) for name in {str(slot) for slot in (self._capacity <= positions).nonzero()[0].tolist()}]",
            ),
        ),
        driver="deep-host",
    ),
    Mutant(
        "MD03",
        "Prompts are drawn from the global random state instead of the scenario's seed.",
        ("D1",),
        where="deep",
        edits=(
            Edit(
                "sim.workload.prompts:prompt_tokens",
                'digest = hashlib.blake2b(struct.pack("<QQ", seed, request), digest_size=4, person=b"prompt").digest()',
                "digest = __import__('random').randbytes(4)",
            ),
        ),
    ),
    Mutant(
        "MD05",
        "All concerns draw from one stream of random numbers, so that a cancel shifts every later length.",
        ("contract",),
        driver="contract:streams",
        edits=(
            Edit(
                "sim.streams:stream",
                "return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, key))))",
                "return globals().setdefault(f'_of_{seed + 0 * key}', np.random.Generator(np.random.PCG64(seed)))",
            ),
        ),
    ),
    Mutant(
        "MD06",
        "A step without a prefill takes no time.",
        ("L5",),
        edits=(
            Edit(
                "sim.cost_model:Fixed.duration_ns",
                "return max(1, self.step_ns)",
                "return self.step_ns if (plan.slot < 0).any() else 0",
            ),
        ),
        driver="host-lag-two",
    ),
    Mutant(
        "MD07",
        "A cancel that names a step comes after that step has been planned.",
        ("contract",),
        edits=(
            Edit(
                "sim.engine:Engine._upset",
                """    for request in self._faults.take_cancels(self._num_plans):
        self._cancel(request)
""",
                "",
            ),
            Edit(
                "sim.engine:Engine._fill",
                "            self._planned(plan)\n",
                """            self._planned(plan)
            for request in self._faults.take_cancels(step):
                self._cancel(request)
""",
            ),
        ),
        driver="contract:faults",
    ),
    Mutant(
        "MD08",
        "Looking at the free pages takes the first one out and puts it back at the end.",
        ("P13", "D4"),
        edits=(
            Edit(
                "paged_attention.pages:HBMPageManager.free_pages",
                "    return list(self._available_hbm_pages)",
                """    for page in self._available_hbm_pages.take(min(1, self.num_available_pages)):
        self._available_hbm_pages.put(page)
    return list(self._available_hbm_pages)""",
            ),
        ),
    ),
    Mutant(
        "MD09",
        "The time to the first token is measured from the admission, not from the arrival.",
        ("M4",),
        edits=(
            Edit(
                "sim.metrics:latencies",
                '"time_to_first_token_seconds": distribution((first - arrival)[got_one])',
                '"time_to_first_token_seconds": distribution((first - requests.admitted_ns)[got_one])',
            ),
        ),
    ),
    Mutant(
        "MD11",
        "The usage gauge counts the dummy page.",
        ("M3",),
        edits=(Edit(f"{_RECORDER}.__init__", "self.pages_owned = 0", "self.pages_owned = 1"),),
    ),
    Mutant(
        "MD12",
        "The auditor takes over the core's page lists as its own, and the core loses the last page of whoever drains.",
        ("P2", "P1"),
        edits=(
            Edit(
                "invariants.snapshots:SnapshotJudge._pages",
                "    free, fenced = snapshot.free.tolist(), snapshot.fenced.tolist()\n",
                """    free, fenced = snapshot.free.tolist(), snapshot.fenced.tolist()
    for live in self.ledger.live.values():
        if live.admission is not None and (live.id, live.admission.number) in owned:
            live.admission.pages = owned[live.id, live.admission.number]
""",
            ),
            Edit(
                "paged_attention.planning:_count_decodes",
                "    last.append(sequence)\n",
                "    last.append(sequence)\n        sequence.pages.pop()\n",
            ),
        ),
        driver="host-lag-one",
    ),
    Mutant(
        "MD13",
        "The check that a failed allocation changes nothing is guarded by a condition that never holds.",
        ("vacuity",),
        where="deep",
        edits=(
            Edit(
                "invariants.snapshots:SnapshotJudge.judge",
                "if after_failure:",
                "if after_failure and differences is None:",
            ),
        ),
    ),
    Mutant(
        "MD15",
        "The shrinker keeps a scenario that shows any violation, not the one that it was given.",
        ("contract",),
        edits=(Edit("sim.search.shrink:_Search._try", "if finding.pin != self.finding.pin:", "if not finding.id:"),),
        driver="contract:shrinks",
    ),
    Mutant(
        "MD16",
        "A replay runs with the usual page size, not with the one that was recorded.",
        ("contract",),
        edits=(
            Edit(
                "sim.replay:replay",
                "run_whole(recorded.scenario,",
                """run_whole(
        recorded.scenario.model_copy(
            update={"cache": recorded.scenario.cache.model_copy(update={"page_size": 16})}
        ),""",
            ),
        ),
        driver="contract:replays",
    ),
)
