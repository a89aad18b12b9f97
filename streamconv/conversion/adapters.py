"""``--adapter``: what PEFT has trained beside weights is merged into them, before a recipe or a cast sees them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePath

from streamconv.adapters.folder import Adapter
from streamconv.adapters.merging import merge
from streamconv.adapters.weights import Weights
from streamconv.checkpoint.opening import Checkpoint
from streamconv.conversion.altered import Altered
from streamconv.conversion.casting import Casting
from streamconv.conversion.options import Options
from streamconv.dtypes import TensorSpec
from streamconv.errors import UsageError
from streamconv.formats.catalog import locate
from streamconv.recipe import Recast

OPTION = "--adapter"


def adapt(options: Options, checkpoint: Checkpoint, casting: Casting, *, is_renamed: bool) -> Altered | None:
    """A checkpoint with the adapters that are asked for, in order; None: with none.

    Raises:
        UsageError: no adapter, or one of a kind that is not merged here.
        CoverageError: a tensor of it that fits none of the checkpoint.
    """

    def dtype_of(name: str, spec: TensorSpec) -> str | None:
        is_own = not is_renamed and name in checkpoint
        return casting(name, spec) if is_own or not casting.keeps_some else None

    texts = list(options.adapter)
    return merge_adapters(checkpoint, texts, dtype_of) if texts else None


def note_uncounted(options: Options) -> list[str]:
    """A note where what adapters change is quantized afterwards: codes are not compared with the base."""
    is_uncounted = options.adapter and options.quantize
    return ["how many weights the adapters change is not counted: they are quantized afterwards"] if is_uncounted else []


def merge_adapters(checkpoint: Checkpoint, texts: Iterable[str], dtype_of: Recast) -> Altered:
    """A checkpoint with adapters, each a folder, perhaps with @WEIGHT, in order. Raises as `adapt` does."""
    if list(checkpoint.components) != [""]:
        raise UsageError(f"{OPTION}: {checkpoint.path} consists of components, and an adapter is of one model: give that as SRC")
    weights = Weights(checkpoint.contents.entries, checkpoint.config, dtype_of)
    notes = []
    for text in texts:
        path, weight = _split(os.fspath(text))  # a URL stays what it is
        adapter = Adapter(path, weight, checkpoint.config, f"{OPTION} {locate(path)}")
        notes.append(merge(adapter, weights) + _base_of(adapter, checkpoint))
    contents = replace(checkpoint.contents, entries=weights.entries)
    return Altered(checkpoint.with_contents(contents), weights.changed, notes, weights.config_changes, weights.former)


def _base_of(adapter: Adapter, checkpoint: Checkpoint) -> str:
    """What an adapter was trained beside, where that is called otherwise than the checkpoint."""
    name = adapter.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return ""
    own = (checkpoint.path, str(checkpoint.config.get("_name_or_path")))
    ends = (PurePath(name).name, f"models--{name.replace('/', '--')}")
    return "" if any(end in PurePath(path).parts for path in own for end in ends) else f"; it was trained beside {name}"


def _split(text: str) -> tuple[str, float | None]:
    """An adapter's folder, and what its scale is multiplied with, if anything is said."""
    folder, at, weight = text.rpartition("@")
    if at and re.fullmatch(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", weight):
        return type(text)(folder), float(weight)  # a URL whose query is known stays one
    return text, None
