"""The calls behind the command line: open, plan, run, convert, verify."""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamconv import memory, recipes
from streamconv.checkpoint import CONFIG, CONTAINERS, FORMAT_OF, Checkpoint, find_sidecars, is_weights, open_checkpoint, read_config
from streamconv.compiler import Budget, check_workers, compile_plan
from streamconv.dtypes import CASTABLE, TensorSpec, parse_dtype
from streamconv.engine.check import OutputCheck, check_replicas
from streamconv.engine.direct import BLOCK, LEAST, shares_extents
from streamconv.engine.io import describe_os_error
from streamconv.engine.journal import NAME as JOURNAL
from streamconv.engine.journal import Journal, journal_path
from streamconv.engine.local import LocalEngine, check_sources, partial
from streamconv.engine.readers import BACKENDS
from streamconv.errors import BudgetError, DestinationError, FormatError, Interrupted, RunError, SpaceError, UsageError
from streamconv.formats import FileLayout, Source
from streamconv.names import parse as parse_names
from streamconv.plan import Mapping as Row
from streamconv.plan import Plan
from streamconv.progress import bar
from streamconv.recipe import Conversion, Recipe, identity, read_identity_options
from streamconv.units import format_size, parse_size
from streamconv.verify import Comparison, compare

MAX_MEMORY = "1GB"
MAX_SHARD_SIZE = "5GB"
COMPARING = 24 << 20  # bytes that --compare takes beside its libraries
AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Result:
    """What a run took. Memory in bytes, of the whole process."""

    plan: Plan
    seconds: float
    peak_rss: int
    peak_anonymous: int
    verified: bool | None = None
    comparison: Comparison | None = None

    def summary(self) -> dict[str, Any]:
        """What ``convert --json`` prints."""
        plan = self.plan.summary()
        kept = (
            "peak_memory",
            "bytes_read",
            "bytes_copied",
            "bytes_computed",
            "bytes_written",
            "disk_needed",
            "workers",
            "dropped",
            "notes",
        )
        found: dict[str, Any] = {key: plan[key] for key in kept}
        found |= {"seconds": self.seconds, "peak_rss": self.peak_rss, "peak_anonymous": self.peak_anonymous}
        found |= {"outputs": plan["outputs"], "verified": self.verified}
        return found | ({"comparison": self.comparison.summary()} if self.comparison else {})

    def __str__(self) -> str:
        totals, seconds = self.plan.totals, max(self.seconds, 1e-9)
        rate = format_size(totals.bytes_written / seconds)
        moved = f"{format_size(totals.bytes_copied)} copied, {format_size(totals.bytes_computed)} computed"
        checked = ", verified" if self.verified else ""
        return (
            f"{self.plan.destination}: {len(self.plan.mapping)} tensors, "
            f"{format_size(totals.bytes_written)} in {self.seconds:.2f} s ({rate}/s); "
            f"{moved}{checked}; peak memory {format_size(self.peak_rss)}"
        )


# Planning ----------------------------------------------------------------------------------------------------------


