"""Whether the library that a checkpoint's config names opens it: asked of that library, in a process of its own, without data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamconv import memory
from streamconv.checkpoint.components import shorten
from streamconv.errors import RunError, UsageError
from streamconv.storage.staging import staging
from streamconv.text import join_lines
from streamconv.threads import looking
from streamconv.units import format_size

LIMIT = 4 << 30  # bytes that the library's process may take: its code, and the modules of a model without data
_ROOT = Path(__file__).parent.parent.parent
_CHILD = f"import sys; sys.path.append({str(_ROOT)!r}); from streamconv.library.opening import main; main()"
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Mismatch:
    """A tensor whose shape is not the one that the library's model has for it."""

    name: str
    stored: tuple[int, ...]
    model: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} (stored {list(self.stored)}, the model has {list(self.model)})"


@dataclass(frozen=True)
class Loading:
    """What a library says of a checkpoint that it opens.

    Attributes:
        library: its name.
        version: of it.
        model_class: the class that opens the checkpoint.
        missing: tensors of the model that the checkpoint does not have. Those of components begin with their folder.
        unexpected: tensors of the checkpoint that the model does not have.
        mismatched: those of another shape.
        errors: parts that the library cannot open, and why.
        unchecked: parts that could not be looked at here, and why.
    """

    library: str
    version: str
    model_class: str
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    errors: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the library has opened it, and found each tensor that it looked for, and no other."""
        return not (self.missing or self.unexpected or self.mismatched or self.errors)

    @property
    def opener(self) -> str:
        """Which library it is, and its class."""
        return f"{self.library} {self.version} ({self.model_class})"

    def faults(self) -> Iterator[str]:
        """What does not fit, a line for each kind."""
        if self.missing:
            yield f"{len(self.missing)} missing: {shorten(self.missing)}"
        if self.unexpected:
            yield f"{len(self.unexpected)} unexpected: {shorten(self.unexpected)}"
        if self.mismatched:
            yield f"{len(self.mismatched)} of another shape: {shorten([str(one) for one in self.mismatched])}"
        for error in self.errors:
            yield f"cannot be opened: {error}"

    def summary(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        table = asdict(self)
        return {"library": table.pop("library"), "version": table.pop("version"), "class": table.pop("model_class"), **table}

    @property
    def verdict(self) -> str:
        """What to say where it fits."""
        return f"{self.opener} opens it: every tensor is there"

    def lines(self) -> Iterator[str]:
        """In words."""
        if self.fits:
            yield self.verdict
        yield from (f"problem: {self.opener}: {fault}" for fault in self.faults())
        yield from (f"note: not checked: {part}" for part in self.unchecked)

    def __str__(self) -> str:
        return join_lines(self.lines())


def check_load(folder: Path, *, variant: str | None = None) -> Loading:
    """Has the library that a folder's config names open it.

    Code that lies beside the checkpoint is not run, nothing is fetched, and no data is read.

    Args:
        folder: of the checkpoint, on this machine.
        variant: of its weights.

    Raises:
        UsageError: nothing says which library it is, that library is not installed, or it cannot look at any of it.
        RunError: the library's process ended by itself.
    """
    return _ask(folder, variant=variant, opens=True)


def check_askable(folder: Path, name: str) -> None:
    """Refuses a checkpoint that `check_load` could not have opened, by the JSON files that its folder will have. Raises as that does.

    Args:
        folder: where these files are now.
        name: how messages call the checkpoint.
    """
    try:
        _ask(folder, variant=None, opens=False)
    except UsageError as error:
        raise UsageError(str(error).replace(str(folder), name)) from error


def _ask(folder: Path, *, variant: str | None, opens: bool) -> Loading:
    with staging() as place:
        reply = place / "reply.json"
        request = json.dumps({"folder": str(folder.absolute()), "variant": variant, "opens": opens, "reply": str(reply)})
        code = _run(request)
        answer = json.loads(reply.read_text()) if reply.is_file() else {}
    if refusal := answer.get("refusal"):
        raise UsageError(refusal)
    if not answer:
        raise RunError(f"--check-load: {folder}: the library's process ended by itself ({code}): look at it with the library's own loader")
    shapes = [Mismatch(name, tuple(stored), tuple(model)) for name, stored, model in answer["mismatched"]]
    lists = {key: tuple(answer[key]) for key in ("missing", "unexpected", "errors", "unchecked")}
    return Loading(answer["library"], answer["version"], answer["class"], mismatched=tuple(shapes), **lists)


def _run(request: str) -> str:
    """Runs the library's process to its end, within its memory; how it ended."""
    command = [sys.executable, "-P", "-c", _CHILD, request]
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env={**os.environ, **_OFFLINE}, **quiet) as process:  # noqa: S603 - our own module
        excess: list[int] = []

        def look() -> None:
            nbytes = memory.anonymous_of(process.pid)
            if nbytes > LIMIT:
                excess.append(nbytes)
                process.kill()

        try:
            with looking(look, lambda: 0.1):
                code = process.wait()
        finally:
            process.kill()
    if excess:
        return f"stopped at {format_size(excess[0])} of memory: it reads data, or its model is larger than {format_size(LIMIT)} without any"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
