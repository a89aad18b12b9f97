"""SwissArmyTransformer's folders: ``latest`` names the iteration whose folder holds a file for each model-parallel rank.

``<iteration>/mp_rank_NN_model_states.pt`` is a file that torch.save wrote, with the tensors below ``module``; DeepSpeed puts more beside
them, which is left out. ``model_config.json`` stays beside ``latest``. Facts: sat/training/model_io.py of SwissArmyTransformer 0.4.12.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from streamconv.dtypes import TensorSpec
from streamconv.errors import FormatError, UsageError
from streamconv.formats import Contents, FileLayout
from streamconv.formats import torch as torch_files
from streamconv.formats.container import Container, Names
from streamconv.formats.files import read_line, short, show, unreadable
from streamconv.formats.indexes import Explain, unexplained
from streamconv.formats.roots import note_root
from streamconv.storage.folder import Location

LATEST = "latest"
ROOT = "module"
ITERATION = "1"  # that of new checkpoints, as SAT's own scripts have it
_RANK = re.compile(r"mp_rank_(\d{2,})_model_states\.pt")
ITERATION_NAME = re.compile(r"[0-9]*[1-9][0-9]*(-ema)?|release")
KIND = Names(
    "a SwissArmyTransformer checkpoint",
    (),
    "mp_rank",
    (),
    folders=LATEST,
    weights=(LATEST,),
    marker=LATEST,
    asked_for=(LATEST,),
    nested_series=(("mp_rank_", "_model_states.pt"),),
    nested=f"(?:{ITERATION_NAME.pattern})/{_RANK.pattern}",
    replaced=f"{ITERATION}/mp_rank_*",
)


def read(path: Location, *, by_rank: bool = True, explain: Explain = unexplained) -> Contents:  # noqa: ARG001 - there is no other way
    """The contents of a folder with ``latest``: each tensor as ``<file of its rank>/<name>``, also where there is one rank.

    Raises:
        FormatError: ``latest`` names no iteration, ranks are missing, or a file is damaged.
        UsageError: the path is not there or cannot be read, or a file does not hold a model's state.
    """
    folder = path.folder.folder(_iteration(path)).file("")
    contents = torch_files.read(folder, by_rank=True, root=ROOT, files=_ranks(folder), explain=explain)
    notes = [note for note in contents.notes if note not in note_root(ROOT)]
    return Contents("sat", contents.entries, contents.files, [path.folder.file(LATEST)], notes=notes)


def _iteration(path: Location) -> str:
    """The folder that ``latest`` names."""
    latest = path.folder.file(LATEST)
    name = read_line(latest, KIND.noun)
    if not ITERATION_NAME.fullmatch(name):
        raise FormatError(f"{show(latest)}: expected the number of an iteration, or release, found {short.repr(name)}: mend it")
    name = name if not name.isdigit() else str(int(name))
    if not path.folder.has_folder(name):
        raise FormatError(f"{show(latest)}: names {name}, and there is no such folder: fetch it, or mend {LATEST}")
    return name


def _ranks(folder: Location) -> list[str]:
    """The files of an iteration's folder, one for each rank."""
    try:
        names = folder.folder.list()
    except OSError as error:
        raise unreadable(folder, error, KIND.noun) from error
    ranks = {}
    for name in names:
        match = _RANK.fullmatch(name)
        if match:
            ranks[int(match[1])] = name
    if not ranks and any(name.startswith("z3_rank_") for name in names):
        raise FormatError(f"{show(folder)}: parts of parameters, as ZeRO stage 3 keeps them, are not read: gather them with SAT first")
    missing = sorted(set(range(max(ranks, default=0) + 1)) - set(ranks))
    if missing:
        raise FormatError(f"{show(folder)}: no mp_rank_{missing[0]:02}_model_states.pt: fetch the files of all ranks")
    return [ranks[number] for number in sorted(ranks)]


def lay_out(
    specs: Mapping[str, TensorSpec],
    *,
    max_shard_size: int | None = None,  # noqa: ARG001 - a rank is one file
    file: str | None = None,  # noqa: ARG001 - and there is always latest beside it
    tied: Mapping[str, str] | None = None,
) -> list[FileLayout]:
    """The files of a checkpoint whose tensors are called ``<file of their rank>/<name>``; ``latest``, which makes it valid, comes last.

    Args:
        specs: the tensors, in tensor order.
        max_shard_size: of no effect: a rank is one file.
        file: of no effect: the ranks say what their files are called.
        tied: names that share the storage of another of their rank, and its name.

    Raises:
        UsageError: names without a rank, or what torch cannot hold.
    """
    tables: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in specs.items():
        rank, _, inner = name.partition("/")
        if not (_RANK.fullmatch(rank) and inner):
            raise UsageError(
                f"tensor {short.repr(name)}: a sat folder holds tensors by rank: use a recipe that makes them, such as *-hf2sat"
            )
        tables.setdefault(rank, {})[inner] = spec
    layouts = []
    for rank, table in sorted(tables.items()):
        own = {}
        for name, other in (tied or {}).items():
            if _same_rank(rank, name, other):
                own[name.partition("/")[2]] = other.partition("/")[2]
        (layout,) = torch_files.lay_out(table, max_shard_size=None, file=f"{ITERATION}/{rank}", tied=own, root=ROOT)
        slots = {f"{rank}/{name}": slot for name, slot in layout.slots.items()}
        layouts.append(FileLayout(layout.path, layout.size, layout.literals, slots, layout.checksums))
    return [*layouts, FileLayout(LATEST, len(ITERATION), ((0, ITERATION.encode()),), {})]


def _same_rank(rank: str, *names: str) -> bool:
    return all(name.startswith(f"{rank}/") for name in names)


CONTAINER = Container(name="sat", summary="SAT's folders", names=KIND, read=read, lay_out=lay_out, ties="shared", by_rank=True)
