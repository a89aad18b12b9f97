"""The health of a checkpoint, from headers, index and config alone; with ``data`` also from the numbers, streamed."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

from streamconv.advice.matching import rank_recipes, suggest_merging
from streamconv.advice.recognition import recognize
from streamconv.advice.suggestions import Suggestion, list_suggestions, suggest
from streamconv.checkpoint.components import find_pointers, find_weighted, look_beside
from streamconv.checkpoint.opening import CONFIG, Checkpoint, detect_format, find_checkpoint, open_checkpoint, read_config
from streamconv.diagnose.adapters import check_adapter
from streamconv.diagnose.contradictions import Stated, check_config, check_layers, check_types
from streamconv.diagnose.findings import Finding
from streamconv.diagnose.quantized import PIECE, check_quantization, check_scales
from streamconv.diagnose.ranks import RankSet, by_file, check_ranks, find_ranks, open_with_ranks
from streamconv.dtypes import TensorSpec
from streamconv.engine.comparison import compare
from streamconv.errors import FormatError, StreamconvError, UsageError
from streamconv.formats.container import Names
from streamconv.formats.files import read_bytes
from streamconv.formats.json_text import MAX_JSON, read_json
from streamconv.formats.registry import containers
from streamconv.formats.selection import choose_variant
from streamconv.graph.node import AnyNode
from streamconv.library.loading import Loading, check_load
from streamconv.running.log import read_head
from streamconv.running.output import EARLIER, LOG, STATE
from streamconv.storage.folder import AnyPath, Folder, Location, each
from streamconv.storage.locations import as_given
from streamconv.text import join_lines
from streamconv.units import format_size

FIRST_LINE = 1 << 20  # bytes of a log in which its advice stands
_OTHER_CONFIGS = ("params.json", "model_config.json", "adapter_config.json")
_TRANSFORMERS = {"model_type", "architectures", "transformers_version", "auto_map"}  # keys of its configs
_MODELOPT = "hf_quant_config.json"  # where ModelOpt says how tensors are quantized
_CLASS = "_class_name"  # the key of diffusers' configs
_VOCABULARY = re.compile(r"(embed_tokens|wte|word_embeddings|tok_embeddings)\.weight$")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")


@dataclass
class Examination:
    """What `doctor` finds in a checkpoint, and what that consists of.

    Attributes:
        path: where it is, as the caller says it.
        format: its container.
        findings: what is wrong with it, and what is worth knowing.
        dtypes: dtype -> how many tensors have it, the most first.
        tensors: how many there are.
        nbytes: of all tensors.
        recipes: the names of those that fit, the likeliest first.
        suggestions: what can be done with it, if nothing is wrong.
        load: what the library says that opens it, where that was asked for.
    """

    path: str
    format: str
    findings: list[Finding] = field(default_factory=list)
    dtypes: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    nbytes: int = 0
    recipes: list[str] = field(default_factory=list)
    suggestions: list[Suggestion] = field(default_factory=list)
    load: Loading | None = None

    @property
    def healthy(self) -> bool:
        return not any(finding.problem for finding in self.findings)

    def summary(self) -> dict[str, Any]:
        """What ``doctor --json`` prints."""
        summary = {"healthy": self.healthy, **asdict(replace(self, load=None))}
        del summary["load"]
        return summary | ({"load": self.load.summary()} if self.load else {})

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {count}" for name, count in self.dtypes.items())
        lines = [*map(str, self.findings), f"{self.path}: {self.format}, {self.tensors} tensors, {format_size(self.nbytes)} ({kinds})"]
        lines += [self.load.verdict] if self.load and self.load.fits else []
        lines += [f"recipes that fit: {', '.join(self.recipes)}"] if self.recipes else []
        problems = sum(finding.problem for finding in self.findings)
        lines.append(f"{problems} problem{'s' * (problems > 1)}" if problems else "healthy")
        return join_lines([*lines, *list_suggestions(self.suggestions)])


def doctor(
    path: AnyPath, *, data: bool = False, root: str | None = None, variant: str | None = None, check_load: bool = False
) -> Examination:
    """Looks for damage and contradictions in a checkpoint, and for the recipes that fit it.

    Args:
        path: a directory, a file or a URL.
        data: look at the numbers, too: NaN, Inf, constant tensors.
        root: the key of the dict of tensors in a file that torch.save wrote.
        variant: which variant of the weights is looked at.
        check_load: have the library that the config names open it, without data: see `Examination.load`.

    Raises:
        StreamconvError: there is nothing at ``path`` that could be a checkpoint.

    >>> examination = streamconv.doctor("model", data=True)
    >>> [(finding.where, finding.what) for finding in examination.findings if "layers" not in finding.where]
    [('config.json', 'it is missing')]
    >>> examination.tensors, examination.nbytes, examination.recipes
    (3, 40, [])
    """
    load = _open_by_library(path, variant) if check_load else None
    examination = examine(path, data=data, root=root, variant=variant)
    if load is not None:
        examination.load = load
        examination.findings += _judge(load)
    matches = None
    with suppress(StreamconvError):  # ranks may be a checkpoint to recipes only that have no rules
        matches = rank_recipes(path)
        examination.recipes = [match.recipe.name for match in matches if match.fits]
    with suppress(StreamconvError):
        if examination.healthy:
            source = recognize(path, root=root, variant=variant, thorough=True, matches=matches)
            examination.suggestions = suggest(source)
    return examination


def _open_by_library(path: AnyPath, variant: str | None) -> Loading:
    """What the library says of a checkpoint that its config names. Raises UsageError."""
    location, _ = find_checkpoint(path)
    if location.local is None or not location.is_folder:
        raise UsageError(f"--check-load: libraries open folders of this machine, SRC is {location}: give its folder, or leave it out")
    return check_load(location.local, variant=variant)


def _judge(load: Loading) -> Iterator[Finding]:
    """What is wrong where a library opens a checkpoint, and what it could not look at."""
    for fault in load.faults():
        yield Finding(fault, load.opener, "the model would not be the one that is stored", "use the config or the recipe of this model")
    for part in load.unchecked:
        yield Finding(f"not checked: {part}", load.opener, "its tensors may not fit", "look at it with its own loader", problem=False)


def examine(path: AnyPath, *, data: bool = False, root: str | None = None, variant: str | None = None) -> Examination:
    """Looks at a checkpoint, with its components in folders; of weights that have variants, at one of these or at those that are of none.

    Raises:
        StreamconvError: there is nothing at ``path`` that could be one.
    """
    location, notes = find_checkpoint(path)
    if variant is not None:
        with suppress(FormatError):  # which is looked into below
            open_checkpoint(location, root=root, variant=variant)
    whole = Examination(str(location) if notes else as_given(path, location), "")
    try:
        folders = find_weighted(location)
    except FormatError as error:
        what = _short(error, location)
        whole.findings.append(Finding(what, whole.path, "components of the model are not found", "mend it, or get it again"))
        folders = []
    for folder in folders or [""]:
        own = None if folder else root
        part = location.folder.folder(folder).file("") if folder else location
        component = _examine_component(part, own, data=data, is_component=folder != "", variant=variant)
        whole.format = whole.format or component.format
        whole.findings += (replace(finding, where=f"{folder}: {finding.where}") if folder else finding for finding in component.findings)
        whole.dtypes = dict((Counter(whole.dtypes) + Counter(component.dtypes)).most_common())
        whole.tensors, whole.nbytes = whole.tensors + component.tensors, whole.nbytes + component.nbytes
    whole.findings += _check_pointers(location.folder) if location.is_folder else []
    return whole


def _check_pointers(folder: Folder) -> Iterator[Finding]:
    try:
        names = find_pointers(folder, look_beside(folder).files)
    except (FormatError, OSError) as error:
        yield Finding(_short(error, folder.file("")), folder.url, "it would go along with the weights", "fetch the checkpoint again")
        return
    for name in names:
        yield Finding("it is a Git LFS pointer, not the file", name, "what needs the file fails", "fetch it: git lfs pull")


def _examine_component(path: Location, root: str | None, *, data: bool, is_component: bool, variant: str | None) -> Examination:
    """Looks at one component of a checkpoint, which may be all of it; ``is_component``: what the whole says it need not say."""
    rank_sets = find_ranks(path)
    name = _detect_format(path, rank_sets, variant)
    examination = Examination(str(path), name)
    tables: dict[str, Mapping[str, AnyNode]] = {}
    checkpoint: Checkpoint | None = None
    is_by_file = path.is_folder and not containers()[name].holds  # else no file is a checkpoint by itself
    if is_by_file:
        tables = _read_files(path, name, root, rank_sets, examination, variant)
    ranks = next((one for one in rank_sets if one.holds(tables)), None)
    entries: dict[str, AnyNode] = {}
    try:
        checkpoint, own_ranks = open_with_ranks(path, root=root, components=False, variant=variant)
    except FormatError as error:
        if not examination.findings and ranks is None:
            examination.findings.append(Finding(_short(error, path), str(path), "nothing can read it", "download or write it again"))
        for table in tables.values():
            entries.update(table)
    else:
        entries, examination.format, ranks = dict(checkpoint.contents.entries), checkpoint.format, own_ranks or ranks
        if not tables:
            tables = dict(by_file(entries, own_ranks)) if own_ranks else {path.name: entries}
    examination.dtypes = dict(Counter(entry.spec.dtype.name for entry in entries.values()).most_common())
    examination.tensors, examination.nbytes = len(entries), sum(entry.spec.nbytes for entry in entries.values())
    examination.findings += _check_files(path, tables, examination.format, ranks.files if ranks else (), variant) if is_by_file else []
    if ranks is not None:
        rank_tables = {file: tables[file] for file in ranks.files if file in tables}
        examination.findings += check_ranks(rank_tables, ranks, partial(suggest_merging, path))
        entries = dict(next(iter(rank_tables.values()), {}))  # one stands for all
    specs = {tensor: entry.spec for tensor, entry in entries.items()}
    examination.findings += check_layers(specs)
    examination.findings += check_adapter(path.folder, str(path), specs) if path.is_folder else []
    by_rank = ranks is not None
    examination.findings += _check_quantities(path.folder, specs, checkpoint, is_component=is_component, by_rank=by_rank)
    if data and checkpoint:
        examination.findings += [*_check_data(checkpoint), *check_scales(checkpoint), *_check_replicas(checkpoint)]
    return examination


def _detect_format(path: Location, rank_sets: Sequence[RankSet], variant: str | None) -> str:
    """The container that a path holds, in folders of ranks if there is nothing else."""
    try:
        return detect_format(path, variant)
    except FormatError:
        files = _files_in_folders(rank_sets)
        if not files:
            raise
        return detect_format(path.folder.file(files[0]))


def _files_in_folders(rank_sets: Sequence[RankSet]) -> list[str]:
    """The files of ranks that have a folder each."""
    files = chain.from_iterable(ranks.files for ranks in rank_sets)
    return [file for file in files if "/" in file]


def _short(error: Exception, path: Location) -> str:
    """A reader's message without the path that it begins with, and what it says to do."""
    text = str(error).removeprefix(f"{path}: ")
    return text.rpartition("; ")[0] or text


