"""Lazy tensors: what torch code makes of them is what it makes of real ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.formats import Extent, Source
from streamconv.graph.arena import Arena
from streamconv.graph.evaluate import arena_bytes, evaluate
from streamconv.graph.moves import identity
from streamconv.library.lazy import LazyTensor


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, LazyTensor]:
    """A tensor, and the lazy one of a file that holds it."""
    count = int(np.prod(shape))
    real = torch.arange(seed, seed + count, dtype=torch.int32).reshape(shape)
    spec = TensorSpec(DTYPES["int32"], shape)
    return real, LazyTensor(Source(spec, (Extent(str(seed), 0, spec.nbytes),)))


def values(lazy: torch.Tensor) -> torch.Tensor:
    """What a lazy tensor stands for, read from files of the numbers that `pair` gave."""
    assert isinstance(lazy, LazyTensor)
    node = lazy.node

    def read(path: str, offset: int, view: memoryview) -> None:
        first = int(path) + offset // 4
        view[:] = np.arange(first, first + len(view) // 4, dtype=np.int32).tobytes()

    arena = Arena(arena_bytes(node, max(node.spec.nbytes, 1), scattered=True))
    out = np.zeros(max(node.spec.numel, 1), np.uint32)
    evaluate(node, identity(node.spec.numel), out, arena, read)
    return torch.from_numpy(out[: node.spec.numel].view(np.int32)).reshape(node.spec.shape)


def check(function, *shapes):
    """The function of lazy tensors of these shapes stands for that of real ones."""
    pairs = [pair(*shape, seed=1000 * k) for k, shape in enumerate(shapes)]
    wanted, found = (function(*side) for side in zip(*pairs, strict=True))
    several = isinstance(wanted, (tuple, list))
    for want, got in zip(wanted if several else [wanted], found if several else [found], strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert torch.equal(values(got), want)


FUNCTIONS = {
    "reshape": (lambda t: t.reshape(3, 2, -1), (6, 4)),
    "view": (lambda t: t.view(4, 6), (6, 4)),
    "flatten": (lambda t: t.flatten(1), (2, 3, 4)),
    "unflatten": (lambda t: t.unflatten(0, (2, 3)), (6, 4)),
    "permute": (lambda t: t.permute(2, 0, -2), (2, 3, 4)),
    "transpose": (lambda t: t.transpose(-1, 0).contiguous(), (2, 3, 4)),
    "t": (lambda t: t.T, (3, 4)),
    "swapaxes": (lambda t: t.swapaxes(0, 1).reshape(-1), (3, 4)),
    "select": (lambda t: t[1], (3, 4)),
    "negative select": (lambda t: t.select(-1, -1), (3, 4)),
    "slice": (lambda t: t[:, 1:3], (3, 4)),
    "first": (lambda t: t[:2], (3, 4)),
    "last": (lambda t: t[-1:], (3, 4)),
    "narrow": (lambda t: t.narrow(1, 1, 2), (3, 4)),
    "squeeze": (lambda t: t.squeeze(), (1, 3, 1)),
    "squeeze one": (lambda t: t.squeeze(0), (1, 3, 1)),
    "unsqueeze": (lambda t: t.unsqueeze(-1), (3, 4)),
    "detach": (lambda t: t.detach().clone(), (3, 4)),
    "interleave": (lambda t: t.reshape(2, 3, 4).transpose(0, 1).reshape(6, 4), (6, 4)),
    "rope": (lambda t: t.view(2, 2, 3, 4).transpose(1, 2).reshape(12, 4), (12, 4)),
    "chunk": (lambda t: t.chunk(3, dim=1), (3, 8)),
    "split": (lambda t: t.split([5, 1, 2], dim=-1), (3, 8)),
    "split evenly": (lambda t: t.split(3), (8, 2)),
    "unbind": (lambda t: t.unbind(1), (2, 3, 4)),
    "iterate": (list, (3, 2)),
    "convolution to linear": (lambda t: t.reshape(t.shape[0], -1), (4, 3, 2, 2, 2)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_one_tensor(name):
    check(*FUNCTIONS[name])


def test_functions_of_several_tensors():
    check(lambda a, b: torch.cat([a, b]), (2, 4), (3, 4))
    check(lambda a, b: torch.cat([a, b], dim=-1), (2, 4), (2, 1))
    check(lambda a, b, c: torch.stack([a, b, c], dim=1), (2, 4), (2, 4), (2, 4))
    check(lambda a, b: torch.stack([a, b], dim=-1).flatten(), (2, 4), (2, 4))
    check(lambda a: torch.cat([a]), (2, 4))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sequence_of_steps_is_what_torch_makes(data):
    """Rearrangements of rearrangements."""
    real, lazy = pair(*data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    for _ in range(data.draw(st.integers(1, 5))):
        step = data.draw(st.sampled_from(["permute", "fold", "unfold", "slice", "double", "part"]))
        axis = data.draw(st.integers(0, real.dim() - 1))
        if step == "permute":
            order = data.draw(st.permutations(range(real.dim())))
            real, lazy = real.permute(order), lazy.permute(order)
        elif step == "fold":
            real, lazy = real.flatten(axis), lazy.flatten(axis)
        elif step == "unfold" and real.shape[axis] % 2 == 0:
            real, lazy = (side.unflatten(axis, (2, -1)) for side in (real, lazy))
        elif step == "slice":
            start = data.draw(st.integers(0, real.shape[axis] - 1))
            real, lazy = (side.narrow(axis, start, real.shape[axis] - start) for side in (real, lazy))
        elif step == "double":
            real, lazy = (torch.cat([side, side], dim=axis) for side in (real, lazy))
        elif step == "part" and real.dim() > 1:
            index = data.draw(st.integers(0, real.shape[axis] - 1))
            real, lazy = real.select(axis, index), lazy.select(axis, index)
    assert torch.equal(values(lazy), real)


@pytest.mark.parametrize(
    "function", [lambda t: t + t, lambda t: t * 2, lambda t: t.float() @ t.float(), lambda t: t.sum(), lambda t: t.zero_()]
)
def test_what_computes_values_is_refused_by_name(function):
    _, lazy = pair(2, 2)
    with pytest.raises(CoverageError, match=r"aten\.\w+.* cannot be|cannot cast"):
        function(lazy)


def test_a_slice_with_a_step_is_refused():
    _, lazy = pair(6)
    with pytest.raises(CoverageError, match="a slice with a step"):
        lazy[::2]


def test_shapes_that_do_not_fit_are_refused():
    _, lazy = pair(6)
    with pytest.raises((CoverageError, RuntimeError)):
        lazy.reshape(4, 2)
