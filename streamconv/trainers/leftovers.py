"""What trainers leave beside a model's tensors: how it is told of in a note."""

from __future__ import annotations

from collections.abc import Sequence

from streamconv.formats.files import short
from streamconv.units import format_size


def note_left_out(count: int, nbytes: int | None, objects: Sequence[str], what: str = "tensors", *, nests: bool = False) -> list[str]:
    """The note on what is a trainer's; none where there is nothing.

    Args:
        count: how many of ``what`` there are.
        nbytes: how many bytes they take, if that is known.
        objects: names of others, which are no tensors.
        what: what is counted.
        nests: ``--set root=`` would take them.
    """
    clauses = []
    if count:
        clauses.append(f"{count} {what}" + (f" of {format_size(nbytes)}" if nbytes is not None else ""))
    if objects:
        clauses.append(f"{len(objects)} objects that are no tensors, such as {short.repr(objects[0])[1:-1]}")
    way = " (--set root= takes all tensors)" if nests else ""
    return [f"left out, a trainer's and not the model's: {' and '.join(clauses)}{way}"] if clauses else []
