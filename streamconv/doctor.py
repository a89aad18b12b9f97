"""The health of a checkpoint, from headers, index and config alone; with ``data`` also from the numbers, streamed."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from streamconv.checkpoint import CONFIG, CONTAINERS, Checkpoint, detect_format, find_checkpoint, open_checkpoint, read_config
from streamconv.dtypes import TensorSpec
from streamconv.engine.lines import read_line
from streamconv.errors import FormatError, StreamconvError
from streamconv.folder import find_pointers, find_weighted, look_beside, within
from streamconv.formats.files import read_bytes
from streamconv.graph import AnyNode
from streamconv.storage.remote import Location, each, names_in
from streamconv.text import join_lines
from streamconv.units import format_size

FIRST_LINE = 1 << 20  # bytes of a journal in which its advice stands
PIECE = 8 << 20  # bytes of a tensor that are looked at together
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
_CONVENTIONAL = re.compile(
    r"(llama|mistral|ministral|mixtral|qwen[23]|gemma[23]?|cohere2?|olmo[23e]?|granite|glm4?|internlm[23]?|yi|deepseek_v[23]|starcoder2|smollm3)"
    r"(_moe)?(_text)?"
)
_TEXT_LAYERS = re.compile(r"((model|language_model|text_model|transformer|decoder|gpt_neox|backbone|base_model)\.)*(layers|h|blocks)")
_LAYER = re.compile(r"^(.*?\b(?:layers?|h|blocks?))\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Finding:
    """What is wrong, where, why it matters, and what to do. ``problem`` is false for what is only worth knowing."""

    what: str
    where: str
    why: str
    do: str
    problem: bool = True

    def __str__(self) -> str:
        return f"{'problem' if self.problem else 'note'}: {self.where}: {self.what}. {self.why}; {self.do}."


@dataclass
class Examination:
    """What was found, and what the checkpoint consists of."""

    path: str
    format: str
    findings: list[Finding] = field(default_factory=list)
    dtypes: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    nbytes: int = 0
    recipes: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not any(finding.problem for finding in self.findings)

    def summary(self) -> dict[str, Any]:
        """What ``doctor --json`` prints."""
        return {"healthy": self.healthy, **asdict(self)}

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {count}" for name, count in self.dtypes.items())
        lines = [*map(str, self.findings), f"{self.path}: {self.format}, {self.tensors} tensors, {format_size(self.nbytes)} ({kinds})"]
        lines += [f"recipes that fit: {', '.join(self.recipes)}"] if self.recipes else []
        problems = sum(finding.problem for finding in self.findings)
        return join_lines([*lines, (f"{problems} problem{'s' * (problems > 1)}" if problems else "healthy")])


def examine(path: str | os.PathLike[str], *, data: bool = False) -> Examination:
    """Looks at a checkpoint, with its components in folders.

    Raises:
        StreamconvError: there is nothing at ``path`` that could be one.
    """
    path, _ = find_checkpoint(path)
    whole = Examination(str(path), "")
    try:
        folders = find_weighted(path)
    except FormatError as error:
        whole.findings.append(Finding(_short(error, path), str(path), "components of the model are not found", "mend it, or get it again"))
        folders = []
    for folder in folders or [""]:
        found = _examine_component(within(path, folder), data=data, is_component=folder != "")
        whole.format = whole.format or found.format
        whole.findings += (replace(finding, where=f"{folder}: {finding.where}") if folder else finding for finding in found.findings)
        whole.dtypes = dict((Counter(whole.dtypes) + Counter(found.dtypes)).most_common())
        whole.tensors, whole.nbytes = whole.tensors + found.tensors, whole.nbytes + found.nbytes
    whole.findings += _check_pointers(path) if path.is_dir() else []
    return whole


def _check_pointers(path: Location) -> Iterator[Finding]:
    try:
        found = find_pointers(path, look_beside(path).files)
    except (FormatError, OSError) as error:
        yield Finding(_short(error, path), str(path), "it would go along with the weights", "fetch the checkpoint again")
        return
    for name in found:
        yield Finding("it is a Git LFS pointer, not the file", name, "what needs the file fails", "fetch it: git lfs pull")


def _examine_component(path: Location, *, data: bool, is_component: bool) -> Examination:
    """Looks at one component of a checkpoint, which may be all of it; ``is_component``: what the whole says it need not say."""
    name = detect_format(path)
    found = Examination(str(path), name)
    tables: dict[str, Mapping[str, AnyNode]] = {}
    checkpoint: Checkpoint | None = None
    if path.is_dir():
        tables = _read_files(path, name, found)
    try:
        checkpoint = open_checkpoint(path, components=False)
    except FormatError as error:
        if not found.findings:
            found.findings.append(Finding(_short(error, path), str(path), "nothing can read it", "download or write it again"))
        entries = {tensor: entry for table in tables.values() for tensor, entry in table.items()}
    else:
        entries, found.format = dict(checkpoint.contents.entries), checkpoint.format
        tables = tables or {path.name: entries}
    found.dtypes = dict(Counter(entry.spec.dtype.name for entry in entries.values()).most_common())
    found.tensors, found.nbytes = len(entries), sum(entry.spec.nbytes for entry in entries.values())
    specs = {tensor: entry.spec for tensor, entry in entries.items()}
    found.findings += _check_files(path, tables, found.format) if path.is_dir() else []
    found.findings += _check_layers(specs)
    found.findings += _check_quantities(path if path.is_dir() else path.parent, specs, checkpoint, is_component=is_component)
    if data and checkpoint:
        found.findings += _check_data(checkpoint)
    return found


def _short(error: Exception, path: Location) -> str:
    """A reader's message without the path that it begins with, and what it says to do."""
    text = str(error).removeprefix(f"{path}: ")
    return text.rpartition("; ")[0] or text


