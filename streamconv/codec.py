"""Typed values as JSON text and back: what is read has the types that it is declared with, or is refused in one line."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec

from streamconv.errors import FormatError

T = TypeVar("T")
_NO_UTF8 = b"\\udc"  # how JSON says a byte of a file name that is no UTF-8


def encode(value: Any) -> bytes:
    """``value`` as JSON: structs, tuples, dataclasses, and what JSON has."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:  # of a file name that is no UTF-8
        return json.dumps(msgspec.to_builtins(value), separators=(",", ":")).encode()


def decode(text: bytes | str, kind: type[T]) -> T:
    """The value of type ``kind`` that ``text`` says.

    Raises:
        FormatError: not JSON, or of other types; says where.
    """
    raw = text.encode() if isinstance(text, str) else text
    try:
        if _NO_UTF8 in raw:
            return msgspec.convert(json.loads(raw), kind)
        return msgspec.json.decode(raw, type=kind)
    except RecursionError:
        raise FormatError("nested too deeply") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise FormatError(_describe(error)) from error


def convert(value: Any, kind: type[T]) -> T:
    """``value``, of what JSON has, as one of type ``kind``.

    Raises:
        FormatError: it is of other types; says where.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.MsgspecError, ValueError) as error:
        raise FormatError(_describe(error)) from error


def _describe(error: Exception) -> str:
    return " ".join(str(error).split())[:300].replace("`", "")
