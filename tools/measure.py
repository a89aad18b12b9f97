"""Runs a command and tells what it took: memory of its whole process tree, bytes read and written, time.

    python -m tools.measure --out took.json -- streamconv convert SRC DST
    python -m tools.measure --cgroup 2GB --drop-caches -- streamconv convert SRC DST

What the numbers mean:

- ``peak_rss``, ``peak_anon``, ``peak_file`` are sums over the tree, sampled, each at its own worst moment. Pages that processes share
  count once for each of them, and pages of mapped files count in ``peak_file``.
- ``peak_vmhwm`` is the kernel's own high-water mark of the one process where it was highest, as last seen; no peak falls between samples.
- ``maxrss`` is from wait4 and covers children that the command waited for, even short ones. The kernel starts it from what the process
  that launched the command had; below ``maxrss_floor`` it says nothing.
- ``read_bytes`` and ``write_bytes`` are what reached, or will reach, the storage: a read from the page cache is no read.
- The peak of a memory cgroup includes the page cache, which fills whatever the limit leaves: there, surviving is the result.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from streamconv.errors import UsageError
from streamconv.units import format_size, parse_size

_CGROUPS = Path("/sys/fs/cgroup")
_FIELD = re.compile(r"^(VmHWM|VmRSS|RssAnon|RssFile|read_bytes|write_bytes):\s+(\d+)", re.MULTILINE)


class NotPermittedError(Exception):
    """A cgroup cannot be made, or caches cannot be dropped."""


@dataclass(frozen=True)
class CgroupUse:
    """What a memory cgroup saw: ``peak`` includes the page cache; ``limit_hits`` counts the times the kernel had to make room."""

    limit: int
    peak: int | None
    limit_hits: int
    oom_kills: int


@dataclass(frozen=True)
class Sample:
    """Memory of the tree at a moment, in bytes; ``seconds`` since the start."""

    seconds: float
    rss: int
    anon: int
    file: int


@dataclass(frozen=True)
class Measurement:
    """What a command took; bytes and seconds. ``exit_code`` is negative for a signal."""

    command: list[str]
    exit_code: int
    wall_seconds: float
    user_seconds: float
    system_seconds: float
    peak_rss: int
    peak_anon: int
    peak_file: int
    peak_vmhwm: int
    maxrss: int
    maxrss_floor: int
    read_bytes: int
    write_bytes: int
    processes: int
    cgroup: CgroupUse | None = None
    samples: list[Sample] = dataclasses.field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the samples, of which there is only the number."""
        return dataclasses.asdict(dataclasses.replace(self, samples=[])) | {"samples": len(self.samples)}


