"""Outputs whose files are made apart: by several processes, on any hosts that see DST, in any order, any number of times.

Each file is made under a name of its own and renamed when it is complete and durable, so that two may be at the same one. That DST
belongs to a plan is said by its `Claim`, which nobody locks and which goes when `finish` has looked at every file and written the last:
until then DST is incomplete, and what stands under its final name is done.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from streamconv import codec
from streamconv.engine.check import OutputCheck
from streamconv.engine.io import sync_directory
from streamconv.errors import DestinationError, RunError
from streamconv.planning.plan import VERSION, Plan
from streamconv.running.journal import IN_PARTS, NAME, Ledger, journal_path, read_journal
from streamconv.running.lines import Line, read_line
from streamconv.running.local import SAVE_BYTES, LocalEngine, Progress, check_sources, holds, partial
from streamconv.storage.filenames import find_fault
from streamconv.storage.sinks import Sink

ATTEMPTS = 5  # to make files, where others that finish take away what is begun
STALE = 600.0  # seconds without a write after which an unfinished file of another process is taken for what a killed one left
UNFINISHED = re.compile(r"\.[0-9a-f]{12}\.partial$")
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}


def files_to_make(plan: Plan, part: tuple[int, int] | None = None) -> list[int]:
    """The numbers of the files that are made apart, or those of part I of N: of file k iff k and I leave the same rest by N.

    They are all but the commit, if that is an index, which `finish` writes; on the Hub, where it is a commit of git, too, with the files
    that hold no tensors.
    """
    count = len(plan.files) - (not plan.files[-1].segments)
    mine = [number for number in range(count) if part is None or number % part[1] == part[0] % part[1]]
    if count < len(plan.files) and plan.root.startswith("hf://"):
        return [number for number in mine if plan.files[number].tensors]
    return mine


def make_files(
    plan: Plan, numbers: Iterable[int], tell: Progress = lambda _: None, check: Callable[[], object] = lambda: None
) -> Counter[str]:
    """Makes these files below a local root, each complete and durable under its name, or not at all; what has overflowed in them.

    Files go in groups of at most `SAVE_BYTES` unless one is larger: what a killed process loses is a group.

    Args:
        plan: that the files are of; its sources must not have changed since.
        numbers: of files.
        tell: told of bytes of output.
        check: called before each group; raises what shall end the work.

    Raises:
        RunError: an I/O error; finished files stay.
        SourceChanged: a source is not what was planned with.
        KeyboardInterrupt: Ctrl-C.
    """
    overflowed: Counter[str] = Counter()
    for group in _group(plan, numbers):
        overflowed += _make_group(plan.for_files(group), tell, check)
    return overflowed


def _make_group(mine: Plan, tell: Progress, check: Callable[[], object], attempts: int = ATTEMPTS) -> Counter[str]:
    suffix = new_suffix()
    try:
        check()
        _remove_unfinished(mine, older=STALE)
        engine = LocalEngine(mine, Ledger(), tell, suffix=suffix)
        engine.run()
    except (RunError, DestinationError) as error:
        if all(holds(Path(mine.root) / file.path, file.size) for file in mine.files):
            return Counter()  # others were quicker, and have finished
        if attempts == 1 or not isinstance(error.__cause__, FileNotFoundError):
            raise
        return _make_group(mine, tell, check, attempts - 1)  # others that finish took away what was begun: they have to find it made
    else:
        return engine.overflowed
    finally:
        for file in mine.files:
            partial(Path(mine.root) / file.path, suffix).unlink(missing_ok=True)


def new_suffix() -> str:
    """A suffix of its own for the names of unfinished files."""
    return f".{uuid.uuid4().hex[:12]}.partial"


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


def _remove_unfinished(plan: Plan, older: float = 0.0) -> None:
    """Removes what others left of a plan's files under names of their own and have not written to for ``older`` seconds."""
    names = {Path(plan.root) / file.path for file in plan.files} | {journal_path(Path(plan.root), plan.single)}
    for folder in {path.parent for path in names}:
        for path in folder.iterdir() if folder.is_dir() else ():
            whole = path.with_name(UNFINISHED.sub("", path.name))
            with suppress(FileNotFoundError):  # another was quicker
                if whole != path and whole in names and (not older or _age(path) >= older):
                    path.unlink()


def _age(path: Path) -> float:
    """Seconds since a file was written to, by the clock of the file system that it lies on, which may differ from ours; 0 if unknown."""
    probe = partial(path.with_name(NAME), new_suffix())
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


