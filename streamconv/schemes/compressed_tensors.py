"""compressed-tensors: integers in words or bytes, small floats, with scales of tensors, rows, groups or blocks.

Which tensors are quantized is decided by what is there; bits, groups and blocks by the group of ``config_groups`` that a module is in. The
arithmetic is in the dtype of the scales, but for the formats of four, six and eight bits of OCP and NVIDIA, which are decoded in bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.dtypes import TensorSpec
from streamconv.errors import CoverageError, UsageError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import DequantizeFloats, DequantizeIntegers
from streamconv.schemes.beside import Companions, read
from streamconv.schemes.compressed_presets import PRESETS
from streamconv.schemes.configs import quantizations
from streamconv.schemes.scheme import Group, Match, Scheme

Block = tuple[int, int]

_OWN = re.compile(r"(?:\.weight|_proj)(?:_packed|_scale|_zero_point|_shape|_g_idx|_global_scale)$")
_EXPRESSION = "re:"
_LINEAR, _EMBEDDING = "Linear", "Embedding"  # classes of modules
_FLOATS = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Weights:
    """How the weights of some modules are quantized, by a config.

    Attributes:
        bits: of a code.
        strategy: what shares a scale: tensor, channel, group or block.
        size: rows and columns that do, where the config says it.
    """

    bits: int
    strategy: str
    size: Block | None

    def block(self, shape: tuple[int, ...], scales: TensorSpec) -> Block:
        """Rows and columns of a matrix that share a scale. Raises CoverageError where the scales' shape is another."""
        *_, rows, columns = shape
        usual = {"tensor": (rows, columns), "channel": (1, columns)}
        block = self.size or usual.get(self.strategy)
        counts = (-(-rows // block[0]), -(-columns // block[1])) if block else (0, 0)
        stacked = (*shape[:-2], *counts)
        allowed = [stacked] + ([stacked[:-1]] if counts[1] == 1 else []) + ([(), (1,)] if counts == (1, 1) and len(shape) == 2 else [])
        if block is None or scales.shape not in allowed:
            sizes = " x ".join(map(str, shape))
            raise CoverageError(f"{sizes} values take scales {list(stacked)} by config.json ({self.strategy}), found {scales}")
        return block


@dataclass(frozen=True)
class Packed(Group):
    """Integers, or their codes in bytes, with scales, zero points and groups of columns."""

    weights: Weights
    roles: Mapping[str, str]

    def decode(self, nodes: Mapping[str, AnyNode], dtype: str) -> AnyNode:
        """See `Group.decode`."""
        codes, scales = nodes[self.roles["codes"]], nodes[self.roles["scale"]]
        shape, along = codes.spec.shape, "bytes"
        if "shape" in self.roles:
            rows, columns = (int(size) for size in read(self.roles["shape"], nodes).reshape(-1)[-2:])
            shape, along = (*codes.spec.shape[:-2], rows, columns), "columns"
            if codes.spec.shape[-2:] != (rows, -(-columns * self.weights.bits // 32)):
                raise CoverageError(
                    f"{self.roles['shape']} says {rows} x {columns} of {self.weights.bits} bits, the codes are {codes.spec}"
                )
        block = self.weights.block(shape, scales.spec)
        inputs, zeros, index = [codes, scales], "", ""
        if "zero" in self.roles:
            zeros = "bytes" if along == "bytes" else "rows"
            inputs.append(nodes[self.roles["zero"]])
        if "groups" in self.roles and self._has_groups(nodes, shape[-1], -(-shape[-1] // block[1])):
            index = "columns"
            inputs.append(nodes[self.roles["groups"]])
        offset = 1 << self.weights.bits - 1 if along == "columns" else 0
        op = DequantizeIntegers(shape, dtype, self.weights.bits, along, block, zeros, offset, 0, index)
        return apply(op, *inputs)

    def _has_groups(self, nodes: Mapping[str, AnyNode], columns: int, count: int) -> bool:
        """Whether columns have groups of their own: where one is -1, none have. Raises CoverageError where a group is none."""
        groups = read(self.roles["groups"], nodes).reshape(-1)
        if (groups == -1).any():
            return False
        if len(groups) != columns or groups.min() < 0 or groups.max() >= count:
            raise CoverageError(f"{self.roles['groups']} has other groups than 0 to {count - 1}, or not {columns} of them")
        return True


@dataclass(frozen=True)
class Scaled(Group):
    """Small floats with scales, and perhaps a scale of all scales."""

    weights: Weights
    codes: str
    through: str

    def decode(self, nodes: Mapping[str, AnyNode], dtype: str) -> AnyNode:
        """See `Group.decode`."""
        codes, scales, *whole = (nodes[name] for name in self.tensors)
        *stack, rows, columns = codes.spec.shape
        per, nbytes = {"float4_e2m1fn": (2, 1), "float6_e2m3fn": (4, 3)}.get(self.codes, (1, 1))
        shape = (*stack, rows, columns // nbytes * per)
        block = self.weights.block(shape, scales.spec)
        op = DequantizeFloats(shape, dtype, self.codes, block, self.through, "divides" if whole else "")
        return apply(op, codes, scales, *whole)


class CompressedTensors(Scheme):
    """Whatever of compressed-tensors' formats a checkpoint holds."""

    methods = ("compressed-tensors",)
    presets = PRESETS

    def match(self, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], title: str) -> Match:
        """See `Scheme.match`."""
        groups = _Groups(config, title)
        companions = Companions(specs, title)
        weights: list[Group] = []
        for name, spec in specs.items():
            stem = name.removesuffix("_packed")
            if name.endswith("weight_packed") or (spec.dtype.name in (*_FLOATS, "int8") and name.endswith("weight")):
                companions.take(name, [name])
                weights.append(_weight(stem, name, spec, groups.of(stem.removesuffix(".weight")), companions, specs, title))
        return companions.conclude(weights, _OWN)


SCHEME = CompressedTensors()


def _weight(
    target: str, name: str, spec: TensorSpec, weights: Weights, companions: Companions, specs: Mapping[str, TensorSpec], title: str
) -> Group:
    """A weight by the dtypes of its codes and scales."""
    scale = companions.need(name, [f"{target}_scale"])
    kind, scales = spec.dtype.name, specs[scale].dtype.name
    if kind in _FLOATS:
        through = "bfloat16" if scales == "uint8" else ""
        return Scaled(target, (name, scale), weights, kind, through)
    if kind == "uint8":
        if weights.bits not in (4, 6) or scales not in ("uint8", "float8_e4m3fn"):
            raise CoverageError(
                f"{title}: {name} is {spec} of {weights.bits} bits with scales in {scales}: expected 4 or 6 bits: mend the source"
            )
        whole = companions.need(name, [f"{target}_global_scale"]) if scales != "uint8" else None
        codes = "float6_e2m3fn" if weights.bits == 6 else "float4_e2m1fn"
        return Scaled(target, (name, scale, *([whole] if whole else [])), weights, codes, "bfloat16")
    if kind not in ("int8", "int32"):
        raise CoverageError(f"{title}: {name} is {spec}: expected codes in int32, int8, uint8 or float8")
    roles = {"codes": name, "scale": scale}
    if kind == "int32":
        roles["shape"] = companions.need(name, [f"{target}_shape"])
    for role, end in (("zero", "_zero_point"), ("groups", "_g_idx")):
        companion = companions.take(name, [f"{target}{end}"])
        if companion:
            roles[role] = companion
    return Packed(target, tuple(roles.values()), weights, roles)


class _Groups:
    """The groups of modules in a config."""

    def __init__(self, config: Mapping[str, Any], title: str) -> None:
        self._title = title
        section = next((section for _, section in quantizations(config)), {})
        table = section.get("config_groups")
        groups = [group for group in table.values() if isinstance(group, Mapping)] if isinstance(table, Mapping) else []
        self._group_of: dict[str, Mapping[str, Any]] = {}
        for group in groups:
            targets = group.get("targets")
            self._group_of |= {str(target): group for target in (targets if isinstance(targets, list) else [_LINEAR])}
        self._expressions = sorted(target for target in self._group_of if target.startswith(_EXPRESSION))
        self._classes = [target for target in self._group_of if "." not in target and target[:1].isupper()]
        if not groups:
            raise UsageError(f"{title}: config.json has no config_groups, which say how weights are quantized: mend it")

    def of(self, module: str) -> Weights:
        """How a module's weight is quantized. Raises CoverageError where no group is for it."""
        target = self._target_of(module)
        if target is not None:
            return self._read(self._group_of[target], module)
        raise CoverageError(f"{self._title}: {module} is quantized, and no group of config.json is for it: mend config_groups")

    def _target_of(self, module: str) -> str | None:
        """The target that the library takes for a module: its name, else the first expression in order of text, else its class."""
        if module in self._group_of:
            return module
        own = _EMBEDDING if "embed" in module.rpartition(".")[2] else _LINEAR
        classes = [own] if own in self._classes else self._classes
        return next((target for target in self._expressions if _is_for(target, module)), None) or next(iter(classes), None)

    def _read(self, group: Mapping[str, Any], module: str) -> Weights:
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            raise CoverageError(f"{self._title}: {module} is quantized, and its group of config.json has no weights")
        bits, strategy = weights.get("num_bits", 8), str(weights.get("strategy") or "tensor")
        if not isinstance(bits, int) or not 1 <= bits <= 8:
            raise CoverageError(f"{self._title}: {module}: num_bits of config.json is {bits!r}: expected 1 to 8")
        size: Block | None = None
        if strategy in ("group", "tensor_group"):
            size = 1, self._number(weights.get("group_size"), "group_size", module)
        elif strategy == "block":
            size = self._block(weights.get("block_structure"), module)
        elif strategy not in ("tensor", "channel"):
            raise CoverageError(f"{self._title}: {module}: strategy {strategy!r} of config.json: expected tensor, channel, group or block")
        return Weights(bits, strategy, size)

    def _block(self, value: Any, module: str) -> Block:
        sizes = value.split("x") if isinstance(value, str) else value
        if not isinstance(sizes, list) or len(sizes) != 2:
            raise CoverageError(f"{self._title}: {module}: block_structure of config.json is {value!r}: expected rows and columns")
        rows, columns = (self._number(int(size) if str(size).isdecimal() else size, "block_structure", module) for size in sizes)
        return rows, columns

    def _number(self, value: Any, key: str, module: str) -> int:
        if type(value) is not int or not 0 < value < 2**31:
            raise CoverageError(f"{self._title}: {module}: {key} of config.json is {value!r}: expected a number of elements")
        return value


def _is_for(target: str, module: str) -> bool:
    """Whether an expression among the targets of a group is for a module: whether its name begins so."""
    try:
        return re.match(target.removeprefix(_EXPRESSION), module) is not None
    except re.error:
        return False
