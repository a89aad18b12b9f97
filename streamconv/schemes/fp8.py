"""Matrices stored as one-byte floats beside the scales of their blocks: paired by name, and turned into the numbers that they stand for.

A value is the code times the scale of its block, both as float32, rounded once. Which tensors are quantized is decided by what is there;
how large blocks are, by ``weight_block_size`` of the config: a size that was divided out of shapes is wrong wherever the last block is cut
off. Where no config says it, only a division that is exact, and the same for all matrices, is believed.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from streamconv.dtypes import CASTABLE, TensorSpec, parse_dtype
from streamconv.errors import CoverageError, UsageError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import Dequantize, Reshape

METHODS = ("fp8", "mxfp8", "fbgemm_fp8")
"""What ``quant_method`` calls this arithmetic."""
KEYS = ("quantization_config", "compression_config")
"""Of a config: what belongs to a quantization, and to nothing else."""
Block = tuple[int, int]

_CODES = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_USUAL = 128  # rows and columns of a block that nearly all checkpoints have
_SCALE = re.compile(r"(?:_scale_inv|\.weight_scale|\.qscale_weight)$")
_ACTIVATION = re.compile(r"\.(?:(?:input|output|activation)_scale|input_scale_ub|qscale_act|[qkv]_scale)$|_activation_scale$")


def find_method(config: Mapping[str, Any]) -> str | None:
    """What a config says of quantization, in itself or in those nested in it; None: nothing."""
    for _, found in _quantizations(config):
        return str(found.get("quant_method") or found.get("quant_algo") or found.get("format") or "a method without a name")
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, and those nested in it, without what says that tensors are quantized."""
    kept = {key: value for key, value in config.items() if key not in KEYS}
    return {key: without_quantization(value) if isinstance(value, dict) else value for key, value in kept.items()}


def model_dtype(config: Mapping[str, Any], title: str) -> str:
    """The dtype that a config gives its model; bfloat16 where it gives none.

    Raises:
        UsageError: it is none that numbers can be made in.
    """
    text = config.get("text_config")
    for known in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(said := known.get(key), str):
                dtype = parse_dtype(said).name
                if dtype not in CASTABLE:
                    raise UsageError(f"{title}: config.json says {key} {said}: expected one of {', '.join(CASTABLE)}; --dtype chooses one")
                return dtype
    return "bfloat16"


@dataclass
class Decoded:
    """What dequantizing leaves: the tensors, and the names of those that only served the quantization, with the reason."""

    nodes: dict[str, AnyNode]
    dropped: dict[str, str] = field(default_factory=dict)


def decode(nodes: Mapping[str, AnyNode], config: Mapping[str, Any], dtype_of: Callable[[str], str], title: str) -> Decoded:
    """All tensors, those that are quantized as numbers of the dtype that ``dtype_of`` gives for their names, others as they are.

    Raises:
        CoverageError: a weight without scales or scales without their weight, or whose blocks cannot be told.
    """
    scale_of = dict(_pair(nodes, title))
    used = set(scale_of.values())
    for name in nodes:
        if name not in used and name not in scale_of and _SCALE.search(name):
            raise CoverageError(f"{title}: {name} is the scale of {_weight_beside(name, nodes)}: mend the source")
    blocks = _Blocks(config, title)
    shapes = {name: (nodes[name].spec, nodes[scale].spec) for name, scale in scale_of.items()}
    common = blocks.common(shapes)
    found = Decoded({})
    for name, node in nodes.items():
        if name in scale_of:
            scale = nodes[scale_of[name]]
            block = blocks.block(name, node.spec, scale.spec) or common[name]
            op = Dequantize(node.spec.shape, block, dtype_of(name))
            counts = op.blocks.counts
            scales = scale if scale.spec.shape == counts else apply(Reshape(counts), scale)
            found.nodes[name] = apply(op, node, scales)
        elif scale_of and _ACTIVATION.search(name):
            found.dropped[name] = "a scale of activations, which an unquantized model has none of"
        elif name not in used:
            found.nodes[name] = node
    return found


def _pair(nodes: Mapping[str, AnyNode], title: str) -> Iterator[tuple[str, str]]:
    """Each quantized tensor, and the one that holds its scales."""
    for name, node in nodes.items():
        if node.spec.dtype.name not in _CODES:
            continue
        stem = name.removesuffix("weight")
        known = [f"{name}_scale_inv", f"{name}_scale", *([f"{stem}scale", f"{stem}qscale_weight"] if stem != name else [])]
        there = [other for other in known if other in nodes]
        if len(there) != 1:
            what = f"{' and '.join(there)} could both be its scales" if there else f"there is no {known[0]} or {known[1]}"
            raise CoverageError(f"{title}: {name} is {node.spec}, and {what}: mend the source")
        if len(node.spec.shape) < 2:
            raise CoverageError(f"{title}: {name} is {node.spec}: expected a matrix, or a stack of matrices, of one-byte floats")
        yield name, there[0]


def _weight_beside(scale: str, nodes: Mapping[str, AnyNode]) -> str:
    """What is wrong with the weight of a scale that none was found for, in words."""
    stem = _SCALE.sub("", scale)
    names = (stem, f"{stem}.weight") if not scale.endswith("_scale_inv") else (stem,)
    there = next((name for name in names if name in nodes), None)
    return f"{names[-1]}, which is not there" if there is None else f"{there}, which is {nodes[there].spec} and takes none"


