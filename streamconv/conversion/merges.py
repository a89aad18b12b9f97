"""A file of mergekit as SRC: the models that it names, opened and merged, before a recipe or a cast sees them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from streamconv import memory
from streamconv.checkpoint.opening import Checkpoint, read_config
from streamconv.conversion.adapters import merge_adapters
from streamconv.conversion.altered import Altered, with_keys
from streamconv.conversion.naming import name_as_model
from streamconv.conversion.options import Options
from streamconv.conversion.sides import open_side
from streamconv.dtypes import CASTABLE
from streamconv.errors import StreamconvError, UsageError
from streamconv.formats.registry import DEFAULT
from streamconv.graph.node import Node
from streamconv.recipe import Side
from streamconv.recipe.application import keep_dtype
from streamconv.storage import is_url
from streamconv.storage.folder import AnyPath
from streamconv.units import parse_size

if TYPE_CHECKING:
    from streamconv.merging.file import MergeFile
    from streamconv.merging.merge import Merged
    from streamconv.merging.models import Model

SUFFIXES = (".yaml", ".yml")


def is_merge_file(path: AnyPath) -> bool:
    """Whether a path is a file that says what is merged, by its name."""
    return not is_url(path) and str(path).endswith(SUFFIXES) and not Path(str(path)).is_dir()


def merge_as_asked(path: AnyPath, options: Options) -> Altered | None:
    """What a file of mergekit makes of the models that it names; None: the path is that of no such file.

    Raises:
        StreamconvError: it cannot be read, nor can a model; they do not fit each other; or what it asks for is not merged here.
    """
    if not is_merge_file(path):
        return None
    from streamconv.merging.file import read
    from streamconv.merging.merge import merge

    file = read(Path(str(path)))
    with memory.bounded(parse_size(options.max_memory)):
        models = {name: _open(file, name, line) for name, line in file.models.items()}
        merged = merge(file, models, options.random_seed)
    return _altered(file, models, merged)


def _open(file: MergeFile, name: str, line: int) -> Model:
    """A model, with an adapter if one stands behind it; what is wrong is told with the line that names it."""
    from streamconv.merging.file import split_adapter
    from streamconv.merging.models import Model

    path, adapter = split_adapter(name)
    try:
        checkpoint = name_as_model(open_side(path, Side()), None, None)
        if list(checkpoint.components) != [""]:
            raise UsageError(f"{checkpoint.path} consists of components: give the folder of one model")
        return Model(name, _with_adapter(checkpoint, adapter) if adapter else checkpoint)
    except StreamconvError as error:
        raise type(error)(f"{file.path}:{line}: {error}") from error


def _with_adapter(checkpoint: Checkpoint, adapter: str) -> Checkpoint:
    tuned = merge_adapters(checkpoint, [adapter], keep_dtype)
    contents = tuned.checkpoint.contents
    contents = replace(contents, notes=[*contents.notes, *tuned.notes])
    return checkpoint.replace({"": contents}, {"": with_keys(checkpoint.config, tuned.config)})


def _altered(file: MergeFile, models: dict[str, Model], merged: Merged) -> Altered:
    """The result, in the place of the model whose config and tokenizer are its own."""
    from streamconv.merging.merge import first_of

    checkpoints = {name: model.checkpoint for name, model in models.items()}
    first = checkpoints[first_of(file)]
    files = [location for checkpoint in checkpoints.values() for location in checkpoint.contents.files]
    # In a container that says ties itself: layers that stand twice are none.
    contents = replace(first.contents, format=DEFAULT, entries=dict(merged.entries), files=files, metadata={}, notes=[], replicas=[])
    notes = [note for checkpoint in checkpoints.values() for note in checkpoint.contents.notes]
    notes += [*merged.notes, f"merge {file.path}: {file.method} of {', '.join(models)}; config and tokenizer of {first_of(file)}"]
    stored = read_config(first.folder) if first.location.is_folder else {}
    config = {key: value for key, value in {**first.config, **merged.config}.items() if stored.get(key) != value}
    changed = {name: file.method for name, node in merged.entries.items() if isinstance(node, Node)}
    return Altered(
        first.with_contents(contents),
        changed,
        list(dict.fromkeys(notes)),
        config if stored else {},
        sources=merged.sources,
        replicas=merged.replicas,
        others=[checkpoint for checkpoint in checkpoints.values() if checkpoint is not first],
        dtype=_dtype_of(merged),
    )


def _dtype_of(merged: Merged) -> str | None:
    """The dtype of the result's numbers, if it is one."""
    names = {node.spec.dtype.name for node in merged.entries.values()} & {*CASTABLE}
    return names.pop() if len(names) == 1 else None
