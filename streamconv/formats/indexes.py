"""Indexes: files that say in which file each tensor of a checkpoint is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sized

from streamconv.errors import FormatError
from streamconv.formats import AnyNode
from streamconv.formats.container import Names
from streamconv.formats.files import damaged, read_bytes, short, show
from streamconv.formats.json_text import MAX_JSON, Repeated, parse_object
from streamconv.storage.filenames import find_fault
from streamconv.storage.folder import Location
from streamconv.text import one_line


def read_index(path: Location, kind: Names) -> dict[str, str]:
    """The weight map of an index: tensor -> file, which is a plain path below the index's directory. Raises FormatError."""
    raw, size = read_bytes(path, 0, MAX_JSON, kind.noun)
    if size > MAX_JSON:
        raise damaged(path, f"it has {size} bytes, an index at most {MAX_JSON}")
    table = parse_object(path, raw, "text")
    weight_map = table.get("weight_map", table if path.name == kind.other_index else None)
    if type(weight_map) is Repeated:
        raise damaged(path, f"its weight_map names {short.repr(weight_map.key)} twice")
    if type(weight_map) is not dict or not weight_map:
        raise damaged(path, f"it must have a weight_map of tensor names to file names, found {short.repr(weight_map)}")
    inside: set[str] = set()  # shards that were looked at: many tensors are in each
    for name, shard in weight_map.items():
        if type(shard) is str and (shard in inside or _is_inside(shard, kind)):
            inside.add(shard)
        else:
            raise damaged(path, f"expected a *{', *'.join(kind.suffixes)} file below this directory, found {short.repr(shard)}", name)
    return weight_map


def _is_inside(shard: str, kind: Names) -> bool:
    """Whether a file name in an index is a plain relative path that cannot leave the directory. Links in it may."""
    return not find_fault(shard) and shard.endswith(kind.suffixes)


Explain = Callable[[str, Collection[str]], str | None]
"""The name of a tensor that an index names and no file holds, and what files hold -> why it need be in none, or None: it is lost."""


def unexplained(_name: str, _present: Collection[str]) -> None:
    """The `Explain` that has no tensor missing."""


def check_index(
    index: Location, weight_map: Mapping[str, str], tables: Mapping[str, Mapping[str, AnyNode]], explain: Explain = unexplained
) -> list[str]:
    """What an index does not name and its files hold counts all the same, as it does for transformers; notes tell of it.

    Args:
        index: its path.
        weight_map: what it says.
        tables: what its files hold.
        explain: says which tensors may be in no file.

    Raises:
        FormatError: a tensor is in another file than the index says, or in none without a reason.
    """
    file_of: dict[str, str] = {}
    for file, table in tables.items():
        file_of |= dict.fromkeys(table, file)
    shards = set(weight_map.values())
    extra = [name for name, file in file_of.items() if name not in weight_map and file in shards]
    absent = {name: explain(name, file_of) for name in weight_map if name not in file_of}
    wrong = {name: f"is in {short.repr(file)}" for name, file in file_of.items() if weight_map.get(name, file) != file}
    wrong = wrong or {name: "is in no file" for name, why in absent.items() if why is None}
    if wrong:
        name, what = next(iter(wrong.items()))
        raise FormatError(
            f"{show(index)}: index and files differ in {len(wrong)} tensors: {short.repr(name)} {what}, the index says "
            f"{short.repr(weight_map[name])}; download or write the index and the files again"
        )
    notes = []
    if absent:
        name, why = next(iter(absent.items()))
        notes.append(f"{_count(absent)} that {one_line(index.name)} names in no file, such as {short.repr(name)}, {why}: left out")
    if extra:
        notes.append(f"{_count(extra)} that {one_line(index.name)} does not name, such as {short.repr(extra[0])}: read all the same")
    return notes


def _count(names: Sized) -> str:
    return f"{len(names)} tensor{'s' * (len(names) != 1)}"
