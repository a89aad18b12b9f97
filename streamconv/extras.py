"""Packages that come with an extra only: each is loaded where it is needed, or one line says what needs it and how to get it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from streamconv.errors import MissingDependency

_EXTRAS = {"matplotlib": "plots", "ray": "ray", "shtab": "completion", "torch": "torch", "transformers": "transformers"}


def require(package: str, what: str) -> ModuleType:
    """The package, loaded; ``what`` begins the line that says that it is not installed.

    >>> torch = require("torch", "writing .bin files")

    Raises:
        MissingDependency: it is not installed, or cannot be loaded.
    """
    try:
        return import_module(package)
    except ImportError as error:
        absent = error.name == package
        reason = "" if absent else f", which cannot be loaded ({error})"
        extra = _EXTRAS.get(package)
        name = f"'streamconv[{extra}]'" if extra else package
        raise MissingDependency(f"{what} needs {package}{reason}: pip install {name}") from None if absent else error
