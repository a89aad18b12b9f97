"""Names of what trainers leave, as the model's own class calls its tensors: without what wrappers and dicts around it put before them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from streamconv.checkpoint.opening import Checkpoint, open_checkpoint
from streamconv.errors import StreamconvError, UsageError
from streamconv.formats.registry import containers
from streamconv.graph.node import AnyNode
from streamconv.storage.folder import Folder

OPTION = "--set prefix"
_WITHIN = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What compiling, sharding and recomputing put into names, wherever that is."""
_AROUND = ("module", "_forward_module", "app")
"""Parts that names begin with, which no class of a model has itself."""
_BASE = "model"  # which classes have, and dicts around them, too
_PEFT = re.compile(r"(?:^|\.)(?:base_layer|lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save)(?:\.|$)")
_MOST = 6  # parts that are looked at


def name_as_model(checkpoint: Checkpoint, prefix: str | None, beside: Folder | None) -> Checkpoint:
    """A checkpoint whose tensors are called as its model's class does.

    Args:
        checkpoint: a source.
        prefix: what all names begin with and shall not; "": names stay as they are; None: by what they are, of a trainer's checkpoint.
        beside: the folder of the model, whose names are known then.

    Raises:
        UsageError: names that do not begin so, or those of an adapter that is not merged.
    """
    contents = checkpoint.contents
    is_trained = containers()[contents.format].is_trained
    if (
        list(checkpoint.components) != [""]
        or not contents.entries
        or (prefix is None and not is_trained and not (beside and containers()[contents.format].nests))
    ):
        return checkpoint
    if prefix is not None:
        names = _without(checkpoint, prefix) if prefix else {name: name for name in contents.entries}
    elif is_trained:
        _refuse_adapter(checkpoint)
        names = _found(contents.entries, _names_of(beside or _own(checkpoint)), checkpoint.config)
    else:
        names = _known(contents.entries, _names_of(beside))
    changed = [(old, new) for old, new in names.items() if old != new]
    if not changed:
        return checkpoint
    if len(set(names.values())) < len(names):
        old, new = next((old, new) for old, new in changed if new in contents.entries or list(names.values()).count(new) > 1)
        raise UsageError(
            f"{checkpoint.path}: {old} would be called {new}, which another one is: say what goes with {OPTION}=TEXT, or nothing"
        )
    entries: dict[str, AnyNode] = {new: contents.entries[old] for old, new in names.items()}
    first = changed[0]
    note = f"names as the model has them: {first[0]} is {first[1]} ({len(changed)} of {len(names)}; {OPTION}= keeps them)"
    renamed = replace(contents, entries=entries, notes=[*contents.notes, note])
    return checkpoint.with_contents(renamed)


def _own(checkpoint: Checkpoint) -> Folder:
    return checkpoint.folder.folder(checkpoint.contents.beside) if checkpoint.contents.beside else checkpoint.folder


def _without(checkpoint: Checkpoint, prefix: str) -> dict[str, str]:
    names = {}
    for name in checkpoint:
        if not name.startswith(prefix) or name == prefix:
            raise UsageError(f"{OPTION}={prefix}: {name} does not begin so: give what all names begin with, or {OPTION}= for nothing")
        names[name] = name.removeprefix(prefix).lstrip(".")
    return names


def _refuse_adapter(checkpoint: Checkpoint) -> None:
    found = next((name for name in checkpoint if _PEFT.search(name)), None)
    if found is not None:
        raise UsageError(
            f"{checkpoint.path}: {found} is of an adapter that is not merged: merge it where it was trained, or take all tensors under the "
            f"names that are stored, with {OPTION}="
        )


def _names_of(folder: Folder | None) -> frozenset[str]:
    """What a model's tensors are called in a folder; nothing where it has none."""
    if folder is None:
        return frozenset()
    try:
        other = open_checkpoint(folder.file(""))
    except StreamconvError:
        return frozenset()
    return frozenset() if containers()[other.format].is_trained else frozenset(other)


def _candidates(names: Sequence[str]) -> list[dict[str, str]]:
    """Names without what is within them, and without one more part each that all begin with."""
    bare = {name: _WITHIN.sub("", name) for name in names}
    found = [bare]
    while len(found) <= _MOST:
        before = found[-1]
        firsts = {name.partition(".")[0] for name in before.values()}
        if len(firsts) != 1 or any("." not in name for name in before.values()):
            break
        found.append({old: new.partition(".")[2] for old, new in before.items()})
    return found


def _known(names: Iterable[str], reference: frozenset[str]) -> dict[str, str]:
    """Names without what they begin with, if those of a model are known and are most of these then."""
    listed = list(names)
    best = max(_candidates(listed), key=lambda renamed: len(reference.intersection(renamed.values())))
    matched, stored = len(reference.intersection(best.values())), len(reference.intersection(listed))
    return best if matched > max(stored, len(listed) // 2) else {name: name for name in listed}


def _found(names: Iterable[str], reference: frozenset[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The same, by the words that they begin with, where nothing is known."""
    listed = list(names)
    candidates = _candidates(listed)
    best = max(candidates, key=lambda renamed: len(reference.intersection(renamed.values())))
    if reference.intersection(best.values()):
        return best
    classes = config.get("architectures")
    has_head = not isinstance(classes, list) or not classes or "For" in str(classes[0])
    chosen = candidates[0]
    for before, after in pairwise(candidates):
        first = next(iter(before.values())).partition(".")[0]
        firsts = {name.partition(".")[0] for name in after.values()}
        if first in _AROUND or (first == _BASE and (_BASE in firsts or "lm_head" in firsts or not has_head)):
            chosen = after
        else:
            break
    return chosen
