"""What of a checkpoint is quantized, in what way, and whether its config says so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from streamconv.checkpoint.entries import TensorEntry
from streamconv.checkpoint.opening import CONFIG, Checkpoint, read_config
from streamconv.diagnose.findings import Finding
from streamconv.dtypes import TensorSpec
from streamconv.errors import StreamconvError
from streamconv.graph.node import AnyNode, Node
from streamconv.graph.ops import Dequantize, DequantizeBlocks, DequantizeFloats, DequantizeIntegers, DequantizeQuantiles
from streamconv.schemes.configs import FILES, model_dtype, quantizations, with_files
from streamconv.schemes.decoding import decode
from streamconv.schemes.detection import Quantization, codes_in, find_quantization

_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "modules_to_not_quantize")
"""Keys under which configs list modules that are not quantized."""
_SCALES = re.compile(r"scale|absmax|SCB$", re.IGNORECASE)
PIECE = 8 << 20  # bytes of a tensor that are looked at together
_USUAL = ("lm_head", "embed_tokens", "norm")  # which such lists name whether a model has them or not
_SHORT = {"float8_e4m3fn": "fp8", "float8_e5m2": "fp8 e5m2", "float4_e2m1fn": "fp4", "float6_e2m3fn": "fp6"}


def describe_quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """How weights are quantized, how many in each way, and the bytes that all tensors would take with these as numbers.

    None: they are not, or it cannot be told, which doctor does then.
    """
    config, quantization = _quantization_of(checkpoint)
    if quantization is None or quantization.scheme is None:
        return None
    nodes = checkpoint.components.get("", checkpoint.contents).entries
    try:
        dtype = model_dtype(config, "")
        match = quantization.scheme.match(config, {name: node.spec for name, node in nodes.items()}, "")
        decoded = [(group, group.decode(nodes, dtype)) for group in match.groups]
    except StreamconvError:
        return None
    ways = Counter(describe_way(node) for _, node in decoded)
    gone = {name for group, _ in decoded for name in group.tensors} | match.dropped.keys()
    nbytes = sum(node.spec.nbytes for _, node in decoded) + sum(node.spec.nbytes for name, node in nodes.items() if name not in gone)
    description = {"method": quantization.method, "weights": dict(ways.most_common()), "dtype": dtype, "dequantized_size": nbytes}
    return description if ways else None


def describe_way(node: AnyNode) -> str:
    """How a weight is quantized, by the op that decodes it: ``int4 g128 sym``."""
    while isinstance(node, Node):
        op, shape = node.op, getattr(node.op, "shape", (1, 1))
        if isinstance(op, DequantizeIntegers):
            of_inputs = op.along in {"rows", "awq"}  # whose op has rows and columns exchanged
            block = op.block[::-1] if of_inputs else op.block
            return f"int{op.bits} {_share(block, shape[::-1][:2] if of_inputs else shape[-2:])} {'asym' if op.zeros else 'sym'}"
        if isinstance(op, DequantizeFloats):
            return f"{_SHORT.get(op.codes, op.codes)} {_share(op.block, shape[-2:])}"
        if isinstance(op, Dequantize):
            return f"{_SHORT.get(node.inputs[0].spec.dtype.name, node.inputs[0].spec.dtype.name)} {_share(op.block, shape[-2:])}"
        if isinstance(op, DequantizeQuantiles):
            return f"{'nf4' if op.table[0] == -1 else 'fp4'} g{op.block}{', scales quantized' if op.inner else ''}"
        if isinstance(op, DequantizeBlocks):
            return op.codes
        node = node.inputs[0]
    return "as it is"


def _share(block: tuple[int, int], shape: tuple[int, ...]) -> str:
    """What shares a scale, in words."""
    rows, columns = shape
    if block[0] >= rows and block[1] >= columns:
        return "per tensor"
    if block[1] >= columns:
        return "per channel"
    return f"g{block[1]}" if block[0] == 1 else f"{block[0]}x{block[1]}"


def check_quantization(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What a config says of quantization against the tensors."""
    config, quantization = _quantization_of(checkpoint)
    if quantization is None:
        return
    nodes = checkpoint.components.get("", checkpoint.contents).entries
    specs = {name: node.spec for name, node in nodes.items()}
    codes = codes_in(specs)
    if not codes:
        if quantization.method != "fp8":  # which `contradictions` tells of
            what = f"it says that weights are quantized by {quantization.method}, and none is"
            yield Finding(what, CONFIG, "loaders would look for scales", "remove quantization_config")
        return
    if quantization.scheme is None:
        if quantization.lacks_config or (quantization.codes in ("int8", "uint8") and next(iter(codes)).endswith("weight")):
            what = f"{quantization}, and no quantization_config is there"
            yield Finding(what, CONFIG, "loaders would take codes for numbers", "get the config that belongs to it")
        yield from _check_lists(config, specs)
        return
    try:
        decoded = decode(quantization.scheme, nodes, config, lambda _: "bfloat16", CONFIG)
    except StreamconvError as error:
        text = str(error).removeprefix(f"{CONFIG}: ").removesuffix(": mend the source")
        yield Finding(text, CONFIG, "its weights cannot be told", "get the file with what is missing, or the config that belongs to it")
        return
    if not decoded.made_of:
        what = f"it says that weights are quantized by {quantization.method}, and none is"
        yield Finding(what, CONFIG, "loaders would look for scales", "remove quantization_config")
    yield from _check_lists(config, specs)


