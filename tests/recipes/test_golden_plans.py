"""The plans of every family are those of tests/golden/plans; ``python tests/recipes/test_golden_plans.py --write`` writes them anew."""

from __future__ import annotations

import difflib
import sys
import tempfile
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent / "fixtures"))

import golden_plans

from streamconv import recipes

FAMILIES = golden_plans.families()
COMMAND = "python tests/recipes/test_golden_plans.py --write"
# They ask the installed transformers for its own layouts of the models that it knows, which change with it: see tests/library.
OF_TRANSFORMERS = {"transformers-hub2native", "transformers-native2hub"}


def test_every_recipe_has_a_plan():
    planned = {step.recipe for family in FAMILIES.values() for step in family.steps}
    assert set(recipes.registry()) - planned == OF_TRANSFORMERS
    texts = {path.relative_to(golden_plans.FOLDER).with_suffix("").as_posix() for path in golden_plans.FOLDER.rglob("*.txt")}
    assert texts == set(FAMILIES), COMMAND


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_plans_of_a_family(name, tmp_path):
    path = golden_plans.FOLDER / f"{name}.txt"
    before, now = path.read_text(), golden_plans.text_of(FAMILIES[name], tmp_path)
    if now != before:
        difference = difflib.unified_diff(before.splitlines(), now.splitlines(), f"golden/plans/{name}.txt", "as planned now", lineterm="")
        pytest.fail("\n".join([f"other plans; if that is meant: {COMMAND}", *difference]), pytrace=False)


def write_texts() -> None:
    for name, family in FAMILIES.items():
        path = golden_plans.FOLDER / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            path.write_text(golden_plans.text_of(family, Path(folder).resolve()))


if __name__ == "__main__" and "--write" in sys.argv:
    write_texts()
