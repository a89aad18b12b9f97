"""``--losses``: what casts and quantization change, as a computation in float64 of both files has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOMY, failure, read, refusal, run, write
from preset_models import PRESETS, write_model
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent.parent / "golden" / "presets"


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, dict[str, object]]:
    capsys.readouterr()
    assert run("convert", *arguments, "--losses", "--json", "--max-memory", ROOMY) == 0
    return {row["target"]: row for row in json.loads(capsys.readouterr().out)["losses"]}


def check(row: dict[str, object], before: torch.Tensor, after: torch.Tensor) -> None:
    before, after = before.double(), after.double()
    finite = (before - after).isfinite()
    overflowed = int((before.isfinite() & after.isinf()).sum())
    before, after = before[finite], after[finite]
    difference = before - after
    assert row["rounded"] == int((difference != 0).sum())
    assert row["overflowed"] == overflowed
    assert row["underflowed"] == int(((after == 0) & (before != 0)).sum())
    assert row["max_abs"] == pytest.approx(float(difference.abs().max()), rel=1e-6)
    assert row["relative_l2"] == pytest.approx(float(difference.norm() / before.norm()) if before.any() else 0.0, rel=1e-6)


WIDE, SINGLE, HALF, BRAIN = torch.float64, torch.float32, torch.float16, torch.bfloat16


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("source", "dtype"), [(SINGLE, "bfloat16"), (SINGLE, "float16"), (BRAIN, "float16"), (HALF, "bfloat16"), (WIDE, "float32")], ids=str
)
@pytest.mark.parametrize("recipe", [(), ("--max-shard-size", "300kB", "--workers", "1")])
def test_casts(tmp_path: Path, source: torch.dtype, dtype: str, recipe: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    numbers = torch.randn(700, 300, dtype=torch.float64) * torch.exp(torch.randn(700, 300, dtype=torch.float64) * 8)
    numbers[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    src = write(tmp_path / "x", {"a.weight": numbers.to(source), "b.weight": torch.ones(300, dtype=source)}, config={"model_type": "any"})
    rows = told(capsys, src, tmp_path / "out", "--dtype", dtype, *recipe)
    original, made = read(src), read(tmp_path / "out")
    for name, row in rows.items():
        assert (row["from"], row["to"]) == (str(source).removeprefix("torch."), dtype)
        check(row, original[name], made[name])
    assert next(iter(rows)) == "a.weight"


def test_what_holds_all_values_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = write(tmp_path / "x", {"a.weight": torch.randn(5, 5).to(torch.bfloat16)}, config={})
    assert told(capsys, src, tmp_path / "out", "--dtype", "float32") == {}
    assert run("convert", src, tmp_path / "again", "--losses", "--max-memory", ROOMY) == 0
    assert "no values were rounded" in capsys.readouterr().out


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("preset", ["fp8", "fp8_e4m3fnuz", *PRESETS])
def test_presets(tmp_path: Path, preset: str, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    src = write_model(tmp_path / "src", load_file(GOLDEN / f"{dtype}.safetensors"))
    rows = told(capsys, src, tmp_path / "out", "--quantize", preset)
    assert run("convert", tmp_path / "out", tmp_path / "plain", "--dequantize", "--quiet", "--max-memory", ROOMY) == 0
    original, made = read(src), read(tmp_path / "plain")
    weights = {name.removesuffix("_packed"): row for name, row in rows.items()}
    assert weights.keys() >= {name for name, tensor in original.items() if not torch.equal(tensor, made[name])}
    for name, row in weights.items():
        check(row, original[name], made[name])


def test_in_words_the_worst_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = write_model(tmp_path / "src", load_file(GOLDEN / "bfloat16.safetensors"))
    assert run("convert", src, tmp_path / "out", "--quantize", "W4A16", "--losses", "--max-memory", ROOMY) == 0
    said = capsys.readouterr().out
    assert "6 tensors changed: " in said  # the seventh is of zeros
    assert "weight_packed: bfloat16 to int4, " in said
    assert run("convert", src, tmp_path / "silent", "--quantize", "W4A16", "--max-memory", ROOMY) == 0
    assert "tensors changed" not in capsys.readouterr().out


def test_strict_values_commit_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"a.weight": torch.tensor([[1.0, 1e6]]), "b.weight": torch.ones(300, 300)}
    src = write(tmp_path / "x", tensors, config={})
    for more in ((), ("--max-shard-size", "100kB")):
        out = tmp_path / f"out{len(more)}"
        line = failure(capsys, 3, "convert", src, out, "--dtype", "float16", "--strict-values", *more, "--max-memory", ROOMY)
        assert "1 values of 1 tensors are too large for their new dtype, most of a.weight: nothing is committed" in line
        assert not list(out.glob("*.index.json"))
        assert not (out / "model.safetensors").exists()
        assert "instead of --resume" in refusal(capsys, "run", out, "--resume")
        again = ("--dtype", "bfloat16", "--strict-values", "--overwrite", *more, "--quiet", "--max-memory", ROOMY)
        assert run("convert", src, out, *again) == 0
        assert read(out)["a.weight"][0, 1] == torch.tensor(1e6).to(torch.bfloat16)


@pytest.mark.parametrize(("more", "told"), [(("--resume",), "instead of --resume"), (("--reclaim-source", "--yes"), "leave out --reclaim")])
def test_strict_values_are_refused_where_they_are_known_too_late(
    tmp_path: Path, more: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write(tmp_path / "x", {"a.weight": torch.ones(2, 2)}, config={})
    assert told in refusal(capsys, "convert", src, tmp_path / "out", "--dtype", "float16", "--strict-values", *more)
    assert "give a DST here" in refusal(capsys, "convert", src, "memory://strict/out", "--dtype", "float16", "--strict-values")