def check_scales(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Scales that are zero, NaN or infinite, from one pass over them."""
    config, quantization = _quantization_of(checkpoint)
    if quantization is None or quantization.scheme is None:
        return
    entries = checkpoint.components.get("", checkpoint.contents).entries
    with suppress(StreamconvError):  # which is told from names and shapes
        for group in quantization.scheme.match(config, {name: node.spec for name, node in entries.items()}, CONFIG).groups:
            for name in group.tensors[1:]:
                if _SCALES.search(name) and name in checkpoint:
                    yield from _check_numbers(name, checkpoint[name], group.target)


def _check_numbers(name: str, entry: TensorEntry, target: str) -> Iterator[Finding]:
    """What of the scales of a weight cannot be one."""
    import numpy as np

    from streamconv.graph.codes import factors

    dtype = entry.spec.dtype
    if not (dtype.floating or dtype.name == "uint8") or dtype.is_packed:
        return
    bad = zeros = 0
    for piece in entry.pieces(PIECE):
        with np.errstate(all="ignore"):  # what is infinite is counted
            values = factors(piece.reshape(-1).view(f"u{dtype.nbytes}"), dtype.name)
        bad += int(np.count_nonzero(~np.isfinite(values)))
        zeros += int(np.count_nonzero(values == 0))
    if bad and not (dtype.floating and dtype.name != "float8_e8m0fnu"):  # of others that is told of as of all tensors
        yield Finding(f"{bad} of {entry.spec.numel} scales are NaN or infinite", name, f"so are weights of {target}", "get it again")
    if zeros:
        what = f"{zeros} of {entry.spec.numel} scales are zero"
        yield Finding(what, name, f"so are all weights of {target} that they scale", "compare it with its source, or get it again")


def _check_lists(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Iterator[Finding]:
    """Names of modules that are not quantized, of which there are none."""
    for _, section in quantizations(config):
        for key in _LISTS:
            listed = section.get(key)
            for name in listed if isinstance(listed, list) else ():
                is_plain = isinstance(name, str) and name and not any(mark in name for mark in ":*[(\\^$")
                if is_plain and not any(usual in name for usual in _USUAL) and not any(name in other for other in specs):
                    what = f"{key} names {name}, which no tensor is below"
                    yield Finding(what, CONFIG, "it may be the list of another model", "compare it with the model's modules", problem=False)


def _quantization_of(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], Quantization | None]:
    """A checkpoint's config, with what stands beside it, and how it is quantized."""
    config = with_files(checkpoint.config, {name: read_config(checkpoint.folder, name) for name in FILES})
    specs = {name: node.spec for name, node in checkpoint.components.get("", checkpoint.contents).entries.items()}
    return config, find_quantization(config, {}, specs)
