"""What the tensors of an adapter are called: those of layers behind their module's name, and whole ones, which replace the model's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from streamconv.adapters.folder import PREFIX, WRAPPER, Adapter
from streamconv.adapters.kind import Kind, Layer
from streamconv.adapters.tokens import SLOTS as TOKENS
from streamconv.errors import CoverageError, UsageError

_SLOT = re.compile(
    r"(?P<module>.+?)\.(?P<slot>(?:lora|ia3|hada|lokr|vera|oft|boft|hra|ada)_\w+|(?:token_adapter\.)?trainable_tokens_delta)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?P<end>\.(?:weight|bias))?"
)
_ORIGINAL = re.compile(r".+\.original_module(?:\.[^.]+)?\.(?:weight|bias)")  # what the base has, too
_SAVED = re.compile(r"(?P<module>.+)\.(?:modules_to_save|ln_tuning_layers)(?:\.(?!(?:weight|bias)$)[^.]+)?(?P<last>\.(?:weight|bias))")


@dataclass(frozen=True)
class Contents:
    """The tensors of an adapter.

    Attributes:
        layers: what it has for modules.
        whole: tensors of the model that it replaces -> its own.
        under: the same of modules that layers are for, which are replaced before those are merged.
    """

    layers: tuple[Layer, ...]
    whole: Mapping[str, str]
    under: Mapping[str, str]


def sort_keys(adapter: Adapter, kind: Kind) -> Contents:
    """The tensors of an adapter by what they are for.

    Raises:
        CoverageError: one that no adapter of its kind has, or two for one place.
        UsageError: tensors of several adapters.
    """
    slots: dict[tuple[str, int], dict[str, str]] = {}
    whole, saved, under = dict[str, str](), dict[str, str](), dict[str, str]()
    names: set[str] = set()
    for key in adapter.tensors:
        name = key.removeprefix(PREFIX)
        match = _SLOT.fullmatch(name)
        if match:
            module, depth = match["module"], 0
            while module.endswith(f".{WRAPPER}"):
                module, depth = module.removesuffix(f".{WRAPPER}"), depth + 1
            slot = match["slot"] + (match["end"] if match["end"] == ".bias" else "")
            if slot not in kind.slots and slot not in TOKENS:
                raise CoverageError(f"{adapter.title}: {key} is not merged here: merge it with PEFT's merge_and_unload")
            names |= {match["adapter"]} if match["adapter"] else set()
            own = slots.setdefault((module, depth), {})
            if own.setdefault(slot, key) != key:
                raise CoverageError(f"{adapter.title}: {key} and {own[slot]} are both for {module}: save one adapter")
        elif not _ORIGINAL.fullmatch(name):
            wrapped = _SAVED.fullmatch(name)
            if wrapped:
                saved[wrapped["module"] + wrapped["last"]] = key
            elif f".{WRAPPER}." in name:
                under[name.replace(f".{WRAPPER}.", ".")] = key
            else:
                whole[name] = key
    if len(names) > 1:
        raise UsageError(f"{adapter.title}: it holds several adapters, {', '.join(sorted(names))}: save one of them")
    layers = tuple(Layer(adapter, module, depth, own) for (module, depth), own in slots.items())
    return Contents(layers, {**saved, **whole}, under)
