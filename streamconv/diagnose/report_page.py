"""The page of ``--report``: one HTML file about a run, with all it needs in it."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil

from streamconv import memory
from streamconv._version import __version__
from streamconv.changes.diff import STATES, Diff, describe_distance
from streamconv.checkpoint.opening import open_checkpoint
from streamconv.conversion.options import ConvertOptions, DiffOptions, Options, VerifyOptions, about_of, flags_of
from streamconv.diagnose.report import LAYER, module_of
from streamconv.dtypes import TensorSpec
from streamconv.engine.comparison import Comparison, TensorDifference
from streamconv.errors import Interrupted, RunError
from streamconv.notation.folding import fold, fold_names, kind_of
from streamconv.planning.plan import Compute, Copy, FilePlan, Plan
from streamconv.recipe import Side
from streamconv.recipes import get
from streamconv.running.changed import ChangedWeights
from streamconv.running.progress import Progress
from streamconv.running.results import Changes, Result
from streamconv.storage.folder import AnyPath
from streamconv.text import one_line, without_secrets
from streamconv.units import format_size

TEMPLATE = Path(__file__).with_name("report_page.html")
DIFFERING = 300  # rows of tensors that differ; of more, those with the largest differences
KINDS = 24  # of tensors whose losses are drawn
GROUPS, DRAWN = 3, 6  # groups that are drawn, and sources of one
PARTS = 200  # pieces of a file in the map


def write(path: str, page: Mapping[str, Any]) -> None:
    """Writes a page; the home directory stands as ``~`` in it.

    Raises:
        RunError: it cannot be written.
    """
    home = json.dumps(str(Path.home()))[1:-1]
    data = json.dumps(_printable(page), allow_nan=False).replace("<", "\\u003c").replace("\x7f", "\\u007f")
    if len(home) > 1:
        data = data.replace(f"{home}/", "~/").replace(f'{home}"', '~"')
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", data), encoding="utf-8")
    except OSError as error:
        raise RunError(f"--report {path}: cannot be written: {error.strerror}; all else is done") from error


def _printable(value: Any) -> Any:
    """A page's data with every text in it as one line."""
    if isinstance(value, str):
        return one_line(without_secrets(value))
    if isinstance(value, Mapping):
        return {key: _printable(inner) for key, inner in value.items()}
    return [_printable(inner) for inner in value] if isinstance(value, list | tuple) else value


def describe_conversion(result: Result, options: ConvertOptions, progress: Progress) -> dict[str, Any]:
    """The page of a conversion."""
    plan, totals = result.plan, result.plan.totals
    rate = format_size(totals.bytes_written / max(result.seconds, 1e-9))
    comparison = result.comparison
    peak = result.peak_rss
    for phase in progress.phases:
        peak = max([peak, *(resident for _, _, resident in phase.samples)])
    state, verdict = "good", "converted and verified" if result.verified else "converted"
    if comparison is not None:
        state = "good" if comparison.equal else "bad"
        verdict += f", {'equal to' if comparison.equal else 'different from'} {options.compare_with}"
    figures = [
        ("written", format_size(totals.bytes_written), f"{len(plan.mapping):,} tensors in {len(plan.files):,} files"),
        ("time", _show_seconds(result.seconds), f"{rate}/s"),
        ("peak memory", format_size(peak), f"planned at most {format_size(plan.peak_memory)}"),
        ("copied", format_size(totals.bytes_copied), f"{format_size(totals.bytes_computed)} computed"),
    ]
    if comparison:
        check = _describe_check(comparison)
    elif result.verified:
        check = "Every byte was read back and compared with what the sources make."
    else:
        check = "Nothing was compared: --verify reads everything back, --compare takes a reference."
    specs = {row.target: row.spec for row in plan.mapping}
    return {
        **_describe_run("Conversion", options.src, options.dst, options, progress, plan.workers),
        "state": state,
        "verdict": verdict,
        "figures": figures,
        "times": _describe_times(result, progress),
        "groups": list(_choose_groups(plan)),
        "account": _describe_account(plan),
        "mapping": list(_describe_mapping(plan)),
        "dropped": fold_names(plan.dropped),
        "files": _describe_files(plan),
        "checks": list(_describe_checks(specs, comparison)) if result.verified or comparison else [],
        "checked": check,
        "losses": _describe_losses(result.losses, result.changed),
        "notes": list(result.notes),
    }


