"""How the names of weight files start: a library finds its weights by that, so that what is written starts as what was read."""

from __future__ import annotations

from streamconv.checkpoint.components import within
from streamconv.checkpoint.opening import Checkpoint
from streamconv.formats import Contents
from streamconv.formats.registry import containers
from streamconv.formats.variants import modern, variant_of, without_variant

_PLAIN = ("model", "pytorch_model", "consolidated")  # stand for what the container's own files are called
_KEPT = (  # what libraries look for; other names of single files are given by people
    "diffusion_pytorch_model",  # diffusers
    "pytorch_lora_weights",  # its LoRAs
    "learned_embeds",  # its textual inversions
    "adapter_model",  # PEFT
    "open_clip_model",  # OpenCLIP
)
_SHARDED = ("diffusion_pytorch_model",)  # of these, those whose library reads shards and an index
_OF_TORCH = {"open_clip_model": "open_clip_pytorch_model"}  # where a library calls a pickle otherwise
CHOSEN = ("safetensors", "torch")  # containers whose files' names can be chosen


def stem_of(checkpoint: Checkpoint, folder: str, format: str) -> str | None:  # noqa: A002 - the word of the command line
    """How the names of files in that container start which hold a component of a checkpoint; None: as the container's own do."""
    if format not in CHOSEN:
        return None
    stem = _stem_of_files(checkpoint.components[folder])
    stem = next((ours for ours, torchs in _OF_TORCH.items() if stem == torchs), stem)
    if stem not in _KEPT:
        if stem in _PLAIN or (stem or "").startswith("consolidated") or not checkpoint.path.is_dir():
            return None
        stem = _stem_by_config(checkpoint, folder) or stem
        if stem is None or stem in _PLAIN:
            return None
    return _OF_TORCH.get(stem, stem) if format == "torch" else stem


def reads_shards(checkpoint: Checkpoint, folder: str, stem: str | None) -> bool:
    """Whether the library that looks for a component's files of this name, without a suffix, reads several of them by an index, too.

    Models of transformers and diffusers are read so, and their configs say that they are such; other modules of sentence-transformers not.
    """
    known = next((ours for ours, torchs in _OF_TORCH.items() if stem == torchs), stem)
    if known in _KEPT:
        return known in _SHARDED
    return not folder or any(key in checkpoint.config_of(folder) for key in ("model_type", "architectures", "_class_name"))


def _stem_by_config(checkpoint: Checkpoint, folder: str) -> str | None:
    """What the library looks for that a config beside the weights is of; None where there is none, and nobody but people knows a name."""
    root = within(checkpoint.path, folder)
    if (root / "adapter_config.json").is_file():
        return "adapter_model"
    config = checkpoint.config_of(folder)
    if "_class_name" in config:
        return "diffusion_pytorch_model"
    return "model" if config else None


def _stem_of_files(contents: Contents) -> str | None:
    """What the name of the one file, or of all numbered ones, starts with."""
    kind = containers()[contents.format].names
    names = [modern(path.name, kind) for path in contents.files]
    if len(names) == 1 and not kind.shard(names[0]):
        suffix = next((suffix for suffix in kind.suffixes if names[0].endswith(suffix)), "")
        return without_variant(names[0].removesuffix(suffix), kind) if suffix else None
    stems = {match["stem"] if (match := kind.shard(name)) else "" for name in names}
    return without_variant(stems.pop(), kind) or None if len(stems) == 1 else None


def variant_read(checkpoint: Checkpoint, folder: str) -> str | None:
    """The variant that was asked for, if a component's files are of it."""
    contents = checkpoint.components[folder]
    kind = containers()[contents.format].names
    own = {variant_of(path.name, kind) for path in contents.files}
    return checkpoint.variant if own == {checkpoint.variant} else None
