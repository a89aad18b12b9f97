"""Quantized weights of several tensors: what an option does to one of these it does to all, or is refused: no library would read it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.checkpoint.opening import Checkpoint
from streamconv.conversion.dequantizing import config_of
from streamconv.errors import CoverageError, StreamconvError
from streamconv.schemes.configs import KEYS
from streamconv.schemes.detection import find_quantization

_SECTION = KEYS[0]
_LISTS = {"compressed-tensors": "ignore", "fp8": "modules_to_not_convert"}
"""The key of that by which methods list the modules of a model that are not quantized."""


@dataclass(frozen=True)
class Weight:
    """A quantized weight.

    Attributes:
        target: what it is called as floating point.
        tensors: those that it is stored as, codes first.
        beside: tensors of its module that only serve the quantization.
    """

    target: str
    tensors: Sequence[str]
    beside: Sequence[str]


@dataclass(frozen=True)
class Weights:
    """How a model is quantized, and its quantized weights: none where nothing is, or nothing tells which."""

    method: str = ""
    config: Mapping[str, Any] | None = None
    weights: Sequence[Weight] = ()

    def is_like(self, other: Weights) -> bool:
        """Whether what another model's config says of weights holds for these."""
        return (self.method, self.config) == (other.method, other.config)

    def check_names(self, names: Mapping[str, str], left_out: str, renamed: str) -> None:
        """Raises CoverageError where tensors of a weight part.

        Args:
            names: of each tensor that stays, its new name.
            left_out: the options that leave tensors out.
            renamed: those that rename them.
        """
        for weight in self.weights:
            stay = [name for name in weight.tensors if name in names]
            if stay and len(stay) < len(weight.tensors):
                lost = next(name for name in weight.tensors if name not in names)
                _fail(f"{left_out}: {stay[0]} stays without {lost}, which are of one quantized weight: name both")
            together = [*stay, *(name for name in weight.beside if stay and name in names)]
            start = len(os.path.commonprefix(together))  # noqa: RUF071 - of characters: ``weight`` and ``weight_scale``
            for name in together[1:]:
                if names[name].removesuffix(name[start:]) != names[stay[0]].removesuffix(stay[0][start:]):
                    news = f"would be {names[stay[0]]} and {names[name]}"
                    _fail(f"{renamed}: {stay[0]} and {name} are of one quantized weight, and {news}: rename both alike")

    def config_with(self, modules: Sequence[str], config: Mapping[str, Any]) -> dict[str, Any]:
        """The key of a config, with dots, that changes where these modules are there, too, and not quantized."""
        key = _LISTS.get(self.method)
        if key is None or not self.weights:
            return {}
        listed = (config.get(_SECTION) or {}).get(key) or []
        more = [module for module in modules if module not in listed]
        return {f"{_SECTION}.{key}": [*listed, *more]} if more else {}

    def check_replaced(self, option: str, names: Collection[str]) -> None:
        """Raises CoverageError where tensors of these names instead of its own leave a part of a weight, or one beside it."""
        for weight in self.weights:
            stay = [name for name in weight.tensors if name not in names]
            if stay and (len(stay) < len(weight.tensors) or weight.target in names):
                _fail(f"{option}: {weight.target} is quantized in SRC, and {stay[0]} would stay of it: graft all that it is stored as")


def _fail(problem: str) -> None:
    raise CoverageError(f"{problem}, or give --dequantize, too")


def weights_of(checkpoint: Checkpoint) -> Weights:
    """How a checkpoint of one model is quantized."""
    config = config_of(checkpoint, "")
    specs = {name: node.spec for name, node in checkpoint.contents.entries.items()}
    quantization = find_quantization(config, {}, specs)
    if quantization is None or quantization.scheme is None:
        return Weights()
    try:
        match = quantization.scheme.match(config, specs, checkpoint.path)
    except StreamconvError:  # what has no parts that go together loses none
        return Weights()
    beside: dict[str, list[str]] = {}
    for name in match.dropped:
        beside.setdefault(_module_of(name), []).append(name)
    weights = [Weight(group.target, group.tensors, beside.get(_module_of(group.tensors[0]), ())) for group in match.groups]
    section = config.get(_SECTION)
    own = {key: value for key, value in section.items() if key not in _LISTS.values()} if isinstance(section, dict) else None
    return Weights(quantization.method, own, weights)


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]
