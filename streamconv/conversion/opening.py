"""What is converted or compared: a recipe by its name, and checkpoints as its sides store them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from streamconv import memory, recipes
from streamconv.checkpoint.opening import Checkpoint, detect_format, find_checkpoint
from streamconv.conversion.naming import name_as_model
from streamconv.conversion.options import Options, PlanOptions, VerifyOptions
from streamconv.conversion.sides import Reading, open_other, open_side
from streamconv.engine.readers import BACKENDS
from streamconv.errors import UsageError
from streamconv.formats.catalog import locate
from streamconv.formats.registry import containers
from streamconv.recipe import Recipe, Side
from streamconv.running.destination import RemoteTarget, Target
from streamconv.storage import is_url
from streamconv.storage.folder import Folder
from streamconv.units import parse_size


def check_backend(options: Options) -> None:
    """Raises UsageError: there is no such read backend."""
    if options.read_backend not in BACKENDS:
        raise UsageError(f"unknown read backend {options.read_backend!r}: known are {', '.join(BACKENDS)}")


def check_strict(options: PlanOptions) -> None:
    """Raises UsageError where values that overflow would be known too late, or never."""
    if not options.strict_values:
        return
    if is_url(options.dst):
        raise UsageError(f"--strict-values: {options.dst} takes files as they are made, before all values are known: give a DST here")
    if options.reclaim_source:
        raise UsageError("--strict-values: the source's space would be given back before all values are known: leave out --reclaim-source")


def check_reclaim(options: PlanOptions, checkpoint: Checkpoint, *, is_merged: bool) -> None:
    """Raises UsageError where giving the source back would lose what no output holds."""
    if not options.reclaim_source:
        return
    if options.graft is not None or list(options.adapter):
        raise UsageError("--reclaim-source: what --graft and --adapter read would be given back, too: leave one of them out")
    if is_merged:
        raise UsageError(f"--reclaim-source: {options.src} names several models, which would all be given back: leave it out")
    if containers()[checkpoint.format].is_trained:
        what = f"{checkpoint.path} holds what is the trainer's, too, which would be lost"
        raise UsageError(f"--reclaim-source: {what}: leave it out, and remove SRC afterwards")


def find_recipe(options: Options) -> Recipe | None:
    """The recipe that is asked for. Raises RecipeError: there is none of that name, or its file is wrong."""
    return recipes.get(options.recipe) if isinstance(options.recipe, str) else options.recipe


def split_settings(options: Options, recipe: Recipe | None) -> tuple[Reading, dict[str, object]]:
    """How the source is read, which can be said with any recipe, and the recipe's own options. Raises UsageError for no true or false."""
    settings = dict(options.options or {})
    taken = recipe.settings if recipe is not None else ()
    root, prefix = (None if key in taken else settings.pop(key, None) for key in ("root", "prefix"))
    own: dict[str, bool | int] = {}
    for container in containers().values():
        for known, read in ((container.settings, _read_flag), (container.counts, _read_count)):
            own |= {key: read(key, settings.pop(key)) for key in known if key in settings and key not in taken}
    return Reading(None if root is None else str(root), None if prefix is None else str(prefix), own), settings


def _read_count(key: str, value: object) -> int:
    text = str(value)
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10):
        raise UsageError(f"--set {key}={value}: expected a number")
    return int(text)


def _read_flag(key: str, value: object) -> bool:
    text = str(value).lower()
    if text not in ("true", "false"):
        raise UsageError(f"--set {key}={value}: expected true or false")
    return text == "true"


def open_source(
    options: PlanOptions, recipe: Recipe | None, reading: Reading, target: Target | RemoteTarget
) -> tuple[Checkpoint, list[str]]:
    """The checkpoint at SRC, and notes on what of it has no place in DST.

    Raises:
        StreamconvError: it cannot be read.
        UsageError: it consists of components, and a recipe, or a DST that is one file, takes one model.
    """
    with memory.bounded(parse_size(options.max_memory)):
        checkpoint = open_side(options.src, recipe.source if recipe else Side(), reading, options.variant)
    checkpoint = name_as_model(checkpoint, reading.prefix, find_beside(options))
    if not (target.file or recipe):
        return checkpoint, []
    others = ", ".join(filter(None, checkpoint.components))
    if "" not in checkpoint.components:
        what = f"DST {target.path} is one file" if target.file else "a recipe converts one model"
        raise UsageError(f"{checkpoint.path}: consists of {others}, and {what}: give one of them as SRC")
    if not (target.file and others):
        return checkpoint, []
    return checkpoint.select([""]), [f"{others}: left behind, as DST is one file; a directory holds them too"]


def open_both(options: VerifyOptions, recipe: Recipe | None, reading: Reading) -> tuple[Checkpoint, Checkpoint]:
    """Two checkpoints to compare; the root is that of the first, and of the second if it has one or the first cannot have any."""
    left, right = _open_both(options, recipe, reading)
    return name_as_model(left, reading.prefix, find_beside(options)), name_as_model(right, None, None)


def _open_both(options: VerifyOptions, recipe: Recipe | None, reading: Reading) -> tuple[Checkpoint, Checkpoint]:
    first, second = (recipe.source, recipe.target) if recipe else (Side(), Side())
    a, b, variant, root = options.a, options.b, options.variant, reading.root
    with memory.bounded(parse_size(options.max_memory)):
        nests = [containers()[detect_format(find_checkpoint(path)[0])].nests for path in (a, b)] if root is not None else []
        if nests == [False, True]:
            return open_side(a, first, replace(reading, root=None), variant), open_other(b, second, variant, root)
        left = open_side(a, first, reading, variant)
        if nests == [True, True]:
            with suppress(UsageError):
                return left, open_other(b, second, variant, root)
        return left, open_other(b, second, variant)


def find_own_beside(options: Options, checkpoint: Checkpoint) -> Folder | None:
    """`find_beside`, else the folder in SRC that has them, where its container says so."""
    own = checkpoint.contents.beside
    return find_beside(options) or (checkpoint.folder.folder(own) if own else None)


def find_beside(options: Options) -> Folder | None:
    """The folder that config and tokenizer files come from instead of SRC's.

    Raises:
        UsageError: it is no folder.
    """
    if options.sidecars_from is None:
        return None
    location = locate(options.sidecars_from)
    if not location.is_folder:
        raise UsageError(f"--sidecars-from {location}: not a directory")
    return location.folder


def local_files(checkpoint: Checkpoint) -> list[Path]:
    """The files of a checkpoint that are on this machine."""
    contents = checkpoint.contents
    paths = (file.local for file in (*contents.files, *contents.others))
    return [path for path in paths if path is not None]
