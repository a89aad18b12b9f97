"""Megatron Core's GPT models and Hugging Face's, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import ROOMY, assert_same, random_tensor, read, read_any, refusal, run, write
from megatron_models import KINDS, shapes_of
from safetensors.torch import load_file
from trainer_models import CONFIGS, MEGATRON, make

GOLDEN = Path(__file__).parent.parent / "golden" / "trainers"
TO, BACK = "mcore-hf2gpt", "mcore-gpt2hf"


def convert(src: Path, dst: Path, recipe: str, *more: object) -> Path:
    assert run("convert", src, dst, "--recipe", recipe, "--quiet", "--verify", "--max-memory", ROOMY, *more) == 0
    return dst


def config_in(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check(made: Path, kind: str, folder: Path) -> None:
    """What Megatron wrote in ``made`` becomes what its own ranks hold, and comes back."""
    expected = load_file(made / f"{kind}.expected.safetensors")
    there = convert(made / kind, folder / "hf", BACK, "--sidecars-from", config_in(folder / "config", CONFIGS[kind]))
    assert_same(read(there), expected)
    again = convert(there, folder / "again", TO, "--set", "pad_vocab=48")
    stored, written = read_any(made / kind), read_any(again)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):  # their last rows are no words
        assert not written[name][45:].any()
        stored[name], written[name] = stored[name][:45], written[name][:45]
    assert_same(written, stored)


@pytest.mark.parametrize("kind", MEGATRON)
def test_what_megatron_wrote(kind: str, tmp_path: Path) -> None:
    check(GOLDEN, kind, tmp_path)


def test_all_tensors_where_its_note_says_so(tmp_path: Path) -> None:
    convert_all = ("convert", GOLDEN / "mcore_llama", tmp_path / "out", "--set", "root=", "--quiet", "--max-memory", ROOMY)
    assert run(*convert_all) == 0
    assert read(tmp_path / "out").keys() >= read_any(GOLDEN / "mcore_llama").keys()


@pytest.mark.oracle
@pytest.mark.parametrize("kind", MEGATRON)
def test_what_megatron_writes_here(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("megatron.core")
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "made", [kind])
    check(tmp_path / "made", kind, tmp_path)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--set", "pad_vocab=16"),
        ("--set", "stacked=false"),
        ("--set", "norms=apart", "--set", "latent_norms=fused"),
        ("--set", "norms=everywhere"),
        ("--set", "singles=apart"),
    ],
    ids=str,
)
def test_there_and_back(kind: str, options: tuple[str, ...], tmp_path: Path) -> None:
    shapes, config = shapes_of(kind)
    tensors = {name: random_tensor(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}
    src = write(tmp_path / "src", tensors, config=config)
    there = convert(src, tmp_path / "there", TO, *options)
    assert_same(read(convert(there, tmp_path / "back", BACK, "--sidecars-from", src)), tensors)
    names = set(read_any(there))
    is_stacked = kind != "deepseek_v3" and not {"stacked=false", "singles=apart"} & {*options}
    assert ("decoder.layers.self_attention.linear_proj.weight" in names) == is_stacked
    parts = {f"decoder.layers.2.mlp.{expert}linear_fc1.weight_{half}" for expert in ("", "experts.experts.3.") for half in "wv"}
    assert len(parts & names) == (2 if "singles=apart" in options else 0)
    if kind == "deepseek_v3":
        first = "pre_mlp_layernorm.weight" if "norms=everywhere" in options else "mlp.linear_fc1.layer_norm_weight"
        assert {f"decoder.layers.0.{first}", "decoder.layers.1.pre_mlp_layernorm.weight"} <= names
        assert ("decoder.layers.0.self_attention.linear_kv_up_proj.layer_norm_weight" in names) == ("latent_norms=fused" in options)


def test_layers_that_predict_further_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes, config = shapes_of("deepseek_v3")
    src = write(tmp_path / "src", {name: random_tensor(*shape) for name, shape in shapes.items()}, config=config)
    there = convert(src, tmp_path / "there", TO)
    further = {**read_any(there), "mtp.layers.0.enorm.weight": random_tensor(8), "mtp.layers.0.eh_proj.weight": random_tensor(8, 16)}
    mixed = write(tmp_path / "mixed", further, config=config)
    assert run("convert", mixed, tmp_path / "back", "--recipe", BACK, "--sidecars-from", src, "--max-memory", ROOMY) == 0
    assert "2 dropped (2 by 'mtp.{rest*}')" in capsys.readouterr().out
    assert_same(read(tmp_path / "back"), read(src))
    more = {**read(src), "model.layers.3.enorm.weight": random_tensor(8), "model.layers.3.input_layernorm.weight": random_tensor(8)}
    with_them = write(tmp_path / "more", more, config=config)
    assert "model.layers.3" in refusal(capsys, "convert", with_them, tmp_path / "no", "--recipe", TO)
