"""Files of weights as tensors without data, for libraries that open a checkpoint in a process of their own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass
class Reading:
    """Which file was opened last."""

    last: Path | None = None


@cache
def read_headers_only() -> Reading:
    """Has torch and safetensors give tensors on the meta device, for good: whoever loads a file in this process reads no data.

    A pickle is read by torch's weights-only machine, whatever the library asks for.
    """
    import safetensors
    import safetensors.torch
    import torch

    open_file, load, reading = safetensors.safe_open, torch.load, Reading()

    class Headers:
        """What a library reads of a file of safetensors."""

        def __init__(self, filename: str | os.PathLike[str], *_: object, **__: object) -> None:
            reading.last = Path(filename)
            with open_file(filename, framework="pt") as file:
                self._metadata = file.metadata()
                self._slices = {name: _Slice(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118 - it is no dict

        def __enter__(self) -> Headers:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def keys(self) -> list[str]:
            return list(self._slices)

        offset_keys = keys

        def metadata(self) -> dict[str, str] | None:
            return self._metadata  # type: ignore[no-any-return]

        def get_slice(self, name: str) -> _Slice:
            return self._slices[name]

        def get_tensor(self, name: str) -> Any:
            return self._slices[name][...]

        def get_tensors(self, names: list[str] | None = None) -> dict[str, Any]:
            return {name: self.get_tensor(name) for name in names or self._slices}

    def load_without_data(file: Any, *_: object, **__: object) -> Any:
        if isinstance(file, str | os.PathLike):
            reading.last = Path(file)
        return load(file, map_location="meta", weights_only=True)

    torch.load = torch.serialization.load = load_without_data  # type: ignore[assignment]
    safetensors.safe_open = safetensors.torch.safe_open = Headers  # type: ignore[misc,assignment,attr-defined]
    return reading


class _Slice:
    """A tensor of a file of safetensors, as the library asks for it."""

    def __init__(self, stored: Any) -> None:
        import torch
        from safetensors import torch as names

        self._shape, self._dtype = list(stored.get_shape()), str(stored.get_dtype())
        self._tensor = torch.empty(self._shape, dtype=names._TYPES[self._dtype], device="meta")

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        return self._dtype

    def __getitem__(self, index: Any) -> Any:
        return self._tensor[index]
