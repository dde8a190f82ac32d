"""Whose are these words? Names the token whose fingerprint lies at a wrong place of the cache."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt32
from numpy import ndarray
from numpy.typing import NDArray

from paged_attention import fingerprint
from paged_attention.plan import Evidence, WrongPlace

KINDS = ("K", "V")


class Decoder:
    """Turns raw words back into token ids by trying every id that was ever written and is still remembered.

    Layers, heads and lanes are read off one page of evidence; the cache dtype off the first wrong place that should
    hold a known token (dtypes share word sizes). Where pages are quantised a place has one word more, its scale.
    """

    def __init__(self, evidence: Evidence) -> None:
        self.layers, self.heads, _, _, self.head_dim = evidence.keys.shape
        self.salts = fingerprint.salts(self.layers, self.heads, self.head_dim)
        word = evidence.keys.dtype.name
        self.dtypes = [d for d, (w, _) in fingerprint.WORD_MASK.items() if w == word]

    def _words(self, ids: UInt32[ndarray, " ids"], place: WrongPlace, dtype: str) -> NDArray[np.unsignedinteger]:
        salt = self.salts[place.layer, KINDS.index(place.kind), place.head]
        return fingerprint.words(ids[:, None], salt[None], dtype)

    def learn(self, place: WrongPlace, expected: int) -> None:
        """Narrow the dtype down by a place whose expected id is known."""
        if expected and len(self.dtypes) > 1:
            ids = np.array([expected], np.uint32)
            words = list(place.expected[: self.head_dim])
            fits = [d for d in self.dtypes if self._words(ids, place, d)[0].tolist() == words]
            self.dtypes = fits or self.dtypes

    def matches(self, place: WrongPlace, ids: UInt32[ndarray, " ids"]) -> NDArray[np.intp]:
        """Indices of the ids whose words are the found ones; a scale behind the words is left out."""
        found = np.array(place.found[: self.head_dim], np.uint64)
        for dtype in self.dtypes:
            hits = np.flatnonzero((self._words(ids, place, dtype).astype(np.uint64) == found).all(axis=1))
            if len(hits):
                return hits
        return np.zeros(0, np.intp)

    def stream(self, place: WrongPlace, kv_id: int, kind: int, head: int) -> tuple[int, ...]:
        """The words of the same layer's other stream or head for a token."""
        salt, ids = self.salts[place.layer, kind, head], np.array([kv_id], np.uint32)
        return tuple(fingerprint.words(ids[:, None], salt, self.dtypes[0])[0].tolist())

    def equals(self, place: WrongPlace, kv_id: int) -> bool:
        """Whether the words found are those of `kv_id` (0: never written)."""
        return len(self.matches(place, np.array([kv_id], np.uint32))) > 0
