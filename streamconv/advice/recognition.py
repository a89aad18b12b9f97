"""What a checkpoint is, as far as that decides what can be made of it: from names, shapes and configs, before a tensor is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

from streamconv import recipes
from streamconv.advice.goals import SCHEMES
from streamconv.advice.matching import COUNTS, LIBRARY, RELATED, Match, rank_recipes, suggest_merging, suggest_recipes
from streamconv.checkpoint.opening import Checkpoint, find_checkpoint, open_checkpoint, read_config
from streamconv.dtypes import CASTABLE
from streamconv.errors import StreamconvError
from streamconv.formats.registry import containers
from streamconv.schemes.detection import Quantization, find_quantization
from streamconv.storage.folder import AnyPath, Folder
from streamconv.storage.locations import as_given

ADAPTER = "adapter_config.json"
_TO_HUB = "transformers-native2hub"
_STACK = re.compile(r"\.experts\.(?:gate_up_proj|down_proj)$")
MOST_TRIED = 20_000  # tensors
MARKS: Mapping[str, tuple[str, bool]] = {"mistral-original2hf": ("hidden_dim", True), "llama-meta2hf": ("hidden_dim", False)}
"""Recipes whose sources are told apart by a key of their config, and whether theirs have it."""
SHARED = frozenset({"gemma-hf2original"})
"""Recipes for names and shapes that other families have, too: only a config says that they are meant."""
OWN_NAMES: Mapping[str, tuple[str, ...]] = {
    "gguf": ("gguf2hf",),
    "torch_dist": ("gpt2hf",),
    "mindspore": ("ms2hf",),
    "sat": ("sat2hf",),
    "mindspore2": ("ms2hf",),
    "torch": ("meta2hf", "original2hf"),
}
"""Containers whose tensors may have names of their own -> what recipes for these are called behind their family."""


@dataclass(frozen=True)
class Fit:
    """A recipe that can be applied to a checkpoint.

    Attributes:
        name: the recipe's.
        related: the config says a model of its family, or says none.
        tried: shapes fit too; else names do, and it may want options, or a library.
        dequantized: it fits the numbers that codes stand for.
        missing: the package that it asks, if that is not there.
        ranks: the option that says how many ranks it makes; "": it has none.
    """

    name: str
    related: bool = True
    tried: bool = True
    dequantized: bool = False
    missing: str = ""
    ranks: str = ""


@dataclass(frozen=True)
class Recognition:
    """What a checkpoint is.

    Attributes:
        path: where it is, as the caller says it.
        format: its container; "" where its files are ranks that no container joins.
        model_type: what its config says; "": nothing.
        named: a config says model type and class, as transformers' do.
        dtypes: of its floating tensors that can be cast.
        quantization: by which method its weights are codes; "": they are none.
        decodable: these can be made numbers.
        remedy: what to do where they cannot.
        is_trained: a trainer left it.
        components: the folders that it consists of; none where it is one model, beside which others may be.
        adapter_of: the base that it is an adapter of; "": one that is not named; None: it is none.
        fits: recipes that can be applied.
        quantizable: ways of quantizing that take all of its weights.
        files: how many its tensors lie in.
    """

    path: str
    format: str = ""
    model_type: str = ""
    named: bool = False
    dtypes: frozenset[str] = frozenset()
    quantization: str = ""
    decodable: bool = False
    remedy: str = ""
    is_trained: bool = False
    components: tuple[str, ...] = ()
    adapter_of: str | None = None
    fits: tuple[Fit, ...] = ()
    quantizable: frozenset[str] = frozenset()
    files: int = 1


def recognize(
    path: AnyPath,
    wanted: Callable[[str], bool] = lambda _: True,
    *,
    beside: Folder | None = None,
    root: str | None = None,
    variant: str | None = None,
    thorough: bool = False,
    matches: Sequence[Match] | None = None,
) -> Recognition:
    """What a checkpoint is, and which recipes fit it.

    Args:
        path: where it is.
        wanted: whether a recipe of such a name is of interest; others are not loaded.
        beside: the folder that configs come from instead of its own.
        root: the key of the dict of tensors in a file that nests them.
        variant: which variant of the weights is read.
        thorough: whether ways of quantizing are tried, and codes made numbers: what is only said to be possible is possible then.
        matches: what `rank_recipes` says of it, if that is known.

    Raises:
        StreamconvError: it cannot be read.
    """
    from streamconv.conversion.dequantizing import with_config_of
    from streamconv.conversion.naming import name_as_model

    location, _ = find_checkpoint(path)
    rename = partial(name_as_model, prefix=None, beside=beside)
    try:
        checkpoint = with_config_of(rename(open_checkpoint(location, root=root, variant=variant)), beside)
    except StreamconvError:  # ranks may be a checkpoint to a recipe only
        fits = []
        with suppress(StreamconvError):  # of which none may have rules
            fits += _fits_of(rank_recipes(location) if matches is None else matches)
        merging = suggest_merging(location)
        missing = LIBRARY if find_spec(LIBRARY) is None else ""
        fits += [Fit(name, tried=False, missing=missing) for name in merging]
        if thorough and not missing:
            fits += _fits_of(rank_recipes(location, library=True, among=lambda name: name in merging))
        if not fits:
            raise
        own = read_config(location.folder) if location.is_folder else {}
        by_name = {fit.name: fit for fit in sorted(fits, key=lambda fit: fit.tried)}
        return Recognition(as_given(path, location), model_type=str(own.get("model_type") or ""), fits=tuple(by_name.values()))
    source = describe(checkpoint, as_given(path, location), beside)
    fits = _fits_of(rank_recipes(location, among=wanted, prepare=rename) if matches is None else matches, source.model_type)
    if source.decodable and not any(fit.tried for fit in fits):
        names = {fit.name for fit in fits}  # of those that may fit as it is
        numbers = _fits_of(_match_numbers(location, wanted, beside), source.model_type)
        fits += [replace(fit, dequantized=True) for fit in numbers if fit.name not in names]
    fits += _match_native(checkpoint) if thorough else []
    source = replace(source, fits=tuple(fits))
    return _try_numbers(source, checkpoint) if thorough else source


def recognize_names(checkpoint: Checkpoint, path: str) -> Recognition:
    """What an open checkpoint is, with the recipes of its config's family that have a rule for each of its names: no shape is looked at."""
    source = describe(checkpoint, path)
    source = _try_numbers(source, checkpoint, ()) if source.quantization else source
    if source.components:
        return source
    named = suggest_recipes(checkpoint.location, checkpoint) if source.model_type else []
    ways = () if named else OWN_NAMES.get(checkpoint.format, ())
    own = rank_recipes(checkpoint.location, among=lambda name: name.rpartition("-")[2] in ways)
    return replace(source, fits=(*map(Fit, named), *_fits_of(own, source.model_type)))


