"""Which box of a tensor a rank has: by the placements and the mesh of a DTensor, or as a ShardedTensor says it.

Cuts are those of `torch.chunk`: parts of ``ceil(n / ranks)``, late ones short or empty. The mesh is that of the rank's own file, since
tensors of one run may have different ones. Facts: torch/distributed/tensor of torch 2.4 to 2.14.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from streamconv.formats.files import short
from streamconv.formats.pickles import Sharded, Tensor
from streamconv.formats.unpickling import Inert

Numbers = Callable[[Tensor], list[int]]
"""Reads a small tensor of integers."""
Local = tuple[tuple[int, ...], Tensor]
"""Where a rank's part begins along each axis, and what it is."""


class Unplaced(Exception):
    """What keeps a rank's part from being placed, in words."""


def local_parts(tensor: Sharded, rank: int, read: Numbers) -> list[Local]:
    """The parts of a tensor in the file of a rank; none, where it has none.

    Raises:
        Unplaced: it is a sum that was not made, or nothing says where a part belongs.
    """
    if tensor.kind.endswith(".ShardedTensor"):
        return list(_of_sharded_tensor(tensor))
    attributes = _dict_of(tensor.state)
    local, spec = attributes.get("_local_tensor"), attributes.get("_spec")
    if type(local) is not Tensor or type(spec) is not Inert:
        raise Unplaced(f"holds {short.repr(local)} as the rank's own part, which is no plain tensor")
    placements, mesh = spec.attribute("placements"), spec.attribute("mesh")
    if type(placements) not in (tuple, list) or type(mesh) is not Inert or not all(type(one) is Inert for one in placements):
        raise Unplaced("has no placements, or no mesh")
    sizes, coordinates = _coordinates(mesh, rank, read)
    if len(sizes) != len(placements):
        raise Unplaced(f"has {len(placements)} placements on a mesh of {len(sizes)} dimensions")
    box = [(0, size) for size in tensor.shape]
    for number in _order(placements, sizes):
        axis = placements[number].attribute("dim")
        if type(axis) is not int or not -len(box) <= axis < len(box):
            raise Unplaced(f"is cut along axis {short.repr(axis)} of {len(box)}")
        start, stop = box[axis]
        size = -(-(stop - start) // sizes[number])
        first = min(start + coordinates[number] * size, stop)
        box[axis] = first, min(first + size, stop)
    expected = tuple(stop - start for start, stop in box)
    if local.shape != expected:
        raise Unplaced(f"should have {list(expected)} on rank {rank}, and has {list(local.shape)}")
    return [(tuple(start for start, _ in box), local)]


def _dict_of(state: Any) -> dict[str, Any]:
    parts = state if type(state) is tuple else (state,)
    merged: dict[str, Any] = {}
    for part in parts:
        if type(part) is dict:
            merged |= part
    return merged


def _order(placements: Sequence[Inert], sizes: Sequence[int]) -> list[int]:
    """The dimensions of the mesh that cut, in the order in which they do: those that cut stripes come after the ones within them."""
    plain: list[int] = []
    striped: list[int] = []
    for number, placement in enumerate(placements):
        kind = placement.kind.rpartition(".")[2]
        if kind == "Shard":
            plain.append(number)
        elif kind == "_StridedShard":
            axis, factor = placement.attribute("dim"), placement.attribute("split_factor")
            later = [sizes[k] for k in range(number + 1, len(sizes)) if placements[k].attribute("dim") == axis]
            count = 1
            for size in later:
                count *= size
            if factor != count:
                raise Unplaced(f"is cut in stripes of {short.repr(factor)}, on a mesh whose later dimensions cut it in {count}")
            striped.append(number)
        elif kind in ("Partial", "_Partial", "_MaskPartial", "_NormPartial"):
            raise Unplaced("is a sum over ranks that was never made (Partial): save it after redistributing it")
        elif kind != "Replicate":
            raise Unplaced(f"is placed by {short.repr(kind)}, which is not known")
    return plain + striped[::-1]


def _coordinates(mesh: Inert, rank: int, read: Numbers) -> tuple[list[int], list[int]]:
    """The sizes of a mesh, and where in it a rank is."""
    table = mesh.attribute("mesh")
    if type(table) is Tensor:
        ranks, sizes = read(table), list(table.shape)
        strides = [1] * len(sizes)
        for axis in range(len(sizes) - 2, -1, -1):
            strides[axis] = strides[axis + 1] * sizes[axis + 1]
    else:
        map_, layout = mesh.attribute("_rank_map"), mesh.attribute("_layout")
        if type(map_) is not Tensor or type(layout) is not Inert:
            raise Unplaced("has a mesh that does not say which ranks are in it")
        ranks, (sizes, strides) = read(map_), _axes(layout)
    if rank not in ranks:
        raise Unplaced(f"is of a mesh in which rank {rank} is not")
    place = ranks.index(rank)
    return sizes, [place // stride % size for size, stride in zip(sizes, strides, strict=True)]


def _axes(layout: Inert) -> tuple[list[int], list[int]]:
    """Sizes and strides of a `_MeshLayout`."""
    axes = layout.attribute("axes")
    if axes is None and type(layout.args) is tuple and layout.args and type(layout.args[0]) is not dict:
        axes = layout.args[0]
    pairs = [(layout.attribute("shape"), layout.attribute("stride"))] if axes is None else _flat(axes)
    sizes: list[int] = []
    strides: list[int] = []
    for shape, stride in pairs:
        sizes += _listed(shape)
        strides += _listed(stride)
    if len(sizes) != len(strides) or min([*sizes, *strides], default=1) < 1:
        raise Unplaced(f"has a mesh of sizes {sizes} and strides {strides}")
    return sizes, strides


def _flat(axes: Any) -> list[tuple[Any, Any]]:
    if type(axes) not in (tuple, list) or not all(type(one) is Inert for one in axes):
        raise Unplaced("has a mesh whose axes are not known")
    return [(one.attribute("shape"), one.attribute("stride")) for one in axes]


def _listed(value: Any) -> list[int]:
    if type(value) is int:
        return [value]
    if type(value) in (tuple, list) and all(type(one) is int for one in value):
        return list(value)
    raise Unplaced(f"has a mesh of {short.repr(value)}")


def _of_sharded_tensor(tensor: Sharded) -> list[Local]:
    shards = tensor.state[0] if type(tensor.state) is tuple and tensor.state else None
    if type(shards) is not list:
        raise Unplaced("does not say which parts it has")
    parts: list[Local] = []
    for shard in shards:
        local = shard.attribute("tensor") if type(shard) is Inert else None
        metadata = shard.attribute("metadata") if type(shard) is Inert else None
        offsets: Any = metadata.attribute("shard_offsets") if type(metadata) is Inert else None
        if type(local) is not Tensor or type(offsets) not in (list, tuple) or not all(type(one) is int and one >= 0 for one in offsets):
            raise Unplaced(f"has a part that does not say where it belongs: {short.repr(shard)}")
        parts.append((tuple(offsets), local))
    return parts
