"""GGUF's block types as numbers, by float32, each operation rounded: blocks of bytes in, values out.

Where what lies in a block is said by gguf's own reader; ``d`` and ``m`` are float16 that all of a block is multiplied with, or less by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]
    Decode = Callable[[Array], Array]

_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_MXFP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _half(blocks: Array, at: int) -> Array:
    """A float16 of each block, as float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _halves(octets: Array) -> Array:
    """Nibbles: the low ones are the first half of the values, the high ones the second."""
    return np.concatenate([octets & 15, octets >> 4], axis=1)


def _fifth_bits(blocks: Array, at: int) -> Array:
    """Bit k of a word of each block, for value k, as 16."""
    words = np.ascontiguousarray(blocks[:, at : at + 4]).view(np.uint32)
    return ((words >> np.arange(32, dtype=np.uint32) & 1) << 4).astype(np.uint8)


def _q4_0(blocks: Array) -> Array:
    return _half(blocks, 0) * (_halves(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Array) -> Array:
    return _half(blocks, 0) * _halves(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Array) -> Array:
    codes = _halves(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (codes.astype(np.float32) - 16)


def _q5_1(blocks: Array) -> Array:
    codes = _halves(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Array) -> Array:
    return _half(blocks, 0) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)


def _iq4_nl(blocks: Array) -> Array:
    return _half(blocks, 0) * _IQ4[_halves(blocks[:, 2:])]


def _mxfp4(blocks: Array) -> Array:
    powers = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    return powers * _MXFP4[_halves(blocks[:, 1:])]


def _two_bits(octets: Array) -> Array:
    """Codes of two bits of 256 values: in each half of 128, value 32 i + k is bits 2 i of byte k."""
    parts = octets.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    values: Array = parts.reshape(-1, 256)
    return values


def _q2_k(blocks: Array) -> Array:
    scales, codes = blocks[:, :16], _two_bits(blocks[:, 16:80]).reshape(-1, 16, 16).astype(np.float32)
    step = (_half(blocks, 80) * (scales & 15).astype(np.float32))[:, :, None]
    least = (_half(blocks, 82) * (scales >> 4).astype(np.float32))[:, :, None]
    values: Array = (step * codes - least).reshape(-1, 256)
    return values


def _q3_k(blocks: Array) -> Array:
    high, codes, packed = blocks[:, :32], _two_bits(blocks[:, 32:96]), blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    top = packed[:, 8:, None].transpose(0, 2, 1) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    scales = (low | top.reshape(-1, 16) << 4).astype(np.int8) - np.int8(32)
    bits = high[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    values = codes.astype(np.int8) - ((1 - bits.reshape(-1, 256).astype(np.int8)) << 2)
    step = (_half(blocks, 108) * scales.astype(np.float32))[:, :, None]
    numbers: Array = (step * values.reshape(-1, 16, 16).astype(np.float32)).reshape(-1, 256)
    return numbers


def _scales_and_least(packed: Array) -> tuple[Array, Array]:
    """Eight scales and eight least values of six bits in twelve bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    least = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales.astype(np.float32), least.astype(np.float32)


def _by_64(octets: Array) -> Array:
    """Nibbles of 256 values: for each 64 of them the low ones of 32 bytes, then the high ones."""
    parts = octets.reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None] & 15
    values: Array = parts.reshape(-1, 8, 32)
    return values


def _with_scales(blocks: Array, codes: Array) -> Array:
    scales, least = _scales_and_least(blocks[:, 4:16])
    step = (_half(blocks, 0) * scales)[:, :, None]
    offset = (_half(blocks, 2) * least)[:, :, None]
    values: Array = (step * codes.astype(np.float32) - offset).reshape(-1, 256)
    return values


def _q4_k(blocks: Array) -> Array:
    return _with_scales(blocks, _by_64(blocks[:, 16:]))


def _q5_k(blocks: Array) -> Array:
    bits = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _with_scales(blocks, _by_64(blocks[:, 48:]) | bits << 4)


def _q6_k(blocks: Array) -> Array:
    low = blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = (low.reshape(-1, 256) | high.reshape(-1, 256) << 4).astype(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    step = (_half(blocks, 208) * scales)[:, :, None]
    values: Array = (step * codes.reshape(-1, 16, 16).astype(np.float32)).reshape(-1, 256)
    return values


def _iq4_xs(blocks: Array) -> Array:
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16)
    low = (blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15).reshape(-1, 8)
    top = high >> 2 * np.arange(8, dtype=np.uint16) & 3
    scales = (low | top.astype(np.uint8) << 4).astype(np.int8) - np.int8(32)
    codes = blocks[:, 8:].reshape(-1, 8, 1, 16) >> np.array([0, 4], np.uint8)[:, None] & 15
    step = (_half(blocks, 0) * scales.astype(np.float32))[:, :, None]
    values: Array = (step * _IQ4[codes.reshape(-1, 8, 32)]).reshape(-1, 256)
    return values


DECODERS: dict[str, Decode] = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0, "q2_k": _q2_k, "q3_k": _q3_k, "q4_k": _q4_k,
    "q5_k": _q5_k, "q6_k": _q6_k, "iq4_nl": _iq4_nl, "iq4_xs": _iq4_xs, "mxfp4_gguf": _mxfp4,
}  # fmt: skip
"""By the name of a type: blocks, a row of bytes each, to as many rows of values."""