def describe_failure(error: Exception, options: ConvertOptions, progress: Progress) -> dict[str, Any]:
    """The page of a conversion that has failed on its way: how far it came, and why it went no further."""
    last = progress.phases[-1]
    seconds, done, _ = last.samples[-1]
    share = 100 * done // max(last.total, 1)
    peak = max(resident for phase in progress.phases for _, _, resident in phase.samples)
    figures = [
        ("came to", f"{share} %", f"of {last.title}: {format_size(done)} of {format_size(last.total)}"),
        ("time", _show_seconds(last.began - progress.phases[0].began + seconds), f"{format_size(done / max(seconds, 1e-9))}/s"),
        ("peak memory", format_size(peak), f"of {format_size(progress.budget or 0)}"),
    ]
    return {
        **_describe_run("Conversion", options.src, options.dst, options, progress, options.workers),
        "state": "bad",
        "verdict": "interrupted" if isinstance(error, Interrupted) else "failed",
        "figures": figures,
        "checks": [],
        "checked": "",
        "failure": str(error),
        "losses": None,
    }


def describe_comparison(comparison: Comparison, options: VerifyOptions, progress: Progress) -> dict[str, Any]:
    """The page of a comparison."""
    recipe = get(options.recipe) if isinstance(options.recipe, str) else options.recipe
    side = recipe.target if recipe else Side()
    checkpoint = open_checkpoint(options.b, ranks=side.ranks, files=side.files, config=side.config)
    unexpected, ties = set(comparison.unexpected), {} if recipe else checkpoint.ties
    specs = {name: checkpoint[ties.get(name, name)].spec for name in {**checkpoint, **ties} if name not in unexpected}
    seconds = sum(phase.samples[-1][0] for phase in progress.phases)
    size = sum(spec.nbytes for spec in specs.values())
    differences = len(comparison.tensors)
    figures = [
        ("compared", f"{comparison.compared:,}", f"tensors, {format_size(size)}"),
        ("different", f"{differences:,}", f"{len(comparison.missing):,} missing, {len(comparison.unexpected):,} unexpected"),
        ("L2 distance", f"{comparison.l2:.4g}", f"{comparison.l2_per_parameter:.3g} per parameter"),
        ("time", _show_seconds(seconds), f"{format_size(size / max(seconds, 1e-9))}/s"),
        ("peak memory", format_size(memory.peak()), f"of {format_size(progress.budget or 0)}"),
    ]
    return {
        **_describe_run("Comparison", options.a, options.b, options, progress, options.workers),
        "state": "good" if comparison.equal else "bad",
        "verdict": "equal" if comparison.equal else "different",
        "figures": figures,
        "checks": list(_describe_checks(specs, comparison)),
        "checked": _describe_check(comparison),
        "notes": comparison.notes,
    }


def describe_diff(changes: Diff, options: DiffOptions, progress: Progress) -> dict[str, Any]:
    """The page of a diff."""
    distance, counts = changes.distance, changes.counts
    seconds = sum(phase.samples[-1][0] for phase in progress.phases)
    relative, same = distance.relative_l2, STATES["unread" if changes.headers else "equal"]
    figures = [
        ("compared", f"{changes.tensors_b:,}", f"tensors with {changes.tensors_a:,}, {counts['equal'] + counts['unread']:,} {same}"),
        ("changed", f"{counts['changed']:,}", f"{counts['rounded']:,} rounded, {counts['moved']:,} moved"),
        ("relative L2", "none" if relative is None else f"{relative:.3g}", f"{100 * distance.share:.3g}% of the numbers in these"),
        ("only in one", f"{counts['only_a'] + counts['only_b']:,}", f"{counts['only_a']:,} in A, {counts['only_b']:,} in B"),
        ("time", _show_seconds(seconds), ""),
        ("peak memory", format_size(memory.peak()), f"of {format_size(progress.budget or 0)}"),
    ]
    kinds = [kind for kind in changes.kinds() if kind.distance.changed]
    lines = [f"{kind.name}: {describe_distance(kind.distance)}" for kind in kinds]
    return {
        **_describe_run("Diff", options.a, options.b, options, progress, options.workers),
        "state": "good" if changes.equal else "warn",
        "verdict": "no differences" if changes.equal else "different",
        "figures": figures,
        "losses": {
            "title": "What changed, by kind of layer",
            "lines": [describe_distance(distance), *lines] if kinds else [],
            "kinds": [{"kind": kind.name, "points": sorted(kind.points)} for kind in kinds[:KINDS]],
        },
        "checks": list(_describe_changes(changes)),
        "checked": ", ".join(f"{counts[state]:,} {text}" for state, text in STATES.items() if counts[state]),
        "notes": [*changes.notes, *(f"config.json: {row}" for row in changes.config)],
    }


