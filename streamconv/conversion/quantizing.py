"""``--quantize``: weights of linear modules become codes and scales, after a recipe and casts, and config.json says so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streamconv.checkpoint.opening import CONFIG, Checkpoint
from streamconv.conversion.options import Options
from streamconv.errors import CoverageError, UsageError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import SharedScale
from streamconv.library.model import placed_modules
from streamconv.library.readers import note_unread
from streamconv.notation.names import nearest
from streamconv.recipe import Conversion
from streamconv.rows import Row
from streamconv.schemes.configs import KEYS, without_quantization
from streamconv.schemes.experts import STACK, take_apart
from streamconv.schemes.heads import heads_of
from streamconv.schemes.orientation import CONV1D, TRANSPOSED, check_stack, is_of
from streamconv.schemes.preset import Preset
from streamconv.schemes.registry import presets, schemes
from streamconv.schemes.repacking import is_decoded, repack
from streamconv.text import did_you_mean

OPTION, IGNORE = "--quantize", "--ignore"
_DTYPES = ("float32", "float16", "bfloat16")
_LEFT = re.compile(r"embed|norm|bias|router|head$|^(?:wte|wpe|gate|shared_expert_gate|score|classifier|output|shared)$", re.IGNORECASE)
"""Of the last part of a module's name: embeddings, norms, routers and heads, which the formats' own tools leave alone."""
_NO_LINEAR = re.compile(r"embed|norm|^lm_head$", re.IGNORECASE)  # what no reader would take for a linear module, or knows by this name
_READ = ("safetensors", "torch")  # containers that the libraries read which read what is quantized
_SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Modules that loaders fuse, and that share a scale of all scales."""