class _Blocks:
    """How large blocks are: what a config says, for all matrices or for modules by their names, and what shapes do."""

    def __init__(self, config: Mapping[str, Any], title: str) -> None:
        self._title = title
        self._said: dict[str, Block] = {}
        for _, found in _quantizations(config):
            for module, block in self._sizes(found, "", 0):
                if self._said.setdefault(module, block) != block:
                    raise CoverageError(f"{title}: config.json gives blocks of {_by(self._said[module])} and of {_by(block)}: leave one")

    def _sizes(self, given: Mapping[str, Any], module: str, depth: int) -> Iterator[tuple[str, Block]]:
        """The block sizes in a quantization's config, each with the module that it is for, "" for all."""
        for key, value in given.items():
            if key == "weight_block_size" and isinstance(value, Mapping):
                yield from ((str(name), self._read(size)) for name, size in value.items())
            elif key == "weight_block_size" and value is not None:
                yield module, self._read(value)
            elif isinstance(value, Mapping) and depth < 4:
                yield from self._sizes(value, key, depth + 1)

    def _read(self, value: Any) -> Block:
        sizes = tuple(value) if isinstance(value, list | tuple) else ()
        if len(sizes) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in sizes):
            raise CoverageError(f"{self._title}: weight_block_size of config.json is {value!r}: expected two numbers, rows and columns")
        return sizes[0], sizes[1]

    def _of(self, name: str) -> Block | None:
        """What is said of a tensor: for its module, else for all."""
        module = name.removesuffix(".weight")
        fitting = [known for known in self._said if known and _is_for(known, module)]
        return self._said.get(max(fitting, key=len) if fitting else "")

    def block(self, name: str, weight: TensorSpec, scales: TensorSpec) -> Block | None:
        """The block of a matrix, or of a stack of them; None: neither the config nor the scales' shape alone say it."""
        *stack, rows, columns = weight.shape
        alone = tuple(stack)
        if scales.shape in ((), (1,)) and not stack:
            return rows, columns  # one scale for all
        said = self._of(name)
        if said:
            wanted = (*stack, -(-rows // said[0]), -(-columns // said[1]))
            if scales.shape != wanted:
                raise CoverageError(
                    f"{self._title}: {name} is {weight}, in blocks of {_by(said)} by config.json: "
                    f"expected scales {list(wanted)}, found {scales}"
                )
            return said
        if scales.shape in (alone, (*alone, 1, 1)) and (stack or scales.shape):
            return rows, columns  # one for each matrix
        if scales.shape in ((*alone, rows), (*alone, rows, 1)):
            return 1, columns  # one for each row
        return None

    def common(self, shapes: Mapping[str, tuple[TensorSpec, TensorSpec]]) -> dict[str, Block]:
        """The block that all matrices have of which nothing else says it: their sizes divided by those of their scales, without a rest."""
        unsaid = {name: specs for name, specs in shapes.items() if self.block(name, *specs) is None}
        found: list[tuple[int, str]] = [(0, ""), (0, "")]
        for name, (weight, scales) in unsaid.items():
            if len(scales.shape) != len(weight.shape) or scales.shape[:-2] != weight.shape[:-2] or not scales.numel:
                raise CoverageError(f"{self._title}: {name} is {weight}, and its scales are {scales}: they do not go together")
            for axis in (0, 1):
                size, count = weight.shape[axis - 2], scales.shape[axis - 2]
                block, before = found[axis]
                exact = size % count == 0 and (not block or count == 1 or size // count == block)
                if not exact:
                    other = f", and {block} in {before}" if block and size % count == 0 else ""
                    raise CoverageError(
                        f"{self._title}: {name} is {weight} with scales {scales}: blocks of {size}/{count} {('rows', 'columns')[axis]}"
                        f"{other}: how large they are must stand in config.json (quantization_config.weight_block_size)"
                    )
                if count > 1:
                    found[axis] = size // count, name
        for axis in (0, 1):
            block, name = found[axis]
            counts = [(weight.shape[axis - 2], scales.shape[axis - 2]) for weight, scales in unsaid.values()]
            if block not in (0, _USUAL) and all(-(-size // _USUAL) == count for size, count in counts):
                raise CoverageError(
                    f"{self._title}: {name}: blocks of {block} {('rows', 'columns')[axis]} fit its scales, and so do blocks of {_USUAL}, "
                    "the last cut off: which it is must stand in config.json (quantization_config.weight_block_size)"
                )
        return {
            name: (self._along(weight, scales, 0, found), self._along(weight, scales, 1, found))
            for name, (weight, scales) in unsaid.items()
        }

    def _along(self, weight: TensorSpec, scales: TensorSpec, axis: int, found: list[tuple[int, str]]) -> int:
        """The block's size along one axis, which one scale for all of it leaves open."""
        return found[axis][0] if scales.shape[axis - 2] > 1 else weight.shape[axis - 2]


def _quantizations(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each config of a quantization in a config, the outermost first, and its key."""
    for key in KEYS:
        if isinstance(config.get(key), Mapping) and config[key]:
            yield key, config[key]
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in KEYS and depth < 4:
            yield from _quantizations(value, depth + 1)


def _is_for(pattern: str, module: str) -> bool:
    """Whether a config's name for modules, a part of their names or one with ``*``, is that of a module."""
    return f".{pattern}." in f".{module}." or fnmatch.fnmatchcase(module, pattern)


def _by(block: Block) -> str:
    return f"{block[0]} x {block[1]}"
