"""Tensors that lie cut into boxes: any cut is put together to the same bytes, and what is missing or there twice is told."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.checkpoint.entries import TensorEntry
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import FormatError
from streamconv.formats import Extent, Source
from streamconv.formats.catalog import locate
from streamconv.trainers.pieces import Box, Piece, assemble


def cuts(box: Box, draw: st.DrawFn, depth: int) -> list[Box]:
    """Boxes that fill one, cut through along some axis, and again."""
    axes = [axis for axis, (start, stop) in enumerate(box) if stop - start > 1]
    if not axes or depth == 0 or draw(st.booleans()):
        return [box]
    axis = draw(st.sampled_from(axes))
    start, stop = box[axis]
    at = draw(st.integers(start + 1, stop - 1))
    halves = [(*box[:axis], part, *box[axis + 1 :]) for part in ((start, at), (at, stop))]
    return [inner for half in halves for inner in cuts(half, draw, depth - 1)]


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    boxes = cuts(tuple((0, size) for size in shape), draw, 4)
    return shape, draw(st.permutations(boxes))


@given(case=cut_tensors())
def test_boxes_of_any_cut(tmp_path_factory: pytest.TempPathFactory, case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    folder = tmp_path_factory.mktemp("boxes")
    array = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    pieces, end = [], 0
    data = bytearray()
    for box in boxes:
        part = np.ascontiguousarray(array[tuple(slice(*bounds) for bounds in box)])
        pieces.append((box, end, part.nbytes))
        data += part.tobytes()
        end += part.nbytes
    (folder / "data").write_bytes(data)
    spec = TensorSpec(DTYPES["int32"], shape)
    listed = [
        Piece(
            tuple(start for start, _ in box),
            Source(
                TensorSpec(spec.dtype, tuple(stop - start for start, stop in box)),
                (Extent(str(folder / "data"), offset, nbytes),),
            ),
        )
        for box, offset, nbytes in pieces
    ]
    node, replicas = assemble(locate(folder), "t", spec, listed)
    assert not replicas
    assert np.array_equal(TensorEntry("t", node).numpy(), array)
    again, doubled = assemble(locate(folder), "t", spec, [*listed, listed[0]])
    assert len(doubled) == 1
    assert np.array_equal(TensorEntry("t", again).numpy(), array)
    if len(listed) > 1:
        with pytest.raises(FormatError, match="is in no file"):
            assemble(locate(folder), "t", spec, listed[1:])
