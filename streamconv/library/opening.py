"""The process in which a library opens a checkpoint: which library, by the files in the folder, and what it makes of the tensors.

It prints nothing: what it has to say is in the file that the request names. Libraries read headers only (`without_data`) and run no code
that lies beside the checkpoint.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from streamconv.errors import MissingDependency, StreamconvError, UsageError
from streamconv.extras import require
from streamconv.library.model import LibraryModel, find_class
from streamconv.library.without_data import read_headers_only
from streamconv.text import one_line

CONFIG, ADAPTER, MODULES, ROUTER = "config.json", "adapter_config.json", "modules.json", "router_config.json"
PIPELINES = ("model_index.json", "modular_model_index.json")
_LONGEST = 300  # characters of a library's own message
_OWN_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # tasks of PEFT for which whoever loads an adapter gives the size of a head


@dataclass
class Report:
    """What a library finds, as `loading.Loading` has it."""

    library: str
    version: str
    model_class: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, list[int], list[int]]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def add(self, info: Mapping[str, Any], prefix: str) -> None:
        """What ``from_pretrained`` says of a part."""
        self.missing += [prefix + name for name in sorted(info["missing_keys"])]
        self.unexpected += [prefix + name for name in sorted(info["unexpected_keys"])]
        self.mismatched += [(prefix + name, list(stored), list(model)) for name, stored, model in sorted(info["mismatched_keys"])]

    @property
    def has_names(self) -> bool:
        """Whether any tensor is at fault."""
        return bool(self.missing or self.unexpected or self.mismatched)

    def summary(self) -> dict[str, Any]:
        """In JSON's terms."""
        table = asdict(self)
        return {"class": table.pop("model_class"), **table}

    @contextmanager
    def failing(self, prefix: str) -> Iterator[None]:
        """Whatever a library raises in the block is a fault of this part."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - of a library, about somebody's checkpoint
            self.errors.append(f"{prefix.rstrip('/')}: {_brief(error)}" if prefix else _brief(error))


def main() -> None:
    """Answers the request that this process was started with."""
    request = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    try:
        answer = _open(Path(request["folder"]), request["variant"], opens=request["opens"]).summary()
    except MissingDependency as error:
        answer = {"refusal": str(error)}
    except StreamconvError as error:
        answer = {"refusal": f"--check-load: {error}"}
    Path(request["reply"]).write_text(json.dumps(answer))


def _open(folder: Path, variant: str | None, *, opens: bool) -> Report:
    """Opens a checkpoint, or only looks whether it could be.

    Raises:
        UsageError: it cannot be looked at.
    """
    if (folder / MODULES).is_file():
        return _open_modules(folder, opens=opens)
    for name in PIPELINES:
        if (folder / name).is_file():
            return _open_pipeline(folder, name, variant, opens=opens)
    if (folder / CONFIG).is_file():
        config = _read(folder / CONFIG)
        if "_class_name" in config:
            return _open_diffusers(folder, config, variant, opens=opens)
        if "model_type" in config:
            return _open_transformers(folder, config, variant, opens=opens)
    if (folder / ADAPTER).is_file():
        return _open_adapter(folder, opens=opens)
    raise UsageError(
        f"{folder}: nothing says which library opens it: expected {MODULES}, {PIPELINES[0]}, {ADAPTER}, or {CONFIG} with model_type or "
        "_class_name; --sidecars-from a folder of the model brings it along; else leave --check-load out"
    )


# transformers --------------------------------------------------------------------------------------------------------


def _open_transformers(folder: Path, config: Mapping[str, Any], variant: str | None, *, opens: bool) -> Report:
    transformers = _prepare("transformers")
    if config.get("architectures"):
        _, _, model_class = find_class(config, str(folder / CONFIG))
    elif config["model_type"] in transformers.CONFIG_MAPPING:
        model_class = transformers.AutoModel
    else:
        what = f"transformers {transformers.__version__} has no {config['model_type']!r}"
        raise UsageError(f"{folder / CONFIG}: {what}; code beside a checkpoint is not run")
    _check_quantizer(folder, config)
    report = Report("transformers", transformers.__version__, model_class.__name__)
    if opens:
        _load_transformers(report, model_class, folder, "", variant)
    return report


def _load_transformers(report: Report, model_class: Any, folder: Path, prefix: str, variant: str | None) -> None:
    with report.failing(prefix), _conversion_errors(report, prefix):
        settings = {"device_map": {"": "meta"}, "dtype": "auto", "ignore_mismatched_sizes": True, "output_loading_info": True}
        _, info = model_class.from_pretrained(
            str(folder), variant=variant, local_files_only=True, trust_remote_code=False, weights_only=True, **settings
        )
        report.add(info, prefix)


@contextmanager
def _conversion_errors(report: Report, prefix: str) -> Iterator[None]:
    """Has transformers tell which of its conversions fail: otherwise it prints that, and raises without it."""
    from transformers import modeling_utils

    tell = getattr(modeling_utils, "log_state_dict_report", None)

    def collect(*_: object, loading_info: Any, **__: object) -> None:
        last_lines = {name: str(text).strip().splitlines()[-1] for name, text in sorted(loading_info.conversion_errors.items())}
        report.errors += [f"{prefix}{name}: {_shorten(line)}" for name, line in last_lines.items()]

    if tell is not None:
        modeling_utils.log_state_dict_report = collect
    try:
        yield
    finally:
        if tell is not None:
            modeling_utils.log_state_dict_report = tell


def _check_quantizer(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UsageError where the library's code for a quantized checkpoint cannot run here."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(quantization, Mapping):
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    method = quantization.get("quant_method")
    try:
        quantizer = AutoHfQuantizer.from_config(dict(quantization), pre_quantized=True)
        quantizer.validate_environment(dtype=None, device_map={"": "meta"}, weights_only=True)
    except Exception as error:
        raise UsageError(f"{folder}: quantized by {method!r}, which transformers cannot open here: {_brief(error)}") from error
    validate = type(quantizer).validate_environment

    def validate_only(self: Any, *args: Any, **settings: Any) -> None:
        """Without a GPU some change their mind: they would dequantize, and not miss what that takes."""
        before = getattr(self.quantization_config, "dequantize", None)
        validate(self, *args, **settings)
        if before is not None:
            self.quantization_config.dequantize = before

    type(quantizer).validate_environment = validate_only


# diffusers -----------------------------------------------------------------------------------------------------------


def _open_diffusers(folder: Path, config: Mapping[str, Any], variant: str | None, *, opens: bool) -> Report:
    diffusers = _prepare("diffusers")
    name = config["_class_name"]
    model_class = getattr(diffusers, str(name), None)
    if not _is_model(model_class):
        raise UsageError(f"{folder / CONFIG}: diffusers {diffusers.__version__} has no model {name!r}; code beside a checkpoint is not run")
    report = Report("diffusers", diffusers.__version__, str(name))
    if opens:
        _load_diffusers(report, model_class, folder, "", variant)
    return report


def _open_pipeline(folder: Path, index: str, variant: str | None, *, opens: bool) -> Report:
    """Opens each component of a pipeline that has weights, by the class that the index names."""
    diffusers = _prepare("diffusers")
    table = _read(folder / index)
    report = Report("diffusers", diffusers.__version__, str(table.get("_class_name", "pipeline")))
    checked = 0
    for name, value in table.items():
        if not (isinstance(value, list) and len(value) > 1 and isinstance(value[0], str) and isinstance(value[1], str)):
            continue
        module = _module_of(value[0], diffusers)
        component = getattr(module, value[1], None) if module else None
        if component is None:
            report.unchecked.append(f"{name}: {value[1]} of {value[0]} is not in the library, and code beside a checkpoint is not run")
        elif _is_model(component):
            checked += 1
            load = _load_transformers if value[0] == "transformers" else _load_diffusers
            if opens:
                load(report, component, folder / name, f"{name}/", variant)
    if not checked:
        raise UsageError(f"{folder / index}: no component can be looked at: {'; '.join(report.unchecked) or 'it names none with weights'}")
    return report


def _module_of(library: str, diffusers: ModuleType) -> ModuleType | None:
    """The module that a component's class is in: a library, or one of diffusers' pipelines."""
    if library == "transformers":
        return _prepare("transformers")
    return diffusers if library == "diffusers" else getattr(diffusers.pipelines, library, None)


def _load_diffusers(report: Report, model_class: Any, folder: Path, prefix: str, variant: str | None) -> None:
    import torch

    quantized = "quantization_config" in (_read(folder / CONFIG) if (folder / CONFIG).is_file() else {})
    settings: dict[str, Any] = {"device_map": {"": "meta"}} if quantized else {"low_cpu_mem_usage": False, "ignore_mismatched_sizes": True}
    with report.failing(prefix), torch.device("meta"):
        _, info = model_class.from_pretrained(str(folder), output_loading_info=True, variant=variant, local_files_only=True, **settings)
        report.add(info, prefix)


# sentence-transformers -----------------------------------------------------------------------------------------------


def _open_modules(folder: Path, *, opens: bool) -> Report:
    """Opens a model of sentence-transformers by its own loader, which has transformers open what is a model of that."""
    library = _prepare("sentence_transformers")
    foreign = sorted(set(filter(lambda name: not name.startswith("sentence_transformers."), _module_types(folder))))
    if foreign:
        raise UsageError(f"{folder}: modules of {', '.join(foreign)}: cannot be checked, only sentence_transformers' own code is run")
    report = Report("sentence-transformers", library.__version__, "SentenceTransformer")
    if opens:
        failure = Report("", "", "")
        with _recording(report, folder), failure.failing(""):
            library.SentenceTransformer(str(folder), device="meta", local_files_only=True, trust_remote_code=False)
        report.errors += [] if report.has_names else failure.errors  # which else follow from the names
    return report


def _module_types(folder: Path) -> Iterator[str]:
    """The classes of a folder's modules, those among which its routers choose too."""
    yield from (str(module.get("type")) for module in _read(folder / MODULES, list))
    for path in folder.rglob(ROUTER):
        yield from map(str, _read(path).get("types", {}).values())


