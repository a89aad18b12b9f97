"""What an adapter of PEFT says of itself, and whether its tensors go together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from streamconv.checkpoint.opening import read_config
from streamconv.diagnose.contradictions import Stated
from streamconv.diagnose.findings import Finding
from streamconv.dtypes import TensorSpec
from streamconv.errors import FormatError
from streamconv.storage.folder import Folder

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_HALF = re.compile(r"(?P<module>.+\.lora_(?:embedding_)?)(?P<side>[AB])(?P<rest>(?:\..+)?)", re.DOTALL)


def check_adapter(folder: Folder, path: str, specs: Mapping[str, TensorSpec]) -> Iterator[Finding]:
    """What kind of adapter a folder holds, if it holds one; halves of products without the other, ranks that its config does not give."""
    halves = {name: match for name, match in ((name, _HALF.fullmatch(name)) for name in specs) if match}
    if not (halves or any(name.startswith(_PREFIX) for name in specs)):
        return
    try:
        own = Stated(read_config(folder, CONFIG))
    except FormatError as error:
        yield Finding(str(error).rpartition("; ")[0] or str(error), CONFIG, "nothing says how the adapter is merged", "save it again")
        return
    if not own.table:
        why = "its tensors are an adapter's, and nothing says how they are merged"
        yield Finding("it is missing", CONFIG, why, "get it from where they come from")
        return
    kind, rank, base = own.text("peft_type"), own.number("r"), own.text("base_model_name_or_path")
    if not kind:
        yield Finding("it has no peft_type", CONFIG, "PEFT does not load it", "get it from where the weights come from")
    described = f"an adapter of kind {kind or 'unknown'}{f', rank {rank}' if rank else ''}{f', of {base}' if base else ''}"
    yield Finding(described, CONFIG, "it is no model by itself", f"merge it: convert BASE DST --adapter {path}", problem=False)
    alone = [name for name, match in halves.items() if _other_half(match) not in specs]
    if alone:
        what = f"{_other_half(halves[alone[0]])} is not there{_count_others(alone)}"
        yield Finding(what, alone[0], "half a product cannot be merged", "save the adapter again")
    if kind == "LORA" and rank and not (own.table.get("rank_pattern") or own.table.get("target_parameters")):
        misfits = [name for name, match in halves.items() if _rank(match, specs[name]) != rank]
        if misfits:
            what = f"its shape is {list(specs[misfits[0]].shape)}, and r is {rank}{_count_others(misfits)}"
            yield Finding(what, misfits[0], f"{CONFIG} is of another adapter", "get both from the same place")


def _other_half(half: re.Match[str]) -> str:
    return f"{half['module']}{'B' if half['side'] == 'A' else 'A'}{half['rest']}"


def _rank(half: re.Match[str], spec: TensorSpec) -> int | None:
    """The rank that the shape of half a product says."""
    axis = 0 if half["side"] == "A" else 1
    return spec.shape[axis] if axis < len(spec.shape) else None


def _count_others(names: list[str]) -> str:
    return f" (and so of {len(names) - 1} more)" if len(names) > 1 else ""
