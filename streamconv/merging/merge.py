"""Which tensors the result of a merge has, of which tensors of which models, and what its config says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode
from streamconv.merging.arithmetic import Arithmetic, Operand, Target, units_of
from streamconv.merging.experts import native_name
from streamconv.merging.file import Input, MergeFile, Slice
from streamconv.merging.models import TIES, Model, heads_of, layer_of, text_config_of, with_key
from streamconv.merging.parameters import unknown_parameters
from streamconv.merging.vocabulary import SIZE, Vocabulary, align

_NEED_BASE = ("slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")
_SHOWN = 4  # names that a refusal gives


@dataclass(frozen=True)
class Merged:
    """What a merge makes.

    Attributes:
        entries: tensors by name.
        sources: the names, in the models, of what each is made of.
        replicas: tensors that must be the same, two each, and their names.
        config: keys of config.json that are others than in the first model's.
        notes: what should be known of it.
    """

    entries: Mapping[str, AnyNode]
    sources: Mapping[str, tuple[str, ...]]
    replicas: Sequence[tuple[AnyNode, AnyNode, tuple[str, str]]]
    config: Mapping[str, Any]
    notes: Sequence[str]


def merge(file: MergeFile, models: Mapping[str, Model], seed: int) -> Merged:
    """The result of a merge, of models by the names that a file has for them.

    Raises:
        CoverageError: models that do not fit each other.
        RecipeError: the file does not say what the method takes, or says what cannot be.
    """
    _check_models(file, models)
    vocabulary = align(file, models, first_of(file)) if file.aligns_vocabulary else None
    aligned = vocabulary.models if vocabulary else models
    targets = list(_targets(file, aligned))
    arithmetic = Arithmetic(file, seed)
    nodes: dict[str, AnyNode] = {}
    for unit in units_of(targets):
        nodes |= arithmetic.merge(unit)
    _check_shapes(file, aligned[first_of(file)], targets)
    entries = {target.name: nodes[target.name] for target in targets}
    sources = {target.name: tuple(dict.fromkeys(operand.name for operand in target.operands)) for target in targets}
    config, notes = _config_of(file, models, vocabulary)
    notes += vocabulary.notes if vocabulary else ()
    notes += [f"{file.path}: {name} is no parameter of {file.method}, and changes nothing" for name in unknown_parameters(file)]
    return Merged(entries, sources, arithmetic.replicas, config, notes)


def first_of(file: MergeFile) -> str:
    """The model whose config and tokenizer are the result's."""
    return file.base_model if file.base_model is not None else file.slices[0].inputs[0].model


# What fits ---------------------------------------------------------------------------------------------------------


def _check_models(file: MergeFile, models: Mapping[str, Model]) -> None:
    """Raises RecipeError or CoverageError where a method does not take the models of a slice, or these are of different kinds."""
    for part in file.slices:
        names = [one.model for one in part.inputs]
        if file.method in _NEED_BASE and part.base is None:
            file.fail(part.line, f"{file.method} needs base_model: name one of the models")
        if file.method in _NEED_BASE and part.base not in names:
            file.fail(part.line, f"base_model {part.base} is none of the slice's sources, which {file.method} needs it to be: add it")
        if file.method == "slerp" and len(names) != 2:
            file.fail(part.line, f"slerp goes between two models, one of them base_model, found {len(names)}")
        if file.method == "passthrough" and len(names) != 1:
            file.fail(part.line, f"passthrough takes one model in each slice, found {len(names)}: {', '.join(names)}")
        for one in part.inputs:
            _check_range(file, one, models[one.model])
    kinds = {name: model.config.get("model_type") for name, model in models.items()}
    for name, line in file.models.items():
        first = first_of(file)
        if None not in (kinds[name], kinds[first]) and kinds[name] != kinds[first]:
            file.fail(line, f"{name} is a model of type {kinds[name]}, {first} one of {kinds[first]}: merge models of one type")
        if models[name].is_quantized:  # whatever the method: the config of one model would not say what another one's layers are
            file.fail(line, f"{name} is quantized: merge what streamconv convert --dequantize makes of it")


def _check_range(file: MergeFile, one: Input, model: Model) -> None:
    if one.layers is None:
        return
    if len(model.depths) != 1:
        stacks = ", ".join(model.depths) or "none"
        file.fail(one.line, f"slices are of models with one stack of layers, {one.model} has {stacks}: give models instead of slices")
    (depth,) = model.depths.values()
    if one.layers.stop > depth:
        file.fail(one.line, f"layer_range ends at {one.layers.stop}, and {one.model} has {depth} layers")


