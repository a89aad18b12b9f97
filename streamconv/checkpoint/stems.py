"""How the names of weight files start: a library finds its weights by that, so that what is written starts as what was read."""

from __future__ import annotations

from streamconv.checkpoint.opening import Checkpoint
from streamconv.formats import Contents
from streamconv.formats.registry import containers, library_of
from streamconv.formats.variants import modern, variant_of, without_variant

PLAIN = "transformers"  # whose files are called as the container's own
_SHARDED = ("diffusers",)  # of the other libraries, those that read shards and an index


def has_stems(format: str) -> bool:  # noqa: A002 - the word of the command line
    """Whether names of a container's files can be chosen."""
    return "stem" in containers()[format].takes


def stem_of(checkpoint: Checkpoint, folder: str, format: str) -> str | None:  # noqa: A002
    """How the names of files in that container start which hold a component of a checkpoint; None: as the container's own do."""
    if not has_stems(format):
        return None
    contents = checkpoint.components[folder]
    stem = _stem_of_files(contents)
    library = PLAIN if _is_plain(stem, contents) else library_of(stem)
    if library is None:  # other names are given by people
        library = _library_by_config(checkpoint, folder) if checkpoint.location.is_folder else PLAIN
    if library == PLAIN:
        return None
    return containers()[format].names.stems.get(library) if library else stem


def _is_plain(stem: str | None, contents: Contents) -> bool:
    """Whether names start as the container's own files do, or as original files that libraries pass over."""
    names = containers()[contents.format].names
    return stem is not None and (stem == names.stem or (bool(names.originals) and stem.startswith(names.originals)))


def reads_shards(checkpoint: Checkpoint, folder: str, stem: str | None) -> bool:
    """Whether the library that looks for a component's files of this name, without a suffix, reads several of them by an index, too.

    Models of transformers and diffusers are read so, and their configs say that they are such; other modules of sentence-transformers not.
    """
    library = library_of(stem)
    if library not in (None, PLAIN):
        return library in _SHARDED
    return not folder or any(key in checkpoint.config_of(folder) for key in ("model_type", "architectures", "_class_name"))


def _library_by_config(checkpoint: Checkpoint, folder: str) -> str | None:
    """The library that a config beside the weights is of; None where there is none, and nobody but people knows a name."""
    if checkpoint.folder.folder(folder).has_file("adapter_config.json"):
        return "peft"
    config = checkpoint.config_of(folder)
    if "_class_name" in config:
        return "diffusers"
    return PLAIN if config else None


def _stem_of_files(contents: Contents) -> str | None:
    """What the name of the one file, or of all numbered ones, starts with."""
    kind = containers()[contents.format].names
    names = [modern(path.name, kind) for path in contents.files]
    if len(names) == 1 and not kind.shard(names[0]):
        suffix = next((suffix for suffix in kind.suffixes if names[0].endswith(suffix)), "")
        return without_variant(names[0].removesuffix(suffix), kind) if suffix else None
    shards = [kind.shard(name) for name in names]
    stems = {match["stem"] if match else "" for match in shards}
    return without_variant(stems.pop(), kind) or None if len(stems) == 1 else None


def variant_read(checkpoint: Checkpoint, folder: str) -> str | None:
    """The variant that was asked for, if a component's files are of it."""
    contents = checkpoint.components[folder]
    kind = containers()[contents.format].names
    own = {variant_of(path.name, kind) for path in contents.files}
    return checkpoint.variant if own == {checkpoint.variant} else None
