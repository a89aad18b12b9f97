"""Tensors that are given in Python, a state dict or pairs of names and tensors: a file of safetensors that is held, and never written."""

from __future__ import annotations

import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from streamconv.checkpoint.opening import Checkpoint
from streamconv.dtypes import TensorSpec, parse_dtype
from streamconv.errors import SpaceError, UsageError
from streamconv.formats.safetensors import header_bytes
from streamconv.storage.folder import AnyPath, Location
from streamconv.storage.held import Piece, hold

NAME = "model.safetensors"
CHUNK = 8 << 20  # bytes that go to the file of an iterator at a time

Pairs = Mapping[str, Any] | Iterable[tuple[str, Any]]


class _Block(NamedTuple):
    """A tensor as it lies in memory: its bytes, row by row, from one to another; ``is_here``: in this machine's memory."""

    spec: TensorSpec
    read: Callable[[int, int], memoryview]
    is_here: bool


def as_source(src: AnyPath | Pairs) -> AnyPath:
    """A place as it is; the address of tensors, which are held as long as it is, and neither copied nor written.

    A tensor that does not lie in one piece is copied. Of an iterator each tensor goes to an unnamed file in the directory for temporary
    files before the next is asked for: a file begins with the names of all tensors, which are known at the end, and so no more than one
    need be in memory.

    Args:
        src: a place; or tensors by name, or pairs of a name and a tensor: torch's, on any device, or what numpy takes for an array.

    Raises:
        UsageError: it is none of that, or a name comes twice.
        SpaceError: there is no room for an iterator's tensors.
    """
    if isinstance(src, str | os.PathLike | Location):
        return src
    if isinstance(src, Checkpoint):
        return src.location
    if not isinstance(src, Iterable):
        raise UsageError(f"SRC: {type(src).__name__} is no path, state dict, or pairs of a name and a tensor")
    is_there = isinstance(src, Mapping | list | tuple)
    spool = None if is_there else _Spool()
    pieces: dict[str, Piece] = {}
    specs: dict[str, TensorSpec] = {}
    for pair in src.items() if isinstance(src, Mapping) else src:
        name, tensor = _check_pair(pair)
        if name in specs:
            raise UsageError(f"SRC: {name} comes twice: give each name one tensor")
        block = _block_of(name, tensor)
        specs[name] = block.spec
        pieces[name] = spool.keep(block) if spool else Piece(block.spec.nbytes, block.read, block.is_here)
    if not specs:
        raise UsageError("SRC: it has no tensors: give a state dict, or pairs of a name and a tensor")
    header, slots = header_bytes(specs, {"format": "pt"}, 8)
    first = Piece(len(header), lambda start, stop: header[start:stop], is_resident=True)
    return hold(NAME, [first, *(pieces[name] for name in sorted(slots, key=slots.__getitem__))])


def _check_pair(pair: object) -> tuple[str, Any]:
    match pair:
        case (str() as name, tensor):
            return name, tensor
    raise UsageError(f"SRC: {type(pair).__name__} where a pair of a name and a tensor was expected")


def _block_of(name: str, tensor: Any) -> _Block:
    """Raises UsageError: it is no tensor with data, or of a type that files do not have."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        return _block_of_torch(name, tensor, torch)
    if not (hasattr(tensor, "__array__") or hasattr(tensor, "__array_interface__")):
        raise UsageError(f"SRC: {name} is {type(tensor).__name__}, no tensor: give the state dict itself, without what lies beside it")
    import numpy as np

    array = np.asarray(tensor)
    spec = _spec_of(name, array.dtype.newbyteorder("="), array.shape)
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
    return _Block(spec, lambda start, stop: data[start:stop], is_here=True)


def _block_of_torch(name: str, tensor: Any, torch: Any) -> _Block:
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or hasattr(tensor, "to_local"):
        kind = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__} of layout {tensor.layout}"
        raise UsageError(f"SRC: {name} is {kind}: give a dense tensor that has data")
    spec = _spec_of(name, tensor.dtype, tuple(tensor.shape))
    data = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return _Block(spec, lambda start, stop: data[start:stop].cpu().numpy().data, is_here=data.device.type == "cpu")


def _spec_of(name: str, dtype: object, shape: tuple[int, ...]) -> TensorSpec:
    try:
        return TensorSpec(parse_dtype(dtype), shape)
    except UsageError:
        raise UsageError(f"SRC: {name} is of type {dtype}, which files of weights do not have") from None


class _Spool:
    """An unnamed file for tensors that come one after the other, there as long as what reads it."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile(buffering=0) as file:
            self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)
        self._size = 0

    def keep(self, block: _Block) -> Piece:
        """Writes a tensor, and says how to read it again."""
        first, nbytes = self._size, block.spec.nbytes
        try:
            for start in range(0, nbytes, CHUNK):
                view = block.read(start, min(start + CHUNK, nbytes))
                while view:
                    view = view[os.write(self._fd, view) :]
        except OSError as error:
            room = "set TMPDIR to a directory with room, or give a dict or a list"
            what = f"the tensors of an iterator cannot be kept there ({error.strerror})"
            raise SpaceError(f"{tempfile.gettempdir()}: {what}: {room}") from error
        self._size += nbytes
        return Piece(nbytes, lambda start, stop: os.pread(self._fd, stop - start, first + start), is_resident=False)