# Files ---------------------------------------------------------------------------------------------------------------


def _read_files(
    path: Location, name: str, root: str | None, rank_sets: Sequence[RankSet], examination: Examination, variant: str | None
) -> dict[str, Mapping[str, AnyNode]]:
    """The tensors of each weight file by itself, so that one damaged file does not hide the others."""
    kind = containers()[name].names
    tables: dict[str, Mapping[str, AnyNode]] = {}
    names = [
        file
        for file in _names(path, kind, variant)
        if file.endswith(kind.suffixes) and not re.fullmatch(kind.others, file) and not file.startswith(".")
    ]
    files = [path.folder.file(file) for file in [*names, *_files_in_folders(rank_sets)]]
    for file, table in zip(files, each(files, partial(_read_file, root=root)), strict=True):
        if isinstance(table, StreamconvError):
            again = "download it again, or write it again from its source"
            examination.findings.append(Finding(_short(table, file), file.relative, "its tensors cannot be trusted", again))
        else:
            tables[file.relative] = table
    return tables


def _names(path: Location, kind: Names, variant: str | None) -> list[str]:
    """What lies in a folder, without files of other variants of the weights."""
    names = sorted(path.folder.list())
    try:
        return sorted(choose_variant(path, names, kind, variant)[1])
    except FormatError:
        return names  # opening it says what is wrong


