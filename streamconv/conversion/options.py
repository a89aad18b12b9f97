"""The options of a conversion, each of them said once: `Options`.

From a field come the argument of the call, the option of the command, its row in docs/command-line.md, and what is kept beside an
interrupted run. To add an option, write a field (its type, its default, and `about` it) where it belongs: in `Options` if `verify` takes
it, too, in `PlanOptions` if it decides what is written, in `ConvertOptions` if it is about the run alone; read it where it matters; and
run ``PYTHONPATH=tests/fixtures python tests/conversion/test_options.py --write``, which writes the table of docs/command-line.md.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import KW_ONLY, Field, dataclass, field, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from streamconv.dtypes import dtype_name
from streamconv.running.executors import EXECUTORS, LOCAL
from streamconv.storage import is_url
from streamconv.units import parse_size

if TYPE_CHECKING:
    import numpy as np
    import torch

    from streamconv.recipe import Recipe
    from streamconv.running.progress import Shown
    from streamconv.storage.folder import AnyPath

    Source = Any  # a place, or tensors, as `given.as_source` takes them: a place is what it becomes
    AnyDType = str | torch.dtype | np.dtype[Any] | type[Any]

P = ParamSpec("P")
R = TypeVar("R")
O = TypeVar("O", bound="Options")  # noqa: E741 - of options

PLANNING = ("convert", "plan")
COMPARING = (*PLANNING, "verify", "diff")
MAKING = (*PLANNING, "merge")
RUNNING = (*MAKING, "run")
LOOKING = (*COMPARING, "inspect", "doctor")


@dataclass(frozen=True)
class About:
    """What is said of an option beside its name, type and default.

    Attributes:
        help: what it does, in a line.
        flags: how it is spelled on the command line, the long way last; from its name if nothing is said.
        metavar: what stands for its value there; nothing: it has none, it is a switch.
        parse: makes its value of the text.
        repeatable: it may be given several times, for a value each.
        choices: the texts that may be its value, if only some may.
        commands: those that take it.
        decides: another value makes another conversion: it is kept beside an interrupted run, which goes on with the same one only.
    """

    help: str
    flags: tuple[str, ...] = ()
    metavar: str = ""
    parse: Callable[[str], object] = str
    repeatable: bool = False
    choices: Collection[str] = ()
    commands: tuple[str, ...] = MAKING
    decides: bool = False


def about(help: str, **more: Any) -> dict[str, About]:  # noqa: A002 - the word of the command line
    """The metadata of a field; see `About`."""
    return {"about": About(help, **more)}


def about_of(option: Field[Any]) -> About:
    """What `about` has put into a field."""
    text: About = option.metadata["about"]
    return text


def flags_of(option: Field[Any]) -> tuple[str, ...]:
    """How an option is spelled on the command line, the long way last."""
    return about_of(option).flags or (f"--{option.name.replace('_', '-')}",)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What becomes of the tensors of a checkpoint, and what that may take: `convert`, `plan`, `verify` and `diff` have these."""

    recipe: str | Recipe | None = field(
        default=None,
        metadata=about(
            "a recipe's name, or a .yaml, .json or .py file; then :inverse for the way back",
            metavar="NAME|FILE",
            commands=COMPARING,
            decides=True,
        ),
    )
    options: Mapping[str, object] | None = field(
        default=None,
        metadata=about(
            "an option of the recipe, which 'streamconv recipes NAME' lists; without one: root, tied, resize_vocab, seed (repeatable)",
            flags=("--set",),
            metavar="KEY=VALUE",
            repeatable=True,
            commands=COMPARING,
            decides=True,
        ),
    )
    dtype: AnyDType | None = field(
        default=None,
        metadata=about(
            "cast floating tensors: float32, float16, bfloat16, ...",
            metavar="DTYPE",
            commands=COMPARING,
            decides=True,
        ),
    )
    keep_dtype: Iterable[str] = field(
        default=(),
        metadata=about(
            "tensors that --dtype leaves alone (repeatable); auto: those that the model's class in transformers keeps in float32",
            metavar="PATTERN",
            repeatable=True,
            commands=COMPARING,
            decides=True,
        ),
    )
    dequantize: bool = field(
        default=False,
        metadata=about(
            "quantized weights become numbers, of --dtype or the one that config.json gives, before a recipe sees them",
            commands=COMPARING,
            decides=True,
        ),
    )
    quantize: str | None = field(
        default=None,
        metadata=about(
            "weights of linear modules are quantized by rounding: fp8, FP8_BLOCK, FP8_DYNAMIC, W8A8, W8A16, W4A16, NVFP4A16, ...",
            metavar="SCHEME",
            commands=COMPARING,
            decides=True,
        ),
    )
    ignore: Iterable[str] = field(
        default=(),
        metadata=about(
            "modules that --quantize leaves alone: a name, or re: and what names begin with (repeatable)",
            metavar="PATTERN",
            repeatable=True,
            commands=COMPARING,
            decides=True,
        ),
    )
    adapter: Iterable[str] = field(
        default=(),
        metadata=about(
            "a PEFT adapter (LoRA, IA3, ...) that is merged into SRC; @WEIGHT multiplies its scale (repeatable, in order)",
            metavar="DIR[@WEIGHT]",
            repeatable=True,
            commands=COMPARING,
            decides=True,
        ),
    )
    graft: AnyPath | None = field(
        default=None,
        metadata=about(
            "another checkpoint, of which --take names tensors that come into SRC, or instead of SRC's with --replace",
            metavar="SRC2",
            commands=COMPARING,
            decides=True,
        ),
    )
    take: Iterable[str] = field(
        default=(),
        metadata=about(
            "tensors of --graft, under their names or others: PATTERN, or 'PATTERN -> PATTERN' (repeatable)",
            metavar="PATTERN",
            repeatable=True,
            commands=COMPARING,
            decides=True,
        ),
    )
    replace: bool = field(
        default=False,
        metadata=about("what --take brings may be there already, and is replaced", commands=COMPARING, decides=True),
    )
    rename: Iterable[str] = field(
        default=(),
        metadata=about(
            "other names, before a recipe sees them: 'PATTERN -> PATTERN', in the name language of recipes (repeatable)",
            metavar="RENAME",
            repeatable=True,
            commands=COMPARING,
            decides=True,
        ),
    )
    drop: Iterable[str] = field(
        default=(),
        metadata=about(
            "tensors that are left out (repeatable; a pattern, or a glob)",
            metavar="PATTERN",
            repeatable=True,
            commands=COMPARING,
            decides=True,
        ),
    )
    only: Iterable[str] = field(
        default=(),
        metadata=about(
            "leave out all other tensors (repeatable; a pattern, or a glob)",
            metavar="PATTERN",
            repeatable=True,
            commands=COMPARING,
            decides=True,
        ),
    )
    sidecars_from: AnyPath | None = field(
        default=None,
        metadata=about(
            "config and tokenizer files come from here (or a URL) instead of SRC",
            metavar="DIR",
            commands=COMPARING,
            decides=True,
        ),
    )
    variant: str | None = field(
        default=None,
        metadata=about(
            "read the weights called so, as in model.NAME.safetensors; written under the same name",
            metavar="NAME",
            commands=LOOKING,
            decides=True,
        ),
    )
    random_seed: int = field(
        default=0,
        metadata=about(
            "what dare_linear and dare_ties keep, of the models that a file of mergekit names",
            metavar="N",
            parse=int,
            commands=(*COMPARING, "merge"),
            decides=True,
        ),
    )
    max_memory: str | int = field(
        default="1GB",
        metadata=about(
            "bound on the process's peak resident memory",
            metavar="SIZE",
            commands=(*COMPARING, "merge"),
        ),
    )
    workers: int | None = field(
        default=None,
        metadata=about(
            "concurrent copies and tiles",
            flags=("-j", "--workers"),
            metavar="N",
            parse=int,
            commands=(*COMPARING, "merge"),
        ),
    )
    read_backend: str = field(
        default="auto",
        metadata=about(
            "how source bytes are read",
            metavar="NAME",
            choices=("auto", "mmap", "pread"),
            commands=(*COMPARING, "merge"),
        ),
    )

    def __post_init__(self) -> None:
        """Has a dtype be text, patterns be a tuple, and tensors be a place, whatever they were given as."""
        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_name(self.dtype))
        for name in ("src", "a", "b"):
            if hasattr(self, name):
                object.__setattr__(self, name, _as_source(getattr(self, name)))
        for name in ("keep_dtype", "adapter", "take", "rename", "drop", "only"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def __repr__(self) -> str:
        shown = [f"{one.name}={getattr(self, one.name)!r}" for one in fields(self) if one.repr and getattr(self, one.name) != one.default]
        return f"{type(self).__name__}({', '.join(shown)})"

    def select(self, command: str) -> dict[str, Any]:
        """The values of those that a command takes, by name."""
        return {one.name: getattr(self, one.name) for one in fields(self) if command in about_of(one).commands}


@dataclass(frozen=True, repr=False)
class VerifyOptions(Options):
    """The arguments of `verify`."""

    a: Source = field(metadata=about("a directory, a file, or a URL", metavar="A", commands=("verify", "diff")))
    b: Source = field(metadata=about("what it is compared with", metavar="B", commands=("verify", "diff")))
    _: KW_ONLY
    progress: Shown = field(default=False, compare=False, repr=False, metadata=about("see `run`", commands=()))


@dataclass(frozen=True, repr=False)
class DiffOptions(VerifyOptions):
    """The arguments of `diff`."""

    _: KW_ONLY
    headers: bool = field(
        default=False,
        metadata=about("read headers only: shapes, dtypes, what is only in one", commands=("diff",)),
    )


@dataclass(frozen=True, repr=False)
class StreamOptions(Options):
    """The arguments of `stream`: what its tensors are, and in how many parts each comes."""

    src: Source = field(metadata=about("a checkpoint: a directory, a file, or a URL; or tensors", commands=()))
    _: KW_ONLY
    parts: str | int | None = field(
        default=None,
        metadata=about("bytes of a part of a tensor, such as 64MB: whole rows of its first axis; whole tensors unless given", commands=()),
    )
    framework: str = field(default="torch", metadata=about("whose tensors: torch or numpy", commands=()))


@dataclass(frozen=True, repr=False)
class PlanOptions(Options):
    """The arguments of `plan`: what is written where, and what may be in the way there."""

    src: Source = field(
        metadata=about(
            "a checkpoint: a directory, a file, or a URL (https, hf, s3, gs); or what to merge, a file of mergekit", metavar="SRC"
        )
    )
    dst: str | os.PathLike[str] = field(
        metadata=about("a file if it ends in the container's suffix, else a directory; or a URL (hf, s3, gs)", metavar="DST")
    )
    _: KW_ONLY
    losses: bool = field(
        default=False,
        metadata=about("measure what casts and quantization change, and say so"),
    )
    check_replicas: bool = field(
        default=False,
        metadata=about("compare what several ranks hold of the same tensor before anything is written", commands=PLANNING),
    )
    strict_values: bool = field(
        default=False,
        metadata=about(
            "fail, and commit nothing, if a finite value is too large for its new dtype, or quantized beside NaN or infinity",
        ),
    )
    format: str | None = field(
        default=None,
        metadata=about("container of DST (by its suffix, else the recipe's, else safetensors)", metavar="NAME", decides=True),
    )
    max_shard_size: str | int = field(
        default="5GB",
        metadata=about("bytes of tensors in a file: 5GB is decimal, 5GiB binary", metavar="SIZE", decides=True),
    )
    single_file: bool = field(
        default=False,
        metadata=about("one file, whatever its size", decides=True),
    )
    align: bool = field(
        default=False,
        metadata=about("start data at whole blocks, so that file systems that share blocks need not copy", decides=True),
    )
    engine: str = field(
        default=LOCAL,
        metadata=about(
            "where output files are made; ray: a task for each",
            metavar="NAME",
            choices=EXECUTORS,
            commands=RUNNING,
        ),
    )
    create_pr: bool = field(
        default=False,
        metadata=about("upload to the Hub as a pull request; DST may then be SRC's repository", commands=RUNNING),
    )
    overwrite: bool = field(
        default=False,
        metadata=about("remove weight and index files in DST first", commands=RUNNING),
    )
    resume: bool = field(
        default=False,
        metadata=about("continue an interrupted run; with --overwrite too: if one has begun", commands=RUNNING),
    )
    reclaim_source: bool = field(
        default=False,
        metadata=about(
            "DELETE SRC's weights while converting: give their space back once what they became is safe",
            commands=PLANNING,
        ),
    )

    def identity(self) -> dict[str, Any]:
        """What decides which conversion it is, in JSON's terms: kept beside an interrupted run.

        >>> PlanOptions("/model", "out", dtype="bf16", max_shard_size="2GB").identity()["max_shard_size"]
        2000000000
        """
        stated = {one.name: getattr(self, one.name) or None for one in fields(self) if about_of(one).decides}
        stated |= {
            "src": name_source(self.src),
            "recipe": getattr(self.recipe, "name", self.recipe) or None,
            "max_shard_size": parse_size(self.max_shard_size),
            "adapter": [_name_other(text) for text in self.adapter] or None,
            "graft": _name_other(self.graft),
            "sidecars_from": _name_other(self.sidecars_from),
        }
        described: dict[str, Any] = json.loads(json.dumps(stated, default=str))
        return described


@dataclass(frozen=True, repr=False)
class ConvertOptions(PlanOptions):
    """The arguments of `convert`: those of `plan`, and what the run does beside."""

    _: KW_ONLY
    ray_address: str | None = field(
        default=None,
        metadata=about(
            "HOST:PORT of the Ray cluster (RAY_ADDRESS, else this machine's, else a new one)",
            metavar="ADDR",
            commands=RUNNING,
        ),
    )
    verify: bool = field(
        default=False,
        metadata=about("read everything back and compare after writing", commands=RUNNING),
    )
    checksum: bool = field(
        default=False,
        metadata=about("write SHA256SUMS, too, for 'sha256sum --check'", commands=RUNNING),
    )
    check_load: bool = field(
        default=False,
        metadata=about(
            "then have the library that the config names open it, without data; exit code 1 if a tensor is amiss", commands=RUNNING
        ),
    )
    report: str | os.PathLike[str] | None = field(
        default=None,
        metadata=about("write a page about it to this .html file", metavar="FILE", commands=("convert", "merge", "verify", "diff")),
    )
    compare_with: AnyPath | None = field(
        default=None,
        metadata=about(
            "then print the comparison with this reference checkpoint",
            flags=("--compare",),
            metavar="DIR",
            commands=("convert", "merge"),
        ),
    )
    progress: Shown = field(default=False, compare=False, repr=False, metadata=about("see `run`", commands=()))


def _as_source(src: Source) -> AnyPath:
    if isinstance(src, str | os.PathLike):
        return src
    from streamconv.conversion.given import as_source

    return as_source(src)


def name_source(src: AnyPath) -> str:
    """What SRC is called beside a run: an absolute path, or a URL without what is secret in it."""
    if is_url(src):
        from streamconv.storage.locations import shown

        return shown(str(src))
    return os.path.abspath(str(src))  # noqa: PTH100 - links stay


def _name_other(path: AnyPath | None) -> AnyPath | None:
    """What another source is called beside a run: as it was given, a URL without its query; what stands behind an @ stays."""
    return re.sub(r"\?[^@]*", "", str(path)) if path is not None and is_url(path) else path


def options_of(command: str) -> list[Field[Any]]:
    """The options and arguments that a command takes, in the order in which they are declared."""
    return [one for one in every_option() if command in about_of(one).commands]


def every_option() -> list[Field[Any]]:
    """All options and arguments of all calls, in the order in which they are declared."""
    return list({one.name: one for one in (*fields(StreamOptions), *fields(ConvertOptions), *fields(DiffOptions))}.values())


def arguments_of(options: Callable[P, O]) -> Callable[[Callable[[O], R]], Callable[P, R]]:
    """Has a function of options take the fields of their class as its arguments, with their names, types, defaults and help.

    Raises:
        TypeError: when it is called with others, as any function does.
    """
    signature = inspect.signature(options)

    def decorate(function: Callable[[O], R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            return function(options(*args, **kwargs))

        call.__signature__ = signature.replace(return_annotation=function.__annotations__["return"])  # type: ignore[attr-defined]
        if function.__doc__:
            call.__doc__ = _add_arguments(function.__doc__, signature.parameters)
        return call

    return decorate


def _add_arguments(documentation: str, names: Iterable[str]) -> str:
    """A docstring with what is said of these options, before the errors that it tells of."""
    help_of = {option.name: about_of(option).help for option in every_option()}
    lines = "".join(f"\n        {name}: {help_of[name]}." for name in names)
    before, mark, after = documentation.partition("\n\n    Raises:")
    return f"{before}\n\n    Args:{lines}{mark}{after}"