class Claim:
    """Says that what a local DST holds is of a plan whose files are made apart.

    It lies in the place of a journal, so that ordinary runs see that DST is taken.

    Args:
        plan: the whole plan.
        parts: how many parts a user divides it into, to speak of them.
    """

    def __init__(self, plan: Plan, parts: int = 0) -> None:
        self._plan, self._parts = plan, parts
        self._root = Path(plan.root)
        self._name = journal_path(Path(), plan.single).name
        self._seen: dict[str, list[int | str]] = {}
        self.where = str(plan.destination)

    def take(self, doomed: Iterable[str] | None = None) -> None:
        """Takes DST, unless another process has it by now, and goes on.

        Whoever takes it notes which files are to go first, as they are then: everybody removes those, and no file made since.

        Args:
            doomed: what ``--overwrite`` removes, beside files in the places of the plan's; without effect on what others have begun.

        Raises:
            DestinationError: DST is another plan's, or an ordinary run's.
        """
        old = {} if doomed is None else self._look([*doomed, *(file.path for file in self._plan.files)])
        if not self.exists():  # looked at after the files: what is among them was not made by others since
            line: Line = {"state": "incomplete", "advice": IN_PARTS, "version": VERSION, "plan": self._plan.digest()}
            self._create({**line, "old": old, "parts": self._parts})
        self.go_on()

    def go_on(self) -> None:
        """Goes on with what is begun.

        Raises:
            DestinationError: nothing is, or by another plan or an ordinary run.
        """
        self._take_away({name: identity for name, identity in self.check().get("old", {}).items() if not find_fault(name)})

    def check(self) -> Line:
        """What the claim says.

        Raises:
            DestinationError: there is none, or another one.
        """
        found = self._read()
        if not found and self.exists():
            raise DestinationError(f"{self.where}: {self._name} there cannot be read: remove it, or give another DST")
        if found and "parts" not in found:
            raise DestinationError(
                f"{self.where}: holds an unfinished conversion that is none in parts: continue that, or give another DST"
            )
        if not found:
            raise DestinationError(f"{self.where}: holds no part of this plan: make its files with --part first")
        if found.get("plan") != self._plan.digest() or found.get("version") != VERSION:
            raise DestinationError(
                f"{self.where}: holds parts of another plan (other sources, options or release): finish that one, give another DST, "
                f"or remove {self._name} there and start with --overwrite"
            )
        return found

    def finished(self, numbers: Sequence[int]) -> set[int]:
        """Those of these files that are done: present at their size and with their literals, and no old ones."""
        standing = self._standing()
        self._seen = self._look(self._plan.files[number].path for number in numbers)
        new = {name: identity for name, identity in self._seen.items() if identity != standing.get(name)}
        present = [k for k in numbers if new.get(self._plan.files[k].path, [None])[0] == self._plan.files[k].size]
        return set(present) - self._find_wrong(present)

    def make_way(self, numbers: Iterable[int]) -> None:
        """Removes what is in the places of these files, as `finished` has seen it: what others have made since stays."""
        names = {self._plan.files[number].path for number in numbers}
        self._take_away({name: identity for name, identity in self._seen.items() if name in names})

    def describe(self, number: int) -> str:
        """What is wrong with a file that is not as it should be."""
        file = self._plan.files[number]
        size, *_ = self._look([file.path]).get(file.path, [-1])
        if size == -1:
            return f"{file.path} is missing"
        return f"{file.path} has {size} bytes of {file.size}" if size != file.size else f"{file.path} holds something else"

    def give_up(self) -> None:
        """Has ``--overwrite`` start afresh with what others have begun, whoever they are.

        Raises:
            DestinationError: an ordinary run's DST.
        """
        if "parts" not in self._read():
            self.check()
        self.end()

    def end(self) -> None:
        """DST is complete."""
        (self._root / self._name).unlink(missing_ok=True)
        sync_directory(str(self._root))

    # Where it lies ---------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether DST is taken, by this plan or another."""
        return (self._root / self._name).exists()

    def clear_up(self) -> None:
        """Removes what killed processes left unfinished."""
        _remove_unfinished(self._plan)

    def _read(self) -> Line:
        return read_journal(self._root / self._name)[0]

    def _create(self, line: Line) -> None:
        """Writes the claim, whole or not at all, unless there is one."""
        path = self._root / self._name
        draft = partial(path, new_suffix())
        try:
            with draft.open("xb") as file:
                file.write(codec.encode(line) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(draft, path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                draft.replace(path)  # of two at once the later stays, and the other finds out by `check`
        except FileExistsError:
            pass
        except FileNotFoundError:  # whoever has taken DST took the draft away with what was there
            if not path.exists():
                raise
        finally:
            draft.unlink(missing_ok=True)
        sync_directory(str(self._root))

    def _look(self, names: Iterable[str]) -> dict[str, list[int | str]]:
        """Those of these files that are there: size, or -1 of what is no plain file, and what changes with their content."""
        found = {}
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                found[name] = _identify(self._root / name)
        return found

    def _standing(self) -> dict[str, list[int | str]]:
        """The old files that stand until new ones replace them, and as what."""
        return {}

    def _find_wrong(self, present: Sequence[int]) -> set[int]:
        """Those whose literals are not as planned; checksums, which take reading a file, are not looked at."""
        bare = replace(self._plan, files=tuple(replace(file, checksums=()) for file in self._plan.files))
        wrong, check = set(), OutputCheck(bare)
        for number in present:
            try:
                wrong |= check.find_wrong_literals([number])
            except FileNotFoundError:  # another process found it wrong and took it away
                wrong.add(number)
        return wrong

    def _take_away(self, seen: Mapping[str, list[int | str]]) -> None:
        """Removes files that still are what was seen.

        Each is taken aside before it is looked at again: between a look and a removal another process may have put a new one there.
        """
        made = {file.path for file in self._plan.files}
        there = self._look(seen)
        for name in (name for name, identity in there.items() if identity == seen[name]):
            path = self._root / name
            if path.is_dir() and not path.is_symlink():
                raise DestinationError(f"{path}: is a directory, and a file is to be there: remove it, or give another DST")
            aside = partial(path, new_suffix()) if name in made else path
            with suppress(FileNotFoundError):
                path.rename(aside)
                if _identify(aside) == seen[name]:
                    aside.unlink()
                elif aside != path:
                    _put_back(aside, path)
        for folder in {(self._root / name).parent for name in seen}:
            if folder.is_dir():
                sync_directory(str(folder))


def _identify(path: Path) -> list[int | str]:
    """Size, or -1 of what is no plain file, and what changes with its content and not with its name."""
    found = path.lstat()
    return [found.st_size if stat.S_ISREG(found.st_mode) else -1, found.st_mtime_ns]


def _put_back(aside: Path, path: Path) -> None:
    try:
        os.link(aside, path)
    except FileExistsError:  # another one is there by now
        pass
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        aside.replace(path)
    aside.unlink(missing_ok=True)


class SinkClaim(Claim):
    """A claim in a place for outputs that is no directory; of two that take it at once, the later has it.

    A store cannot take a file away only if it still is what was seen: where others may be at work, old files in the places of new ones
    stand until those replace them. What makes a loader take the files for a model, the index, is written last and goes first.
    """

    def __init__(self, plan: Plan, sink: Sink, parts: int = 0) -> None:
        super().__init__(plan, parts)
        self._sink, self.where = sink, sink.url

    def exists(self) -> bool:
        return bool(self._read())

    def end(self) -> None:
        self._sink.drop_state(self._name)

    def clear_up(self) -> None:
        self._sink.abandon({file.path for file in self._plan.files}, others=not self._plan.single)

    def _read(self) -> Line:
        state = self._sink.load_state(self._name)
        if state and (line := read_line(state)) is not None:
            return line
        if state:
            raise DestinationError(f"{self.where}: {self._name} there is no claim that can be read: remove it, or give another DST")
        return {}

    def _create(self, line: Line) -> None:
        self._sink.save_state(self._name, codec.encode(line) + b"\n")

    def _look(self, names: Iterable[str]) -> dict[str, list[int | str]]:
        there = self._sink.list()
        return {name: [there[name].size, there[name].tag] for name in names if name in there}

    def _find_wrong(self, present: Sequence[int]) -> set[int]:  # noqa: ARG002 - what is there is whole, and only this plan's writers write it
        return set()

    def _standing(self) -> dict[str, list[int | str]]:
        said = self._read()
        made = {self._plan.files[number].path for number in files_to_make(self._plan)} if said.get("parts") else set()
        return {name: identity for name, identity in said.get("old", {}).items() if name in made}

    def _take_away(self, seen: Mapping[str, list[int | str]]) -> None:
        standing = self._standing()
        there = self._look(name for name in seen if name not in standing)
        if names := [name for name, identity in there.items() if identity == seen[name]]:
            self._sink.remove(names)


def finish(
    plan: Plan, claim: Claim, write: Callable[[list[int]], object], check: Callable[[list[int]], set[int]], *, checksum: bool = False
) -> None:
    """Looks at every file, writes the commit where it is not made yet, and gives DST free.

    Args:
        plan: the whole plan.
        claim: of this plan.
        write: makes files of the plan, by number.
        check: called with the numbers of the files that were made apart, before the commit is written; gives those that are wrong.
        checksum: write ``SHA256SUMS``, too; only below a local root.

    Raises:
        DestinationError: files are missing or wrong; names each, and the part that makes it. Nothing is written.
        SourceChanged: a source is not what was planned with.
    """
    count = claim.check()["parts"]
    check_sources(plan)
    made = files_to_make(plan)
    lost = set(made) - claim.finished(made)
    altered = set() if lost else check(made)
    if wrong := sorted(lost | altered):
        found = ", ".join(f"{claim.describe(k)}{f' (part {k % count}/{count})' if count else ''}" for k in wrong)
        compared = " with --verify" if altered else ""
        advice = f"run those parts{compared}, then --finish again" if count else "run it again with --resume"
        raise DestinationError(f"{claim.where}: {len(wrong)} of {len(plan.files)} files not there as planned: {found}; {advice}")
    claim.clear_up()
    write([number for number in range(len(plan.files)) if number not in made])
    if checksum:
        LocalEngine(plan, Ledger()).write_sums({})
    claim.end()
