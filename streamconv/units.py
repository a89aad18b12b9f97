"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from streamconv.errors import UsageError

LARGEST = 10**18  # bytes: more than any disk or memory has
_DECIMAL = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS = _DECIMAL | _BINARY | {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str | int) -> int:
    """Bytes of ``5GB`` (decimal, as on the Hub), ``4GiB`` (binary), ``1.5GB``, ``1000``.

    Raises:
        UsageError: not a positive size.
    """
    if isinstance(text, int):
        size = text
    else:
        match = re.fullmatch(r"\s*([0-9]{1,19}(?:\.[0-9]{1,19})?)\s*([A-Za-z]*)\s*", text)
        if not match or match[2].upper() not in _UNITS:
            raise UsageError(f"not a size: {text[:100]!r}; write a number with a unit, such as 500MB, 5GB or 4GiB")
        number, unit = match[1], _UNITS[match[2].upper()]
        size = round(float(number) * unit) if "." in number else int(number) * unit
    if not 0 < size < LARGEST:
        raise UsageError(f"not a size: {str(text)[:100]!r}; it must be at least one byte, and below {format_size(LARGEST)}")
    return size


def format_size(nbytes: int | float) -> str:
    """``nbytes`` with three significant digits and a decimal unit: ``13.4 GB``."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{int(size)} B" if unit == "B" else f"{size:.3g} {unit}" if size < 99.95 else f"{size:.0f} {unit}"
