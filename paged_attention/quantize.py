"""Quantised pages: what a quantizer is, and the one that is built in (int8, one scale per token and head)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from paged_attention.arrays import array_module
from paged_attention.pytree import SerializableTree


class Quantizer(Protocol):
    """Turns vectors into a pytree of arrays and back.

    `quantize` works along the last axis alone and keeps every axis before it in each array that it returns, so that
    one token of one head can be written without touching its neighbours. A quantizer must be hashable (it is static
    under `jax.jit`), and both methods must accept NumPy and JAX arrays.
    """

    def quantize(self, array: Any) -> Any:
        """The quantised form of `array`, shape (..., head_dim)."""
        ...

    def dequantize(self, quantized: Any) -> Any:
        """The vectors that `quantized` stands for."""
        ...


@dataclass(frozen=True)
class Int8Vectors(SerializableTree):
    """Vectors as int8 `values` (..., head_dim), each times its float32 `scale` (...)."""

    tree_leaves: ClassVar[tuple[str, ...]] = ("values", "scale")

    values: Any
    scale: Any


@dataclass(frozen=True)
class Int8PerTokenHead(SerializableTree):
    """Symmetric int8: scale = max(abs(vector)) / 127, one for each token and head; an all-zero vector has scale 0."""

    tree_static: ClassVar[tuple[str, ...]] = ("dtype",)

    dtype: str = "float32"
    """What `dequantize` returns."""

    def quantize(self, array: Any) -> Int8Vectors:
        """Round each vector of `array` (..., head_dim) to steps of its own scale."""
        xp = array_module(array)
        vectors = array.astype(np.float32)
        scale = xp.max(xp.abs(vectors), axis=-1) / np.float32(127)
        step = xp.where(scale == 0, np.float32(1), scale)
        return Int8Vectors(xp.rint(vectors / step[..., None]).astype(np.int8), scale)

    def dequantize(self, quantized: Int8Vectors) -> Any:
        """`values * scale` in `dtype`."""
        product = quantized.values.astype(np.float32) * quantized.scale[..., None]
        return product.astype(np.dtype(self.dtype))
