"""Small expressions over config values and options: ``text_config.head_dim or hidden_size // num_attention_heads``.

Names are looked up, never executed; what is missing is None, and arithmetic with None is None. There are comparisons,
``and``, ``or``, ``not``, ``in``, ``x if c else y``, ``+ - * //``, ``/`` that must come out even, and functions that the caller gives.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from streamconv.errors import NotationError

Scope = Mapping[str, Any]


def _divide(left: int, right: int) -> int:
    if left % right:
        raise ValueError(f"{left} cannot be divided by {right}")
    return left // right


_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: _divide,
}
_COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: b is not None and a in b,
    ast.NotIn: lambda a, b: b is None or a not in b,
}
_LARGEST = 2**63
_LONGEST = 4096  # characters of an expression
_SYNTAX = (  # what expressions consist of, beside the operators above
    ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.List, ast.Tuple, ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.Compare, ast.IfExp,
    ast.Call, ast.boolop, ast.Not, ast.USub, ast.expr_context,
)  # fmt: skip


@lru_cache(maxsize=1024)
def _parse(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise NotationError(f"an expression of {len(text)} characters, {_LONGEST} at most", text, _LONGEST)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python has to say of "1and 2"
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotationError("not an expression", text, max(0, (getattr(error, "offset", 0) or 1) - 1)) from error
    for node in ast.walk(tree):
        if not isinstance(node, _SYNTAX) and type(node) not in {**_ARITHMETIC, **_COMPARISONS}:
            raise NotationError(f"{type(node).__name__} is not part of an expression", text, getattr(node, "col_offset", 0))
    return tree


def check(text: str) -> None:
    """Raises NotationError unless ``text`` is an expression."""
    _parse(text)


def constant(text: str) -> Any:
    """The value of an expression that takes nothing from outside; None of one that does.

    Raises:
        NotationError: not an expression, or values that do not go together.
    """
    if any(isinstance(node, ast.Name) for node in ast.walk(_parse(text))):
        return None
    return evaluate(text, {})


def find_names(text: str) -> list[str]:
    """The names whose own values an expression takes, not those of what has members or is called."""
    tree = _parse(text)
    others = [node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Subscript)]
    others += [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in others]


def evaluate(text: str, scope: Scope) -> Any:
    """The value of ``text`` in ``scope``.

    Raises:
        NotationError: not an expression, or values that do not go together.
    """
    try:
        return _value(_parse(text), scope)
    except (TypeError, ValueError, ZeroDivisionError, RecursionError) as error:
        raise NotationError(f"cannot be evaluated ({error})", text, 0) from error


def _value(node: ast.expr, scope: Scope) -> Any:  # noqa: C901, PLR0912 - one branch for each kind of node
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return scope.get(node.id)
        case ast.Attribute():
            return _member(_value(node.value, scope), node.attr)
        case ast.Subscript():
            return _member(_value(node.value, scope), _value(node.slice, scope))
        case ast.List() | ast.Tuple():
            return [_value(item, scope) for item in node.elts]
        case ast.BinOp():
            left, right = _value(node.left, scope), _value(node.right, scope)
            if left is None or right is None:
                return None
            if not all(isinstance(side, int) and abs(side) < _LARGEST for side in (left, right)):
                raise ValueError("arithmetic is for whole numbers below 2**63")
            return _ARITHMETIC[type(node.op)](left, right)
        case ast.BoolOp():
            return _first(node.values, scope, stop=isinstance(node.op, ast.Or))
        case ast.UnaryOp(op=ast.Not()):
            return not _value(node.operand, scope)
        case ast.UnaryOp():
            operand = _value(node.operand, scope)
            return None if operand is None else -operand
        case ast.Compare():
            values = [_value(item, scope) for item in (node.left, *node.comparators)]
            return all(_COMPARISONS[type(op)](a, b) for op, a, b in zip(node.ops, values, values[1:], strict=False))
        case ast.IfExp():
            return _value(node.body if _value(node.test, scope) else node.orelse, scope)
        case ast.Call(func=ast.Name(id=called), keywords=[]) if callable(function := scope.get(called)):
            return function(*(_value(argument, scope) for argument in node.args))
    raise ValueError(f"{ast.unparse(node)} has no value here")


def _first(items: list[ast.expr], scope: Scope, *, stop: bool) -> Any:
    """The first value that is as true as ``stop``, else the last."""
    value: Any = None
    for item in items:
        value = _value(item, scope)
        if bool(value) is stop:
            break
    return value


def _member(value: Any, key: Any) -> Any:
    if isinstance(value, Mapping):
        return value.get(key)
    if isinstance(value, list) and isinstance(key, int) and -len(value) <= key < len(value):
        return value[key]
    return None
