"""K: every token's K and V lie where the books say, and nothing else was touched.

The shadow holds, for each place of the pool, the kv_id that must lie there (0: never written). What is compared:

- each checked step: every place the step wrote, and one older token of each decode row; of all pages touched when these
  have at most SMALL_TOUCHED places, and every WHOLE_PAGES_EVERY-th step in any case: all places of the touched pages;
  a pool of at most SMALL_PLACES: all of it, so that a stray write is seen in its own step, wherever it went;
- each `full_every`-th step and at the end: every place of the pool but the dummy page.

One `verify` call a step. Pages of rows that are dead on the device (their EOS came at an earlier step) are not written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, UInt32
from numpy import ndarray
from numpy.typing import NDArray

from invariants.codec import codec_fault
from invariants.device import Device
from invariants.findings import Findings
from invariants.ledger import Ledger
from invariants.owners import Decoder, OracleDecoder
from invariants.records import Flight
from paged_attention import fingerprint
from paged_attention.plan import WrongPlace

SMALL_PLACES = 1024
"""Up to here all places of the touched pages (or of the pool) are compared in every step: a few kilobytes of ids."""

SMALL_TOUCHED = 256
"""Of a larger pool the pages that a step touched are compared whole in every step, if they have so few places."""

WHOLE_PAGES_EVERY = 8
"""Beyond that, whole touched pages are compared each n-th step."""

FAMILY = ("K1", "K2", "K3", "K7", "K9")


NO_EOS = np.int32(-1).tobytes()
"""Of one slot: no EOS ends whoever is there."""

PLACE = np.dtype([("id", np.uint32), ("request", np.int32), ("admission", np.int32), ("position", np.int32)])
"""What the shadow says of one place: the kv_id that must lie there, and whose token that is."""

Places = NDArray[np.void]
"""An array of PLACE."""


@dataclass(frozen=True, slots=True)
class Written:
    """The places of one step's writes, and what the shadow said of them before and after."""

    pages: Int32[ndarray, " places"]
    offsets: Int32[ndarray, " places"]
    before: Places
    after: Places


