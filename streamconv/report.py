"""What commands print, for people and as JSON. Large documents are written row by row."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from streamconv.checkpoint import Checkpoint
from streamconv.recipe import Drop, Recipe, Rule, Tie
from streamconv.units import format_size


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout; lists and other iterables at its top level are streamed item by item."""
    write = sys.stdout.write
    for number, (key, value) in enumerate(document.items()):
        write(f"{', ' if number else '{'}{json.dumps(key)}: ")
        if isinstance(value, Mapping | str) or not isinstance(value, Iterable):
            write(json.dumps(value, allow_nan=False))
            continue
        write("[")
        for k, item in enumerate(value):
            write(f"{', ' if k else ''}{json.dumps(item, allow_nan=False)}")
        write("]")
    write("}\n")


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What ``inspect --json`` prints; tensors are given one at a time."""
    contents = checkpoint.contents
    specs = [source.spec for source in contents.entries.values()]
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    names = {str(file): file.relative_to(root).as_posix() for file in contents.files}
    files = [{"path": names[str(file)], "size": file.stat().st_size} for file in contents.files]

    def tensors() -> Iterable[dict[str, Any]]:
        for name, source in contents.entries.items():
            whole = len(source.extents) == 1
            yield {
                "name": name,
                "dtype": source.spec.dtype.name,
                "shape": source.spec.shape,
                "nbytes": source.spec.nbytes,
                "file": names[source.extents[0].path],
                "offset": source.extents[0].offset if whole else None,
            }

    return {
        "format": contents.format,
        "total_size": sum(spec.nbytes for spec in specs),
        "total_parameters": sum(spec.numel for spec in specs),
        "files": files,
        "tensors": tensors(),
        "metadata": contents.metadata,
        "sidecars": checkpoint.sidecars,
    }


def print_checkpoint(checkpoint: Checkpoint) -> None:
    """What ``inspect`` prints: one line a tensor, sums at the end."""
    found = describe_checkpoint(checkpoint)
    bytes_by_dtype: Counter[str] = Counter()
    for row in found["tensors"]:
        bytes_by_dtype[row["dtype"]] += row["nbytes"]
        print(f"{row['name']}  {row['dtype']}{list(row['shape'])}  {format_size(row['nbytes'])}  {row['file']}")
    for note in checkpoint.contents.notes:
        print(f"note: {note}")
    dtypes = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in bytes_by_dtype.most_common())
    print(
        f"{checkpoint.path}: {found['format']}, {len(checkpoint)} tensors, {found['total_parameters']:,} parameters, "
        f"{format_size(found['total_size'])} in {len(found['files'])} files ({dtypes}); {len(found['sidecars'])} sidecars"
    )


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """One row of ``recipes --json``."""
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "source_format": recipe.source_format,
        "target_format": recipe.target_format,
        "options": [
            {"name": name, "help": option.help, "default": option.default, "choices": option.choices}
            for name, option in recipe.options.items()
        ],
        "reference": recipe.reference,
    }


def explain_recipe(recipe: Recipe) -> str:
    """What ``recipes NAME`` prints: every rule and option, and where the facts come from."""
    lines = [f"{recipe.name}: {recipe.summary}", f"  {recipe.source_format} -> {recipe.target_format}"]
    if recipe.reference:
        lines.append(f"  facts from {recipe.reference}")
    lines += [f"  --set {name}=...  {option.help}" for name, option in recipe.options.items()]
    for fact in recipe.rules:
        when = f"   when {fact.when}" if fact.when else ""
        if isinstance(fact, Rule):
            layout = f"\n      {fact.layout}" if fact.layout else ""
            lines.append(f"  {fact.left}\n   -> {fact.right}{'  (optional)' if fact.optional else ''}{when}{layout}")
        elif isinstance(fact, Drop):
            lines.append(f"  {fact.left}\n   {'not made' if fact.flipped else 'dropped'}: {fact.reason}{when}")
        elif isinstance(fact, Tie):
            how = f"left out where it repeats {fact.stored}" if fact.flipped else f"repeats {fact.left} where nothing else makes it"
            lines.append(f"  {fact.right}\n   {how}{when}")
    lines += [f"  lost: {line}" for line in recipe.lost]
    return "\n".join(lines)
