"""The files beside the weights: which are copied, and which are made because the conversion changes what they say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from streamconv.checkpoint.components import find_components, find_pointers, look_beside, shorten
from streamconv.checkpoint.opening import CONFIG, Checkpoint, read_config
from streamconv.conversion.altered import with_keys
from streamconv.conversion.dequantizing import PARAMS, Dequantization
from streamconv.conversion.quantizing import Quantization
from streamconv.dtypes import CASTABLE, parse_dtype
from streamconv.errors import RecipeError, UsageError
from streamconv.formats.unrelated import is_known
from streamconv.recipe import Conversion, Model, Recipe, Writer
from streamconv.recipes import find_writer
from streamconv.schemes.configs import DTYPES
from streamconv.schemes.configs import KEYS as QUANTIZATION
from streamconv.schemes.detection import find_quantization
from streamconv.storage.folder import Folder
from streamconv.units import format_size

LARGE = 10_000_000  # bytes: above, a file that is not known to belong beside weights is worth a word

Sidecars = dict[str, str | bytes]
"""Relative path -> the file to copy, or the bytes to write."""


def make_sidecars(
    checkpoint: Checkpoint,
    beside: Folder | None,
    recipe: Recipe | None,
    conversion: Conversion,
    dtype: str | None,
    quantizations: tuple[Dequantization | None, Quantization | None] = (None, None),
    *,
    is_elsewhere: bool = False,
) -> tuple[Sidecars, list[str]]:
    """The files beside the target's weights, and notes about them.

    Args:
        checkpoint: the source, whose files they are ...
        beside: ... unless this folder is given.
        recipe: may make files of its own, or None.
        conversion: what it made.
        dtype: what its floating tensors have become; None: what they were.
        quantizations: what was made of a quantized source, and what weights are quantized by.
        is_elsewhere: the folder is not the source's own: its config may be that of a model of another dtype.
    """
    dequantization, quantization = quantizations
    root = beside or checkpoint.folder
    listing = checkpoint.beside if beside is None else look_beside(beside, components=find_components(beside))
    sidecars: Sidecars = {name: root.address(name) for name in listing.files if not (dequantization and dequantization.is_left(name))}
    config = read_config(root) if beside or checkpoint.location.is_folder else {}
    dtype_notes: list[str] = []
    if is_elsewhere and dtype is None and quantizations == (None, None) and list(checkpoint.components) == [""]:
        dtype = _find_dtype(config, conversion)
        dtype_notes = [f"{CONFIG} says dtype {dtype}, as the tensors have it, and not what the one of {root.url} says"] if dtype else []
    contents_of: dict[str, Any] = {}
    notes = [*([listing.note] if listing.note and beside is None else []), *dtype_notes, *_examine(root, listing.files)]
    if recipe:
        if recipe.source.config != recipe.target.config and not beside:
            sidecars.pop(recipe.source.config, None)
        if recipe.target.writes:
            others = tuple(f"{folder}/" for folder in checkpoint.components if folder)
            sources = {name: source.spec for name, source in checkpoint.components[""].entries.items()}
            targets = {name: node.spec for name, node in conversion.outputs.items() if not name.startswith(others)}
            side = read_config(beside, recipe.target.config) if beside else {}

            def read(name: str) -> dict[str, Any]:
                return read_config(root, name) if name in sidecars else {}

            model = Model(checkpoint.config, side, conversion.options, sources, targets, read, notes)
            contents_of = _write(recipe.target.writes, model)
            if not contents_of and recipe.target.config not in sidecars:
                notes.append(f"{recipe.target.config} is not written: it takes {recipe.source.config} beside SRC, or --sidecars-from")
        elif recipe.source.writes and not beside and config:
            notes.append(f"{CONFIG} is the source's own: give --sidecars-from a folder of the target model for one that its code reads")
        if missing := [name for name in recipe.target.expects if name not in sidecars]:
            notes.append(f"{', '.join(missing)}: not beside {root.url}; --sidecars-from a folder of the target model brings it along")
    revise = dequantization.revise if dequantization else _keep
    if CONFIG in sidecars or CONFIG in contents_of:
        before = contents_of.get(CONFIG, config)
        after = _change(revise(CONFIG, before), dtype, conversion.config)
        after = with_keys(quantization.revise(CONFIG, after) if quantization else after, conversion.keys)
        if CONFIG in contents_of or after != before:
            contents_of[CONFIG] = after
    configs = [*(f"{folder}/{CONFIG}" for folder in checkpoint.components if folder), *([PARAMS] if dequantization else [])]
    contents_of.update(_changed(root, [name for name in configs if name in sidecars], revise, dtype))
    if quantization and CONFIG not in {*sidecars, *contents_of}:
        raise UsageError(f"--quantize: there is no {CONFIG} beside SRC, without which no library knows: --sidecars-from brings one")
    for name, contents in contents_of.items():
        if name not in sidecars or contents != (config if name == CONFIG else None):
            sidecars[name] = (json.dumps(contents, indent=2, ensure_ascii=False) + "\n").encode()
    return sidecars, notes


def _find_dtype(config: Mapping[str, Any], conversion: Conversion) -> str | None:
    """The dtype that most of a target's numbers have, where a config says one that none of them has; else None."""
    stated = _stated_dtype(config)
    specs = {name: node.spec for name, node in conversion.outputs.items()}
    sizes: Counter[str] = Counter()
    for spec in specs.values():
        sizes[spec.dtype.name] += spec.nbytes
    numbers = [name for name, _ in sizes.most_common() if name in CASTABLE]
    if not stated or not numbers or stated in numbers or find_quantization(config, {}, specs):
        return None
    return numbers[0]


