"""Whether a checkpoint is quantized, by what its config says or its tensors look like, and which tensors belong to that."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.schemes.configs import find_method
from streamconv.schemes.registry import of_codes, schemes
from streamconv.schemes.scheme import Scheme

_WHOLE = ("int8", "uint8", "int16", "int32", "uint32")
# What stands beside codes called X in a module M: X + one of these, or M + "." + one of these.
_AFTER = (
    "_scale",
    "_scale_inv",
    "_scales",
    "_scb",
    "_absmax",
    "_quant_map",
    ".absmax",
    ".quant_map",
    ".scb",
    ".scale",
    "._scale",
    ".scales",
)
_BESIDE = (
    "scale", "scales", "zero", "zeros", "qzeros", "scb", "absmax", "quant_map", "weight_scale", "weight_scales", "weight_scale_inv",
    "weight_zero_point", "weight_global_scale", "weight_shape", "scale_inv", "qscale_weight", "qweight_type", "codebooks", "centroids",
    "_scale", "weight._scale", "tables", "meta",
)  # fmt: skip
_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")  # beside codes of any dtype
_STEMS = re.compile(r"(?:_blocks|_packed|\._data|_qdata|_data)$")
_MODULE = re.compile(r"\.[^.]+$")
_CODED = re.compile(r"\.(?:qweight|W_q|weight_packed|codes)$|_blocks$")
_PACKED = re.compile(r"(.*?)(qweight|(?:weight|_proj)_packed)", re.DOTALL)
"""Codes in words, by the names of their libraries: how many bits each has only a config says."""
_COMPANIONS = {
    "qweight": ("qzeros", "scales", "g_idx"),
    "weight_packed": ("weight_scale", "weight_shape", "weight_global_scale", "weight_zero_point"),
    "_proj_packed": ("_proj_scale", "_proj_shape", "_proj_global_scale", "_proj_zero_point"),
}


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized, and what says so.

    Attributes:
        method: what its library calls it.
        where: what says so.
        codes: a dtype of codes that told it.
        lacks_config: names told it, and only a config, which is not there, says how codes are packed.
    """

    method: str
    where: str
    codes: str = ""
    lacks_config: bool = False

    @property
    def scheme(self) -> Scheme | None:
        """What can be made of it, if that is known here."""
        return None if self.lacks_config else schemes().get(self.method) or of_codes(self.codes)

    @property
    def remedy(self) -> str:
        """What to do where nothing can be made of it."""
        if self.lacks_config:
            return "no quantization_config says how codes are packed: put the model's config.json beside them, or give --sidecars-from DIR"
        return f"known are {', '.join(schemes())}; the library that made it can dequantize it"

    def __str__(self) -> str:
        if self.lacks_config:
            return f"its tensors look like {self.method} ({self.where})"
        return f"quantized by {self.method} ({self.where})"


def find_quantization(
    config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]], specs: Mapping[str, TensorSpec]
) -> Quantization | None:
    """How a checkpoint is quantized; None: it is not.

    Args:
        config: its config.json.
        files: others of `configs.FILES` beside it, by name.
        specs: its tensors.
    """
    method = find_method(config)
    if method:
        return Quantization(method, "by config.json")
    for name, contents in files.items():
        if contents:
            inner = contents.get("quantization")
            section = inner if isinstance(inner, Mapping) else contents
            method = next((section[key] for key in ("quant_method", "quant_algo", "method") if section.get(key)), None)
            return Quantization(str(method or name.removesuffix(".json")), name)
    packed = _find_packed(specs)
    if packed is not None:
        return packed
    codes = codes_in(specs)
    if codes:
        name, beside = next(iter(codes.items()))
        where = f"{name} is {specs[name]}" + (f", beside {beside}" if beside else "")
        return Quantization(_guess(name, beside, specs[name]), where, specs[name].dtype.name)
    return None


def quantized_tensors(specs: Mapping[str, TensorSpec]) -> set[str]:
    """The tensors that belong to a quantization: codes, and all that stands beside them, but for biases."""
    codes = codes_in(specs)
    heads = {_MODULE.sub("", _STEMS.sub("", name)) + "." for name in codes}
    names = {*codes, *filter(None, codes.values())}
    for name in specs:
        inside = any(name.startswith(head) for head in _heads(name) & heads)
        if inside and not name.endswith(("bias", "layernorm.weight", "norm.weight")):
            names.add(name)
    return names


def _heads(name: str) -> set[str]:
    """The modules that a tensor may stand in: ``a.b.`` and ``a.`` of ``a.b.c``."""
    parts = name.split(".")
    return {".".join(parts[:count]) + "." for count in range(max(1, len(parts) - 4), len(parts))}


def codes_in(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The tensors that hold codes instead of numbers, and what stands beside each."""
    lower = {name.lower(): name for name in specs}
    states = {name.rpartition(".quant_state.")[0]: name for name in specs if name.endswith(_STATES)}
    beside_of = {}
    for name, spec in specs.items():
        if name in states:
            beside_of[name] = states[name]
            continue
        if spec.dtype.name not in DTYPES:  # blocks of a container's own
            if of_codes(spec.dtype.name):
                beside_of[name] = ""
            continue
        is_narrow = spec.dtype.floating and spec.dtype.name not in (*CASTABLE, "float8_e8m0fnu")
        if not is_narrow and spec.dtype.name not in _WHOLE:
            continue
        beside = _beside(name, lower)
        is_called_so = name.endswith("weight") if is_narrow else _CODED.search(name) is not None
        if beside or is_called_so:
            beside_of[name] = beside
    return beside_of


def _beside(name: str, lower: Mapping[str, str]) -> str:
    """The first tensor beside another that a quantization of that has; "": there is none."""
    small = name.lower()
    for start, ends in _places_beside(small):
        for end in ends:
            near = start + end
            if near in lower and near != small:
                return lower[near]
    return ""


def _places_beside(small: str) -> Iterator[tuple[str, Sequence[str]]]:
    """What names beside a tensor begin with, the nearest first, and how they end."""
    yield small, _AFTER
    yield _STEMS.sub("", small), _AFTER
    yield f"{_MODULE.sub('', small)}.", _BESIDE


def _find_packed(specs: Mapping[str, TensorSpec]) -> Quantization | None:
    """The quantization whose library calls its tensors so, by the first of its codes."""
    for name, spec in specs.items():
        match = _PACKED.fullmatch(name) if spec.dtype.name in _WHOLE else None
        if match is None:
            continue
        stem, kind = match.groups()
        beside = [ending for ending in _COMPANIONS[kind] if stem + ending in specs]
        if beside:
            method = "compressed-tensors"
            if kind == "qweight":  # rows of codes have as many columns as their scales, columns of codes as many as their zeros
                zeros = specs.get(f"{stem}qzeros")
                method = "AWQ" if zeros and zeros.shape[1:] == spec.shape[1:] else "GPTQ"
            return Quantization(method, f"{name} is {spec}, beside {', '.join(beside)}", spec.dtype.name, lacks_config=True)
    return None


def _guess(name: str, beside: str, spec: TensorSpec) -> str:
    """What a quantization looks like that nothing names."""
    own = of_codes(spec.dtype.name)
    if own and (beside or spec.dtype.name not in DTYPES):
        return own.methods[0]
    if spec.dtype.name.startswith("float8"):
        return "a cast to float8"
    if name.endswith("_blocks"):
        return "mxfp4"
    if beside.lower().endswith(("absmax", "quant_map", "scb")):
        return "bitsandbytes"
    if name.endswith("W_q"):
        return "HQQ"
    return f"codes of {spec.dtype}"
