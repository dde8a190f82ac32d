"""O: each token reaches its own request once, is the token it must be, and the last one is the last.

Declared rules: the limit of a request is min(max_tokens, max_sequence_length - prompt + 1) tokens. It ends with the
step that yields token number `limit` (reason "max_tokens", or "length" where the maximum length cut it short) or with
an EOS (reason "eos"). Where several apply at once each of their names is accepted. `ended` comes with the apply of that
step, pages and slot at the latest with it; a request whose last row is planned gives them back at the next apply.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt32

from invariants.decoder_oracle import DecoderOracle
from invariants.findings import Findings
from invariants.ledger import Ledger
from invariants.records import Flight, Live
from paged_attention.plan import EOS_TOKEN, Effect, StepOutcome

NO_TOKEN = bytes(4)
"""An EOS_TOKEN in the raw bytes of int32 tokens."""


class OutputJudge:
    """Judges outcomes before the core sees them, and ends when it has."""

    def __init__(self, ledger: Ledger, findings: Findings) -> None:
        self.ledger = ledger
        self.findings = findings
        self.no_ends = bytes(4 * ledger.policy.batch_size)
        self.rows = 0
        """Decode rows judged so far, all at once."""
        self.due: dict[int, tuple[Live, frozenset[str]]] = {}
        """Requests that must end in the apply at hand, with the reasons that are right."""

    # ---- outcomes

    def executed(self, flight: Flight, outcome: StepOutcome) -> None:
        """Judge the tokens of a step, and note whose EOS is among them."""
        flight.outcome = outcome
        plan, first = flight.plan, flight.first
        rows = len(plan.request)
        if len(outcome.token) != rows or len(outcome.eos) != rows:
            self.findings.breach(
                "O10",
                f"the outcome of step {plan.step} has {len(outcome.token)} tokens and {len(outcome.eos)} ends for"
                f" {rows} rows",
                requests=plan.request.tolist(),
                expected=f"{rows} and {rows}",
                found=f"{len(outcome.token)} and {len(outcome.eos)}",
            )
            return
        for row, live, _, start, count in flight.prefills:
            self._judge_row(flight, row, live, start + count)
        for i in self._suspects(flight, outcome):
            self._judge_decode(flight, first + i, int(flight.start[i]) + 1)
        self.rows += len(flight.slots)
        if self.ledger.oracle is not None and outcome.logits is not None:
            self._judge_logits(flight, self.ledger.oracle, outcome.logits)

    def _judge_logits(self, flight: Flight, oracle: DecoderOracle, digests: UInt32[np.ndarray, " rows"]) -> None:
        """O2: each token was drawn from the logits of its own request and position."""
        plan, outcome = flight.plan, flight.outcome
        assert outcome is not None
        for row in np.flatnonzero((plan.samples == 1) & (outcome.token >= 0)).tolist():
            request, position = int(plan.request[row]), int(plan.start[row] + plan.count[row])
            expected = oracle.digest(request, position)
            if expected is None:
                continue
            self.findings.counts["O2"].add(1, 1)
            if int(digests[row]) != expected:
                whose = oracle.whose_logits(int(digests[row]))
                self.findings.breach(
                    "O2",
                    f"the token of request {request} at position {position} was drawn from other logits than those"
                    " of a run by itself",
                    requests=(request,),
                    expected=f"logits with digest {expected:#010x}",
                    found=f"digest {int(digests[row]):#010x}, {whose}",
                )

    def settle_counts(self) -> None:
        """Move the bulk counter into the counters."""
        for name in ("O1", "O10"):
            self.findings.counts[name].add(self.rows, self.rows)
        self.rows = 0

    def _suspects(self, flight: Flight, outcome: StepOutcome) -> list[int]:
        """The decode rows whose outcome is not simply the one token that was expected."""
        ledger, slots, first, at = self.ledger, flight.slots, flight.first, flight.at
        token, eos = outcome.token[first:], outcome.eos[first:]
        if len(slots) != len(token):
            return []  # Rows of strangers are among them: their judge has spoken, and whose token is whose is unknown.
        expected = ledger.flat_tokens[at]
        words = token.tobytes()
        # Four zero bytes are an EOS, or two neighbours that look like one: then the careful way decides.
        plain = words == expected.tobytes() and NO_TOKEN not in words and eos.tobytes() == self.no_ends[: len(words)]
        if plain and flight.joins == ledger.joins and ledger.vocab_size is not None:
            ledger.seen = (at, words)
            return []
        held = ledger.request[slots] == flight.plan.request[first:]
        if ledger.vocab_size is None:
            ledger.flat_tokens[at[held]] = token[held]
            return np.flatnonzero(~held | (token < 0) | (eos != 0)).tolist()
        return np.flatnonzero(~held | (token != expected) | (eos != 0) | (token == EOS_TOKEN)).tolist()

    def _judge_decode(self, flight: Flight, row: int, position: int) -> None:
        plan, ledger = flight.plan, self.ledger
        request, number = int(plan.request[row]), int(plan.admission[row])
        live = ledger.live.get(request)
        if live is None or live.admission is None or live.admission.number != number:
            return
        self._judge_row(flight, row, live, position)

    def _judge_row(self, flight: Flight, row: int, live: Live, position: int) -> None:
        """One row by itself; `position` is where its token stands if it yields one."""
        plan, outcome = flight.plan, flight.outcome
        assert outcome is not None
        token, eos = int(outcome.token[row]), int(outcome.eos[row])
        ended = 0 <= live.eos_position < position or (self.ledger.vocab_size is None and self._eos_seen(live, flight))
        self.findings.counts["O10"].add(1, 1)
        if not plan.samples[row] or ended:
            if (token, eos) != (-1, 0):
                why = "its EOS came before" if ended else "the row does not sample"
                for name in ("O10", "O3") if ended else ("O10",):
                    self.findings.breach(
                        name,
                        f"row {row} of step {plan.step} gave request {live.id} token {token}, though {why}",
                        requests=(live.id,),
                        expected="token -1, eos 0",
                        found=f"token {token}, eos {eos}",
                    )
            return
        if token < 0 or eos not in {0, 1}:
            self.findings.breach(
                "O10",
                f"row {row} of step {plan.step} yielded no token for request {live.id}",
                requests=(live.id,),
                expected="one token",
                found=f"token {token}, eos {eos}",
            )
        elif live.tokens is not None and position <= live.last:
            self._judge_token(flight, row, live, position)
        if eos == 1 and live.state != "gone":
            flight.eos.append(live)

    def _judge_token(self, flight: Flight, row: int, live: Live, position: int) -> None:
        assert live.tokens is not None
        assert flight.outcome is not None
        token, eos = int(flight.outcome.token[row]), int(flight.outcome.eos[row])
        if self.ledger.vocab_size is None:
            self._note(live, position, token)
            return
        expected = int(live.tokens[position])
        self.findings.counts["O1"].add(1, 1)
        if token != expected:
            self.findings.breach(
                "O1",
                f"request {live.id} got token {token} at position {position}, but a run by itself yields {expected}",
                requests=(live.id,),
                expected=expected,
                found=token,
            )
            self._note(live, position, token)
        if (token == EOS_TOKEN) != (eos == 1):
            self.findings.breach(
                "O3",
                f"token {token} of request {live.id} at position {position} came with eos {eos}",
                requests=(live.id,),
                expected=f"eos {int(token == EOS_TOKEN)}",
                found=f"eos {eos}",
            )

    def _note(self, live: Live, position: int, token: int) -> None:
        """From now on this is the request's token there, wherever the books have it."""
        if live.tokens is not None:
            live.tokens[position] = token
        if live.admission is not None and live.admission.slot >= 0:
            self.ledger.tokens[live.admission.slot, position] = token

    def _eos_seen(self, live: Live, flight: Flight) -> bool:
        """Whether an earlier step, not yet applied, already brought the request's EOS (vocabulary unknown)."""
        return any(live in f.eos for f in self.ledger.flights.values() if f.plan.step < flight.plan.step)

    # ---- ends

    def begin_apply(self, flight: Flight) -> None:
        """What must end with this step."""
        self.due.clear()
        policy = self.ledger.policy
        for live in flight.draining:
            if live.state == "gone":
                continue
            reasons: set[str] = set()
            tokens = live.last - live.prompt + 1
            if tokens == live.request.max_tokens:
                reasons.add("max_tokens")
            if tokens == policy.max_sequence_length - live.prompt + 1:
                reasons.add("length")
            self.due[live.id] = (live, frozenset(reasons))
        for live in flight.eos:
            if live.state != "gone":
                before = self.due.get(live.id, (live, frozenset[str]()))[1]
                self.due[live.id] = (live, before | {"eos"})

    def ended(self, effect: Effect, live: Live) -> None:
        """A request ends now."""
        self.findings.counts["O3"].add(1, 1)
        if live.id not in self.due:
            self.findings.breach(
                "O3",
                f"request {live.id} ended ({effect.reason}) at {self.ledger.known_tokens(live) - live.prompt} of"
                f" {live.last - live.prompt + 1} tokens, without an EOS in this step",
                requests=(live.id,),
                expected="an end at its last token or an EOS",
                found=f"ended: {effect.reason}",
            )
            return
        _, reasons = self.due.pop(live.id)
        if effect.reason not in reasons:
            self.findings.breach(
                "O3",
                f"request {live.id} ended with reason {effect.reason!r}",
                requests=(live.id,),
                expected=" or ".join(sorted(reasons)),
                found=effect.reason,
            )

    def end_apply(self) -> None:
        """Whoever had to end has ended."""
        for live, reasons in self.due.values():
            self.findings.breach(
                "O3",
                f"request {live.id} did not end although its end came with this step ({' or '.join(sorted(reasons))})",
                requests=(live.id,),
                expected="ended",
                found=live.state,
            )
        self.due.clear()
