"""Whose are these words? Names the token whose fingerprint lies at a wrong place of the cache."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt32
from numpy import ndarray
from numpy.typing import NDArray

from invariants.decoder_oracle import DecoderOracle
from invariants.device import Words
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

    def matches(self, place: WrongPlace, tokens: NDArray[np.void]) -> NDArray[np.intp]:
        """Indices of the tokens (entries of the shadow) whose words are the found ones; a scale is left out."""
        ids = tokens["id"]
        found = np.array(place.found[: self.head_dim], np.uint64)
        for dtype in self.dtypes:
            hits = np.flatnonzero((self._words(ids, place, dtype).astype(np.uint64) == found).all(axis=1))
            if len(hits):
                return hits
        return np.zeros(0, np.intp)

    def stream(self, place: WrongPlace, token: np.void, kind: int, head: int) -> tuple[int, ...]:
        """The words of the same layer's other stream or head for a token."""
        salt, ids = self.salts[place.layer, kind, head], np.array([token["id"]], np.uint32)
        return tuple(fingerprint.words(ids[:, None], salt, self.dtypes[0])[0].tolist())

    def equals(self, place: WrongPlace, token: np.void) -> bool:
        """Whether the words found are those of `token` (id 0: never written)."""
        return len(self.matches(place, np.array([token]))) > 0


class OracleDecoder(Decoder):
    """Turns raw words back into tokens by what the oracle wrote for them.

    Tokens may share words: V of the first layer is a function of the token id alone.
    """

    def __init__(self, evidence: Evidence, oracle: DecoderOracle) -> None:
        super().__init__(evidence)
        self._oracle = oracle

    def matches(self, place: WrongPlace, tokens: NDArray[np.void]) -> NDArray[np.intp]:
        """See Decoder."""
        written = self._oracle.words(tokens)[:, place.layer, KINDS.index(place.kind), place.head]
        return np.flatnonzero((written == np.array(place.found, written.dtype)).all(axis=1))

    def stream(self, place: WrongPlace, token: np.void, kind: int, head: int) -> tuple[int, ...]:
        """See Decoder."""
        return tuple(self._oracle.words(np.array([token]))[0, place.layer, kind, head].tolist())

    def one_layer_missed(
        self, held: Words, layers: list[int], before: np.void | None, tokens: NDArray[np.void]
    ) -> bool:
        """Whether a place that is wrong in these layers alone was written in the others alone.

        `held` are its words, axes (layers, 2, heads, head_dim). What a decoder writes in a layer follows from what it
        read in those below: a planned place (`before` is what it held) was left out where it still holds that. Another
        place holds a whole token that shares its words in some layers with the right one, or was hit in these only.
        """
        if before is not None:
            return bool((self._oracle.words(np.array([before]))[0, layers] == held[layers]).all())
        return not (self._oracle.words(tokens) == held).all(axis=(1, 2, 3, 4)).any()
