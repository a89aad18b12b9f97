"""What ``--dtype`` and ``--keep-dtype`` ask for, and what they must not do: touch what belongs to a quantization."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec, parse_dtype
from streamconv.errors import UsageError
from streamconv.library.model import kept_modules
from streamconv.notation.names import nearest
from streamconv.notation.names import parse as parse_names
from streamconv.schemes.detection import find_quantization, quantized_tensors

AUTO = "auto"


class Casting:
    """Which dtype a target shall have; None: its own. It knows what it was asked for, and by which names.

    Args:
        dtype: of ``--dtype``, or None.
        keep: the patterns of ``--keep-dtype``: name patterns, or globs; ``auto`` for what the model's own class keeps.
    """

    def __init__(self, dtype: object, keep: Iterable[str]) -> None:
        self._wanted = parse_dtype(dtype).name if dtype is not None else None
        if self._wanted not in (None, *CASTABLE):
            raise UsageError(f"--dtype {dtype}: tensors can be cast to {', '.join(CASTABLE)}")
        self._dtype = dtype
        self._keep = {text: parse_names(text) if "{" in text else None for text in keep if text != AUTO}
        self._wants_own, self._modules = AUTO in keep, re.compile(r"(?!)")
        self._cast: set[str] = set()
        self._same = False

    def __call__(self, name: str, spec: TensorSpec) -> str | None:
        if self._wanted is None or spec.dtype.name not in CASTABLE or self._is_kept(name):
            return None
        if spec.dtype.name == self._wanted:
            self._same = True
        else:
            self._cast.add(name)
        return self._wanted

    def ask_class(self, config: Mapping[str, Any]) -> str | None:
        """Keeps what the model's class keeps, where that is asked for; which modules that are, in a note.

        Args:
            config: of the model that is written.

        Raises:
            UsageError: transformers is not installed, or has no such class.
        """
        if not self._wants_own or self._wanted is None:
            return None
        modules = kept_modules(config, self._wanted, f"--keep-dtype {AUTO}")
        if modules:
            self._modules = re.compile(rf"(?:.*\.)?(?:{'|'.join(map(re.escape, modules))})(?:\..*)?", re.DOTALL)
        return f"--keep-dtype {AUTO}: its class keeps {', '.join(modules) or 'nothing'}"

    @property
    def dtype(self) -> str | None:
        """What is asked for, None: nothing."""
        return self._wanted

    @property
    def keeps_some(self) -> bool:
        """Whether it is asked to cast, and to leave some alone."""
        return self._wanted is not None and (bool(self._keep) or self._wants_own)

    def _is_kept(self, name: str) -> bool:
        return self._modules.fullmatch(name) is not None or any(self._fits(text, name) for text in self._keep)

    def _fits(self, text: str, name: str) -> bool:
        pattern = self._keep[text]
        return fnmatch.fnmatchcase(name, text) if pattern is None else pattern.match(name) is not None

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raises UsageError where one of the patterns is that of no target."""
        targets = list(names)
        for text in self._keep:
            if not any(self._fits(text, name) for name in targets):
                folded = dict.fromkeys(re.sub(r"\d+", "*", name) if re.search(r"[*{]", text) else name for name in targets)
                near = nearest(re.sub(r"\{\w+[^}]*\}", "*", text), folded)
                hint = f"; the nearest is {near[0]}" if near else ""
                raise UsageError(f"--keep-dtype {text!r}: none of {len(targets)} tensors is called so{hint}")

    def check_quantized(
        self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], files: Callable[[], Mapping[str, Mapping[str, Any]]]
    ) -> str | None:
        """A note where the targets are quantized and stay so.

        Args:
            specs: of the targets.
            config: of the source, where the targets are quantized if that says so; else what they look like decides.
            files: gives those of `configs.FILES` beside it, by name.

        Raises:
            UsageError: they are quantized, and numbers were to be cast: those that are none would stay, and their scales be rounded.
        """
        if self._wanted is None:
            return None
        quantization = find_quantization(config, files(), specs)
        if quantization is None:
            odd = [name for name, spec in specs.items() if spec.dtype.name not in CASTABLE and not self._is_kept(name)]
            for name in odd:
                dtype = specs[name].dtype
                if dtype.name not in DTYPES:  # a container's own
                    problem = f"{dtype.packing}, of which nothing here makes numbers: leave --dtype out, or keep it with --keep-dtype"
                    raise UsageError(f"--dtype {self._dtype}: {name} is {specs[name]}: {problem}")
            floats = [name for name in odd if specs[name].dtype.floating]
            return f"{floats[0]} is {specs[floats[0]]} and stays so: --dtype casts {', '.join(CASTABLE)}" if floats else None
        own = quantized_tensors(specs)
        kept = bool(own) and not own & self._cast and any(self._is_kept(name) for name in own)
        if kept or (not self._cast and self._same):
            return f"{quantization}: what belongs to that stays as it is, in spite of --dtype {self._dtype}"
        if quantization.scheme:
            way = f"--dequantize --dtype {self._dtype} makes numbers of the weights"
        elif quantization.lacks_config:
            way = quantization.remedy
        else:
            way = "load it with the library that made it, and save its dequantized weights"
        raise UsageError(
            f"--dtype {self._dtype}: {quantization}: its weights would stay quantized and their scales be rounded: {way}; "
            "without --dtype all is copied as it is"
        )