def _read_file(file: Location, root: str | None) -> Mapping[str, AnyNode] | StreamconvError:
    """The tensors of a weight file, or why it cannot be read."""
    try:
        container = containers()[detect_format(file)]  # a suffix may be that of several
        settings = {"root": root} if container.nests else {}
        return container.read(file, **settings).entries
    except StreamconvError as error:
        return error


def _check_files(
    path: Location, tables: Mapping[str, Mapping[str, AnyNode]], name: str, ranks: Sequence[str], variant: str | None
) -> Iterator[Finding]:
    kind = containers()[name].names
    names = _names(path, kind, variant)
    weight_map: dict[str, str] = {}
    for index in filter(kind.is_index, names):
        try:
            raw = read_json(path.folder.file(index), MAX_JSON, "an index")
            weight_map = raw["weight_map"]
            total_size = (raw.get("metadata") or {}).get("total_size")
            list(map(str.lower, weight_map.values()))  # which raises TypeError where one is no text
        except (StreamconvError, KeyError, TypeError, AttributeError) as error:
            yield Finding(
                f"it cannot be read ({_short(error, path.folder.file(index))})",
                index,
                "loaders find tensors by it",
                "write it again, for instance by a re-shard",
            )
            weight_map = {}
            continue
        files_of_index = set(weight_map.values())
        yield from _check_index(index, weight_map, tables, names)
        entries = chain.from_iterable(tables[file].values() for file in files_of_index if file in tables)
        nbytes = sum(entry.spec.nbytes for entry in entries)
        if total_size is not None and total_size != nbytes and files_of_index <= set(tables):
            what = f"total_size says {total_size}, the tensors take {nbytes} bytes"
            yield Finding(what, index, "progress and disk checks go by it", "write it again")
        if kind.single in names:
            what = f"{kind.single} is there beside it"
            yield Finding(what, index, "loaders take the single file and ignore the index", "remove the one that is stale")
    places: defaultdict[str, list[str]] = defaultdict(list)
    for file, table in tables.items():
        for tensor in table if file not in ranks else ():
            places[tensor].append(file)
        if not table:
            yield Finding("it holds no tensor", file, "a shard without tensors is a sign of a failed write", "remove it, or write it again")
    files_of_index = set(weight_map.values())
    for tensor, files in places.items():
        if len(files) > 1 and (not weight_map or sum(file in files_of_index for file in files) > 1):
            yield Finding(
                f"it is in {' and '.join(files)}", tensor, "which one counts depends on the loader", "remove the files that do not belong"
            )
    yield from _check_numbers(names, kind)
    for file in names:
        if file.endswith((".partial", f"{STATE}{EARLIER}")):
            yield Finding("it is what an interrupted conversion left", file, "the checkpoint is not complete", _read_advice(path.folder))
    if path.folder.has(f"{STATE}/{LOG}"):
        yield Finding("a conversion into it is not done", f"{STATE}/{LOG}", "the checkpoint is not complete", _read_advice(path.folder))