def _check_shapes(file: MergeFile, first: Model, targets: Iterable[Target]) -> None:
    """Raises CoverageError for a tensor of a shape that none of its name has in the model whose config is the result's."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, layer in first.layers.items():
        shapes.setdefault(layer.name, set()).add(first.entries[name].spec.shape)
    for target in targets:
        operand = target.operands[0]
        own, known = operand.node.spec.shape, shapes.get(layer_of(target.name).name)
        if known is not None and own not in known:
            problem = f"{operand.name} of {operand.one.model} has shape {list(own)}, in {first.name} it is {list(min(known))}"
            raise CoverageError(f"{file.path}:{operand.one.line}: {problem}: merge models of one shape")


# Which of which ------------------------------------------------------------------------------------------------------


def _targets(file: MergeFile, models: Mapping[str, Model]) -> Iterator[Target]:
    """The result's tensors: those before the layers, layer by layer, those behind."""
    first, last = file.slices[0], file.slices[-1]
    yield from _outside(file, models, first, before=True)
    if first.inputs[0].layers is None:
        stacks = list(dict.fromkeys(stack for one in first.inputs for stack in models[one.model].depths))
        for stack in stacks:
            depth = max(models[one.model].depths.get(stack, 0) for one in first.inputs)
            for k in range(depth):
                yield from _layer(file, models, first, stack, [k] * len(first.inputs), k, k / (depth - 1) if depth > 1 else 1.0)
    else:
        number = 0
        for part in file.slices:
            (stack,) = models[part.inputs[0].model].depths
            ranges = [one.layers or range(0) for one in part.inputs]
            count = len(ranges[0])
            for k in range(count):
                numbers = [layers[k] for layers in ranges]
                yield from _layer(file, models, part, stack, numbers, number, k / (count - 1) if count > 1 else 1.0)
                number += 1
    yield from _outside(file, models, last, before=False)


def _outside(file: MergeFile, models: Mapping[str, Model], part: Slice, *, before: bool) -> Iterator[Target]:
    """The tensors before, or behind, all layers."""
    names = [models[one.model].outside(before=before) for one in part.inputs]
    heads = [] if before else heads_of(models.values())  # which all have, once one of the models has it
    for name, owners in _matched(file, models, part, names, more=heads):
        yield Target(name, part, 0.0, owners)


def _layer(
    file: MergeFile, models: Mapping[str, Model], part: Slice, stack: str, numbers: Sequence[int], number: int, position: float
) -> Iterator[Target]:
    """The tensors of a layer, which is layer ``numbers`` of the slice's inputs."""
    names = [models[one.model].layer(stack, own) for one, own in zip(part.inputs, numbers, strict=True)]
    for name, owners in _matched(file, models, part, names, f"{stack}.{number}"):
        yield Target(f"{stack}.{number}.{name}", part, position, owners)


def _matched(
    file: MergeFile,
    models: Mapping[str, Model],
    part: Slice,
    names: Sequence[Mapping[str, str]],
    where: str = "",
    more: Sequence[str] = (),
) -> Iterator[tuple[str, tuple[Operand, ...]]]:
    """Names that all inputs have, and ``more``, and the tensors behind them. Raises CoverageError where one lacks what another has."""
    everything = list(dict.fromkeys([*(name for own in names for name in own), *more]))
    lacks: dict[str, list[str]] = {}
    for name in everything:
        operands = []
        for one, own in zip(part.inputs, names, strict=True):
            model = models[one.model]
            source = own.get(name) or model.stand_in(name)
            if source is None:
                lacks.setdefault(one.model, []).append(f"{where}.{name}" if where else name)
            else:
                operands.append(Operand(one, source, model.entries[source]))
        if not lacks:
            yield name, tuple(operands)
    for model_name, absent in lacks.items():
        more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
        line = file.models[model_name]
        shown = f"{', '.join(absent[:_SHOWN])}{more}"
        raise CoverageError(f"{file.path}:{line}: {model_name} has no {shown}, which others have: merge models of the same tensors")


# config.json -----------------------------------------------------------------------------------------------------------

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def _config_of(file: MergeFile, models: Mapping[str, Model], vocabulary: Vocabulary | None) -> tuple[dict[str, Any], list[str]]:
    """Keys of config.json that change, and notes."""
    own = models[first_of(file)].config
    config: dict[str, Any] = {}
    notes: list[str] = []
    if file.slices[0].inputs[0].layers is not None:
        config |= _with_layers(file, models, own, notes)
        config |= _with_kinds_of_layers(file, models, {**own, **config})
    heads = heads_of(models.values())
    if any(head not in model.entries for head in heads for model in models.values()):
        config |= with_key({**own, **config}, TIES, value=False)
    if vocabulary:
        config |= with_key({**own, **config}, SIZE, vocabulary.size)
    return {key: value for key, value in config.items() if key not in own or own[key] != value}, notes