def _prefix_of(folder: Path, root: Path) -> str:
    """What the names of a folder's tensors begin with."""
    with suppress(ValueError):
        below = folder.absolute().relative_to(root.absolute()).as_posix()
        return "" if below == "." else f"{below}/"
    return ""


@contextmanager
def _recording(report: Report, root: Path) -> Iterator[None]:
    """Has whatever loads a model in the block, or a module's state dict, do it without data and tell the report."""
    import torch

    transformers = _prepare("transformers")
    base, reading = transformers.PreTrainedModel, read_headers_only()
    from_pretrained, load_state_dict = base.from_pretrained.__func__, torch.nn.Module.load_state_dict

    def open_model(cls: Any, path: Any, *args: Any, **settings: Any) -> Any:
        own = {"device_map": {"": "meta"}, "ignore_mismatched_sizes": True, "output_loading_info": True, "trust_remote_code": False}
        prefix = _prefix_of(Path(path) / (settings.get("subfolder") or ""), root)
        with _conversion_errors(report, prefix):
            model, info = from_pretrained(cls, path, *args, **{**settings, **own})
        report.add(info, prefix)
        return model

    def load_module(self: Any, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ARG001
        fitting, mismatched = _compare_shapes(self, state_dict)
        result = load_state_dict(self, fitting, strict=False, assign=True)
        shapes = {name for name, _, _ in mismatched}
        missing = [name for name in result.missing_keys if name not in shapes]
        info = {"missing_keys": missing, "unexpected_keys": result.unexpected_keys, "mismatched_keys": mismatched}
        report.add(info, _prefix_of(reading.last.parent, root) if reading.last else "")
        return result

    base.from_pretrained, torch.nn.Module.load_state_dict = classmethod(open_model), load_module  # type: ignore[method-assign]
    try:
        yield
    finally:
        base.from_pretrained, torch.nn.Module.load_state_dict = classmethod(from_pretrained), load_state_dict  # type: ignore[method-assign]


def _compare_shapes(module: Any, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, list[int], list[int]]]]:
    """Of stored tensors, those of a module's shapes, and the others with both shapes; names that it does not have are no concern here."""
    own = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    mismatched = [(name, shape, own[name]) for name, shape in shapes.items() if name in own and own[name] != shape]
    wrong = {name for name, _, _ in mismatched}
    return {name: tensor for name, tensor in tensors.items() if name not in wrong}, mismatched