def drop_caches() -> None:
    """Writes dirty pages back and empties the page cache.

    Raises:
        NotPermittedError: that takes root.
    """
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")
    except OSError as error:
        raise NotPermittedError(f"caches cannot be dropped here: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------------------------------------
# Memory cgroups


def _places() -> Iterator[tuple[int, Path]]:
    """Version and directory of the cgroups in which a new one could be made: this process's own, then those around it."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            version, root = 1, _CGROUPS / "memory"
        elif not controllers and (_CGROUPS / "cgroup.controllers").exists():
            version, root = 2, _CGROUPS
        else:
            continue
        own = root / path.lstrip("/")
        for place in (own, *own.parents):
            if place.is_relative_to(root) and place.is_dir():
                yield version, place


@dataclass(frozen=True)
class _Cgroup:
    version: int
    path: Path
    limit: int

    def apply(self) -> None:
        """Sets the limit, with no swap to speak of to evade it: were version 1's two limits equal, it would not count the hits."""
        number = str(self.limit)
        if self.version == 1:
            names = {"memory.limit_in_bytes": number, "memory.memsw.limit_in_bytes": str(self.limit + (1 << 20))}
        else:
            names = {"memory.max": number, "memory.swap.max": "0"}
        for i, (name, value) in enumerate(names.items()):
            if i == 0 or (self.path / name).exists():
                (self.path / name).write_text(value, encoding="ascii")

    def use(self) -> CgroupUse:
        peak = self.path / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")
        counts = (self.path / ("memory.oom_control" if self.version == 1 else "memory.events")).read_text(encoding="ascii")
        count = dict(line.split() for line in counts.splitlines())
        hits = (self.path / "memory.failcnt").read_text(encoding="ascii") if self.version == 1 else count["max"]
        return CgroupUse(
            limit=self.limit,
            peak=int(peak.read_text(encoding="ascii")) if peak.exists() else None,
            limit_hits=int(hits),
            oom_kills=int(count.get("oom_kill", 0)),
        )


def _remove(cgroup: Path) -> None:
    for _ in range(50):
        try:
            cgroup.rmdir()
        except OSError:
            time.sleep(0.02)
        else:
            return
    print(f"measure: processes are still running in {cgroup}; remove it when they have ended", file=sys.stderr)


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[_Cgroup]:
    """A fresh memory cgroup with this limit, removed at the end.

    Raises:
        NotPermittedError: none can be made.
    """
    problem: object = "the kernel offers none"
    cgroup = None
    for version, place in _places():
        path = place / f"measure-{os.getpid()}-{time.monotonic_ns()}"
        try:
            path.mkdir()
        except OSError as error:
            problem = error
            continue
        try:
            cgroup = _Cgroup(version, path, limit)
            cgroup.apply()
        except OSError as error:
            problem, cgroup = error, None
            path.rmdir()
            continue
        break
    if cgroup is None:
        raise NotPermittedError(f"no memory cgroup can be made here: {problem}")
    try:
        yield cgroup
    finally:
        _remove(cgroup.path)


# ---------------------------------------------------------------------------------------------------------------------------------
# The run


def _fields(pid: int) -> dict[str, int]:
    """The kernel's numbers for a process, in bytes; none of a process that has gone."""
    numbers: dict[str, int] = {}
    for name, unit in (("status", 1024), ("io", 1)):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
            numbers |= {key: int(value) * unit for key, value in _FIELD.findall(text)}
    return numbers


class _Sampler:
    """Watches a process, its descendants, and those of them that have been orphaned."""

    def __init__(self, pid: int) -> None:
        self.root = psutil.Process(pid)
        self.start = time.perf_counter()
        self.tree: set[psutil.Process] = {self.root}
        self.seen: set[psutil.Process] = {self.root}
        self.samples: list[Sample] = []
        self.high_water = self.read = self.written = 0

    def sample(self) -> None:
        with contextlib.suppress(psutil.Error):
            self.tree |= set(self.root.children(recursive=True))
        self.tree = {process for process in self.tree if process == self.root or process.is_running()}
        self.seen |= self.tree
        found = [_fields(process.pid) for process in self.tree]

        def total(field: str) -> int:
            return sum(numbers.get(field, 0) for numbers in found)

        seconds = time.perf_counter() - self.start
        self.samples.append(Sample(round(seconds, 4), total("VmRSS"), total("RssAnon"), total("RssFile")))
        self.high_water = max([self.high_water, *(numbers.get("VmHWM", 0) for numbers in found)])
        # A process's counters take over those of a child it has waited for, so that the sum over the living never goes down for long.
        self.read = max(self.read, total("read_bytes"))
        self.written = max(self.written, total("write_bytes"))


def _run(
    command: list[str],
    interval: float,
    cgroup: _Cgroup | None,
    cwd: str | Path | None,
    env: Mapping[str, str] | None,
    stdout: int | IO[Any] | None,
    stderr: int | IO[Any] | None,
) -> Measurement:
    enter = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup.path / "cgroup.procs")] if cgroup else []
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    process = subprocess.Popen([*enter, *command], cwd=cwd, env=env, stdout=stdout, stderr=stderr)
    pidfd = os.pidfd_open(process.pid)
    try:
        sampler = _Sampler(process.pid)
        sampler.sample()
        while not select.select([pidfd], [], [], interval)[0]:
            sampler.sample()
        wall = time.perf_counter() - start
        sampler.sample()  # a process that has ended and is not waited for yet still has its counters
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        os.close(pidfd)
        if process.returncode is None:
            process.terminate()
            process.wait()
    samples = sampler.samples
    return Measurement(
        command=command,
        exit_code=process.returncode,
        wall_seconds=wall,
        user_seconds=usage.ru_utime,
        system_seconds=usage.ru_stime,
        peak_rss=max(sample.rss for sample in samples),
        peak_anon=max(sample.anon for sample in samples),
        peak_file=max(sample.file for sample in samples),
        peak_vmhwm=sampler.high_water,
        maxrss=usage.ru_maxrss * 1024,
        maxrss_floor=floor,
        read_bytes=sampler.read,
        write_bytes=sampler.written,
        processes=len(sampler.seen),
        cgroup=cgroup.use() if cgroup else None,
        samples=samples,
    )


