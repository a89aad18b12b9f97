"""Conversions against the recorded results of the reference converters."""

import golden_cases
import pytest
import torch
from checkpoint_files import assert_same, read, read_any, run

from streamconv.dtypes import parse_dtype

CASES = {
    "originals/internvl-hf2custom-a": ("internvl-hf2custom", "internvl-custom2hf", None),
    "originals/internvl-custom2hf-a": ("internvl-custom2hf", "internvl-hf2custom", None),
    "originals/internvl-hfscript-a": ("internvl-custom2hf", "internvl-hf2custom", "bfloat16"),
}


FOUND = sorted(path.relative_to(golden_cases.FOLDER).with_suffix("").as_posix() for path in golden_cases.FOLDER.rglob("*.json"))
FOUND = [name for name in FOUND if not name.startswith("trainers/")]  # files of checkpoints, in tests/trainers
MINDFORMERS = [name for name in FOUND if name.startswith("mindformers")]
ONE_WAY = {  # cases of which the way back does not bring everything
    "mindformers-extra/mindformers-wizardcoder-forward-a",
    "mindformers/mindformers-cogvlm2-forward-a",  # layers' rotary buffers that differ, which no model's do
    "mindformers/mindformers-deepseek3-forward-a",
    "mindformers/mindformers-deepseek3-reverse-a",
}
ELSEWHERE = {  # in test_originals_*.py
    f"originals/{name}" for name in ("detr-a", "gemma-a", "llama-meta-a", "llama-meta-a2", "mistral-a", "mixtral-a", "vipllava-a")
}


def test_every_case_is_run():
    sat = {name for name in FOUND if name.startswith("sat/")}  # in test_sat.py
    assert set(FOUND) == {*CASES, *MINDFORMERS, *ELSEWHERE, *sat}


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


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", MINDFORMERS)
def test_mindformers_there_and_back(name, tmp_path):
    case = golden_cases.load(name)
    recipe, inverse = golden_cases.recipes_of(case)
    dtype, options = golden_cases.dtype_of(case), golden_cases.options_of(case)
    source = golden_cases.write_source(case, tmp_path / "source")
    cast = ["--dtype", dtype] if dtype else []
    assert run("convert", source, tmp_path / "target", "--recipe", recipe, "--quiet", *options, *cast) == 0
    found = {tensor: golden_cases.describe(value) for tensor, value in read_any(tmp_path / "target").items()}
    assert found == golden_cases.expected(case)
    assert run("verify", source, tmp_path / "target", "--recipe", recipe, "--quiet", *options, *cast) == 0

    if name not in ONE_WAY:
        back = ("convert", tmp_path / "target", tmp_path / "back", "--recipe", inverse, "--quiet", "--sidecars-from", source)
        assert run(*back, *options) == 0
        wanted = golden_cases.source_tensors(case)
        made = getattr(torch, parse_dtype(dtype).name) if dtype else None
        assert_same(read_any(tmp_path / "back"), {n: t.to(made) for n, t in wanted.items()} if made else wanted)
