"""What trainers leave beside a model's tensors: how it is told of in a note."""

from __future__ import annotations

from collections.abc import Sequence

from streamconv.formats.files import short
from streamconv.units import format_size


def note_left_out(count: int, nbytes: int | None, objects: Sequence[str]) -> list[str]:
    """The note on tensors of a trainer, so many of so many bytes, and on other objects, by name; none where there are none."""
    clauses = []
    if count:
        clauses.append(f"{count} tensors" + (f" of {format_size(nbytes)}" if nbytes is not None else ""))
    if objects:
        clauses.append(f"{len(objects)} objects that are no tensors, such as {short.repr(objects[0])[1:-1]}")
    return [f"left out, a trainer's and not the model's: {' and '.join(clauses)} (--set root= takes all tensors)"] if clauses else []
