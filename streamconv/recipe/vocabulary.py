"""More or fewer rows for a model's vocabulary: the input embedding and the output head, found by their usual names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from streamconv.errors import CoverageError
from streamconv.graph.node import AnyNode, Node, made_of
from streamconv.graph.ops import SampleRows
from streamconv.notation.axes import MOST_PARTS
from streamconv.recipe import steps
from streamconv.recipe.application import Conversion
from streamconv.recipe.facts import Option

OPTIONS = {
    "resize_vocab": Option("rows of the input embedding and the output head; new ones are sampled like the old ones", kind="int"),
    "seed": Option("which random numbers new rows are made of", 0),
}
MOST_NEW = (MOST_PARTS - 1) * SampleRows.MOST  # rows that are added: one op for so many, and all of them are parts of one layout
_EMBEDDINGS = (
    "embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight", "shared.weight", "tok_embeddings.weight",
    "token_embedding.weight", "tok_embeddings.embedding_weight", "embedding_table",
)  # fmt: skip
_HEADS = (
    "lm_head.weight", "lm_head.bias", "lm_head.decoder.weight", "lm_head.decoder.bias", "embed_out.weight", "output.weight",
    "output_layer.weight", "predictions.decoder.weight", "predictions.decoder.bias", "predictions.bias",
)  # fmt: skip


def resize_vocab(conversion: Conversion, options: Mapping[str, Any]) -> Conversion:
    """The conversion with as many rows of the vocabulary as ``options["resize_vocab"]`` says; as it is where that is None.

    New rows of a matrix are sampled like its own rows (see `ops.SampleRows`), those of a bias are zero; tied tensors stay tied.

    Raises:
        CoverageError: there is no embedding of a usual name, or its rows are not those of another one or of the head.
    """
    rows = options.get("resize_vocab")
    if rows is None:
        return conversion
    names = [name for name, node in conversion.outputs.items() if _ends(name, _EMBEDDINGS) and len(node.spec.shape) == 2]
    if not names:
        raise CoverageError(f"resize_vocab: no embedding found: no target's name ends in {', '.join(_EMBEDDINGS)}")
    for name in names:
        if "/" in name:
            raise CoverageError(f"resize_vocab: {name} is one rank's part: resize the whole model first, without this recipe")
    count = conversion.outputs[names[0]].spec.shape[0]
    heads = [name for name in conversion.outputs if _ends(name, _HEADS)]
    names += [name for name in heads if conversion.outputs[name].spec.shape[0] == count or _ends(name, ("lm_head.weight",))]
    for name in names:
        spec = conversion.outputs[name].spec
        if spec.shape[0] != count:
            raise CoverageError(f"resize_vocab: {name} is {spec}, {names[0]} has {count} rows: which is the vocabulary?")
    if rows < 1:
        raise CoverageError(f"resize_vocab={rows}: give at least 1")
    if rows - count > MOST_NEW:
        raise CoverageError(f"resize_vocab={rows}: at most {MOST_NEW} rows are added to {count}: give at most {count + MOST_NEW}")
    sized: dict[object, tuple[AnyNode, str]] = {}
    outputs, step_of = dict(conversion.outputs), {}
    for name in names:
        node = outputs[name]
        key = made_of(node)
        if key not in sized:
            sized[key] = _resize(node, rows, options["seed"], len(sized))
        outputs[name], step_of[name] = sized[key]
    mapping = []
    for row in conversion.rows:
        layout = ", then ".join(filter(None, (row.layout, step_of.get(row.target))))
        mapping.append(row._replace(spec=outputs[row.target].spec, layout=layout))
    what = "rows left out" if rows < count else f"rows sampled, seed {options['seed']}"
    notes = [*conversion.notes, f"{', '.join(names)}: {rows} rows instead of {count}, {what}"]
    return replace(conversion, outputs=outputs, rows=mapping, notes=notes, config={**conversion.config, "vocab_size": (count, rows)})


def sampling(nodes: Iterable[AnyNode]) -> dict[str, str]:
    """What a file's metadata should say of rows that were sampled: the seed."""
    seeds: set[int] = set()
    stack, visited = list(nodes), set()
    while stack:
        node = stack.pop()
        if isinstance(node, Node) and id(node) not in visited:
            visited.add(id(node))
            stack += node.inputs
            seeds |= {node.op.seed} if isinstance(node.op, SampleRows) else set()
    return {"seed": ", ".join(map(str, sorted(seeds)))} if seeds else {}


def _resize(node: AnyNode, rows: int, seed: int, stream: int) -> tuple[AnyNode, str]:
    """A tensor with so many rows, and how it came to them."""
    count = node.spec.shape[0]
    if rows == count:
        return node, ""
    if rows < count:
        step, parameters = "rows", {"stop": rows}
    elif len(node.spec.shape) == 1:
        step, parameters = "pad", {"rows": rows}
    else:
        step, parameters = "grow", {"rows": rows, "first": count, "seed": seed, "stream": stream}
    return steps.take(step, [node], parameters, {}), steps.describe(step, parameters)


def _ends(name: str, tails: Iterable[str]) -> bool:
    return any(name == tail or name.endswith((f".{tail}", f"/{tail}")) for tail in tails)
