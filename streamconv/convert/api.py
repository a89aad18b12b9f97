"""The calls behind the command line: plan, convert, verify."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from streamconv import memory, recipes
from streamconv.checkpoint.opening import Checkpoint, detect_format, find_checkpoint, open_checkpoint, read_config
from streamconv.checkpoint.stems import reads_shards
from streamconv.convert.casting import Casting
from streamconv.convert.dequantizing import Dequantization
from streamconv.convert.dequantizing import dequantize as dequantize_all
from streamconv.convert.sidecars import make_sidecars
from streamconv.convert.sides import Wanted, lay_out_components, open_other, open_side
from streamconv.dtypes import dtype_name
from streamconv.engine.comparison import Comparison, compare
from streamconv.engine.direct import LEAST, shares_extents
from streamconv.engine.io import BLOCK
from streamconv.engine.readers import BACKENDS
from streamconv.errors import BudgetError, DestinationError, FormatError, StreamconvError, UsageError, writing
from streamconv.formats import FileLayout
from streamconv.formats.catalog import locate
from streamconv.formats.registry import DEFAULT, containers
from streamconv.graph.node import AnyNode, extents
from streamconv.library.model import choose_kept
from streamconv.planning.compiler import compile_plan
from streamconv.planning.fitting import Budget, check_workers
from streamconv.planning.plan import FilePlan, Plan, Totals
from streamconv.planning.plan import Mapping as Row
from streamconv.recipe import Conversion, Recipe, Side, identity, read_identity_options
from streamconv.recipe.vocabulary import resize_vocab, sampling
from streamconv.running.destination import RemoteTarget, Target, target_of
from streamconv.running.directory import check_folders, check_names
from streamconv.running.executors import LOCAL, executor_of
from streamconv.running.kept import check_report, check_sources_stay
from streamconv.running.lock import forget_overwrite, note_overwrite
from streamconv.running.log import read_head
from streamconv.running.output import LOG, begun_plan
from streamconv.running.progress import Shown, bar
from streamconv.running.reclaim import Reclaim
from streamconv.running.results import Result
from streamconv.running.run import run, with_reclaim
from streamconv.running.streams import staged_bytes
from streamconv.schemes.configs import FILES
from streamconv.storage import is_url
from streamconv.storage.folder import AnyPath, Folder
from streamconv.storage.locations import shown
from streamconv.storage.places import identify
from streamconv.units import format_size, parse_size

if TYPE_CHECKING:
    import numpy as np
    import torch

    AnyDType = str | torch.dtype | np.dtype[Any] | type[Any]

MAX_MEMORY = "1GB"
MAX_SHARD_SIZE = "5GB"
SHOWN = 5  # keys that a note names
COMPARING = 24 << 20  # bytes that --compare takes beside its libraries


# Planning ----------------------------------------------------------------------------------------------------------


def plan(
    src: AnyPath,
    dst: str | os.PathLike[str],
    *,
    recipe: str | Recipe | None = None,
    options: Mapping[str, object] | None = None,
    format: str | None = None,  # noqa: A002 - the word of the command line
    dtype: AnyDType | None = None,
    keep_dtype: Iterable[str] = (),
    dequantize: bool = False,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    single_file: bool = False,
    max_memory: str | int = MAX_MEMORY,
    workers: int | None = None,
    read_backend: str = "auto",
    variant: str | None = None,
    sidecars_from: AnyPath | None = None,
    overwrite: bool = False,
    resume: bool = False,
    align: bool = False,
    reclaim_source: bool = False,
    create_pr: bool = False,
    engine: str = LOCAL,
) -> Plan:
    """Everything but the run: what `convert` would do. Writes nothing; see `convert` for the arguments.

    Raises:
        StreamconvError: anything that can be refused before the first byte.

    >>> plan = streamconv.plan("model", "half", dtype="bf16", max_memory="4GB")
    >>> [(row.target, str(row.spec)) for row in plan.mapping]
    [('layers.0.b', 'bfloat16[2]'), ('layers.1.b', 'bfloat16[2]'), ('w', 'bfloat16[2, 3]')]
    >>> [(file.path, file.size) for file in plan.files], plan.totals.bytes_computed
    ([('model.safetensors', 244)], 20)
    """
    floor, executor = memory.peak(), executor_of(engine)
    joined, workers = executor.load(str(dst)), executor.threads if workers is None else workers
    dtype = None if dtype is None else dtype_name(dtype)
    if read_backend not in BACKENDS:
        raise UsageError(f"unknown read backend {read_backend!r}: known are {', '.join(BACKENDS)}")
    chosen = recipes.get(recipe) if isinstance(recipe, str) else recipe
    target = target_of(dst, format, chosen.target.format if chosen else DEFAULT, create_pr=create_pr)
    root, options = _take_root(chosen, options)
    own = read_identity_options(options) if chosen is None else {}
    with memory.bounded(parse_size(max_memory)):
        checkpoint = open_side(src, chosen.source if chosen else Side(), root, variant)
    left: list[str] = []
    if target.file or chosen:
        checkpoint, left = _own_component(checkpoint, target)
    try:
        target.check(checkpoint, overwrite=overwrite, resume=resume)
    except OSError as error:
        raise DestinationError(f"{target.path}: cannot be looked at: {error.strerror}; give another DST") from error
    beside = _beside(sidecars_from)
    casting = Casting(dtype, keep_dtype)
    numbers = dequantize_all(checkpoint, casting, renames=chosen is not None) if dequantize else None
    checkpoint = numbers.checkpoint if numbers else checkpoint
    conversion = _convert_names(checkpoint, chosen, options, casting, beside, numbers)
    container = containers()[target.format]
    keeps = container.ties != "copied" and own.get("tied", "keep") == "keep"
    tied = _ties(checkpoint.others if chosen else checkpoint, conversion) if keeps else {}
    if align and "align" not in container.takes:
        raise UsageError(f"--align: {target.format} files have an alignment of their own: leave it out")
    if container.ties == "named":
        conversion = _without(conversion, tied)
    shard = parse_size(max_shard_size)
    limit = None if single_file or target.file else shard
    metadata = {"format": "pt", **sampling(conversion.outputs.values())}
    wanted = Wanted(target, limit, tied, metadata, BLOCK if align else None)
    layouts = lay_out_components(checkpoint, conversion, chosen.target if chosen else None, wanted)
    told = [f"{name} is {kept}, stored once (--set tied=copy: twice)" for name, kept in list(tied.items())[:5]]
    sidecars, notes = ({}, []) if target.file else make_sidecars(checkpoint, beside, chosen, conversion, dtype, numbers)
    made = compile_plan(
        conversion.outputs,
        layouts,
        root=str(target.root),
        single=target.file,
        format=target.format,
        budget=Budget(parse_size(max_memory), check_workers(workers, remote=is_url(src)), lambda: _taken(floor) + joined),
        sidecars=sidecars,
        mapping=(Row(*row) for row in conversion.rows),
        dropped=conversion.dropped,
        notes=[
            *checkpoint.contents.notes,
            *left,
            *told,
            *conversion.notes,
            *notes,
            *_lost_metadata(checkpoint, target.format),
            *_left_whole(checkpoint, layouts, limit),
            *_may_share(checkpoint, target, layouts),
        ],
        replicas=conversion.replicas,
        read_backend=read_backend,
        reasons=conversion.reasons,
        tied=len(conversion.tied) + len(tied),
    )
    check_sources_stay(made, _read_beside(checkpoint, beside, made), overwrite=overwrite)
    if isinstance(target, RemoteTarget):
        if reclaim_source:
            raise UsageError(f"--reclaim-source: {target.path} is no path of this machine: leave it out")
        return replace(made, totals=replace(made.totals, disk_needed=staged_bytes(made)))
    check_folders(made, target.root)
    check_names(made, target.root)
    return with_reclaim(made) if reclaim_source else made


def _read_beside(checkpoint: Checkpoint, beside: Folder | None, made: Plan) -> list[Path]:
    """Files of this machine that planning has read, or may have: those of the source, and in its folder what is called as outputs are."""
    folders = [checkpoint.folder if checkpoint.location.is_folder else None, beside]
    paths = [folder.local for folder in folders if folder is not None and folder.local is not None]
    return [*_local_files(checkpoint), *(path / file.path for path in paths for file in made.files)]


def _lost_metadata(checkpoint: Checkpoint, format: str) -> Iterator[str]:  # noqa: A002 - the word of the command line
    """Names the source's metadata where the new container has no place for it."""
    lost = [key for key in checkpoint.metadata if key != "format" and key not in checkpoint.ties]
    if lost and "metadata" not in containers()[format].takes:
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        yield f"left out: metadata of the source, which {format} files have no place for: {', '.join(lost[:SHOWN])}{more}"