def _describe_changes(changes: Diff) -> Iterator[dict[str, Any]]:
    """Tensors by what became of them: those that changed most first, then the others, folded."""
    worst = changes.worst()
    for row in worst[:DIFFERING]:
        yield {"state": STATES[row.state], "name": row.name, "detail": describe_distance(row.distance)}
    shown = {row.name for row in worst[:DIFFERING]}
    rows = [row for row in changes.tensors if row.state in ("moved", "only_a") or row.name not in shown]
    for kind in fold(((row.state, row.a, row.b), (row.source, row.name)) for row in rows):
        row, (source, name) = rows[kind.members[0]], kind.texts
        text = f"{source} → {name}" if source else name
        yield {"state": STATES[row.state], "name": text, "detail": row.spec, "count": len(kind.members)}


def _describe_run(kind: str, source: AnyPath, target: AnyPath, options: Options, progress: Progress, workers: int | None) -> dict[str, Any]:
    """What pages have in common: what was asked for, how it went, where."""
    start = progress.phases[0].began if progress.phases else 0.0
    return {
        "kind": kind,
        "source": str(source),
        "target": str(target),
        "when": time.strftime("%Y-%m-%d %H:%M %Z"),
        "settings": list(_describe_options(options)),
        "budget": progress.budget,
        "phases": [
            {"title": phase.title, "total": phase.total, "start": round(phase.began - start, 3), "samples": _round(phase.samples)}
            for phase in progress.phases
        ],
        "environment": _describe_environment(workers),
        **{key: [] for key in ("account", "mapping", "dropped", "files", "notes")},
    }


def _describe_options(options: Options) -> Iterator[tuple[str, str]]:
    """Options as the command line spells them, those that say nothing left out."""
    for option in fields(options):
        value = getattr(options, option.name)
        if option.default is not MISSING and about_of(option).commands and option.name != "report" and value:
            yield flags_of(option)[-1].removeprefix("--"), _show_setting(value)


