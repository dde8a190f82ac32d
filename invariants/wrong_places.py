"""K1, K2, K3, K7, K9: what is said of a place whose words are not those that must lie there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from invariants.codec import codec_fault
from invariants.device import Device
from invariants.findings import Findings
from invariants.ledger import Ledger
from invariants.owners import Decoder, OracleDecoder
from invariants.shadow import PLACE, Cells, Places, Shadow, as_places, ids_of
from paged_attention import fingerprint
from paged_attention.plan import Evidence, WrongPlace


class Written(NamedTuple):
    """The places of one step's writes, and what the shadow said of them before."""

    places: Int[ndarray, " places"]
    before: Cells


def differing(
    ledger: Ledger,
    pages: Int[ndarray, " places"],
    offsets: Int[ndarray, " places"],
    said: Cells,
    device: Device,
    limit: int = 8,
) -> tuple[WrongPlace, ...]:
    """The first places that hold other words than those of the tokens said to lie there: fingerprints, or what the
    oracle wrote."""
    if ledger.oracle is None:
        return device.verify(pages, offsets, ids_of(said), limit)
    return device.verify_words(pages, offsets, ledger.oracle.words(as_places(said)), limit)


class WrongPlaces:
    """Says of each wrong place whose words lie there and which statement that breaks."""

    def __init__(self, ledger: Ledger, findings: Findings, shadow: Shadow, evidence: Evidence) -> None:
        """`evidence` shows a page: how many layers, heads and lanes there are."""
        self.ledger = ledger
        self.findings = findings
        self.shadow = shadow
        oracle = ledger.oracle
        self.decoder = Decoder(evidence) if oracle is None else OracleDecoder(evidence, oracle)

    def judge(self, wrong: tuple[WrongPlace, ...], device: Device, written: Written | None) -> None:
        """Report wrong places; `written` are the writes of the step after which they were compared."""
        seen: set[tuple[int, int]] = set()
        for place in wrong:
            at, said = (place.page, place.offset), self._said(place)
            self.decoder.learn(place, int(said["id"]))
            if at in seen:
                continue
            seen.add(at)
            before = self._before(place, written)
            self._round_trip(place, said)
            if before is not None:
                self._planned_place(place, said, before)
            else:
                self._other_place(place, said)
            self._layers_agree(place, before, device)

    def _said(self, place: WrongPlace) -> np.void:
        one: np.void = self.shadow.entries(self._at(place))[0]
        return one

    def _at(self, place: WrongPlace) -> Int[ndarray, " 1"]:
        return np.array([place.page * self.ledger.page_size + place.offset])

    def _before(self, place: WrongPlace, written: Written | None) -> np.void | None:
        """What the shadow said of a place before the step wrote to it; None: it did not."""
        if written is None:
            return None
        at = np.flatnonzero(written.places == self._at(place))
        if not len(at):
            return None
        before: np.void = as_places(written.before)[int(at[0])]
        return before

    def _round_trip(self, place: WrongPlace, said: np.void) -> None:
        fault = codec_fault(place, said, self.decoder)
        if fault:
            message = f"{_where(place)} must hold {_name(said)}, but holds {fault}"
            self._breach("K7", message, place, said, fault)

    def _planned_place(self, place: WrongPlace, said: np.void, before: np.void) -> None:
        expected = _name(said)
        if int(before["id"]) != int(said["id"]) and self.decoder.equals(place, before):
            found = _name(before)
            message = f"{_where(place)} was planned to be written with {expected}, but still holds {found}"
        else:
            found = self._who(place)
            message = f"{_where(place)} was planned to be written with {expected}, but holds {found}"
        for name in ("K3", "K1"):
            self._breach(name, message, place, said, found)

    def _other_place(self, place: WrongPlace, said: np.void) -> None:
        expected, found = _name(said), self._who(place)
        owner = self.ledger.pool.holder.get(place.page)
        message = f"{_where(place)} changed outside the planned writes: it held {expected} and now holds {found}"
        self._breach("K2", message, place, said, found)
        if owner is not None and not owner.released and said["id"] and owner.request == int(said["request"]):
            self._breach("K1", message, place, said, found)

    def _breach(self, name: str, message: str, place: WrongPlace, said: np.void, found: str) -> None:
        self.findings.breach(
            name,
            message,
            requests=(int(said["request"]),) if said["id"] else (),
            pages=(place.page,),
            expected=_name(said),
            found=found,
        )

    def _who(self, place: WrongPlace) -> str:
        """The owner of the words found, as far as the books remember."""
        decoder = self.decoder
        if not any(place.found):
            return "nothing (zeros)"
        if place.found[: decoder.head_dim] == place.expected[: decoder.head_dim]:
            return f"its words with another scale: bits {place.found[-1]:#x} in place of {place.expected[-1]:#x}"
        known = self.shadow.written()
        tokens = self.shadow.entries(known)
        hits = decoder.matches(place, tokens)
        if len(hits):
            page, offset = divmod(int(known[hits[0]]), self.ledger.page_size)
            owner: np.void = tokens[int(hits[0])]
            return f"{_name(owner)}, whose place is page {page}, offset {offset}"
        for live in self.ledger.live.values():
            for number in range(1, live.admissions + 1):
                hits = decoder.matches(place, _every_token(live.id, number, live.last))
                if len(hits):
                    return f"request {live.id}, admission {number}, position {int(hits[0])}, which has no place now"
        return f"words {place.found[:4]} of no token that is known"

    def _layers_agree(self, place: WrongPlace, before: np.void | None, device: Device) -> None:
        """K9: a place is right in every layer or wrong in every one."""
        decoder = self.decoder
        if decoder.layers < 2 or "K9" not in self.findings.on:
            return
        limit = decoder.layers * 2 * decoder.heads
        page, offset = np.array([place.page], np.int32), np.array([place.offset], np.int32)
        every = differing(self.ledger, page, offset, self.shadow.at(self._at(place)), device, limit)
        bad = sorted({w.layer for w in every})
        if len(bad) < decoder.layers and self._missed(place, bad, before, device):
            self.findings.breach(
                "K9",
                f"page {place.page}, offset {place.offset} is wrong in layers {bad} and right in the others of"
                f" {decoder.layers}",
                pages=(place.page,),
                expected="the same places written in every layer",
                found=f"layers {bad} differ",
            )

    def _missed(self, place: WrongPlace, bad: list[int], before: np.void | None, device: Device) -> bool:
        """Whether some layers were written and others not: fingerprints cannot differ in some layers otherwise."""
        evidence = device.evidence(np.zeros(0, np.int32), np.array([place.page], np.int32))
        if not isinstance(self.decoder, OracleDecoder) or evidence is None:
            return True
        held = np.stack([evidence.keys, evidence.values], axis=1)[..., 0, place.offset, :]
        return self.decoder.one_layer_missed(held, bad, before, self.shadow.entries(self.shadow.written()))


def _every_token(request: int, admission: int, last: int) -> Places:
    tokens = np.empty(last + 1, PLACE)
    base = fingerprint.kv_base([request], [admission])
    tokens["request"], tokens["admission"], tokens["position"] = request, admission, np.arange(last + 1)
    tokens["id"] = fingerprint.kv_id(base, np.arange(last + 1, dtype=np.uint32))
    return tokens


def _name(place: np.void) -> str:
    if not place["id"]:
        return "nothing (never written)"
    return f"request {place['request']}, admission {place['admission']}, position {place['position']}"


def _where(place: WrongPlace) -> str:
    return f"page {place.page}, offset {place.offset} (layer {place.layer}, {place.kind}, head {place.head})"
