"""The call `diff`: opens two checkpoints, looks at headers, and reads what these do not settle."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from streamconv.changes.diff import Diff, TensorDiff, diff_configs
from streamconv.changes.distance import SCRATCH, Distance, measure_distance
from streamconv.changes.moved import find_alike, match_moved
from streamconv.conversion.comparing import Sides, open_sides
from streamconv.conversion.options import DiffOptions, arguments_of
from streamconv.engine.side_by_side import Limits, SideBySide
from streamconv.graph.node import AnyNode, Source
from streamconv.planning.fitting import check_workers
from streamconv.running.progress import bar
from streamconv.storage import is_url
from streamconv.units import parse_size

HELD = 400  # bytes: what is kept of a tensor that differs


@arguments_of(DiffOptions)
def diff(options: DiffOptions) -> Diff:
    """Says what changed from ``a`` to ``b``, tensor by tensor; with a recipe, from what it makes of ``a``.

    A tensor is equal, rounded (the other's numbers in another dtype, or rounded to one), changed by so much, moved (the bytes of another
    name), of another shape, or only in one. Other keys of config.json are told where no option changes ``a``. A recipe may be a `Recipe`,
    a dtype torch's or numpy's, a size a number of bytes.

    Raises:
        StreamconvError: one cannot be read, or the recipe does not fit.

    >>> changes = streamconv.diff("model", "model", max_memory="4GB")
    >>> changes.equal, dict(changes.counts)
    (True, {'equal': 3})
    """
    sides = open_sides(options, is_either_quantized=True)
    workers = check_workers(options.workers, remote=is_url(options.a) or is_url(options.b))
    limits = Limits(workers, parse_size(options.max_memory), options.read_backend)
    result = Diff(len(sides.expected), len(sides.actual), headers=options.headers, notes=list(sides.notes))
    if not (options.recipe or options.dtype or options.dequantize or options.quantize):
        result.config = diff_configs(sides.a.config, sides.b.config)
    rows = {name: (node, sides.actual[name]) for name, node in sides.expected.items() if name in sides.actual}
    states = {name: _compare_headers(*row) for name, row in rows.items()}
    distances: dict[str, Distance] = {}
    moved: dict[str, str] = {}
    if not options.headers:
        unread = {name: row for name, row in rows.items() if _is_to_be_read(*row)}
        distances = _measure(unread, limits, options)
        states |= {name: _judge(distances.get(name)) for name in unread}
        unknown = [name for name in sides.actual if states.get(name, "changed") == "changed"]
        moved = _find_moved(sides, unknown, limits, options)
        states |= dict.fromkeys(moved, "moved")
    sources = {*moved.values()}
    for name, node in sides.expected.items():
        state = states.get(name)
        if state is not None:
            _add(result, name, state, node, sides.actual[name], distances.get(name), moved.get(name))
        if state in (None, "moved") and name not in sources:
            _add(result, name, "only_a", node, None)
    for name, node in sides.actual.items():
        if name not in rows:
            _add(result, name, states.get(name, "only_b"), None, node, source=moved.get(name))
    result.elsewhere = _count_elsewhere(sides, [name for name, state in states.items() if state == "equal"])
    return result


def _compare_headers(ours: AnyNode, theirs: AnyNode) -> str:
    """The state of a tensor on both sides by shapes and dtypes alone."""
    if ours.spec.shape != theirs.spec.shape:
        return "shape"
    return "unread" if ours.spec.dtype == theirs.spec.dtype else "dtype"


def _is_to_be_read(ours: AnyNode, theirs: AnyNode) -> bool:
    """Whether reading two tensors can tell more: they have one shape, and numbers of one dimension, or elements of the same type."""
    dtypes = ours.spec.dtype, theirs.spec.dtype
    are_plain = not any(dtype.is_packed or dtype.name == "complex64" for dtype in dtypes)
    return ours.spec.shape == theirs.spec.shape and (dtypes[0] == dtypes[1] or are_plain)


def _judge(distance: Distance | None) -> str:
    if distance is None:
        return "equal"
    return "rounded" if distance.rounding else "changed"


def _measure(rows: Mapping[str, tuple[AnyNode, AnyNode]], limits: Limits, options: DiffOptions) -> dict[str, Distance]:
    """How far apart those tensors are that are not equal."""
    side_by_side = SideBySide(rows, limits, held=HELD, scratch=SCRATCH)
    with bar(sum(theirs.spec.nbytes for _, theirs in rows.values()), "comparing", show=options.progress) as tell:
        return side_by_side.run(lambda name, begin: measure_distance(*rows[name], begin), tell)


def _find_moved(sides: Sides, names: Collection[str], limits: Limits, options: DiffOptions) -> dict[str, str]:
    """For tensors of B that are not what A has under their name, the name under which it has them."""
    alike = find_alike(sides.expected, sides.actual, names, limits)
    total = sum(sides.expected[name].spec.nbytes for name in alike[0]) + sum(sides.actual[name].spec.nbytes for name in alike[1])
    if not total:
        return {}
    with bar(total, "looking for what moved", show=options.progress) as tell:
        return match_moved(sides.expected, sides.actual, alike, limits, tell)


def _add(
    result: Diff,
    name: str,
    state: str,
    ours: AnyNode | None,
    theirs: AnyNode | None,
    distance: Distance | None = None,
    source: str | None = None,
) -> None:
    """Notes what became of a tensor."""
    node = theirs or ours
    assert node is not None
    result.counts[state] += 1
    result.sizes[state] += node.spec.nbytes
    if state not in ("equal", "unread"):
        a, b = ("" if side is None else str(side.spec) for side in (ours, theirs))
        measured = None if state == "moved" else distance
        result.tensors.append(TensorDiff(name, state, b if source else a, b, source or "", measured))


def _count_elsewhere(sides: Sides, names: Iterable[str]) -> int:
    """How many of these tensors lie in a file of another name, of those that lie in one as they are."""
    paths = []
    for checkpoint in (sides.a, sides.b):
        files = checkpoint.contents.files
        paths.append({str(file): file.below(checkpoint.folder) for file in files})
    count = 0
    for name in names:
        ours, theirs = sides.expected[name], sides.actual[name]
        if isinstance(ours, Source) and isinstance(theirs, Source) and ours.extents and theirs.extents:
            count += paths[0].get(ours.extents[0].path) != paths[1].get(theirs.extents[0].path)
    return count
