"""What a checkpoint's tensors and its config.json say of each other, and of one another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from streamconv.checkpoint.opening import CONFIG, Checkpoint
from streamconv.diagnose.findings import Finding
from streamconv.dtypes import TensorSpec
from streamconv.formats.files import short

_CONVENTIONAL = re.compile(
    r"(llama|mistral|ministral|mixtral|qwen[23]|gemma[23]?|cohere2?|olmo[23e]?|granite|glm4?|internlm[23]?|yi|deepseek_v[23]|starcoder2|smollm3)"
    r"(_moe)?(_text)?"
)
_TEXT_LAYERS = re.compile(r"((model|language_model|text_model|transformer|decoder|gpt_neox|backbone|base_model)\.)*(layers|h|blocks)")
_LAYER = re.compile(r"^(.*?\b(?:layers?|h|blocks?))\.(\d{1,9})\.(.+)$", re.DOTALL)
_PADDED = "embedding.word_embeddings.weight"  # Megatron's, which has rows beyond its vocabulary
_HEAD = re.compile(r"^((model|language_model|text_model|transformer)\.)*(lm_head|output|output_layer)\.weight$")
_GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_NARROW = ("float8", "float4", "float6")
_QUANTIZATIONS = ("quantization_config", "compression_config", "quantization")  # keys under which configs say how tensors are quantized
_LARGEST = 2**40  # of any number that a config gives


class Stated:
    """What a config says, as far as it is of the kind that is wanted. A config is somebody's text: any value may be anything."""

    def __init__(self, table: object) -> None:
        self.table: dict[str, Any] = table if isinstance(table, dict) else {}

    def number(self, *keys: str) -> int | None:
        """The first of these that is a whole number from 1 on."""
        for key in keys:
            value = self.table.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST:
                return value
        return None

    def text(self, *keys: str) -> str:
        """The first of these that is a text and not empty, else an empty one."""
        values = (self.table.get(key) for key in keys)
        return next((value for value in values if isinstance(value, str) and value), "")

    def texts(self, key: str) -> list[str]:
        """The texts in a list, or among the values of an object."""
        value = self.table.get(key)
        if isinstance(value, dict):
            value = list(value.values())
        items = value if isinstance(value, list) else []
        return [item for item in items if isinstance(item, str)]

    def flag(self, key: str) -> bool | None:
        """True or false; None where it says neither."""
        value = self.table.get(key)
        return value if isinstance(value, bool) else None

    def part(self, key: str) -> Stated:
        """The object below a key."""
        return Stated(self.table.get(key))

    def says(self, number: int) -> bool:
        """Whether any of its values is this number."""
        return any(isinstance(value, int) and value == number for value in self.table.values())

    @property
    def is_conventional(self) -> bool:
        """Whether its keys mean what they do for Llama; other families have heads and words of further kinds."""
        return bool(_CONVENTIONAL.fullmatch(self.text("model_type")))


_NUMBERS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")


def check_config(whole: Stated, specs: Mapping[str, TensorSpec], checkpoint: Checkpoint | None) -> Iterator[Finding]:
    """What config.json says, against the tensors."""
    text = whole.part("text_config") if whole.part("text_config").table else whole
    yield from _check_kinds(text)
    yield from _check_embedding(whole, text, specs, checkpoint)
    yield from _check_shapes(text, specs)
    yield from check_types(whole, specs)


def _check_kinds(text: Stated) -> Iterator[Finding]:
    """Sizes that are no numbers, where they must be."""
    for key in _NUMBERS if text.is_conventional else ():
        value = text.table.get(key)
        if value is not None and text.number(key) is None:
            what = f"{key} is {short.repr(value)}, not a whole number from 1 on"
            yield Finding(what, CONFIG, "no library can build the model", "mend it, or use the config of this model")