def _left_whole(checkpoint: Checkpoint, layouts: Iterable[FileLayout], limit: int | None) -> Iterator[str]:
    """Names files that are larger than shards were to be, since their library reads no shards."""
    for layout in layouts:
        folder, stem = checkpoint.component_of(layout.path)[0], PurePath(layout.path).stem.partition(".")[0]
        if limit is not None and layout.size > limit and not reads_shards(checkpoint, folder, stem):
            yield f"{layout.path}: one file, though larger than {format_size(limit)}: the library that looks for it reads no shards"


def _beside(path: AnyPath | None) -> Folder | None:
    """What ``--sidecars-from`` names.

    Raises:
        UsageError: it is no folder.
    """
    if path is None:
        return None
    location = locate(path)
    if not location.is_folder:
        raise UsageError(f"--sidecars-from {location}: not a directory")
    return location.folder


def _may_share(checkpoint: Checkpoint, target: Target | RemoteTarget, layouts: Sequence[FileLayout]) -> Iterator[str]:
    """Suggests ``--align`` where DST could share the source's blocks and only the headers' lengths keep it from that."""
    path = checkpoint.location.local
    if path is None or isinstance(target, RemoteTarget):
        return
    above = next(parent for parent in (target.root, *target.root.parents) if parent.exists())
    if "align" not in containers()[target.format].takes or above.stat().st_dev != path.stat().st_dev or not shares_extents(above):
        return
    starts = [next(extents(node)).offset for node in checkpoint.contents.entries.values() if node.spec.nbytes >= LEAST]
    aligned = all(min(layout.slots.values(), default=0) % BLOCK == 0 for layout in layouts)
    if starts and not aligned and sum(start % BLOCK == 0 for start in starts) > len(starts) // 2:
        yield "the file system can share blocks between SRC and DST: with --align it need not copy them"


