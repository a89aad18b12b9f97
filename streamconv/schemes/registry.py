"""The quantizations that there are: this package's, those of entry points of other packages, and those that a program registers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from streamconv.errors import UsageError
from streamconv.extensions import extensions
from streamconv.schemes.preset import Preset
from streamconv.schemes.scheme import Scheme

MODULES = ("awq", "bitsandbytes", "compressed_tensors", "fp8", "gguf", "gptq", "modelopt", "mxfp4")  # of this package
GROUP = "streamconv.schemes"

_known: dict[str, Scheme] = {}


def schemes() -> Mapping[str, Scheme]:
    """All of them, by each of their methods; a module is imported when they are asked for the first time.

    Raises:
        UsageError: an entry point gives no scheme, or one with a method that another has.
    """
    if not _known:
        listed: dict[str, Scheme] = {}
        for name in MODULES:
            _add(listed, importlib.import_module(f"streamconv.schemes.{name}").SCHEME, name)
        for extension in extensions(GROUP):
            _add(listed, extension.load(), extension.origin)
        _known.update(listed)
    return _known


def presets() -> Mapping[str, Preset]:
    """All ways of quantizing, by name."""
    return {preset.name: preset for scheme in dict.fromkeys(schemes().values()) for preset in scheme.presets}


def register(scheme: Scheme) -> None:
    """Adds a quantization to those that ``--dequantize`` knows.

    Another package does so by an entry point of the group ``streamconv.schemes``, which gives a `Scheme`.

    Raises:
        UsageError: another one has one of its methods.
    """
    schemes()
    _add(_known, scheme, "register")


def of_codes(dtype: str) -> Scheme | None:
    """The quantization whose codes have a dtype, where no config says which it is."""
    return next((scheme for scheme in schemes().values() if dtype in scheme.codes), None)


def _add(schemes_by_method: dict[str, Scheme], scheme: object, origin: str) -> None:
    if not isinstance(scheme, Scheme):
        raise UsageError(f"{origin}: expected a Scheme, found a {type(scheme).__name__}: mend it")
    for method in scheme.methods:
        if schemes_by_method.setdefault(method, scheme) is not scheme:
            raise UsageError(f"{origin}: there is a quantization by {method} already: leave out one of them")
