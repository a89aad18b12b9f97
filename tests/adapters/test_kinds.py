"""What becomes of weights by each kind of adapter, beside the same in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import adapter, added, low_rank
from checkpoint_files import ROOMY, assert_same, random_tensor, read, refusal, write

import streamconv

BASE = {
    "model.embed_tokens.weight": random_tensor(20, 6, dtype=torch.bfloat16),
    "model.q.weight": random_tensor(8, 6, dtype=torch.bfloat16, seed=1),
    "model.q.bias": random_tensor(8, dtype=torch.bfloat16, seed=2),
    "model.conv.weight": random_tensor(4, 3, 2, 2, seed=4),
    "model.experts.gate_up_proj": random_tensor(3, 10, 6, dtype=torch.bfloat16, seed=5),
    "model.experts.down_proj": random_tensor(3, 6, 5, dtype=torch.bfloat16, seed=6),
    "model.norm.weight": random_tensor(6, dtype=torch.bfloat16, seed=7),
    "model.attention.in_proj_weight": random_tensor(18, 6, dtype=torch.bfloat16, seed=9),
    "lm_head.weight": random_tensor(20, 6, dtype=torch.bfloat16, seed=8),
}
Q, WORDS = BASE["model.q.weight"], BASE["model.embed_tokens.weight"]
TIED = {name: tensor for name, tensor in BASE.items() if name != "lm_head.weight"}


def merged(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    *,
    base: dict[str, torch.Tensor] = BASE,
    said: dict[str, Any] | None = None,
    **config: Any,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors, and config.json, of a base with an adapter; ``said``: the base's own config."""
    write(folder / "src", base, config={"model_type": "toy", "vocab_size": 20, **(said or {})})
    path = adapter(folder / "adapter", tensors, **config)
    streamconv.convert(folder / "src", folder / "out", adapter=[path], max_memory=ROOMY, progress=False)
    return read(folder / "out"), json.loads((folder / "out" / "config.json").read_text())


def changed(made: dict[str, torch.Tensor], base: dict[str, torch.Tensor] = BASE) -> dict[str, torch.Tensor]:
    """Those that are not the base's; no others have come or gone."""
    assert made.keys() == base.keys()
    return {name: tensor for name, tensor in made.items() if tensor.shape != base[name].shape or not torch.equal(tensor, base[name])}


def near(made: torch.Tensor, wanted: torch.Tensor) -> bool:
    spacing = torch.finfo(made.dtype).eps * wanted.double().abs()
    return made.dtype == wanted.dtype and bool(((made.double() - wanted.double()).abs() <= spacing + 1e-9).all())


def test_magnitudes(tmp_path: Path) -> None:
    low, words = low_rank("model.q", 8, 6), {"A": random_tensor(2, 20, seed=20), "B": random_tensor(6, 2, seed=21)}
    sizes = random_tensor(8, seed=22), random_tensor(6, seed=23)
    tensors = {**low, "model.q.lora_magnitude_vector": sizes[0], "model.embed_tokens.lora_magnitude_vector.weight": sizes[1]}
    tensors |= {f"model.embed_tokens.lora_embedding_{side}": tensor for side, tensor in words.items()}
    made = changed(merged(tmp_path, tensors, use_dora=True)[0])
    summed = added(Q.float(), low, 3 / 2)
    assert near(made.pop("model.q.weight"), (sizes[0][:, None] / summed.norm(dim=1, keepdim=True) * summed).bfloat16())
    summed = added(WORDS.float(), {"A": words["B"].t(), "B": words["A"].t()}, 3 / 2)
    assert near(made.pop("model.embed_tokens.weight"), (sizes[1] / summed.norm(dim=0) * summed).bfloat16())
    assert not made