def _taken(floor: int) -> int:
    """What the process takes: its high-water mark if planning set a new one, else what is resident now."""
    peak = memory.peak()
    return peak if peak > floor else memory.resident()


def _convert_names(
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    options: Mapping[str, object],
    casting: Casting,
    beside: Folder | None,
    numbers: Dequantization | None,
) -> Conversion:
    if recipe is None:
        made = resize_vocab(identity(_with_ties(checkpoint), casting), read_identity_options(options))
    else:
        sidecar = read_config(beside, recipe.target.config) if beside else {}
        made = recipe.apply(checkpoint.components[""].entries, checkpoint.config, options, sidecar=sidecar, recast=casting)
        rest = identity(_with_ties(checkpoint.others), casting)
        made = replace(made, outputs={**made.outputs, **rest.outputs}, rows=[*made.rows, *rest.rows])
    casting.check_patterns(made.outputs)
    notes = list(_check_quantized(checkpoint, made, casting, told=recipe is None and numbers is None))
    made = replace(made, notes=[*made.notes, *notes])
    return numbers.account(made) if numbers else made


def _check_quantized(checkpoint: Checkpoint, made: Conversion, casting: Casting, *, told: bool) -> Iterator[str]:
    """`Casting.check_quantized` of each component; ``told``: configs say what is quantized, else what a recipe makes of it does."""
    for folder in checkpoint.components:
        where = checkpoint.folder.folder(folder)
        names = {name: checkpoint.component_of(name) for name in made.outputs}
        specs = {bare: made.outputs[name].spec for name, (found, bare) in names.items() if found == folder}
        config = checkpoint.config_of(folder) if told else {}
        note = casting.check_quantized(specs, config, lambda: {name: read_config(where, name) for name in FILES} if told else {})  # noqa: B023
        if note:
            yield f"{folder}: {note}" if folder else note


