"""``--rename``, ``--drop`` and ``--only``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, numbered, read, refusal, run, write

import streamconv

NAMES = ("model.embed.weight", "model.layers.0.up.weight", "model.layers.0.up.bias", "model.layers.1.up.weight", "head.weight")
SAME = {name: name for name in NAMES}
SWAPPED = {**SAME, NAMES[0]: NAMES[4], NAMES[4]: NAMES[0]}
FIRST = {**{name: name.removeprefix("model.") for name in NAMES}, NAMES[3]: "last.up.weight"}
TENSORS = numbered(dict.fromkeys(NAMES, (2, 3)))


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write(tmp_path / "src", TENSORS, config={"hidden_size": 3})


def converted(src: Path, *options: str) -> dict[str, torch.Tensor]:
    dst = src.parent / "out"
    assert run("convert", src, dst, *options, "--verify", "--quiet", "--overwrite", "--max-memory", ROOMY) == 0
    assert run("verify", src, dst, *options, "--quiet", "--max-memory", ROOMY) == 0
    assert (dst / "config.json").exists()
    return read(dst)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--rename", "model.{rest*} -> {rest*}"), {name: name.removeprefix("model.") for name in NAMES}),
        (
            ("--rename", "model.layers.{i}.up.weight->h.{i+1}.w"),
            {**SAME, NAMES[1]: "h.1.w", NAMES[3]: "h.2.w"},
        ),
        (("--drop", "head.weight"), {name: name for name in NAMES[:4]}),
        (("--drop", "*.bias", "--drop", "model.layers.{i}.up.weight"), {name: name for name in (NAMES[0], NAMES[4])}),
        (("--only", "model.layers.*"), {name: name for name in NAMES[1:4]}),
        (("--only", "head.*", "--rename", "head.weight -> h"), {NAMES[4]: "h"}),
        (("--only", "model.*", "--only", "model.layers.*", "--drop", "*.bias"), {name: name for name in (NAMES[0], NAMES[1], NAMES[3])}),
        (("--rename", "head.weight -> model.embed.weight", "--rename", "model.embed.weight -> head.weight"), SWAPPED),
        (("--rename", "model.layers.1.{rest*} -> last.{rest*}", "--rename", "model.{rest*} -> {rest*}"), FIRST),
    ],
    ids=str,
)
def test_names_as_options_say(src: Path, options: tuple[str, ...], names: dict[str, str]) -> None:
    assert_same(converted(src, *options), {new: TENSORS[old] for old, new in names.items()})


def test_with_casts_and_a_recipe(src: Path, tmp_path: Path) -> None:
    made = converted(src, "--only", "head.weight", "--dtype", "float16")
    assert_same(made, {"head.weight": TENSORS["head.weight"].half()})
    recipe = tmp_path / "toy.yaml"
    recipe.write_text("name: toy-a2b\nsummary: s\nrules:\n- {rule: 'x.{name*}', right: 'y.{name*}'}\n")
    made = converted(src, "--rename", "model.{rest*} -> x.{rest*}", "--drop", "head.weight", "--recipe", str(recipe))
    assert sorted(made) == sorted(f"y.{name.removeprefix('model.')}" for name in NAMES[:4])


def test_the_plan_tells_the_names_in_the_source(src: Path, tmp_path: Path) -> None:
    plan = streamconv.plan(src, tmp_path / "out", rename=["model.{rest*} -> {rest*}"], drop=["head.weight"], max_memory=ROOMY)
    assert {row.target: row.sources for row in plan.mapping} == {name.removeprefix("model."): (name,) for name in NAMES[:4]}
    assert (plan.dropped, plan.account.dropped) == (("head.weight",), {"head.weight": 1})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--rename", "foo.{x} -> bar.{x}"), "'foo.{x}': no tensor for it"),
        (("--rename", "model.{x}"), "expected 'PATTERN -> PATTERN'"),
        (("--rename", "model.{x -> {x}"), ">>>{"),
        (("--drop", "nothing.*"), "no tensor for it"),
        (("--only", "nothing.*"), "no tensor for it"),
        (("--rename", "model.layers.{i}.up.{what} -> head.{what}"), "i stand on one side only"),
        (("--rename", "model.{rest*} -> {what*}"), "must stand on both sides"),
        (("--only", "head.*", "--rename", "model.embed.weight -> embed"), "'model.embed.weight': no tensor for it"),
        (("--rename", "model.{rest*} -> {rest*}", "--rename", "model.embed.weight -> embed"), "'model.embed.weight': no tensor for it"),
        (("--rename", "model.embed.weight -> head.weight"), "head.weight and model.embed.weight would both be head.weight"),
        (("--rename", "model.embed.weight -> x", "--rename", "head.weight -> x"), "would both be x"),
        (("--drop", "*"), "leave no tensor"),
    ],
    ids=str,
)
def test_what_is_refused(src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], told: str) -> None:
    assert told in refusal(capsys, "convert", src, tmp_path / "out", *options)


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """Tensors of which the layers' weights are in fp8, each beside a scale."""
    src = write(tmp_path / "wide", numbered(dict.fromkeys(NAMES, (128, 128))), config={"hidden_size": 3})
    assert run("convert", src, src.parent / "fp8", "--quantize", "fp8", "--quiet", "--max-memory", ROOMY) == 0
    return src.parent / "fp8"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--rename", "model.{rest*} -> {rest*}"), {"layers.0.up.weight", "layers.0.up.weight_scale_inv"}),
        (("--drop", "model.layers.0.up.*"), {"model.layers.1.up.weight", "model.layers.1.up.weight_scale_inv"}),
        (("--rename", "{x*}.weight -> {x*}.w", "--rename", "{x*}.weight_scale_inv -> {x*}.w_scale_inv"), {"model.layers.0.up.w_scale_inv"}),
        (("--rename", "model.layers.0.up.weight -> w", "--dequantize"), {"w", "model.layers.1.up.weight"}),
    ],
)
def test_quantized_weights_go_as_a_whole(quantized: Path, options: tuple[str, ...], names: set[str]) -> None:
    made = converted(quantized, *options)
    assert names <= made.keys()
    assert not ("--drop" in options and "model.layers.0.up.weight_scale_inv" in made)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--rename", "model.layers.{i}.up.weight -> h.{i}.weight"),
            "would be h.0.weight and model.layers.0.up.weight_scale_inv: rename both",
        ),
        (("--rename", "{x*}_scale_inv -> {x*}_scale"), "would be model.layers.0.up.weight and model.layers.0.up.weight_scale: rename both"),
        (("--drop", "*_scale_inv"), "model.layers.0.up.weight stays without model.layers.0.up.weight_scale_inv, which are of one"),
        (("--only", "*_scale_inv"), "model.layers.0.up.weight_scale_inv stays without model.layers.0.up.weight, which are of one"),
    ],
)
def test_parts_of_quantized_weights_are_refused(
    quantized: Path, options: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refusal(capsys, "convert", quantized, quantized.parent / "none", *options)
    assert not (quantized.parent / "none").exists()
