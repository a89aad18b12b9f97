"""What a run still has to read, or has just made, is neither removed nor replaced: by its output, what goes before, or a report of it."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from streamconv.errors import DestinationError, UsageError
from streamconv.planning.plan import Plan
from streamconv.running.directory import Directory, partial
from streamconv.running.output import state_name
from streamconv.running.stale import find_stale, list_stale
from streamconv.running.sums import SUMS
from streamconv.storage import is_url
from streamconv.storage.places import Place, identify, place_of, places_of


def check_sources_stay(plan: Plan, read: Iterable[Path] = (), *, overwrite: bool = False) -> None:
    """Refuses an output in whose place, or among whose old files, there is something that is read.

    Args:
        plan: of the output.
        read: files of this machine that are read beside the plan's sources.
        overwrite: old weight and index files go first.

    Raises:
        DestinationError: says which.
    """
    if is_url(plan.root):
        _check_urls(plan, overwrite=overwrite)
        return
    root = Path(plan.root)
    stale = [root / name for name in list_stale(plan, Directory(root, plan.single))] if overwrite else []
    replaced = {place_of(path): path for path in (*_made(plan), *stale)}
    for path in (*_sources(plan), *read):
        for place in places_of(path):
            if place in replaced:
                whose = "" if path == replaced[place] else f", as {path}"
                raise DestinationError(
                    f"{replaced[place]}: would be replaced, and is read{whose}: give another DST, or a copy of that file"
                )


def _check_urls(plan: Plan, *, overwrite: bool) -> None:
    sources = [source.path.removeprefix(f"{plan.root}/") for source in plan.sources if source.path.startswith(f"{plan.root}/")]
    replaced = {file.path for file in plan.files}.union(find_stale(plan, sources) if overwrite and not plan.single else ())
    for name in sources:
        if name in replaced:
            raise DestinationError(f"{plan.root}/{name}: would be replaced, and is read: give another DST, or a copy of that file")


def check_report(option: str, path: Path, plan: Plan, read: Iterable[Path] = ()) -> None:
    """Refuses a file for people, such as a report, that is one that a conversion reads or makes.

    Raises:
        UsageError: says which.
    """
    known = dict(_known(plan, read))
    identities = {identify(file) for file in known.values()} - {None}
    is_dst = not is_url(plan.root) and place_of(path) == place_of(Path(plan.root))
    if is_dst or identify(path) in identities or any(place_of(above) in known for above in (path, *path.absolute().parents)):
        raise UsageError(f"{option} {path}: is what the conversion itself reads or makes: give a file of another name")


def check_replaceable(option: str, path: Path, beginning: str) -> None:
    """Refuses to write a file over one that does not begin as such files do: it is somebody's.

    Raises:
        UsageError: what is there is another file, or none that can be looked at.
    """
    try:
        if not path.exists():
            return
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{option} {path}: not a regular file: give the name of a file")
        with path.open("rb") as file:
            head = file.read(len(beginning)).decode("utf-8", "replace")
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be looked at: {error.strerror}") from error
    if head and head != beginning:
        raise UsageError(f"{option} {path}: holds something else already: remove it, or give another name")


def _known(plan: Plan, read: Iterable[Path]) -> Iterator[tuple[Place, Path]]:
    """Every file of this machine that a conversion reads or makes, by its place."""
    if not is_url(plan.root):
        root = Path(plan.root)
        yield from ((place_of(path), path) for path in (root / SUMS, *_made(plan)))
    for path in (*_sources(plan), *read):
        yield from ((place, path) for place in places_of(path))


def _made(plan: Plan) -> Iterator[Path]:
    """What an output puts into its folder, for a time or for good."""
    root = Path(plan.root)
    yield root / state_name(plan.single)
    for file in plan.files:
        yield root / file.path
        yield partial(root / file.path)


def _sources(plan: Plan) -> Iterator[Path]:
    return (Path(source.path) for source in plan.sources if not is_url(source.path))