def plan(
    src: AnyPath,
    dst: AnyPath,
    *,
    recipe: str | Recipe | None = None,
    options: Mapping[str, object] | None = None,
    format: str | None = None,  # noqa: A002 - the word of the command line
    dtype: str | None = None,
    keep_dtype: Iterable[str] = (),
    max_shard_size: str | int = MAX_SHARD_SIZE,
    single_file: bool = False,
    max_memory: str | int = MAX_MEMORY,
    workers: int | None = None,
    read_backend: str = "auto",
    sidecars_from: AnyPath | None = None,
    overwrite: bool = False,
    resume: bool = False,
    align: bool = False,
) -> Plan:
    """Everything but the run: what `convert` would do. Writes nothing; see `convert` for the arguments.

    Raises:
        StreamconvError: anything that can be refused before the first byte.
    """
    floor = memory.peak()
    if read_backend not in BACKENDS:
        raise UsageError(f"unknown read backend {read_backend!r}: known are {', '.join(BACKENDS)}")
    chosen = recipes.get(recipe) if isinstance(recipe, str) else recipe
    target = Target.of(dst, format, chosen.target_format if chosen else "safetensors")
    own = read_identity_options(options or {}) if chosen is None else {}
    checkpoint = open_checkpoint(src, root=own.get("root"))
    try:
        target.check(checkpoint, overwrite=overwrite, resume=resume)
    except OSError as error:
        raise DestinationError(f"{target.path}: cannot be looked at: {error.strerror}; give another DST") from error
    beside = Path(sidecars_from).absolute() if sidecars_from is not None else None
    if beside is not None and not beside.is_dir():
        raise UsageError(f"--sidecars-from {beside}: not a directory")
    conversion = _convert_names(checkpoint, chosen, options or {}, _recast(dtype, keep_dtype), beside)
    tied = _ties(checkpoint, conversion) if own.get("tied") == "keep" else {}
    metadata = {"format": "pt", **{key: value for key, value in checkpoint.metadata.items() if key not in checkpoint.ties}}
    container = CONTAINERS[target.format]
    facts: dict[str, Any]
    if container.holds_ties:
        if align:
            raise UsageError(f"--align: {target.format} files have an alignment of their own: leave it out")
        facts = {"tied": tied}
    else:
        conversion, facts = _without(conversion, tied), {"metadata": metadata | tied, "align": BLOCK if align else 8}
    specs = {name: node.spec for name, node in conversion.outputs.items()}
    shard = parse_size(max_shard_size)
    limit = None if single_file or target.file else shard
    layouts = container.lay_out(specs, max_shard_size=limit, file=target.file, **facts)
    told = [f"{name} is {kept}, stored once (--set tied=copy: twice)" for name, kept in list(tied.items())[:5]]
    sidecars, notes = ({}, []) if target.file else _sidecars(checkpoint, beside, chosen, conversion, dtype)
    return compile_plan(
        conversion.outputs,
        layouts,
        root=str(target.root),
        single=target.file,
        format=target.format,
        budget=Budget(parse_size(max_memory), check_workers(workers), lambda: _taken(floor)),
        sidecars=sidecars,
        mapping=(Row(*row) for row in conversion.rows),
        dropped=conversion.dropped,
        notes=[*checkpoint.contents.notes, *told, *conversion.notes, *notes, *_may_share(checkpoint, target, layouts)],
        replicas=conversion.replicas,
        read_backend=read_backend,
    )


def _may_share(checkpoint: Checkpoint, target: Target, layouts: Sequence[FileLayout]) -> Iterator[str]:
    """Suggests ``--align`` where DST could share the source's blocks and only the headers' lengths keep it from that."""
    above = next(parent for parent in (target.root, *target.root.parents) if parent.exists())
    if target.format != "safetensors" or above.stat().st_dev != checkpoint.path.stat().st_dev or not shares_extents(above):
        return
    starts = [source.extents[0].offset for source in checkpoint.contents.entries.values() if source.spec.nbytes >= LEAST]
    aligned = all(min(layout.slots.values(), default=0) % BLOCK == 0 for layout in layouts)
    if starts and not aligned and sum(start % BLOCK == 0 for start in starts) > len(starts) // 2:
        yield "the file system can share blocks between SRC and DST: with --align it need not copy them"


def _taken(floor: int) -> int:
    """What the process takes: its high-water mark if planning set a new one, else what is resident now."""
    peak = memory.peak()
    return peak if peak > floor else memory.resident()


def _recast(dtype: str | None, keep: Iterable[str]) -> Callable[[str, TensorSpec], str | None]:
    """Which dtype a target shall have under ``--dtype`` and ``--keep-dtype``."""
    if dtype is None:
        return lambda _name, _spec: None
    wanted = parse_dtype(dtype).name
    if wanted not in CASTABLE:
        raise UsageError(f"--dtype {dtype}: tensors can be cast to {', '.join(CASTABLE)}")
    patterns = [parse_names(text) for text in keep if "{" in text]
    globs = [text for text in keep if "{" not in text]

    def recast(name: str, spec: TensorSpec) -> str | None:
        if spec.dtype.name not in CASTABLE or any(fnmatch.fnmatchcase(name, glob) for glob in globs):
            return None
        return None if any(pattern.match(name) is not None for pattern in patterns) else wanted

    return recast


def _convert_names(
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    options: Mapping[str, object],
    recast: Callable[[str, TensorSpec], str | None],
    beside: Path | None,
) -> Conversion:
    if recipe is None:
        return identity(_with_ties(checkpoint), recast)
    sidecar = read_config(beside) if beside else {}
    return recipe.apply(checkpoint.contents.entries, checkpoint.config, options, sidecar=sidecar, recast=recast)


def _with_ties(checkpoint: Checkpoint) -> dict[str, Source]:
    """All tensors, those that are left out because they are another too."""
    entries = checkpoint.contents.entries
    return entries | {name: entries[kept] for name, kept in checkpoint.ties.items() if name not in entries}


def _ties(checkpoint: Checkpoint, conversion: Conversion) -> dict[str, str]:
    """The ties of the source that hold among the targets, which may have been cast apart."""
    outputs = conversion.outputs
    return {name: kept for name, kept in checkpoint.ties.items() if outputs[name].spec == outputs[kept].spec}


