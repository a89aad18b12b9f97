"""What commands print, for people and as JSON. Large documents are written row by row."""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv.checkpoint.entries import TensorEntry
from streamconv.checkpoint.opening import Checkpoint
from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.errors import UsageError
from streamconv.formats.registry import by_suffix
from streamconv.graph.node import Node, extents
from streamconv.notation.folding import Fold, fold
from streamconv.notation.names import nearest
from streamconv.storage import is_url
from streamconv.text import one_line
from streamconv.units import format_size

if TYPE_CHECKING:
    from streamconv.planning.plan import Plan

PIECE = 1 << 20  # bytes of a tensor at a time
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
LAYER = re.compile(r"\.[0-9]+(?=\.)")
_NUMBERS = {*CASTABLE, "int64", "bool"}  # dtypes that no code of a quantization has


def describe_checkpoint(checkpoint: Checkpoint, *, stats: bool = False) -> dict[str, Any]:
    """What ``inspect --json`` prints; tensors are given one at a time, with ``stats`` from their data if wanted."""
    contents = checkpoint.contents
    specs = [node.spec for node in contents.entries.values()]
    names = {str(file): file.below(checkpoint.folder) for file in contents.files}
    files = [{"path": names[str(file)], "size": file.size} for file in contents.files]

    def tensors() -> Iterable[dict[str, Any]]:
        for name, node in contents.entries.items():
            first, *others = extents(node)
            statistics = measure(checkpoint[name]) if stats else None
            yield {
                "name": name,
                "dtype": node.spec.dtype.name,
                "shape": node.spec.shape,
                "nbytes": node.spec.nbytes,
                "file": names[first.path],
                "offset": None if others or isinstance(node, Node) else first.offset,
                **(statistics.summary() if statistics else {}),
            }

    return {
        "format": contents.format,
        "total_size": sum(spec.nbytes for spec in specs),
        "total_parameters": sum(spec.numel for spec in specs),
        "files": files,
        "tensors": tensors(),
        "metadata": contents.metadata,
        "sidecars": checkpoint.sidecars,
        "quantization": _find_quantization(checkpoint),
    }


def select(checkpoint: Checkpoint, pattern: str) -> Checkpoint:
    """Those tensors of a checkpoint whose names a pattern or glob matches, or have ``pattern`` in them if it is neither.

    Raises:
        UsageError: none is.
    """
    names = list(checkpoint.keys(pattern))
    if not names:
        close = nearest(pattern, checkpoint, 3)
        hint = f"; near it: {', '.join(close)}" if close else ""
        raise UsageError(f"--filter {pattern}: no name of {len(checkpoint)} tensors matches{hint}; give another pattern")
    contents = checkpoint.contents
    return Checkpoint(checkpoint.location, replace(contents, entries={name: contents.entries[name] for name in names}))


@dataclass
class Statistics:
    """Sums over the finite values of tensors. ``squares`` are added up in float64."""

    count: int = 0
    nonfinite: int = 0
    least: float = math.inf
    most: float = -math.inf
    total: float = 0.0
    squares: float = 0.0

    def add(self, other: Statistics) -> None:
        """Takes other values in."""
        self.count, self.nonfinite = self.count + other.count, self.nonfinite + other.nonfinite
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self.total, self.squares = self.total + other.total, self.squares + other.squares

    def summary(self) -> dict[str, Any]:
        """What ``inspect --stats --json`` adds to a tensor; null where there is no finite value."""
        some = self.count > 0
        return {
            "min": self.least if some else None,
            "max": self.most if some else None,
            "mean": self.total / self.count if some else None,
            "norm": math.sqrt(self.squares) if some else None,
            "nonfinite": self.nonfinite,
        }

    def __str__(self) -> str:
        if not self.count:
            return "no values" if not self.nonfinite else f"{self.nonfinite} values, none finite"
        summary = self.summary()
        text = "  ".join(f"{key} {summary[key]:.4g}" for key in ("min", "max", "mean", "norm"))
        return text + (f"  {self.nonfinite} NaN or infinite" if self.nonfinite else "")


def measure(entry: TensorEntry) -> Statistics | None:
    """A tensor's statistics, from one pass in pieces of `PIECE` bytes; None for packed and complex types."""
    import numpy as np

    if entry.dtype not in DTYPES or entry.spec.dtype.is_packed or entry.dtype == "complex64":
        return None
    statistics = Statistics()
    for piece in entry.pieces(PIECE):
        with np.errstate(all="ignore"):  # what is not finite, or has no finite square, says so by itself
            values = piece.astype(np.float64)
            finite = values[np.isfinite(values)]
            part = Statistics(len(finite), len(values) - len(finite))
            if part.count:
                part.least, part.most, part.total = float(finite.min()), float(finite.max()), float(finite.sum())
                part.squares = float(np.square(finite, out=finite).sum())
        statistics.add(part)
    return statistics


