"""Matrices stored as one-byte floats beside the scales of their blocks: paired by name, and turned into the numbers that they stand for.

A value is the code times the scale of its block, both as float32, rounded once. Which tensors are quantized is decided by what is there;
how large blocks are, by ``weight_block_size`` of the config: a size that was divided out of shapes is wrong wherever the last block is cut
off. Where no config says it, only a division that is exact, and the same for all matrices, is believed.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode, Node, apply
from streamconv.graph.ops import Dequantize, DequantizeFloats, Reshape
from streamconv.schemes.configs import quantizations
from streamconv.schemes.preset import Preset
from streamconv.schemes.scheme import Group, Match, Scheme

Block = tuple[int, int]

_CODES = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_NIBBLES = 32  # columns that share an exponent, where codes have four bits
_USUAL = 128  # rows and columns of a block that nearly all checkpoints have
_SCALE = re.compile(r"(?:_scale_inv|\.weight_scale|\.qscale_weight)$")
_ACTIVATION = re.compile(r"\.(?:(?:input|output|activation)_scale|input_scale_ub|qscale_act|[qkv]_scale)$|_activation_scale$")


@dataclass(frozen=True)
class Matrix(Group):
    """A matrix of one-byte floats, or a stack of them, and the scales of its blocks of so many rows and columns."""

    block: Block

    def decode(self, nodes: Mapping[str, AnyNode], dtype: str) -> AnyNode:
        """See `Group.decode`."""
        matrix, scales = (nodes[name] for name in self.tensors)
        op, counts = _op(matrix.spec.shape, self.block, dtype)
        if scales.spec.shape != counts:
            scales = apply(Reshape(counts), scales)
        return Node(_spec(op, matrix.spec, scales.spec), op, (matrix, scales))


@lru_cache(maxsize=1024)
def _op(shape: tuple[int, ...], block: Block, dtype: str) -> tuple[Dequantize, tuple[int, ...]]:
    """What makes numbers of a matrix and its scales, one op for all that are alike; and the shape of the scales."""
    op = Dequantize(shape, block, dtype)
    return op, op.blocks.counts


@lru_cache(maxsize=1024)
def _spec(op: Dequantize, *inputs: TensorSpec) -> TensorSpec:
    """What an op makes of such inputs. Raises CoverageError: they do not fit."""
    return op.infer(inputs)


@dataclass(frozen=True)
class Nibbles(Group):
    """A matrix of four-bit floats, two in a byte that is called an integer, with an exponent for each 32 of a row."""

    def decode(self, nodes: Mapping[str, AnyNode], dtype: str) -> AnyNode:
        """See `Group.decode`."""
        codes, scales = (nodes[name] for name in self.tensors)
        *stack, rows, nbytes = codes.spec.shape
        return apply(DequantizeFloats((*stack, rows, 2 * nbytes), dtype, "float4_e2m1fn", (1, _NIBBLES)), codes, scales)


def _config_of(left: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` of what `Fp8.presets` make."""
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [_USUAL, _USUAL],
        "modules_to_not_convert": list(left),
    }


