"""Matrices of one-byte floats in blocks: the short way to their numbers beside the plain one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.dtypes import CASTABLE, DTYPES
from streamconv.graph import casts
from streamconv.graph.arrays import numpy_dtype
from streamconv.graph.moves import Move
from streamconv.graph.ops import Dequantize
from streamconv.graph.ops.op import Values

SCALES = (1.0, 0.0, -0.0, 3e-5, -0.7, 1.5e-45, 1.2e-38, 127.9, -128.0, 129.0, 3e4, 1e38, float("inf"), float("nan"))
"""Those of ordinary checkpoints, and around the largest for which the short way is gone."""


def all_codes(dtype: str, *, finite: bool) -> np.ndarray:
    codes = np.arange(256, dtype=np.uint8)
    return codes[np.isfinite(codes.view(numpy_dtype(dtype)).astype(np.float32))] if finite else codes


@pytest.mark.parametrize("dtype", CASTABLE)
@pytest.mark.parametrize("codes", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"])
@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("scales", [SCALES[:9], SCALES])
def test_a_number_is_a_code_times_its_scale_rounded_once(dtype, codes, finite, scales):
    octets = np.resize(all_codes(codes, finite=finite), (3, 300))
    matrix, factors = np.concatenate([octets] * len(scales)), np.repeat(np.array(scales, np.float32)[:, None], 2, 1)
    op = Dequantize(matrix.shape, (3, 150), dtype)
    out = np.zeros(matrix.shape, f"u{DTYPES[dtype].itemsize}")
    parts = [Values(matrix, DTYPES[codes]), Values(factors.view(np.uint32), DTYPES["float32"])]
    with np.errstate(all="ignore"):
        overflowed = op.values(Move((matrix.size,), 0, (1,), 0, (1,)), parts, Values(out.reshape(-1), DTYPES[dtype]))
        wide = matrix.view(numpy_dtype(codes)).astype(np.float32) * np.kron(factors, np.ones((3, 150), np.float32))
        expected = wide.astype(numpy_dtype(dtype))
    values = out.view(numpy_dtype(dtype)).astype(np.float64)
    assert np.array_equal(values, expected.astype(np.float64), equal_nan=True)
    is_number = ~np.isnan(values)  # of which the sign counts, zero's too
    assert np.array_equal(np.signbit(values[is_number]), np.signbit(expected[is_number]))
    assert overflowed == np.count_nonzero(np.isfinite(wide) & np.isinf(expected.astype(np.float64)))


@given(st.data(), st.sampled_from(CASTABLE))
def test_products_in_one_pass_are_those_in_two(data, dtype):
    floats = st.floats(width=32, allow_nan=False, min_value=-(2.0**60), max_value=2.0**60)
    values = np.array(data.draw(st.lists(floats, min_size=4, max_size=4)), np.float32).reshape(2, 2)
    factors = np.array(data.draw(st.lists(floats, min_size=2, max_size=2)), np.float32).reshape(2, 1)
    known = data.draw(st.booleans())
    with np.errstate(all="ignore"):
        products = values * factors
        bound = float(np.abs(products).max()) if known else np.inf
        found, expected = (np.zeros((2, 2), f"u{DTYPES[dtype].itemsize}") for _ in range(2))
        overflowed = casts.narrow_products(values.copy(), factors, found, dtype, bound=bound)
        assert overflowed == casts.narrow(products, expected, dtype)
    assert np.array_equal(found, expected)
