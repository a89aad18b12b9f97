"""The attention heads along an axis of a tensor, by its name and the config: where it may be divided without cutting one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_GROUPS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_QUERIES = ("q_proj", "q_b_proj", "kv_b_proj", "o_proj", "out_proj", "query", "q", "o", "wq", "wq_b", "wkv_b", "wo", "dense", "proj")
_KEYS = ("k_proj", "v_proj", "key", "value", "k", "v", "wk", "wv")
_JOINED = ("qkv_proj", "qkv")  # q, k and v one after the other ...
_GROUPED = ("query_key_value", "wqkv", "Wqkv", "c_attn")  # ... or group by group
_TOWERS = (("vision_config", re.compile(r"vision|visual|image")), ("audio_config", re.compile(r"audio|speech")))


@dataclass(frozen=True)
class Heads:
    """How many units lie along an axis; none may be cut.

    Attributes:
        what: they are, in words.
        count: of them.
        repeatable: where there are more ranks, these may hold the same one.
        each: of a tensor of q, k and v: of each of them, if it is divided by itself.
    """

    what: str
    count: int
    repeatable: bool = False
    each: tuple[int, ...] = ()

    def fit(self, size: int) -> bool:
        """Whether so many ranks can share them."""
        return self.count % size == 0 or (self.repeatable and size % self.count == 0)


def find_heads(name: str, config: Mapping[str, Any]) -> Heads | None:
    """The heads along the divided axis of a tensor; None: it has none, or how many is not known."""
    *path, module, _ = ["", *name.split(".")] if name.count(".") else ["", "", name, ""]
    own = next((config[key] for key, tower in _TOWERS if tower.search(name) and isinstance(config.get(key), Mapping)), config)
    if own is config:
        own = config.get("text_config") or config
    heads = _number(own, _HEADS)
    if not heads or not any(_ATTENTION.search(part) for part in path):
        return None
    groups = _number(own, _GROUPS) or heads
    queries, keys = Heads("heads", heads), Heads("heads of keys and values", groups, repeatable=True)
    if module in _QUERIES:
        return queries
    if module in _KEYS:
        return keys
    if module in _JOINED:
        return Heads("heads of queries, keys and values", heads + 2 * groups, each=(heads, groups, groups))
    if module in _GROUPED:
        return Heads("groups of heads", groups, each=(heads, groups, groups))
    return None


def head_size(config: Mapping[str, Any]) -> int:
    """Elements of a head; 0: it is not known."""
    own = config.get("text_config") or config
    heads = _number(own, _HEADS)
    hidden = _number(own, ("hidden_size", "n_embd", "d_model", "dim"))
    return _number(own, ("head_dim",)) or (hidden // heads if heads else 0)


def _number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    number = next((config[key] for key in keys if type(config.get(key)) is int and config[key] > 0), 0)
    return int(number)