def _own_component(checkpoint: Checkpoint, target: Target | RemoteTarget) -> tuple[Checkpoint, list[str]]:
    """The checkpoint for a recipe, or for a DST that is one file, and a note about components that have no place in it.

    Raises:
        UsageError: it consists of other components only.
    """
    others = ", ".join(filter(None, checkpoint.components))
    if "" not in checkpoint.components:
        what = f"DST {target.path} is one file" if target.file else "a recipe converts one model"
        raise UsageError(f"{checkpoint.path}: consists of {others}, and {what}: give one of them as SRC")
    if not (target.file and others):
        return checkpoint, []
    return checkpoint.select([""]), [f"{others}: left behind, as DST is one file; a directory holds them too"]


def _with_ties(checkpoint: Checkpoint) -> dict[str, AnyNode]:
    """All tensors, those that are left out because they are another too."""
    entries = checkpoint.contents.entries
    return entries | {name: entries[kept] for name, kept in checkpoint.ties.items() if name not in entries}


def _ties(checkpoint: Checkpoint, conversion: Conversion) -> dict[str, str]:
    """The ties of the source that hold among the targets, which may have been cast apart, or be a recipe's."""
    outputs = conversion.outputs
    found = {name: kept for name, kept in checkpoint.find_ties(choose_kept).items() if name in outputs and kept in outputs}
    return {name: kept for name, kept in found.items() if outputs[name].spec == outputs[kept].spec}


def _without(conversion: Conversion, tied: Mapping[str, str]) -> Conversion:
    """The conversion with tied tensors under one name only, which is then made of both."""
    others: dict[str, list[str]] = {}
    for name, kept in tied.items():
        others.setdefault(kept, []).append(name)
    outputs = {name: node for name, node in conversion.outputs.items() if name not in tied}
    rows = [row._replace(sources=(*row.sources, *others.get(row.target, ()))) for row in conversion.rows if row.target in outputs]
    return replace(conversion, outputs=outputs, rows=rows)


