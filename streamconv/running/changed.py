"""How many of a model's weights adapters have changed at all: what is added may be too little for a dtype to hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from streamconv.graph.losses import Loss
from streamconv.notation.folding import kind_of

SHOWN = 3  # kinds of layers that are told in words


@dataclass(frozen=True)
class Kind:
    """Weights of layers whose names differ in their numbers only.

    Attributes:
        name: theirs, with ``*`` for numbers.
        tensors: how many these are.
        weights: how many elements they have.
        changed: how many of those are others now.
    """

    name: str
    tensors: int
    weights: int
    changed: int

    @property
    def share(self) -> float:
        """The part of them that changed."""
        return self.changed / self.weights

    def __str__(self) -> str:
        return f"{self.name} {self.share:.1%}"


@dataclass(frozen=True)
class ChangedWeights:
    """Of tensors that adapters changed, as far as this run made them.

    Attributes:
        losses: by target.
        complete: whether it made all.
    """

    losses: Mapping[str, Loss] = field(default_factory=dict)
    complete: bool = True

    def kinds(self) -> list[Kind]:
        """The kinds of layers there are, those of which the fewest changed first."""
        sums: dict[str, tuple[int, Loss]] = {}
        for name, loss in self.losses.items():
            if loss.compared:
                kind, _ = kind_of(name)
                tensors, total = sums.get(kind, (0, Loss()))
                sums[kind] = tensors + 1, total + loss
        kinds = [Kind(name, tensors, total.compared, total.changed) for name, (tensors, total) in sums.items()]
        return sorted(kinds, key=lambda kind: (kind.share, kind.name))

    def summary(self) -> list[dict[str, Any]]:
        """What ``--json`` prints."""
        return [{"kind": kind.name, "tensors": kind.tensors, "weights": kind.weights, "changed": kind.changed} for kind in self.kinds()]

    def lines(self) -> Iterator[str]:
        """In words: the total, and the kinds of which the fewest changed; nothing where there are none."""
        kinds = self.kinds()
        if not kinds:
            return
        changed, weights = sum(kind.changed for kind in kinds), sum(kind.weights for kind in kinds)
        scope = "" if self.complete else " (of what this run computed)"
        least = f"; the fewest: {', '.join(map(str, kinds[:SHOWN]))}" if len(kinds) > 1 else ""
        yield f"adapters changed {changed:,} of {weights:,} weights ({changed / weights:.1%}){scope}{least}"