def _read_advice(folder: Folder) -> str:
    """What the log of a conversion says that is to be done to end it, or what is usual."""
    try:
        text, _ = read_bytes(folder.file(f"{STATE}/{LOG}"), 0, FIRST_LINE, "a log")
    except StreamconvError:
        text = b""
    return read_head(text).get("advice", "rerun with --resume or --overwrite")


def _check_index(
    index: str, weight_map: Mapping[str, str], tables: Mapping[str, Mapping[str, AnyNode]], names: list[str]
) -> Iterator[Finding]:
    """Files and tensors that an index names and that are not there, and those that it does not name."""
    again = "download the files again, or write the index again"
    files_of_index = set(weight_map.values())
    for file in sorted(files_of_index):
        if file not in names:
            yield Finding(f"it names {file}, which is not there", index, "its tensors are missing", "download it")
    absent = [tensor for tensor, file in weight_map.items() if file in tables and tensor not in tables[file]]
    if absent:
        yield Finding(f"{weight_map[absent[0]]} does not hold it{_more(absent)}", absent[0], f"{index} says that it does", again)
    tensors = chain.from_iterable(table for file, table in tables.items() if file in files_of_index)
    extra = [tensor for tensor in tensors if tensor not in weight_map]
    if extra:
        yield Finding(f"{index} does not name it{_more(extra)}", extra[0], "loaders will not find it", again)
    for file in sorted(set(tables) - files_of_index):
        yield Finding(f"{index} does not name it", file, "it may be of another version of the model", "remove it if it is stale")


def _check_numbers(names: list[str], kind: Any) -> Iterator[Finding]:
    """Whether numbered shards are all there."""
    sets: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
    for name in names:
        match = kind.shard(name)
        if match:
            number = int(name.removeprefix(match["stem"]).lstrip("-").split("-")[0])
            sets[match["stem"], int(match["total"])].add(number)
    for (stem, total), present in sets.items():
        absent = sorted(set(range(1, total + 1)) - present)
        if absent:
            what = f"{len(present)} of {total} are there, number {absent[0]} is not"
            yield Finding(what, f"{stem}-*-of-{total:05d}", "its tensors are missing", "download it")
    stems = {stem for stem, _ in sets}
    if len(sets) > len(stems):
        totals = ", ".join(str(total) for _, total in sorted(sets))
        yield Finding(f"shards of sets of {totals} files", "shards", "files of two versions are mixed", "remove those that are stale")


