"""mergekit's YAML: which models are merged, by what method, in which slices, with which parameters. What is wrong is told by its line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from streamconv.dtypes import CASTABLE, parse_dtype
from streamconv.errors import RecipeError, UsageError
from streamconv.recipe.files import parse, read_text
from streamconv.storage import is_url
from streamconv.storage.locations import shown
from streamconv.text import did_you_mean

METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "passthrough")
BASE = "base"

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Setting:
    """What a parameter is for the tensors that a filter lets through.

    Attributes:
        filter: a part of their names; None: all.
        values: one, or those that layers go through, first to last.
        line: where it stands.
    """

    filter: str | None
    values: tuple[Scalar, ...]
    line: int


Parameters = Mapping[str, tuple[Setting, ...]]
"""Settings by a parameter's name, of which the first that fits counts."""


@dataclass(frozen=True)
class Input:
    """A model's part in a slice.

    Attributes:
        model: as it is written.
        layers: which of its layers; None: all.
        parameters: its own.
        line: where it stands.
    """

    model: str
    layers: range | None
    parameters: Parameters
    line: int


@dataclass(frozen=True)
class Slice:
    """Layers of the result, one after the other.

    Attributes:
        inputs: whose layers they are made of.
        base: the model that is its base, if it has one.
        scopes: parameters of the slice, and of what it is part of.
        line: where it stands.
    """

    inputs: tuple[Input, ...]
    base: str | None
    scopes: tuple[Parameters, ...]
    line: int


@dataclass(frozen=True)
class MergeFile:
    """What a file says.

    Attributes:
        path: of it.
        method: one of `METHODS`.
        slices: of the result; one of all layers, where it names models.
        base_model: whose config and tokenizer are the result's; None: those of the first.
        dtype: what tensors are cast to before they are merged, or None.
        out_dtype: what the result is cast to, or None.
        aligns_vocabulary: models go by the tokens of the base's tokenizer.
        lines: where its keys stand.
    """

    path: str
    method: str
    slices: tuple[Slice, ...]
    base_model: str | None
    dtype: str | None
    out_dtype: str | None
    aligns_vocabulary: bool
    lines: Mapping[str, int]

    def fail(self, line: int, problem: str) -> NoReturn:
        """Raises RecipeError for what a line says."""
        raise RecipeError(f"{self.path}:{line}: {problem}")

    @property
    def models(self) -> dict[str, int]:
        """All models, and the line where each is named first."""
        lines: dict[str, int] = {}
        for part in self.slices:
            for one in part.inputs:
                lines.setdefault(one.model, one.line)
        if self.base_model is not None:
            lines[self.base_model] = self.lines["base_model"]
        return lines


def read(path: Path) -> MergeFile:
    """What a file of mergekit says.

    Raises:
        UsageError: the file cannot be read.
        RecipeError: it says something else, or what is not merged here; says at which line.
    """
    text = read_text(path)
    try:
        _, node = parse(text, json_only=False)
    except RecipeError as error:
        raise RecipeError(f"{path}:{error}") from error
    except Exception as error:
        raise RecipeError(f"{path}: cannot be parsed: {' '.join(str(error).split())[:300]}") from error
    return _Reading(str(path)).file(_item_of(node))


def split_adapter(text: str) -> tuple[str, str]:
    """A model, and the adapter that is named behind it with a plus, if one is."""
    if not is_url(text) and Path(text).exists():
        return text, ""
    model, plus, adapter = text.rpartition("+")
    is_adapter = bool(plus) and (not is_url(text) or is_url(adapter) or Path(adapter).exists())
    return (model, adapter) if is_adapter else (text, "")


@dataclass(frozen=True)
class _Item:
    """A value of YAML, in which further ones are such items, too, and the line where it begins."""

    value: Any
    line: int


def _item_of(node: Any) -> _Item:
    import yaml

    if node is None:
        return _Item(None, 1)
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        loader = yaml.SafeLoader("")
        loader.flatten_mapping(node)
        return _Item({str(key.value): _item_of(value) for key, value in node.value}, line)
    if isinstance(node, yaml.SequenceNode):
        return _Item([_item_of(value) for value in node.value], line)
    return _Item(yaml.SafeLoader("").construct_object(node), line)


_KEYS = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "chat_template",
)  # fmt: skip
_ABSENT = {
    "tokenizer": "leave it out; tokenizer_source: base goes by the base's tokens",
    "chat_template": "leave it out, and put the template beside the result",
}


