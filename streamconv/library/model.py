"""A model's class without data, and what transformers does to names and tensors when it loads or saves it.

Facts: ``transformers.core_model_loading`` and ``transformers.conversion_mapping`` (written against 5.23), whose loops
``convert_and_load_state_dict_in_model`` and ``revert_weight_conversion`` the two directions follow.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache, partial
from itertools import chain
from types import ModuleType
from typing import TYPE_CHECKING, Any

from streamconv.errors import CoverageError, StreamconvError, UsageError
from streamconv.graph.node import AnyNode
from streamconv.notation.names import nearest
from streamconv.recipe.application import Recast, keep_dtype
from streamconv.recipe.steps import cast

if TYPE_CHECKING:
    from streamconv.library.lazy import LazyTensor

Nodes = Mapping[str, AnyNode]
Group = dict[str, list[str]]
"""Pattern of a converter -> the names of the tensors that it takes, in order."""
Foreign = Callable[["LibraryModel", Any, str, Group, Nodes], dict[str, AnyNode]]
"""Nodes that run a converter of a model, for a target and a group, on the group's tensors."""


def kept_modules(config: Mapping[str, Any], dtype: str, title: str) -> list[str]:
    """Modules that the class of a model has in float32, whatever dtype it is loaded in.

    Args:
        config: config.json, with model_type and architectures.
        dtype: in which the model would be loaded: some are kept of float16 only.
        title: what messages begin with.

    Raises:
        UsageError: transformers is not installed, or has no such class.
    """
    model = LibraryModel({key: value for key, value in config.items() if key != "quantization_config"}, title).model
    names = ["_keep_in_fp32_modules_strict", *(["_keep_in_fp32_modules"] if dtype == "float16" else [])]
    return sorted({module for name in names for module in getattr(model, name, None) or ()})


def placed_modules(config: Mapping[str, Any], modules: Iterable[str], title: str) -> list[str]:
    """What the library calls modules of a model that have other names in its files.

    Args:
        config: config.json, with model_type and architectures.
        modules: those with a weight, as files name them.
        title: what messages begin with.

    Raises:
        UsageError: transformers is not installed, or has no such class.
    """
    model = LibraryModel({key: value for key, value in config.items() if key != "quantization_config"}, title)
    place = model.placing()
    placed = (place(f"{module}.weight") for module in modules)
    return [name.removesuffix(".weight") for name in placed if name in model.meta and name.endswith(".weight")]


def find_class(config: Mapping[str, Any], title: str) -> tuple[ModuleType, Any, Any]:
    """transformers, and the classes that it has for the config and the model that config.json names.

    Args:
        config: config.json, with model_type and architectures.
        title: what messages begin with.

    Raises:
        UsageError: transformers is not installed, or has no such class: code that lies beside a checkpoint is not run.
    """
    kind, classes = config.get("model_type"), config.get("architectures") or []
    if not kind or not classes:
        raise UsageError(f"{title}: config.json with model_type and architectures is needed beside SRC, found {kind!r}, {classes}")
    try:
        import torch  # noqa: F401
        import transformers

        model_class = getattr(transformers, str(classes[0]), None)
    except ImportError as error:
        raise _too_old(title, error) from error
    known = transformers.CONFIG_MAPPING
    if kind not in known or not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
        raise UsageError(
            f"{title}: transformers {transformers.__version__} has no {kind!r} {classes[0]}; code beside a checkpoint is not run"
        )
    return transformers, known[kind], model_class


def _too_old(title: str, error: ImportError) -> UsageError:
    """What to say where transformers, or what is needed of it, is not there."""
    return UsageError(f"{title} takes transformers 5 or later: pip install 'streamconv[transformers]' ({error})")