def _stated_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a config says of its model; "": none, or none that is known."""
    text = next((config[key] for key in DTYPES if isinstance(config.get(key), str)), "")
    with suppress(UsageError):
        return parse_dtype(text).name
    return ""


def _keep(_name: str, before: Mapping[str, Any]) -> Mapping[str, Any]:
    return before


def _changed(
    root: Folder, names: Iterable[str], revise: Callable[[str, Mapping[str, Any]], Mapping[str, Any]], dtype: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those of these configs that say something else afterwards."""
    for name in names:
        own = read_config(root, name)
        if (changed := _change(revise(name, own), dtype, {})) != own:
            yield name, changed


def _examine(root: Folder, names: Iterable[str]) -> Iterator[str]:
    """Notes about files that go along: large ones that nobody expects, and those that stand for others."""
    if pointers := find_pointers(root, names):
        yield f"{shorten(pointers)}: Git LFS pointers, not the files that they stand for: fetch those with git lfs pull, then convert again"
    sizes = {name: root.size(name) for name in names if not is_known(PurePosixPath(name).name)}
    if large := [f"{name} ({format_size(size)})" for name, size in sizes.items() if size > LARGE]:
        yield f"copied as they are, though nothing says what they are: {shorten(large)}"


def _write(writes: Writer | str, model: Model) -> dict[str, Any]:
    """What a recipe's function makes. Raises RecipeError where it is for models of another kind."""
    try:
        return find_writer(writes)(model)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        name = writes if isinstance(writes, str) else getattr(writes, "__qualname__", repr(writes))
        raise RecipeError(f"writes {name!r} does not fit this model ({type(error).__name__}: {error}): leave it out") from error


def _change(config: Mapping[str, Any], dtype: str | None, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """A config with every ``dtype`` / ``torch_dtype`` in it, nested ones too, set to ``dtype``, and sizes that changed.

    What belongs to a quantization says things of its own, in the same words.
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key in QUANTIZATION:
            result[key] = value
        elif isinstance(value, dict):
            result[key] = _change(value, dtype, sizes)
        elif dtype and key in DTYPES and (value is None or isinstance(value, str)):
            result[key] = dtype
        else:
            result[key] = sizes[key][1] if key in sizes and value == sizes[key][0] else value
    return result