@dataclass(frozen=True)
class Weight:
    """A linear weight among the targets.

    Attributes:
        target: which of the targets it is, or is a part of.
        name: its own.
        node: what it is made of.
    """

    target: str
    name: str
    node: AnyNode

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Quantization:
    """What `quantize` made.

    Attributes:
        preset: by which.
        left: modules that it left alone.
    """

    preset: Preset
    left: Sequence[str] = field(default=())

    def revise(self, name: str, before: Mapping[str, Any]) -> dict[str, Any]:
        """What a file of JSON beside the weights says afterwards."""
        if name != CONFIG:
            return dict(before)
        return {**without_quantization(before), KEYS[0]: self.preset.config(self.left)}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UsageError: there is none.
    """
    known = presets()
    if name not in known:
        near = did_you_mean(name, known)
        raise UsageError(f"{OPTION} {name}: there is no such scheme{near}; known are {', '.join(known)}")
    return known[name]


def quantize_as_asked(
    options: Options, conversion: Conversion, checkpoint: Checkpoint, container: str | None = None
) -> tuple[Conversion, Quantization | None]:
    """`quantize`, where that is asked for; ``container``: what is written."""
    if options.quantize is None:
        if list(options.ignore):
            raise UsageError(f"{IGNORE} names what {OPTION} leaves alone: give that, too, or leave it out")
        return conversion, None
    if container not in (None, *_READ):
        raise UsageError(f"{OPTION}: {container} files are read by no library that knows {options.quantize}: leave out one of them")
    others = [folder for folder in checkpoint.components if folder]
    return quantize(conversion, find_preset(options.quantize), options.ignore, checkpoint.config, others)


def quantize(
    conversion: Conversion, preset: Preset, ignore: Iterable[str], config: Mapping[str, Any], others: Sequence[str]
) -> tuple[Conversion, Quantization]:
    """A conversion whose linear weights are quantized.

    Args:
        conversion: what it makes so far.
        preset: how.
        ignore: modules that are left alone: their names, or ``re:`` and a regular expression that their names begin with.
        config: of the target model.
        others: the folders of other components, which stay as they are.

    Raises:
        UsageError: a pattern that no module has, or nothing to quantize.
        CoverageError: a weight whose shape does not fit.
    """
    weights = list(_weights(conversion.outputs, preset, config, others))
    if ranked := next((weight.name for weight in weights if "/" in weight.name), None):
        raise UsageError(f"{OPTION}: {ranked} is of one rank, and no config names its modules: quantize the whole model, and split that")
    patterns = _Patterns(ignore)
    heads = heads_of(config)
    chosen, left = [], [*heads]
    keeps_numbers = preset.follows and any(is_decoded(weight.node) for weight in weights)
    for weight in weights:
        is_left = weight.module in heads or _LEFT.search(weight.module.rpartition(".")[2]) is not None
        is_left |= keeps_numbers and not is_decoded(weight.node)
        if patterns.match(weight.module) or is_left or (preset.leaves and not preset.fits(weight.node.spec.shape)):
            left += [weight.module] if weight.module not in left else []
        else:
            chosen.append(_checked(weight, config))
    patterns.check([*heads, *(weight.module for weight in weights)])
    if not chosen:
        sizes = f", of rows in {preset.rows}s and columns in {preset.columns}s" if preset.leaves else ""
        raise UsageError(f"{OPTION} {preset.name}: there is no weight of a linear module that it takes{sizes}: leave it out")
    made, how, repacked = _encode(chosen, weights, preset, conversion.outputs, config)
    conversion = _replaced(conversion, made, preset, how)
    told = f"{repacked} of {len(chosen)} quantized weights hold the numbers of the source's codes: nothing is rounded"
    notes = [told] if repacked else []
    if stacks := sum(len(weight.node.spec.shape) == 3 for weight in chosen):
        notes.append(f"{stacks} stacks of experts stay so: transformers 5.24 reads their scales on GPUs, and leaves them out without one")
    if preset.by_module:
        notes += note_unread(preset, [weight.name for weight in chosen], config)
        names, missing = _names_of_readers(left, config)
        left += names
        notes += missing
    return replace(conversion, notes=[*conversion.notes, *notes]), Quantization(preset, left)


def _encode(
    chosen: Sequence[Weight], weights: Sequence[Weight], preset: Preset, outputs: Mapping[str, AnyNode], config: Mapping[str, Any]
) -> tuple[dict[str, dict[str, AnyNode]], dict[str, str], int]:
    """For each target what it becomes; of tensors that are not rounded how they are made; and how many weights are stored as they were."""
    scheme = schemes()[preset.method]
    shared = _share(chosen, preset) if preset.shared else {}
    made: dict[str, dict[str, AnyNode]] = {}
    kept: dict[str, set[str]] = {}
    for weight in weights:
        kept.setdefault(weight.target, set()).add(weight.name)
    how: dict[str, str] = {}
    repacked = 0
    for weight in chosen:
        encoded = repack(preset, scheme, weight.name, weight.node)
        if encoded is None:
            encoded = preset.encode(weight.name, weight.node, shared.get(weight.module))
        else:
            how |= dict.fromkeys(encoded, "repack")
            repacked += 1
        made.setdefault(weight.target, {}).update(encoded)
        kept[weight.target].discard(weight.name)
    parts = {weight.name: weight.node for weight in weights}
    for target in list(made):
        apart = {name: parts[name] for name in sorted(kept[target])}  # of a stack some experts only are quantized
        biases = outputs.get(f"{target}_bias")
        made[target].update(apart)
        if biases is not None and target not in parts:
            made[f"{target}_bias"] = dict(take_apart(f"{target}_bias", biases, config))
            apart |= made[f"{target}_bias"]
        how |= dict.fromkeys(apart, "take apart")
    return made, how, repacked


def _names_of_readers(left: Sequence[str], config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What transformers calls modules of a model of several that are left alone, where its files call them otherwise; or a note."""
    is_composed = any(isinstance(value, Mapping) and "model_type" in value for value in config.values())
    linear = [module for module in left if not _NO_LINEAR.search(module.rpartition(".")[2])]
    if not is_composed or not linear:
        return [], []
    try:
        names = placed_modules(config, linear, OPTION)
    except UsageError as error:
        what = f"config.json names what is left alone as files do ({linear[0]}), which transformers may call otherwise"
        return [], [f"{what}: {error}"]
    return [name for name in names if name not in left], []


