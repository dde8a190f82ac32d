"""Prompt token ids: a pure function of seed, request and position."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from paged_attention.fingerprint import GOLDEN, mix32, token

PROMPT_SALT = 0x50524F4D
"""Keeps prompts apart from sampled tokens, which hash seeds too ("PROM" in ASCII)."""


def prompt_tokens(seed: int, request: int, n: int, vocab: int) -> Int32[np.ndarray, " prompt_tokens"]:
    """`n` token ids in 1 .. vocab - 1 (never EOS); a longer prompt begins with the shorter one."""
    words = np.array([seed & 0xFFFFFFFF, seed >> 32, request & 0xFFFFFFFF], np.uint32)
    key = np.array([PROMPT_SALT], np.uint32)
    for word in words:
        key = mix32(key * np.uint32(GOLDEN) + word)
    return token(key, np.arange(n, dtype=np.uint32), vocab)
