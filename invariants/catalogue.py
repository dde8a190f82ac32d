"""Every invariant by id: the statement, why it matters, what it costs, and whether it is checked yet.

Plain data: `kvproof list invariants` and `kvproof explain ID` print it, judges name their statements by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal[
    "pages", "tables", "contents", "schedule", "liveness", "outputs", "sharing", "lifecycle", "determinism", "metrics"
]
Cost = Literal["delta", "rows", "step", "full", "once"]
"""What one check costs: per thing that changed, per row, once per step, the whole state, once per run."""
Mode = Literal["always", "deep"]
"""Who checks it: the auditor of every run, or `kvproof run --deep`, which compares runs with one another."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One invariant. `waits_for` names the feature it needs; "" where it is checked today, by whom `mode` says."""

    id: str
    family: Family
    statement: str
    why: str
    cost: Cost
    when: str
    waits_for: str = ""
    mode: Mode = "always"

    @property
    def active(self) -> bool:
        """Whether it is checked today."""
        return not self.waits_for

    @property
    def status(self) -> str:
        """Whether and by whom it is checked, in words."""
        if not self.active:
            return f"not yet applicable: {self.waits_for}"
        return "checked by kvproof run --deep" if self.mode == "deep" else "checked in every run"


_ENTRIES = (
    Entry(
        "P1",
        "pages",
        "Each page from 1 on is exactly one of free, owned and fenced.",
        "Two owners of a page overwrite each other; a page in no list is lost for good.",
        "delta",
        "each grant; whole pool on full steps",
    ),
    Entry(
        "P2",
        "pages",
        "Free, fenced and owned pages add up to num_pages - 1.",
        "A leak shows in the sum before anything runs dry.",
        "full",
        "full steps",
    ),
    Entry(
        "P3",
        "pages",
        "Page 0, the dummy, is never handed out, never given back, and never within the used part of a row.",
        "Padding writes to it: whoever owned it would read garbage.",
        "delta",
        "each grant, each row",
    ),
    Entry(
        "P4",
        "pages",
        "The reference count of a page is the number of lists it is in, and above 1 only where pages are shared.",
        "A count too high leaks a page, one too low frees it under a reader.",
        "delta",
        "each grant",
        "prefix sharing",
    ),
    Entry(
        "P5",
        "pages",
        "Pages are given back once, by the admission that holds them.",
        "A page freed twice is handed out twice.",
        "delta",
        "each release",
    ),
    Entry(
        "P6",
        "pages",
        "A sequence holds exactly the pages that its computed and scheduled tokens need (with the declared lookahead).",
        "One page too many per sequence wastes the pool; one too few writes into a stranger's page.",
        "rows",
        "each row",
    ),
    Entry(
        "P7",
        "pages",
        "While a request is admitted its page list is only extended.",
        "Moving a page that is written loses the tokens in it.",
        "delta",
        "each grant, each row",
    ),
    Entry(
        "P8",
        "pages",
        "Each page id lies in 1 .. num_pages - 1.",
        "JAX wraps or clamps an id outside the pool onto another page without a word.",
        "delta",
        "each grant",
    ),
    Entry(
        "P9",
        "pages",
        "An allocation that fails changes nothing.",
        "Pages taken for a grant that was then given up belong to nobody.",
        "full",
        "after a plan that gave up for want of pages, and after a preemption",
    ),
    Entry(
        "P10",
        "pages",
        "Pages of an admission that is over are given back in the same call, and leave the fence with its last step.",
        "Pages that come back late are missing under load, and those that come back never are lost.",
        "delta",
        "each call",
    ),
    Entry(
        "P11",
        "pages",
        "A page is not handed out while a step in flight may touch it for its last owner.",
        "A late write of the old owner lands in the new owner's tokens.",
        "delta",
        "each grant, each opened fence",
    ),
    Entry(
        "P12",
        "pages",
        "When the last request is gone pages, rows, slots, maps and queues are as they were at first.",
        "What is left over after every drain adds up until the server stops.",
        "once",
        "end of the run",
    ),
    Entry(
        "P13",
        "pages",
        "Pages are handed out and given back in the declared order.",
        "An undeclared order hides a set or a hash seed, and with it replay.",
        "delta",
        "each grant; whole list on full steps",
    ),
    Entry(
        "T1",
        "tables",
        "The page list of a sequence is the same in the books, the plan, the host batch and the device batch.",
        "A row that misses an append sends the next write elsewhere.",
        "rows",
        "each row; host batch on full steps; device rows by sample",
    ),
    Entry(
        "T2",
        "tables",
        "Past its used length a row holds the dummy page, and a free slot's row holds nothing else.",
        "A stale tail gives the next sequence in the slot a stranger's pages.",
        "rows",
        "each row; host batch on full steps; device rows by sample",
    ),
    Entry(
        "T3",
        "tables",
        "Slots and decoding requests match one to one, and all other slots are free.",
        "Two requests in a slot mix their tokens; a slot that nobody holds is lost.",
        "delta",
        "each join and release; map on full steps",
    ),
    Entry(
        "T4",
        "tables",
        "Where rows move, every per-row array moves with them.",
        "A row moved by half samples with a stranger's parameters.",
        "rows",
        "each move",
        "batch condensing",
    ),
    Entry(
        "T5",
        "tables",
        "The device rows that a step uses are at least as new as the last host change of them.",
        "A page appended too late on the device is not written.",
        "step",
        "device rows by sample, where a row was changed",
    ),
    Entry(
        "T6",
        "tables",
        "The position of each slot, on host and device, is the number of tokens computed; -1 without a live sequence.",
        "Off by one, attention misses a token or reads one that is not there.",
        "rows",
        "each row; host batch on full steps; device by sample",
    ),
    Entry(
        "K1",
        "contents",
        "The K and V of each computed token lie at page table[position // page_size], offset position % page_size.",
        "This is what paged attention reads.",
        "rows",
        "each dispatched step; whole pool on full steps",
    ),
    Entry(
        "K2",
        "contents",
        "Every place outside a step's planned writes keeps its bits.",
        "A stray write damages whoever owns the place, and shows much later.",
        "rows",
        "each dispatched step by sample or whole touched pages; whole pool on full steps and at the end",
    ),
    Entry(
        "K3",
        "contents",
        "The planned places of a step are unique and each holds its new value afterwards.",
        "Scatter drops, clamps and races in silence.",
        "rows",
        "each dispatched step",
    ),
    Entry(
        "K4",
        "contents",
        "A sequence reads only places of its own positions below its length.",
        "Freed pages, tails and the dummy hold anything.",
        "full",
        "two runs with poison in all free pages, page tails and the dummy",
        mode="deep",
    ),
    Entry(
        "K5",
        "contents",
        "What lies in the dummy page reaches no result.",
        "0 times NaN is NaN.",
        "full",
        "two runs with poison in the dummy",
        mode="deep",
    ),
    Entry(
        "K6",
        "contents",
        "A write to a dirty page leaves the same bits as a write to a clean one.",
        "An accumulating write only shows on reused pages.",
        "full",
        "what each step writes, in the runs with poison",
        mode="deep",
    ),
    Entry(
        "K7",
        "contents",
        "K and V, heads, dtype and scales survive the round trip through the cache.",
        "Exchanged streams attend to values.",
        "rows",
        "wherever K1 or K2 finds a wrong place",
    ),
    Entry(
        "K8",
        "contents",
        "Number and size of live cache buffers stay constant, and a donated buffer is not used again.",
        "A dropped donation copies the pool each step.",
        "step",
        "by sample",
    ),
    Entry(
        "K9",
        "contents",
        "A place is written in every layer or in none.",
        "A layer loop that always writes layer 0 looks right in layer 0.",
        "rows",
        "wherever K1 or K2 finds a wrong place",
    ),
    Entry(
        "K10",
        "contents",
        "The shards of the cache together hold each position once.",
        "A wrong sharding spec replicates or drops heads.",
        "full",
        "full steps",
    ),
    Entry(
        "S1",
        "schedule",
        "A step stays within its token budget; each request runs once, with at least one token and at most a chunk.",
        "An overfull step breaks the latency that the budget promises, or the padded shape.",
        "rows",
        "each plan, each row",
    ),
    Entry(
        "S2",
        "schedule",
        "A row starts at the number of tokens computed and goes on without gap.",
        "A gap leaves a hole in the cache; a repeat costs a step.",
        "rows",
        "each row",
    ),
    Entry(
        "S3",
        "schedule",
        "Each admission feeds its known tokens once, in order; only the row that reaches the last yields a token, one.",
        "Sampling early answers half a prompt; sampling never hangs.",
        "rows",
        "each row",
    ),
    Entry(
        "S4",
        "schedule",
        "No row goes beyond the tokens that are known, nor beyond the maximum length.",
        "Tokens that do not exist are garbage, and their writes clamp onto the last page.",
        "rows",
        "each row",
    ),
    Entry(
        "S5",
        "schedule",
        "Each scheduled token has its page before the step runs.",
        "Otherwise it is written to the dummy, or to whoever was there before.",
        "rows",
        "each row",
    ),
    Entry(
        "S6",
        "schedule",
        "Each live request is in exactly one queue, the one of its state; a gone one is in none.",
        "A request in no queue hangs; one in two runs twice.",
        "full",
        "rows of strangers; queues on full steps",
    ),
    Entry(
        "S7",
        "schedule",
        "Requests move only along the declared automaton, in the calls declared for each move.",
        "A zombie that resumes writes to pages it no longer owns.",
        "delta",
        "each effect, each row",
    ),
    Entry(
        "S8",
        "schedule",
        "Query starts are monotone, end at the total, and the logits row of a request is its last one.",
        "A wrong row answers with a stranger's token.",
        "rows",
        "each plan and row; spans and sampled rows on the device by sample",
    ),
    Entry(
        "S9",
        "schedule",
        "Requests are admitted in the declared order.",
        "Overtaking starves the long ones.",
        "delta",
        "each admission; queue on full steps",
    ),
    Entry(
        "S10",
        "schedule",
        "A preemption happens only for want of pages and takes the declared victim; nobody is admitted in that plan.",
        "The wrong victim loses the most work; a needless one all of its own.",
        "delta",
        "each preemption",
    ),
    Entry(
        "S11",
        "schedule",
        "Work that can run is run: nothing that may start waits, nothing starts that may not, and no plan is empty.",
        "Idle pages and slots under a queue are money; a silent stall is an outage.",
        "step",
        "each plan; whenever the core says that nothing can run",
    ),
    Entry(
        "S12",
        "schedule",
        "The declared mix of decodes and prefills holds, with its bounds on waiting.",
        "Without a bound a stream of prompts stops every answer.",
        "rows",
        "each plan",
    ),
    Entry(
        "S13",
        "schedule",
        "A request is refused at submission if and only if it can never be served.",
        "What never fits blocks the head of the queue for ever.",
        "delta",
        "each submission",
    ),
    Entry(
        "S14",
        "schedule",
        "Planning a state twice gives the same plan, and a plan dropped before it ran leaves a consistent state.",
        "A plan that half commits shows only after the first error.",
        "full",
        "forks of the core before some of its plans",
        mode="deep",
    ),
    Entry(
        "L1",
        "liveness",
        "Once nothing new comes, each admitted request ends within as many steps as there is work.",
        "The bound turns a hang into a number.",
        "step",
        "each plan; end of the run",
    ),
    Entry(
        "L2",
        "liveness",
        "Within a window of steps some request gets further than it ever was.",
        "Two requests that preempt each other are busy for ever.",
        "step",
        "each plan",
    ),
    Entry(
        "L3",
        "liveness",
        "The head of the queue waits at most as long as the work ahead of it takes.",
        "Starvation has no other symptom.",
        "step",
        "each plan with a queue",
    ),
    Entry(
        "L4",
        "liveness",
        "A request is not preempted twice without any progress between.",
        "Thrashing does all the work and none of it.",
        "delta",
        "each preemption",
    ),
    Entry(
        "L5",
        "liveness",
        "Virtual time moves on, never back, and no submission is left without a plan.",
        "A loop without delay and a lost wake-up both hang the simulation.",
        "step",
        "each plan; end of the run",
    ),
    Entry(
        "L6",
        "liveness",
        "At the end nobody is left, and the core says so.",
        "Whoever is left has a reason, and the reason is the bug.",
        "once",
        "end of the run",
    ),
    Entry(
        "O1",
        "outputs",
        "Each token is the one that the request yields alone, unbatched, in one piece.",
        "Everything that damages the cache or mixes rows ends up here.",
        "rows",
        "each outcome, where the model is known",
    ),
    Entry(
        "O2",
        "outputs",
        "Each token is drawn from the logits that the oracle has at that position, bit for bit.",
        "The right token by luck hides a wrong row.",
        "rows",
        "each outcome of a decoder",
    ),
    Entry(
        "O3",
        "outputs",
        "A request ends exactly at its EOS, max_tokens or the maximum length, for that reason; nothing comes after.",
        "One token more is billed, one less is missed.",
        "delta",
        "each end",
    ),
    Entry(
        "O4",
        "outputs",
        "Chunk, page and pool sizes change no token.",
        "Boundary bugs move with the boundary.",
        "full",
        "another run with other sizes",
        mode="deep",
    ),
    Entry(
        "O5",
        "outputs",
        "Unrelated requests change no token of a request.",
        "A leak between users.",
        "full",
        "two more runs with other neighbours",
        mode="deep",
    ),
    Entry(
        "O6",
        "outputs",
        "Renumbering pages or slots changes no token.",
        "Ids that matter overflow some day.",
        "full",
        "two more runs with other page and slot numbers",
        mode="deep",
    ),
    Entry(
        "O7",
        "outputs",
        "A preemption at any step changes no token.",
        "Users must not see that the pool was short.",
        "full",
        "another run with other preemptions",
        mode="deep",
    ),
    Entry(
        "O8",
        "outputs",
        "Cancels of others change no token.",
        "An abort must not damage its neighbours.",
        "full",
        "another run with more cancels",
        mode="deep",
    ),
    Entry(
        "O9",
        "outputs",
        "Shifting all arrivals shifts all times and changes nothing else.",
        "Absolute time leaks in through wall clocks.",
        "full",
        "another run with later arrivals",
        mode="deep",
    ),
    Entry(
        "O10",
        "outputs",
        "Each row that samples yields one token, to its own request, in order; no other row yields any.",
        "A lost or doubled delta is what the user sees.",
        "rows",
        "each outcome",
    ),
    Entry(
        "O11",
        "outputs",
        "A row uses its own request's sampling parameters, and randomness depends on seed and position only.",
        "Parameters shifted by one row are somebody else's temperature.",
        "rows",
        "neutral rows and the device's rows by sample",
    ),
    Entry(
        "X1",
        "sharing",
        "Each hit adds a reference and each release drops one.",
        "As P4.",
        "delta",
        "each hit",
        "prefix sharing",
    ),
    Entry(
        "X2",
        "sharing",
        "Only full pages are shared, and a shared page is not written.",
        "A write through one reader changes the others.",
        "delta",
        "each write",
        "prefix sharing",
    ),
    Entry(
        "X3",
        "sharing",
        "The page that a hash leads to holds what the request would have computed.",
        "A collision serves another prompt's cache.",
        "delta",
        "each hit",
        "prefix sharing",
    ),
    Entry(
        "X4",
        "sharing",
        "A hit is page aligned and leaves at least one token to compute.",
        "Nothing to compute means nothing to sample.",
        "delta",
        "each hit",
        "prefix sharing",
    ),
    Entry(
        "X5",
        "sharing",
        "Only pages without references are evicted, and their hash goes with them.",
        "A stale hash serves what was overwritten.",
        "delta",
        "each eviction",
        "prefix sharing",
    ),
    Entry(
        "X6",
        "sharing",
        "The prefix cache changes no token.",
        "As O1.",
        "full",
        "a second run",
        "prefix sharing",
    ),
    Entry(
        "X7",
        "sharing",
        "Nothing is shared between different salts or adapters.",
        "A cache across tenants is a leak.",
        "delta",
        "each hit",
        "prefix sharing",
    ),
    Entry(
        "R1",
        "lifecycle",
        "A preempted request gives back its pages and slot, starts over at position 0, and keeps its tokens.",
        "Tokens the user has seen cannot be taken back; a count kept over skips what was freed.",
        "delta",
        "each preemption, each readmission",
    ),
    Entry(
        "R2",
        "lifecycle",
        "A resumed request is fed its prompt and generated tokens, and yields none of them again.",
        "A prompt alone forgets the answer so far.",
        "rows",
        "each row of a readmission",
    ),
    Entry(
        "R3",
        "lifecycle",
        "A cancel in any state gives back what is held once, and nothing of the request happens afterwards.",
        "Cancels come at every bad moment.",
        "delta",
        "each cancel, each later effect and row",
    ),
    Entry(
        "R4",
        "lifecycle",
        "A cancel of an unknown or gone request does nothing.",
        "Clients cancel late.",
        "delta",
        "each such cancel",
    ),
    Entry(
        "D1",
        "determinism",
        "Two runs of a scenario take the same steps.",
        "What cannot be replayed cannot be fixed.",
        "once",
        "rolling hashes of two processes with different hash seeds",
        mode="deep",
    ),
    Entry(
        "D2",
        "determinism",
        "A shrunk scenario shows the same violation at the same step with the same hash.",
        "A shrinker that slips proves nothing.",
        "once",
        "replay",
        "shrinking within a judged run; the contract `shrinks` of the selftest holds the shrinker to it",
    ),
    Entry(
        "D3",
        "determinism",
        "Plans, pages and scripted tokens are the same on every backend.",
        "A difference is a backend's bug.",
        "once",
        "another run on each other host backend",
        mode="deep",
    ),
    Entry(
        "D4",
        "determinism",
        "Observers change no hash.",
        "A checker that mutates what it checks lies.",
        "once",
        "another run with every observer",
        mode="deep",
    ),
    Entry(
        "D5",
        "determinism",
        "A state rebuilt by replay is the state recorded.",
        "Exploration starts from rebuilt states.",
        "once",
        "the calls of the run, on a fresh core",
        mode="deep",
    ),
    Entry(
        "M1",
        "metrics",
        "Scheduled tokens are the tokens computed by all admissions, recomputed and discarded ones included.",
        "Throughput is quoted from this sum.",
        "once",
        "end of the run",
    ),
    Entry(
        "M2",
        "metrics",
        "The integral of live requests over time is the sum of their stays.",
        "Little's law is exact on a drained run, so any difference is a wrong clock or count.",
        "once",
        "end of the run",
    ),
    Entry(
        "M3",
        "metrics",
        "Recorded gauges (owned pages, running, waiting) are those of the books.",
        "Plots are drawn from them.",
        "step",
        "each measurement",
    ),
    Entry(
        "M4",
        "metrics",
        "A request's times are in order, add up, are those that were seen, and make up the latencies that are quoted.",
        "Latencies are what is promised to users.",
        "delta",
        "each request that is done; the summary",
    ),
    Entry(
        "M5",
        "metrics",
        "Arrived requests are finished, cancelled, rejected or live.",
        "A request that is nowhere was lost.",
        "once",
        "end of the run",
    ),
    Entry(
        "M6",
        "metrics",
        "A sequence wastes less than a page, and the sum of waste is allocated minus used.",
        "Fragmentation is quoted from this sum.",
        "rows",
        "each measurement; each sequence on full steps",
    ),
    Entry(
        "M7",
        "metrics",
        "Padding counts nowhere.",
        "Padded tokens make throughput look better than it is.",
        "step",
        "each measurement",
    ),
    Entry(
        "M8",
        "metrics",
        "Plotted series equal those recomputed from the event log.",
        "A plot that drifts from its data misleads.",
        "once",
        "end of the run",
    ),
)