def measure(
    command: list[str],
    *,
    interval: float = 0.02,
    cgroup: int | None = None,
    cold: bool = False,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
) -> Measurement:
    """Runs a command to its end and measures it.

    Args:
        command: a program and its arguments.
        interval: seconds between samples.
        cgroup: a limit in bytes: run in a fresh memory cgroup with it.
        cold: drop the page cache first.
        cwd: the command's directory.
        env: its environment.
        stdout: its output, as for ``subprocess``.
        stderr: its error output.

    Raises:
        NotPermittedError: there can be no cgroup, or caches cannot be dropped.
        OSError: the command cannot be started.
    """
    if cold:
        drop_caches()
    if cgroup is None:
        return _run(command, interval, None, cwd, env, stdout, stderr)
    with memory_cgroup(cgroup) as group:
        return _run(command, interval, group, cwd, env, stdout, stderr)


def plot(measurement: Measurement, path: str | Path) -> None:
    """Draws memory over time into an image file; needs matplotlib."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    seconds = [sample.seconds for sample in measurement.samples]
    for name, label in (("rss", "resident"), ("anon", "anonymous"), ("file", "mapped files")):
        axes.plot(seconds, [getattr(sample, name) / 1e6 for sample in measurement.samples], label=label)
    axes.set(xlabel="seconds", ylabel="MB", title=" ".join(measurement.command)[:120], ylim=(0, None))
    axes.legend()
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------------------------------------
# The command


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.measure", description="Run a command and tell what memory and time it took.")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the numbers go (default: standard output)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw memory over time; needs matplotlib")
    parser.add_argument("--cgroup", type=_size, metavar="SIZE", help="run in a fresh memory cgroup with this limit")
    parser.add_argument("--interval", type=float, default=0.02, metavar="SECONDS", help="between samples (default: 0.02)")
    parser.add_argument("--drop-caches", action="store_true", help="empty the page cache first, where permitted")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    return parser


def _interrupt(_number: int, _frame: object) -> None:
    """The terminal sends an interrupt to the command as well: what it does then is still measured."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; the result is the measured command's, 128 + n for signal n, 2 if it could not be run as asked."""
    options = _parser().parse_args(arguments)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        print("measure: --plot needs matplotlib, which is not installed", file=sys.stderr)
        return 2
    if options.drop_caches:
        try:
            drop_caches()
        except NotPermittedError as error:
            print(f"measure: {error}; the command may read from the page cache", file=sys.stderr)
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        measurement = measure(options.command, interval=options.interval, cgroup=options.cgroup)
    except (NotPermittedError, OSError) as error:
        print(f"measure: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGINT, before)
    text = json.dumps(measurement.to_json(), indent=2) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
        took = f"{format_size(measurement.peak_rss)} resident, {format_size(measurement.peak_anon)} anonymous"
        print(f"measure: {took}, {measurement.wall_seconds:.2f} s, exit code {measurement.exit_code}", file=sys.stderr)
    else:
        sys.stdout.write(text)
    if options.plot:
        plot(measurement, options.plot)
    return measurement.exit_code if measurement.exit_code >= 0 else 128 - measurement.exit_code


if __name__ == "__main__":
    sys.exit(main())