# PEFT ----------------------------------------------------------------------------------------------------------------


def _open_adapter(folder: Path, *, opens: bool) -> Report:
    """Opens an adapter on its base model, which is built without data by that model's config."""
    peft = _prepare("peft")
    config = _read(folder / ADAPTER)
    if config.get("task_type") in _OWN_HEADS:
        raise UsageError(f"{folder}: cannot be checked: the head of {config['task_type']} has as many labels as whoever loads it says")
    base = _find_base(folder, config)
    report = Report("peft", peft.__version__, str(config.get("peft_type")))
    if not opens:
        return report
    model = LibraryModel({key: value for key, value in _read(base).items() if key != "quantization_config"}, str(base)).model
    inner = Report("", "", "")
    results: list[Any] = []
    load_adapter = peft.PeftModel.load_adapter

    def load(*args: Any, **settings: Any) -> Any:
        results.append(load_adapter(*args, **settings))
        return results[-1]

    peft.PeftModel.load_adapter = load
    with report.failing(""), _recording(inner, folder):
        settings = {"torch_device": "meta", "low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
        peft.PeftModel.from_pretrained(model, str(folder), **settings)
    report.mismatched = inner.mismatched
    shapes = {name for name, _, _ in inner.mismatched}
    for result in results:
        missing = [name for name in result.missing_keys if name not in shapes]
        report.add({"missing_keys": missing, "unexpected_keys": result.unexpected_keys, "mismatched_keys": ()}, "")
    return report


def _find_base(folder: Path, config: Mapping[str, Any]) -> Path:
    """The config of an adapter's base model: in a folder, or in the Hub's cache. Raises UsageError."""
    name = config.get("base_model_name_or_path")
    if isinstance(name, str) and name:
        if (Path(name) / CONFIG).is_file():
            return Path(name) / CONFIG
        with suppress(Exception):  # whatever is no name of a repository
            cached = import_module("huggingface_hub").try_to_load_from_cache(name, CONFIG)
            if isinstance(cached, str):
                return Path(cached)
    raise UsageError(
        f"{folder / ADAPTER}: its base model {name!r} is neither a folder with config.json nor in the Hub's cache: get it, or say in "
        "base_model_name_or_path where it is"
    )


# -------------------------------------------------------------------------------------------------------------------


def _prepare(name: str) -> ModuleType:
    """A library, that reads headers only and is quiet. Raises MissingDependency."""
    if find_spec(name) is not None:  # else torch need not be loaded
        require("torch", "--check-load")
        require("safetensors", "--check-load")
        read_headers_only()
    library = require(name, "--check-load")
    if name == "transformers" and int(library.__version__.split(".")[0]) < 5:
        raise UsageError(f"transformers {library.__version__} is installed, 5 or later is needed: pip install -U transformers")
    if name in {"transformers", "diffusers"}:
        with suppress(AttributeError):
            library.utils.logging.set_verbosity(50)  # critical only
    if name == "transformers":
        placing = import_module("transformers.integrations.accelerate")
        setattr(placing, "is_accelerate_available", lambda *_, **__: True)  # noqa: B010 - it is asked for, and does nothing without data
    return library


def _is_model(kind: object) -> bool:
    """Whether a class is one of models, which have weights."""
    import torch

    return isinstance(kind, type) and issubclass(kind, torch.nn.Module) and hasattr(kind, "from_pretrained")


def _read(path: Path, kind: type[Any] = dict) -> Any:
    """A JSON file. Raises UsageError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {_brief(error)}") from error
    if not isinstance(content, kind):
        raise UsageError(f"{path}: is no {'object' if kind is dict else 'list'}")
    return content


def _brief(error: Exception) -> str:
    """A library's message, in a line."""
    return _shorten(f"{type(error).__name__}: {error}")


def _shorten(text: object) -> str:
    line = one_line(" ".join(str(text).split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
