"""GPTQ: integers in words filled along the inputs, with scales and zero points of groups of inputs, decoded as float16."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.dtypes import TensorSpec
from streamconv.errors import CoverageError, UsageError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import DequantizeIntegers
from streamconv.schemes.beside import Companions, read, transpose
from streamconv.schemes.configs import quantizations
from streamconv.schemes.scheme import Group, Match, Scheme

_OWN = re.compile(r"\.(?:qzeros|scales|g_idx)$")


@dataclass(frozen=True)
class Words(Group):
    """A matrix whose inputs, the rows that are stored, fill words; for each group of them a line of scales and of zero points.

    Attributes:
        bits: of a code.
        size: inputs of a group.
        along: how codes and zero points lie.
        plus: what is added to stored zero points.
    """

    bits: int
    size: int | None
    along: tuple[str, str]
    plus: int

    def decode(self, nodes: Mapping[str, AnyNode], dtype: str) -> AnyNode:
        """See `Group.decode`."""
        codes, zeros, scales, *groups = (nodes[name] for name in self.tensors)
        if any(len(node.spec.shape) != 2 for node in (codes, zeros, scales)):
            raise CoverageError(f"expected matrices, found {codes.spec}, {zeros.spec}, {scales.spec}")
        count, outputs = scales.spec.shape
        inputs = codes.spec.shape[0] * 32 // self.bits if self.along[0] == "rows" else codes.spec.shape[0]
        size = min(self.size or inputs, inputs)
        if -(-inputs // size) != count:
            raise CoverageError(f"{inputs} inputs in groups of {size} take {-(-inputs // size)} lines of scales, found {scales.spec}")
        index = "rows" if groups and self._is_moved(nodes, inputs, size, count) else ""
        op = DequantizeIntegers((inputs, outputs), dtype, self.bits, self.along[0], (size, 1), self.along[1], 0, self.plus, index)
        return transpose(apply(op, codes, scales, zeros, *(groups if index else [])))

    def _is_moved(self, nodes: Mapping[str, AnyNode], inputs: int, size: int, count: int) -> bool:
        """Whether inputs are in other groups than those that they lie in. Raises CoverageError where one is in none."""
        name = self.tensors[3]
        groups = read(name, nodes).reshape(-1)
        if len(groups) != inputs or groups.min() < 0 or groups.max() >= count:
            raise CoverageError(f"{name} has other groups than 0 to {count - 1}, or not {inputs} of them")
        return bool((groups != [k // size for k in range(inputs)]).any())


class Gptq(Scheme):
    """GPTQ's own format, in either version."""

    methods = ("gptq",)
    turns_conv1d = True

    def match(self, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], title: str) -> Match:
        """See `Scheme.match`."""
        section = next((section for _, section in quantizations(config)), {})
        form = section.get("checkpoint_format") or "gptq"
        if form not in ("gptq", "gptq_v2"):
            raise UsageError(f"{title}: gptq in the format {form!r}: known are gptq and gptq_v2")
        companions = Companions(specs, title)
        groups: list[Group] = []
        for name in specs:
            if not name.endswith(".qweight"):
                continue
            stem = name.removesuffix("qweight")
            own = _section_of(stem.removesuffix("."), section)
            bits, size = own.get("bits"), own.get("group_size", -1)
            if bits not in (2, 3, 4, 8) or type(size) is not int or size == 0:
                what = f"{name}: gptq with bits {bits!r} in groups of {size!r}"
                raise UsageError(f"{title}: {what}: known are 2, 3, 4 and 8 bits; mend the config")
            companions.take(name, [name])
            tensors = [name, *(companions.need(name, [f"{stem}{end}"]) for end in ("qzeros", "scales"))]
            index = companions.take(name, [f"{stem}g_idx"])
            if index:
                tensors.append(index)
            plus = 0 if form == "gptq_v2" else 1
            groups.append(Words(f"{stem}weight", tuple(tensors), bits, size if size > 0 else None, ("rows", "columns"), plus))
        return companions.conclude(groups, _OWN)


SCHEME = Gptq()


def _section_of(module: str, section: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says of a module: for all, and in ``dynamic`` for those whose names begin with an expression, the first such."""
    dynamic = section.get("dynamic")
    for pattern, overrides in dynamic.items() if isinstance(dynamic, Mapping) else ():
        if _is_for(str(pattern), module):
            return {**section, **overrides} if isinstance(overrides, Mapping) else section
    return section


def _is_for(pattern: str, module: str) -> bool:
    """Whether an expression of ``dynamic`` is for a module; one after ``-:`` names what is not quantized."""
    try:
        return re.match(pattern.removeprefix("+:").removeprefix("-:"), module) is not None
    except re.error:
        return False