CATALOGUE: dict[str, Entry] = {entry.id: entry for entry in _ENTRIES}
"""All invariants by id, family by family."""

ACTIVE: frozenset[str] = frozenset(entry.id for entry in _ENTRIES if entry.active)
"""Ids that are checked today."""


def select(only: frozenset[str] | None, mode: Mode) -> frozenset[str]:
    """The ids to check in a mode: all active ones, or those of `only`.

    ValueError: an id of `only` is unknown or not checked yet.
    """
    in_mode = frozenset(name for name in ACTIVE if CATALOGUE[name].mode == mode)
    if only is None:
        return in_mode
    for name in sorted(only):
        if name not in CATALOGUE:
            raise ValueError(f"no invariant is called {name!r}; the ids are {', '.join(CATALOGUE)}")
        if not CATALOGUE[name].active:
            raise ValueError(f"invariant {name} is not checked yet: it waits for {CATALOGUE[name].waits_for}")
    return only & in_mode


def explain(name: str) -> str:
    """A paragraph about one invariant. ValueError: there is none of that id."""
    entry = CATALOGUE.get(name.upper())
    if entry is None:
        raise ValueError(f"no invariant is called {name!r}; the ids are {', '.join(CATALOGUE)}")
    return (
        f"{entry.id} ({entry.family}, {entry.status})\n"
        f"  {entry.statement}\n"
        f"  Why: {entry.why}\n"
        f"  When: {entry.when}. Cost: {entry.cost}."
    )
