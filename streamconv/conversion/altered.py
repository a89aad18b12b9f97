"""A checkpoint some of whose tensors are others before a recipe sees them: what became of which, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streamconv.checkpoint.opening import Checkpoint
from streamconv.recipe import Conversion


@dataclass(frozen=True)
class Altered:
    """What has become of a checkpoint.

    Attributes:
        checkpoint: it.
        changed: for each tensor that is another now, how.
        notes: what was done.
        config: keys of config.json that go with it.
    """

    checkpoint: Checkpoint
    changed: Mapping[str, str]
    notes: Sequence[str]
    config: Mapping[str, Any] = field(default_factory=dict)

    def account(self, conversion: Conversion) -> Conversion:
        """A conversion of that checkpoint that tells what was done."""
        rows = []
        for row in conversion.rows:
            how = list(dict.fromkeys(self.changed[name] for name in row.sources if name in self.changed))
            rows.append(row._replace(layout=", then ".join(filter(None, (*how, row.layout)))) if how else row)
        return replace(conversion, rows=rows, notes=[*conversion.notes, *self.notes])
