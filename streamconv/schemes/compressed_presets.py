"""The presets of compressed-tensors that need no calibration, as its `model_free_ptq` computes and states them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from streamconv.schemes.preset import ALL, Preset

VERSION = "0.20.0"  # whose words the config is in
METHOD = "compressed-tensors"
_FLOAT, _PACKED, _SCALE = ("", "float8_e4m3fn"), ("_packed", "int32"), ("_scale", "")
_NIBBLES, _EXPONENT = ("_packed", "uint8"), ("_scale", "uint8")
_BY_ROW, _BY_BLOCK = (1, ALL), (128, 128)
_TOKENS = {"group_size": None, "strategy": "token", "dynamic": True}


def _arguments(bits: int, kind: str, **more: Any) -> dict[str, Any]:
    """What is said of weights or activations."""
    return {"num_bits": bits, "type": kind, "symmetric": True, "group_size": None, **more}


def _says(name: str, layout: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> Callable[[Sequence[str]], Any]:
    """What gives ``quantization_config`` for the modules that are left alone."""
    group = {
        "targets": ["Linear"],
        "weights": {**weights, "dynamic": False},
        "input_activations": activations,
        "output_activations": None,
        "format": layout,
    }

    def config(left: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "format": layout,
            "quantization_status": "compressed",
            "config_groups": {name: group},
            "ignore": list(left),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "transform_config": {},
            "moe_sparsity_config": None,
            "version": VERSION,
        }

    return config


def _integers(bits: int, name: str, **more: Any) -> Callable[[Sequence[str]], Any]:
    return _says(name, "pack-quantized", _arguments(bits, "int", **{"group_size": 128, "strategy": "group", **more}))


PRESETS = (
    Preset(
        "FP8_DYNAMIC", METHOD, "float8", _BY_ROW, _FLOAT, _SCALE,
        _says("FP8_DYNAMIC", "float-quantized", _arguments(8, "float", strategy="channel"), _arguments(8, "float", **_TOKENS)),
    ),
    Preset(
        "FP8_BLOCK", METHOD, "float8", _BY_BLOCK, _FLOAT, _SCALE,
        _says(
            "FP8_BLOCK", "float-quantized", _arguments(8, "float", strategy="block", block_structure=[*_BY_BLOCK]),
            _arguments(8, "float", **{**_TOKENS, "group_size": 128, "strategy": "group"}),
        ),
    ),
    Preset(
        "W8A8", METHOD, "int8", _BY_ROW, ("", "int8"), _SCALE,
        _says("W8A8", "int-quantized", _arguments(8, "int", strategy="channel"), _arguments(8, "int", **_TOKENS)),
    ),
    Preset("W8A16", METHOD, "int8", (1, 128), _PACKED, _SCALE, _integers(8, "W8A16"), shape="_shape", columns=128),
    Preset("W4A16", METHOD, "int4", (1, 128), _PACKED, _SCALE, _integers(4, "W4A16"), shape="_shape", bits=4, columns=128),
    Preset(
        "W4A16_ASYM", METHOD, "int4_asymmetric", (1, 128), _PACKED, _SCALE, _integers(4, "W4A16_ASYM", symmetric=False),
        zeros="_zero_point", shape="_shape", bits=4, columns=128,
    ),
    Preset(
        "NVFP4A16", METHOD, "nvfp4", (1, 16), _NIBBLES, ("_scale", "float8_e4m3fn"),
        _says(
            "NVFP4A16", "nvfp4-pack-quantized",
            _arguments(4, "float", group_size=16, strategy="tensor_group", scale_dtype="torch.float8_e4m3fn"),
        ),
        shared="_global_scale", bits=4, columns=16,
    ),
    Preset(
        "MXFP4A16", METHOD, "mxfp4", (1, 32), _NIBBLES, _EXPONENT,
        _says("MXFP4A16", "mxfp4-pack-quantized", _arguments(4, "float", group_size=32, strategy="group", scale_dtype="torch.uint8")),
        bits=4, columns=32,
    ),
    Preset(
        "MXFP8A16", METHOD, "mxfp8", (1, 32), _FLOAT, _EXPONENT,
        _says("MXFP8A16", "mxfp8-quantized", _arguments(8, "float", group_size=32, strategy="group", scale_dtype="torch.uint8")),
        columns=32,
    ),
)  # fmt: skip
