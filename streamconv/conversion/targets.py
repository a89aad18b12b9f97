"""Which tensors a checkpoint becomes, and what each of them is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from streamconv.checkpoint.opening import Checkpoint, read_config
from streamconv.conversion.casting import Casting
from streamconv.graph.node import AnyNode
from streamconv.library.model import choose_kept
from streamconv.recipe import Conversion, Recipe, identity, read_identity_options
from streamconv.recipe.vocabulary import resize_vocab
from streamconv.schemes.configs import FILES
from streamconv.stage import begin
from streamconv.storage.folder import Folder


def convert_tensors(
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    settings: Mapping[str, object],
    casting: Casting,
    beside: Folder | None,
    *,
    is_stated: bool,
) -> Conversion:
    """What a recipe makes of a checkpoint's own tensors, and of those of its other components what they are; cast as is asked for.

    Args:
        checkpoint: the source.
        recipe: None: all tensors stay what they are.
        settings: the recipe's options; without one those of the identity.
        casting: which are cast, and to what.
        beside: the folder of the target model, whose config the recipe may read.
        is_stated: whether its configs say what of it is quantized; else what tensors look like does.
    """
    begin(f"matching {len(checkpoint)} names")
    if recipe is None:
        conversion = resize_vocab(identity(all_tensors(checkpoint), casting), read_identity_options(settings))
    else:
        sidecar = read_config(beside, recipe.target.config) if beside else {}
        own = recipe.apply(checkpoint.components[""].entries, checkpoint.config, settings, sidecar=sidecar, recast=casting)
        rest = identity(all_tensors(checkpoint.others), casting)
        conversion = replace(own, outputs={**own.outputs, **rest.outputs}, rows=[*own.rows, *rest.rows])
    casting.check_patterns(conversion.outputs)
    notes = list(_check_quantized(checkpoint, conversion, casting, stated=is_stated))
    return replace(conversion, notes=[*conversion.notes, *notes])


def _check_quantized(checkpoint: Checkpoint, conversion: Conversion, casting: Casting, *, stated: bool) -> Iterator[str]:
    """`Casting.check_quantized` of each component; ``stated``: configs say what is quantized, else what a recipe makes of it does."""
    for folder in checkpoint.components:
        where = checkpoint.folder.folder(folder)
        placed = ((checkpoint.component_of(name), node.spec) for name, node in conversion.outputs.items())
        specs = {bare: spec for (component, bare), spec in placed if component == folder}
        config = checkpoint.config_of(folder) if stated else {}
        note = casting.check_quantized(specs, config, lambda: {name: read_config(where, name) for name in FILES} if stated else {})  # noqa: B023
        if note:
            yield f"{folder}: {note}" if folder else note


def all_tensors(checkpoint: Checkpoint) -> dict[str, AnyNode]:
    """All tensors by name, those that are left out because they are another, too."""
    entries = checkpoint.contents.entries
    return entries | {name: entries[kept] for name, kept in checkpoint.ties.items() if name not in entries}


def find_ties(checkpoint: Checkpoint, conversion: Conversion) -> dict[str, str]:
    """The ties of the source that hold among the targets, which may have been cast apart, or be a recipe's."""
    outputs = conversion.outputs
    ties = {name: kept for name, kept in checkpoint.find_ties(choose_kept).items() if name in outputs and kept in outputs}
    return {name: kept for name, kept in ties.items() if outputs[name].spec == outputs[kept].spec}


def store_once(conversion: Conversion, ties: Mapping[str, str]) -> Conversion:
    """The conversion with tied tensors under one name only, which is then made of both."""
    if not ties:
        return conversion
    others: dict[str, list[str]] = {}
    for name, kept in ties.items():
        others.setdefault(kept, []).append(name)
    outputs = {name: node for name, node in conversion.outputs.items() if name not in ties}
    rows = [row._replace(sources=(*row.sources, *others.get(row.target, ()))) for row in conversion.rows if row.target in outputs]
    return replace(conversion, outputs=outputs, rows=rows)