class _Reading:
    """Reads the items of a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def _fail(self, line: int, problem: str) -> NoReturn:
        raise RecipeError(f"{self._path}:{line}: {problem}")

    def file(self, item: _Item) -> MergeFile:
        keys = self._mapping(item, "a merge", _KEYS)
        lines = {key: value.line for key, value in keys.items()}
        for key, remedy in _ABSENT.items():
            if key in keys and keys[key].value is not None:
                self._fail(lines[key], f"{key} is not supported: {remedy}")
        method = self._method(keys, item.line)
        base = self._model(keys["base_model"]) if "base_model" in keys else None
        source = keys.get("tokenizer_source", _Item(None, 1))
        if source.value not in (None, BASE):
            self._fail(source.line, f"tokenizer_source: {_describe(source.value)} is not supported: only {BASE!r} is")
        forms = [key for key in ("models", "slices", "modules") if key in keys and keys[key].value]
        if len(forms) != 1:
            found = f"{' and '.join(forms)}: leave the rest out" if forms else "neither: name what is merged"
            self._fail(lines[forms[1]] if forms else item.line, f"expected one of models and slices, found {found}")
        scopes = (self._parameters(keys.get("parameters")),)
        slices = self._module(keys, base, scopes) if forms == ["modules"] else self._slices(keys, base, scopes)
        return MergeFile(
            self._path, method, slices, base, self._dtype(keys, "dtype"), self._dtype(keys, "out_dtype"), source.value == BASE, lines
        )

    def _method(self, keys: Mapping[str, _Item], line: int) -> str:
        if "merge_method" not in keys:
            self._fail(line, f"merge_method is missing: it is one of {', '.join(METHODS)}")
        method = keys["merge_method"]
        if not isinstance(method.value, str):
            self._fail(method.line, f"merge_method: expected one of {', '.join(METHODS)}, found {_describe(method.value)}")
        if method.value not in METHODS:
            hint = did_you_mean(str(method.value), METHODS) or f": it is one of {', '.join(METHODS)}"
            self._fail(method.line, f"merge_method {method.value} is not supported{hint}")
        return str(method.value)

    def _module(self, keys: Mapping[str, _Item], base: str | None, scopes: tuple[Parameters, ...]) -> tuple[Slice, ...]:
        """The slices of the one module that a model has."""
        modules = self._mapping(keys["modules"], "modules", None)
        if len(modules) != 1:
            self._fail(keys["modules"].line, f"modules {', '.join(modules)}: more than one is not supported: give models or slices")
        (module,) = modules.values()
        own = self._mapping(module, "a module", ("models", "slices", "parameters"))
        if ("models" in own) == ("slices" in own):
            self._fail(module.line, "expected one of models and slices")
        return self._slices(own, base, (self._parameters(own.get("parameters")), *scopes))

    def _slices(self, keys: Mapping[str, _Item], base: str | None, scopes: tuple[Parameters, ...]) -> tuple[Slice, ...]:
        if "models" in keys:
            inputs = [self._input(item, has_layers=False) for item in self._list(keys["models"], "models")]
            if base is not None and base not in [one.model for one in inputs]:
                inputs.append(Input(base, None, {}, keys["models"].line))
            self._check_once(inputs)
            return (Slice(tuple(inputs), base, scopes, keys["models"].line),)
        return tuple(self._slice(item, base, scopes) for item in self._list(keys["slices"], "slices"))

    def _slice(self, item: _Item, base: str | None, scopes: tuple[Parameters, ...]) -> Slice:
        keys = self._mapping(item, "a slice", ("sources", "base_model", "parameters"))
        if "sources" not in keys:
            self._fail(item.line, "a slice has sources: name the models, and layer_range of each")
        inputs = [self._input(one, has_layers=True) for one in self._list(keys["sources"], "sources")]
        self._check_once(inputs)
        first = inputs[0].layers
        for one in inputs[1:]:
            if one.layers is not None and first is not None and len(one.layers) != len(first):
                self._fail(one.line, f"layer_range has {len(one.layers)} layers, that of the slice's first source {len(first)}")
        own = self._model(keys["base_model"]) if "base_model" in keys else base
        return Slice(tuple(inputs), own, (self._parameters(keys.get("parameters")), *scopes), item.line)

    def _check_once(self, inputs: list[Input]) -> None:
        for k, one in enumerate(inputs):
            if one.model in [other.model for other in inputs[:k]]:
                self._fail(one.line, f"{one.model} stands twice: give it once, with the sum of its weights")

    def _input(self, item: _Item, *, has_layers: bool) -> Input:
        keys = self._mapping(item, "a model", ("model", "layer_range", "parameters") if has_layers else ("model", "parameters"))
        if "model" not in keys:
            self._fail(item.line, "model is missing: give its path")
        layers = None
        if has_layers:
            if "layer_range" not in keys:
                self._fail(item.line, "layer_range is missing: give the first layer and the one after the last, [a, b]")
            layers = self._range(keys["layer_range"])
        return Input(self._model(keys["model"]), layers, self._parameters(keys.get("parameters")), item.line)

    def _range(self, item: _Item) -> range:
        ends = [one.value for one in item.value] if isinstance(item.value, list) else []
        if len(ends) != 2 or any(type(end) is not int for end in ends) or not 0 <= ends[0] < ends[1]:
            found = _describe(item.value) if any(isinstance(end, list | dict) for end in ends) else ends or _describe(item.value)
            self._fail(item.line, f"layer_range {found}: expected the first layer and the one after the last, [a, b]")
        return range(*ends)

    def _model(self, item: _Item) -> str:
        if not isinstance(item.value, str) or not item.value.strip():
            self._fail(item.line, f"expected the path of a model, perhaps with +ADAPTER, found {_describe(item.value)}")
        model, adapter = split_adapter(item.value.strip())
        return f"{shown(model)}+{shown(adapter)}" if adapter else shown(model)

    def _dtype(self, keys: Mapping[str, _Item], key: str) -> str | None:
        item = keys.get(key)
        if item is None or item.value is None:
            return None
        if not isinstance(item.value, str):
            self._fail(item.line, f"{key}: expected one of {', '.join(CASTABLE)}, found {_describe(item.value)}")
        try:
            name = parse_dtype(item.value).name
        except UsageError as error:
            self._fail(item.line, f"{key}: {error}")
        if name not in CASTABLE:
            self._fail(item.line, f"{key} {item.value}: models are merged in {', '.join(CASTABLE)}")
        return name

    def _parameters(self, item: _Item | None) -> Parameters:
        if item is None or item.value is None:
            return {}
        return {name: tuple(self._settings(name, value)) for name, value in self._mapping(item, "parameters", None).items()}

    def _settings(self, name: str, item: _Item) -> Iterator[Setting]:
        entries = item.value if isinstance(item.value, list) else [item]
        conditions = [entry for entry in entries if isinstance(entry.value, dict)]
        if not conditions:
            if entries:
                yield Setting(None, self._values(name, item), item.line)
            return
        if len(conditions) < len(entries):
            self._fail(item.line, f"{name}: expected a value, values, or a list of filter and value, found some of both")
        for entry in conditions:
            keys = self._mapping(entry, name, ("filter", "value"))
            if "value" not in keys:
                self._fail(entry.line, f"{name}: value is missing")
            text = keys["filter"].value if "filter" in keys else None
            if text is not None and not isinstance(text, str):
                self._fail(entry.line, f"{name}: filter: expected a part of tensors' names, found {_describe(text)}")
            yield Setting(None if text == "*" else text, self._values(name, keys["value"]), keys["value"].line)

    def _values(self, name: str, item: _Item) -> tuple[Scalar, ...]:
        entries = item.value if isinstance(item.value, list) else [item]
        if not entries:
            self._fail(item.line, f"{name}: expected a number, found an empty list")
        for entry in entries:
            if not isinstance(entry.value, bool | int | float | str):
                self._fail(entry.line, f"{name}: expected a number, found {_describe(entry.value)}")
        return tuple(entry.value for entry in entries)

    def _mapping(self, item: _Item, what: str, known: tuple[str, ...] | None) -> dict[str, _Item]:
        if not isinstance(item.value, dict):
            self._fail(item.line, f"expected {what} as keys and values, found {_describe(item.value)}")
        for key, value in item.value.items():
            if known is not None and key not in known:
                hint = did_you_mean(key, known) or f": it has {', '.join(known)}"
                self._fail(value.line, f"{what} has no key {key}{hint}")
        mapping: dict[str, _Item] = item.value
        return mapping

    def _list(self, item: _Item, what: str) -> list[_Item]:
        if not isinstance(item.value, list) or not item.value:
            self._fail(item.line, f"expected {what} as a list, found {_describe(item.value)}")
        return list(item.value)


def _describe(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{'a' if value else 'an empty'} {'mapping' if isinstance(value, dict) else 'list'}"
    return "nothing" if value is None else repr(value) if isinstance(value, str) else str(value)