# Files ---------------------------------------------------------------------------------------------------------------


def _read_files(path: Location, name: str, found: Examination) -> dict[str, Mapping[str, AnyNode]]:
    """The tensors of each weight file by itself, so that one damaged file does not hide the others."""
    kind = CONTAINERS[name].names
    tables: dict[str, Mapping[str, AnyNode]] = {}
    files = [
        path / file
        for file in sorted(names_in(path))
        if file.endswith(kind.suffixes) and not re.fullmatch(kind.others, file) and not file.startswith(".")
    ]
    for file, read in zip(files, each(files, lambda file: _read_file(file, name)), strict=True):
        if isinstance(read, StreamconvError):
            again = "download it again, or write it again from its source"
            found.findings.append(Finding(_short(read, file.absolute()), file.name, "its tensors cannot be trusted", again))
        else:
            tables[file.name] = read
    return tables


def _read_file(file: Location, name: str) -> Mapping[str, AnyNode] | StreamconvError:
    try:
        own = detect_format(file) if name == "mindspore" else name  # whose files are called as many of torch.save are
        return CONTAINERS[own].read(file).entries
    except StreamconvError as error:
        return error


def _check_files(path: Location, tables: Mapping[str, Mapping[str, AnyNode]], name: str) -> Iterator[Finding]:
    kind = CONTAINERS[name].names
    names = sorted(entry.name for entry in path.iterdir())
    weight_map: dict[str, str] = {}
    for index in filter(kind.is_index, names):
        try:
            raw = json.loads((path / index).read_text(encoding="utf-8"))
            weight_map = raw["weight_map"]
            stated = (raw.get("metadata") or {}).get("total_size")
            listed = set(map(str.lower, weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            yield Finding(f"it cannot be read ({error})", index, "loaders find tensors by it", "write it again, for instance by a re-shard")
            weight_map = {}
            continue
        yield from _check_index(index, weight_map, tables, names)
        real = sum(entry.spec.nbytes for file in set(weight_map.values()) for entry in tables.get(file, {}).values())
        if stated is not None and stated != real and set(weight_map.values()) <= set(tables):
            yield Finding(
                f"total_size says {stated}, the tensors take {real} bytes", index, "progress and disk checks go by it", "write it again"
            )
        if kind.single in names:
            what = f"{kind.single} is there beside it"
            yield Finding(what, index, "loaders take the single file and ignore the index", "remove the one that is stale")
    places: defaultdict[str, list[str]] = defaultdict(list)
    for file, table in tables.items():
        for tensor in table:
            places[tensor].append(file)
        if not table:
            yield Finding("it holds no tensor", file, "a shard without tensors is a sign of a failed write", "remove it, or write it again")
    listed = set(weight_map.values())
    for tensor, files in places.items():
        if len(files) > 1 and (not weight_map or sum(file in listed for file in files) > 1):
            yield Finding(
                f"it is in {' and '.join(files)}", tensor, "which one counts depends on the loader", "remove the files that do not belong"
            )
    yield from _check_numbers(names, kind)
    for rest in (file for file in names if file.endswith((".partial", ".streamconv.json", ".streamconv.json.new"))):
        yield Finding("it is what an interrupted conversion left", rest, "the checkpoint is not complete", _read_advice(path / rest))


def _read_advice(path: Location) -> str:
    """What the journal of a conversion says that is to be done to end it; of an unfinished file what is usual."""
    try:
        text, _ = read_bytes(path, 0, FIRST_LINE, "a journal")
    except StreamconvError:
        text = b""
    line = read_line(text.partition(b"\n")[0] + b"\n") or {}
    return line.get("advice", "rerun with --resume or --overwrite")


def _check_index(
    index: str, weight_map: Mapping[str, str], tables: Mapping[str, Mapping[str, AnyNode]], names: list[str]
) -> Iterator[Finding]:
    again = "download the files again, or write the index again"
    for file in sorted(set(weight_map.values())):
        if file not in names:
            yield Finding(f"it names {file}, which is not there", index, "its tensors are missing", "download it")
    lost = [tensor for tensor, file in weight_map.items() if file in tables and tensor not in tables[file]]
    if lost:
        yield Finding(f"{weight_map[lost[0]]} does not hold it{_more(lost)}", lost[0], f"{index} says that it does", again)
    known = set(weight_map.values())
    extra = [tensor for file, table in tables.items() if file in known for tensor in table if tensor not in weight_map]
    if extra:
        yield Finding(f"{index} does not name it{_more(extra)}", extra[0], "loaders will not find it", again)
    for file in sorted(set(tables) - known):
        yield Finding(f"{index} does not name it", file, "it may be of another version of the model", "remove it if it is stale")


def _check_numbers(names: list[str], kind: Any) -> Iterator[Finding]:
    """Whether numbered shards are all there."""
    sets: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
    for name in names:
        if match := kind.shard(name):
            number = int(name.removeprefix(match["stem"]).lstrip("-").split("-")[0])
            sets[match["stem"], int(match["total"])].add(number)
    for (stem, total), present in sets.items():
        if missing := sorted(set(range(1, total + 1)) - present):
            what = f"{len(present)} of {total} are there, number {missing[0]} is not"
            yield Finding(what, f"{stem}-*-of-{total:05d}", "its tensors are missing", "download it")
    stems = {stem for stem, _ in sets}
    if len(sets) > len(stems):
        totals = ", ".join(str(total) for _, total in sorted(sets))
        yield Finding(f"shards of sets of {totals} files", "shards", "files of two versions are mixed", "remove those that are stale")


# Config --------------------------------------------------------------------------------------------------------------


def _check_layers(specs: Mapping[str, TensorSpec]) -> Iterator[Finding]:
    """Layers that are missing, or lack what the others have."""
    layers: defaultdict[str, defaultdict[int, dict[str, TensorSpec]]] = defaultdict(lambda: defaultdict(dict))
    for name, spec in specs.items():
        if match := _LAYER.match(name):
            layers[match[1]][int(match[2])][match[3]] = spec
    for stem, found in layers.items():
        numbers = sorted(found)
        # Layers share names of modules; what does not is a sequence of unlike modules, of which some have no tensor.
        if len(found) < 3 or not any("." in rest for rest in set.intersection(*map(set, found.values()))):
            continue
        gap = next((k for k in range(numbers[-1]) if k not in found), None)
        if gap is not None:
            yield Finding(f"layer {gap} is missing, {numbers[-1]} is there", stem, "the model cannot run", "find the file that has it")
        kinds = Counter(frozenset((rest, spec.shape) for rest, spec in layer.items()) for layer in found.values())
        usual, count = kinds.most_common(1)[0]
        if count <= max(2, len(found) // 2):
            continue
        for k in numbers[1:-1]:  # the first and the last are often special
            here = frozenset((rest, spec.shape) for rest, spec in found[k].items())
            lost = [rest for rest, _ in usual - here]
            if len(lost) != 1 or len(here - usual) > 1:
                continue  # a kind of its own
            if lost[0] not in found[k]:
                what = "it is missing, all other layers have it"
                yield Finding(what, f"{stem}.{k}.{lost[0]}", "a loader would make it up", "find the file that has it")
            else:
                what = f"it has shape {found[k][lost[0]].shape}, the others {dict(usual)[lost[0]]}"
                yield Finding(what, f"{stem}.{k}.{lost[0]}", "it cannot be of this model", "get that file again")


def _check_quantities(
    folder: Location, specs: Mapping[str, TensorSpec], checkpoint: Checkpoint | None, *, is_component: bool
) -> Iterator[Finding]:
    """What config.json says, against the tensors."""
    try:
        whole = read_config(folder)
    except FormatError as error:
        yield Finding(_short(error, folder / CONFIG), CONFIG, "no library can build the model", "mend it, or get it again")
        return
    if not whole:
        yield Finding(
            "it is missing", CONFIG, "no library knows what model this is", "get it from where the weights come from", problem=False
        )
        return
    text = whole.get("text_config") if isinstance(whole.get("text_config"), dict) else whole
    assert text is not None
    yield from _check_embedding(whole, text, specs, checkpoint)
    yield from _check_shapes(text, specs)
    yield from _check_types(whole, specs)
    if not is_component and (not whole.get("architectures") or not whole.get("model_type")):
        yield Finding("it lacks model_type or architectures", CONFIG, "libraries choose the model's class by them", "add them")
    for code in sorted(
        {str(value).split(".")[0].split("--")[-1] for value in (whole.get("auto_map") or {}).values() if isinstance(value, str)}
    ):
        if not (folder / f"{code}.py").exists() and "--" not in str(whole.get("auto_map")):
            yield Finding(
                f"auto_map names {code}.py, which is not there", CONFIG, "the model's own code is missing", "get it from its repository"
            )
    vocabulary = any(re.search(r"(embed_tokens|wte|word_embeddings|tok_embeddings)\.weight$", name) for name in specs)
    if vocabulary and not is_component and not any((folder / name).exists() for name in _TOKENIZERS):
        yield Finding("no tokenizer file is there", str(folder), "text cannot be encoded", "copy the tokenizer's files here")


def _is_conventional(text: Mapping[str, Any]) -> bool:
    """Whether the keys of a config mean what they do for Llama; other families have heads and words of further kinds."""
    return bool(_CONVENTIONAL.fullmatch(str(text.get("model_type"))))


def _embedding(specs: Mapping[str, TensorSpec]) -> str | None:
    found = (name for name in specs if re.search(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings)\.weight$", name))
    return next((name for name in found if "visual" not in name and "vision" not in name), None)


def _check_embedding(
    whole: Mapping[str, Any], text: Mapping[str, Any], specs: Mapping[str, TensorSpec], checkpoint: Checkpoint | None
) -> Iterator[Finding]:
    name = _embedding(specs)
    if name is None or len(specs[name].shape) != 2:
        return
    rows, columns = specs[name].shape
    vocabulary, hidden = text.get("vocab_size"), text.get("hidden_size") or text.get("n_embd") or text.get("d_model")
    if isinstance(vocabulary, int) and rows < vocabulary:
        what = f"it has {rows} rows, vocab_size says {vocabulary}"
        yield Finding(
            what, name, "tokens beyond its rows have no embedding", "set vocab_size to the rows, or resize it (--set resize_vocab)"
        )
    elif isinstance(vocabulary, int) and rows != vocabulary and _is_conventional(text):
        what = f"it has {rows} rows, vocab_size says {vocabulary}"
        yield Finding(what, name, "loaders refuse the shape", "set vocab_size to the rows")
    if isinstance(hidden, int) and columns != hidden and (_is_conventional(text) or columns not in text.values()):
        yield Finding(
            f"it has {columns} columns, hidden_size says {hidden}", name, "loaders refuse the shape", "use the config of this model"
        )
    head = next(
        (other for other in specs if re.search(r"^((model|language_model|text_model|transformer)\.)*(lm_head|output)\.weight$", other)),
        None,
    )
    tied = whole.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    generates = any(
        str(kind).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for kind in whole.get("architectures") or []
    )
    known = checkpoint.ties if checkpoint else {}
    if head and tied is True and specs[head].shape != specs[name].shape:
        yield Finding(f"{specs[head]}, tied to {name}, {specs[name]}", head, "tied tensors are one", "set tie_word_embeddings to false")
    elif head and tied is True:
        what = f"it is stored beside {name}, and config.json ties the two"
        yield Finding(what, head, "loaders take one of them for both", "keep it only if they differ on purpose", problem=False)
    elif tied is False and head is None and generates and _is_conventional(text) and not any("lm_head" in other for other in known):
        what = "there is no head, and tie_word_embeddings is false"
        yield Finding(
            what, "lm_head.weight", "loaders would make one up at random", "set tie_word_embeddings to true if the embedding is the head"
        )


def _check_shapes(text: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Iterator[Finding]:
    """Layers, heads and widths."""
    stems = Counter(match[1] for name in specs if (match := _LAYER.match(name)) and _TEXT_LAYERS.fullmatch(match[1]))
    layers = text.get("num_hidden_layers") or text.get("n_layer")
    if stems and isinstance(layers, int):
        stem = stems.most_common(1)[0][0]
        present = 1 + max(int(match[2]) for name in specs if (match := _LAYER.match(name)) and match[1] == stem)
        extra = text.get("num_nextn_predict_layers") or 0
        if not layers <= present <= layers + extra and (_is_conventional(text) or present not in text.values()):
            yield Finding(
                f"{present} layers are there, config.json says {layers}", stem, "layers would be missing or ignored", "use the right config"
            )
    if not _is_conventional(text):
        return
    experts = text.get("num_local_experts") or text.get("n_routed_experts") or text.get("num_experts")
    numbers = [int(match[1]) for name in specs if (match := re.search(r"\.experts\.(\d+)\.", name))]
    if numbers and isinstance(experts, int) and max(numbers) + 1 != experts:
        what = f"{max(numbers) + 1} experts are there, config.json says {experts}"
        yield Finding(what, "experts", "experts would be missing or ignored", "use the right config")
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1 or text.get("qk_nope_head_dim"):
        return
    size = text.get("head_dim") or hidden // heads
    groups = text.get("num_key_value_heads") or heads
    width = text.get("intermediate_size")
    wanted = {
        r"layers\.\d+\.self_attn\.q_proj\.weight": (heads * size, "num_attention_heads"),
        r"layers\.\d+\.self_attn\.[kv]_proj\.weight": (groups * size, "num_key_value_heads"),
        r"layers\.\d+\.mlp\.(gate|up)_proj\.weight": (width, "intermediate_size"),
    }
    for pattern, (rows, key) in wanted.items():
        fitting = (match for name in specs if (match := _LAYER.match(name)) and _TEXT_LAYERS.fullmatch(match[1]))
        name = next((match.string for match in fitting if re.search(pattern, match.string)), None)
        if name and isinstance(rows, int) and specs[name].shape[:1] not in ((rows,), (2 * rows,)):
            what = f"it has {specs[name].shape[0]} rows, {rows} follow from {key}"
            yield Finding(what, name, "loaders refuse the shape", "use the config of this model")


def _check_types(whole: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Iterator[Finding]:
    """Dtypes against what config.json says of them."""
    kinds = Counter(spec.dtype.name for spec in specs.values() if len(spec.shape) > 1)
    floating = {kind: count for kind, count in kinds.items() if "float" in kind and not kind.startswith(("float8", "float4", "float6"))}
    stated = str(whole.get("dtype") or whole.get("torch_dtype") or "").removeprefix("torch.")
    method = str((whole.get("quantization_config") or {}).get("quant_method", ""))
    narrow = [name for name, spec in specs.items() if spec.dtype.name.startswith(("float8", "float4"))]
    if stated and floating and stated not in floating and stated in ("float32", "float16", "bfloat16") and not method:
        most = max(floating, key=lambda kind: floating[kind])
        yield Finding(
            f"it says {stated}, the tensors are {most}", CONFIG, "loading casts them, or takes twice the memory", f"set dtype to {most}"
        )
    if narrow and not method:
        yield Finding(
            f"{narrow[0]} is {specs[narrow[0]].dtype}, and no quantization_config is there",
            CONFIG,
            "it would be read as plain numbers",
            "add it",
        )
    if method == "fp8" and not narrow:
        what = "quantization_config says fp8, and no tensor is"
        yield Finding(what, CONFIG, "loaders would look for scales", "remove quantization_config")
    for name in narrow:
        if method == "fp8" and name.endswith(".weight") and f"{name}_scale_inv" not in specs and f"{name}_scale" not in specs:
            yield Finding("it has no scale beside it", name, "its values cannot be told", "find the file with its weight_scale_inv")
            break
    if len(floating) > 1:
        census = ", ".join(f"{count} {kind}" for kind, count in floating.items())
        yield Finding(f"matrices of {census}", "dtypes", "mixed precision is sometimes meant", "use --dtype for one", problem=False)


# Data ----------------------------------------------------------------------------------------------------------------


def _check_data(checkpoint: Checkpoint) -> Iterator[Finding]:
    """NaN, Inf, and tensors that are all alike, from one pass over the floating tensors."""
    import torch

    for name, entry in checkpoint.items():
        if not entry.spec.numel or not getattr(torch, entry.dtype, torch.int8).is_floating_point:
            continue
        bad, least, most = 0, float("inf"), float("-inf")
        for piece in entry.pieces(PIECE):
            values = piece.float()
            finite = values[values.isfinite()]
            bad += values.numel() - finite.numel()
            if finite.numel():
                least, most = min(least, float(finite.min())), max(most, float(finite.max()))
        if bad:
            yield Finding(f"{bad} of {entry.spec.numel} values are NaN or infinite", name, "they spread through the model", "get it again")
        elif least == most and len(entry.shape) > 1 and entry.spec.numel > 1:
            what = "all values are zero" if least == 0 else f"all values are {least:g}"
            yield Finding(what, name, "a matrix of one value has not been trained, or was lost", "compare it with its source")


def _more(names: list[str]) -> str:
    return f", nor {len(names) - 1} more" if len(names) > 1 else ""
