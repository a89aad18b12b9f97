"""A checkpoint some of whose tensors are others before a recipe sees them: what became of which, and what is said of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streamconv.checkpoint.opening import Checkpoint
from streamconv.recipe import Conversion
from streamconv.recipe.application import Replica


@dataclass(frozen=True)
class Altered:
    """What has become of a checkpoint.

    Attributes:
        checkpoint: it.
        changed: for each tensor that is another now, how.
        notes: what was done.
        config: keys of config.json that go with it, with dots if they are within others.
        former: for each tensor that has another name now, the one that it had.
        dropped: tensors that are left out, by the names that they had, and why.
        brought: tensors that have come from another checkpoint.
        sources: for each tensor that is not called as what it is made of, what that is called.
        replicas: tensors that must hold the same bytes, two each, and their names.
        others: further checkpoints that it is made of.
        dtype: what its numbers have become, where they all have one; None: what they were.
    """

    checkpoint: Checkpoint
    changed: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    former: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    brought: Collection[str] = ()
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    replicas: Sequence[Replica] = ()
    others: Sequence[Checkpoint] = ()
    dtype: str | None = None

    def account(self, conversion: Conversion, apart: Collection[str] = ()) -> Conversion:
        """A conversion of that checkpoint that tells what was done, by the names that tensors had before.

        Targets that are ``apart`` are made of what has come later: their sources are no tensors of this one.
        """
        rows = []
        for row in conversion.rows:
            if row.target in apart:
                rows.append(row)
                continue
            how = list(dict.fromkeys(self.changed[name] for name in row.sources if name in self.changed))
            layout = ", then ".join(filter(None, (*how, row.layout)))
            sources = dict.fromkeys(source for name in row.sources for source in self.sources.get(name, (self._former(name),)))
            rows.append(row._replace(layout=layout, sources=tuple(sources)))
        dropped = [*map(self._former, conversion.dropped), *self.dropped]
        reasons = {self._former(name): why for name, why in conversion.reasons.items()}
        return replace(
            conversion,
            rows=rows,
            dropped=dropped,
            reasons={**reasons, **self.dropped},
            notes=[*conversion.notes, *self.notes],
        )

    def _former(self, name: str) -> str:
        return self.former.get(name, name)


def account_for(altered: Sequence[Altered], conversion: Conversion) -> Conversion:
    """A conversion that tells all that was done, one after the other, to what it is of."""
    apart: set[str] = set()
    for one in reversed(altered):
        conversion = one.account(conversion, apart)
        apart |= {row.target for row in conversion.rows if one.brought and {*row.sources} <= {*one.brought}}
    keys: dict[str, Any] = {}
    for one in altered:
        keys |= one.config
    replicas = [replica for one in altered for replica in one.replicas]
    return replace(conversion, keys={**keys, **conversion.keys}, replicas=[*conversion.replicas, *replicas])


def with_keys(config: Mapping[str, Any], additions: Mapping[str, Any]) -> dict[str, Any]:
    """A config with more or other keys; those with dots are within the one before the dot."""
    result = dict(config)
    for key, value in additions.items():
        outer, dot, inner = key.partition(".")
        result[outer] = with_keys(result.get(outer) or {}, {inner: value}) if dot else value
    return result
