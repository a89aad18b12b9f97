"""What a quantization says of itself: which tensors are one of its weights, what numbers they stand for, what a config says afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from streamconv.dtypes import TensorSpec
from streamconv.graph.node import AnyNode
from streamconv.schemes.configs import with_dtype, without_quantization
from streamconv.schemes.preset import Preset


@dataclass(frozen=True)
class Group(ABC):
    """A quantized weight.

    Attributes:
        target: what it is called as floating point.
        tensors: the stored tensors that it is made of, the codes first: it takes their place.
    """

    target: str
    tensors: tuple[str, ...]

    @abstractmethod
    def decode(self, nodes: Mapping[str, AnyNode], dtype: str) -> AnyNode:
        """The numbers that its tensors, which are among ``nodes``, stand for, in that dtype.

        Raises:
            CoverageError: they do not go together.
        """


@dataclass(frozen=True)
class Match:
    """What of a checkpoint is quantized: its weights, and the tensors that only serve the quantization, with the reason."""

    groups: Sequence[Group] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)


class Scheme(ABC):
    """A quantization. One file has one; `registry.register` makes it known."""

    methods: ClassVar[tuple[str, ...]]
    """What ``quant_method`` of a config calls it."""
    codes: ClassVar[tuple[str, ...]] = ()
    """Dtypes of codes that are its own where nothing names a method."""
    turns_conv1d: ClassVar[bool] = False
    """Whether it has matrices of a Conv1D, which has inputs before outputs, as those of linear modules."""
    presets: ClassVar[tuple[Preset, ...]] = ()
    """How weights are quantized that it reads; none: it is only read."""

    @abstractmethod
    def match(self, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], title: str) -> Match:
        """What of the tensors is quantized: by what is there; the config says how.

        Args:
            config: config.json.
            specs: all tensors, in order.
            title: what messages begin with.

        Raises:
            CoverageError: a weight without its scales or scales without their weight, or what cannot be told.
        """

    def config(self, before: Mapping[str, Any], dtype: str) -> dict[str, Any]:
        """A config of what `Group.decode` made: it speaks of no quantization, and gives that dtype."""
        return with_dtype(without_quantization(before), dtype)