def describe(checkpoint: Checkpoint, path: str, beside: Folder | None = None) -> Recognition:
    """What an open checkpoint is, but for recipes.

    Args:
        checkpoint: it.
        path: what it is called.
        beside: the folder that its config comes from, if not its own, or the one in it that its container names.
    """
    own = beside or (checkpoint.folder.folder(checkpoint.contents.beside) if checkpoint.contents.beside else None)
    config = (read_config(own) if own else {}) or checkpoint.config
    quantization = _quantization_of(checkpoint)
    folders = () if "" in checkpoint.components else tuple(checkpoint.components)
    adapter = read_config(checkpoint.folder, ADAPTER) if checkpoint.location.is_folder else {}
    return Recognition(
        path,
        checkpoint.format,
        str(config.get("model_type") or ""),
        bool(config.get("model_type") and config.get("architectures")),
        frozenset(entry.spec.dtype.name for entry in checkpoint.contents.entries.values()).intersection(CASTABLE),
        quantization.method if quantization else "",
        quantization is not None and quantization.scheme is not None,
        quantization.remedy if quantization else "",
        containers()[checkpoint.format].is_trained,
        folders,
        str(adapter.get("base_model_name_or_path") or "") if adapter.get("peft_type") else None,
        files=len(checkpoint.contents.files),
    )


