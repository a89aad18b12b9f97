"""Has the system fail under conversions of every kind, call by call, and compares what comes of it with an undisturbed run.

    python -m tools.faults --kind all --count 200

A library that is loaded before the C library (`faults.c`, compiled here by ``cc``) counts the calls that concern the files of a conversion,
and has one of them, or each so-manieth, fail with an error, or do half of what it was asked. Whatever fails, and wherever: the command ends
with exit code 0 and the right bytes, or with one line that says what and where; no source is changed, no temporary folder is left, nothing
is left of what was refused; and what is gone on with comes to the same bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch  # noqa: F401 - before the forks, so that their time is that of work
import yaml

from streamconv.cli import command as cli
from streamconv.engine import direct, order
from streamconv.planning import fitting
from streamconv.running import filling, making
from streamconv.storage import staging
from tools import crash

CALLS = (
    "open", "read", "pread", "preadv", "write", "pwrite", "pwritev", "stat", "fstat", "truncate", "fallocate", "fsync", "rename", "unlink",
    "rmdir", "link", "mkdir", "close", "mmap", "copy_file_range", "lseek", "flock", "opendir", "access", "statvfs",
)  # fmt: skip
"""In the order in which `faults.c` numbers them."""
MOVING = {"read", "pread", "preadv", "write", "pwrite", "pwritev", "copy_file_range"}
SHORT = -1
ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.ESTALE, errno.EROFS, errno.EINTR)
PATIENCE = 120.0  # seconds after which a command is taken to hang
SHARD = 256 << 10
LAYERS, FFN, VOCAB = 1, 64, 64  # of a source of a megabyte
_SMALL = ["--max-shard-size", str(SHARD)]
_FUSE = [*_SMALL, "--recipe", "{src}/../fuse.yaml"]
KINDS = {
    "reshard": _SMALL,
    "mmap": [*_SMALL, "--read-backend", "mmap"],
    "fuse": _FUSE,
    "transpose": [*_SMALL, "--recipe", "{src}/../transpose.yaml"],
    "cast": [*_SMALL, "--dtype", "bf16"],
    "torch": [*_SMALL, "--format", "torch"],
    "mindspore": [*_SMALL, "--format", "mindspore"],
    "sat": ["--recipe", "llama-hf2sat", "--set", "model_parallel=2"],
    "file": ["--dtype", "bf16"],
    "verify": [*_SMALL, "--checksum", "--verify"],
    "torch-verify": [*_SMALL, "--format", "torch", "--checksum", "--verify"],
    "overwrite": [*_SMALL, "--overwrite"],
    "reclaim": [*_SMALL, "--reclaim-source", "--yes"],
    "reclaim-fuse": [*_FUSE, "--reclaim-source", "--yes"],
    "adapter": [*_SMALL, "--adapter", "{src}/../lora"],
    "graft": [*_SMALL, "--graft", "{src}/../donor", "--take", "*", "--replace"],
    "parts": _SMALL,
    "parts-torch": [*_SMALL, "--format", "torch"],
}
"""What to convert how; the source is always the same."""
TRANSPOSE = {
    "rules": [
        {"rule": "{rest*}_proj.weight", "right": "{rest*}_proj.t", "layout": "a b -> b a"},
        {"rule": "{rest*}", "right": "{rest*}", "fallback": True},
    ]
}


class FaultError(Exception):
    """A conversion under which the system failed did not end as it may."""


class Fault(NamedTuple):
    """The ``number``-th call of a kind fails with ``error``, or each so-manieth."""

    call: str
    number: int
    error: int
    every: bool = False

    def __str__(self) -> str:
        what = "is short" if self.error == SHORT else f"fails with {errno.errorcode[self.error]}"
        return f"{self.call} {'each ' if self.every else ''}{self.number} {what}"


@dataclass
class Outcome:
    """How a command ended, and how often it made each call."""

    code: int
    said: str
    calls: dict[str, int]


class Bench:
    """A kind of conversion, its source and its output, again and again.

    Args:
        kind: of `KINDS`.
        folder: to work in.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self._folder = kind, folder / kind
        self._original = folder / "src"
        self.src, self.out, self.temporary = self._folder / "src", self._folder / "out", self._folder / "tmp"
        self.dst = self.out / "one.safetensors" if kind == "file" else self.out
        self._plan = self._folder / "plan.json"
        self._given = [text.format(src=self._original) for text in KINDS[kind]]
        self.wanted: dict[str, bytes] = {}
        self.before: dict[str, bytes] = {}

    def clean(self) -> None:
        """Puts everything as it was before the first run."""
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(self._original, self.src)
        for folder in (self.out, self.temporary):
            folder.mkdir()
        if self.kind == "overwrite":
            shutil.copy(next(self._original.glob("*.safetensors")), self.out / "model.safetensors")
            (self.out / "notes.txt").write_text("mine")
        self.before = crash.read_tree(self.out)

    def commands(self) -> list[list[str]]:
        """The command lines of an undisturbed run."""
        convert = ["convert", str(self.src), str(self.dst), *self._given]
        if not self.kind.startswith("parts"):
            return [convert]
        plan = ["plan", *convert[1:], "--out", str(self._plan)]
        return [plan, *(["run", str(self._plan), "--part", f"{k}/2"] for k in range(2)), ["run", str(self._plan), "--finish"]]

    def run(self, command: Sequence[str], fault: Fault | None = None) -> Outcome:
        """Runs a command in a process of its own, which a fault may meet."""
        said, counted = self._folder / "stderr", self._folder / "counts"
        if not (pid := os.fork()):
            code = 70
            try:
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                tempfile.tempdir = str(self.temporary)
                staging._clear.cache_clear()
                code = self._fail_meanwhile(command, fault, counted)
            finally:
                os._exit(code)
        code = _wait(pid)
        calls = json.loads(counted.read_text()) if counted.exists() else {}
        return Outcome(code, said.read_text(), calls)

    def _fail_meanwhile(self, command: Sequence[str], fault: Fault | None, counted: Path) -> int:
        library = ctypes.CDLL(None)
        library.faults_arm.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_int]
        library.faults_count.restype = ctypes.c_long
        for folder in (self.src, self.out, self.temporary):
            library.faults_below(os.fsencode(folder))
        number, every = (0, 0) if fault is None else (fault.number, fault.number if fault.every else 0)
        library.faults_arm(CALLS.index(fault.call) if fault else -1, number, every, fault.error if fault else 0)
        code = cli.main([*command, "--quiet", *(["-j", "2", "--max-memory", "4GB"] if command[0] != "run" else [])])
        calls = {call: library.faults_count(k) for k, call in enumerate(CALLS)}
        library.faults_arm(-1, 0, 0, 0)
        counted.write_text(json.dumps(calls))
        return code

    def measure(self) -> list[dict[str, int]]:
        """Runs it undisturbed; how often each command makes each call."""
        self.clean()
        found = []
        for command in self.commands():
            outcome = self.run(command)
            if outcome.code:
                raise FaultError(f"{self.kind}: undisturbed: exit code {outcome.code}: {outcome.said}")
            found.append(outcome.calls)
        self.wanted = crash.read_tree(self.out)
        return found

    def suffer(self, at: int, fault: Fault) -> int:
        """Runs it with a fault in one of its commands, and again; the exit code.

        Raises:
            FaultError: it did not end as it may.
        """
        self.clean()
        commands = self.commands()
        for command in commands[:at]:
            self.run(command)
        before = crash.read_tree(self.out)
        outcome = self.run(commands[at], fault)
        try:
            self._check(outcome, before, done=at == len(commands) - 1)
            again = [[*commands[at], "--resume"]] if outcome.code == 3 and commands[at][0] == "convert" else [commands[at]]
            if not outcome.code:
                again = []
            for command in (*again, *commands[at + 1 :]):
                self._check_again(self.run(command))
            self._check_bytes("after another run")
        except FaultError as error:
            raise FaultError(f"{self.kind}: {' '.join(commands[at][:1])}: {fault}: {error}; it said {outcome.said!r}") from None
        return outcome.code

    def _check(self, outcome: Outcome, before: dict[str, bytes], *, done: bool) -> None:
        if outcome.code not in (0, 2, 3):
            raise FaultError(f"exit code {outcome.code}")
        if outcome.code == 0 and done:
            self._check_bytes("with exit code 0")
        if outcome.code:
            lines = outcome.said.splitlines()
            is_told = any(place in lines[0] for place in (str(self._folder), f"{self._original}/../")) if len(lines) == 1 else False
            if not (is_told and lines[0].startswith("streamconv: error: ")):
                raise FaultError("no line that says what and where")
        if outcome.code == 2 and (found := crash.read_tree(self.out)) != before:
            raise FaultError(f"refused, and {_differing(found, before)} differ")
        if left := sorted(path.name for path in self.temporary.iterdir()):
            raise FaultError(f"{left} left among temporary files")
        if not self.kind.startswith("reclaim") and crash.read_tree(self.src) != crash.read_tree(self._original):
            raise FaultError("the source changed")

    def _check_bytes(self, when: str) -> None:
        if (found := crash.read_tree(self.out)) != self.wanted:
            raise FaultError(f"{_differing(found, self.wanted)} differ {when}")

    def _check_again(self, outcome: Outcome) -> None:
        if outcome.code:
            raise FaultError(f"then exit code {outcome.code}: {outcome.said!r}")


