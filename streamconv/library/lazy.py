"""Tensors without data that remember how they are made: torch code that only rearranges runs on them and leaves a graph behind.

A `LazyTensor` stands for a node. Views, transposes, concatenations and their like become layout ops, whoever calls them; anything that
computes values is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import Cast, Rearrange, Reshape

aten = torch.ops.aten


class ComputesValuesError(CoverageError):
    """Code does more to lazy tensors than rearrange them."""


class LazyTensor(torch.Tensor):
    """A tensor whose values are those of ``node``."""

    node: AnyNode

    @staticmethod
    def __new__(cls, node: AnyNode) -> LazyTensor:
        dtype = getattr(torch, node.spec.dtype.name)
        wrapper: LazyTensor = torch.Tensor._make_wrapper_subclass(cls, node.spec.shape, dtype=dtype, device=torch.device("cpu"))
        wrapper.node = node
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None) -> Any:  # type: ignore[override]
        handler = _HANDLERS.get(func)
        if handler is None:
            raise ComputesValuesError(f"{func} computes values: it cannot be streamed as a rearrangement")
        return handler(*args, **(kwargs or {}))


def _layout(layout: str, sizes: dict[str, int], stacks: Sequence[int], output: int = 0, leading: int = 0, part: int = 0) -> Rearrange:
    return _rearrange(layout, tuple(sizes.items()), tuple(stacks), output, leading, part)


@lru_cache(maxsize=65536)
def _rearrange(layout: str, sizes: tuple[tuple[str, int], ...], stacks: tuple[int, ...], output: int, leading: int, part: int) -> Rearrange:
    """One op for all tensors that are rearranged alike."""
    return Rearrange(layout, {"1": 1, **dict(sizes)}, stacks, output, leading, part)


def _axes(count: int) -> list[str]:
    return [f"d{k}" for k in range(count)]


def _sizes(shape: Iterable[int]) -> dict[str, int]:
    return {f"d{k}": size for k, size in enumerate(shape)}


def _reshape(tensor: LazyTensor, shape: Sequence[int], *_: Any, **__: Any) -> LazyTensor:
    shape = list(shape)
    if -1 in shape:
        shape[shape.index(-1)] = tensor.numel() // max(1, -math.prod(shape))
    return LazyTensor(tensor.node if tuple(shape) == tensor.shape else apply(Reshape(tuple(shape)), tensor.node))


def _permute(tensor: LazyTensor, order: Sequence[int]) -> LazyTensor:
    axes = _axes(tensor.dim())
    order = [k % tensor.dim() for k in order]
    if order == list(range(tensor.dim())):
        return LazyTensor(tensor.node)
    layout = f"{' '.join(axes)} -> {' '.join(axes[k] for k in order)}"
    return LazyTensor(apply(_layout(layout, _sizes(tensor.shape), (1,)), tensor.node))


def _transpose(tensor: LazyTensor, first: int = 0, second: int = 1) -> LazyTensor:
    order = list(range(tensor.dim()))
    first, second = first % tensor.dim(), second % tensor.dim()
    order[first], order[second] = second, first
    return _permute(tensor, order)


def _cat(tensors: Sequence[LazyTensor], dim: int = 0) -> LazyTensor:
    if len(tensors) == 1:
        return LazyTensor(tensors[0].node)
    dim %= tensors[0].dim()
    parts = [f"x{k}" for k in range(len(tensors))]
    axes = _axes(tensors[0].dim())
    inputs = ", ".join(" ".join([*axes[:dim], part, *axes[dim + 1 :]]) for part in parts)
    output = " ".join([*axes[:dim], f"({' + '.join(parts)})", *axes[dim + 1 :]])
    sizes = {axis: n for axis, n in _sizes(tensors[0].shape).items() if axis != axes[dim]}
    sizes |= {part: tensor.shape[dim] for part, tensor in zip(parts, tensors, strict=True)}
    return LazyTensor(apply(_layout(f"{inputs} -> {output}", sizes, (1,) * len(tensors)), *(tensor.node for tensor in tensors)))


def _stack(tensors: Sequence[LazyTensor], dim: int = 0) -> LazyTensor:
    axes = _axes(tensors[0].dim())
    dim %= len(axes) + 1
    layout = f"{' '.join(['n', *axes])} -> {' '.join([*axes[:dim], 'n', *axes[dim:]])}"
    sizes = {"n": len(tensors), **_sizes(tensors[0].shape)}
    return LazyTensor(apply(_layout(layout, sizes, (len(tensors),)), *(tensor.node for tensor in tensors)))


def _pieces(tensor: LazyTensor, sizes: Sequence[int], dim: int = 0) -> list[LazyTensor]:
    """The parts of these sizes, one after the other along an axis."""
    dim %= tensor.dim()
    if len(sizes) == 1:
        return [LazyTensor(tensor.node)]
    parts = [f"x{k}" for k in range(len(sizes))]
    axes = _axes(tensor.dim())
    whole = " ".join([*axes[:dim], f"({' + '.join(parts)})", *axes[dim + 1 :]])
    pieces = [" ".join([*axes[:dim], part, *axes[dim + 1 :]]) for part in parts]
    other_sizes = {axis: n for axis, n in _sizes(tensor.shape).items() if axis != axes[dim]}
    axis_sizes = {**other_sizes, **dict(zip(parts, sizes, strict=True))}
    ops = [_layout(f"{whole} -> {', '.join(pieces)}", axis_sizes, (1,), output) for output in range(len(parts))]
    return [LazyTensor(apply(op, tensor.node)) for op in ops]


def _split(tensor: LazyTensor, size: int, dim: int = 0) -> list[LazyTensor]:
    count = tensor.shape[dim]
    return _pieces(tensor, [min(size, count - start) for start in range(0, count, size)], dim)


def _slice(tensor: LazyTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> LazyTensor:
    first, last, step = slice(start, end, step).indices(tensor.shape[dim])
    if step != 1:
        raise CoverageError("a slice with a step cannot be streamed as a rearrangement")
    sizes = [first, max(0, last - first), tensor.shape[dim] - max(first, last)]
    nonempty = [k for k, size in enumerate(sizes) if size]
    return _pieces(tensor, [sizes[k] for k in nonempty], dim)[nonempty.index(1)]


def _select(tensor: LazyTensor, dim: int = 0, index: int = 0) -> LazyTensor:
    axes, dim = _axes(tensor.dim()), dim % tensor.dim()
    layout = f"{' '.join(axes)} -> {' '.join([axes[dim], *axes[:dim], *axes[dim + 1 :]])}"
    op = _layout(layout, _sizes(tensor.shape), (1,), leading=1, part=index % tensor.shape[dim])
    return LazyTensor(apply(op, tensor.node))


def _unbind(tensor: LazyTensor, dim: int = 0) -> list[LazyTensor]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _squeeze(tensor: LazyTensor, dim: int | Sequence[int] | None = None) -> LazyTensor:
    dims = [dim] if isinstance(dim, int) else dim
    axes = {k % tensor.dim() for k in (range(tensor.dim()) if dims is None else dims) if tensor.shape[k] == 1}
    return _reshape(tensor, [size for k, size in enumerate(tensor.shape) if k not in axes])


def _unsqueeze(tensor: LazyTensor, dim: int) -> LazyTensor:
    shape = list(tensor.shape)
    shape.insert(dim % (len(shape) + 1), 1)
    return _reshape(tensor, shape)


def _same(tensor: LazyTensor, *_: Any, **__: Any) -> LazyTensor:
    return tensor if not isinstance(tensor, LazyTensor) else LazyTensor(tensor.node)


def _to_copy(tensor: LazyTensor, dtype: torch.dtype | None = None, **_: Any) -> LazyTensor:
    if dtype is None or dtype == tensor.dtype:
        return LazyTensor(tensor.node)
    return LazyTensor(apply(Cast(str(dtype).removeprefix("torch.")), tensor.node))


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._reshape_alias.default: _reshape,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _pieces,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.unsqueeze.default: _unsqueeze,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten._to_copy.default: _to_copy,
}


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that torch code makes, none of which it is taken to give back."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.nbytes += tensor.nbytes
        return output


def without_data(spec: TensorSpec) -> torch.Tensor:
    """A tensor of that dtype and shape that torch code can run on, to see what comes of it."""
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype.name), device="meta")


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Dtype and shape of any tensor."""
    return TensorSpec(DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
