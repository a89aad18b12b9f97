"""What transformers knows of layouts, run on files: the recipes between a checkpoint as it is on the Hub and as the library keeps it.

The mapping is the installed library's own: its matching decides names, and its operations run on tensors without data (see `lazy`), so
that what they rearrange becomes a graph which streams. The way back is made with real sizes and proved, before anything is written, to be
one: the way there, applied to it, must give every tensor back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from streamconv.errors import CoverageError
from streamconv.graph.moves import identity
from streamconv.graph.node import AnyNode, sources, trace
from streamconv.library.foreign import make_foreign
from streamconv.library.model import LibraryModel, Nodes
from streamconv.recipe import Recipe
from streamconv.recipe.application import Conversion, Recast, Replica
from streamconv.recipe.facts import Option
from streamconv.recipe.steps import cast
from streamconv.rows import Row

TO_NATIVE, TO_HUB = "transformers-hub2native", "transformers-native2hub"
_OPTIONS = {
    "allow_missing": Option("patterns of the model's tensors that the source need not have, such as 'score.*', with commas", default=""),
    "tied": Option("copy: tied tensors are stored under each name, as in a state dict; keep: once", "copy", ("copy", "keep")),
}


@dataclass(frozen=True)
class Bridge(Recipe):
    """A recipe whose facts transformers holds; ``name`` says the direction."""

    @property
    def lost(self) -> list[str]:
        """See `Recipe.lost`."""
        passed_over = "tensors that transformers passes over when it loads, such as layers that predict more tokens: not made again"
        return [passed_over] if self.name == TO_HUB else []

    def make(
        self, nodes: Nodes, rows: Mapping[str, Row], scope: Mapping[str, Any], values: Mapping[str, Any], recast: Recast
    ) -> Conversion:
        """See `Recipe.make`.

        Raises:
            UsageError: transformers is not installed, or does not know the model.
            CoverageError: tensors that are missing, unexpected, or of another shape than the model's.
        """
        title = f"recipe {self.name}"
        config = scope["config"] or scope["sidecar"]
        model, nodes = LibraryModel(config, title), dict(nodes)
        if self.name == TO_NATIVE:
            targets, how, passed_over = model.load(nodes, make_foreign, recast)
            model.check(targets, values["allow_missing"])
            ties = {name: original for name, original in model.ties.items() if original in targets}
            replicas: list[Replica] = [(targets[name], targets[other], (name, other)) for name, other in ties.items() if name in targets]
            if values["tied"] == "copy":
                targets |= {name: targets[original] for name, original in ties.items()}
            else:
                targets = {name: node for name, node in targets.items() if name not in ties}
            return conclude(nodes, rows, targets, how, recast, dropped=passed_over, tied=list(ties), replicas=replicas)
        model.check(nodes, values["allow_missing"])
        ties = {name: original for name, original in model.ties.items() if name in nodes and original in nodes}
        once = {name: node for name, node in nodes.items() if name not in ties}
        targets, how = model.save(once)
        _prove(model, targets, once)
        replicas = [(nodes[name], nodes[original], (name, original)) for name, original in ties.items()]
        return conclude(nodes, rows, targets, how, recast, tied=list(ties), replicas=replicas)


def conclude(
    nodes: Nodes,
    rows: Mapping[str, Row],
    targets: Nodes,
    how: Mapping[str, str],
    recast: Recast,
    *,
    dropped: Mapping[str, str] | None = None,
    tied: Iterable[str] = (),
    replicas: Iterable[Replica] = (),
    notes: Iterable[str] = (),
) -> Conversion:
    """A conversion of ``nodes`` into ``targets``, each of which takes the place of its first source.

    Args:
        nodes: the tensors, by name, in order.
        rows: what they are made of.
        targets: what they become, as nodes above them.
        how: target -> what is done for it, where that is more than a new name.
        recast: which dtype a target shall have.
        dropped: tensors that are left out -> why.
        tied: names that repeat another.
        replicas: tensors that must be the same.
        notes: what to tell the user.
    """
    names: dict[int, str] = {}
    for name, node in nodes.items():
        names.update((id(source), name) for source in sources(node))
    order = {name: k for k, name in enumerate(nodes)}
    outputs: list[tuple[int, Row, AnyNode]] = []
    for target, node in targets.items():
        inputs = list(dict.fromkeys(names[id(source)] for source in sources(node)))
        result = cast(node, recast(target, node.spec))
        source_names = dict.fromkeys(chain.from_iterable(rows[name].sources for name in inputs))
        position = min((order[name] for name in inputs), default=len(order))
        outputs.append((position, Row(target, tuple(source_names), how.get(target, ""), result.spec), result))
    outputs.sort(key=lambda item: item[0])
    reasons = {source: why for name, why in (dropped or {}).items() for source in rows[name].sources}
    return Conversion(
        {row.target: node for _, row, node in outputs},
        [row for _, row, _ in outputs],
        [*reasons, *(name for name in tied if name in rows)],
        notes=list(notes),
        replicas=list(replicas),
        reasons=reasons,
        tied=list(tied),
    )


def _prove(model: LibraryModel, targets: Nodes, nodes: Nodes) -> None:
    """Raises CoverageError unless loading what was made gives every tensor of the source back, element by element."""
    again, _, _ = model.load(targets, make_foreign)
    for name, original in nodes.items():
        node = again.get(name)
        pieces = trace(node, identity(node.spec.numel)) if node and node.spec.numel else ()
        moves = [(piece.leaf, piece.move.simplify()) for piece in pieces]
        source = next(sources(original))  # of a matrix with scales the matrix
        in_place = all(leaf is source and (move.src, move.src_strides) == (move.dst, move.dst_strides) for leaf, move in moves)
        if node is None or node.spec != original.spec or not in_place:
            raise CoverageError(f"{model.title}: {name} would not come back: transformers' mapping for this model cannot be undone")


BRIDGES = (
    Bridge(
        TO_NATIVE,
        "any model of transformers: the layout on the Hub to the one that the installed version keeps in memory",
        (),
        options=_OPTIONS,
        reference="the installed transformers: core_model_loading, conversion_mapping",
    ),
    Bridge(
        TO_HUB,
        "any model of transformers: the layout that the installed version keeps in memory to the one on the Hub",
        (),
        options=_OPTIONS,
        reference="the installed transformers: core_model_loading, conversion_mapping",
    ),
)
