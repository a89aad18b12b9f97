"""One way to try again.

What a library or a server says is either for now (`Failed`) or for good (`Refused`); who asked puts a refusal into words.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from streamconv.errors import Interrupted, RunError

ATTEMPTS = 8  # failures in a row, without a byte between them, that are put up with
OVER = 3  # the same, of libraries that make several attempts themselves
FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0  # seconds before another attempt: doubled each time
LONGEST_ASKED = 300.0  # seconds that a server may ask to wait
PATIENCE = 20.0  # seconds of asking for what is small, after which there is no further attempt
TRANSIENT = {408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524}  # HTTP's statuses

READING = "{0}: no answer ({1}, attempts: {2}): check the address and the network, then try again"
RUNNING = "{0}: no answer ({1}, attempts: {2}): mend that and rerun the same command with --resume"

_ABSENT = re.compile("NewConnection|NameResolution|Connector|EndpointConnection|ConnectError|ConnectionRefused")
_Result = TypeVar("_Result")


class Failed(Exception):
    """An attempt failed in a way that the next one may not.

    Args:
        reason: without addresses and headers, which may hold secrets.
        wait: seconds that the server asks for.
        unreached: nobody was there.
    """

    def __init__(self, reason: str, wait: float | None = None, *, unreached: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.unreached = wait, unreached


class Refused(Exception):
    """A final answer: its status, as HTTP has them, and what to show of it; ``moved``: from where the request was sent on to."""

    def __init__(self, status: int, reason: str = "", *, moved: bool = False) -> None:
        super().__init__(reason or f"HTTP {status}")
        self.status, self.reason, self.moved = status, reason, moved


def again(
    call: Callable[[], _Result],
    what: str,
    most: int = ATTEMPTS,
    message: str = RUNNING,
    *,
    small: bool = False,
    stop: threading.Event | None = None,
) -> _Result:
    """What a call gives that may be `Failed` for some time; waits after each failure, longer and longer.

    Args:
        call: that may fail.
        what: fails; it is the first field of ``message``.
        most: failures are given up at.
        message: then, a template of what failed, the failure and the count.
        small: `PATIENCE` is enough; half as many failures are where nobody is there to answer.
        stop: ends it when it is set.

    Raises:
        RunError: there have been enough.
        Interrupted: it was told to stop.
    """
    stop, count, end = stop or threading.Event(), 0, time.monotonic() + PATIENCE
    while not stop.is_set():
        try:
            return call()
        except Failed as failure:
            count += 1
            late = small and (time.monotonic() > end or (failure.unreached and count >= most // 2))
            if late or count >= most:
                raise RunError(message.format(what, failure, count)) from None
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (count - 1)) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
            if failure.wait is not None:
                wait = min(failure.wait, LONGEST_ASKED)
                end += wait
            stop.wait(wait)
    raise Interrupted("interrupted: rerun the same command with --resume")


def fault(error: BaseException) -> Failed:
    """A failure as what lies at its bottom says it, without what libraries say of addresses."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        inside = (value for value in (getattr(at, "reason", None), *at.args) if isinstance(value, BaseException))
        at = next(inside, None) or at.__cause__ or at.__context__
    reasons = (_reason_of(one) for one in chain if isinstance(one, OSError))
    reason = next(filter(None, reasons), type(error).__name__)
    return Failed(bare(reason), unreached=any(_ABSENT.search(type(at).__name__) for at in chain))


def _reason_of(error: OSError) -> str:
    """What the system says of it; of other libraries' errors, whose texts may hold addresses, nothing."""
    return error.strerror or (str(error) if type(error).__module__ in ("builtins", "http.client") else "")


def bare(text: str) -> str:
    """The first line of what a server says, without what may be secret."""
    return re.sub(r"(\w+://)[^\s'\"]*|\bhf_\w+", r"\1...", text.strip().split("\n")[0])[:300]
