"""The calls: `plan`, `convert` and `verify`. Their arguments are the fields of their options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from streamconv import memory
from streamconv.conversion.comparing import open_sides
from streamconv.conversion.merges import is_merge_file
from streamconv.conversion.opening import local_files
from streamconv.conversion.options import ConvertOptions, PlanOptions, VerifyOptions, arguments_of
from streamconv.conversion.pipeline import make_plan
from streamconv.conversion.recovery import find_begun, find_finished, overwrite_noted
from streamconv.conversion.sides import open_other
from streamconv.conversion.targets import all_tensors
from streamconv.engine.comparison import Comparison, compare
from streamconv.errors import BudgetError, FormatError, UsageError, writing
from streamconv.planning.fitting import check_workers
from streamconv.planning.plan import Plan
from streamconv.recipe import Side
from streamconv.running.ahead import showing_stage
from streamconv.running.destination import RemoteTarget, Target, target_of
from streamconv.running.kept import check_report, check_sources_stay
from streamconv.running.output import check_earlier, tidy
from streamconv.running.progress import bar
from streamconv.running.reclaim import Reclaim
from streamconv.running.results import Result
from streamconv.running.run import run
from streamconv.storage import is_url
from streamconv.storage.held import Address, keep, resident
from streamconv.storage.places import identify
from streamconv.units import format_size, parse_size

COMPARING = 24 << 20  # bytes that --compare takes beside its libraries


@arguments_of(PlanOptions)
def plan(options: PlanOptions) -> Plan:
    """Everything but the run: what `convert` would do. Writes nothing.

    A recipe may be a `Recipe`, a dtype torch's or numpy's, a size a number of bytes.

    Raises:
        StreamconvError: anything that can be refused before the first byte.

    >>> plan = streamconv.plan("model", "half", dtype="bf16", max_memory="4GB")
    >>> [(row.target, str(row.spec)) for row in plan.mapping]
    [('layers.0.b', 'bfloat16[2]'), ('layers.1.b', 'bfloat16[2]'), ('w', 'bfloat16[2, 3]')]
    >>> [(file.path, file.size) for file in plan.files], plan.totals.bytes_computed
    ([('model.safetensors', 244)], 20)
    """
    made = make_plan(options)
    if isinstance(options.src, Address):
        keep(options.src, made)
    return made


@arguments_of(ConvertOptions)
def convert(options: ConvertOptions) -> Result:
    """Plans and runs a conversion.

    A recipe may be a `Recipe`, a dtype torch's or numpy's, a size a number of bytes. With ``compare_with`` differences do not fail; what
    is interrupted with ``reclaim_source`` must be gone on with ``resume``.

    Raises:
        StreamconvError: see the classes.

    >>> result = streamconv.convert("model", "half", dtype=torch.float16, max_memory="4GB", verify=True)
    >>> result.verified, result.plan.totals.bytes_computed
    (True, 20)
    >>> streamconv.verify("model", "half", dtype="fp16", max_memory="4GB")
    <Comparison of 3 tensors: equal>
    """
    return _convert(options)


@arguments_of(ConvertOptions)
def merge(options: ConvertOptions) -> Result:
    """Merges models into one, as a file of mergekit says: `convert` with that as ``src``.

    Paths of models in it are as given from the current folder, or anything else that ``src`` of `convert` may be; MODEL+ADAPTER is a model
    with an adapter of PEFT.

    Raises:
        StreamconvError: see the classes.

    >>> text = "models: [{model: model, parameters: {weight: 1}}, {model: model, parameters: {weight: 3}}]"
    >>> _ = Path("average.yaml").write_text(text + "\nmerge_method: linear\n")
    >>> streamconv.merge("average.yaml", "average", max_memory="4GB").plan.totals.bytes_computed
    40
    """
    if not is_merge_file(options.src):
        raise UsageError(f"{options.src}: what merge takes is a file of mergekit, called *.yaml or *.yml")
    return _convert(options)


def _convert(options: ConvertOptions) -> Result:
    """See `convert`."""
    reference = open_other(options.compare_with, Side(), options.variant) if options.compare_with is not None else None
    if reference is not None:
        import ml_dtypes  # noqa: F401 - loaded first, with numpy, so that the plan counts what measuring differences takes
    target = target_of(options.dst, options.format, create_pr=options.create_pr)
    settings = options.identity()
    if isinstance(target, Target):  # before the source is looked at, which such a run may have given back
        check_earlier(target.output, overwrite=options.overwrite)
    with overwrite_noted(target, settings, overwrite=options.overwrite and not options.resume):
        plan = find_begun(options.src, target, reclaim_source=options.reclaim_source) if options.resume else None
        if plan is None:
            try:
                with showing_stage(options.progress):
                    plan = make_plan(options)
            except (FormatError, UsageError) as error:
                finished = find_finished(target, error) if options.reclaim_source and options.resume else None
                if finished is None:
                    raise
                with writing():
                    tidy(target.output, target.file)
                return Result(finished, 0.0, memory.peak(), memory.anonymous())
        compared = local_files(reference) if reference else []
        if options.reclaim_source:
            reclaimed = {identify(Path(path)) for path in Reclaim(plan).files}
            if not reclaimed.isdisjoint(identify(path) for path in compared):
                raise UsageError(f"--compare {options.compare_with}: will be gone with --reclaim-source: give another reference")
        check_sources_stay(plan, compared, overwrite=options.overwrite)
        if options.report is not None:
            check_report("--report", Path(options.report), plan, compared)
        if reference is not None:
            plan = _with_comparison(plan, parse_size(options.max_memory))
        result = run(
            plan,
            reclaim_source=options.reclaim_source,
            progress=options.progress,
            settings=settings,
            **options.select("run"),
        )
    if reference is None:
        return result
    with writing():
        done = open_other(result.place or plan.destination, Side(), options.variant)
        comparison = compare(
            dict(all_tensors(done)),
            all_tensors(reference),
            workers=plan.workers,
            max_memory=parse_size(options.max_memory) if isinstance(target, RemoteTarget) else plan.peak_memory,
            read_backend=plan.read_backend,
        )
    return replace(result, comparison=comparison, peak_rss=memory.peak())


@arguments_of(VerifyOptions)
def verify(options: VerifyOptions) -> Comparison:
    """Compares two checkpoints tensor by tensor; with a recipe, what it makes of ``a`` with ``b``.

    Names, dtypes, shapes and bytes must be the same; how tensors lie in files, and their containers, may differ. A recipe may be a
    `Recipe`, a dtype torch's or numpy's, a size a number of bytes.

    Raises:
        StreamconvError: one cannot be read, or the recipe does not fit.

    >>> streamconv.verify("model", "model", max_memory="4GB").equal
    True
    """
    with showing_stage(options.progress):
        sides = open_sides(options)
    total = sum(entry.spec.nbytes for entry in sides.actual.values())
    with bar(total, "comparing", show=options.progress) as tell:
        comparison = compare(
            sides.expected,
            sides.actual,
            workers=check_workers(options.workers, remote=is_url(options.a) or is_url(options.b)),
            max_memory=parse_size(options.max_memory) + resident(str(options.a)) + resident(str(options.b)),
            read_backend=options.read_backend,
            progress=tell,
        )
    return replace(comparison, notes=list(sides.notes))


def _with_comparison(plan: Plan, limit: int) -> Plan:
    """The plan with a peak that leaves room for a comparison afterwards.

    Raises:
        BudgetError: there is none.
    """
    peak = max(plan.peak_memory, memory.resident() + COMPARING)
    if peak > limit:
        needed = -(-peak // 10**6)
        raise BudgetError(f"--max-memory {format_size(limit)} is too small for --compare: use --max-memory {needed}MB", needed * 10**6)
    return replace(plan, peak_memory=peak)
