"""The containers that there are: this package's, those of entry points of other packages, and those that a program registers."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from functools import cache
from itertools import product

from streamconv.errors import UsageError
from streamconv.extensions import extensions
from streamconv.formats.container import Container
from streamconv.text import did_you_mean

MODULES = (
    *(f"formats.{name}" for name in ("safetensors", "torch", "mindspore", "sat", "gguf")),
    *(f"trainers.{name}" for name in ("torch_dist", "dcp", "fsdp", "hf_shards", "zero", "mindspore2")),
)  # of this package, in the order in which they are looked for in a directory
GROUP = "streamconv.containers"
DEFAULT = "safetensors"  # what is written where nothing says otherwise

_known: dict[str, Container] = {}


def containers() -> Mapping[str, Container]:
    """All of them by name; a module is imported when it is asked for the first time.

    Raises:
        UsageError: an entry point gives no container, or one whose name another has.
    """
    if not _known:
        by_name: dict[str, Container] = {}
        for name in MODULES:
            _add(by_name, importlib.import_module(f"streamconv.{name}").CONTAINER, name)
        for extension in extensions(GROUP):
            _add(by_name, extension.load(), extension.origin)
        _known.update(by_name)
    return _known


def register(container: Container) -> None:
    """Adds a container to those that are read and, if it has a writer, written.

    Another package does so by an entry point of the group ``streamconv.containers``, which gives a `Container`.

    Raises:
        UsageError: another one has its name.
    """
    containers()
    _add(_known, container, "register")


def _add(by_name: dict[str, Container], container: object, origin: str) -> None:
    if not isinstance(container, Container):
        raise UsageError(f"{origin}: expected a Container, found a {type(container).__name__}: mend it")
    if container.name in by_name:
        raise UsageError(f"{origin}: there is a container called {container.name} already: give it another name")
    by_name[container.name] = container


def writable() -> Collection[str]:
    """The names of those that have a writer."""
    return [name for name, container in containers().items() if container.lay_out is not None]


def find_format(option: str, name: str) -> Container:
    """The container that ``option`` asks to be written by its name.

    Raises:
        UsageError: there is none, or it has no writer.
    """
    choices = f"known are {', '.join(writable())}"
    if name not in containers():
        raise UsageError(f"{option} {name}: unknown container; {choices}{did_you_mean(name, writable())}")
    container = containers()[name]
    if container.lay_out is None:
        raise UsageError(f"{option} {name}: such files are read, not written; {choices}")
    return container


def stems_of(libraries: Collection[str]) -> tuple[str, ...]:
    """How names of files start that these libraries look for, in any container."""
    return _stems_of(tuple(libraries), tuple(containers()))


@cache
def _stems_of(libraries: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """The same, asked for each file of a folder."""
    stems = (containers()[name].names.stems.get(library) for library, name in product(libraries, names))
    return tuple(dict.fromkeys(filter(None, stems)))


def library_of(stem: str | None) -> str | None:
    """The library that looks for files whose names start so, if one is known."""
    for container in containers().values():
        for library, own in container.names.stems.items():
            if own == stem:
                return library
    return None


def by_suffix() -> Mapping[str, Container]:
    """The container that a file's name says it is of, by how that ends."""
    container_of: dict[str, Container] = {}
    for container in containers().values():
        container_of |= dict.fromkeys(container.names.suffixes, container)
    return container_of
