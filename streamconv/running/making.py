"""Makes files of an output by this process, whether all of them are its own or one is, each complete or not there at all.

Below a path a file has a name of its own until it is complete and durable: several processes may be at the same one, and the later rename
changes nothing. Behind a URL it is sent (`streams`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from streamconv.errors import DestinationError, RunError
from streamconv.graph.losses import Losses
from streamconv.planning.plan import Plan
from streamconv.running.directory import ATTEMPTS, holds, new_suffix, partial, remove_unfinished
from streamconv.running.filling import SAVE_BYTES, LocalEngine, Progress
from streamconv.running.log import Log
from streamconv.running.streams import send_files
from streamconv.storage import is_url
from streamconv.storage.sinks import Sink, open_sink

STALE = 600.0  # seconds without a write after which an unfinished file of another process is taken for what a killed one left


def make_files(
    plan: Plan,
    numbers: Iterable[int],
    tell: Progress = lambda _: None,
    check: Callable[[], object] = lambda: None,
    sink: Sink | None = None,
) -> Losses:
    """Makes these files, each complete and durable under its name, or not at all; what their values have lost.

    Below a path they go in groups of at most `SAVE_BYTES` unless one is larger: what a killed process loses is a group.

    Args:
        plan: that the files are of; its sources must not have changed since.
        numbers: of files.
        tell: told of bytes of output; of negative numbers where a file is begun again.
        check: called before each group; raises what shall end the work.
        sink: where they go, if that is behind a URL; it is opened unless given.

    Raises:
        DestinationError: the sink cannot be written.
        RunError: an I/O error; finished files stay, nothing of others does.
        SourceChanged: a source is not what was planned with.
        KeyboardInterrupt: Ctrl-C.
    """
    if is_url(plan.root):
        return send_files(plan, numbers, tell, check, sink or open_sink(plan.root))
    losses = Losses()
    for group in _group(plan, numbers):
        losses += _make_group(plan.for_files(group), tell, check)
    return losses


def _make_group(mine: Plan, tell: Progress, check: Callable[[], object], attempts: int = ATTEMPTS) -> Losses:
    suffix = new_suffix()
    try:
        check()
        remove_unfinished(mine, older=STALE)
        engine = LocalEngine(mine, Log(), tell, suffix=suffix)
        engine.run()
    except (RunError, DestinationError) as error:
        if all(holds(Path(mine.root) / file.path, file.size) for file in mine.files):
            return Losses()  # others were quicker, and have finished
        if attempts == 1 or not isinstance(error.__cause__, FileNotFoundError):
            raise
        return _make_group(mine, tell, check, attempts - 1)  # others that finish took away what was begun: they have to find it made
    else:
        return engine.losses
    finally:
        for file in mine.files:
            partial(Path(mine.root) / file.path, suffix).unlink(missing_ok=True)


def _group(plan: Plan, numbers: Iterable[int]) -> Iterator[list[int]]:
    group: list[int] = []
    nbytes = 0
    for number in numbers:
        if group and nbytes + plan.files[number].size > SAVE_BYTES:
            yield group
            group, nbytes = [], 0
        group.append(number)
        nbytes += plan.files[number].size
    if group:
        yield group