def _without(conversion: Conversion, tied: Mapping[str, str]) -> Conversion:
    """The conversion with tied tensors under one name only, which is then made of both."""
    others: dict[str, list[str]] = {}
    for name, kept in tied.items():
        others.setdefault(kept, []).append(name)
    outputs = {name: node for name, node in conversion.outputs.items() if name not in tied}
    rows = [row._replace(sources=(*row.sources, *others.get(row.target, ()))) for row in conversion.rows if row.target in outputs]
    return replace(conversion, outputs=outputs, rows=rows)


def _sidecars(
    checkpoint: Checkpoint, beside: Path | None, recipe: Recipe | None, conversion: Conversion, dtype: str | None
) -> tuple[dict[str, str | bytes], list[str]]:
    """The files beside the weights: relative path -> file to copy, or new bytes for a config that changes; and notes."""
    root = beside or checkpoint.path
    names = find_sidecars(root, None if beside else checkpoint.contents) if root.is_dir() else []
    sidecars: dict[str, str | bytes] = {name: str(root / name) for name in names}
    config = read_config(root) if CONFIG in sidecars or root.is_dir() else {}
    changed = dict(config)
    notes = []
    if recipe and recipe.config and not beside and config:
        module, function = recipe.config.split(":")
        changed = getattr(importlib.import_module(module), function)(config, conversion.options) or changed
    elif recipe and not beside and recipe.target_format == recipe.source_format and config and recipe.inverse_config:
        notes.append(f"{CONFIG} is the source's own: give --sidecars-from a folder of the target model for one that its code reads")
    if dtype is not None:
        changed = _set_dtype(changed, parse_dtype(dtype).name)
    if changed != config and CONFIG in sidecars:
        sidecars[CONFIG] = (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()
    return sidecars, notes


def _set_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config with every ``dtype`` / ``torch_dtype`` in it, nested ones too, set to ``dtype``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and (value is None or isinstance(value, str)):
            found[key] = dtype
        else:
            found[key] = _set_dtype(value, dtype) if isinstance(value, dict) else value
    return found


@dataclass(frozen=True)
class Target:
    """DST taken apart: the directory of the files, the one file's name if DST names one, and the container."""

    root: Path
    file: str | None
    format: str

    @classmethod
    def of(cls, dst: AnyPath, format: str | None, default: str = "safetensors") -> Target:  # noqa: A002
        path = Path(dst)
        if "://" in str(dst):
            raise UsageError(f"{dst}: URLs cannot be written yet: give a path")
        if format not in (None, *CONTAINERS):
            raise UsageError(f"--format {format}: unknown container; known are {', '.join(CONTAINERS)}")
        path = Path(os.path.abspath(path))  # noqa: PTH100 - links in DST are kept as the user wrote them
        by_suffix = FORMAT_OF.get(path.suffix)
        if by_suffix and not os.path.isdir(path):  # noqa: PTH112 - unlike Path.is_dir it never raises
            if format and format != by_suffix:
                raise UsageError(f"{path}: ends in {path.suffix}, which is not --format {format}")
            return cls(path.parent, path.name, by_suffix)
        return cls(path, None, format or default)

    @property
    def path(self) -> Path:
        return self.root / self.file if self.file else self.root

    def check_free(self) -> None:
        """Refuses a DST that has something in it."""
        path = self.path
        if journal_path(self.root, self.file).exists():
            raise DestinationError(f"{path}: holds an unfinished conversion: continue it with --resume, start afresh with --overwrite")
        occupied = os.path.lexists(path) if self.file else path.is_dir() and any(entry.name != f"{JOURNAL}.new" for entry in path.iterdir())
        if occupied:
            raise DestinationError(f"{path}: already exists and is not empty: give another DST, or --overwrite, or --resume")

    def check(self, checkpoint: Checkpoint, *, overwrite: bool, resume: bool) -> None:
        """Refuses a DST that is, holds or lies in SRC, or that has something in it."""
        path, src = self.path, checkpoint.path
        mine, theirs = Path(os.path.realpath(path)), Path(os.path.realpath(src))
        if mine == theirs:
            raise DestinationError(f"{path}: DST is SRC: give another DST")
        if src.is_dir() and mine.is_relative_to(theirs):
            raise DestinationError(f"{path}: DST lies inside SRC {src}: give a DST outside of it")
        if theirs.is_relative_to(mine) or any(os.path.realpath(file).startswith(f"{mine}{os.sep}") for file in checkpoint.contents.files):
            raise DestinationError(f"{path}: SRC {src} lies inside DST: give another DST")
        if overwrite and resume:
            raise UsageError("--overwrite and --resume exclude each other: start afresh, or continue")
        if path.exists() and not path.is_dir() and not self.file:
            raise DestinationError(f"{path}: exists and is not a directory: give another DST")
        above = next((parent for parent in self.root.parents if parent.exists() or parent.is_symlink()), None)
        if above is not None and not above.is_dir() and not self.root.exists():
            raise DestinationError(f"{path}: {above} is not a directory: give another DST")
        if not overwrite and not resume:
            self.check_free()


# Running -----------------------------------------------------------------------------------------------------------


def run(plan: Plan, *, overwrite: bool = False, resume: bool = False, verify: bool = False, progress: bool = False) -> Result:
    """Runs a plan.

    Args:
        plan: what `plan` made; its sources must not have changed since.
        overwrite: remove weight and index files that are in the way first, nothing else.
        resume: keep what an interrupted run of the same plan has finished.
        verify: read everything back and compare.
        progress: show a bar on stderr if that is a terminal.

    Raises:
        StreamconvError: see the classes; nothing is lost.
    """
    started = time.perf_counter()
    root = Path(plan.root)
    journal = Journal(journal_path(root, plan.single), plan)
    check_sources(plan)
    with _watch() as figures:
        try:
            finished = resume and _is_complete(plan, journal)
            if not finished:
                _check_room(plan, root, _old_files(root, plan.single) if overwrite else [])
                check_replicas(plan)
                _prepare(plan, root, overwrite=overwrite, resume=resume and journal.path.exists())
                journal.begin(resume=resume)
                with bar(plan.totals.bytes_written, "converting", show=progress) as tell:
                    LocalEngine(plan, journal, tell).run()
            if (verify or finished) and (different := _find_difference(plan, progress=progress)) is not None:
                if finished:
                    raise DestinationError(f"{root}: {different} is not what this conversion makes: start afresh with --overwrite")
                raise RunError(f"{root}: {different} does not hold what was written: check disk and memory, then rerun with --overwrite")
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted: rerun the same command with --resume to go on with {root}") from None
    return Result(plan, time.perf_counter() - started, memory.peak(), figures["anonymous"], True if verify or finished else None)


@contextmanager
def _watch() -> Iterator[dict[str, int]]:
    """The largest anonymous memory seen while the block runs; the kernel keeps no mark of it."""
    figures, done = {"anonymous": memory.anonymous()}, threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            figures["anonymous"] = max(figures["anonymous"], memory.anonymous())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield figures
    finally:
        done.set()
        thread.join()


def _is_complete(plan: Plan, journal: Journal) -> bool:
    """Whether DST holds all files of the plan at their sizes and no run is pending."""
    root = Path(plan.root)
    return not journal.path.exists() and all(
        (root / file.path).is_file() and (root / file.path).stat().st_size == file.size for file in plan.files
    )


def _check_room(plan: Plan, root: Path, doomed: Iterable[Path]) -> None:
    existing = next(parent for parent in (root, *root.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    replaced = {name for file in plan.files for path in [root / file.path] for name in (path, partial(path))}
    present = sum(_allocated(path) for path in replaced.union(doomed))
    if plan.totals.disk_needed > free + present:
        raise SpaceError(
            f"{root}: no room on the disk: the output needs {format_size(plan.totals.disk_needed)}, {format_size(free)} are free: "
            "free some, or give a DST on another disk"
        )


def _allocated(path: Path) -> int:
    """Bytes on the disk that removing ``path`` gives back."""
    if path.is_symlink() or not path.is_file():
        return 0
    found = path.stat()
    return getattr(found, "st_blocks", -(-found.st_size // 512)) * 512


def _old_files(root: Path, single: str | None) -> list[Path]:
    """What ``--overwrite`` removes: DST itself if it is one file, else the weight and index files in it, links to nowhere included."""
    if single:
        return [root / single]
    return [path for path in root.iterdir() if is_weights(path.name) and not path.is_dir()] if root.is_dir() else []


def _prepare(plan: Plan, root: Path, *, overwrite: bool, resume: bool) -> None:
    """Makes DST ready to be written, or says why it cannot be."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for path in _old_files(root, plan.single):
                path.unlink(missing_ok=True)
            journal_path(root, plan.single).unlink(missing_ok=True)
        elif not resume:
            Target(root, plan.single, plan.format).check_free()
        if not os.access(root, os.W_OK | os.X_OK):
            raise DestinationError(f"{root}: cannot be written: make it writable or give another DST")
    except OSError as error:
        raise DestinationError(f"{root}: cannot be written: {error.strerror}; give another DST") from error


def _find_difference(plan: Plan, *, progress: bool) -> str | None:
    """Compares every output file, read back, with what the plan makes of the sources; names one that differs."""
    with bar(plan.totals.bytes_written, "verifying", show=progress) as tell:
        try:
            return OutputCheck(plan, tell).run()
        except OSError as error:
            raise describe_os_error(error, plan.root) from error


def convert(
    src: AnyPath,
    dst: AnyPath,
    *,
    verify: bool = False,
    compare_with: AnyPath | None = None,
    progress: bool = False,
    **settings: Any,
) -> Result:
    """Plans and runs a conversion.

    Args:
        src: a directory or file.
        dst: a file if its name ends in the container's suffix, else a directory.
        verify: read everything back and compare it after writing.
        compare_with: a reference checkpoint to compare the result with; differences do not fail.
        progress: show a bar on stderr if that is a terminal.
        settings: the arguments of `plan`: recipe (name, file or `Recipe`), options, format, dtype, keep_dtype, max_shard_size,
            single_file, max_memory, workers, read_backend, sidecars_from, overwrite, resume, align.

    Raises:
        StreamconvError: see the classes.
    """
    reference = open_checkpoint(compare_with) if compare_with is not None else None
    if reference is not None:
        import torch  # noqa: F401 - loaded first, so that the plan counts what measuring differences takes
    made = plan(src, dst, **settings)
    if reference is not None:
        made = _with_comparison(made, parse_size(settings.get("max_memory", MAX_MEMORY)))
    result = run(made, progress=progress, verify=verify, overwrite=bool(settings.get("overwrite")), resume=bool(settings.get("resume")))
    if reference is None:
        return result
    done = open_checkpoint(made.destination)
    comparison = compare(
        dict(_with_ties(done)),
        _with_ties(reference),
        workers=made.workers,
        max_memory=made.peak_memory,
        read_backend=made.read_backend,
    )
    return replace(result, comparison=comparison, peak_rss=memory.peak())


def _with_comparison(made: Plan, limit: int) -> Plan:
    """The plan with a peak that leaves room for a comparison afterwards.

    Raises:
        BudgetError: there is none.
    """
    peak = max(made.peak_memory, memory.resident() + COMPARING)
    if peak > limit:
        needed = -(-peak // 10**6)
        raise BudgetError(f"--max-memory {format_size(limit)} is too small for --compare: use --max-memory {needed}MB", needed * 10**6)
    return replace(made, peak_memory=peak)


def verify(
    a: AnyPath,
    b: AnyPath,
    *,
    recipe: str | Recipe | None = None,
    options: Mapping[str, object] | None = None,
    dtype: str | None = None,
    keep_dtype: Iterable[str] = (),
    max_memory: str | int = MAX_MEMORY,
    workers: int | None = None,
    read_backend: str = "auto",
    sidecars_from: AnyPath | None = None,
    progress: bool = False,
) -> Comparison:
    """Compares two checkpoints tensor by tensor; with a recipe, what it makes of ``a`` with ``b``.

    Raises:
        StreamconvError: one cannot be read, or the recipe does not fit.
    """
    if read_backend not in BACKENDS:
        raise UsageError(f"unknown read backend {read_backend!r}: known are {', '.join(BACKENDS)}")
    chosen = recipes.get(recipe) if isinstance(recipe, str) else recipe
    own = read_identity_options(options or {}) if chosen is None else {}
    left, right = open_checkpoint(a, root=own.get("root")), open_checkpoint(b)
    beside = Path(sidecars_from).absolute() if sidecars_from is not None else None
    made = _convert_names(left, chosen, options or {}, _recast(dtype, keep_dtype), beside)
    found = right.contents.entries if chosen else _with_ties(right)
    total = sum(entry.spec.nbytes for entry in found.values())
    with bar(total, "comparing", show=progress) as tell:
        return compare(
            made.outputs,
            found,
            workers=check_workers(workers),
            max_memory=parse_size(max_memory),
            read_backend=read_backend,
            progress=tell,
        )


def match_recipes(src: AnyPath) -> list[str]:
    """The names of the recipes that fit a checkpoint: all its tensors have a rule, all required rules a tensor."""
    checkpoint = open_checkpoint(src)
    fitting = []
    for name, recipe in recipes.registry().items():
        try:
            recipe.apply(checkpoint.contents.entries, checkpoint.config)
        except (UsageError, FormatError):
            raise
        except Exception:  # noqa: BLE001, S112 - whatever does not fit does not match
            continue
        fitting.append(name)
    return fitting
