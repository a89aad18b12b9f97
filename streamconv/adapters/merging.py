"""Adapters merged into the tensors of a model, one after the other."""

from __future__ import annotations

import importlib

from streamconv.adapters.folder import Adapter
from streamconv.adapters.keys import sort_keys
from streamconv.adapters.kind import Kind
from streamconv.adapters.names import with_names
from streamconv.adapters.ties import check_words, replace_whole, untie
from streamconv.adapters.tokens import SLOTS as TOKENS
from streamconv.adapters.tokens import merge_tokens
from streamconv.adapters.weights import Weights
from streamconv.errors import UsageError

MODULES = {"LORA": "lora", "IA3": "ia3", "LOHA": "loha", "LOKR": "lokr", "LN_TUNING": "ln_tuning", "TRAINABLE_TOKENS": "tokens"}
"""Which module has which kind."""
_PROMPTS = (
    "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE", "XLORA", "POLY", "LILY",
)  # fmt: skip


def kind_of(adapter: Adapter) -> Kind:
    """The kind of an adapter.

    Raises:
        UsageError: one that is not merged here, or that asks for more than is.
    """
    name = adapter.kind
    if name in _PROMPTS:
        raise UsageError(f"{adapter.title}: peft_type {name} has nothing to merge: its model computes it anew for each input")
    if name not in MODULES:
        raise adapter.refuse(f"peft_type {name}")
    kind: Kind = importlib.import_module(f"streamconv.adapters.{MODULES[name]}").KIND
    kind.check(adapter)
    if adapter.weight is not None and not kind.has_scale:
        raise UsageError(f"{adapter.title}: @{adapter.weight:g}: adapters of kind {name} have no scale to multiply: leave it out")
    return kind


def merge(adapter: Adapter, weights: Weights) -> str:
    """Merges an adapter, and says in a note what it has.

    Raises:
        UsageError: one of a kind that is not merged here.
        CoverageError: a tensor of it that fits none of the model's.
    """
    kind = kind_of(adapter)
    contents = sort_keys(adapter, kind)
    for layer in contents.layers:
        if f"{layer.module}.in_proj_weight" in weights.entries:
            raise adapter.refuse(f"{layer.key}, of the in_proj of nn.MultiheadAttention,")
    weights = with_names(adapter, contents, weights)
    before = dict(weights.entries)
    whole = untie(adapter, contents, weights)
    replace_whole(adapter, {**whole, **contents.under}, weights)
    for layer in contents.layers:
        tokens = {slot: key for slot, key in layer.keys.items() if slot in TOKENS}
        if tokens:
            merge_tokens(layer, weights)
        if tokens.keys() != layer.keys.keys():
            kind.merge(layer, weights)
        layer.check_taken()
    check_words(adapter, before, weights)
    weights.conclude(adapter.title)
    parts = [f"{len(contents.layers)} layers of {kind.name} are merged"] if contents.layers else []
    parts += [f"{len(whole)} tensors are the adapter's"] if whole else []
    return f"{adapter.title}: {', '.join(parts) or 'there is nothing in it'}"
