"""``streamconv plan SRC DST``."""

from __future__ import annotations

import argparse
from pathlib import Path

from streamconv import memory
from streamconv.cli.console import Console
from streamconv.cli.deciding import decide_options
from streamconv.cli.parser import read_options
from streamconv.cli.showing import shows_bar, suggest_layouts
from streamconv.conversion import api
from streamconv.conversion.options import PlanOptions
from streamconv.diagnose import report
from streamconv.errors import UsageError
from streamconv.formats.catalog import locate
from streamconv.planning.plan import BEGINNING, Plan
from streamconv.running.ahead import showing_stage
from streamconv.running.kept import check_replaceable, check_report
from streamconv.storage import is_url


@memory.collecting_rarely()
def execute(args: argparse.Namespace, out: Console) -> int:
    """Plans, says so, and writes the plan if a file is given."""
    if is_url(args.src):
        args.src = locate(args.src)  # what is listed for the plan is known afterwards
    if args.to:
        decide_options(args, out)
    with showing_stage(shows_bar(args)):
        plan = api.plan(**read_options(args, PlanOptions))
    if args.out:
        _write(args.out, plan)
    if args.json:
        out.say_json(plan.summary())
    elif not args.quiet:
        out.say(plan)
        out.say(report.describe_room(plan))
        suggest_layouts(args, plan, out)
    return 0


def _write(path: str, plan: Plan) -> None:
    """Writes a plan to a file. Raises UsageError: it cannot be written, or is another one's."""
    if is_url(path):
        raise UsageError(f"--out {path}: a plan is written to a file of this machine: give a path")
    check_replaceable("--out", Path(path), BEGINNING)
    check_report("--out", Path(path), plan)
    try:
        Path(path).write_text(plan.to_json(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be written: {error.strerror}") from error
