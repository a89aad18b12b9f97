"""AWQ: integers of four bits in words along the outputs, in the order that its kernels want; scales and zero points of groups of inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from streamconv.dtypes import TensorSpec
from streamconv.errors import UsageError
from streamconv.schemes.beside import Companions
from streamconv.schemes.configs import quantizations
from streamconv.schemes.gptq import Words
from streamconv.schemes.scheme import Group, Match, Scheme

_OWN = re.compile(r"\.(?:qzeros|scales)$")


class Awq(Scheme):
    """The version of AWQ for matrix products, ``gemm``."""

    methods = ("awq",)

    def match(self, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], title: str) -> Match:
        """See `Scheme.match`."""
        section = next((section for _, section in quantizations(config)), {})
        bits = section.get("bits", section.get("w_bit", 4))
        size = section.get("group_size", section.get("q_group_size", 128))
        version = str(section.get("version") or "gemm").lower()
        if version != "gemm" or bits != 4 or type(size) is not int or size == 0:
            raise UsageError(f"{title}: awq of version {version}, {bits!r} bits, groups of {size!r}: known is gemm of 4 bits")
        companions = Companions(specs, title)
        groups: list[Group] = []
        for name in specs:
            if name.endswith(".qweight"):
                stem = name.removesuffix("qweight")
                companions.take(name, [name])
                tensors = (name, *(companions.need(name, [f"{stem}{end}"]) for end in ("qzeros", "scales")))
                groups.append(Words(f"{stem}weight", tensors, 4, size if size > 0 else None, ("awq", "awq"), 0))
        return companions.conclude(groups, _OWN)


SCHEME = Awq()
