"""Models of other vocabularies, as the tokens of one tokenizer have them: rows of embeddings and heads go where that has their token."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from streamconv.errors import CoverageError
from streamconv.formats.json_text import read_json
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import PickRows
from streamconv.merging.arithmetic import promoted
from streamconv.merging.file import MergeFile
from streamconv.merging.models import Model, heads_of, text_config_of
from streamconv.recipe.steps import cast

_LARGEST = 1 << 28  # bytes of a tokenizer's file
_ROWS = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|embed_in|lm_head|embed_out)\.(?:weight|bias)", re.DOTALL)
SIZE = "vocab_size"


@dataclass(frozen=True)
class Vocabulary:
    """Models whose embeddings have the rows of one tokenizer's tokens, how many these are, and notes."""

    models: Mapping[str, Model]
    size: int
    notes: Sequence[str]


def align(file: MergeFile, models: Mapping[str, Model], base: str) -> Vocabulary:
    """The models with the vocabulary of ``base``; a token that one lacks has the base's row.

    Raises:
        RecipeError: the base has no tokenizer.
        CoverageError: a model's embedding has fewer rows than its tokenizer has tokens.
    """
    tokens = _tokens_of(models[base])
    if tokens is None:
        line = file.lines["tokenizer_source"]
        file.fail(line, f"tokenizer_source: base needs tokenizer.json beside {base}: put it there, or save its tokenizer with transformers")
    names = sorted(tokens, key=tokens.__getitem__)
    if [tokens[name] for name in names] != list(range(len(names))):
        file.fail(file.lines["tokenizer_source"], f"tokens of {base} are not numbered one after the other: merge without tokenizer_source")
    rearranged, notes, heads = {}, [], heads_of(models.values())
    for name, model in models.items():
        own = tokens if name == base else _tokens_of(model)
        if own is None:
            notes.append(f"{file.path}: {name} has no tokenizer.json: its tokens are taken to be those of {base}")
        rows = [(own or tokens).get(token, -1) for token in names]
        rearranged[name] = _with_rows(file, model, models[base], rows, heads)
    return Vocabulary(rearranged, len(names), notes)


def _tokens_of(model: Model) -> dict[str, int] | None:
    """A tokenizer's tokens that a model's embedding has rows for, and their numbers; None: there is no tokenizer."""
    folder = model.checkpoint.folder
    if not folder.has("tokenizer.json"):
        return None
    tokenizer = _read(model, "tokenizer.json")
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    tokens: dict[str, int] = dict(vocabulary)
    tokens |= {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or ()}
    added = _read(model, "tokenizer_config.json").get("added_tokens_decoder") if folder.has("tokenizer_config.json") else None
    for number, entry in (added or {}).items():
        tokens.setdefault(entry["content"], int(number))
    size = text_config_of(model.config).get(SIZE, math.inf)
    return {token: number for token, number in tokens.items() if number < size}


def _read(model: Model, name: str) -> dict[str, Any]:
    contents = read_json(model.checkpoint.folder.file(name), _LARGEST, "a tokenizer")
    return contents if isinstance(contents, dict) else {}


def _with_rows(file: MergeFile, model: Model, base: Model, rows: Sequence[int], heads: Sequence[str]) -> Model:
    """A model whose embedding and head have these rows of its own, -1: the base's row of that number.

    An embedding that is a head, too, becomes one of its own: it takes the rows that it lacks from the base's head.
    """
    entries: dict[str, AnyNode] = dict(model.checkpoint.contents.entries)
    last, lacks_some = max(rows), -1 in rows
    stored = {name: node for name, node in entries.items() if _ROWS.fullmatch(name) and node.spec.shape}
    if lacks_some:
        stored |= {head: node for head in heads if head not in entries and (node := model.tensor(head)) is not None}
    for name, node in stored.items():
        other, problem = base.tensor(name), ""
        if last >= node.spec.shape[0]:
            problem = f"its tokenizer has token {last}: merge models whose tokenizers are theirs"
        elif lacks_some and (other is None or other.spec.shape[1:] != node.spec.shape[1:] or len(rows) > other.spec.shape[0]):
            problem = f"takes rows of {base.name}, which has none like these: merge models of one width"
        if problem:
            raise CoverageError(f"{file.path}:{file.lines['tokenizer_source']}: {name} of {model.name} is {node.spec}, and {problem}")
        entries[name] = _pick(node, other if lacks_some else None, rows)
    checkpoint = model.checkpoint
    return replace(model, checkpoint=checkpoint.with_contents(replace(checkpoint.contents, entries=entries)))


def _pick(node: AnyNode, other: AnyNode | None, rows: Sequence[int]) -> AnyNode:
    """Rows of a tensor, one after the other; -1: of the other one, that of the same number."""
    places = [(0, row) if row >= 0 else (1, number) for number, row in enumerate(rows)]
    cuts = [k for k, (before, here) in enumerate(pairwise(places), 1) if here != (before[0], before[1] + 1)]
    runs = tuple((*places[start], end - start) for start, end in pairwise([0, *cuts, len(places)]))
    if runs == ((0, 0, node.spec.shape[0]),):
        return node
    nodes = [node] if other is None else [node, other]
    dtype = promoted([one.spec.dtype.name for one in nodes])
    return apply(PickRows(runs, math.prod(node.spec.shape[1:])), *(cast(one, dtype) for one in nodes))