def check_layers(specs: Mapping[str, TensorSpec]) -> Iterator[Finding]:
    """Layers that are missing, or lack what the others have."""
    layers: dict[str, dict[int, dict[str, TensorSpec]]] = {}
    for name, spec in specs.items():
        match = _LAYER.match(name)
        if match:
            stem, number, rest = match.groups()
            layers.setdefault(stem, {}).setdefault(int(number), {})[rest] = spec
    for stem, layer_specs in layers.items():
        numbers = sorted(layer_specs)
        # Layers share names of modules; what does not is a sequence of unlike modules, of which some have no tensor.
        if len(layer_specs) < 3 or not any("." in rest for rest in set.intersection(*map(set, layer_specs.values()))):
            continue
        gap = next((k for k in range(numbers[-1]) if k not in layer_specs), None)
        if gap is not None:
            yield Finding(f"layer {gap} is missing, {numbers[-1]} is there", stem, "the model cannot run", "find the file that has it")
        kinds: Counter[frozenset[tuple[str, tuple[int, ...]]]] = Counter()
        for layer in layer_specs.values():
            kinds[frozenset((rest, spec.shape) for rest, spec in layer.items())] += 1
        usual, count = kinds.most_common(1)[0]
        if count <= max(2, len(layer_specs) // 2):
            continue
        for k in numbers[1:-1]:  # the first and the last are often special
            here = frozenset((rest, spec.shape) for rest, spec in layer_specs[k].items())
            absent = [rest for rest, _ in usual - here]
            if len(absent) != 1 or len(here - usual) > 1:
                continue  # a kind of its own
            if absent[0] not in layer_specs[k]:
                what = "it is missing, all other layers have it"
                yield Finding(what, f"{stem}.{k}.{absent[0]}", "a loader would make it up", "find the file that has it")
            else:
                what = f"it has shape {layer_specs[k][absent[0]].shape}, the others {dict(usual)[absent[0]]}"
                yield Finding(what, f"{stem}.{k}.{absent[0]}", "it cannot be of this model", "get that file again")


def _embedding(specs: Mapping[str, TensorSpec]) -> str | None:
    names = (name for name in specs if re.search(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings)\.weight$", name))
    return next((name for name in names if "visual" not in name and "vision" not in name), None)


def _check_embedding(whole: Stated, text: Stated, specs: Mapping[str, TensorSpec], checkpoint: Checkpoint | None) -> Iterator[Finding]:
    name = _embedding(specs)
    if name is None or len(specs[name].shape) != 2 or not specs[name].dtype.floating:
        return
    rows, columns = specs[name].shape
    vocabulary, hidden = text.number("vocab_size"), text.number("hidden_size", "n_embd", "d_model")
    what = f"it has {rows} rows, vocab_size says {vocabulary}"
    if vocabulary and rows < vocabulary:
        do = "set vocab_size to the rows, or resize it (--set resize_vocab)"
        yield Finding(what, name, "tokens beyond its rows have no embedding", do)
    elif vocabulary and rows != vocabulary and text.is_conventional and name != _PADDED:
        yield Finding(what, name, "loaders refuse the shape", "set vocab_size to the rows")
    if hidden and columns != hidden and (text.is_conventional or not text.says(columns)):
        what = f"it has {columns} columns, hidden_size says {hidden}"
        yield Finding(what, name, "loaders refuse the shape", "use the config of this model")
    head = next((other for other in specs if _HEAD.search(other)), None)
    is_tied = whole.flag("tie_word_embeddings")
    if is_tied is None:
        is_tied = text.flag("tie_word_embeddings")
    generates = any(kind.endswith(_GENERATING) for kind in whole.texts("architectures"))
    ties = checkpoint.ties if checkpoint else {}
    if head and is_tied and specs[head].shape != specs[name].shape:
        yield Finding(f"{specs[head]}, tied to {name}, {specs[name]}", head, "tied tensors are one", "set tie_word_embeddings to false")
    elif head and is_tied:
        what = f"it is stored beside {name}, and config.json ties the two"
        yield Finding(what, head, "loaders take one of them for both", "keep it only if they differ on purpose", problem=False)
    elif is_tied is False and head is None and generates and text.is_conventional and not any("lm_head" in other for other in ties):
        what = "there is no head, and tie_word_embeddings is false"
        do = "set tie_word_embeddings to true if the embedding is the head"
        yield Finding(what, "lm_head.weight", "loaders would make one up at random", do)


def _check_shapes(text: Stated, specs: Mapping[str, TensorSpec]) -> Iterator[Finding]:
    """Layers, heads and widths."""
    matches = (_LAYER.match(name) for name in specs)
    layer_names = [match for match in matches if match and _TEXT_LAYERS.fullmatch(match[1])]
    layers = text.number("num_hidden_layers", "n_layer")
    if layer_names and layers:
        stem = Counter(match[1] for match in layer_names).most_common(1)[0][0]
        present = 1 + max(int(match[2]) for match in layer_names if match[1] == stem)
        extra = text.number("num_nextn_predict_layers") or 0
        if not layers <= present <= layers + extra and (text.is_conventional or not text.says(present)):
            what = f"{present} layers are there, config.json says {layers}"
            yield Finding(what, stem, "layers would be missing or ignored", "use the right config")
    if not text.is_conventional:
        return
    experts = text.number("num_local_experts", "n_routed_experts", "num_experts")
    expert_names = (re.search(r"\.experts\.(\d{1,9})\.", name) for name in specs)
    numbers = [int(match[1]) for match in expert_names if match]
    if numbers and experts and max(numbers) + 1 != experts:
        what = f"{max(numbers) + 1} experts are there, config.json says {experts}"
        yield Finding(what, "experts", "experts would be missing or ignored", "use the right config")
    heads, hidden = text.number("num_attention_heads"), text.number("hidden_size")
    if heads is None or hidden is None or text.number("qk_nope_head_dim"):
        return
    size = text.number("head_dim") or hidden // heads
    groups = text.number("num_key_value_heads") or heads
    rows_of = {
        r"layers\.\d+\.self_attn\.q_proj\.weight$": (heads * size, "num_attention_heads"),
        r"layers\.\d+\.self_attn\.[kv]_proj\.weight$": (groups * size, "num_key_value_heads"),
        r"layers\.\d+\.mlp\.(gate|up)_proj\.weight$": (text.number("intermediate_size"), "intermediate_size"),
    }
    for pattern, (rows, key) in rows_of.items():
        name = next((match.string for match in layer_names if re.search(pattern, match.string)), None)
        if name is None or rows is None or len(specs[name].shape) != 2 or not specs[name].dtype.floating or f"{name}.absmax" in specs:
            continue  # what is packed, in whatever dtype, has a shape of its own
        if specs[name].shape[0] not in (rows, 2 * rows):
            what = f"it has {specs[name].shape[0]} rows, {rows} follow from {key}"
            yield Finding(what, name, "loaders refuse the shape", "use the config of this model")


def check_types(whole: Stated, specs: Mapping[str, TensorSpec]) -> Iterator[Finding]:
    """Dtypes against what config.json says of them."""
    kinds = Counter(spec.dtype.name for spec in specs.values() if len(spec.shape) > 1)
    floating = {kind: count for kind, count in kinds.items() if "float" in kind and not kind.startswith(_NARROW)}
    dtype = whole.text("dtype", "torch_dtype").removeprefix("torch.")
    quantizations = (whole.part(key) for key in _QUANTIZATIONS)
    quantization = next((part for part in quantizations if part.table), None)
    method = quantization.text("quant_method") if quantization else ""
    narrow = [name for name, spec in specs.items() if spec.dtype.name.startswith(("float8_e4m3", "float8_e5m2", "float4"))]
    if floating and dtype not in floating and dtype in ("float32", "float16", "bfloat16") and not quantization:
        most = max(floating, key=lambda kind: floating[kind])
        what = f"it says {dtype}, the tensors are {most}"
        yield Finding(what, CONFIG, "loading casts them, or takes twice the memory", f"set dtype to {most}")
    if narrow and not quantization:
        what = f"{narrow[0]} is {specs[narrow[0]].dtype}, and no quantization_config is there"
        yield Finding(what, CONFIG, "it would be read as plain numbers", "add it")
    if method == "fp8" and not narrow:
        what = "quantization_config says fp8, and no tensor is"
        yield Finding(what, CONFIG, "loaders would look for scales", "remove quantization_config")
    for name in narrow if method == "fp8" else ():
        if name.endswith(".weight") and f"{name}_scale_inv" not in specs and f"{name}_scale" not in specs:
            yield Finding("it has no scale beside it", name, "its values cannot be told", "find the file with its weight_scale_inv")
            break
    if len(floating) > 1:
        census = ", ".join(f"{count} {kind}" for kind, count in floating.items())
        yield Finding(f"matrices of {census}", "dtypes", "mixed precision is sometimes meant", "use --dtype for one", problem=False)
