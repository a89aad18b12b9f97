"""The call `stream`: what a conversion makes, tensor by tensor, for whatever else takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from streamconv import memory
from streamconv.checkpoint.entries import TILE, TensorEntry
from streamconv.conversion.casting import Casting
from streamconv.conversion.comparing import convert_side
from streamconv.conversion.naming import name_as_model
from streamconv.conversion.opening import check_backend, find_beside, find_recipe, split_settings
from streamconv.conversion.options import StreamOptions, arguments_of
from streamconv.conversion.sides import open_side
from streamconv.errors import BudgetError, UsageError
from streamconv.extras import require
from streamconv.graph.evaluate import arena_bytes
from streamconv.graph.node import AnyNode
from streamconv.planning.fitting import MARGIN
from streamconv.recipe import Side
from streamconv.storage.held import resident
from streamconv.units import format_size, parse_size


@dataclass(frozen=True)
class Part:
    """Some rows of a tensor.

    Attributes:
        rows: which of its first axis they are.
        values: a tensor of these.
        shape: that of the whole tensor.
    """

    rows: slice
    values: Any
    shape: tuple[int, ...]


@arguments_of(StreamOptions)
def stream(options: StreamOptions) -> Iterator[tuple[str, Any]]:
    """What `convert` would write, tensor by tensor, in its order: pairs of a name and a tensor, for whatever takes such.

    Nothing is written. Each tensor, or with ``parts`` each `Part` of one, is made when it is asked for, in memory of its own; so that the
    process stays below ``max_memory`` no more than the last two may be kept.

    Raises:
        StreamconvError: anything that can be refused before the first tensor.
        BudgetError: a tensor, or a part of one, is too large for ``max_memory``.

    >>> for name, tensor in streamconv.stream("model", dtype="bf16", max_memory="4GB"):
    ...     print(name, tensor.dtype, tuple(tensor.shape))
    layers.0.b torch.bfloat16 (2,)
    layers.1.b torch.bfloat16 (2,)
    w torch.bfloat16 (2, 3)
    >>> pairs = streamconv.stream("model", only=["w"], parts=12, framework="numpy", max_memory="4GB")
    >>> [(name, part.rows, part.values.tolist()) for name, part in pairs]
    [('w', slice(0, 1, None), [[0.0, 1.0, 2.0]]), ('w', slice(1, 2, None), [[3.0, 4.0, 5.0]])]
    """
    if options.framework not in ("torch", "numpy"):
        raise UsageError(f"framework {options.framework!r}: expected torch or numpy")
    size = None if options.parts is None else parse_size(options.parts)
    outputs = _convert(options)
    require(options.framework, "stream")
    entries = [TensorEntry(name, node) for name, node in outputs.items()]
    steps = {entry.name: _rows_at_once(entry, size) for entry in entries}
    _check_memory(options, entries, steps)
    return _give(options, entries, steps)


def _give(options: StreamOptions, entries: list[TensorEntry], steps: Mapping[str, int]) -> Iterator[tuple[str, Any]]:
    for entry in entries:
        read = entry.torch if options.framework == "torch" else entry.numpy
        if options.parts is None:
            yield entry.name, read()
            continue
        count, step = (entry.shape or (1,))[0], steps[entry.name]
        if step >= count:
            yield entry.name, Part(slice(0, count), read(), entry.shape)
            continue
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            yield entry.name, Part(rows, read(rows), entry.shape)


def _convert(options: StreamOptions) -> Mapping[str, AnyNode]:
    """The tensors that are asked for, by name, in order."""
    check_backend(options)
    recipe = find_recipe(options)
    reading, settings = split_settings(options, recipe)
    with memory.bounded(parse_size(options.max_memory)):
        checkpoint = open_side(options.src, recipe.source if recipe else Side(), reading, options.variant)
    checkpoint = name_as_model(checkpoint, reading.prefix, find_beside(options))
    outputs, _ = convert_side(options, checkpoint, recipe, settings, Casting(options.dtype, options.keep_dtype))
    return outputs


def _rows_at_once(entry: TensorEntry, size: int | None) -> int:
    """How many rows of a tensor come at a time: all of a scalar, and of a packed one, which is not taken apart."""
    count = (entry.shape or (1,))[0]
    if size is None or not entry.shape or not count or entry.spec.dtype.is_packed:
        return max(1, count)
    return min(count, max(1, size // max(1, entry.nbytes // count)))


def _check_memory(options: StreamOptions, entries: list[TensorEntry], steps: Mapping[str, int]) -> None:
    """Refuses what the memory does not hold: a part that is made while the one before is still there. Raises BudgetError."""
    limit = parse_size(options.max_memory) + resident(str(options.src))
    sizes = [(entry.nbytes // max(1, (entry.shape or (1,))[0]) * steps[entry.name], entry) for entry in entries]
    before = [0, *(nbytes for nbytes, _ in sizes)]
    taken = memory.resident() + MARGIN
    for (nbytes, entry), previous in zip(sizes, before, strict=False):
        tile = min(TILE, max(1, nbytes))
        most = max(previous, nbytes if steps[entry.name] < (entry.shape or (1,))[0] else 0)
        needed = taken + nbytes + most + arena_bytes(entry.source, tile, scattered=True)
        if needed > limit:
            megabytes = -(-needed // 10**6)
            raise BudgetError(
                f"{entry.name}: {format_size(nbytes)} of it at a time, and as much before it, are too much for max_memory "
                f"{format_size(limit)}: use max_memory='{megabytes}MB', or smaller parts",
                megabytes * 10**6,
            )
