"""A small continuous-batching world that writes run folders, so that reports are tested on data that hang together."""

import json
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

SCENARIO = "schema: kvproof/v1\nname: {name}\nseed: {seed}\n"


@dataclass
class Live:
    id: int
    arrival: int
    prompt: int
    output: int
    todo: int = 0
    computed: int = 0
    made: int = 0
    pages: list[int] = field(default_factory=list)
    admitted: int | None = None
    first: int | None = None
    finish: int | None = None
    last: int = 0
    state: str = "live"
    reason: str = ""
    preemptions: int = 0
    since: int = 0
    kind: int = 0


class World:
    """Prefill one request at a time in chunks, decode all others, evict the newest when pages are short."""

    def __init__(self, requests, num_pages, page_size, batch_size, chunk, base_ns, token_ns):
        self.coming = deque(requests)
        self.requests = list(requests)
        self.num_pages, self.page_size, self.batch_size, self.chunk = num_pages, page_size, batch_size, chunk
        self.base_ns, self.token_ns = base_ns, token_ns
        self.free = deque(range(1, num_pages))
        self.fenced = []
        self.waiting, self.running, self.filling = deque(), [], None
        self.now = 0
        self.rows, self.events, self.segments, self.gaps = [], [], [], {}

    def turn(self, r, kind):
        if self.now > r.since:
            self.segments.append((r.id, r.kind, r.since, self.now))
        r.kind, r.since = kind, self.now

    def own(self, r, tokens):
        need = -(-tokens // self.page_size) - len(r.pages)
        if need > len(self.free):
            return False
        for _ in range(need):
            r.pages.append(self.free.popleft())
            self.events.append((self.now, r.pages[-1], r.id))
        return True

    def release(self, r):
        self.events += [(self.now, p, -2) for p in r.pages]
        self.fenced += [(self.number, p) for p in r.pages]
        r.pages, r.computed = [], 0

    def preempt(self):
        victim = max(self.running, key=lambda r: r.id)
        self.running.remove(victim)
        self.release(victim)
        victim.preemptions += 1
        self.turn(victim, 3)
        self.waiting.appendleft(victim)

    def unfence(self, older_than):
        for number, page in [f for f in self.fenced if f[0] < older_than]:
            self.fenced.remove((number, page))
            self.events.append((self.now, page, -1))
            self.free.append(page)

    def step(self, number):
        self.number = number
        self.unfence(older_than=number - 1)
        preempted = 0
        for r in list(self.running):
            while r in self.running and not self.own(r, r.computed + 1):
                self.preempt()
                preempted += 1
                self.unfence(older_than=number + 1)
        taken = len(self.running) + (self.filling is not None)
        if self.filling is None and self.waiting and taken < self.batch_size and not preempted:
            r = self.waiting[0]
            if -(-(r.prompt + r.made) // self.page_size) + 2 <= len(self.free):
                self.filling = self.waiting.popleft()
                r.todo = r.prompt + r.made
                r.admitted = self.now if r.admitted is None else r.admitted
                self.turn(r, 1)
        fill = 0
        if self.filling is not None:
            fill = min(self.chunk, self.filling.todo - self.filling.computed)
            if not self.own(self.filling, self.filling.computed + fill):
                fill = 0
        start, decoding = self.now, list(self.running)
        owned = sum(len(r.pages) for r in [*decoding, *([self.filling] if self.filling else [])])
        live = sum(r.computed + 1 for r in decoding) + (self.filling.computed + fill if self.filling else 0)
        counts = (owned, len(self.free), len(self.fenced), live, preempted)
        admitted = len(decoding) + (self.filling is not None)
        self.now += self.base_ns + self.token_ns * (fill + len(decoding))
        self.rows.append(
            (number, start, self.now, fill, len(decoding), admitted, len(self.waiting), len(decoding), *counts)
        )
        for r in decoding:
            r.computed += 1
            self.token(r)
        if self.filling is not None:
            r = self.filling
            r.computed += fill
            if r.computed == r.todo:
                self.filling = None
                self.turn(r, 2)
                self.running.append(r)
                self.token(r)

    def token(self, r):
        r.made += 1
        if r.first is None:
            r.first = self.now
        else:
            self.gaps[self.now - r.last] = self.gaps.get(self.now - r.last, 0) + 1
        r.last = self.now
        if r.made >= r.output:
            r.state, r.finish = "finished", self.now
            self.turn(r, 0)
            self.running.remove(r)
            self.release(r)

    def run(self, max_steps):
        for number in range(max_steps):
            if not (self.running or self.waiting or self.filling):
                if not self.coming:
                    return
                self.now = max(self.now, self.coming[0].arrival)
            while self.coming and self.coming[0].arrival <= self.now:
                r = self.coming.popleft()
                if -(-(r.prompt + r.output) // self.page_size) + 2 > self.num_pages - 1:
                    r.state, r.reason, r.finish = "rejected", "too long for the pool", r.arrival
                    continue
                r.since = r.arrival
                self.waiting.append(r)
            if self.running or self.waiting or self.filling:
                self.step(number)
        for r in self.requests:
            if r.state == "live":
                self.turn(r, r.kind)


def latency(values_ns):
    v = np.asarray(values_ns, np.float64) * 1e-9
    if not len(v):
        return {"count": 0} | dict.fromkeys(("mean", "std", "min", "p50", "p90", "p95", "p99", "p99_9", "max"))
    q = dict(zip(("p50", "p90", "p95", "p99", "p99_9"), np.percentile(v, [50, 90, 95, 99, 99.9]).tolist(), strict=True))
    return {"count": len(v), "mean": v.mean(), "std": v.std(), "min": v.min(), **q, "max": v.max()}


STEP_COLUMNS = [
    *("step", "start_ns", "end_ns", "prefill_tokens", "decode_tokens", "running", "waiting", "slots_used"),
    *("pages_owned", "pages_free", "pages_fenced", "live_tokens", "preemptions"),
]


def columns(rows, names):
    table = np.asarray(rows, np.int64).reshape(len(rows), len(names))
    return {name: table[:, i] for i, name in enumerate(names)}


def write_folder(folder, world, name, seed, violations):
    folder.mkdir(parents=True)
    (folder / "scenario.yaml").write_text(SCENARIO.format(name=name, seed=seed))
    series = columns(world.rows, STEP_COLUMNS)
    gaps = np.asarray(sorted(world.gaps.items()), np.int64).reshape(-1, 2)
    np.savez_compressed(
        folder / "series.npz",
        **series,
        itl_gap_ns=gaps[:, 0],
        itl_count=gaps[:, 1],
        **columns(world.events, ("page_time_ns", "page_id", "page_owner")),
        **columns(world.segments, ("seg_request", "seg_kind", "seg_start_ns", "seg_end_ns")),
        num_pages=world.num_pages,
        page_size=world.page_size,
        batch_size=world.batch_size,
    )
    rs = world.requests
    lines = [
        {
            "id": r.id,
            "arrival_ns": r.arrival,
            "admitted_ns": r.admitted,
            "first_token_ns": r.first,
            "finish_ns": r.finish,
            "prompt_tokens": r.prompt,
            "output_tokens": r.made,
            "state": r.state,
            "reason": r.reason,
            "preemptions": r.preemptions,
        }
        for r in rs
    ]
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seconds = world.now * 1e-9 or 1.0
    done = [r for r in rs if r.first is not None]
    expanded = np.repeat(gaps[:, 0], gaps[:, 1])
    usage = series["pages_owned"] / (world.num_pages - 1)
    room = series["pages_owned"] * world.page_size
    summary = {
        "schema": "kvproof/summary-v1",
        "name": name,
        "clock": "simulated",
        "seed": seed,
        "scenario_hash": "5ce9a210b7d3e64f",
        "versions": {"kvproof": "0.1.0", "numpy": "2.3.0"},
        "backend": "none",
        "device": "none",
        "steps": len(world.rows),
        "requests": {"submitted": len(rs)}
        | {s: sum(r.state == s for r in rs) for s in ("finished", "cancelled", "rejected", "live")},
        "tokens": {
            "prompt": sum(r.prompt for r in rs),
            "output": sum(r.made for r in rs),
            "scheduled": int(series["prefill_tokens"].sum() + series["decode_tokens"].sum()),
            "recomputed": 0,
        },
        "time_to_first_token_seconds": latency([r.first - r.arrival for r in done]),
        "inter_token_latency_seconds": latency(expanded),
        "time_per_output_token_seconds": latency(
            [(r.last - r.first) / (r.made - 1) for r in done if r.finish and r.made > 1]
        ),
        "e2e_request_latency_seconds": latency([r.finish - r.arrival for r in done if r.finish]),
        "kv_cache_usage_perc": {"mean": float(usage.mean()), "max": float(usage.max())}
        if len(usage)
        else {"mean": None, "max": None},
        "internal_fragmentation": {
            "mean": float(np.mean(1 - series["live_tokens"][room > 0] / room[room > 0])) if (room > 0).any() else None
        },
        "num_preemptions": int(series["preemptions"].sum()),
        "invariants": {
            "P1": {"checked": len(world.rows), "nontrivial": len(world.rows), "violated": len(violations)},
            "T1": {"checked": len(world.rows), "nontrivial": 0, "violated": 0},
        },
        "violations": violations,
        "trace_hash": "91d3c0ffee4242aa",
        "duration_simulated_seconds": seconds,
        "duration_wall_seconds": 1.25,
        "duration_cpu_seconds": 1.2,
        "request_throughput": len(done) / seconds,
        "output_throughput": sum(r.made for r in rs) / seconds,
        "verdict": "violated" if violations else "held",
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return folder


def make_run(
    parent: Path,
    *,
    name="chat-burst",
    seed=7,
    num_requests=20,
    rate=6.0,
    num_pages=65,
    page_size=16,
    batch_size=8,
    chunk=64,
    prompt=96,
    output=24,
    base_ns=20_000_000,
    token_ns=150_000,
    max_steps=1_000_000,
    violate_at=None,
    cancel=(),
):
    """Write a run folder and return it. `violate_at`: the step of an invented violation; `cancel`: requests' ids."""
    r = np.random.default_rng(seed)
    arrivals = np.cumsum(r.exponential(1 / rate, num_requests)) * 1e9
    prompts = np.clip(np.round(r.lognormal(np.log(prompt) - 0.18, 0.6, num_requests)), 4, 2048)
    outputs = np.clip(np.round(r.lognormal(np.log(output) - 0.18, 0.6, num_requests)), 1, 1024)
    requests = [
        Live(i, int(a), int(p), int(o)) for i, (a, p, o) in enumerate(zip(arrivals, prompts, outputs, strict=True))
    ]
    for i in cancel:
        requests[i].state, requests[i].reason, requests[i].finish = "cancelled", "client", requests[i].arrival
    alive = [q for q in requests if q.id not in cancel]
    world = World(alive, num_pages, page_size, batch_size, chunk, base_ns, token_ns)
    world.run(max_steps)
    world.requests = requests
    violations = []
    if violate_at is not None:
        at = world.rows[violate_at][1]
        violations = [
            {
                "id": "P1",
                "step": violate_at,
                "time_ns": at,
                "message": "page 7 has two owners: requests 3 and 5 <b>both</b>",
                "evidence": {"page": 7, "owners": [3, 5]},
            }
        ]
    return write_folder(parent / f"{name}-20260101T000000Z-{seed:04x}", world, name, seed, violations)


@pytest.fixture(scope="session")
def run_maker():
    return make_run


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("small"), name="small")