def _round(samples: Iterable[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    return [(round(seconds, 3), nbytes, resident) for seconds, nbytes, resident in samples]


def _show_setting(value: object) -> str:
    if isinstance(value, Mapping):
        value = tuple(f"{key}={inner}" for key, inner in value.items())
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "yes" if value is True else str(value)


def _show_seconds(seconds: float) -> str:
    """``4.2 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.3g} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _describe_environment(workers: int | None) -> list[tuple[str, str]]:
    """Versions and the machine, without names of people and hosts."""
    rows = [("streamconv", __version__), ("Python", platform.python_version()), ("system", f"{platform.system()} {platform.release()}")]
    rows += [("processor", f"{platform.machine()}, {os.cpu_count()} cores"), ("memory", format_size(psutil.virtual_memory().total))]
    rows += [(name, sys.modules[name].__version__) for name in ("numpy", "torch", "transformers") if sys.modules.get(name)]
    return rows + ([("workers", str(workers))] if workers else [])


def _describe_losses(changes: Changes | None, changed: ChangedWeights) -> dict[str, Any]:
    """What casts and quantization changed: in words, and of each kind of tensor the relative L2 error by layer, the worst kinds first.

    Then how many weights adapters changed, of each kind of layer.
    """
    told = [*changed.lines(), *(f"{kind}: {kind.changed:,} of {kind.weights:,}" for kind in changed.kinds()[:KINDS])]
    if changes is None:
        return {**({"title": "What adapters changed"} if told else {}), "lines": told, "kinds": []}
    points: dict[str, list[tuple[int, float]]] = {}
    for row in changes.summary():
        kind, number = kind_of(row["target"])
        points.setdefault(kind, []).append((number, row["relative_l2"]))
    kinds = sorted(points, key=lambda kind: (-max(error for _, error in points[kind]), kind))
    drawn = [{"kind": kind, "points": sorted(points[kind])} for kind in kinds[:KINDS]]
    return {"lines": [*changes.lines(), *told], "kinds": drawn}


def _describe_times(result: Result, progress: Progress) -> list[tuple[str, float]]:
    """Seconds of all threads while files were made, by what they were spent with; the rest of it they waited, or had nothing to do."""
    made = [phase for phase in progress.phases if phase.title == "converting"]
    spent = [(one.name, getattr(result.times, one.name)) for one in fields(result.times)]
    total = sum(seconds for _, seconds in spent)
    threads = sum(phase.samples[-1][0] for phase in made) * result.plan.workers
    return [*((name, round(seconds, 4)) for name, seconds in spent), ("wait", round(max(0.0, threads - total), 4))] if total else []


def _choose_groups(plan: Plan) -> Iterator[dict[str, Any]]:
    """What targets of a few kinds are made of, one of each kind: those of the most sources first, and layouts that differ."""
    folds = [(row, members) for row, members in plan.fold_mapping() if row.layout or len(members[0].sources) > 1]
    folds.sort(key=lambda fold: (-min(len(fold[1][0].sources), DRAWN), fold[0].target))
    layouts: set[str] = set()
    for row, members in folds:
        if row.layout not in layouts and len(layouts) < GROUPS:
            layouts.add(row.layout)
            one = members[0]
            more = len(one.sources) - DRAWN
            sources = [*one.sources[:DRAWN], *([f"and {more} more"] if more > 0 else [])]
            yield {"sources": sources, "layout": one.layout, "target": one.target, "spec": str(one.spec), "count": len(members)}


def _describe_account(plan: Plan) -> list[tuple[str, int, str]]:
    account = plan.account
    rules = ", ".join(f"{count} by {rule}" for rule, count in account.dropped.items())
    counts = [(name, getattr(account, name), "") for name in ("copied", "computed", "renamed", "tied", "cast")]
    return [*counts, ("dropped", sum(account.dropped.values()), rules)]


def _describe_mapping(plan: Plan) -> Iterator[dict[str, Any]]:
    for row, members in plan.fold_mapping():
        kind = "kept" if row.sources == (row.target,) else "renamed"
        if row.layout or len(members[0].sources) > 1:
            kind = "rearranged"
        yield {
            "target": row.target,
            "sources": row.sources,
            "layout": row.layout,
            "spec": str(row.spec),
            "count": len(members),
            "size": format_size(len(members) * row.spec.nbytes),
            "kind": kind,
        }


def _describe_files(plan: Plan) -> list[dict[str, Any]]:
    """Files and what lies where in them; sizes in bytes."""
    specs = {row.target: row.spec for row in plan.mapping}
    stems = {module_of(name) for name in specs if LAYER.search(name)}
    rows = []
    for file in plan.files:
        computes = [segment for segment in file.segments if isinstance(segment, Compute)]
        copies = [segment for segment in file.segments if isinstance(segment, Copy)]
        rows.append(
            {
                "path": file.path,
                "size": file.size,
                "tensors": len(file.tensors),
                "copied": sum(segment.nbytes for segment in copies),
                "computed": sum(segment.move.numel * plan.nodes[segment.node].spec.dtype.itemsize for segment in computes),
                "parts": _list_parts(file, specs, stems),
            }
        )
    return rows


def _list_parts(file: FilePlan, specs: Mapping[str, TensorSpec], stems: set[str]) -> list[tuple[str, str, int, int]]:
    """Label, module, bytes and number of neighbouring tensors of a layer, or of a module if there are many layers."""

    def layer(name: str) -> str:
        match = LAYER.search(name)
        return name[: match.end()] if match else name

    def module(name: str) -> str:
        return module_of(name, stems) or "(top)"

    parts: list[tuple[str, str, int, int]] = []
    for label in (layer, module):
        parts = []
        for text, group in groupby(file.tensors, label):
            names = list(group)
            parts.append((text, module(names[0]), sum(specs[name].nbytes for name in names if name in specs), len(names)))
        if len(parts) <= PARTS:
            break
    return parts[:PARTS]


def _describe_checks(specs: Mapping[str, TensorSpec], comparison: Comparison | None) -> Iterator[dict[str, Any]]:
    """Tensors by what became of their comparison: first those that are not there or differ, then the equal ones, folded."""
    comparison = comparison or Comparison()
    for state, names in (("missing", comparison.missing), ("unexpected", comparison.unexpected)):
        yield from ({"state": state, "name": name} for name in fold_names(names))
    worst = sorted(comparison.tensors, key=lambda row: -(row.l2 or 0.0))
    for row in worst[:DIFFERING]:
        yield {"state": "differs", "name": row.name, "detail": _describe_difference(row)}
    for name in fold_names([row.name for row in worst[DIFFERING:]]):
        yield {"state": "differs", "name": name}
    other = {*comparison.missing, *(row.name for row in comparison.tensors)}
    equal = [name for name in specs if name not in other]
    for kind in fold((specs[name], (name,)) for name in equal):
        spec, count = specs[equal[kind.members[0]]], len(kind.members)
        yield {"state": "equal", "name": kind.texts[0], "detail": str(spec), "count": count}


def _describe_difference(row: TensorDifference) -> str:
    parts = [f"expected {row.expected}, found {row.found}"] if row.expected else []
    if row.l2 is not None and row.max_abs is not None:
        parts.append(f"L2 {row.l2:.6g}, largest {row.max_abs:.6g}")
    if row.nonfinite:
        parts.append(f"{row.nonfinite:,} not finite")
    return "; ".join(parts)


def _describe_check(comparison: Comparison) -> str:
    distances = f"L2 distance {comparison.l2:.6g}, largest difference {comparison.max_abs:.6g}"
    nonfinite = f", {comparison.nonfinite:,} differences not finite" if comparison.nonfinite else ""
    return f"{comparison.compared:,} tensors compared: {distances}{nonfinite}."
