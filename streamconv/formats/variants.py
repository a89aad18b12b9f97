"""Variants of a model's weights, as transformers and diffusers call their files: ``model.fp16.safetensors``.

Shards are ``model.fp16-00001-of-00002.safetensors`` with the index ``model.safetensors.index.fp16.json``; diffusers once wrote
``model-00001-of-00002.fp16.safetensors``, with ``model.safetensors.fp16.index.json``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from streamconv.errors import UsageError
from streamconv.formats.container import Names
from streamconv.formats.registry import stems_of

_NAME = r"[A-Za-z][A-Za-z0-9_]*"
_LIBRARIES = ("transformers", "diffusers", "peft", "open_clip")  # which read variants


def check_variant(name: str) -> None:
    """Raises UsageError unless a variant can be called so."""
    if not re.fullmatch(_NAME, name):
        raise UsageError(f"--variant {name}: expected letters, digits and _ after a letter, as in model.fp16.safetensors")


def variant_of(name: str, kind: Names) -> str | None:
    """Of which variant a weight file or an index is, by its name."""
    match = _pattern(kind.suffixes, stems_of(_LIBRARIES)).fullmatch(name)
    return next(filter(None, match.groups())) if match else None


def of_variant(names: Iterable[str], kind: Names, variant: str | None) -> list[str]:
    """The files of that variant, or those of none."""
    return [name for name in names if variant_of(name, kind) == variant]


def without_variant(stem: str, kind: Names) -> str:
    """How the names of a model's files start, where those of a variant start with ``stem``."""
    variant = variant_of(stem + (kind.suffixes or ("",))[0], kind)
    return stem.removesuffix(f".{variant}") if variant else stem


def modern(name: str, kind: Names) -> str:
    """How a file is called today that diffusers once called otherwise."""
    variant = variant_of(name, kind)
    match = re.fullmatch(r"(.*)(-\d+-of-\d+)(\.[^.-]+)(\.[^.]+)", name) if variant else None
    return f"{match[1]}{match[3]}{match[2]}{match[4]}" if match else name


@cache
def _pattern(suffixes: tuple[str, ...], stems: tuple[str, ...]) -> re.Pattern[str]:
    stem, suffix, numbers = "|".join(map(re.escape, stems)), "|".join(map(re.escape, suffixes)) or "(?!)", r"-\d+-of-\d+"
    files = rf"(?:{stem})\.({_NAME})(?:{numbers})?(?:{suffix})|(?:{stem}){numbers}\.({_NAME})(?:{suffix})"
    indexes = rf"(?:{stem})(?:{suffix})\.index\.({_NAME})\.json|(?:{stem})(?:{suffix})\.({_NAME})\.index\.json"
    return re.compile(f"{files}|{indexes}")
