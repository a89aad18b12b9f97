"""What parameters are for a tensor: by filters of names, and by gradients along layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from streamconv.merging.experts import native_name
from streamconv.merging.file import Input, MergeFile, Parameters, Scalar, Setting, Slice

MODEL_WISE = {
    "linear": ("weight",),
    "slerp": (),
    "task_arithmetic": ("weight", "density"),
    "ties": ("weight", "density"),
    "dare_linear": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "passthrough": ("scale",),
}
"""Parameters of a model, by method."""
_DELTAS = ("normalize", "rescale", "lambda", "int8_mask")
SHARED = {
    "linear": ("normalize",),
    "slerp": ("t",),
    "task_arithmetic": _DELTAS,
    "ties": _DELTAS,
    "dare_linear": _DELTAS,
    "dare_ties": _DELTAS,
    "passthrough": (),
}
"""Parameters of all models together, by method."""
_LARGEST = 3.4028234663852886e38  # of float32, in which numbers are multiplied
_SHOWN = 40  # characters of a value that is refused
_TRUE, _FALSE = ("1", "true", "yes", "on", "y", "t"), ("0", "false", "no", "off", "n", "f")


@dataclass(frozen=True)
class Lookup:
    """Where parameters are looked up: in a slice of a file, for the tensors of a layer that is at ``position`` of it, from 0 to 1."""

    file: MergeFile
    part: Slice
    position: float

    def number(self, name: str, tensor: str, one: Input | None = None) -> float | None:
        """A number for a tensor, of a model or of all; None: nothing says it. Raises RecipeError for what is none."""
        for setting in self._settings(name, tensor, one):
            values = [self._number(name, value, setting) for value in setting.values]
            at = self.position * (len(values) - 1)
            first = int(at)
            second = min(len(values) - 1, first + 1)
            return (1 - (at - first)) * values[first] + (at - first) * values[second]
        return None

    def needed(self, name: str, tensor: str, one: Input | None = None) -> float:
        """The same. Raises RecipeError where nothing says it."""
        number = self.number(name, tensor, one)
        if number is None:
            of = f" of {one.model}" if one else ""
            line = one.line if one else self.part.line
            self.file.fail(line, f"{self.file.method}: {name} is missing for {tensor}{of}: give it among parameters")
        return number

    def flag(self, name: str, tensor: str, *, usual: bool) -> bool:
        """Yes or no for a tensor. Raises RecipeError for what is neither."""
        for setting in self._settings(name, tensor, None):
            value = setting.values[int(self.position * (len(setting.values) - 1))]
            text = str(value).lower() if not isinstance(value, float) else str(value).removesuffix(".0")
            if text not in _TRUE + _FALSE:
                self.file.fail(setting.line, f"{name}: {value!r} is neither true nor false")
            return text in _TRUE
        return usual

    def _settings(self, name: str, tensor: str, one: Input | None) -> Iterator[Setting]:
        """What each scope says of a parameter for a tensor, the narrowest first."""
        scopes = (one.parameters, *self.part.scopes) if one else self.part.scopes
        names = (tensor, native_name(tensor))
        for scope in scopes:
            fitting = (setting for setting in scope.get(name, ()) if setting.filter is None or any(setting.filter in one for one in names))
            setting = next(fitting, None)
            if setting is not None and setting.values:
                yield setting

    def _number(self, name: str, value: Scalar, setting: Setting) -> float:
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= _LARGEST:
            self.file.fail(setting.line, f"{name}: {repr(value)[:_SHOWN]} is no number that float32 holds")
        return number


def unknown_parameters(file: MergeFile) -> list[str]:
    """Parameters that a file gives and its method has not."""
    known = (*MODEL_WISE[file.method], *SHARED[file.method])
    return [name for name in dict.fromkeys(_names(_all_of(file))) if name not in known]


def _all_of(file: MergeFile) -> Iterator[Parameters]:
    for part in file.slices:
        yield from part.scopes
        for one in part.inputs:
            yield one.parameters


def _names(scopes: Iterable[Parameters]) -> Iterator[str]:
    for scope in scopes:
        yield from scope