# Config --------------------------------------------------------------------------------------------------------------


def _check_quantities(
    folder: Folder, specs: Mapping[str, TensorSpec], checkpoint: Checkpoint | None, *, is_component: bool, by_rank: bool
) -> Iterator[Finding]:
    """What config.json says, by itself and against the tensors.

    Args:
        folder: that it lies in.
        specs: the tensors.
        checkpoint: they are of, if that can be opened.
        is_component: it need not say what the whole says.
        by_rank: the tensors are parts.
    """
    try:
        whole = Stated(read_config(folder))
    except FormatError as error:
        yield Finding(_short(error, folder.file(CONFIG)), CONFIG, "no library can build the model", "mend it, or get it again")
        return
    if not whole.table:
        if not any(folder.has(name) for name in _OTHER_CONFIGS):
            why, do = "no library knows what model this is", "get it from where the weights come from"
            yield Finding("it is missing", CONFIG, why, do, problem=False)
        return
    if folder.has(_MODELOPT):
        whole = Stated({"quantization_config": {"quant_method": "modelopt"}, **whole.table})
    yield from check_types(whole, specs) if by_rank else check_config(whole, specs, checkpoint)
    if checkpoint is not None and not by_rank and not is_component:
        yield from check_quantization(checkpoint)
    names = set(folder.list())
    if not is_component and _CLASS not in whole.table and not (whole.texts("architectures") and whole.text("model_type")):
        what, why = "it lacks model_type or architectures", "libraries choose the model's class by them"
        yield Finding(what, CONFIG, why, "add them", problem=not whole.table.keys().isdisjoint(_TRANSFORMERS))
    code = [value.split(".")[0] for value in whole.texts("auto_map") if "--" not in value]
    for module in sorted(set(code)):
        if f"{module}.py" not in names:
            what = f"auto_map names {module}.py, which is not there"
            yield Finding(what, CONFIG, "the model's own code is missing", "get it from its repository")
    if not is_component and any(_VOCABULARY.search(name) for name in specs) and names.isdisjoint(_TOKENIZERS):
        yield Finding("no tokenizer file is there", folder.url, "text cannot be encoded", "copy the tokenizer's files here", problem=False)


# Data ----------------------------------------------------------------------------------------------------------------


def _check_data(checkpoint: Checkpoint) -> Iterator[Finding]:
    """NaN, Inf, and tensors that are all alike, from one pass over the floating tensors."""
    import numpy as np

    for name, entry in checkpoint.items():
        if not entry.spec.numel or not entry.spec.dtype.floating or entry.spec.dtype.is_packed:
            continue
        bad, least, most = 0, float("inf"), float("-inf")
        for piece in entry.pieces(PIECE):
            with np.errstate(all="ignore"):  # what is not finite is counted
                values = piece.astype(np.float32)
            finite = values[np.isfinite(values)]
            bad += values.size - finite.size
            if finite.size:
                least, most = min(least, float(finite.min())), max(most, float(finite.max()))
        if bad:
            yield Finding(f"{bad} of {entry.spec.numel} values are NaN or infinite", name, "they spread through the model", "get it again")
        elif least == most and len(entry.shape) > 1 and entry.spec.numel > 1:
            what = "all values are zero" if least == 0 else f"all values are {least:g}"
            yield Finding(what, name, "a matrix of one value has not been trained, or was lost", "compare it with its source")


def _check_replicas(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Tensors that several ranks hold, and not alike."""
    pairs = {f"{name} #{number}": (one, other) for number, (one, other, name) in enumerate(checkpoint.contents.replicas)}
    if not pairs:
        return
    difference = compare({key: one for key, (one, _) in pairs.items()}, {key: other for key, (_, other) in pairs.items()}, norms=False)
    for name in dict.fromkeys(row.name.rpartition(" #")[0] for row in difference.tensors):
        yield Finding("ranks hold other values of the same part", name, "the first of them is read", "take an earlier checkpoint")


def _more(names: list[str]) -> str:
    return f", nor {len(names) - 1} more" if len(names) > 1 else ""