def convert(
    src: AnyPath,
    dst: str | os.PathLike[str],
    *,
    recipe: str | Recipe | None = None,
    options: Mapping[str, object] | None = None,
    format: str | None = None,  # noqa: A002 - the word of the command line
    dtype: AnyDType | None = None,
    keep_dtype: Iterable[str] = (),
    dequantize: bool = False,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    single_file: bool = False,
    max_memory: str | int = MAX_MEMORY,
    workers: int | None = None,
    read_backend: str = "auto",
    variant: str | None = None,
    sidecars_from: AnyPath | None = None,
    overwrite: bool = False,
    resume: bool = False,
    align: bool = False,
    create_pr: bool = False,
    engine: str = LOCAL,
    ray_address: str | None = None,
    verify: bool = False,
    checksum: bool = False,
    reclaim_source: bool = False,
    compare_with: AnyPath | None = None,
    report: str | os.PathLike[str] | None = None,
    progress: Shown = False,
) -> Result:
    """Plans and runs a conversion.

    Args:
        src: a directory or file; a path, or a URL of a web server, an object store or the Hub, whose bytes are read by ranges.
        dst: a file if its name ends in the container's suffix, else a directory; a path, or the URL of an object store or of the Hub.
        recipe: a name, the path of a recipe file, or a `Recipe`; None: the tensors stay as they are called and laid out.
        options: the recipe's options; without one ``tied``, ``root``, ``resize_vocab`` and ``seed``.
        format: the container of ``dst``; by its suffix, else the recipe's, else safetensors.
        dtype: what floating tensors are cast to: a name such as ``bf16``, or a dtype of torch or numpy.
        keep_dtype: names (patterns, or globs) of tensors that ``dtype`` leaves alone.
        dequantize: quantized weights become numbers, of ``dtype`` or the one that config.json gives; a recipe sees those.
        max_shard_size: bytes of tensors in a file, or ``5GB``, ``5GiB``.
        single_file: one file, whatever its size.
        max_memory: bytes that the process may take in all, or ``1GB``.
        workers: threads, at most.
        read_backend: how sources are read: ``auto``, ``pread`` or ``mmap``.
        variant: which variant of the weights (``model.VARIANT.safetensors``) is read, and written under the same name.
        sidecars_from: a folder from which the config and the tokenizer's files come instead.
        overwrite: remove weight and index files in ``dst`` first, nothing else.
        resume: go on with an interrupted run.
        align: start data at whole blocks, which file systems can share.
        create_pr: make what is uploaded to the Hub a pull request.
        engine: ``local``, or ``ray``.
        ray_address: see `run`.
        verify: read everything back and compare it after writing.
        checksum: see `run`.
        reclaim_source: see `run`; what is interrupted must be gone on with ``resume``.
        compare_with: a reference checkpoint to compare the result with; differences do not fail.
        report: where the caller will write a page about it: refused where that is a file that the conversion reads or makes.
        progress: see `run`.

    Raises:
        StreamconvError: see the classes.

    >>> result = streamconv.convert("model", "half", dtype=torch.float16, max_memory="4GB", verify=True)
    >>> result.verified, result.plan.totals.bytes_computed
    (True, 20)
    >>> streamconv.verify("model", "half", dtype="fp16", max_memory="4GB")
    <Comparison of 3 tensors: equal>
    """
    settings: dict[str, Any] = {
        "recipe": recipe,
        "options": options,
        "format": format,
        "dtype": None if dtype is None else dtype_name(dtype),
        "keep_dtype": tuple(keep_dtype),
        "dequantize": dequantize,
        "max_shard_size": max_shard_size,
        "single_file": single_file,
        "max_memory": max_memory,
        "workers": workers,
        "read_backend": read_backend,
        "variant": variant,
        "sidecars_from": sidecars_from,
        "overwrite": overwrite,
        "resume": resume,
        "align": align,
        "create_pr": create_pr,
        "engine": engine,
    }
    reference = open_other(compare_with, Side(), variant) if compare_with is not None else None
    if reference is not None:
        import ml_dtypes  # noqa: F401 - loaded first, with numpy, so that the plan counts what measuring differences takes
    target = target_of(dst, format, create_pr=create_pr)
    described = _describe(src, settings)
    with _noted(target, described, overwrite=overwrite and not resume):
        made = _find_begun(src, target, reclaim_source=reclaim_source) if resume else None
        if made is None:
            try:
                made = plan(src, dst, reclaim_source=reclaim_source, **settings)
            except (FormatError, UsageError) as error:
                if not (reclaim_source and resume) or (finished := _find_finished(target, error)) is None:
                    raise
                return Result(finished, 0.0, memory.peak(), memory.anonymous())
        compared = _local_files(reference) if reference else []
        if reclaim_source and not {identify(path) for path in compared}.isdisjoint(identify(Path(path)) for path in Reclaim(made).files):
            raise UsageError(f"--compare {compare_with}: will be gone with --reclaim-source: give another reference")
        check_sources_stay(made, compared, overwrite=overwrite)
        if report is not None:
            check_report("--report", Path(report), made, compared)
        if reference is not None:
            made = _with_comparison(made, parse_size(max_memory))
        result = run(
            made,
            overwrite=overwrite,
            resume=resume,
            verify=verify,
            checksum=checksum,
            reclaim_source=reclaim_source,
            progress=progress,
            settings=described,
            create_pr=create_pr,
            engine=engine,
            ray_address=ray_address,
        )
    if reference is None:
        return result
    with writing():
        done = open_other(result.place or made.destination, Side(), variant)
        comparison = compare(
            dict(_with_ties(done)),
            _with_ties(reference),
            workers=made.workers,
            max_memory=parse_size(max_memory) if isinstance(target, RemoteTarget) else made.peak_memory,
            read_backend=made.read_backend,
        )
    return replace(result, comparison=comparison, peak_rss=memory.peak())