def _wait(pid: int) -> int:
    """A process's exit code, negative if a signal ended it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise FaultError(f"nothing after {PATIENCE:.0f} s")


def _differing(found: dict[str, bytes], wanted: dict[str, bytes]) -> str:
    return ", ".join(name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name))


def list_faults(calls: dict[str, int]) -> Iterator[Fault]:
    """Every fault that a command can meet which makes so many calls of each kind."""
    for call, count in calls.items():
        errors = (*ERRORS, SHORT) if call in MOVING else ERRORS
        yield from (Fault(call, number, error) for number in range(1, count + 1) for error in errors)
        if call in MOVING and count:
            yield from (Fault(call, number, SHORT, every=True) for number in (1, 2, 3))


def try_kind(kind: str, count: int, folder: Path, chance: random.Random) -> tuple[Counter[int], list[str]]:
    """Has the system fail so many times under a kind of conversion, each call and error in turn; exit codes, and what went wrong."""
    bench = Bench(kind, folder)
    faults: dict[tuple[int, str, int], list[Fault]] = {}
    for at, calls in enumerate(bench.measure()):
        for fault in list_faults(calls):
            faults.setdefault((at, fault.call, fault.error), []).append(fault)
    codes: Counter[int] = Counter()
    wrong = []
    groups = [(at, chance.sample(members, len(members))) for (at, _, _), members in faults.items()]
    chance.shuffle(groups)
    while groups and sum(codes.values()) + len(wrong) < count:
        for at, members in groups[: count - sum(codes.values()) - len(wrong)]:
            try:
                codes[bench.suffer(at, members.pop())] += 1
            except FaultError as error:
                wrong.append(str(error))
                print(f"faults: {error}", file=sys.stderr, flush=True)
        groups = [group for group in groups if group[1]]
    shutil.rmtree(folder / kind)
    return codes, wrong


def prepare(folder: Path) -> None:
    """Makes the source, and has work be cut small, so that little data takes many calls."""
    crash.LAYERS, crash.FFN, crash.VOCAB = LAYERS, FFN, VOCAB
    crash.CONFIG |= {"num_hidden_layers": LAYERS, "intermediate_size": FFN, "vocab_size": VOCAB}
    crash.make_source(folder / "src")
    (folder / "transpose.yaml").write_text(yaml.safe_dump(TRANSPOSE))
    order.COPY_CHUNK = fitting.TILE = 64 << 10
    making.SAVE_BYTES = filling.SAVE_BYTES = SHARD
    direct.LEAST = 16 << 10
    np.zeros(1)


def compile_library(folder: Path) -> Path:
    """Compiles `faults.c`.

    Raises:
        FileNotFoundError: there is no ``cc``.
    """
    made = folder / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", made, Path(__file__).with_suffix(".c"), "-ldl"], check=True)
    return made


def main(argv: list[str] | None = None) -> int:
    """Runs the faults and prints what came of them."""
    parser = argparse.ArgumentParser(description="Have the system fail under conversions.")
    parser.add_argument("--kind", choices=["all", *KINDS], action="append", help="only these")
    parser.add_argument("--count", type=int, default=200, help="faults of each kind of conversion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", help="where to work (default: a temporary directory)")
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    if not hasattr(ctypes.CDLL(None), "faults_arm"):  # once more, with the library
        with tempfile.TemporaryDirectory(dir=args.dir, prefix="faults-") as name:
            library = str(compile_library(Path(name)))
            command = [sys.executable, "-m", "tools.faults", *given, "--dir", name]
            return subprocess.run(command, env={**os.environ, "LD_PRELOAD": library}, check=False).returncode
    folder = Path(tempfile.mkdtemp(dir=args.dir, prefix="run-"))
    prepare(folder)
    chance = random.Random(args.seed)
    kinds = [kind for kind in args.kind or ["all"] if kind != "all"] or list(KINDS)
    failed = 0
    for kind in kinds:
        codes, wrong = try_kind(kind, args.count, folder, chance)
        ended = ", ".join(f"{count} with exit code {code}" for code, count in sorted(codes.items()))
        print(f"{kind:12} {sum(codes.values()):5} as they may: {ended}; {len(wrong)} not", flush=True)
        failed += len(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
