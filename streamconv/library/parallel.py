"""Tensor-parallel shards: one checkpoint for each rank out of a whole one, and back, by the plan of a transformers model or by one's own.

A plan maps module or parameter names, with ``*`` for numbers, to styles, as ``base_model_tp_plan`` does. What a style means for a tensor
is that of ``transformers.distributed.tensor_parallel`` (5.23), counted from the last axis, so that it holds for tensors on the Hub, one
for each expert, as it does for the library's fused ones.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv.errors import CoverageError, UsageError
from streamconv.extras import require
from streamconv.graph.node import AnyNode
from streamconv.library.bridge import conclude
from streamconv.library.heads import Heads, find_heads, head_size
from streamconv.library.model import LibraryModel
from streamconv.recipe import Recipe
from streamconv.recipe.application import Conversion, Recast, Replica
from streamconv.recipe.facts import Option, Side
from streamconv.recipe.steps import take
from streamconv.rows import Row

if TYPE_CHECKING:
    from streamconv.library.lazy import LazyTensor

Pair = tuple["LazyTensor", "LazyTensor", int, int]
"""Tensors of two ranks, whose numbers follow, that must be the same."""
RANKS = Side(ranks=("model{r}-mp{n}.safetensors",))
FILE = "model{rank}-mp{size}.safetensors"
_RANKED = re.compile(r"model(\d+)-mp(\d+)\.safetensors/(.+)", re.DOTALL)
MOST_RANKS = 4096
_WORDS = re.compile(r"embed|lm_head|wte|\bhead\b|output")
_MAX_PLAN = 4 << 20  # bytes


@dataclass(frozen=True)
class Style:
    """How a tensor is divided among ranks.

    Attributes:
        axis: counted from the end, None: every rank has all of it; a tensor of one axis is divided along that.
        bias: whether those called ``bias`` are, too.
        blocks: relative sizes of the blocks along the axis, each of which is divided.
        experts: a tensor for each expert goes to one rank, as a row of a fused tensor of experts does.
        heads: of each block how many heads there are along the axis, where ranks beyond that repeat them; none: blocks are divided.
    """

    axis: int | None = None
    bias: bool = True
    blocks: tuple[int, ...] = (1,)
    experts: bool = False
    heads: tuple[int, ...] = ()

    def copies(self, size: int) -> tuple[int, ...]:
        """Of each block, how many ranks that follow each other have the same part."""
        return tuple(max(1, size // count) if count else 1 for count in self.heads) or (1,) * len(self.blocks)


_WHOLE = (
    "replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "all_reduce", "moe_tp_experts", "moe_identity_expert", "local_params",
    "sequence_parallel", "ep_dispatch_experts",
)  # fmt: skip
STYLES = {
    **dict.fromkeys(("colwise", "colwise_rep", "colwise_gather_output"), Style(-2)),
    **dict.fromkeys(("rowwise", "rowwise_rep", "rowwise_split_input"), Style(-1, bias=False)),
    "packed_colwise": Style(-2, blocks=(1, 1)),
    "packed_rowwise": Style(-1, bias=False, blocks=(1, 1)),
    "embedding_rowwise": Style(-2),
    "embedding_colwise": Style(-1),
    "grouped_gemm": Style(-3, experts=True),
    **dict.fromkeys(_WHOLE, Style()),
}
"""The styles of a plan. ``packed_colwise:8,2,2`` is one with blocks of these proportions, as a fused q, k, v has."""


@dataclass(frozen=True)
class TensorParallel(Recipe):
    """A recipe whose facts are a plan.

    Attributes:
        merge: it is the way back.
        own: its plan, where that is not the model's.
        number: the option that says how many ranks there are.
        even: what is divided must divide evenly.
    """

    merge: bool = False
    own: Mapping[str, str] = field(default_factory=dict)
    number: str = "model_parallel"
    even: bool = False

    def make(
        self, nodes: Mapping[str, AnyNode], rows: Mapping[str, Row], scope: Mapping[str, Any], values: Mapping[str, Any], recast: Recast
    ) -> Conversion:
        """See `Recipe.make`.

        Raises:
            UsageError: no plan, or one that cannot be read.
            CoverageError: tensors that cannot be divided as the plan says, or ranks that do not fit together.
        """
        title = f"recipe {self.name}"
        require("torch", title)  # even one that has its own plan: its code rearranges tensors of torch
        from streamconv.library.lazy import LazyTensor

        config = scope["config"] or scope["sidecar"]
        if not self.merge:
            plan = Plan(self._read_plan(values), config, list(nodes), values, title, even=self.even)
            size = values[self.number]
            if not 1 <= size <= MOST_RANKS:
                raise UsageError(f"--set {self.number}={size}: expected a number of ranks from 1 to {MOST_RANKS}")
            if self.number not in scope["given"]:
                plan.notes.append(f"{size} ranks, which --set {self.number}=N changes")
            plan.check({name: node.spec.shape for name, node in nodes.items()}, size)
            targets, how = {}, {}
            for name, node in nodes.items():
                for rank, tensor in enumerate(plan.split(name, LazyTensor(node), size)):
                    if tensor is not None:
                        target = f"{FILE.format(rank=rank, size=size)}/{name}"
                        targets[target] = tensor.node
                        if tensor.node is not node:
                            how[target] = f"part {rank} of {size}"
            return conclude(nodes, rows, targets, how, recast, notes=plan.notes)
        groups, size = _group(nodes, title)
        plan = Plan(self._read_plan(values), config, list(groups), values, title)
        replicas: list[Replica] = []
        targets, how = {}, {}
        for name, ranks in groups.items():
            parts = list(ranks.values())
            dims = len(nodes[parts[0]].spec.shape)
            unexpected = set(ranks).symmetric_difference(plan.holders(name, dims, size))
            if unexpected:
                rank = min(unexpected)
                what = "must not be there by the plan" if rank in ranks else f"is missing, while rank {min(ranks)} has it"
                raise CoverageError(f"{title}: {FILE.format(rank=rank, size=size)}/{name} {what}")
            whole, pairs = plan.join(name, [LazyTensor(nodes[part]) for part in parts])
            replicas += [(first.node, other.node, (parts[a], parts[b])) for first, other, a, b in pairs]
            targets[name] = whole.node
            if whole.node is not nodes[parts[0]]:
                how[name] = f"{len(parts)} parts"
        return conclude(nodes, rows, targets, how, recast, replicas=replicas)

    def flip(self) -> TensorParallel:
        """See `Recipe.flip`."""
        return replace(self, name="", summary="", reference="", left=self.right, right=self.left, merge=not self.merge)

    def _read_plan(self, values: Mapping[str, Any]) -> Mapping[str, str]:
        """The plan given, or nothing: then it is the model's."""
        if not values.get("plan"):
            return self.own
        path = Path(values["plan"])
        try:
            if path.stat().st_size > _MAX_PLAN:
                raise UsageError(f"--set plan={path}: larger than {_MAX_PLAN} bytes, which no plan is")
            styles = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"--set plan={path}: cannot be read as JSON: {error}; give a file of names and styles") from error
        if not isinstance(styles, dict) or not all(isinstance(style, str) for style in styles.values()):
            raise UsageError(f"--set plan={path}: expected a JSON object of names and styles")
        return styles


