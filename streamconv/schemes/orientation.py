"""Which models have matrices with inputs before outputs, and gate and up in turns; shapes do not always tell. Facts: transformers 5.24."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from streamconv.errors import CoverageError

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # model types whose matrices are of its Conv1D
MARKED = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")  # whose experts it marks is_transposed, which PEFT reads
TRANSPOSED = (*MARKED, "llama4", "llama4_text")  # whose stacks of experts have inputs before outputs
_CONV1D = re.compile(r"\.(?:c_attn|q_attn|c_proj|c_fc)\.weight$")  # of these models: their Conv1D; heads are linear modules
WOVEN = ("gpt_oss",)  # of which gate and up take turns


def is_of(kinds: tuple[str, ...], config: Mapping[str, Any]) -> bool:
    """Whether a model, or its text model, is of one of these types."""
    return any(part.get("model_type") in kinds for part in _parts(config))


def is_conv1d(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a weight is that of a Conv1D."""
    return is_of(CONV1D, config) and _CONV1D.search(name) is not None


def check_stack(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> None:
    """Refuses a stack of experts' weights whose inputs lie elsewhere than is known of its model.

    Args:
        name: of the stack.
        shape: its three axes, one of which has the ``hidden_size`` of the config, or of its text model.
        config: of the model.

    Raises:
        CoverageError: it is not known which axis is which.
    """
    hidden = [part["hidden_size"] for part in _parts(config) if "hidden_size" in part][-1:]
    is_turned = is_of(TRANSPOSED, config)
    place = 2 if ("down_proj" in name) == is_turned else 1
    if hidden and hidden[0] in shape[1:] and shape[place] != hidden[0]:
        order = "outputs" if is_turned else "inputs"
        what = f"{name} {list(shape)} has {order} first by hidden_size {hidden[0]}, which is not known of {config.get('model_type')}"
        raise CoverageError(f"{what}: leave it alone with --ignore")


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config, and that of the text model in it."""
    text = config.get("text_config")
    return [config, *([text] if isinstance(text, Mapping) else [])]