def _weights(outputs: Mapping[str, AnyNode], preset: Preset, config: Mapping[str, Any], others: Sequence[str]) -> Iterator[Weight]:
    """All weights of linear modules; of experts in one tensor each, but where the preset keeps them so."""
    folders = tuple(f"{folder}/" for folder in others)
    for name, node in outputs.items():
        if node.spec.dtype.name not in _DTYPES or (folders and name.startswith(folders)):
            continue
        if STACK.fullmatch(name) and len(node.spec.shape) == 3:
            if preset.keeps_stacks:
                yield Weight(name, name, node)
            else:
                yield from (Weight(name, part, matrix) for part, matrix in take_apart(name, node, config))
        elif name.endswith(".weight") and len(node.spec.shape) == 2:
            yield Weight(name, name, node)


def _checked(weight: Weight, config: Mapping[str, Any]) -> Weight:
    """A weight whose scales lie along its inputs."""
    if is_of(CONV1D, config):
        what = f"{weight.name} of {config.get('model_type')} is of a Conv1D, which has inputs before outputs and is no linear module"
        raise CoverageError(f"{OPTION}: {what}: no library would read it")
    if len(weight.node.spec.shape) == 3 and is_of(TRANSPOSED, config):
        what = f"{weight.name} {weight.node.spec} has inputs before outputs, and its scales would lie along the wrong axis"
        raise CoverageError(f"{OPTION}: {what}: leave it alone with {IGNORE}, or take FP8_BLOCK, which has each expert by itself")
    if len(weight.node.spec.shape) == 3:
        check_stack(weight.name, weight.node.spec.shape, config)
    return weight


class _Patterns:
    """What ``--ignore`` names."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = dict.fromkeys(texts, 0)
        self._expressions: dict[str, re.Pattern[str]] = {}
        for text in self._texts:
            if text.startswith("re:"):
                try:
                    self._expressions[text] = re.compile(text[3:])
                except re.error as error:
                    raise UsageError(f"{IGNORE} {text}: not a regular expression ({error})") from error

    def match(self, module: str) -> bool:
        matching = [text for text in self._texts if self._is_for(text, module)]
        for text in matching:
            self._texts[text] += 1
        return bool(matching)

    def _is_for(self, text: str, module: str) -> bool:
        expression = self._expressions.get(text)
        return text == module if expression is None else expression.match(module) is not None

    def check(self, modules: Sequence[str]) -> None:
        """Raises UsageError where one is for no module."""
        for text, count in self._texts.items():
            if not count and text not in modules:
                near = nearest(text.removeprefix("re:"), modules)
                raise UsageError(f"{IGNORE} {text}: no linear module is called so{f'; the nearest is {near[0]}' if near else ''}")


def _share(weights: Sequence[Weight], preset: Preset) -> dict[str, AnyNode]:
    """The scale of all scales of each module: that of all modules that loaders fuse with it."""
    groups: dict[tuple[str, Sequence[str]], list[Weight]] = {}
    for weight in weights:
        parent, _, name = weight.module.rpartition(".")
        fused = next((names for names in _SHARING if name in names), (name,))
        groups.setdefault((parent, fused), []).append(weight)
    scales: dict[str, AnyNode] = {}
    for members in groups.values():
        try:
            scale = apply(SharedScale(), *(weight.node for weight in members))
        except CoverageError as error:
            raise CoverageError(f"{OPTION} {preset.name}: {members[0].name}: {error}: cast them with --dtype") from error
        scales.update(dict.fromkeys((weight.module for weight in members), scale))
    return scales


def _replaced(conversion: Conversion, made: Mapping[str, Mapping[str, AnyNode]], preset: Preset, how: Mapping[str, str]) -> Conversion:
    """A conversion with other tensors in the places of those that they stand for; ``how`` they come of these, where not by rounding."""
    outputs: dict[str, AnyNode] = {}
    rows: list[Row] = []
    row_of = {row.target: row for row in conversion.rows}
    for target, node in conversion.outputs.items():
        row = row_of[target]
        if target not in made:
            outputs[target] = node
            rows.append(row)
            continue
        for name, part in made[target].items():
            if name in outputs or (name in conversion.outputs and name not in made):
                raise CoverageError(f"{OPTION} {preset.name}: {target} would become {name}, which there is already")
            outputs[name] = part
            steps = ["repack"] if how.get(name) == "repack" else filter(None, (row.layout, how.get(name, f"quantize {preset.name}")))
            layout = ", then ".join(steps)
            rows.append(Row(name, row.sources, layout, part.spec))
    return replace(conversion, outputs=outputs, rows=rows)