def _with_layers(file: MergeFile, models: Mapping[str, Model], own: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """A config's keys that count layers, or list something for each, as they are of the result."""
    depth = sum(len(part.inputs[0].layers or ()) for part in file.slices)
    parts = [(models[part.inputs[0].model].config, part.inputs[0].layers or range(0)) for part in file.slices]
    config: dict[str, Any] = {}
    for key, value in own.items():
        if key == "text_config" and isinstance(value, dict):
            inner = _with_layers_of(value, [(config.get(key, {}), layers) for config, layers in parts], depth, notes)
            config[key] = {**value, **inner}
    stored = None if config else max(models[first_of(file)].depths.values(), default=None)
    return config | _with_layers_of(own, parts, depth, notes, stored)


_DENSE_FIRST, _DENSE, _SPARSE = ("first_k_dense_replace", "moe_layer_start_index"), "mlp_only_layers", "moe_layers"
"""Keys that say which layers have no experts: how many come first; their numbers; the numbers of all others."""
_LAST = "moe_layer_end_index"


def _with_kinds_of_layers(file: MergeFile, models: Mapping[str, Model], own: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a config by which some layers have experts and others none, as they are of the result.

    Raises:
        RecipeError: layers are of several kinds, and no key says so of the result.
    """
    layers = [(part, layer) for part in file.slices for layer in part.inputs[0].layers or ()]
    if [layer for _, layer in layers] == list(range(len(layers))):
        return {}
    kinds = [_names_of(models[part.inputs[0].model], layer) for part, layer in layers]
    first = models[first_of(file)]
    known = [_names_of(first, layer) for layer in range(max(first.depths.values(), default=0))]
    if len({*kinds, *known}) < 2:
        return {}
    text = text_config_of(own)
    sparse = [names for names in {*kinds, *known} if any("experts" in name.split(".") for name in names)]
    if len({*kinds, *known}) == 2 and len(sparse) == 1:
        dense = [number for number, names in enumerate(kinds) if names not in sparse]
        counts = [key for key in _DENSE_FIRST if type(text.get(key)) is int]
        if counts and dense == list(range(len(dense))) and text.get("moe_layer_interval", 1) == 1:
            changed = {**own, **with_key(own, counts[0], len(dense))}
            return {**changed, **(with_key(changed, _LAST, len(kinds) - 1) if _LAST in text else {})}
        if isinstance(text.get(_DENSE), list):
            changed = {**own, **with_key(own, _DENSE, dense)}
            return {**changed, **with_key(changed, "decoder_sparse_step", 1)}
        if isinstance(text.get(_SPARSE), list):
            return with_key(own, _SPARSE, [number for number in range(len(kinds)) if number not in dense])
    told = any(_lists_layers(key, value, len(layers)) for key, value in text.items())
    if not told and kinds != known[: len(kinds)]:
        number = next(k for k, names in enumerate(kinds) if k >= len(known) or names != known[k])
        part, layer = layers[number]
        problem = f"layer {layer} of {part.inputs[0].model} would be layer {number}, where config.json has a layer of another kind"
        file.fail(part.line, f"{problem}: cut the layers so that their kinds stay where they are")
    return {}


def _lists_layers(key: str, value: object, count: int) -> bool:
    """Whether a key has an entry for each of so many layers, in a list, or a letter in a text."""
    if isinstance(value, str):
        return len(value) == count and "pattern" in key
    return isinstance(value, list) and len(value) == count and ("layer" in key or "block" in key or "attention" in key)


def _names_of(model: Model, layer: int) -> frozenset[str]:
    """The names that tell what kind of layer one is, numbers of experts left out."""
    (stack,) = model.depths
    return frozenset(native_name(f"{stack}.{layer}.{name}").removeprefix(f"{stack}.{layer}.") for name in model.layer(stack, layer))


def _with_layers_of(
    own: Mapping[str, Any],
    parts: Sequence[tuple[Mapping[str, Any], range]],
    depth: int,
    notes: list[str],
    stored: int | None = None,
) -> dict[str, Any]:
    """The same of a part of a config, whose model has ``stored`` layers where no key counts them."""
    config: dict[str, Any] = {}
    count = next((own[key] for key in _DEPTHS if type(own.get(key)) is int), stored)
    if count is None:
        return config
    for key, value in own.items():
        if key in _DEPTHS and value == count:
            config[key] = depth
        elif _lists_layers(key, value, count):
            lists = [(of.get(key), layers) for of, layers in parts]
            if all(type(one) is type(value) and layers.stop <= len(one or ()) for one, layers in lists):
                entries = [entry for one, layers in lists for entry in (one or ())[layers.start : layers.stop]]
                config[key] = "".join(entries) if isinstance(value, str) else entries
        elif key in (_DENSE, _SPARSE):
            pass  # see `_with_kinds_of_layers`
        elif isinstance(value, list) and value and all(type(one) is int and one <= count for one in value) and "layer" in key:
            notes.append(f"config.json: {key} names layers by number, and stays as it is: {value}")
    return config
