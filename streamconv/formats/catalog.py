"""What files a checkpoint's folder may consist of, for servers that cannot list it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

from streamconv.formats.container import Names
from streamconv.formats.registry import by_suffix, containers
from streamconv.storage import locations
from streamconv.storage.folder import AnyPath, Location
from streamconv.storage.sources import Catalog, Hints

_CONFIG = "config.json"
_BESIDE = (
    _CONFIG, "generation_config.json", "params.json", "model_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "modules.json", "README.md", "LICENSE",
)  # fmt: skip
_MAX_NAME = 255  # bytes of a folder's name
_MAX_CODE = 64  # files of Python code that are asked for


def locate(path: AnyPath) -> Location:
    """Where a checkpoint is: on this machine, or behind a URL, where a server that cannot list is asked for the names of `catalog`.

    Raises:
        StreamconvError: nothing knows such URLs, there is nothing behind it, or the server does not answer.
    """
    return locations.locate(path, catalog())


def catalog() -> Catalog:
    """What checkpoints consist of in all containers that there are, and what lies beside weights."""
    probes = dict.fromkeys(chain.from_iterable(names.probes for names in _names()))
    series = list(chain.from_iterable(names.series for names in _names()))
    return Catalog(Hints(names=(*probes, *_BESIDE), series=series), (*by_suffix(), ".json"), _is_listing, _tells, _read)


def _names() -> Iterator[Names]:
    return (container.names for container in containers().values())


def _is_listing(names: Iterable[str]) -> bool:
    """Whether a checkpoint's weights are among files of these names."""
    suffixes, markers = tuple(by_suffix()), {names.marker for names in _names()}
    return any(name in markers or name.endswith(suffixes) for name in names)


def _tells(name: str) -> bool:
    return name == _CONFIG or name.endswith(".index.json") or any(name in (names.marker, names.other_index) for names in _names())


def _read(name: str, raw: bytes) -> Hints:
    for names in _names():
        if name == names.marker:
            folder = _folder_of(raw)
            series = [(f"{folder}/{before}", after) for before, after in names.nested_series]
            return Hints(series=series if folder else [])
    with suppress(ValueError, AttributeError, TypeError):  # reading it says what is wrong
        table = json.loads(raw)
        if name == _CONFIG:
            return Hints(names=_code_files(table))
        return Hints(present=list(map(str, table.get("weight_map", table).values())))
    return Hints()


def _code_files(config: Mapping[str, Any]) -> list[str]:
    """The files of Python code beside a config that it names."""
    modules = (str(value) for value in config.get("auto_map", {}).values())
    return sorted({f"{value.partition('.')[0]}.py" for value in modules if "--" not in value})[:_MAX_CODE]


def _folder_of(raw: bytes) -> str:
    """The folder that a marker names; nothing where it names none."""
    text = raw[:_MAX_NAME].decode("utf-8", "replace").strip()
    name = str(int(text)) if text.isascii() and text.isdigit() else text
    return name if name.isprintable() and "/" not in name and name not in ("", ".", "..") else ""
