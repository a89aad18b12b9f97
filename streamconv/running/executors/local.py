"""Files made by this process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from streamconv.planning.plan import Plan
from streamconv.running.executors import MakeFiles


class Local:
    """The executor ``local``."""

    threads = None

    def load(self, root: str) -> int:  # noqa: ARG002 - it makes them anywhere
        return 0

    def open(self, plan: Plan, here: MakeFiles, address: str | None) -> AbstractContextManager[MakeFiles]:  # noqa: ARG002 - only ray's
        return nullcontext(here)


EXECUTOR = Local()
