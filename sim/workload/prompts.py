"""Prompt token ids: a pure function of seed, request and position."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from jaxtyping import Int32

from paged_attention.fingerprint import GOLDEN, mix32


def prompt_tokens(seed: int, request: int, n: int, vocab: int) -> Int32[np.ndarray, " prompt_tokens"]:
    """`n` token ids in 1 .. vocab - 1 (never EOS); a longer prompt begins with the shorter one."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, request), digest_size=4, person=b"prompt").digest()
    key = np.uint32(int.from_bytes(digest, "little"))
    mixed = mix32(np.arange(n, dtype=np.uint32) * np.uint32(GOLDEN) + key)
    return (mixed % np.uint32(vocab - 1) + np.uint32(1)).astype(np.int32)
