"""K4 to K6: poison where nobody may read changes no token, and what is written over it are the same bits."""

from __future__ import annotations

from typing import Final

from sim.deep.bench import Bench, Twin
from sim.deep.places import Places, differing
from sim.deep.world import How, Poison, World

HOWS: Final[tuple[How, ...]] = ("nan", "big")


def poisoned_free_pages(bench: Bench) -> None:
    """K4, K6: every free page is poisoned, and so is the tail of every page and the dummy."""
    for how in HOWS:
        poison = Poison(how, "free pages")
        twin = _played(bench, bench.changed(poison=poison, keep_places=bench.is_on("K6")), poison)
        if twin is None:
            continue
        if bench.is_on("K4"):
            _same_tokens(bench, "K4", twin)
        if bench.is_on("K6"):
            _same_places(bench, twin)


def poisoned_dummy_page(bench: Bench) -> None:
    """K5: the dummy page is poisoned before each step."""
    for how in HOWS:
        poison = Poison(how, "dummy page")
        twin = _played(bench, bench.changed(poison=poison), poison)
        if twin is not None:
            _same_tokens(bench, "K5", twin)


def _played(bench: Bench, changed: World, poison: Poison) -> Twin | None:
    # Without a cache there is nothing to poison.
    return bench.play(changed, str(poison)) if bench.base.holds_cache else None


def _same_tokens(bench: Bench, name: str, twin: Twin) -> None:
    checked = bench.same_tokens(name, twin)
    reads = bench.world.scenario.model.kind != "echo"
    bench.count(name, checked, checked if reads else 0)


def _same_places(bench: Bench, twin: Twin) -> None:
    """The words of each place that a step wrote, directly after the step."""
    for mine, theirs in zip(bench.base.places, twin.tape.places, strict=False):
        wrong = differing(mine, theirs)
        if wrong is None:
            return  # From here on the runs part; K4 says so.
        bench.count("K6", len(wrong), len(wrong))
        if wrong.any():
            _dirty(bench, twin, theirs, int(wrong.argmax()), int(mine.check[wrong.argmax()]))
            return


def _dirty(bench: Bench, twin: Twin, found: Places, at: int, expected: int) -> None:
    page, offset = found.page.item(at), found.offset.item(at)
    bench.breach(
        "K6",
        f"step {found.step} leaves other bits in page {page}, offset {offset}, where it writes position"
        f" {found.position.item(at)} of request {found.request.item(at)}, with {twin.change}",
        step=found.step,
        requests=(found.request.item(at),),
        pages=(page,),
        expected=f"words with the check sum {expected:016x}, as on a clean page",
        found=f"check sum {found.check.item(at):016x}",
    )
