"""The folder of an adapter: its config, its tensors, and what the config says of each module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from streamconv.checkpoint.opening import Checkpoint, open_checkpoint, read_config
from streamconv.errors import CoverageError, StreamconvError, UsageError
from streamconv.formats.catalog import locate
from streamconv.formats.files import short
from streamconv.graph.node import AnyNode
from streamconv.schemes.orientation import CONV1D, is_of

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX, WRAPPER = "base_model.model.", "base_layer"
"""What the names of all its tensors begin with, and what PEFT calls a module within its own."""

_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict,)),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"), (bool,)),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (list,)),
    "trainable_token_indices": (list, dict),
    **dict.fromkeys(("bias", "peft_version", "peft_type"), (str,)),
}
"""What the values of keys must be, if they are not null."""
_WORDS = {dict: "an object", bool: "true or false", list: "a list", str: "a text"}


class Adapter:
    """An adapter, opened; only headers have been read.

    Args:
        path: its folder.
        weight: what its scale is multiplied with, None: nothing was said.
        model: the config of the model that it is for.
        title: what messages begin with.

    Raises:
        UsageError: there is no adapter, or its config is none.
        CoverageError: one of its tensors is called as none of an adapter.
    """

    def __init__(self, path: str, weight: float | None, model: Mapping[str, Any], title: str) -> None:
        self.title = title
        opened = self._open(path)
        self.config = read_config(opened.folder, CONFIG)
        if not self.config:
            raise UsageError(f"{title}: no {CONFIG} in it, which says how its tensors are merged: give the folder of a PEFT adapter")
        for key, types in _TYPES.items():
            value = self.config.get(key)
            if value is not None and not isinstance(value, types):
                expected = " or ".join(_WORDS[one] for one in types)
                raise UsageError(f"{title}: {key} of {CONFIG} is {short.repr(value)}, expected {expected}: mend it")
        self.weight, self.model = weight, model
        self.tensors: dict[str, AnyNode] = dict(opened.contents.entries)
        for key in self.tensors:
            if not key.startswith(PREFIX):
                raise CoverageError(f"{title}: {key} does not begin with {PREFIX}, as those of an adapter do: save it with PEFT")

    def _open(self, path: str) -> Checkpoint:
        location = locate(path)
        missing = UsageError(f"{self.title}: no {' or '.join(FILES)} in it: give the folder of a PEFT adapter")
        try:
            opened = open_checkpoint(path)
        except StreamconvError as error:
            if location.is_folder and not any(location.folder.has_file(name) for name in FILES):
                raise missing from error
            raise
        if location.is_folder and not {file.name for file in opened.contents.files} <= {*FILES}:
            raise missing
        return opened

    @property
    def kind(self) -> str:
        """Its ``peft_type``."""
        return str(self.config.get("peft_type"))

    def refuse(self, what: str) -> UsageError:
        """The error that something is not merged here."""
        return UsageError(f"{self.title}: {what} is not merged here: merge it with PEFT's merge_and_unload")

    def names(self, key: str, module: str) -> bool:
        """Whether a list of modules in the config, or an expression for them, has a module."""
        value = self.config.get(key)
        if isinstance(value, str):
            return re.fullmatch(value, module) is not None
        return isinstance(value, list) and any(module == name or module.endswith(f".{name}") for name in value)

    def scale(self, module: str, alpha_key: str) -> tuple[int, float]:
        """The rank of a module's matrices, and what their product is multiplied with.

        Raises:
            UsageError: the config does not say, or nothing that makes sense.
        """
        rank = self._of_pattern("rank_pattern", module, self.config.get("r"))
        alpha = self._of_pattern("alpha_pattern", module, self.config.get(alpha_key))
        if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
            raise UsageError(f"{self.title}: r is {rank!r} and {alpha_key} {alpha!r} for {module}: mend {CONFIG}")
        divisor = math.sqrt(rank) if self.config.get("use_rslora") else rank
        scale = alpha / divisor * (1.0 if self.weight is None else self.weight)
        if not math.isfinite(scale):
            raise UsageError(f"{self.title}: the scale of {module} is {scale}: give a finite {alpha_key}, and a finite WEIGHT")
        return rank, scale

    def _of_pattern(self, key: str, module: str, usual: Any) -> Any:
        table = self.config.get(key)
        for pattern, value in table.items() if isinstance(table, Mapping) else ():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise UsageError(f"{self.title}: {key} {pattern!r} of {CONFIG} is no expression ({error}): mend it") from error
        return usual

    def is_turned(self, shape: tuple[int, ...], outputs: int, inputs: int) -> bool:
        """Whether a matrix is (inputs, outputs); where its shape does not tell, the model's type does."""
        return shape == (inputs, outputs) and (inputs != outputs or is_of(CONV1D, self.model))
