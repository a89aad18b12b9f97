"""What configs say of quantization, in whatever way it is done, and of the dtype of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from streamconv.dtypes import CASTABLE, parse_dtype
from streamconv.errors import UsageError

_COMPRESSION = "compression_config"
KEYS = ("quantization_config", _COMPRESSION)
"""Of a config: what belongs to a quantization, and to nothing else."""
FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
"""What says of a checkpoint that it is quantized, beside its config.json."""
DTYPES = ("dtype", "torch_dtype")
"""Of a config: what says the dtype of a model's numbers."""


def with_files(config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A config with what another file says of quantization, where it says nothing itself.

    Args:
        config: config.json.
        files: others of `FILES` beside it, by name.
    """
    if find_method(config) is None:
        for name, contents in files.items():
            inner = contents.get("quantization")
            section = dict(inner if isinstance(inner, Mapping) else contents)
            if section:
                method = section.get("quant_method") or section.get("method") or _method_of(name, section)
                return {**config, KEYS[0]: {**section, "quant_method": method}}
    return dict(config)


def _method_of(name: str, section: Mapping[str, Any]) -> str:
    """The method of a file of its own that does not name it."""
    if name == "hf_quant_config.json":
        return "modelopt"
    if "w_bit" in section or "q_group_size" in section:
        return "awq"
    return "gptq" if "bits" in section and "group_size" in section else name.removesuffix(".json")


def find_method(config: Mapping[str, Any]) -> str | None:
    """What a config says of quantization, in itself or in those nested in it; None: nothing."""
    for key, section in quantizations(config):
        usual = "compressed-tensors" if key == _COMPRESSION else "a method without a name"
        return str(section.get("quant_method") or section.get("quant_algo") or usual)
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, and those nested in it, without what says that tensors are quantized."""
    rest = {key: value for key, value in config.items() if key not in KEYS}
    return {key: without_quantization(value) if isinstance(value, dict) else value for key, value in rest.items()}


def model_dtype(config: Mapping[str, Any], title: str) -> str:
    """The dtype that a config gives its model; bfloat16 where it gives none.

    Raises:
        UsageError: it is none that numbers can be made in.
    """
    text = config.get("text_config")
    for section in (config, text if isinstance(text, Mapping) else {}):
        for key in DTYPES:
            name = section.get(key)
            if isinstance(name, str):
                dtype = parse_dtype(name).name
                if dtype not in CASTABLE:
                    raise UsageError(f"{title}: config.json says {key} {name}: expected one of {', '.join(CASTABLE)}; --dtype chooses one")
                return dtype
    return "bfloat16"


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config that gives its model a dtype, in itself and in those nested in it, wherever one is given; at least in itself."""
    result = _replace_dtype(config, dtype)
    says_dtype = any(isinstance(result.get(key), str) for key in DTYPES)
    return result if says_dtype else {**result, "dtype": dtype}


def _replace_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            result[key] = _replace_dtype(value, dtype)
        else:
            result[key] = dtype if key in DTYPES and isinstance(value, str) else value
    return result


def quantizations(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each config of a quantization in a config, the outermost first, and its key."""
    for key in KEYS:
        if isinstance(config.get(key), Mapping) and config[key]:
            yield key, config[key]
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in KEYS and depth < 4:
            yield from quantizations(value, depth + 1)
