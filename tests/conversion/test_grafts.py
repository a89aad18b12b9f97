"""``--graft``: tensors of another checkpoint beside or instead of the source's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, numbered, read, refusal, run, write

OWN = numbered({"model.layers.0.a": (2, 3), "model.layers.1.a": (2, 3), "head": (4,)}, torch.bfloat16)
OTHER = {name: tensor + 100 for name, tensor in numbered({"model.layers.0.a": (2, 3), "model.layers.2.a": (3,), "visual.b": (5,)}).items()}


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    own = write(tmp_path / "own", OWN, config={"num_hidden_layers": 2, "model_type": "toy"})
    other = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "vision_config": {"depth": 3}}
    return own, write(tmp_path / "other", OTHER, shards=2, config=other)


def grafted(both: tuple[Path, Path], *options: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    own, other = both
    out = own.parent / "out"
    words = [own, out, "--graft", other, *options]
    assert run("convert", *words, "--verify", "--quiet", "--overwrite", "--max-memory", ROOMY) == 0
    assert run("verify", *words, "--quiet", "--max-memory", ROOMY) == 0
    return read(out), json.loads((out / "config.json").read_text())


def test_what_is_taken_comes_beside(both: tuple[Path, Path]) -> None:
    made, config = grafted(both, "--take", "model.layers.2.*", "--take", "visual.{name*} -> tower.{name*}")
    assert_same(made, {**OWN, "model.layers.2.a": OTHER["model.layers.2.a"], "tower.b": OTHER["visual.b"]})
    assert config == {"num_hidden_layers": 2, "model_type": "toy", "num_nextn_predict_layers": 1}
    made, config = grafted(both, "--take", "visual.*", "--dtype", "float16")
    assert_same(made, {name: tensor.half() for name, tensor in {**OWN, "visual.b": OTHER["visual.b"]}.items()})
    assert config["vision_config"] == {"depth": 3}


def test_what_is_there_is_replaced_if_asked(both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    made, config = grafted(both, "--take", "model.layers.0.a", "--replace")
    assert_same(made, {**OWN, "model.layers.0.a": OTHER["model.layers.0.a"]})
    assert "num_nextn_predict_layers" not in config
    own, other = both
    told = refusal(capsys, "convert", own, own.parent / "no", "--graft", other, "--take", "model.layers.0.a")
    assert "model.layers.0.a is in SRC, too: --replace" in told


def test_what_was_dropped_or_renamed_away_may_be_grafted(both: tuple[Path, Path]) -> None:
    name = "model.layers.0.a"
    made, _ = grafted(both, "--drop", name, "--take", name)
    assert_same(made, {**OWN, name: OTHER[name]})
    made, _ = grafted(both, "--rename", f"{name} -> b", "--take", name)
    assert_same(made, {**OWN, name: OTHER[name], "b": OWN[name]})


@pytest.mark.parametrize(
    ("own", "other", "takes", "said"),
    [
        ({}, {}, ["lm_head.weight"], False),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, ["lm_head.weight"], False),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}, ["lm_head.weight"], False),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}, ["lm_head.weight", "model.embed_tokens.weight"], True),
        ({"tie_word_embeddings": True}, {}, ["model.embed_tokens.weight"], True),
    ],
    ids=str,
)
def test_a_head_that_comes_is_not_tied(own: dict[str, bool], other: dict[str, bool], takes: list[str], said: bool, tmp_path: Path) -> None:
    names = {"model.embed_tokens.weight": (4, 2), "lm_head.weight": (4, 2)}
    src = write(tmp_path / "own", numbered({"model.embed_tokens.weight": (4, 2)}), config=own)
    src2 = write(tmp_path / "other", {name: tensor + 9 for name, tensor in numbered(names).items()}, config=other)
    options = [word for name in takes for word in ("--take", name)]
    _, config = grafted((src, src2), *options, "--replace")
    assert config["tie_word_embeddings"] is said


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--take", "nothing.*"), "no tensor for it"),
        ((), "--take PATTERN says which"),
        (("--take", "a ->"), "expected 'PATTERN -> PATTERN'"),
    ],
    ids=str,
)
def test_what_is_refused(both: tuple[Path, Path], capsys: pytest.CaptureFixture[str], options: tuple[str, ...], told: str) -> None:
    own, other = both
    assert told in refusal(capsys, "convert", own, own.parent / "out", "--graft", other, *options)
    told = refusal(capsys, "convert", own, own.parent / "out", "--graft", other, "--take", "visual.*", "--reclaim-source", "--yes")
    assert "would be given back, too" in told
    assert "give that, too" in refusal(capsys, "convert", own, own.parent / "out", "--take", "a")


def test_quantized_weights_come_where_the_config_describes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = numbered({f"model.layers.{k}.up.weight": (128, 128) for k in range(2)}, torch.bfloat16)
    plain = write(tmp_path / "plain", weights, config={"model_type": "toy"})
    for scheme in ("fp8", "W8A16"):
        assert run("convert", plain, tmp_path / scheme, "--quantize", scheme, "--quiet", "--max-memory", ROOMY) == 0
    fp8, words = tmp_path / "fp8", tmp_path / "W8A16"
    moved = ("--take", "model.layers.0.up.{x*} -> model.layers.2.up.{x*}")
    assert run("convert", fp8, tmp_path / "out", "--graft", fp8, *moved, "--quiet", "--max-memory", ROOMY) == 0
    made = read(tmp_path / "out")
    assert {"model.layers.2.up.weight", "model.layers.2.up.weight_scale_inv"} <= made.keys()
    whole, part = ("--take", "model.layers.0.up.*", "--replace"), ("--take", "model.layers.0.up.weight", "--replace")
    cases = (
        (plain, fp8, whole, "model.layers.0.up.weight is quantized by fp8, and SRC is not: graft from what --dequantize makes of it"),
        (words, fp8, whole, "model.layers.0.up.weight is quantized by fp8, and SRC is so by compressed-tensors, and otherwise"),
        (fp8, fp8, part, "--take: model.layers.0.up.weight stays without model.layers.0.up.weight_scale_inv"),
        (fp8, plain, part, "model.layers.0.up.weight is quantized in SRC, and model.layers.0.up.weight_scale_inv would stay of it"),
        (words, plain, part, "model.layers.0.up.weight is quantized in SRC, and model.layers.0.up.weight_packed would stay of it"),
    )
    for own, other, takes, told in cases:
        assert told in refusal(capsys, "convert", own, tmp_path / "none", "--graft", other, *takes)


@pytest.mark.parametrize(("scheme", "key"), [("fp8", "modules_to_not_convert"), ("W8A16", "ignore")])
def test_numbers_that_come_to_quantized_weights_are_said_to_be_none(scheme: str, key: str, tmp_path: Path) -> None:
    weights = numbered({f"model.layers.{k}.up.weight": (128, 128) for k in range(2)}, torch.bfloat16)
    plain = write(tmp_path / "plain", {**weights, "norm.weight": torch.ones(3)}, config={"model_type": "toy"})
    assert run("convert", plain, tmp_path / "q", "--quantize", scheme, "--quiet", "--max-memory", ROOMY) == 0
    options = ["--drop", "model.layers.0.up.*", "--drop", "norm.*", "--graft", plain, "--take", "model.layers.0.*", "--take", "norm.weight"]
    assert run("convert", tmp_path / "q", tmp_path / "out", *options, "--quiet", "--max-memory", ROOMY) == 0
    before, after = (json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"] for folder in ("q", "out"))
    assert after == {**before, key: [*(before.get(key) or []), "model.layers.0.up"]}