def list_checkpoint(checkpoint: Checkpoint, *, flat: bool = False, stats: bool = False) -> Iterator[str]:
    """Lines of ``inspect``: a tree with repeated names folded, or ``flat`` one each; ``stats`` from the data; sums at the end."""
    description = describe_checkpoint(checkpoint)
    quantization = description["quantization"]
    bytes_by_dtype: Counter[str] = Counter()
    for entry in checkpoint.values():
        bytes_by_dtype[entry.dtype] += entry.nbytes
    if flat:
        for row in description["tensors"]:
            statistics = f"  {measure(checkpoint[row['name']]) or ''}".rstrip() if stats else ""
            name, file = one_line(row["name"]), one_line(row["file"])
            yield f"{name}  {row['dtype']}{list(row['shape'])}  {format_size(row['nbytes'])}  {file}{statistics}"
    else:
        yield from _draw_tree(checkpoint, stats=stats)
    for note in [*checkpoint.contents.notes, *(_list_quantized(quantization) if quantization else ())]:
        yield one_line(f"note: {note}")
    dtypes = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in bytes_by_dtype.most_common())
    yield one_line(
        f"{checkpoint.path}: {description['format']}, {len(checkpoint)} tensors, {description['total_parameters']:,} parameters, "
        f"{format_size(description['total_size'])} in {len(description['files'])} files ({dtypes}); {len(description['sidecars'])} sidecars"
    )


def _list_quantized(quantization: dict[str, Any]) -> Iterator[str]:
    """A line on each way in which weights are quantized, and one on what they would be as numbers."""
    for way, count in quantization["weights"].items():
        yield f"quantized: {count} weights by {quantization['method']}, {way}"
    yield f"with --dequantize: {format_size(quantization['dequantized_size'])}, these weights in {quantization['dtype']}"


def _find_quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """How weights are quantized; what tells it is loaded where something may be."""
    if {spec.dtype.name for spec in _specs(checkpoint)} <= _NUMBERS:
        return None
    from streamconv.diagnose.quantized import describe_quantization

    return describe_quantization(checkpoint)


def _specs(checkpoint: Checkpoint) -> Iterator[TensorSpec]:
    return (entry.spec for entry in checkpoint.values())


def _draw_tree(checkpoint: Checkpoint, *, stats: bool) -> Iterator[str]:
    """Folded tensors below the modules that hold them, with each module's size."""
    names = list(checkpoint)
    specs = [checkpoint[name].spec for name in names]
    stems = {module_of(name) for name in names if LAYER.search(name)}
    kinds: dict[str, list[Fold]] = {}
    for kind in fold((spec, (name,)) for name, spec in zip(names, specs, strict=True)):
        kinds.setdefault(module_of(names[kind.members[0]], stems), []).append(kind)
    for module, folds in kinds.items():
        inside = [specs[k] for k in chain.from_iterable(kind.members for kind in folds)]
        numel = sum(spec.numel for spec in inside)
        yield one_line(f"{module or '(top)'}  {format_size(sum(spec.nbytes for spec in inside))}  {numel:,} parameters")
        for kind in folds:
            spec, count = specs[kind.members[0]], len(kind.members)
            name = kind.texts[0].removeprefix(f"{module}.") if module else kind.texts[0]
            dtype = SHORT.get(spec.dtype.name, spec.dtype.name)
            times = f" x{count}" if count > 1 else ""
            yield one_line(f"  {format_size(count * spec.nbytes):>7}  {name}  {dtype} {list(spec.shape)}{times}")
            total = _measure_all(checkpoint[names[k]] for k in kind.members) if stats else None
            if total:
                yield f"           {total}"


def _measure_all(entries: Iterable[TensorEntry]) -> Statistics | None:
    """The statistics of several tensors together; None where none has any."""
    total = None
    for entry in entries:
        statistics = measure(entry)
        if statistics:
            total = total or Statistics()
            total.add(statistics)
    return total


def module_of(name: str, stems: Collection[str] = ()) -> str:
    """The module that holds a tensor: what a list of layers stands in, else the longest of ``stems``, else its name's first part.

    The file of a rank, which stands before its names, is no part of them.
    """
    name = _file_of_rank(tuple(by_suffix())).sub("", name)
    parts = name.split(".")
    layer = LAYER.search(name)
    if layer:
        return ".".join(name[: layer.start()].split(".")[:-1])
    above = (".".join(parts[:k]) for k in range(len(parts) - 1, 0, -1))
    return next((stem for stem in above if stem in stems), parts[0] if len(parts) > 1 else "")


@cache
def _file_of_rank(suffixes: tuple[str, ...]) -> re.Pattern[str]:
    """What a tensor's name begins with that is presented by rank."""
    return re.compile(rf"^.*(?:{'|'.join(map(re.escape, suffixes))})/")


def describe_room(plan: Plan) -> str:
    """What the file system of DST has left before and after a run, in bytes; of a URL, that where files are made first."""
    if is_url(plan.root):
        return f"  free     {format_size(shutil.disk_usage(tempfile.gettempdir()).free)} in {tempfile.gettempdir()}"
    above = next(folder for folder in (Path(plan.root), *Path(plan.root).parents) if folder.exists())
    free = shutil.disk_usage(above).free
    return f"  free     {format_size(free)} now, {format_size(max(0, free - plan.totals.disk_needed))} afterwards"


PAGE = "<!doctype html>"  # how a page begins


def check_page(text: str) -> None:
    """Refuses a path where no page can be written.

    Raises:
        UsageError: it is a URL or a directory, lies in something else, or is another file.
    """
    path = Path(text)
    if is_url(text):
        raise UsageError(f"--report {text}: a page is written to a file of this machine: give a path")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not above.is_dir() or not os.access(path if path.exists() else above, os.W_OK):
        raise UsageError(f"--report {path}: a file cannot be written there: give the name of an .html file in a directory of yours")
    from streamconv.running.kept import check_replaceable  # with which plans and outputs are loaded: not for listing a checkpoint

    check_replaceable("--report", path, PAGE)
