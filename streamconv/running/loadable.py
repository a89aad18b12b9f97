"""``--check-load`` of a run: whether a library will be there to open what it makes, and whether that then opens it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath

from streamconv.errors import UsageError
from streamconv.formats.registry import containers
from streamconv.formats.variants import variant_of
from streamconv.library.loading import Loading, check_askable, check_load
from streamconv.planning.plan import Plan
from streamconv.running.filling import LocalEngine
from streamconv.running.log import Log
from streamconv.storage import is_url
from streamconv.storage.staging import staging

LIBRARIES_READ = ("safetensors", "torch")


def check_loadable(plan: Plan, part: tuple[int, int] | None) -> None:
    """Refuses, before anything is written, what no library here could open afterwards. Raises UsageError."""
    if part:
        raise UsageError("--check-load goes with --finish: leave it out of --part")
    if is_url(plan.root) or plan.single:
        raise UsageError(f"--check-load: libraries open folders of this machine, DST is {plan.destination}: give a folder, or leave it out")
    if plan.format not in LIBRARIES_READ:
        raise UsageError(f"--check-load: no library opens {plan.format} files by a config: leave it out, or say --format safetensors")
    beside = set(plan.sidecars)
    numbers = [number for number, file in enumerate(plan.files) if file.path in beside and file.path.endswith(".json")]
    with staging() as folder:
        if numbers:
            LocalEngine(replace(plan.for_files(numbers), root=str(folder)), Log(), lambda _: None).run()
        check_askable(folder, plan.root)


def open_output(plan: Plan) -> Loading:
    """What the library says of a plan's output, which is complete. Raises StreamconvError."""
    kind = containers()[plan.format].names
    variants = (variant_of(PurePosixPath(file.path).name, kind) for file in plan.files if file.tensors)
    return check_load(Path(plan.root), variant=next(filter(None, variants), None))
