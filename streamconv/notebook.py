"""How things show themselves in a notebook: a small table of escaped text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from streamconv.text import one_line

SHOWN = 20  # rows of a table that a notebook has


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]], more: int = 0) -> str:
    """An HTML table; ``more`` rows are told of and not shown."""
    lines = [f"<table><caption>{_escape(title)}</caption>"]
    if head:
        lines.append(_row("th", head))
    lines += [_row("td", row) for row in rows]
    if more:
        lines.append(_row("td", [f"... and {more} more"]))
    return "".join([*lines, "</table>"])


def _row(kind: str, cells: Iterable[object]) -> str:
    return f"<tr>{''.join(f'<{kind}>{_escape(cell)}</{kind}>' for cell in cells)}</tr>"


def _escape(text: object) -> str:
    from html import escape  # only a notebook needs what that loads

    return escape(one_line(text))
