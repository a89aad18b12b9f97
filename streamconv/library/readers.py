"""What transformers does not open of what compressed-tensors' formats can hold. Facts: transformers 5.24, by opening what was written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from streamconv.schemes.orientation import TRANSPOSED, is_of
from streamconv.schemes.preset import Preset

_EXPERT = re.compile(r"\.experts\.\d+\.")
_OF_EXPERTS = ("FP8_DYNAMIC", "W8A16", "W4A16", "MXFP4A16")  # of which it reads experts rightly
_INITIALIZED = (
    "t5", "mt5", "umt5", "longt5", "switch_transformers", "pop2piano", "udop", "pix2struct", "mamba", "mamba2", "falcon_mamba",
    "recurrent_gemma", "modernbert", "modernbert-decoder", "modernvbert", "siglip", "siglip2", "kosmos-2", "nanochat", "gpt_bigcode",
)  # fmt: skip
"""Model types whose linear weights it initializes by name before it loads, where modules of packed codes have none."""


def note_unread(preset: Preset, names: Iterable[str], config: Mapping[str, Any]) -> Iterator[str]:
    """What to say of weights of these names that are quantized so, if transformers does not read them, though compressed-tensors does."""
    if preset.codes[0] and is_of(_INITIALIZED, config):
        yield f"transformers 5.24 does not open a {config.get('model_type')} quantized by {preset.name}; compressed-tensors does"
    if (preset.name not in _OF_EXPERTS or is_of(TRANSPOSED, config)) and any(map(_EXPERT.search, names)):
        yield f"transformers 5.24 does not read experts that are quantized by {preset.name} in this model; compressed-tensors does"