class Fp8(Scheme):
    """One-byte floats beside the scales of their blocks, as transformers has them."""

    methods = ("fp8", "mxfp8", "fbgemm_fp8")
    codes = (*_CODES, "float8_e8m0fnu")
    presets = (
        # As transformers' `Fp8Quantize`, which passes over other sizes, and would read short blocks wrongly.
        Preset(
            "fp8", "fp8", "fp8", (_USUAL, _USUAL), ("", "float8_e4m3fn"), ("_scale_inv", "float32"), _config_of, rows=_USUAL,
            columns=_USUAL, leaves=True, keeps_stacks=True, by_module=False,
        ),
        # As vLLM's and SGLang's `normalize_e4m3fn_to_e4m3fnuz` make of it for AMD's cards; blocks at the ends may be short.
        Preset(
            "fp8_e4m3fnuz", "fp8", "fp8_fnuz", (_USUAL, _USUAL), ("", "float8_e4m3fnuz"), ("_scale_inv", "float32"), _config_of,
            keeps_stacks=True, follows=True, by_module=False,
        ),
    )  # fmt: skip

    def match(self, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], title: str) -> Match:
        """See `Scheme.match`."""
        scale_of = dict(_pair(specs, title))
        nibbles = dict(_pair_nibbles(specs))
        scales = {*scale_of.values(), *nibbles.values()}
        for name in specs:
            if name not in scales and name not in scale_of and _SCALE.search(name):
                raise CoverageError(f"{title}: {name} is the scale of {_weight_beside(name, specs)}: mend the source")
        blocks = _Blocks(config, title)
        block_of = blocks.of_all({name: (specs[name], specs[scale]) for name, scale in scale_of.items()})
        groups: list[Group] = [Matrix(name, (name, scale), block_of[name]) for name, scale in scale_of.items()]
        groups += [Nibbles(name, (name, scale)) for name, scale in nibbles.items()]
        beside = [name for name in specs if groups and name not in scale_of and _ACTIVATION.search(name)]
        return Match(groups, dict.fromkeys(beside, "a scale of activations, which an unquantized model has none of"))


SCHEME = Fp8()


def _pair(specs: Mapping[str, TensorSpec], title: str) -> Iterator[tuple[str, str]]:
    """Each quantized tensor, and the one that holds its scales."""
    for name, spec in specs.items():
        if spec.dtype.name not in _CODES:
            continue
        stem = name.removesuffix("weight")
        candidates = [f"{name}_scale_inv", f"{name}_scale", *([f"{stem}scale", f"{stem}qscale_weight"] if stem != name else [])]
        present = [other for other in candidates if other in specs]
        if len(present) != 1:
            what = f"{' and '.join(present)} could both be its scales" if present else f"there is no {candidates[0]} or {candidates[1]}"
            raise CoverageError(f"{title}: {name} is {spec}, and {what}: mend the source")
        if len(spec.shape) < 2:
            raise CoverageError(f"{title}: {name} is {spec}: expected a matrix, or a stack of matrices, of one-byte floats")
        yield name, present[0]


