"""What a decoder's runs must show: tokens, logits and K/V words of every request, from the oracle's run of it alone."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Int32
from numpy import ndarray
from numpy.typing import NDArray

from invariants.device import Words
from invariants.reference_decoder import ReferenceDecoder
from paged_attention.decoder_spec import DecoderSpec
from paged_attention.fingerprint import WORD_MASK
from paged_attention.plan import EOS_TOKEN, Request

_FIRST_ROOM = 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens of a request, as the ledger keeps them: -1 behind an EOS."""

    tokens: Int32[ndarray, " generated"]
    eos_position: int


class DecoderOracle:
    """Runs each request once, when it is first admitted, and remembers what it wrote."""

    def __init__(self, spec: DecoderSpec, dtype: str) -> None:
        self.spec = spec
        self._decoder = ReferenceDecoder(spec)
        self._dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
        self._word = np.dtype(WORD_MASK[dtype][0])
        self._answers: dict[int, Answer] = {}
        self._rows: dict[int, range] = {}
        """Where the K/V of each request stand in `_words`, one row a position."""
        self._words: Words = np.zeros((_FIRST_ROOM, spec.layers, 2, spec.kv_heads, spec.head_dim), self._word)
        self._num_rows = 1  # Row 0 stays all zeros: a place never written.
        self._digests: dict[tuple[int, int], int] = {}
        self._by_digest: dict[int, tuple[int, int]] = {}

    def answer(self, request: Request, last: int) -> Answer:
        """The tokens from the prompt's end to position `last`."""
        if request.id not in self._answers:
            prompt = len(request.prompt)
            written = self._decoder.run(request, last - prompt + 1)
            tokens = np.full(last - prompt + 1, -1, np.int32)
            tokens[: len(written.tokens)] = written.tokens
            ended = written.tokens[-1] == EOS_TOKEN
            eos_position = prompt + len(written.tokens) - 1 if ended else -1
            self._answers[request.id] = Answer(tokens, eos_position)
            self._keep(request.id, written.kv.astype(self._dtype).view(self._word))
            for nth, digest in enumerate(written.digests):
                self._digests[request.id, prompt + nth] = digest
                self._by_digest.setdefault(digest, (request.id, prompt + nth))
        return self._answers[request.id]

    def _keep(self, request: int, words: Words) -> None:
        end = self._num_rows + len(words)
        if end > len(self._words):
            room = np.zeros((max(end - len(self._words), len(self._words)), *self._words.shape[1:]), self._word)
            self._words = np.concatenate([self._words, room])
        self._words[self._num_rows : end] = words
        self._rows[request] = range(self._num_rows, end)
        self._num_rows = end

    def words(self, places: NDArray[np.void]) -> Words:
        """The raw words of places (`invariants.shadow.PLACE`); zeros where none was ever written."""
        said = zip(places["id"].tolist(), places["request"].tolist(), places["position"].tolist(), strict=True)
        rows = [self._row(request, position) if kv_id else 0 for kv_id, request, position in said]
        return self._words[np.array(rows, np.intp)]

    def _row(self, request: int, position: int) -> int:
        """0 for a token that the oracle never wrote: a plan that goes on for too long has others to answer to."""
        rows = self._rows.get(request, range(0))
        return rows[position] if position < len(rows) else 0

    def digest(self, request: int, position: int) -> int | None:
        """Of the logits that the token at `position` is drawn from; None: the request was never run."""
        return self._digests.get((request, position))

    def whose_logits(self, digest: int) -> str:
        """Whose these logits are, as far as the oracle has run."""
        if digest not in self._by_digest:
            return "of no request that was run"
        request, position = self._by_digest[digest]
        return f"those of request {request} at position {position}"
