"""From options to a plan, one step after the other: open, apply the recipe, lay out, compile, look at what may be in the way."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from streamconv import memory
from streamconv.checkpoint.opening import Checkpoint, read_config
from streamconv.conversion.adapters import adapt, note_uncounted
from streamconv.conversion.altered import Altered, account_for
from streamconv.conversion.casting import Casting
from streamconv.conversion.dequantizing import dequantize_as_asked
from streamconv.conversion.grafts import graft
from streamconv.conversion.merges import merge_as_asked
from streamconv.conversion.notes import note_layouts, note_ties
from streamconv.conversion.opening import (
    check_backend,
    check_reclaim,
    check_strict,
    find_own_beside,
    find_recipe,
    local_files,
    open_source,
    split_settings,
)
from streamconv.conversion.options import Options, PlanOptions
from streamconv.conversion.quantizing import quantize_as_asked
from streamconv.conversion.renaming import names_change, rename
from streamconv.conversion.sidecars import make_sidecars
from streamconv.conversion.sides import Reading, TargetSettings, lay_out_components
from streamconv.conversion.targets import convert_tensors, find_ties, store_once
from streamconv.errors import DestinationError, UsageError
from streamconv.formats.registry import DEFAULT, containers
from streamconv.memory import BLOCK
from streamconv.planning.compiler import compile_plan
from streamconv.planning.fitting import Budget, check_workers
from streamconv.planning.plan import Plan
from streamconv.recipe import Recipe, read_identity_options
from streamconv.recipe.vocabulary import sampling
from streamconv.running.destination import RemoteTarget, Target, target_of
from streamconv.running.directory import check_folders, check_names
from streamconv.running.executors import executor_of
from streamconv.running.kept import check_sources_stay
from streamconv.running.run import with_reclaim
from streamconv.running.streams import staged_bytes
from streamconv.storage import is_url
from streamconv.storage.folder import Folder
from streamconv.storage.held import resident
from streamconv.units import parse_size


def alter_as_asked(options: Options, checkpoint: Checkpoint, casting: Casting, *, is_renamed: bool) -> tuple[Checkpoint, list[Altered]]:
    """A checkpoint with adapters merged, then fewer and renamed tensors, then those of a graft, as is asked for; and what each has done."""
    altered = []
    for alter in (partial(adapt, casting=casting, is_renamed=is_renamed), rename, graft):
        one = alter(options, checkpoint)
        if one is not None:
            checkpoint = one.checkpoint
            altered.append(one)
    return checkpoint, altered


@memory.collecting_rarely()
def make_plan(options: PlanOptions) -> Plan:
    """What `convert` would do with these options.

    Raises:
        StreamconvError: anything that can be refused before the first byte.
    """
    floor = memory.peak()
    executor = executor_of(options.engine)
    executor_bytes = executor.load(str(options.dst))
    workers = check_workers(executor.threads if options.workers is None else options.workers, remote=is_url(options.src))
    limit = parse_size(options.max_memory) + resident(str(options.src))
    budget = Budget(limit, workers, lambda: _bytes_taken(floor) + executor_bytes)
    shard_bytes = parse_size(options.max_shard_size)
    casting = Casting(options.dtype, options.keep_dtype)
    check_backend(options)
    check_strict(options)
    recipe = find_recipe(options)
    target = target_of(options.dst, options.format, recipe.target.format if recipe else DEFAULT, create_pr=options.create_pr)
    reading, settings = split_settings(options, recipe)
    keeps_ties = recipe is not None or read_identity_options(settings)["tied"] == "keep"
    checkpoint, left_behind, merger = _open(options, recipe, reading, target)
    replicas = [(one, other, (name, name)) for one, other, name in checkpoint.contents.replicas if options.check_replicas]
    beside = find_own_beside(options, checkpoint)
    kept = casting.ask_class(read_config(beside) if beside else checkpoint.config)

    is_renamed = recipe is not None or names_change(options)
    dequantization = dequantize_as_asked(options, checkpoint, casting, renames=is_renamed)
    if dequantization is not None:
        checkpoint = dequantization.checkpoint
    checkpoint, altered = alter_as_asked(options, checkpoint, casting, is_renamed=is_renamed)
    altered = [*merger, *altered]
    conversion = convert_tensors(checkpoint, recipe, settings, casting, beside, is_stated=dequantization is None and not is_renamed)
    conversion = account_for(altered, conversion)
    if dequantization is not None:
        conversion = dequantization.account(conversion)
    conversion, quantization = quantize_as_asked(options, conversion, checkpoint, target.format)
    quantizations = dequantization, quantization
    container = containers()[target.format]
    ties = find_ties(checkpoint.others if is_renamed else checkpoint, conversion) if container.ties != "copied" and keeps_ties else {}
    if options.align and "align" not in container.takes:
        raise UsageError(f"--align: {target.format} files have an alignment of their own: leave it out")
    if container.ties == "named":
        conversion = store_once(conversion, ties)

    shard_limit = None if options.single_file or target.file else shard_bytes
    metadata = {"format": "pt", **sampling(conversion.outputs.values())}
    target_settings = TargetSettings(target, shard_limit, ties, metadata, BLOCK if options.align else None)
    layouts = lay_out_components(checkpoint, conversion, recipe.target if recipe else None, target_settings)
    dtype = casting.dtype or next((one.dtype for one in merger), None)
    sidecars, sidecar_notes = (
        ({}, [])
        if target.file
        else make_sidecars(checkpoint, beside, recipe, conversion, dtype, quantizations, is_elsewhere=options.sidecars_from is not None)
    )
    notes = [*checkpoint.contents.notes, *left_behind, *filter(None, [kept]), *note_ties(ties), *conversion.notes, *sidecar_notes]
    notes += note_uncounted(options)
    notes += note_layouts(checkpoint, target, layouts, shard_limit)
    plan = compile_plan(
        conversion.outputs,
        layouts,
        root=str(target.root),
        single=target.file,
        format=target.format,
        budget=budget,
        sidecars=sidecars,
        mapping=conversion.rows,
        dropped=conversion.dropped,
        notes=notes,
        replicas=[*conversion.replicas, *replicas],
        read_backend=options.read_backend,
        reasons=conversion.reasons,
        tied=len(conversion.tied) + len(ties),
        measures=options.losses,
        strict=options.strict_values,
    )
    check_sources_stay(plan, _read_files(checkpoint, beside, plan), overwrite=options.overwrite)
    return _check_room(plan, target, options)


def _open(
    options: PlanOptions, recipe: Recipe | None, reading: Reading, target: Target | RemoteTarget
) -> tuple[Checkpoint, list[str], list[Altered]]:
    """The checkpoint at SRC, notes on what of it has no place in DST, and how it was merged, where a file there says of what.

    Raises:
        StreamconvError: it cannot be read, or DST cannot be made of it.
    """
    merger = merge_as_asked(options.src, options)
    checkpoint, left_behind = (merger.checkpoint, []) if merger else open_source(options, recipe, reading, target)
    check_reclaim(options, checkpoint, is_merged=merger is not None)
    for source in [*(merger.others if merger else ()), checkpoint]:
        _check_target(target, source, options)
    return checkpoint, left_behind, [merger] if merger else []


def _check_target(target: Target | RemoteTarget, checkpoint: Checkpoint, options: PlanOptions) -> None:
    try:
        target.check(checkpoint, overwrite=options.overwrite, resume=options.resume)
    except OSError as error:
        raise DestinationError(f"{target.path}: cannot be looked at: {error.strerror}; give another DST") from error


def _check_room(plan: Plan, target: Target | RemoteTarget, options: PlanOptions) -> Plan:
    """The plan with the room that it takes at DST. Raises StreamconvError: its files cannot be made there."""
    if isinstance(target, RemoteTarget):
        if options.reclaim_source:
            raise UsageError(f"--reclaim-source: {target.path} is no path of this machine: leave it out")
        return replace(plan, totals=replace(plan.totals, disk_needed=staged_bytes(plan)))
    check_folders(plan, target.root)
    check_names(plan, target.root)
    return with_reclaim(plan) if options.reclaim_source else plan


def _read_files(checkpoint: Checkpoint, beside: Folder | None, plan: Plan) -> list[Path]:
    """Files of this machine that planning has read, or may have: those of the source, and in its folder what is called as outputs are."""
    folders = [checkpoint.folder if checkpoint.location.is_folder else None, beside]
    paths = [folder.local for folder in folders if folder is not None and folder.local is not None]
    return [*local_files(checkpoint), *(path / file.path for path in paths for file in plan.files)]


def _bytes_taken(floor: int) -> int:
    """What the process takes: its high-water mark if planning set a new one, else what is resident now."""
    peak = memory.peak()
    return peak if peak > floor else memory.resident()
