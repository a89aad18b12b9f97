"""Steps that are functions of arrays, for recipes in Python."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from streamconv.dtypes import parse_dtype
from streamconv.errors import RecipeError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops.functions import Definition, Function, Shape, TiledFunction, define
from streamconv.recipe.steps import Lookup, replaceable_step

F = TypeVar("F", bound=Callable[..., Any])
KINDS = (int, float, bool, str)


def step(
    name: str,
    *,
    tiled: bool = False,
    dtype: object = None,
    shape: Shape | None = None,
    scratch: float = 0.0,
    framework: str = "numpy",
) -> Callable[[F], F]:
    """Makes a function of arrays an ``op`` that recipes in this process may have, by its name.

    The function takes the arrays of a rule's left tensors, in order, and gives one; what a recipe gives it beside, in the rule's ``op``,
    are its keyword arguments, each declared as int, float, bool or str. It must make the same values of the same ones, must not write to
    what it is given, and several threads may call it at the same time. Plans name it, and run only where its file has been run, too.

    Args:
        name: of the op.
        tiled: it is called for pieces, with any elements of tensors of one shape, in arrays of any shape; so memory does not depend on a
            tensor's size. Else it is called once, with whole tensors.
        dtype: of what it makes; unless given, that of its first tensor.
        shape: what gives the shape of what it makes, of the shapes of its tensors and its keyword arguments; unless given, that of its
            first tensor. Not for a tiled one.
        scratch: bytes that it takes beside its tensors and its result, for each byte of the result: 1.0 for a temporary array as large.
        framework: whose arrays it takes and gives: ``numpy``, with ml_dtypes' types, or ``torch``.

    Raises:
        RecipeError: what is declared does not go together.

    >>> @streamconv.step("halve", tiled=True)
    ... def halve(weight, *, by: float):
    ...     return (weight / by).astype(weight.dtype)
    >>> recipe = streamconv.Recipe("half", "halves", (streamconv.Rule("w", "w", op={"op": "halve", "by": 2.0}),
    ...     streamconv.Rule("layers.{i}.b", "layers.{i}.b")))
    >>> dict(streamconv.stream("model", recipe=recipe, framework="numpy", max_memory="4GB"))["w"].tolist()
    [[0.0, 0.5, 1.0], [1.5, 2.0, 2.5]]
    """
    if tiled and shape is not None:
        raise RecipeError(f"step {name}: a tiled one makes what has the shape of its tensors: leave out shape")
    if framework not in ("numpy", "torch") or scratch < 0:
        raise RecipeError(f"step {name}: expected framework numpy or torch, and scratch from 0 on, found {framework!r} and {scratch}")

    def declare(function: F) -> F:
        options = {key: one for key, one in inspect.signature(function, eval_str=True).parameters.items() if one.kind is one.KEYWORD_ONLY}
        for key, option in options.items():
            if option.annotation not in KINDS:
                raise RecipeError(f"step {name}: {key} must be declared as int, float, bool or str")
        own = Definition(name, function, tiled, parse_dtype(dtype).name if dtype else None, shape, scratch, framework)
        kind = TiledFunction if tiled else Function

        def take(nodes: Sequence[AnyNode], _entries: Lookup, **given: Any) -> AnyNode:
            define(own)
            return apply(kind(name, own.digest, json.dumps(given, sort_keys=True)), *nodes)

        take.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter("nodes", inspect.Parameter.POSITIONAL_ONLY), *options.values()]
        )
        replaceable_step(name, take)
        define(own)
        return function

    return declare
