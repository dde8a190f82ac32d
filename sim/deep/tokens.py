"""O4 to O8: other sizes, neighbours, numbers, preemptions and cancels change nobody's tokens."""

from __future__ import annotations

from sim.deep.bench import Bench, Twin
from sim.scenario.models import CancelFault
from sim.workload import Arrival


def other_sizes(bench: Bench) -> None:
    """O4: another chunk, page, batch and pool size, and the buckets that follow from them."""
    world = bench.world
    core, cache = world.scenario.core, world.scenario.cache
    # Axes of a mesh divide sizes: doubling keeps them whole.
    page_size = 2 * cache.page_size if world.scenario.backend.mesh else cache.page_size + 1
    prompts = sorted(bench.base.prompt_tokens.values()) or [1]
    chunk = max(1, min(core.prefill_chunk - 1, prompts[len(prompts) // 2] // 2)) if core.prefill_chunk > 1 else 3
    batch, pool = core.batch_size // 2 + 2, 2 * cache.num_pages
    sizes = world.sized(
        core={"prefill_chunk": chunk, "batch_size": batch}, cache={"page_size": page_size, "num_pages": pool}
    )
    twin = bench.play(
        bench.changed(scenario=sizes),
        f"core.prefill_chunk {chunk}, core.batch_size {batch}, cache.page_size {page_size} and cache.num_pages {pool}",
    )
    if twin is not None:
        checked = bench.same_tokens("O4", twin)
        # Below the smaller page size a token lies at the same offset of the same logical page.
        ends = (bench.base.prompt_tokens[request] + len(tokens) for request, tokens in bench.base.tokens.items())
        bench.count("O4", checked, min(checked, sum(max(0, end - cache.page_size) for end in ends)))


def other_neighbours(bench: Bench) -> None:
    """O5: half of the requests are left out, then come with other lengths; the other half does not notice."""
    world, base = bench.world, bench.base
    ids = [arrival.request for arrival in world.arrivals]
    chosen = set(bench.random("neighbours").permutation(ids)[: len(ids) // 2].tolist())
    rest = [request for request in ids if request not in chosen]
    who = f"{len(chosen)} other requests ({_some(chosen)})"
    kept = [nth for nth, arrival in enumerate(world.arrivals) if arrival.request not in chosen]
    fewer = bench.changed(
        arrivals=tuple(world.arrivals[nth] for nth in kept),
        at_steps=None if world.at_steps is None else tuple(world.at_steps[nth] for nth in kept),
    )
    longest = world.scenario.cache.max_sequence_length
    others = bench.changed(
        arrivals=tuple(_other_lengths(a, longest) if a.request in chosen else a for a in world.arrivals)
    )
    for changed, change in ((fewer, f"{who} left out"), (others, f"other lengths of {who}")):
        twin = bench.play(changed, change)
        if twin is not None:
            checked = bench.same_tokens("O5", twin, rest)
            bench.count("O5", checked, checked if chosen and twin.tape.rows != base.rows else 0)


def _other_lengths(arrival: Arrival, longest: int) -> Arrival:
    prompt = arrival.prompt_tokens // 2 + 1
    output = min(2 * arrival.output_tokens + 1, max(longest - prompt, 1))
    return arrival._replace(prompt_tokens=prompt, output_tokens=output, prefix_hashes=(), eos_after=0)


def other_numbers(bench: Bench) -> None:
    """O6: pages are handed out under other numbers, in a core of ours plan by plan the same; then slots."""
    world, base = bench.world, bench.base
    random = bench.random("numbers")
    num_pages, slots = world.scenario.cache.num_pages, world.scenario.core.batch_size
    pages = tuple((random.permutation(num_pages - 1) + 1).tolist())
    change = f"free pages in the order {_some(pages, ordered=False)}"
    ours = world.scenario.core.kind == "paged_attention"
    twin = bench.play(
        bench.changed(free_pages=pages) if ours else bench.changed(device_pages=(0, *pages)),
        change if ours else f"page 1, 2, ... of the plans at page {_some(pages, ordered=False)} of the device",
    )
    if twin is not None:
        checked = bench.same_tokens("O6", twin)
        bench.count("O6", checked, checked if not ours or twin.tape.raw_plans != base.raw_plans else 0)
        _same_plans(bench, twin)
    order = tuple(random.permutation(slots).tolist())
    if not ours or order == tuple(range(slots)):
        return
    twin = bench.play(bench.changed(free_slots=order), f"free slots in the order {_some(order, ordered=False)}")
    if twin is not None:
        checked = bench.same_tokens("O6", twin)
        bench.count("O6", checked, checked if twin.tape.raw_plans != base.raw_plans else 0)


def _same_plans(bench: Bench, twin: Twin) -> None:
    """Plan by plan the same, but for the numbers of the pages."""
    mine, theirs = bench.base.plans, twin.tape.plans
    both = min(len(mine), len(theirs))
    bench.count("O6", both, sum(a != b for a, b in zip(bench.base.raw_plans, twin.tape.raw_plans, strict=False)))
    at = next((i for i in range(both) if mine[i] != theirs[i]), None if len(mine) == len(theirs) else both)
    if at is not None and twin.tape.crash is None:
        bench.breach(
            "O6",
            f"plan {at} is another one with {twin.change}, and not only in the numbers of its pages",
            step=at,
            expected="the same rows, tokens and effects on the renumbered pages",
            found="another plan",
        )


def other_preemptions(bench: Bench) -> None:
    """O7: a pool that just holds the largest request, or where it is that small already, one of ample size."""
    world, base = bench.world, bench.base
    cache, mesh = world.scenario.cache, world.scenario.backend.mesh
    arrivals = tuple(_exact_end(bench, a) for a in world.arrivals if base.ends.get(a.request) != "rejected")
    kept = {arrival.request for arrival in arrivals}
    lengths = (min(a.prompt_tokens + a.output_tokens - 1, cache.max_sequence_length) for a in arrivals)
    need = max((-(-length // cache.page_size) for length in lengths), default=1) + 1
    if mesh:
        step = max(mesh.values())
        need = -(-need // step) * step
    pool = need if need < cache.num_pages else 4 * cache.num_pages
    sizes = world.sized(core={"preemption": "recompute"}, cache={"num_pages": pool})
    at_steps = world.at_steps
    if at_steps is not None:
        pairs = zip(world.arrivals, at_steps, strict=True)
        at_steps = tuple(step for arrival, step in pairs if arrival.request in kept)
    changed = bench.changed(scenario=sizes, arrivals=arrivals, at_steps=at_steps)
    twin = bench.play(changed, f"cache.num_pages {pool} in place of {cache.num_pages}, hence other preemptions")
    if twin is not None:
        checked = bench.same_tokens("O7", twin)
        struck = [r for r in base.tokens if base.preemptions.get(r, 0) != twin.tape.preemptions.get(r, 0)]
        bench.count("O7", checked, min(checked, sum(len(base.tokens[request]) for request in struck)))


def _exact_end(bench: Bench, arrival: Arrival) -> Arrival:
    """An end by EOS leaves room up to the longest sequence, for which no small pool has the pages: say where it is."""
    if bench.base.ends.get(arrival.request) != "eos":
        return arrival
    length = len(bench.base.tokens[arrival.request])
    return arrival._replace(output_tokens=length + 1, eos_after=length)


def other_cancels(bench: Bench) -> None:
    """O8: a third of the requests is cancelled, each at a step of its life; the others do not notice."""
    world, base = bench.world, bench.base
    random = bench.random("cancels")
    victims: dict[int, int] = {}
    for request in base.tokens:
        first, last = base.submitted_at[request], base.gone_at.get(request, len(base.plans))
        chance, step = random.random(), int(random.integers(first, last + 1))
        if chance < 1 / 3:
            victims[request] = step
    cancels = tuple(CancelFault(kind="cancel", request=request, at_step=step) for request, step in victims.items())
    named = ", ".join(f"{request} at step {step}" for request, step in list(victims.items())[:4])
    twin = bench.play(
        bench.changed(faults=(*world.faults, *cancels)), f"{len(victims)} other requests cancelled ({named} ...)"
    )
    if twin is not None:
        checked = bench.same_tokens("O8", twin, [request for request in base.tokens if request not in victims])
        struck = any(twin.tape.ends.get(r) == "cancelled" != base.ends.get(r) for r in victims)
        bench.count("O8", checked, checked if struck else 0)


def _some(ids: set[int] | tuple[int, ...], *, ordered: bool = True) -> str:
    first = (sorted(ids) if ordered else list(ids))[:4]
    return ", ".join(map(str, first)) + (", ..." if len(ids) > 4 else "")
