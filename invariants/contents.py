"""K: every token's K and V lie where the books say, and nothing else was touched.

The shadow knows what must lie at each place of the pool. What is compared with the device:

- each checked step: every place the step wrote, and beside them the rest of a chunk's last page and as many places as
  there are decode rows (`FramePlaces`); in their stead, where the pages touched have at most SMALL_TOUCHED places, all
  places of these; a pool of at most SMALL_PLACES: all of it, so that a stray write is seen in its own step, wherever it
  went;
- each `full_every`-th step the next WINDOW_PLACES of the pool, the dummy page left out; all of it at the end, and in
  every step where `full_every` is 1.

One `verify` call a step. Pages of rows that are dead on the device (their EOS came at an earlier step) are not written.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int, Int32
from numpy import maximum, minimum, ndarray
from numpy.typing import NDArray

from invariants.device import Device
from invariants.findings import Findings
from invariants.frame import FramePlaces
from invariants.ledger import Ledger
from invariants.records import Admission, Flight, Live, Prefill
from invariants.shadow import Cells, Shadow, ids_of, tokens_of
from invariants.wrong_places import Written, WrongPlaces, differing
from paged_attention import fingerprint

SMALL_PLACES = 1024
"""A pool of so many is compared whole in every step: a few kilobytes of ids."""

SMALL_TOUCHED = 128
"""Of a larger pool the pages that a step touched are compared whole in every step, if they have so few places."""

BASES = 64
"""Requests whose identities are computed together."""

WINDOW_PLACES = 8_192
"""Of a pool with more places, so many are compared at each full look, in turn."""

FAMILY = ("K1", "K2", "K3", "K7", "K9")

NOWHERE = np.zeros(0, np.intp)


class ContentJudge:
    """The shadow K/V pool, and its comparison with the device."""

    def __init__(self, ledger: Ledger, findings: Findings) -> None:
        self.ledger = ledger
        self.findings = findings
        self.on = findings.any_on(FAMILY)
        policy = ledger.policy
        self.num_pages = policy.num_pages if self.on else 1
        self.is_small = self.num_pages * ledger.page_size <= SMALL_PLACES
        """The whole pool is compared in every step."""
        self.shadow = Shadow(self.num_pages, ledger.page_size)
        self.size = np.array(ledger.page_size, np.int32)
        """Without axes: NumPy converts a Python integer anew at each use, which costs more than the division."""
        self.offsets = np.arange(ledger.page_size, dtype=np.int32)
        self.report: WrongPlaces | None = None
        """None: the device was not looked at yet, or holds no cache."""
        self.opened = False
        self.window = 1
        """The page at which the next full look begins."""
        self.joins = -1
        """Of the ledger, when the slots below were brought up to date."""
        slots = policy.batch_size if self.on else 0
        self.seated: tuple[NDArray[np.int32], NDArray[np.int32]] = (
            np.full(slots, -1, np.int32),
            np.zeros(slots, np.int32),
        )
        """Requests and admissions whose tokens those in `slot_tokens` are."""
        self.tokens_before: Cells = np.zeros(0, np.complex128)
        """The token at each position of whoever sits in a slot, one further on: a row that yields the one at some
        place of the ledger's flat tokens writes the K and V of the one before."""
        self.slot_tokens: NDArray[np.complex128] = np.zeros((0, 0), np.complex128)
        """The same, by slot and position."""
        self.any_ends = False
        """An EOS may end somebody who sits in a slot."""
        self.every_row: NDArray[np.intp] = np.arange(slots) * ledger.table.shape[1]
        """Where in the ledger's flat table the pages of each slot begin."""
        self.slots: NDArray[np.intp] = NOWHERE
        """The slots of the newest step, and where in the flat table their pages begin."""
        self.row_at: NDArray[np.intp] = NOWHERE
        self.frame = FramePlaces(ledger)
        self.bases: NDArray[np.uint32] = np.zeros(0, np.uint32)
        self.bases_of = -1, 0
        """The first request and the admission's number that `bases` begins with."""
        self.compared = self.held = self.framed = self.unique = 0

    def open(self, device: Device) -> bool:
        """Look at the device once: whether it holds a cache."""
        if not self.opened:
            self.opened = True
            evidence = device.evidence(np.zeros(1, np.int32), np.zeros(1, np.int32))
            if evidence is not None:
                self.report = WrongPlaces(self.ledger, self.findings, self.shadow, evidence)
        return self.report is not None

    def settle_counts(self) -> None:
        """Move the bulk counters into the counters."""
        counts = self.findings.counts
        for name in ("K1", "K7"):
            counts[name].add(self.compared, self.held)
        counts["K2"].add(self.framed, self.framed)
        counts["K3"].add(self.unique, self.unique)
        if self.report is not None and self.report.decoder.layers > 1:
            counts["K9"].add(self.compared, self.held)
        self.compared = self.held = self.framed = self.unique = 0

    # ---- a step

    def dispatched(self, flight: Flight, device: Device, *, check: bool) -> None:
        """Follow a step's writes, and (`check`) compare the device with the shadow."""
        written = self._follow(flight)
        places = written.places
        if not check:
            return
        if self.is_small:
            self._verify_pages(self._allocatable(), device, written)
        elif len(places) * self.ledger.page_size <= SMALL_TOUCHED:
            touched = np.flatnonzero(np.bincount(places // self.size, minlength=self.num_pages)).astype(np.int32)
            self._verify_pages(touched, device, written)
        else:
            beside = map(self._rest_of_page, flight.prefills)
            looked_at = np.concatenate((places, *beside, self.frame.next_places(flight.slots)))
            self._compare(looked_at, device, written)

    def _rest_of_page(self, prefill: Prefill) -> Int[ndarray, " places"]:
        """The places behind the last one of a chunk, where its padding would go."""
        _, _, admission, start, count = prefill
        size = self.ledger.page_size
        logical, used = divmod(start + count, size)
        if not used or logical >= len(admission.pages) or not 0 < admission.pages[logical] < self.num_pages:
            return self.offsets[:0]
        return self.offsets[used:] + admission.pages[logical] * size

    def _compare(self, places: Int[ndarray, " places"], device: Device, written: Written | None) -> None:
        said = self.shadow.at(places)
        self.compared += len(places)
        self.held += int(np.count_nonzero(ids_of(said)))
        self.framed += len(places) - (len(written.places) if written is not None else 0)
        wrong = differing(self.ledger, places // self.size, places % self.size, said, device)
        if wrong and self.report is not None:
            self.report.judge(wrong, device, written)

    def _follow(self, flight: Flight) -> Written:
        """The shadow holds the tokens of this step from now on."""
        ledger, slots, start, at = self.ledger, flight.slots, flight.start, flight.at
        if self.joins != ledger.joins:
            self._seat()
        if self.any_ends:
            alive = ~dead_rows(ledger.eos.take(slots), start)
            slots, start, at = slots[alive], start[alive], at[alive]
        if slots is not self.slots:
            self.slots, self.row_at = slots, self.every_row.take(slots)
        logical, offset = np.divmod(start, self.size)
        # A position beyond its table is a finding of the row's judge.
        places = ledger.flat_table.take(self.row_at + logical, mode="clip") * self.size + offset
        tokens = self.tokens_before.take(at)
        # So is one without a page: its place is the dummy page's. The ufunc itself: `min` costs three times as much.
        if len(places) and minimum.reduce(places) < self.size:
            keep = places >= self.size
            places, tokens = places[keep], tokens[keep]
        if flight.prefills:
            parts = [self._prefill(live, admission, at, n) for _, live, admission, at, n in flight.prefills]
            places, tokens = map(np.concatenate, zip(*parts, (places, tokens), strict=True))
        if not ledger.pool.untouched:
            # A page outside the pool may have been granted, which the page judge has told.
            keep = (places >= self.size) & (places < self.num_pages * self.size)
            places, tokens = places[keep], tokens[keep]
        written = Written(places, self.shadow.at(places))
        self.shadow.write(places, tokens)
        self._judge_unique(places, tokens)
        return written

    def _seat(self) -> None:
        """Take in who sits in which slot now."""
        ledger = self.ledger
        if not len(self.slot_tokens):
            # Lazily backed by the system: only slots that are used cost memory.
            self.tokens_before = np.zeros(ledger.tokens.size + 1, np.complex128)
            self.slot_tokens = self.tokens_before[1:].reshape(ledger.tokens.shape)
        self.joins, self.any_ends = ledger.joins, bool(maximum.reduce(ledger.eos, initial=-1) >= 0)
        request, admission = self.seated
        for slot in np.flatnonzero((request != ledger.request) | (admission != ledger.admission)).tolist():
            live = ledger.occupant[slot]
            if live is not None and live.admission is not None:
                tokens = self._tokens_of(live, live.admission)
                self.slot_tokens[slot, : len(tokens)] = tokens
                request[slot], admission[slot] = live.id, live.admission.number
        self.slots = NOWHERE

    def _tokens_of(self, live: Live, admission: Admission) -> Cells:
        """The token at every position that the admission can get to."""
        if admission.tokens is None:
            base = self._base_of(live.id, admission.number)
            ids = fingerprint.kv_id(base, np.arange(live.last + 1, dtype=np.uint32))
            admission.tokens = tokens_of(live.id, admission.number, ids)
        return admission.tokens

    def _base_of(self, request: int, number: int) -> np.uint32:
        """What `fingerprint.kv_base` says of an admission; of its neighbours too, for one number costs what many do."""
        first = request - request % BASES
        if (first, number) != self.bases_of:
            self.bases_of = first, number
            self.bases = fingerprint.kv_base(np.arange(first, first + BASES), np.full(BASES, number))
        return self.bases[request - first]

    def _prefill(self, live: Live, admission: Admission, start: int, count: int) -> tuple[Int[ndarray, " n"], Cells]:
        """Places and tokens of a prefill row, as far as there are pages for them."""
        size = self.ledger.page_size
        end = min(start + count, len(admission.pages) * size)
        pages = np.array(admission.pages[start // size : -(-end // size)], np.int32)
        skipped = start % size
        places = (pages[:, None] * self.size + self.offsets).reshape(-1)[skipped : skipped + end - start]
        return places, self._tokens_of(live, admission)[start:end]

    def _judge_unique(self, places: Int[ndarray, " places"], tokens: Cells) -> None:
        """K3: of two tokens written to one place only the later lies there."""
        self.unique += len(places)
        if self.shadow.at(places).tobytes() != tokens.tobytes():
            each: list[int] = places.tolist()
            page, offset = divmod(max(each, key=each.count), self.ledger.page_size)
            self.findings.breach(
                "K3",
                f"step {self.findings.step} writes page {page}, offset {offset} more than once",
                pages=(page,),
                expected="each place once",
                found="duplicates",
            )

    def _verify_pages(self, pages: Int32[ndarray, " pages"], device: Device, written: Written | None) -> None:
        """Compare every place of some pages."""
        self._compare((pages[:, None] * self.size + self.offsets).reshape(-1), device, written)

    def full_look(self, device: Device) -> None:
        """Compare the next pages in turn; in a small pool, all of them."""
        most = max(WINDOW_PLACES // self.ledger.page_size, 1)
        pages = self._allocatable()[self.window - 1 :][:most]
        self.window += most
        if self.window >= self.num_pages:
            self.window = 1
        self._verify_pages(pages, device, None)

    def whole_pool(self, device: Device) -> None:
        """Compare every place but the dummy page's."""
        self._verify_pages(self._allocatable(), device, None)

    def _allocatable(self) -> Int32[ndarray, " pages"]:
        """Every page but the dummy."""
        return np.arange(1, self.num_pages, dtype=np.int32)


def dead_rows(eos: Int32[ndarray, " rows"], start: Int32[ndarray, " rows"]) -> Bool[ndarray, " rows"]:
    """Rows whose sequence had ended on the device before: their EOS stands at or before the position they feed."""
    return (eos >= 0) & (start >= eos)
