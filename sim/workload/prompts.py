"""Prompt token ids: a pure function of seed, request and position."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from jaxtyping import Int32

from paged_attention.fingerprint import GOLDEN

_ONE, _FIFTEEN, _SIXTEEN, _GOLDEN, _FIRST_FACTOR, _SECOND_FACTOR = (
    np.array(constant, np.uint32) for constant in (1, 15, 16, GOLDEN, 0x7FEB352D, 0x846CA68B)
)


def prompt_tokens(seed: int, request: int, n: int, vocab: int) -> Int32[np.ndarray, " prompt_tokens"]:
    """`n` token ids in 1 .. vocab - 1 (never EOS); a longer prompt begins with the shorter one."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, request), digest_size=4, person=b"prompt").digest()
    # mix32 written out, in place and with constants of rank 0: this runs once a request.
    x = np.arange(n, dtype=np.uint32)
    np.multiply(x, _GOLDEN, x)
    np.add(x, np.frombuffer(digest, "<u4"), x)
    np.bitwise_xor(x, np.right_shift(x, _SIXTEEN), x)
    np.multiply(x, _FIRST_FACTOR, x)
    np.bitwise_xor(x, np.right_shift(x, _FIFTEEN), x)
    np.multiply(x, _SECOND_FACTOR, x)
    np.bitwise_xor(x, np.right_shift(x, _SIXTEEN), x)
    np.remainder(x, np.array(vocab - 1, np.uint32), x)
    np.add(x, _ONE, x)
    return x.view(np.int32)
