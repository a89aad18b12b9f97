"""Which files of a checkpoint lie on a server that cannot list them: those that are there under the names that checkpoints have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from streamconv.errors import UsageError
from streamconv.storage import Entry
from streamconv.storage.addresses import refusal
from streamconv.storage.retries import Refused
from streamconv.storage.sources import CONCURRENT, Probed, in_parallel

First = Callable[[str, int], tuple[Entry, bytes]]
"""What a server tells of a file by its URL and gives of its first bytes; raises `Refused` where there is none."""

_KNOWN = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin", "model.ckpt", "latest",
    "consolidated.safetensors", "consolidated.00.pth", "consolidated.pth", "param_name_map.json", "config.json", "generation_config.json",
    "params.json", "model_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "modules.json", "README.md", "LICENSE",
)  # fmt: skip
_TELLING = ("latest", "param_name_map.json", "config.json")  # which other files there are, beside the indexes
_ABSENT = "there-is-no-such-file.safetensors"
_MAX_TEXT = 100_000_000  # bytes of an index
_MAX_NAME = 255  # bytes of a folder's name
_MAX_RANKS = 4096  # files of ranks that are asked for
_MAX_CODE = 64  # files of Python code that are asked for


def probe(url: str, first: First) -> Probed:
    """The files of the folder ``url``, as far as their names can be known; what an index names is taken to be there.

    Raises:
        UsageError: there is none, or the server answers to every name.
    """
    folder = url.rstrip("/") + "/"
    refused: set[int] = set()

    def look(name: str) -> Entry | None:
        try:
            return first(folder + quote(name), 1)[0]
        except Refused as error:
            refused.add(error.status)
            return None

    def look_for(names: Iterable[str]) -> dict[str, Entry]:
        asked = list(names)
        return {name: entry for name, entry in zip(asked, in_parallel(look, asked), strict=True) if entry is not None}

    found = Probed()
    found.update(look_for(_KNOWN))
    if not found:
        raise refusal(url, next((status for status in (401, 403, 200) if status in refused), 404))
    if look_for([_ABSENT]):
        raise UsageError(f"{url}: the server has a file for every name, even {_ABSENT}: give the URL of the checkpoint's file or index")
    for name, entry in found.items():
        if name in _TELLING or name.endswith(".index.json"):
            found.read[name] = first(folder + name, max(1, min(entry.size, _MAX_TEXT)))[1]
    for name, raw in found.read.items():
        with suppress(ValueError, AttributeError, TypeError):  # reading it says what is wrong
            if name == "config.json":
                found.update(look_for(_code_files(json.loads(raw))))
            elif name != "latest":
                said = json.loads(raw)
                found.update(dict.fromkeys(map(str, said.get("weight_map", said).values()), Entry(-1)) | found)
    series = [("consolidated.", ".pth"), ("consolidated.", ".pt")]
    if step := _folder_of_latest(found.read.get("latest", b"")):
        series.append((f"{step}/mp_rank_", "_model_states.pt"))
    for before, after in series:
        found.update(_look_for_ranks(url, look_for, before, after))
    return found


def _look_for_ranks(url: str, look_for: Callable[[Iterable[str]], dict[str, Entry]], before: str, after: str) -> dict[str, Entry]:
    """The files of a series that are there: ``before``, a number of two digits or more from 00, ``after``."""
    ranks = look_for([f"{before}00{after}"])
    more = ranks
    while more and len(ranks) < _MAX_RANKS:
        start = len(ranks)
        more = look_for(f"{before}{number:02}{after}" for number in range(start, start + CONCURRENT))
        ranks |= more
        if len(more) < CONCURRENT:
            return ranks
    if ranks:
        raise UsageError(f"{url}: the server has {len(ranks)} files {before}*{after} and more: a model has no so many ranks")
    return ranks


def _code_files(config: Any) -> list[str]:
    """The files of Python code beside a config that it names."""
    said = (str(value) for value in config.get("auto_map", {}).values())
    return sorted({f"{value.partition('.')[0]}.py" for value in said if "--" not in value})[:_MAX_CODE]


def _folder_of_latest(raw: bytes) -> str:
    """The folder that a file called latest names; nothing where it names none."""
    said = raw[:_MAX_NAME].decode("utf-8", "replace").strip()
    name = str(int(said)) if said.isascii() and said.isdigit() else said
    return name if name.isprintable() and "/" not in name and name not in ("", ".", "..") else ""