class ContentJudge:
    """The shadow K/V pool, and its comparison with the device."""

    def __init__(self, ledger: Ledger, findings: Findings) -> None:
        self.ledger = ledger
        self.findings = findings
        self.on = findings.any_on(FAMILY)
        self.shadow: Places = np.zeros((ledger.policy.num_pages, ledger.page_size) if self.on else (1, 1), PLACE)
        self.flat = self.shadow.reshape(-1)
        self.size = np.array(ledger.page_size, np.int32)
        """Without axes: NumPy converts a Python integer anew at each use, which costs more than the division."""
        self.decoder: Decoder | None = None
        self.newest: Written | None = None
        """What the newest step wrote."""
        self.opened = False
        self.joins = -1
        self.bases: NDArray[np.uint32] = np.zeros(ledger.policy.batch_size, np.uint32)
        """The kv_base of each slot, as of that many joins."""

    def open(self, device: Device) -> bool:
        """Look at the device once: whether it holds a cache."""
        if not self.opened:
            self.opened = True
            evidence = device.evidence(np.zeros(1, np.int32), np.zeros(1, np.int32))
            if evidence is not None:
                oracle = self.ledger.oracle
                self.decoder = Decoder(evidence) if oracle is None else OracleDecoder(evidence, oracle)
        return self.decoder is not None

    # ---- a step

    def dispatched(self, flight: Flight, device: Device, *, check: bool) -> None:
        """Follow a step's writes, and (`check`) compare the device with the shadow."""
        written = self._follow(flight)
        if not check:
            return
        if self.shadow.size <= SMALL_PLACES:
            self._verify_pages(self._allocatable(), device, written)
            return
        if len(written.pages) * self.ledger.page_size <= SMALL_TOUCHED or self.findings.step % WHOLE_PAGES_EVERY == 0:
            touched = np.flatnonzero(np.bincount(written.pages, minlength=len(self.shadow))).astype(np.int32)
            self._verify_pages(touched, device, written)
            return
        older_pages, older_offsets = self._older(flight)
        pages = np.concatenate([written.pages, older_pages])
        offsets = np.concatenate([written.offsets, older_offsets])
        self._count(len(pages), len(pages), len(older_pages))
        self._report(self._compare(pages, offsets, device), device, written)

    def _compare(
        self, pages: Int32[ndarray, " places"], offsets: Int32[ndarray, " places"], device: Device, limit: int = 8
    ) -> tuple[WrongPlace, ...]:
        """The first places that hold other words than the shadow says: fingerprints, or what the oracle wrote."""
        said = self.flat.take(pages * self.size + offsets)
        if self.ledger.oracle is None:
            return device.verify(pages, offsets, said["id"].copy(), limit)
        return device.verify_words(pages, offsets, self.ledger.oracle.words(said), limit)

    def _follow(self, flight: Flight) -> Written:
        """The shadow holds the tokens of this step from now on: prefill rows first, then decodes."""
        ledger, size = self.ledger, self.ledger.page_size
        pages: list[NDArray[np.int32]] = []
        after: list[Places] = []
        for _, live, admission, start, count in flight.prefills:
            at = np.arange(start, min(start + count, len(admission.pages) * size), dtype=np.int32)
            pages.append(np.array(admission.pages, np.int32)[at // size])
            base = fingerprint.kv_base([live.id], [admission.number])
            after.append(_tokens(live.id, admission.number, base, at))
        if self.joins != ledger.joins:
            self.joins, self.bases = ledger.joins, fingerprint.kv_base(ledger.request, ledger.admission)
        slots, start = flight.slots, flight.start
        eos = ledger.eos.take(slots)
        if eos.tobytes() != NO_EOS * len(eos):
            alive = ~dead_rows(eos, start)
            slots, start = slots[alive], start[alive]
        width = ledger.table.shape[1]
        pages.append(ledger.flat_table.take(slots * width + np.minimum(start // self.size, width - 1)))
        bases = self.bases.take(slots)
        after.append(_tokens(ledger.request.take(slots), ledger.admission.take(slots), bases, start))
        page, new = (pages[0], after[0]) if len(pages) == 1 else (np.concatenate(pages), np.concatenate(after))
        inside = self._inside(page)
        if not inside.all():
            page, new = page[inside], new[inside]
        offset = new["position"] % self.size
        places = page * self.size + offset
        written = self.newest = Written(page, offset, self.flat.take(places), new)
        self.flat[places] = new
        self._judge_unique(places, new)
        return written

    def _judge_unique(self, at: Int32[ndarray, " places"], new: Places) -> None:
        """K3: of two tokens written to one place only the later lies there."""
        self.findings.counts["K3"].add(len(at), len(at))
        if self.flat.take(at).tobytes() != new.tobytes():
            places: list[int] = at.tolist()
            page, offset = divmod(max(places, key=places.count), self.ledger.page_size)
            self.findings.breach(
                "K3",
                f"step {self.findings.step} writes page {page}, offset {offset} more than once",
                pages=(page,),
                expected="each place once",
                found="duplicates",
            )

    def _older(self, flight: Flight) -> tuple[Int32[ndarray, " rows"], Int32[ndarray, " rows"]]:
        """One earlier place of each decode row, another one in each step."""
        later = flight.start > 0
        start, slots = flight.start[later].astype(np.uint32), flight.slots[later]
        position = (fingerprint.mix32(start + np.uint32(self.findings.step & 0xFFFF)) % start).astype(np.int32)
        page, offset = self.ledger.table[slots, position // self.ledger.page_size], position % self.ledger.page_size
        inside = self._inside(page)
        return page[inside], offset[inside]

    def _inside(self, page: Int32[ndarray, " places"]) -> Bool[ndarray, " places"]:
        """Pages that somebody may own: a broken plan names others, and P3 and P8 have said so."""
        return (page > 0) & (page < len(self.shadow))

    def _verify_pages(self, pages: Int32[ndarray, " pages"], device: Device, written: Written | None) -> None:
        """Compare every place of some pages."""
        size = self.ledger.page_size
        each = np.repeat(pages, size)
        offsets = np.tile(np.arange(size, dtype=np.int32), len(pages))
        ids = self.shadow[pages]["id"].reshape(-1)
        held = int(np.count_nonzero(ids))
        self._count(len(ids), held, len(ids) - (len(written.pages) if written is not None else 0))
        self._report(self._compare(each, offsets, device), device, written)

    def _count(self, places: int, held: int, framed: int) -> None:
        counts = self.findings.counts
        counts["K1"].add(places, held)
        counts["K7"].add(places, held)
        counts["K2"].add(framed, framed)
        if self.decoder is not None and self.decoder.layers > 1:
            counts["K9"].add(places, held)

    def whole_pool(self, device: Device) -> None:
        """Compare every place but the dummy page's."""
        self._verify_pages(self._allocatable(), device, None)

    def _allocatable(self) -> Int32[ndarray, " pages"]:
        """Every page but the dummy."""
        return np.arange(1, len(self.shadow), dtype=np.int32)

    # ---- what is wrong

    def _report(self, wrong: tuple[WrongPlace, ...], device: Device, written: Written | None) -> None:
        if not wrong or self.decoder is None:
            return
        before: dict[tuple[int, int], int] = {}
        if written is not None:
            places = zip(written.pages.tolist(), written.offsets.tolist(), strict=True)
            before = dict(zip(places, range(len(written.pages)), strict=True))
        seen: set[tuple[int, int]] = set()
        for place in wrong:
            at = place.page, place.offset
            self.decoder.learn(place, int(self.shadow[at]["id"]))
            if at in seen:
                continue
            seen.add(at)
            self._round_trip(place, self.decoder)
            planned = written.before[before[at]] if written is not None and at in before else None
            if planned is not None:
                self._planned_place(place, self.decoder, planned)
            else:
                self._other_place(place, self.decoder)
            self._layers_agree(place, self.decoder, device)

    def _round_trip(self, place: WrongPlace, decoder: Decoder) -> None:
        said = self.shadow[place.page, place.offset]
        fault = codec_fault(place, said, decoder)
        if fault:
            self._breach("K7", f"{_where(place)} must hold {_name(said)}, but holds {fault}", place, _name(said), fault)

    def _planned_place(self, place: WrongPlace, decoder: Decoder, before: np.void) -> None:
        at = place.page, place.offset
        expected = _name(self.shadow[at])
        if int(before["id"]) != int(self.shadow[at]["id"]) and decoder.equals(place, before):
            found = _name(before)
            message = f"{_where(place)} was planned to be written with {expected}, but still holds {found}"
        else:
            found = self._who(place, decoder)
            message = f"{_where(place)} was planned to be written with {expected}, but holds {found}"
        for name in ("K3", "K1"):
            self._breach(name, message, place, expected, found)

    def _other_place(self, place: WrongPlace, decoder: Decoder) -> None:
        said = self.shadow[place.page, place.offset]
        expected, found = _name(said), self._who(place, decoder)
        owner = self.ledger.pool.holder.get(place.page)
        message = f"{_where(place)} changed outside the planned writes: it held {expected} and now holds {found}"
        self._breach("K2", message, place, expected, found)
        if owner is not None and not owner.released and said["id"] and owner.request == int(said["request"]):
            self._breach("K1", message, place, expected, found)

    def _breach(self, name: str, message: str, place: WrongPlace, expected: str, found: str) -> None:
        request = int(self.shadow[place.page, place.offset]["request"])
        held = bool(self.shadow[place.page, place.offset]["id"])
        self.findings.breach(
            name,
            message,
            requests=(request,) if held else (),
            pages=(place.page,),
            expected=expected,
            found=found,
        )

    def _who(self, place: WrongPlace, decoder: Decoder) -> str:
        """The owner of the words found, as far as the books remember."""
        if not any(place.found):
            return "nothing (zeros)"
        if place.found[: decoder.head_dim] == place.expected[: decoder.head_dim]:
            return f"its words with another scale: bits {place.found[-1]:#x} in place of {place.expected[-1]:#x}"
        flat = self.shadow.reshape(-1)
        known = np.flatnonzero(flat["id"])
        hits = decoder.matches(place, flat[known])
        if len(hits):
            at = int(known[hits[0]])
            page, offset = divmod(at, self.ledger.page_size)
            return f"{_name(flat[at])}, whose place is page {page}, offset {offset}"
        for live in self.ledger.live.values():
            for number in range(1, live.admissions + 1):
                base = fingerprint.kv_base([live.id], [number])
                hits = decoder.matches(place, _tokens(live.id, number, base, np.arange(live.last + 1, dtype=np.int32)))
                if len(hits):
                    return f"request {live.id}, admission {number}, position {int(hits[0])}, which has no place now"
        return f"words {place.found[:4]} of no token that is known"

    def _layers_agree(self, place: WrongPlace, decoder: Decoder, device: Device) -> None:
        """K9: a place is right in every layer or wrong in every one."""
        if decoder.layers < 2 or "K9" not in self.findings.on:
            return
        at = np.array([place.page], np.int32), np.array([place.offset], np.int32)
        every = self._compare(at[0], at[1], device, decoder.layers * 2 * decoder.heads)
        bad = sorted({w.layer for w in every})
        if len(bad) < decoder.layers and self._missed(place, bad, decoder, device):
            self.findings.breach(
                "K9",
                f"page {place.page}, offset {place.offset} is wrong in layers {bad} and right in the others of"
                f" {decoder.layers}",
                pages=(place.page,),
                expected="the same places written in every layer",
                found=f"layers {bad} differ",
            )

    def _missed(self, place: WrongPlace, bad: list[int], decoder: Decoder, device: Device) -> bool:
        """Whether some layers were written and others not: fingerprints cannot differ in some layers otherwise."""
        evidence = device.evidence(np.zeros(0, np.int32), np.array([place.page], np.int32))
        if not isinstance(decoder, OracleDecoder) or evidence is None:
            return True
        held = np.stack([evidence.keys, evidence.values], axis=1)[..., 0, place.offset, :]
        flat = self.shadow.reshape(-1)
        return decoder.one_layer_missed(held, bad, self._before(place), flat[flat["id"] != 0])

    def _before(self, place: WrongPlace) -> np.void | None:
        """What the shadow said of a place before the newest step wrote to it; None: it did not."""
        if self.newest is None:
            return None
        at = np.flatnonzero((self.newest.pages == place.page) & (self.newest.offsets == place.offset))
        before: np.void | None = self.newest.before[int(at[0])] if len(at) else None  # pyright: ignore[reportAssignmentType]
        return before


def _tokens(request: object, admission: object, base: UInt32[ndarray, " n"], position: Int32[ndarray, " p"]) -> Places:
    """Shadow entries of tokens at `position`; the other arguments are one value or one for each."""
    new = np.empty(len(position), PLACE)
    new["id"] = fingerprint.kv_id(base, position)
    new["request"], new["admission"], new["position"] = request, admission, position
    return new


def _name(place: np.void) -> str:
    if not place["id"]:
        return "nothing (never written)"
    return f"request {place['request']}, admission {place['admission']}, position {place['position']}"


def _where(place: WrongPlace) -> str:
    return f"page {place.page}, offset {place.offset} (layer {place.layer}, {place.kind}, head {place.head})"


def dead_rows(eos: Int32[ndarray, " rows"], start: Int32[ndarray, " rows"]) -> Bool[ndarray, " rows"]:
    """Rows whose sequence had ended on the device before: their EOS stands at or before the position they feed."""
    return (eos >= 0) & (start >= eos)
