"""Stale files: what of an output that is there a new one replaces, the weights and indices that loaders would take for parts of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import PurePosixPath

from streamconv.checkpoint.stems import has_stems
from streamconv.formats.container import Names
from streamconv.formats.registry import containers
from streamconv.formats.unrelated import is_weights
from streamconv.planning.plan import Plan
from streamconv.running.directory import PARTIAL, UNFINISHED
from streamconv.running.output import Output


def list_stale(plan: Plan, output: Output) -> list[str]:
    """What ``--overwrite`` removes of what is there."""
    return find_stale(plan, output.list(component_folders(plan)))


def find_stale(plan: Plan, there: Collection[str]) -> list[str]:
    """What ``--overwrite`` removes of the files ``there``, by their names relative to DST: the one file of an output that is one.

    Else it is weight and index files, also what an interrupted run left unfinished, at the top and in folders of components that the plan
    makes, and no weights of other models in folders of their own. A file that says where others are, such as ``latest``, is where such are
    ``there``: others have files of that name, too.
    """
    if plan.single:
        return [name for name in there if name == plan.single]
    folders, nesting = {"", *component_folders(plan)}, _nesting()
    markers = {names.marker: any(map(names.is_nested, there)) for names in nesting}
    return [name for name in there if markers.get(name, _is_stale(name, folders, nesting))]


def component_folders(plan: Plan) -> set[str]:
    """Folders below DST that hold a component of the model each, such as a pipeline's ``unet``."""
    if not has_stems(plan.format):
        return set()
    return {PurePosixPath(file.path).parent.as_posix() for file in plan.files if file.tensors} - {"."}


def find_stale_beside(plan: Plan, put: Collection[str], there: Iterable[str]) -> list[str]:
    """The stale files that a pull request removes, together with the last of a plan's files: those of the plan's container.

    Other containers stay.

    Args:
        plan: of the output.
        put: files that are put there; there is nothing to remove yet if the plan's last one is not among them.
        there: files of the repository, or of a folder in it.
    """
    if plan.single or plan.files[-1].path not in put:
        return []
    made, kind = {file.path for file in plan.files}, containers()[plan.format].names
    stale = find_stale(plan, list(there))
    return [name for name in stale if name not in made and (kind.is_part(name) or kind.replaces(name))]


def _is_stale(name: str, folders: Collection[str], nesting: Iterable[Names]) -> bool:
    whole = UNFINISHED.sub("", name).removesuffix(PARTIAL)
    folder, _, file = whole.rpartition("/")
    is_ours = UNFINISHED.search(name) or (is_weights(file) and not file.endswith(PARTIAL))
    return (folder in folders and bool(is_ours)) or any(names.replaces(whole) for names in nesting)


def _nesting() -> list[Names]:
    """The names of containers whose files lie in folders of their own."""
    return [container.names for container in containers().values() if container.names.marker]
