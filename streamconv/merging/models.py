"""The models of a merge, as its tensors' names tell their layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from streamconv.checkpoint.opening import Checkpoint
from streamconv.graph.node import AnyNode
from streamconv.schemes.detection import find_quantization

_BEFORE = re.compile(r"(?:.*\.)?(?:\w*embed(?!_out)\w*|embd|wte|wpe|shared)\..*", re.DOTALL)
_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|embed_in)\.weight", re.DOTALL)
_HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out)\.weight", re.DOTALL)
TIES = "tie_word_embeddings"


@dataclass(frozen=True)
class Layer:
    """Where a tensor is: the stack of layers that it is in ("": none), the layer's number, and its name there.

    A tensor outside of layers has its whole name.
    """

    stack: str
    number: int
    name: str

    @property
    def is_before(self) -> bool:
        """Whether a tensor outside of layers comes before them, as embeddings do."""
        return _BEFORE.fullmatch(self.name) is not None


def layer_of(name: str) -> Layer:
    """Where a tensor is, by its name: the first number in that is a layer's."""
    parts = name.split(".")
    for k in range(1, len(parts) - 1):
        if parts[k].isdecimal():
            return Layer(".".join(parts[:k]), int(parts[k]), ".".join(parts[k + 1 :]))
    return Layer("", 0, name)


@dataclass(frozen=True)
class Model:
    """One model: how a file names it, and what it is.

    Tensors that are another one in the same bytes are left out.
    """

    name: str
    checkpoint: Checkpoint

    @cached_property
    def entries(self) -> Mapping[str, AnyNode]:
        ties = self.checkpoint.ties
        return {name: node for name, node in self.checkpoint.contents.entries.items() if name not in ties}

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    @property
    def is_quantized(self) -> bool:
        """Whether its config says so, or its tensors show it."""
        specs = {name: node.spec for name, node in self.entries.items()}
        return "quantization_config" in self.config or find_quantization(self.config, {}, specs) is not None

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Where each of its tensors is."""
        return {name: layer_of(name) for name in self.entries}

    @cached_property
    def depths(self) -> dict[str, int]:
        """How many layers each stack has."""
        depths: dict[str, int] = {}
        for layer in self.layers.values():
            if layer.stack:
                depths[layer.stack] = max(depths.get(layer.stack, 0), layer.number + 1)
        return depths

    @cached_property
    def _within(self) -> dict[tuple[str, int], dict[str, str]]:
        """The names of its tensors by those within their layer, by layer; of those outside of layers too."""
        within: dict[tuple[str, int], dict[str, str]] = {}
        for name, layer in self.layers.items():
            within.setdefault((layer.stack, layer.number), {})[layer.name] = name
        return within

    def layer(self, stack: str, number: int) -> dict[str, str]:
        """The names of a layer's tensors, by those within it."""
        return self._within.get((stack, number), {})

    def outside(self, *, before: bool) -> dict[str, str]:
        """Those of tensors before, or behind, all layers."""
        return {name: name for name in self.layer("", 0) if self.layers[name].is_before == before}

    def stand_in(self, head: str) -> str | None:
        """The embedding that is its head, too, where it stores none; None: it has one, or what is missing is no head."""
        if head in self.entries or not _HEAD.fullmatch(head) or self._says_untied:
            return None
        embeddings = [name for name in self.entries if _EMBEDDING.fullmatch(name)]
        kept = self.checkpoint.ties.get(head)
        return kept or (embeddings[0] if len(embeddings) == 1 else None)

    def tensor(self, name: str) -> AnyNode | None:
        """A tensor, or the embedding that stands in for it; None: there is neither."""
        return self.entries.get(name) or self.entries.get(self.stand_in(name) or "")

    @property
    def _says_untied(self) -> bool:
        return self.config.get(TIES, text_config_of(self.config).get(TIES)) is False


def heads_of(models: Iterable[Model]) -> list[str]:
    """The heads that any of some models stores."""
    return list(dict.fromkeys(name for model in models for name in model.outside(before=False) if _HEAD.fullmatch(name)))


def text_config_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that is of the model of texts: its ``text_config``, or all of it."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def with_key(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The keys of a config that change where a key has this value, in that of its model of texts if it stands there."""
    text = config.get("text_config")
    if not isinstance(text, dict) or key not in text:
        return {key: value}
    return {**({key: value} if key in config else {}), "text_config": {**text, key: value}}