def _pair_nibbles(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, str]]:
    """Experts of four bits, as DeepSeek-V4 has them, and the tensors of their exponents."""
    for name, spec in specs.items():
        if spec.dtype.name != "int8" or not name.endswith(".weight") or len(spec.shape) < 2:
            continue
        beside = f"{name.removesuffix('weight')}scale"
        if beside not in specs:
            continue
        *outer, nbytes = spec.shape
        if specs[beside] == TensorSpec(DTYPES["float8_e8m0fnu"], (*outer, 2 * nbytes // _NIBBLES)):
            yield name, beside


def _weight_beside(scale: str, specs: Mapping[str, TensorSpec]) -> str:
    """What is wrong with the weight of a scale that none was found for, in words."""
    stem = _SCALE.sub("", scale)
    names = (stem, f"{stem}.weight") if not scale.endswith("_scale_inv") else (stem,)
    weight = next((name for name in names if name in specs), None)
    return f"{names[-1]}, which is not there" if weight is None else f"{weight}, which is {specs[weight]} and takes none"


class _Blocks:
    """How large blocks are: what a config says, for all matrices or for modules by their names, and what shapes do."""

    def __init__(self, config: Mapping[str, Any], title: str) -> None:
        self._title = title
        self._block_of: dict[str, Block] = {}
        for _, section in quantizations(config):
            for module, block in self._sizes(section, "", 0):
                if self._block_of.setdefault(module, block) != block:
                    raise CoverageError(
                        f"{title}: config.json gives blocks of {_by(self._block_of[module])} and of {_by(block)}: leave one"
                    )
        self._patterns = [module for module in self._block_of if module]

    def _sizes(self, section: Mapping[str, Any], module: str, depth: int) -> Iterator[tuple[str, Block]]:
        """The block sizes in a quantization's config, each with the module that it is for, "" for all."""
        for key, value in section.items():
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
        patterns = [pattern for pattern in self._patterns if _is_for(pattern, module)]
        return self._block_of.get(max(patterns, key=len) if patterns else "")

    def of_all(self, shapes: Mapping[str, tuple[TensorSpec, TensorSpec]]) -> dict[str, Block]:
        """The block of each matrix, of which there are its own spec and that of its scales."""
        blocks, open_shapes = {}, {}
        for name, (weight, scales) in shapes.items():
            block = self._block(name, weight, scales)
            if block is None:
                open_shapes[name] = weight, scales
            else:
                blocks[name] = block
        return blocks | self._common(open_shapes)

    def _block(self, name: str, weight: TensorSpec, scales: TensorSpec) -> Block | None:
        """The block of a matrix, or of a stack of them; None: neither the config nor the scales' shape alone say it."""
        *stack, rows, columns = weight.shape
        leading = tuple(stack)
        if scales.shape in ((), (1,)) and not stack:
            return rows, columns  # one scale for all
        block = self._of(name)
        if block:
            counts = (*stack, -(-rows // block[0]), -(-columns // block[1]))
            if scales.shape != counts:
                raise CoverageError(
                    f"{self._title}: {name} is {weight}, in blocks of {_by(block)} by config.json: "
                    f"expected scales {list(counts)}, found {scales}"
                )
            return block
        if scales.shape in (leading, (*leading, 1, 1)) and (stack or scales.shape):
            return rows, columns  # one for each matrix
        if scales.shape in ((*leading, rows), (*leading, rows, 1)):
            return 1, columns  # one for each row
        return None

    def _common(self, open_shapes: Mapping[str, tuple[TensorSpec, TensorSpec]]) -> dict[str, Block]:
        """The block that all matrices have of which nothing else says it: their sizes divided by those of their scales, without a rest."""
        lengths: list[tuple[int, str]] = [(0, ""), (0, "")]
        for name, (weight, scales) in open_shapes.items():
            if len(scales.shape) != len(weight.shape) or scales.shape[:-2] != weight.shape[:-2] or not scales.numel:
                raise CoverageError(f"{self._title}: {name} is {weight}, and its scales are {scales}: they do not go together")
            for axis in (0, 1):
                size, count = weight.shape[axis - 2], scales.shape[axis - 2]
                block, before = lengths[axis]
                exact = size % count == 0 and (not block or count == 1 or size // count == block)
                if not exact:
                    other = f", and {block} in {before}" if block and size % count == 0 else ""
                    raise CoverageError(
                        f"{self._title}: {name} is {weight} with scales {scales}: blocks of {size}/{count} {('rows', 'columns')[axis]}"
                        f"{other}: how large they are must stand in config.json (quantization_config.weight_block_size)"
                    )
                if count > 1:
                    lengths[axis] = size // count, name
        for axis in (0, 1):
            block, name = lengths[axis]
            counts = [(weight.shape[axis - 2], scales.shape[axis - 2]) for weight, scales in open_shapes.values()]
            if block not in (0, _USUAL) and all(-(-size // _USUAL) == count for size, count in counts):
                raise CoverageError(
                    f"{self._title}: {name}: blocks of {block} {('rows', 'columns')[axis]} fit its scales, and so do blocks of {_USUAL}, "
                    "the last cut off: which it is must stand in config.json (quantization_config.weight_block_size)"
                )
        return {
            name: (self._along(weight, scales, 0, lengths), self._along(weight, scales, 1, lengths))
            for name, (weight, scales) in open_shapes.items()
        }

    def _along(self, weight: TensorSpec, scales: TensorSpec, axis: int, lengths: list[tuple[int, str]]) -> int:
        """The block's size along one axis, which one scale for all of it leaves open."""
        return lengths[axis][0] if scales.shape[axis - 2] > 1 else weight.shape[axis - 2]


def _is_for(pattern: str, module: str) -> bool:
    """Whether a config's name for modules, a part of their names or one with ``*``, is that of a module."""
    return f".{pattern}." in f".{module}." or fnmatch.fnmatchcase(module, pattern)


def _by(block: Block) -> str:
    return f"{block[0]} x {block[1]}"
