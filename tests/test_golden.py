"""Conversions against the recorded results of the reference converters."""

import golden_cases
import pytest
import torch
from checkpoint_files import assert_same, read, run

CASES = {
    "originals/internvl-hf2custom-a": ("internvl-hf2custom", "internvl-custom2hf", None),
    "originals/internvl-custom2hf-a": ("internvl-custom2hf", "internvl-hf2custom", None),
    "originals/internvl-hfscript-a": ("internvl-custom2hf", "internvl-hf2custom", "bfloat16"),
}


def test_every_case_is_run():
    found = {path.relative_to(golden_cases.FOLDER).with_suffix("").as_posix() for path in golden_cases.FOLDER.rglob("*.json")}
    assert found == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, tmp_path):
    case = golden_cases.load(name)
    recipe, inverse, dtype = CASES[name]
    source = golden_cases.write_source(case, tmp_path / "source")
    cast = ["--dtype", dtype] if dtype else []
    assert run("convert", source, tmp_path / "target", "--recipe", recipe, "--quiet", *cast) == 0
    found = {tensor: golden_cases.describe(value) for tensor, value in read(tmp_path / "target").items()}
    assert found == golden_cases.expected(case)

    back = ("convert", tmp_path / "target", tmp_path / "back", "--recipe", inverse, "--quiet", "--sidecars-from", source)
    assert run(*back) == 0
    wanted = golden_cases.source_tensors(case)
    assert_same(read(tmp_path / "back"), {n: t.to(getattr(torch, dtype)) for n, t in wanted.items()} if dtype else wanted)


@pytest.mark.parametrize("name", CASES)
def test_verify_sees_the_same(name, tmp_path):
    case = golden_cases.load(name)
    recipe, _, dtype = CASES[name]
    source = golden_cases.write_source(case, tmp_path / "source")
    settings = ["--recipe", recipe, "--quiet", *(["--dtype", dtype] if dtype else [])]
    assert run("convert", source, tmp_path / "target", *settings, "--max-shard-size", "60KB", "--verify") == 0
    assert run("verify", source, tmp_path / "target", *settings) == 0
    assert run("verify", source, tmp_path / "target", "--quiet") == 1