@contextmanager
def _noted(target: Target | RemoteTarget, settings: Mapping[str, Any], *, overwrite: bool) -> Iterator[None]:
    """Has an overwrite that is killed before it is begun be gone on with by resuming; one that is refused leaves nothing."""
    if not overwrite or isinstance(target, RemoteTarget):
        yield
        return
    note_overwrite(target.output, settings)
    try:
        yield
    except StreamconvError as error:
        if error.exit_code == UsageError.exit_code:
            forget_overwrite(target.output)
        raise
    forget_overwrite(target.output)


def _local_files(checkpoint: Checkpoint) -> list[Path]:
    """The files of a checkpoint that are on this machine."""
    contents = checkpoint.contents
    paths = (file.local for file in (*contents.files, *contents.others))
    return [path for path in paths if path is not None]


def _name_of(src: AnyPath) -> str:
    return shown(str(src)) if is_url(src) else os.path.abspath(str(src))  # noqa: PTH100 - links stay


def _describe(src: AnyPath, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which conversion it is, in JSON's terms."""
    names = (
        "recipe",
        "options",
        "format",
        "dtype",
        "keep_dtype",
        "dequantize",
        "max_shard_size",
        "single_file",
        "sidecars_from",
        "align",
        "variant",
    )
    found = {name: settings[name] for name in names if settings.get(name)}
    shard = parse_size(found.get("max_shard_size", MAX_SHARD_SIZE))
    recipe = getattr(found.get("recipe"), "name", found.get("recipe"))
    found = dict.fromkeys(names) | found | {"src": _name_of(src), "recipe": recipe, "max_shard_size": shard}
    described: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return described


def _find_begun(src: AnyPath, target: Target | RemoteTarget, *, reclaim_source: bool) -> Plan | None:
    """The plan of an interrupted run that gives its source back, which cannot be planned again.

    Raises:
        DestinationError: such a run was interrupted, and this is none, or one of another source.
    """
    if isinstance(target, RemoteTarget):
        return None
    text = target.output.load(LOG)
    if text is None or not read_head(text).get("reclaim"):
        return None
    if not reclaim_source:
        raise DestinationError(f"{target.path}: the interrupted run was begun with --reclaim-source: add it, to go on")
    made, _ = begun_plan(target.output, str(target.root))
    above = Path(os.path.abspath(str(src)))  # noqa: PTH100 - links are looked for later
    if foreign := [file for file in Reclaim(made).files if not Path(file).is_relative_to(above if above.is_dir() else above.parent)]:
        raise DestinationError(
            f"{target.path}: the interrupted run was another one (src was not {src}, it had {foreign[0]}): give the SRC of that run"
        )
    return made


def _find_finished(target: Target | RemoteTarget, error: StreamconvError) -> Plan | None:
    """What is in DST, where the source cannot be opened because a run that is complete has given it back."""
    if isinstance(target, RemoteTarget) or target.output.is_begun():
        return None
    try:
        found = open_checkpoint(target.path)
    except StreamconvError:
        return None
    own = (*found.contents.files, *found.contents.others)
    files = tuple(FilePlan(file.below(found.folder), file.size, (), ()) for file in own)
    return Plan(
        root=str(target.root),
        single=target.file,
        format=found.contents.format,
        sources=(),
        nodes=(),
        files=files,
        checks=(),
        mapping=tuple(Row(name, (name,), "", entry.spec) for name, entry in found.contents.entries.items()),
        dropped=(),
        notes=(f"nothing left to do: {target.path} is complete, and the source is not there any more ({error})",),
        totals=Totals(0, 0, 0, 0, 0),
        workers=1,
        arena=0,
        read_backend="auto",
        peak_memory=memory.peak(),
    )


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


def _take_root(chosen: Recipe | None, options: Mapping[str, object] | None) -> tuple[str | None, dict[str, object]]:
    """Where the tensors are in a file that torch.save wrote, which can be said with any recipe, and the other options."""
    others = dict(options or {})
    root = None if chosen is not None and "root" in chosen.options else others.pop("root", None)
    return None if root is None else str(root), others


def _open_both(a: AnyPath, b: AnyPath, chosen: Recipe | None, root: str | None, variant: str | None) -> tuple[Checkpoint, Checkpoint]:
    """Two checkpoints to compare; the root is that of the first, and of the second if it has one or the first cannot have any."""
    sides = (chosen.source, chosen.target) if chosen else (Side(), Side())
    nests = [containers()[detect_format(find_checkpoint(path)[0])].nests for path in (a, b)] if root is not None else []
    if nests == [False, True]:
        return open_side(a, sides[0], None, variant), open_other(b, sides[1], variant, root)
    left = open_side(a, sides[0], root, variant)
    if nests == [True, True]:
        with suppress(UsageError):
            return left, open_other(b, sides[1], variant, root)
    return left, open_other(b, sides[1], variant)


def verify(
    a: AnyPath,
    b: AnyPath,
    *,
    recipe: str | Recipe | None = None,
    options: Mapping[str, object] | None = None,
    dtype: AnyDType | None = None,
    keep_dtype: Iterable[str] = (),
    dequantize: bool = False,
    max_memory: str | int = MAX_MEMORY,
    workers: int | None = None,
    read_backend: str = "auto",
    variant: str | None = None,
    sidecars_from: AnyPath | None = None,
    progress: Shown = False,
) -> Comparison:
    """Compares two checkpoints tensor by tensor; with a recipe, what it makes of ``a`` with ``b``.

    Names, dtypes, shapes and bytes must be the same; how tensors lie in files, and their containers, may differ. Without a recipe
    nothing is written; see `convert` for the arguments.

    Raises:
        StreamconvError: one cannot be read, or the recipe does not fit.

    >>> streamconv.verify("model", "model", max_memory="4GB").equal
    True
    """
    dtype = None if dtype is None else dtype_name(dtype)
    if read_backend not in BACKENDS:
        raise UsageError(f"unknown read backend {read_backend!r}: known are {', '.join(BACKENDS)}")
    chosen = recipes.get(recipe) if isinstance(recipe, str) else recipe
    root, options = _take_root(chosen, options)
    with memory.bounded(parse_size(max_memory)):
        left, right = _open_both(a, b, chosen, root, variant)
    beside = _beside(sidecars_from)
    casting = Casting(dtype, keep_dtype)
    numbers = dequantize_all(left, casting, renames=chosen is not None) if dequantize else None
    made = _convert_names(numbers.checkpoint if numbers else left, chosen, options, casting, beside, numbers)
    found = right.contents.entries if chosen else _with_ties(right)
    total = sum(entry.spec.nbytes for entry in found.values())
    with bar(total, "comparing", show=progress) as tell:
        return compare(
            made.outputs,
            found,
            workers=check_workers(workers, remote=is_url(a) or is_url(b)),
            max_memory=parse_size(max_memory),
            read_backend=read_backend,
            progress=tell,
        )