class Plan:
    """The style of each tensor of a checkpoint, and what it makes of it."""

    def __init__(
        self,
        plan: Mapping[str, str],
        config: Mapping[str, Any],
        names: Sequence[str],
        values: Mapping[str, Any],
        title: str,
        *,
        even: bool = False,
    ) -> None:
        self.title, self._values, self._even = title, values, even
        self._whole, self._config = config, config.get("text_config") or config
        self.notes: list[str] = []
        library = None if plan else LibraryModel(config, title)
        self._plan = {name: _read_style(text, title) for name, text in (plan or _plan_of(library, title)).items()}
        self._places: dict[str, tuple[str, bool]] = {}
        if library:
            renamings, converters = library.transforms()
            fusing = set(chain.from_iterable(one.source_patterns for one in converters if len(one.source_patterns) > 1))
            for name in names:
                target, pattern = (name, None) if name in library.meta else library.place(name, renamings, converters)
                self._places[name] = (target, pattern in fusing)
        if not any(self._rule(self._places.get(name, (name, False))[0]) for name in names):
            raise CoverageError(f"{title}: the plan names none of these tensors: is it for this model?")

    def _rule(self, name: str) -> str | None:
        """The plan's name for a tensor: its own, or its module's."""
        general = re.sub(r"\.\d+(\.|$)", r".*\1", name)
        module = general.rpartition(".")[0]
        return next((key for key in (general, module) if key in self._plan), None)

    def style(self, name: str, shape: Sequence[int], size: int, *, part: bool = False) -> Style:
        """How a tensor of that shape, or of whose parts each has it, is divided among so many ranks."""
        dims = len(shape)
        target, alone = self._places.get(name, (name, False))
        rule = self._rule(target)
        style = self._plan[rule] if rule else Style()
        if (alone or (dims == 1 and self._places)) and len(set(style.blocks)) == 1:  # the library has no blocks in biases
            style = replace(style, blocks=(1,))
        axis = _axis(style, name, dims)
        heads = find_heads(name, self._whole) if axis is not None else None
        if heads is None or axis is None:
            return style
        by_block = (0, *heads.each[1:]) if len(style.blocks) == len(heads.each) else ()
        counts = (heads.count,) if heads.repeatable else by_block
        if not any(count and size > count for count in counts):
            return style
        choice = self._values.get("kv_heads")
        if choice == "divide" or (not choice and part and self._divides(heads, shape[axis], size)):
            return style
        return replace(style, heads=counts)

    def _divides(self, heads: Heads, count: int, size: int) -> bool:
        """Whether the parts of ``count`` elements of so many ranks are those of heads that were divided, not repeated."""
        return count * size == head_size(self._whole) * (sum(heads.each) or heads.count)

    def check(self, shapes: Mapping[str, Sequence[int]], size: int) -> None:
        """Raises CoverageError where heads, experts or words cannot be shared among so many ranks; notes what ranks repeat."""
        units_of: dict[Heads, str] = {}
        for name, shape in shapes.items():
            for units in self._units(name, shape, size):
                units_of.setdefault(units, name)
        unfitting = [units for units in units_of if not units.fit(size)]
        if unfitting:
            units, name = unfitting[0], units_of[unfitting[0]]
            most = max(one.count for one in units_of)
            fitting = [count for count in range(1, most + 1) if all(one.fit(count) for one in units_of)]
            sizes = f"{', '.join(map(str, fitting[:-1]))} or {fitting[-1]}" if fitting[1:] else "1 only"
            raise CoverageError(
                f"{self.title}: {units.count} {units.what} cannot be divided among {size} ranks ({name}): model_parallel can be {sizes}"
            )
        self.notes += [
            f"{units.count} {units.what} for {size} ranks: {size // units.count} ranks in a row hold the same"
            for units in units_of
            if units.repeatable and size > units.count
        ]

    def _units(self, name: str, shape: Sequence[int], size: int) -> Iterator[Heads]:
        """What must not be cut where a tensor is divided."""
        style = self.style(name, shape, size)
        axis = _axis(style, name, len(shape))
        if style.experts:
            if len(shape) < 3:
                self._expert(name)
            yield Heads("experts", self._count_experts() if len(shape) < 3 else shape[0])
        elif axis is not None:
            heads = find_heads(name, self._whole)
            words = self._config.get("vocab_size")
            if heads and shape[axis] % heads.count == 0:
                yield from self._heads(heads, style)
            elif shape[axis] == words and axis == len(shape) - 2 and _WORDS.search(name) and not self._values.get("pad_vocab"):
                yield Heads("words (--set pad_vocab=N fills them up)", shape[axis])

    def _heads(self, heads: Heads, style: Style) -> Iterator[Heads]:
        """The heads of a tensor, of each of its blocks where it is divided block by block."""
        if len(heads.each) == len(style.blocks):
            yield Heads("heads", heads.each[0])
            yield Heads("heads of keys and values", heads.each[1], repeatable=self._values.get("kv_heads") != "divide")
        else:
            yield replace(heads, each=(), repeatable=heads.repeatable and self._values.get("kv_heads") != "divide")

    def holders(self, name: str, dims: int, size: int) -> Sequence[int]:
        """The ranks that have a tensor, or a part of it."""
        if not self.style(name, (0,) * dims, size).experts or dims > 2:
            return range(size)
        number, count = self._expert(name), self._count_experts()
        if count % size:
            raise CoverageError(f"{self.title}: {count} experts cannot be divided among {size} ranks")
        return [number * size // count]

    def split(self, name: str, tensor: LazyTensor, size: int) -> Sequence[LazyTensor | None]:
        """The tensor of each rank; None where it has none."""
        style = self.style(name, tensor.shape, size)
        axis = _axis(style, name, tensor.dim())
        if style.experts and tensor.dim() < 3:
            holders = self.holders(name, tensor.dim(), size)
            return [tensor if rank in holders else None for rank in range(size)]
        if axis is None:
            return [tensor] * size
        tensor = self._pad(tensor, axis, size)
        even = self._even or len(set(style.blocks)) > 1
        what = f"{self.title}: {name}"
        blocks = self._blocks(name, tensor, style.blocks, axis)
        heads = style.heads or (0,) * len(blocks)
        parts = [_chunks(block, size, axis, count, what, even=even) for block, count in zip(blocks, heads, strict=True)]
        return [_join(parts_of_rank, axis) for parts_of_rank in zip(*parts, strict=True)]

    def join(self, name: str, tensors: Sequence[LazyTensor]) -> tuple[LazyTensor, list[Pair]]:
        """The whole tensor of those of all ranks, and what of them must be the same."""
        size = len(tensors)
        style = self.style(name, tensors[0].shape, size, part=True)
        axis = _axis(style, name, tensors[0].dim())
        if axis is None or (style.experts and tensors[0].dim() < 3):
            return tensors[0], [(tensors[0], other, 0, k) for k, other in enumerate(tensors) if k]
        copies = style.copies(size)
        shares = [part * count for part, count in zip(style.blocks, copies, strict=True)]
        shares = [share // math.gcd(*shares) for share in shares]
        ranks = [self._blocks(name, tensor, shares, axis) for tensor in tensors]
        blocks: list[LazyTensor] = []
        pairs: list[Pair] = []
        for k, count in enumerate(copies):  # of so many ranks in a row the first one's block stands for all
            blocks.append(_join([rank[k] for rank in ranks[::count]], axis))
            for number, rank in enumerate(ranks):
                first = number - number % count
                if first != number:
                    pairs.append((ranks[first][k], rank[k], first, number))
        whole = _join(blocks, axis)
        rows, most = self._config.get("vocab_size") or 0, (self._values.get("pad_vocab") or 0) * size
        if most and axis == whole.dim() - 2 and rows < whole.shape[axis] <= _up(rows, most):
            from streamconv.library.lazy import LazyTensor

            whole = LazyTensor(take("rows", [whole.node], {"stop": rows}, {}))
        return whole, pairs

    def _pad(self, tensor: LazyTensor, axis: int, size: int) -> LazyTensor:
        """A tensor with a row for each word, filled up so that ranks get the same number."""
        rows = tensor.shape[axis]
        if not self._values.get("pad_vocab") or axis or rows != self._config.get("vocab_size"):
            return tensor
        from streamconv.library.lazy import LazyTensor

        return LazyTensor(take("pad", [tensor.node], {"rows": _up(rows, self._values["pad_vocab"] * size)}, {}))

    def _blocks(self, name: str, tensor: LazyTensor, shares: Sequence[int], axis: int) -> Sequence[LazyTensor]:
        total = sum(shares)
        if tensor.shape[axis] % total:
            raise CoverageError(f"{self.title}: {name}: {tensor.shape[axis]} elements are not in proportion {shares}")
        unit = tensor.shape[axis] // total
        return tensor.split([unit * part for part in shares], dim=axis)  # type: ignore[no-untyped-call,no-any-return]

    def _expert(self, name: str) -> int:
        match = re.search(r"\.experts\.(\d+)\.", name)
        if match is None:
            raise CoverageError(f"{self.title}: {name}: the plan divides it by expert, and its name has no number of one")
        return int(match[1])

    def _count_experts(self) -> int:
        keys = ("n_experts", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        for key, table in product(keys, (self._values, self._config)):
            count = table.get(key)
            if isinstance(count, int):
                return int(count)
        raise CoverageError(f"{self.title}: config.json has none of {', '.join(keys)}: how many experts there are is not known")


def _up(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple


def _axis(style: Style, name: str, dims: int) -> int | None:
    """The axis along which a tensor is divided; None: it is not."""
    if style.axis is None or not dims or (dims == 1 and not style.bias and name.rpartition(".")[2] == "bias"):
        return None
    return max(0, style.axis + dims)


def _chunks(tensor: LazyTensor, size: int, axis: int, heads: int, what: str, *, even: bool) -> list[LazyTensor]:
    """Parts for each rank, the last one shorter where they do not divide and need not; of heads fewer than ranks, each repeated."""
    count, ranks = tensor.shape[axis], min(size, heads) if heads else size
    step = -(-count // ranks)
    if size % ranks or (heads and count % heads):
        raise CoverageError(f"{what}: {heads} heads in {count} rows cannot be repeated by {size} ranks")
    if (even and count % ranks) or step * (ranks - 1) >= count:
        raise CoverageError(f"{what}: {count} elements cannot be divided among {size} ranks")
    parts = tensor.split(step, dim=axis)  # type: ignore[no-untyped-call]
    return [parts[rank * ranks // size] for rank in range(size)]


def _join(tensors: Sequence[LazyTensor], axis: int) -> LazyTensor:
    import torch

    return torch.cat(list(tensors), dim=axis) if len(tensors) > 1 else tensors[0]  # type: ignore[return-value]


def _group(names: Mapping[str, AnyNode], title: str) -> tuple[dict[str, dict[int, str]], int]:
    """The names of all ranks by the name that they share, in the order of ranks, and how many ranks there are."""
    groups: dict[str, dict[int, str]] = {}
    sizes = set()
    for part in names:
        match = _RANKED.fullmatch(part)
        if match is None:
            raise CoverageError(f"{title}: {part}: expected tensors of files model0-mpN.safetensors, model1-mpN.safetensors, ...")
        groups.setdefault(match[3], {})[int(match[1])] = part
        sizes.add(int(match[2]))
    if len(sizes) != 1:
        raise CoverageError(f"{title}: files of {', '.join(map(str, sorted(sizes)))} ranks are there: keep those of one size")
    (size,) = sizes
    return {name: dict(sorted(ranks.items())) for name, ranks in groups.items()}, size


def _read_style(text: str, title: str) -> Style:
    name, _, blocks = text.partition(":")
    style = STYLES.get(name)
    if style is None or (blocks and not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", blocks)):
        raise UsageError(f"{title}: the plan's style {text!r} is unknown; known are {', '.join(STYLES)}, and packed_colwise:8,2,2")
    return replace(style, blocks=tuple(map(int, blocks.split(",")))) if blocks else style


def _plan_of(library: LibraryModel | None, title: str) -> Mapping[str, str]:
    plan: Mapping[str, str] = getattr(library.model, "tp_plan", None) or {} if library else {}
    if not plan:
        raise UsageError(f"{title}: transformers has no tensor-parallel plan for this model: give one with --set plan=FILE")
    return plan


_OPTIONS = {
    "plan": Option("a JSON file of names and styles, instead of the model's own plan"),
    "kv_heads": Option(
        "of fewer heads of keys and values than ranks: replicate them; divide: refuse, as no head is cut", None, ("divide", "replicate")
    ),
    "pad_vocab": Option("fill the vocabulary up to this multiple for each rank; 0: as it is", 0),
}
_SUMMARY = "one checkpoint for each tensor-parallel rank, by transformers' plan for the model or one of your own"
SPLIT = TensorParallel(
    "tp-split",
    _SUMMARY,
    (),
    options={"model_parallel": Option("how many ranks", kind="int", required=True, also=("size",)), **_OPTIONS},
    right=RANKS,
    reference="transformers 5.23 distributed/tensor_parallel.py and the models' base_model_tp_plan",
)
MERGE = TensorParallel(
    "tp-merge",
    "tensor-parallel shards, as tp-split writes them, to one checkpoint",
    (),
    options=_OPTIONS,
    left=RANKS,
    reference=SPLIT.reference,
    merge=True,
)
