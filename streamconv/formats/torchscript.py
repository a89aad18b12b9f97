"""TorchScript archives (``torch.jit.save``): which of their tensors are a module's parameters and buffers.

Objects in such a file are of classes that its own sources declare, under ``code/``, which say what each attribute is. Nothing is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from streamconv.errors import FormatError
from streamconv.formats.files import damaged, short, show
from streamconv.formats.pickles import Odd, Tensor
from streamconv.formats.unpickling import Inert
from streamconv.formats.zips import Archive

PREFIX = "__torch__."
_MAX_SOURCE = 16 << 20  # bytes of a file of sources
_MAX_SOURCES = 32 << 20  # and of all
_CLASS = re.compile(r"^class (\w+)\(Module\):\n((?:  .*\n)*?)(?=  def |\S|\Z)", re.MULTILINE)
_LIST = re.compile(r"^  __(parameters|buffers)__ = \[(.*)\]$", re.MULTILINE)
_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')


class _Sources:
    """Which attributes of a module's class are in its state dict."""

    def __init__(self, archive: Archive) -> None:
        self._archive, self._budget = archive, _MAX_SOURCES
        self._files: dict[str, dict[str, set[str]]] = {}

    def state_names(self, kind: str) -> set[str] | None:
        """Names of parameters and buffers, by the class's full name; None if it is no module's."""
        folder, _, name = kind.rpartition(".")
        if folder not in self._files:
            self._files[folder] = dict(self._read(f"code/{folder.replace('.', '/')}.py"))
        return self._files[folder].get(name)

    def _read(self, file: str) -> Iterator[tuple[str, set[str]]]:
        if file not in self._archive.entries:
            return
        text = self._archive.read(file, min(_MAX_SOURCE, self._budget))
        self._budget -= len(text)
        for name, body in _CLASS.findall(text.decode("utf-8", "replace")):
            attributes: set[str] = set()
            for _, texts in _LIST.findall(body):
                attributes.update(_TEXT.findall(texts))
            yield name, attributes


def as_module(archive: Archive, program: Any) -> Inert:
    """A program as the record of a module in Python: with its parameters and buffers, and its modules.

    Raises:
        FormatError: the archive does not declare the program's class, or keeps its tensors as constants of its code.
    """
    sources = _Sources(archive)
    if type(program) is not Inert or sources.state_names(program.kind) is None:
        raise damaged(archive.path, f"its TorchScript program is {short.repr(program)}, which its code does not declare as a module")
    modules_by_id: dict[int, Inert] = {}
    waiting = [program]
    count = 0
    while waiting:
        script = waiting.pop()
        state_names = sources.state_names(script.kind) or set()
        tensors: dict[str, Any] = {}
        modules: dict[str, Any] = {}
        for name, value in chain.from_iterable(attributes.items() for attributes in script.attributes()):
            if name in state_names and type(value) in (Tensor, Odd):
                tensors[name] = value
            elif type(value) is Inert and sources.state_names(value.kind) is not None:
                if id(value) not in modules_by_id:
                    modules_by_id[id(value)] = Inert(value.kind)
                    waiting.append(value)
                modules[name] = modules_by_id[id(value)]
        module = modules_by_id.setdefault(id(script), Inert(script.kind))
        module.state = {"_parameters": tensors, "_buffers": {}, "_modules": modules}
        count += len(tensors)
    if not count:
        raise FormatError(
            f"{show(archive.path)}: a TorchScript program without parameters or buffers (frozen, they are constants of its code): "
            "give the file that it was frozen from"
        )
    return modules_by_id[id(program)]
