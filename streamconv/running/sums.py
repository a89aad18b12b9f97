"""``SHA256SUMS``, which ``sha256sum --check`` reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from streamconv.digests import Crc32, format_sums
from streamconv.engine.io import sync_directory
from streamconv.engine.worker import Workers
from streamconv.planning.plan import Plan
from streamconv.running.directory import PARTIAL, partial

SUMS = "SHA256SUMS"


def write_sums(plan: Plan, digests: Mapping[str, str], suffix: str = PARTIAL) -> None:
    """Writes `SUMS` durably: of a plan's files those ``digests`` that are known, by path, and those of the others, which are finished.

    Beside an output of one file, lines of other files stay.
    """
    root, workers = Path(plan.root), Workers(plan)
    known = {name: digest for name, digest in digests.items() if not digest.startswith(Crc32.PREFIX)}
    try:
        sums = {file.path: known.get(file.path) or workers.own.digest(str(root / file.path), file.size) for file in plan.files}
    finally:
        workers.close()
    path = root / SUMS
    others = path.read_bytes() if plan.single and path.exists() else b""
    temporary = partial(path, suffix)
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(format_sums(sums, others))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(str(root))
