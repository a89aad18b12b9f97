"""An output that several processes write, on any hosts that see it, in any order, any number of times: each with the same plan.

Nobody locks it, since hosts that share a file system may share no locks. Each file is made under a name of its own and published when it is
complete and durable, so that two may be at the same one. The log's head says that DST is this plan's; it goes when all is there: until then
DST is incomplete, and what stands under its final name is done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from streamconv import codec
from streamconv.errors import DestinationError
from streamconv.graph.losses import Losses
from streamconv.planning.plan import VERSION, Plan
from streamconv.running.directory import new_suffix
from streamconv.running.log import Line, read_head
from streamconv.running.making import make_files
from streamconv.running.output import IN_PARTS, LOG, PLAN, Output, describe
from streamconv.storage import Version
from streamconv.storage.filenames import find_fault


def files_to_make(plan: Plan, part: tuple[int, int] | None = None) -> list[int]:
    """The numbers of the files that are made apart, or those of part I of N: of file k iff k and I leave the same rest by N.

    They are all but the commit, if that is an index, which is written last; on the Hub, where it is a commit of git, too, with the files
    that hold no tensors.
    """
    count = len(plan.files) - (not plan.files[-1].segments)
    mine = [number for number in range(count) if part is None or number % part[1] == part[0] % part[1]]
    if count < len(plan.files) and plan.root.startswith("hf://"):
        return [number for number in mine if plan.files[number].tensors]
    return mine


class Lease:
    """The right of every process with the same plan to make files of an output.

    Args:
        output: where they go.
        plan: the whole plan.
        part: (I, N): which part of it this process makes, of how many; unless given, all of it, or what is left when parts are made.

    Attributes:
        suffix: the longest that names of files have until they are complete.
    """

    def __init__(self, output: Output, plan: Plan, part: tuple[int, int] | None = None) -> None:
        self.output, self._plan, self._part = output, plan, part
        self._seen: dict[str, Version] = {}
        self.suffix = new_suffix()
        self.kept = 0  # bytes of files that were there

    def settle(self, *, overwrite: bool, resume: bool) -> tuple[bool, bool]:
        """Which of both it is to be, if both are said: what is begun is gone on with."""
        return overwrite and not (resume and self.output.is_begun()), resume

    def list_numbers(self) -> list[int]:
        """The numbers of the files that this process is to see to."""
        return files_to_make(self._plan, self._part)

    def is_complete(self) -> bool:
        """Whether all files are there."""
        every = range(len(self._plan.files))
        return len(self.find_done(every)) == len(every)

    def take(self, *, goes_on: bool = False, stale: Callable[[], Iterable[str]] | None = None) -> None:
        """Takes the output, unless another process has it by now, and goes on.

        Whoever takes it notes which files go first, as which versions: everybody removes those, and no file made since.

        Args:
            goes_on: it is begun.
            stale: what ``--overwrite`` removes, beside files in the places of the plan's; without effect on what other parts have begun.

        Raises:
            DestinationError: it is another plan's, or that of one process alone.
        """
        if goes_on:
            self.go_on()
            return
        if stale and not self._part and self.output.is_begun():
            self._give_up()
        old = {} if stale is None else self.output.look([*stale(), *(file.path for file in self._plan.files)])
        if not self.output.is_begun():  # looked at after the files: what is among them was not made by others since
            self.output.drop_earlier()
            head: Line = {**describe(self._plan), "advice": IN_PARTS, "stale": old, "parts": self._part[1] if self._part else 0}
            self.output.keep(LOG, lambda: [codec.encode(head) + b"\n"])
            self.check()  # another plan may have been quicker
            self.output.keep(PLAN, self._plan.json_pieces)
        self.go_on()

    def go_on(self) -> None:
        """Goes on with what is begun.

        Raises:
            DestinationError: nothing is, or by another plan or by one process alone.
        """
        stale = self.check().get("stale", {})
        self._remove({name: version for name, version in stale.items() if not find_fault(name)})

    def check(self) -> Line:
        """The head of the output's log.

        Raises:
            DestinationError: there is none, or another one.
        """
        where, text = self.output.where, self.output.load(LOG)
        if text is None:
            raise DestinationError(f"{where}: holds no part of this plan: make its files with --part first")
        head = read_head(text)
        if not head:
            raise DestinationError(f"{where}: {LOG} there cannot be read: remove it, or give another DST")
        if "parts" not in head:
            raise DestinationError(f"{where}: holds an unfinished conversion that is none in parts: continue that, or give another DST")
        if head.get("plan") != self._plan.digest() or head.get("version") != VERSION:
            raise DestinationError(
                f"{where}: holds parts of another plan (other sources, options or release): finish that one, give another DST, "
                f"or remove {LOG} there and start with --overwrite"
            )
        return head

    def make(self, plan: Plan, numbers: Iterable[int], tell: Callable[[int], None]) -> Losses:
        """Makes these files of the plan, each by itself; what their values have lost."""
        return make_files(plan, numbers, tell, self.check, self.output.sink)

    def find_missing(self, find_altered: Callable[[Sequence[int]], set[int]] | None) -> list[int]:
        """Those of this process's files that are to be made, with nothing in their places any more.

        Args:
            find_altered: which of files that are there do not hold what they should; unless given, they are taken to.
        """
        numbers = self.list_numbers()
        done = self.find_done(numbers)
        if find_altered:
            done -= find_altered(sorted(done))
        self.kept = sum(self._plan.files[number].size for number in done)
        missing = [number for number in numbers if number not in done]
        self.make_way(missing)
        return missing

    def count_finished(self) -> int:
        """Of the files that `find_missing` gives, how many are there."""
        return 0

    def find_done(self, numbers: Sequence[int]) -> set[int]:
        """Those of these files that are done: present at their size and with their literals, and no stale ones."""
        standing = self._standing()
        files = self._plan.files
        self._seen = self.output.look(files[number].path for number in numbers)
        new = {name: version for name, version in self._seen.items() if version != standing.get(name)}
        present = [k for k in numbers if files[k].path in new and new[files[k].path].size == files[k].size]
        return set(present) - self.output.find_wrong(self._plan, present)

    def make_way(self, numbers: Iterable[int]) -> None:
        """Removes what is in the places of these files, as `find_done` has seen it: what others have made since stays."""
        names = {self._plan.files[number].path for number in numbers}
        self._remove({name: version for name, version in self._seen.items() if name in names})

    def describe(self, number: int) -> str:
        """What is wrong with a file that is not as it should be."""
        file = self._plan.files[number]
        version = self.output.look([file.path]).get(file.path)
        if version is None:
            return f"{file.path} is missing"
        return f"{file.path} has {version.size} bytes of {file.size}" if version.size != file.size else f"{file.path} holds something else"

    def _give_up(self) -> None:
        """Has ``--overwrite`` start afresh with what others have begun, whoever they are.

        Raises:
            DestinationError: it is that of one process alone.
        """
        if "parts" not in read_head(self.output.load(LOG) or b""):
            self.check()
        self.leave()

    def release(self) -> None:
        """Nothing: nobody is kept out."""

    def leave(self) -> None:
        """The output is complete: nothing of the state stays."""
        self.output.leave()

    def _standing(self) -> Mapping[str, Version]:
        """The stale files that stand until new ones replace them."""
        if not self.output.stays:
            return {}
        head = read_head(self.output.load(LOG) or b"")
        names = self._names(files_to_make(self._plan)) if head.get("parts") else ()
        return {name: version for name, version in head.get("stale", {}).items() if name in names}

    def _remove(self, seen: Mapping[str, Version]) -> None:
        standing = self._standing()
        stale = {name: version for name, version in seen.items() if name not in standing}
        self.output.remove(stale, self._names(range(len(self._plan.files))))

    def _names(self, numbers: Iterable[int]) -> Collection[str]:
        return {self._plan.files[number].path for number in numbers}
