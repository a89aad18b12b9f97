"""``--graft``: tensors of another checkpoint beside or instead of the source's own, before a recipe or a cast sees them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamconv.checkpoint.opening import Checkpoint, open_checkpoint
from streamconv.conversion.altered import Altered
from streamconv.conversion.companions import Weights, weights_of
from streamconv.conversion.options import Options
from streamconv.conversion.renaming import rule_of
from streamconv.dtypes import CASTABLE
from streamconv.errors import CoverageError, UsageError
from streamconv.graph.node import AnyNode
from streamconv.recipe import Conversion, Drop, Recipe
from streamconv.recipe.facts import Fact

OPTION = "--graft"
_LAYERS, _PREDICTED = "num_hidden_layers", "num_nextn_predict_layers"
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")
_TOWERS = {
    "vision_config": re.compile(r"(?:.*\.)?(?:visual|vision_tower|vision_model)\."),
    "audio_config": re.compile(r"(?:.*\.)?audio_tower\."),
}
"""Keys of a config, and the names of what they are of."""
_TIES, _HEAD, _EMBEDDING = "tie_word_embeddings", "lm_head.weight", re.compile(r"(?:.*\.)?embed_tokens\.weight")


def graft(options: Options, checkpoint: Checkpoint) -> Altered | None:
    """A checkpoint with what is asked for of another one; None: nothing is.

    Raises:
        UsageError: options that do not go together, a tensor that is there already, or a checkpoint of components.
        CoverageError: a pattern that nothing matches, or a part of a quantized weight.
        NotationError: one that cannot be read.
    """
    takes = list(options.take)
    if options.graft is None:
        if takes or options.replace:
            raise UsageError(f"--take and --replace say what {OPTION} takes of another checkpoint: give that, too, or leave them out")
        return None
    if not takes:
        raise UsageError(f"{OPTION} {options.graft}: --take PATTERN says which of its tensors are wanted: give it")
    other = open_checkpoint(options.graft)
    for one in (checkpoint, other):
        if list(one.components) != [""]:
            raise UsageError(f"{OPTION}: {one.path} consists of components, and tensors go from one model to another: give those")
    facts: tuple[Fact, ...] = (*(rule_of("--take", text) for text in takes), Drop("{name*}", "--take does not name it", fallback=True))
    taken = Recipe(f"graft of {other.path}", "what --take says", facts).apply(other.contents.entries, other.config, {})
    entries: dict[str, AnyNode] = dict(checkpoint.contents.entries)
    instead = [name for name in taken.outputs if name in entries]
    if instead and not options.replace:
        raise UsageError(
            f"{OPTION} {other.path}: {instead[0]} is in SRC, too: --replace takes that of the other, --take 'old -> new' renames"
        )
    own = weights_of(checkpoint)
    _check_quantized(f"{OPTION} {other.path}", own, weights_of(other), taken)
    entries.update(taken.outputs)
    config = _config_of(checkpoint.config, other.config, [name for name in taken.outputs if name not in instead])
    config |= _untied(checkpoint.config, other.config, list(taken.outputs))
    config |= own.config_with(_modules_of(taken), checkpoint.config)
    said = f"; config.json has another {', '.join(config)} for them" if config else ""
    note = f"{OPTION} {other.path}: {len(taken.outputs)} of its {len(other)} tensors, {len(instead)} instead of SRC's own{said}"
    changed = {name: f"{'replaced' if name in instead else 'brought'} by a graft" for name in taken.outputs}
    return Altered(
        checkpoint.with_contents(replace(checkpoint.contents, entries=entries)), changed, [note], config, brought={*taken.outputs}
    )


def _check_quantized(option: str, own: Weights, weights: Weights, taken: Conversion) -> None:
    """Raises CoverageError for parts of quantized weights, and for such that the config does not describe."""
    names = {row.sources[0]: row.target for row in taken.rows}
    codes = next((weight.tensors[0] for weight in weights.weights if weight.tensors[0] in names), None)
    if codes is not None and not own.is_like(weights):
        other_way = f"is so by {own.method}, and otherwise" if own.method else "is not"
        problem = f"{codes} is quantized by {weights.method}, and SRC {other_way}"
        raise CoverageError(f"{option}: {problem}: graft from what --dequantize makes of it")
    weights.check_names(names, f"{option}: --take", f"{option}: --take")
    own.check_replaced(option, taken.outputs)


def _modules_of(taken: Conversion) -> list[str]:
    """Modules whose weights have come as numbers, and might be quantized ones."""
    plain = [name for name, node in taken.outputs.items() if node.spec.dtype.name in CASTABLE and len(node.spec.shape) > 1]
    return [name.removesuffix(".weight") for name in plain if name.endswith(".weight")]


def _config_of(own: Mapping[str, Any], other: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Keys of a config that go with new tensors, as the other checkpoint has them."""
    config: dict[str, Any] = {}
    depth = own.get(_LAYERS)
    layers = [int(match[1]) for match in map(_LAYER.match, names) if match]
    if type(depth) is int and _PREDICTED in other and any(layer >= depth for layer in layers):
        config[_PREDICTED] = other[_PREDICTED]
    for key, pattern in _TOWERS.items():
        if key in other and any(map(pattern.match, names)):
            config[key] = other[key]
    return {key: value for key, value in config.items() if own.get(key) != value}


def _untied(own: Mapping[str, Any], other: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """What a config says once a head has come that is not the embedding; libraries take one that says nothing for tied."""
    if _HEAD not in names or own.get(_TIES) is False:
        return {}
    is_of_its_embedding = other.get(_TIES) and any(map(_EMBEDDING.fullmatch, names))
    return {} if is_of_its_embedding else {_TIES: False}