def _quantization_of(checkpoint: Checkpoint) -> Quantization | None:
    """How the first component that is quantized is."""
    from streamconv.conversion.dequantizing import config_of

    for folder, contents in checkpoint.components.items():
        specs = {name: node.spec for name, node in contents.entries.items()}
        quantization = find_quantization(config_of(checkpoint, folder), {}, specs)
        if quantization is not None:
            return quantization
    return None


def _fits_of(matches: Sequence[Match], model_type: str = "") -> list[Fit]:
    """The recipes that can be applied, those that were tried before others whose names fit.

    Args:
        matches: of a checkpoint.
        model_type: what a config says that comes from elsewhere.
    """
    fits = []
    for match in matches:
        if match.fits or match.needs or (match.tensors, match.rules) == (1, 1):
            option = next((key for key in COUNTS if key in match.recipe.settings), "")
            missing = match.needs if match.needs and find_spec(match.needs) is None else ""
            fits.append(Fit(match.recipe.name, _is_related(match, model_type), match.fits, missing=missing, ranks=option))
    return fits


def _is_related(match: Match, model_type: str) -> bool:
    """Whether a config says that its model is of a recipe's family, or nothing of it."""
    name, kind = match.recipe.name, str(match.config.get("model_type") or model_type)
    if kind:
        return recipes.is_named(name, {"model_type": kind}) or match.needs == LIBRARY or kind in RELATED.get(name.rpartition("-")[0], ())
    key, is_there = MARKS.get(name, ("", False))
    return name not in SHARED and (not match.config or (key in match.config) == is_there)


def _match_numbers(location: AnyPath, wanted: Callable[[str], bool], beside: Folder | None) -> list[Match]:
    """The recipes that fit the numbers that a checkpoint's codes stand for."""
    with suppress(StreamconvError):
        return rank_recipes(location, among=wanted, prepare=partial(_dequantized, beside=beside))
    return []


def _match_native(checkpoint: Checkpoint) -> list[Fit]:
    """The way to the layout on the Hub, where experts are in stacks as transformers keeps them, and that changes them."""
    entries = checkpoint.contents.entries
    if find_spec(LIBRARY) is None or not any(_STACK.search(name) for name in entries):
        return []
    with suppress(Exception):  # whatever keeps the library's code from it, it does not fit
        if recipes.get(_TO_HUB).apply(entries, checkpoint.config).outputs.keys() != entries.keys():
            return [Fit(_TO_HUB)]
    return []


def _dequantized(checkpoint: Checkpoint, beside: Folder | None = None) -> Checkpoint:
    from streamconv.conversion.casting import Casting
    from streamconv.conversion.dequantizing import dequantize, with_config_of

    return dequantize(with_config_of(checkpoint, beside), Casting(None, ()), renames=True).checkpoint


def _try_numbers(source: Recognition, checkpoint: Checkpoint, schemes: Sequence[str] = SCHEMES) -> Recognition:
    """What is known after codes have been made numbers, or numbers codes; of very many tensors neither is tried, and nothing known."""
    if len(checkpoint) > MOST_TRIED or not (source.quantization or source.named) or source.components:
        return replace(source, decodable=False)
    if not source.quantization:
        return replace(source, quantizable=frozenset(name for name in schemes if _takes(name, checkpoint)))
    try:
        _dequantized(checkpoint)
    except StreamconvError:
        return replace(source, decodable=False)
    return source


def _takes(scheme: str, checkpoint: Checkpoint) -> bool:
    """Whether a way of quantizing takes a checkpoint's weights."""
    from streamconv.conversion.quantizing import find_preset, quantize
    from streamconv.recipe import identity

    try:
        quantize(identity(checkpoint.components[""].entries), find_preset(scheme), (), checkpoint.config, ())
    except StreamconvError:
        return False
    return True