class LibraryModel:
    """A model's class without data, and what the library does to names and tensors when it loads or saves it."""

    def __init__(self, config: Mapping[str, Any], title: str) -> None:
        self.title, self.config = title, config
        transformers, config_class, model_class = find_class(config, title)
        try:
            import torch
            from transformers import conversion_mapping, core_model_loading
        except ImportError as error:
            raise _too_old(title, error) from error
        self._loading, self._mapping = core_model_loading, conversion_mapping
        quiet = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity(50)  # critical only
        try:
            values = {key: value for key, value in config.items() if key != "quantization_config"}
            own = config_class.from_dict(config_class._decode_special_floats(values))
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                self.model = model_class(own)
            self._quantizer = self._read_quantizer(config.get("quantization_config"))
        except StreamconvError:
            raise
        except Exception as error:
            what = f"{model_class.__name__} cannot be built from config.json: {type(error).__name__}: {error}"
            raise UsageError(f"{self.title}: {what}") from error
        finally:
            transformers.utils.logging.set_verbosity(quiet)
        self.meta = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        ties = getattr(self.model, "all_tied_weights_keys", None) or {}
        self.ties = {name: original for name, original in ties.items() if name in self.meta}
        self.prefix = self.model.base_model_prefix

    def _read_quantizer(self, config: Mapping[str, Any] | None) -> Any:
        """What the library does to the model and to its mapping for a quantized checkpoint, None for another."""
        if not config:
            return None
        if config.get("quant_method") != "fp8":
            raise UsageError(f"{self.title}: quantized by {config.get('quant_method')!r}: only fp8 with scales for blocks is known")
        from transformers.quantizers.auto import AutoHfQuantizer

        quantizer = AutoHfQuantizer.from_config(dict(config), pre_quantized=True)
        quantizer.preprocess_model(self.model)
        return quantizer

    def transforms(self) -> tuple[list[Any], list[Any]]:
        """What loading does to names, and to tensors."""
        return self._by_kind(self._mapping.get_model_conversion_mapping(self.model, hf_quantizer=self._quantizer))

    def _by_kind(self, transforms: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Of what the library does, what it does to names, and to tensors."""
        renamings = [one for one in transforms if isinstance(one, self._loading.WeightRenaming)]
        return renamings, [one for one in transforms if isinstance(one, self._loading.WeightConverter)]

    def _sorted(self, names: Iterable[str]) -> Iterator[str]:
        """The names in the library's order. Its keys take a kilobyte each: there are those of a layer at a time."""
        heads: dict[str, list[str]] = {}
        for name in names:
            heads.setdefault(".".join(name.split(".", 3)[:3]), []).append(name)
        for head in sorted(heads, key=self._loading.dot_natural_key):
            yield from sorted(heads[head], key=self._loading.dot_natural_key)

    def place(self, name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        """The model's tensor that a stored one goes to (the first of several), and the pattern of the converter that takes it there."""
        target, pattern = self._loading.rename_source_key(name, renamings, converters, self.prefix, self.meta)
        if target not in self.meta and name in self.meta:
            target, pattern = self._loading.rename_source_key(name, [], [], base_model_prefix=self.prefix, meta_state_dict=self.meta)
        return target, pattern

    def placing(self) -> Callable[[str], str]:
        """What gives the model's tensor that a stored one, by its name, goes to."""
        renamings, converters = self.transforms()
        return lambda name: self.place(name, renamings, converters)[0]

    def load(
        self, nodes: Nodes, foreign: Foreign, recast: Recast = keep_dtype
    ) -> tuple[dict[str, AnyNode], dict[str, str], dict[str, str]]:
        """What loading makes of stored tensors; how; and which it passes over on purpose, and why."""
        renamings, converters = self.transforms()
        targets: dict[str, AnyNode] = {}
        groups: dict[str, Group] = {}
        first: dict[str, str] = {}
        dropped: dict[str, str] = {}
        unexpected: list[str] = []
        for name in self._sorted(nodes):
            target, pattern = self.place(name, renamings, converters)
            if target not in self.meta:
                why = self._passed_over(target)
                if why:
                    dropped[name] = why
                else:
                    unexpected.append(name)
            elif pattern is not None and target not in targets:
                groups.setdefault(target, {}).setdefault(pattern, []).append(name)
                first.setdefault(target, name)
            elif first.setdefault(target, name) != name:
                raise CoverageError(f"{self.title}: {name} and {first[target]} are both {target}: remove one of them")
            else:
                targets[target] = nodes[name]
        if unexpected:
            raise CoverageError(
                f"{self.title}: {unexpected[0]}{_more(unexpected)}: the model has no such tensor{_near(unexpected[0], self.meta)}"
            )
        how: dict[str, str] = {}
        for target, group in groups.items():
            converter = _converter_of(group, converters)
            for name, node in self._convert(converter, target, group, nodes, recast, foreign).items():
                if name in targets:
                    raise CoverageError(f"{self.title}: {name} is made twice, from {first.get(name, target)} and from {first[target]}")
                targets[name], how[name] = node, _describe(converter)
        return targets, how, dropped

    def save(self, nodes: Nodes) -> tuple[dict[str, AnyNode], dict[str, str]]:
        """What saving makes of a state dict, with the real sizes of what is taken apart."""
        own = self._mapping.get_model_conversion_mapping(self.model, add_legacy=False)
        whole = self._quantizer.update_weight_conversions(own, self.model) if self._quantizer else own
        # Names that a quantizer also reads are not those that it is stored under.
        entries = [entry for entry in whole if entry in own or not isinstance(entry, self._loading.WeightRenaming)]
        transforms = [entry.reverse_transform() for entry in entries[::-1] if not isinstance(entry, self._loading.PrefixChange)]
        renamings, converters = self._by_kind(transforms)
        groups: dict[str, Group] = {}
        targets: dict[str, AnyNode] = {}
        how: dict[str, str] = {}

        def keep(name: str, node: AnyNode) -> None:
            if name in targets:
                raise CoverageError(f"{self.title}: {name} is made twice: this mapping cannot be undone")
            targets[name] = node

        for name in self._sorted(nodes):
            target, pattern = self._loading.apply_converters(name, converters)
            if pattern is None:
                keep(self._loading.apply_renamings(name, renamings), nodes[name])
            else:
                groups.setdefault(target, {}).setdefault(pattern, []).append(name)
        for target, group in groups.items():
            converter = _converter_of(group, converters)
            for name, node in self._convert(converter, target, group, nodes).items():
                final = self._loading.apply_renamings(name, renamings)
                keep(final, node)
                how[final] = _describe(converter)
        return targets, how

    def _convert(
        self, converter: Any, target: str, group: Group, nodes: Nodes, recast: Recast = keep_dtype, foreign: Foreign | None = None
    ) -> dict[str, AnyNode]:
        """What a converter makes of the tensors of a group; ``foreign`` gives the nodes of one that computes values."""
        from streamconv.library.lazy import ComputesValuesError, LazyTensor

        names = list(chain.from_iterable(group.values()))
        mixed = len({nodes[name].spec.dtype.name for name in names}) > 1

        def read(name: str) -> LazyTensor:
            node = nodes[name]
            return LazyTensor(cast(node, recast(target, node.spec)) if mixed else node)

        try:
            tensors = self.run(converter, target, group, lambda name: partial(read, name))
        except ComputesValuesError as error:
            if foreign:
                return foreign(self, converter, target, group, {name: read(name).node for name in names})
            raise CoverageError(f"{self.title}, {target}, by {_describe(converter)}: {error}") from error
        except StreamconvError as error:
            raise CoverageError(f"{self.title}, {target}, by {_describe(converter)}: {error}") from error
        except Exception as error:
            raise CoverageError(f"{self.title}: {_describe(converter)} does not fit {target}: {type(error).__name__}: {error}") from error
        return {name: (tensor[0] if isinstance(tensor, list) else tensor).node for name, tensor in tensors.items()}

    def run(self, converter: Any, target: str, group: Group, tensor: Callable[[str], Any]) -> dict[str, Any]:
        """The library's own conversion of tensors, or of functions that give them."""
        import torch

        own = deepcopy(converter)
        own.operations = [self._sized(op) for op in own.operations]
        for pattern, names in group.items():
            for name in names:
                own.add_tensor(target, name, pattern, tensor(name))
        with torch.no_grad():
            tensors: dict[str, Any] = own.convert(target, model=self.model, config=self.model.config)
        return tensors

    def convert(self, target: str, group: Group, output: str, tensors: Sequence[Any]) -> Any:
        """One of the tensors that loading makes of a group of real ones."""
        _, converters = self.transforms()
        converter = _converter_of(group, converters)
        by_name = dict(zip(chain.from_iterable(group.values()), tensors, strict=True))
        result = self.run(converter, target, group, by_name.__getitem__)[output]
        return (result[0] if isinstance(result, list) else result).contiguous()

    def _sized(self, op: Any) -> Any:
        """An operation; one that cuts a tensor into several learns where."""
        if type(op) is not self._loading.Chunk or op.num_shards_attribute is not None:
            return op
        meta, config = self.meta, self.model.config.get_text_config()

        class SizedChunk(self._loading.Chunk):  # type: ignore[misc,name-defined]
            """Chunk, into parts that need not be equal."""

            def convert(self, input_dict: Any, source_patterns: Any, target_patterns: list[str], **settings: Any) -> Any:  # noqa: ARG002
                tensor = next(iter(input_dict.values()))
                tensor = tensor[0] if isinstance(tensor, list) else tensor
                names = [settings["full_layer_name"].replace(target_patterns[0], target) for target in target_patterns]
                sizes = _part_sizes(names, tensor.shape[self.dim], meta, config)
                return dict(zip(target_patterns, tensor.split(sizes, dim=self.dim), strict=True))

        return SizedChunk(op.dim)

    def check(self, nodes: Nodes, allowed: str) -> None:
        """Raises CoverageError unless these are the model's tensors, but for tied ones and those that are ``allowed`` to be missing."""
        for name, node in nodes.items():
            if name not in self.meta:
                raise CoverageError(f"{self.title}: {name}: the model has no such tensor{_near(name, self.meta)}")
            if node.spec.shape != self.meta[name]:
                raise CoverageError(f"{self.title}: {name} has shape {node.spec.shape}, the model of config.json {self.meta[name]}")
        ties = [tie for tie in self.ties.items() if not nodes.keys().isdisjoint(tie)]
        tie_names = set(chain.from_iterable(ties))
        ignored = [re.compile(pattern) for pattern in getattr(self.model, "_keys_to_ignore_on_load_missing", None) or []]
        globs = [glob.strip() for glob in allowed.split(",") if glob.strip()]

        def may_be_missing(name: str) -> bool:
            if name in nodes or name in tie_names:
                return True
            return any(pattern.search(name) for pattern in ignored) or any(fnmatch.fnmatchcase(name, glob) for glob in globs)

        absent = [name for name in self.meta if not may_be_missing(name)]
        if absent:
            raise CoverageError(
                f"{self.title}: {absent[0]}{_more(absent)} of the model: no tensor for it{_near(absent[0], nodes)}; "
                "--set allow_missing=PATTERN leaves it out"
            )

    def _passed_over(self, name: str) -> str:
        """The library's pattern for tensors that it leaves out when it loads, that this is one of; else ""."""
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or []
        return next((pattern for pattern in patterns if re.search(pattern, name)), "")


def choose_kept(config: Mapping[str, Any]) -> Callable[[Sequence[str]], str | None]:
    """Which of a tensor's names the library's ``save_pretrained`` keeps, by what the class in config.json says of its ties.

    The library is loaded when it is first asked. Where it is not installed, or does not know the model, nothing is known.
    """

    @cache
    def patterns() -> list[str]:
        try:
            model = LibraryModel({key: value for key, value in config.items() if key != "quantization_config"}, "ties").model
        except UsageError:
            return []
        texts: list[str] = []
        for name, module in model.named_modules():
            keys = getattr(module, "_tied_weights_keys", None) or ()
            texts += (f"{name}.{key}" if name else key for key in keys)
        return texts

    def choose(names: Sequence[str]) -> str | None:
        repetitions = [name for name in sorted(names) if any(re.search(pattern, name) for pattern in patterns())]
        rest = set(names).difference(repetitions[: len(names) - 1])  # all of them may be called repetitions: one stays
        return rest.pop() if len(rest) == 1 else None

    return choose


def _converter_of(group: Group, converters: Sequence[Any]) -> Any:
    """The converter that takes the tensors of a group: the last that has its first pattern, as the library does."""
    return next(one for one in reversed(converters) if next(iter(group)) in one.source_patterns)


def _part_sizes(names: list[str], total: int, meta: Mapping[str, Any], config: Any) -> list[int]:
    """How a fused axis of ``total`` divides among tensors: as their projections do, as heads do, as words do, or equally."""
    siblings = [re.sub(r"conv1d", "proj", name) for name in names]
    rows = [meta[name][0] for name in siblings if name in meta]
    if len(rows) == len(names) and sum(rows) == total:
        return rows
    heads = getattr(config, "num_attention_heads", None) or 0
    groups = getattr(config, "num_key_value_heads", None) or heads
    modules = [name.rsplit(".", 2)[-2] if "." in name else name for name in names]
    matches = [re.search(r"(?:^|_)(q|k|v|query|key|value)(?:_|$)", module) for module in modules]
    if [match[1][0] if match else "" for match in matches] == ["q", "k", "v"] and heads and total % (heads + 2 * groups) == 0:
        size = total // (heads + 2 * groups)
        return [heads * size, groups * size, groups * size]
    words = getattr(config, "vocab_size", None) or 0
    if len(names) == 2 and all("embed" in name for name in names) and 0 < words < total:
        return [words, total - words]  # words that were added have a tensor of their own
    if total % len(names):
        raise CoverageError(f"{total} elements cannot be divided among {', '.join(names)}")
    return [total // len(names)] * len(names)


def _describe(transform: Any) -> str:
    return ", ".join(map(repr, getattr(transform, "operations", [])))


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _near(name: str, candidates: Iterable[str]) -> str:
    near = nearest(name, candidates)
    return f"; the nearest is {near[0]}" if near else ""
