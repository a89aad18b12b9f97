"""A bar in bytes on stderr, with rate and time left; none where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(total: int, title: str, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields what is to be told how many bytes have come."""
    if not show or not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=title, dynamic_ncols=True, miniters=1) as shown:

        def tell(nbytes: int) -> None:
            shown.update(nbytes)

        yield tell
