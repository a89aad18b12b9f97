"""``--adapter``: what PEFT's LoRA has trained beside weights is added to them, before a recipe or a cast sees them.

The numbers are those of `merge_and_unload`: float32, rounded once, to the dtype of the weight (see `ops.MergeLora`).
What is not a plain low-rank product is refused by name. Facts: peft 0.21.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from streamconv.checkpoint.opening import Checkpoint, open_checkpoint, read_config
from streamconv.conversion.altered import Altered
from streamconv.conversion.options import Options
from streamconv.dtypes import CASTABLE
from streamconv.errors import CoverageError, UsageError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import Cast, MergeLora, Reshape
from streamconv.notation.names import nearest
from streamconv.schemes.beside import transpose

OPTION, CONFIG = "--adapter", "adapter_config.json"
_PREFIX = "base_model.model."
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?!weight|bias)[^.]+)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.[^.]+)?")
_ORIGINAL = re.compile(r".+\.original_module(?:\.[^.]+)?\.(?:weight|bias)")  # what the base has, too
_SAVED = re.compile(
    r"(?P<module>.+)\.modules_to_save(?:\.[^.]+)?(?P<last>\.(?:weight|bias))"
)  # of old adapters; in new ones beside the same without it
_KINDS = {"use_dora": "DoRA", "use_qalora": "QALoRA", "alora_invocation_tokens": "aLoRA", "arrow_config": "Arrow", "lora_bias": "lora_bias"}
_KINDS |= {"layer_replication": "layer_replication", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA"}
_KINDS |= {"target_parameters": "target_parameters", "trainable_token_indices": "trainable_token_indices"}
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "true", "false", "mica", "lora_ga", None)
_TRANSPOSED = ("gpt2", "gpt_neo", "imagegpt", "decision_transformer", "openai-gpt")
"""Model types whose linear weights are (inputs, outputs)."""
_TIED = ("embed_tokens", "lm_head", "wte", "embed_out", "shared")


def adapt(options: Options, checkpoint: Checkpoint) -> Altered | None:
    """A checkpoint with the adapters that are asked for, in order; None: with none.

    Raises:
        UsageError: no adapter, or one of a kind that is not merged here.
        CoverageError: a tensor of it that fits none of the checkpoint.
    """
    if not list(options.adapter):
        return None
    if list(checkpoint.components) != [""]:
        raise UsageError(f"{OPTION}: {checkpoint.path} consists of components, and an adapter is of one model: give that as SRC")
    entries = dict(checkpoint.contents.entries)
    changed: dict[str, str] = {}
    notes: list[str] = []
    replaced: dict[str, str] = {}
    for text in options.adapter:
        adapter = _Adapter(*_split(text), checkpoint.config)
        for name, node, how in adapter.merge(entries):
            if how == _REPLACES and replaced.setdefault(name, text) != text:
                raise UsageError(f"{OPTION} {text}: {name} is replaced by {replaced[name]}, too: leave one of them out")
            entries[name] = node
            changed[name] = how
        notes.append(adapter.note)
    contents = replace(checkpoint.contents, entries=entries)
    return Altered(checkpoint.with_contents(contents), changed, notes)


_ADDS, _REPLACES = "add an adapter", "replaced by an adapter"


def _split(text: str) -> tuple[str, float]:
    """An adapter's folder, and what its scale is multiplied with."""
    folder, at, weight = text.rpartition("@")
    if at and re.fullmatch(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", weight):
        return folder, float(weight)
    return text, 1.0


class _Adapter:
    """One adapter: its config, and its tensors by the modules that they are for."""

    def __init__(self, path: str, weight: float, config: Mapping[str, Any]) -> None:
        opened = open_checkpoint(path)
        self._title = f"{OPTION} {opened.path}"
        self._own = read_config(opened.folder, CONFIG)
        if not self._own:
            raise UsageError(f"{self._title}: no {CONFIG} in it, which says how its tensors are merged: give the folder of a PEFT adapter")
        self._check_kind()
        self._weight, self._config = weight, config
        self._tensors = dict(opened.contents.entries)
        self.note = ""

    def _check_kind(self) -> None:
        kind = str(self._own.get("peft_type"))
        if kind != "LORA":
            raise UsageError(f"{self._title}: peft_type {kind} is not merged here: merge it with PEFT's merge_and_unload")
        for key, name in _KINDS.items():
            if self._own.get(key):
                raise UsageError(f"{self._title}: {name} ({key}) is not merged here: merge it with PEFT's merge_and_unload")
        init = self._own.get("init_lora_weights", True)
        if init not in _PLAIN_INITS:
            way = "save it with path_initial_model_for_weight_conversion, which makes an ordinary LoRA of it"
            raise UsageError(f"{self._title}: init_lora_weights {init!r} changes the base's own weights: {way}")

    def merge(self, entries: Mapping[str, AnyNode]) -> Iterator[tuple[str, AnyNode, str]]:
        """Tensors of a base that are others with it, by name, and how."""
        pairs: dict[tuple[str, bool], dict[str, str]] = {}
        whole: dict[str, str] = {}
        saved: dict[str, str] = {}
        for key in self._tensors:
            if not key.startswith(_PREFIX):
                raise CoverageError(f"{self._title}: {key} does not begin with {_PREFIX}, as those of an adapter do: save it with PEFT")
            name = key.removeprefix(_PREFIX)
            low_rank, embedding = _LOW_RANK.fullmatch(name), _EMBEDDING.fullmatch(name)
            match = low_rank or embedding
            if match:
                side = pairs.setdefault((match["module"], embedding is not None), {})
                if side.setdefault(match["side"], key) != key:
                    raise CoverageError(f"{self._title}: {key} and {side[match['side']]} are both for {match['module']}: save one adapter")
            elif ".lora_" in name:
                raise CoverageError(f"{self._title}: {key} is not merged here: merge it with PEFT's merge_and_unload")
            elif not _ORIGINAL.fullmatch(name):
                old = _SAVED.fullmatch(name)
                if old:
                    saved[old["module"] + old["last"]] = key
                else:
                    whole[name.replace(".base_layer.", ".")] = key
        whole = {**saved, **whole}
        made = dict(entries)
        for name, key in whole.items():
            node = self._replace(name, key, entries)
            made[name] = node
            yield name, node, _REPLACES
        for (module, is_embedding), sides in pairs.items():
            name = f"{module}.weight"
            node = self._add(name, module, is_embedding, sides, made)
            yield name, node, _ADDS
        parts = [f"{len(pairs)} weights have low-rank products added"] + ([f"{len(whole)} tensors are the adapter's"] if whole else [])
        self.note = f"{self._title}: {', '.join(parts)}"

    def _base(self, name: str, key: str, entries: Mapping[str, AnyNode]) -> AnyNode:
        if name not in entries:
            near = nearest(name, entries)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise CoverageError(f"{self._title}: {key}: SRC has no {name}{hint}: is it an adapter of this model?")
        tied = self._config.get("tie_word_embeddings") and name.removesuffix(".weight").rpartition(".")[2] in _TIED
        if tied and not ("lm_head.weight" in entries and "model.embed_tokens.weight" in entries):
            raise CoverageError(f"{self._title}: {key}: the model ties its embedding and its head, which an adapter of one of them unties")
        return entries[name]

    def _replace(self, name: str, key: str, entries: Mapping[str, AnyNode]) -> AnyNode:
        base, own = self._base(name, key, entries), self._tensors[key]
        if own.spec.shape != base.spec.shape:
            raise CoverageError(f"{self._title}: {key} is {own.spec}, and {name} of SRC {base.spec}: resize SRC's first, with resize_vocab")
        if own.spec.dtype == base.spec.dtype:
            return own
        if {own.spec.dtype.name, base.spec.dtype.name} <= {*CASTABLE}:
            return apply(Cast(base.spec.dtype.name), own)
        raise CoverageError(f"{self._title}: {key} is {own.spec}, and {name} of SRC {base.spec}: dequantize that with --dequantize")

    def _add(self, name: str, module: str, is_embedding: bool, sides: Mapping[str, str], entries: Mapping[str, AnyNode]) -> AnyNode:
        if len(sides) < 2:
            (key,) = sides.values()
            raise CoverageError(f"{self._title}: {key} has no other half: save the adapter again")
        base = self._base(name, sides["A"], entries)
        down, up = self._tensors[sides["A"]], self._tensors[sides["B"]]
        rank, scale = self._scale(module)
        if down.spec.shape[0] != rank or len(up.spec.shape) < 2 or up.spec.shape[1] != rank:
            raise CoverageError(f"{self._title}: {sides['A']} is {down.spec}: its rank is {rank} by {CONFIG}")
        if base.spec.dtype.name not in CASTABLE:
            raise CoverageError(f"{self._title}: {name} of SRC is {base.spec}, no floating point: dequantize it with --dequantize")
        if is_embedding:  # the product the other way round
            down, up = transpose(up), transpose(down)
        outputs, inputs = up.spec.shape[0], math.prod(down.spec.shape[1:])
        down = down if len(down.spec.shape) == 2 else apply(Reshape((rank, inputs)), down)
        up = up if len(up.spec.shape) == 2 else apply(Reshape((outputs, rank)), up)
        shape = base.spec.shape
        op = MergeLora(1, outputs, inputs, rank, scale)
        kind = self._config.get("model_type")
        is_turned = shape == (inputs, outputs) and (inputs != outputs or kind in _TRANSPOSED) and not is_embedding
        if is_turned:
            return transpose(apply(op, transpose(base), down, up))
        if shape[:1] != (outputs,) or math.prod(shape[1:]) != inputs:
            raise CoverageError(
                f"{self._title}: {sides['A']} {down.spec} and {up.spec} make {outputs} x {inputs}, {name} of SRC is {base.spec}"
            )
        if len(shape) == 2:
            return apply(op, base, down, up)
        return apply(Reshape(shape), apply(op, apply(Reshape((outputs, inputs)), base), down, up))

    def _scale(self, module: str) -> tuple[int, float]:
        """The rank of a module's matrices, and what their product is multiplied with."""
        rank = self._of_pattern("rank_pattern", module, self._own.get("r"))
        alpha = self._of_pattern("alpha_pattern", module, self._own.get("lora_alpha"))
        if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
            raise UsageError(f"{self._title}: r is {rank!r} and lora_alpha {alpha!r} for {module}: mend {CONFIG}")
        divisor = math.sqrt(rank) if self._own.get("use_rslora") else rank
        return rank, alpha / divisor * self._weight

    def _of_pattern(self, key: str, module: str, usual: Any) -> Any:
        table = self._own.get(key)
        for pattern, value in table.items() if isinstance(table, Mapping) else ():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise UsageError(f"{self._title}: {key} {pattern!r} of {CONFIG} is no expression ({error}): mend it") from error
        return usual
