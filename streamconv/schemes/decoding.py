"""Quantized tensors as the numbers that they stand for, whatever the quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode
from streamconv.schemes.beside import transpose
from streamconv.schemes.detection import codes_in
from streamconv.schemes.orientation import is_conv1d
from streamconv.schemes.scheme import Group, Scheme


@dataclass(frozen=True)
class Decoded:
    """What dequantizing leaves.

    Attributes:
        nodes: the tensors.
        made_of: for each that was quantized, the stored tensors that it is made of.
        dropped: the names of those that only served the quantization, with the reason.
    """

    nodes: dict[str, AnyNode]
    made_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


def decode(scheme: Scheme, nodes: Mapping[str, AnyNode], config: Mapping[str, Any], dtype_of: Callable[[str], str], title: str) -> Decoded:
    """All tensors, those that are quantized as numbers of the dtype that ``dtype_of`` gives for their names, others as they are.

    Raises:
        CoverageError: as `Scheme.match` does, or a weight is there as numbers, too.
    """
    specs = {name: node.spec for name, node in nodes.items()}
    match = scheme.match(config, specs, title)
    group_of = {group.tensors[0]: group for group in match.groups}
    consumed = {*match.dropped, *chain.from_iterable(group.tensors for group in match.groups)}
    for name, beside in codes_in(specs).items():
        if name not in consumed:
            where = f", beside {beside}" if beside else ""
            raise CoverageError(f"{title}: {name} is {specs[name]}{where}, and no weight of {scheme.methods[0]}: mend the source")
    numbers: dict[str, AnyNode] = {}
    for name, node in nodes.items():
        if name in group_of:
            group = group_of[name]
            target, tensor = group.target, _decode_group(group, nodes, dtype_of(group.target), title)
            if scheme.turns_conv1d and is_conv1d(target, config):
                tensor = transpose(tensor)
        elif name in consumed:
            continue
        else:
            target, tensor = name, node
        if target in numbers:
            raise CoverageError(f"{title}: {target} is there as it is, and quantized as {name}: remove one of them")
        numbers[target] = tensor
    return Decoded(numbers, {group.target: group.tensors for group in match.groups}, dict(match.dropped))


def _decode_group(group: Group, nodes: Mapping[str, AnyNode], dtype: str, title: str) -> AnyNode:
    """The numbers of a quantized weight. Raises CoverageError, which names it."""
    try:
        return group.decode(nodes, dtype)
    except CoverageError as error:
        raise CoverageError(f"{title}: {' with '.join(group.tensors)}: {error}: mend the source") from error