def test_numbers_for_outputs_and_inputs(tmp_path: Path) -> None:
    outputs, inputs, channels = random_tensor(8, 1, seed=20), random_tensor(1, 5, seed=21), random_tensor(1, 3, 1, 1, seed=22)
    base = {**BASE, "model.down.weight": random_tensor(7, 5, dtype=torch.bfloat16), "model.down.bias": random_tensor(7)}
    tensors = {"model.q.ia3_l": outputs, "model.down.ia3_l": inputs, "model.conv.ia3_l": channels}
    made = changed(merged(tmp_path, tensors, base=base, peft_type="IA3", feedforward_modules=["down", "conv"])[0], base)
    wanted = {"model.q.weight": (Q.float() * outputs).bfloat16(), "model.q.bias": (BASE["model.q.bias"].float() * outputs[:, 0]).bfloat16()}
    wanted |= {"model.down.weight": (base["model.down.weight"].float() * inputs).bfloat16()}
    assert_same(made, {**wanted, "model.conv.weight": BASE["model.conv.weight"] * channels})


def test_products_of_products(tmp_path: Path) -> None:
    one, two = low_rank("a", 8, 6), low_rank("b", 8, 6, seed=30)
    (a1, b1), (a2, b2) = one.values(), two.values()
    slots = {"hada_w1_a": b1, "hada_w1_b": a1, "hada_w2_a": b2, "hada_w2_b": a2}
    made = changed(merged(tmp_path / "loha", {f"model.q.{slot}": tensor for slot, tensor in slots.items()}, peft_type="LOHA", alpha=3)[0])
    assert near(made.pop("model.q.weight"), (Q.float() + 1.5 * ((b1 @ a1) * (b2 @ a2))).bfloat16())
    first, left, right = random_tensor(2, 3, seed=40), random_tensor(4, 2, seed=41), random_tensor(2, 2, seed=42)
    kernel = random_tensor(2, 3, 2, 2, seed=43)
    tensors = {"model.q.lokr_w1": first, "model.q.lokr_w2_a": left, "model.q.lokr_w2_b": right}
    tensors |= {"model.conv.lokr_w1": random_tensor(2, 1, seed=44), "model.conv.lokr_w2": kernel}
    made |= changed(merged(tmp_path / "lokr", tensors, peft_type="LOKR", alpha=3)[0])
    assert near(made.pop("model.q.weight"), (Q.float() + 1.5 * torch.kron(first, left @ right)).bfloat16())
    wanted = BASE["model.conv.weight"] + 1.5 * torch.kron(tensors["model.conv.lokr_w1"][:, :, None, None], kernel)
    assert torch.allclose(made.pop("model.conv.weight"), wanted)
    assert not made


def test_cores_of_convolutions(tmp_path: Path) -> None:
    """Kernels as cores contracted with matrices for their outputs and inputs."""
    cores = [random_tensor(2, 2, 2, 2, seed=seed) for seed in (50, 51)]
    outputs = [random_tensor(2, 4, seed=seed) for seed in (52, 53)]
    inputs = [random_tensor(2, 3, seed=seed) for seed in (54, 55)]
    kernels = [torch.einsum("ijkl,ip,jr->prkl", *parts) for parts in zip(cores, outputs, inputs, strict=True)]
    tensors = {}
    for place in range(2):
        parts = {"t{}": cores[place], "w{}_a": outputs[place], "w{}_b": inputs[place]}
        tensors |= {f"model.conv.hada_{slot.format(place + 1)}": tensor for slot, tensor in parts.items()}
    made = changed(merged(tmp_path / "loha", tensors, peft_type="LOHA", alpha=3)[0])
    torch.testing.assert_close(made.pop("model.conv.weight"), BASE["model.conv.weight"] + 1.5 * kernels[0] * kernels[1])
    assert not made
    first, small = random_tensor(2, 1, seed=56), outputs[0][:, :2]
    tensors = {"lokr_w1": first, "lokr_t2": cores[0], "lokr_w2_a": small, "lokr_w2_b": inputs[0]}
    tensors = {f"model.conv.{slot}": tensor for slot, tensor in tensors.items()}
    made = changed(merged(tmp_path / "lokr", tensors, peft_type="LOKR", alpha=3)[0])
    wanted = BASE["model.conv.weight"] + 1.5 * torch.kron(first[:, :, None, None], kernels[0][:2])
    torch.testing.assert_close(made.pop("model.conv.weight"), wanted)
    assert not made


