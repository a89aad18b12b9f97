"""What the functions know that make a target's JSON files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from streamconv.dtypes import TensorSpec


@dataclass(frozen=True)
class Model:
    """What is known when a target's JSON files are made: the source's config, that of the target-side folder, the options, the tensors.

    ``read`` gives a JSON file of those that are copied along, by name, or an empty dict; ``notes`` takes lines for the user.
    """

    config: Mapping[str, Any]
    sidecar: Mapping[str, Any]
    options: Mapping[str, Any]
    sources: Mapping[str, TensorSpec]
    targets: Mapping[str, TensorSpec]
    read: Callable[[str], dict[str, Any]] = field(default=lambda _name: {})
    notes: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> str:
        """The dtype that most of the floating targets have."""
        floating = Counter(spec.dtype.name for spec in self.targets.values() if "float" in spec.dtype.name)
        return floating.most_common(1)[0][0] if floating else "float32"


Writer = Callable[[Model], dict[str, Any]]
"""Makes a target's JSON files: name -> contents."""