@pytest.mark.parametrize("kind", ["toy", "gpt_oss"])
def test_experts(kind: str, tmp_path: Path) -> None:
    """In PEFT's order of axes, inputs before outputs where the model has it so."""
    is_turned = kind == "gpt_oss"
    up, down = BASE["model.experts.gate_up_proj"], BASE["model.experts.down_proj"]
    base = (
        {**BASE, "model.experts.gate_up_proj": up.mT.contiguous(), "model.experts.down_proj": down.mT.contiguous()} if is_turned else BASE
    )
    tensors, wanted = {}, {}
    for name, wrappers, weight, seed in (("gate_up_proj", ".base_layer", up, 30), ("down_proj", "", down, 40)):
        count, outputs, inputs = weight.shape
        a, b = random_tensor(count * 2, inputs, seed=seed), random_tensor(outputs, 2 * count, seed=seed + 1)
        tensors |= {f"model.experts{wrappers}.lora_A.weight": a, f"model.experts{wrappers}.lora_B.weight": b}
        pairs = zip(a.reshape(count, 2, inputs), b.reshape(outputs, 2, count).permute(2, 0, 1), weight, strict=True)
        sums = torch.stack([added(one, {"A": low, "B": high}, 3 / 2, twice=True) for low, high, one in pairs])
        wanted[f"model.experts.{name}"] = sums.mT.contiguous() if is_turned else sums
    made, _ = merged(
        tmp_path, tensors, base=base, said={"model_type": kind}, target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    assert_same(changed(made, base), wanted)


@pytest.mark.parametrize(("version", "is_turned"), [("0.21.2", False), ("0.18.1", True), (None, True)])
def test_experts_as_high_as_wide(version: str | None, is_turned: bool, tmp_path: Path) -> None:
    """Earlier versions of PEFT took inputs to come first, and say so by their number, or by none."""
    weight, a, b = random_tensor(3, 4, 4, seed=1), random_tensor(6, 4, seed=2), random_tensor(4, 6, seed=3)
    tensors = {"model.experts.lora_A.weight": a, "model.experts.lora_B.weight": b}
    base = {"model.experts.down_proj": weight}
    made, _ = merged(tmp_path, tensors, base=base, peft_version=version, target_parameters=["experts.down_proj"])
    delta = torch.einsum("ore,eri->eoi", b.reshape(4, 2, 3), a.reshape(3, 2, 4)) * 1.5
    torch.testing.assert_close(made["model.experts.down_proj"], weight + (delta.mT if is_turned else delta))


def test_rows_norms_and_biases(tmp_path: Path) -> None:
    rows, bias, norm = random_tensor(4, 6, seed=20), random_tensor(8, seed=21), random_tensor(6, seed=22)
    tensors = {**low_rank("model.q", 8, 6), "model.q.lora_B.bias": bias, "model.embed_tokens.token_adapter.trainable_tokens_delta": rows}
    made = changed(merged(tmp_path / "lora", tensors, lora_bias=True, trainable_token_indices={"embed_tokens": [7, 3, 4, 19]})[0])
    wanted = WORDS.clone()
    wanted[[7, 3, 4, 19]] = rows.bfloat16()
    assert torch.equal(made.pop("model.embed_tokens.weight"), wanted)
    assert torch.equal(made.pop("model.q.bias"), (BASE["model.q.bias"].float() + bias * 1.5).bfloat16())
    assert list(made) == ["model.q.weight"]
    made = changed(merged(tmp_path / "norms", {"model.norm.ln_tuning_layers.weight": norm}, peft_type="LN_TUNING")[0])
    assert_same(made, {"model.norm.weight": norm.bfloat16()})


LOW = {"lora_embedding_A": random_tensor(2, 20, seed=20), "lora_embedding_B": random_tensor(6, 2, seed=21)}
OF_WORDS = {f"model.embed_tokens.{slot}": tensor for slot, tensor in LOW.items()}
OF_HEAD = low_rank("lm_head", 20, 6)
SAVED = random_tensor(20, 6, dtype=torch.bfloat16, seed=50)
WITH_WORDS = added(WORDS, {"A": LOW["lora_embedding_B"].t(), "B": LOW["lora_embedding_A"].t()}, 3 / 2, twice=True)


@pytest.mark.parametrize(
    ("tensors", "config", "words", "head"),
    [
        (OF_WORDS, {}, WITH_WORDS, WORDS),
        (OF_HEAD, {}, WORDS, added(WORDS, OF_HEAD, 3 / 2)),
        ({**OF_WORDS, **OF_HEAD}, {}, WITH_WORDS, added(WORDS, OF_HEAD, 3 / 2)),
        ({"lm_head.weight": SAVED}, {"modules_to_save": ["lm_head"]}, WORDS, SAVED),
        ({"model.embed_tokens.weight": SAVED}, {"modules_to_save": ["embed_tokens"]}, SAVED, WORDS),
        (
            {"model.embed_tokens.weight": SAVED, "lm_head.weight": SAVED},
            {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            SAVED,
            None,
        ),
        ({"model.embed_tokens.token_adapter.trainable_tokens_delta": SAVED}, {"trainable_token_indices": [*range(20)]}, SAVED, None),
    ],
    ids=["words", "head", "both", "saved head", "saved words", "saved together", "rows"],
)
@pytest.mark.parametrize("said", [{"tie_word_embeddings": True}, {"architectures": ["ToyForCausalLM"]}], ids=["said", "unsaid"])
@pytest.mark.sampled(3)
def test_what_is_tied_comes_apart(
    said: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    words: torch.Tensor,
    head: torch.Tensor | None,
    tmp_path: Path,
) -> None:
    made, after = merged(tmp_path, tensors, base=TIED, said=said, **config)
    assert torch.equal(made["model.embed_tokens.weight"], words)
    assert torch.equal(made["lm_head.weight"], head) if head is not None else "lm_head.weight" not in made
    assert after.get("tie_word_embeddings") == (False if head is not None else said.get("tie_word_embeddings"))


@pytest.mark.parametrize("said", [{"is_encoder_decoder": True}, {"architectures": ["ToyForMaskedLM"]}], ids=str)
def test_what_is_tied_in_other_ways_is_refused(said: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = write(tmp_path / "src", TIED, config={"model_type": "toy", "tie_word_embeddings": True, **said})
    told = refusal(capsys, "convert", src, tmp_path / "out", "--adapter", adapter(tmp_path / "adapter", OF_WORDS))
    assert "model.embed_tokens.weight is tied to more than a head" in told
    write(src, BASE, config={"model_type": "toy", "tie_word_embeddings": False, **said})
    streamconv.convert(src, tmp_path / "out", adapter=[tmp_path / "adapter"], max_memory=ROOMY, progress=False)


def test_more_words(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": random_tensor(23, 6, seed=20), "lm_head.weight": random_tensor(23, 6, seed=21)}
    made, config = merged(tmp_path, {**tensors, **low_rank("model.q", 8, 6)}, said={"text_config": {"vocab_size": 20, "x": 1}})
    assert_same({name: made[name] for name in tensors}, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert config["text_config"] == {"vocab_size": 23, "x": 1}


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        ({"model.q.ia3_l": torch.ones(8, 1)}, {"peft_type": "IA3"}, "kind IA3 have no scale to multiply"),
        (
            {**low_rank("model.q", 8, 6), "model.q.lora_magnitude_vector": torch.ones(6)},
            {"use_dora": True},
            "lora_magnitude_vector is float32[6]",
        ),
        (
            {"model.experts.lora_A.weight": torch.ones(6, 9), "model.experts.lora_B.weight": torch.ones(5, 6)},
            {},
            "fit none of model.experts",
        ),
        ({"model.experts.lora_A.weight": torch.ones(9, 5), "model.experts.lora_B.weight": torch.ones(6, 9)}, {}, "its rank is 2 by"),
        ({"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 6)}, {}, "trainable_token_indices of"),
        ({"model.q.lokr_w1": torch.ones(2, 2), "model.q.lokr_w2": torch.ones(4, 4)}, {"peft_type": "LOKR", "alpha": 1}, "make 8 x 8"),
        (
            {f"model.q.lokr_{slot}": torch.ones(size) for slot, size in (("w1", (2, 2)), ("w2", (4, 3)), ("w2_a", (4, 2)))},
            {"peft_type": "LOKR", "alpha": 1},
            "model.q.lokr_w2_a beside lokr_w1, lokr_w2",
        ),
        (
            {**low_rank("model.q", 8, 6), "model.q.lora_embedding_A": torch.ones(2, 8), "model.q.lora_embedding_B": torch.ones(6, 2)},
            {},
            "model.q.lora_A.weight beside lora_embedding_A",
        ),
        (
            {f"model.conv.hada_{slot}": torch.ones(2, 3) for slot in ("t1", "w1_a", "w1_b", "t2", "w2_a", "w2_b")},
            {"peft_type": "LOHA", "alpha": 1},
            "no core and factors of rank 2",
        ),
        (
            {"model.q.lora_A.one.weight": torch.ones(2, 6), "model.q.lora_B.two.weight": torch.ones(8, 2)},
            {},
            "it holds several adapters, one, two",
        ),
    ],
    ids=str,
)
def test_what_is_refused(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write(tmp_path / "src", BASE, config={"model_type": "toy"})
    path = adapter(tmp_path / "adapter", tensors, **config)
    assert told in refusal(capsys, "convert", src, tmp_path / "out", "--adapter", f"{path}@0.5")


def test_what_is_refused_of_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = write(tmp_path / "src", BASE, config={"model_type": "toy"})
    head = adapter(tmp_path / "adapter", {"lm_head.weight": SAVED})
    assert "lm_head.weight is replaced by --adapter" in refusal(capsys, "convert", src, tmp_path / "out", *["--adapter", head] * 2)
    told = refusal(capsys, "convert", src, tmp_path / "out", "--adapter", src)
    assert "no adapter_model.safetensors or adapter_model.bin in it" in told
    (head / "adapter_config.json").unlink()
    assert "no adapter_config.json in it" in refusal(capsys, "convert", src, tmp_path / "out", "--adapter", head)
    (head / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors or" in refusal(capsys, "convert", src, tmp_path / "out", "--adapter", head)


def test_how_many_weights_change_at_all(tmp_path: Path) -> None:
    """A delta may be too little for bfloat16; it is told of each kind of layer."""
    tensors = {**low_rank("model.q", 8, 6), **low_rank("model.conv", 4, 12)}
    tensors["model.q.lora_B.weight"][2:] = 0
    tensors["model.conv.lora_B.weight"] *= 1e-20
    write(tmp_path / "src", BASE, config={"model_type": "toy"})
    path = adapter(tmp_path / "adapter", tensors)
    result = streamconv.convert(tmp_path / "src", tmp_path / "out", adapter=[path], max_memory=ROOMY, progress=False)
    assert result.summary()["changed"] == [
        {"kind": "model.conv.weight", "tensors": 1, "weights": 48, "changed": 0},
        {"kind": "model.q.weight", "tensors": 1, "weights": 48, "changed": 12},
    ]
    assert "adapters changed 12 of 96 weights (12.5%); the fewest: model.conv.weight 0.0%, model.q.weight 25.0%" in str(result)
    cast = streamconv.convert(tmp_path / "src", tmp_path / "cast", adapter=[path], dtype="float16", max_memory=ROOMY, progress=False)
    assert cast.summary()["changed"] == result.summary()["changed"]
    name = "model.layers.0.self_attn.q_proj"
    write(tmp_path / "wide", {f"{name}.weight": random_tensor(128, 128)}, config={"model_type": "llama"})
    path = adapter(tmp_path / "other", low_rank(name, 128, 128))
    plan = streamconv.plan(tmp_path / "wide", tmp_path / "codes", adapter=[path], quantize="fp8", max_memory=ROOMY)
    assert "not counted: they are quantized afterwards" in " ".join(plan.notes)
