"""Adapters that PEFT makes, merged as its `merge_and_unload` does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import adapter, added, low_rank
from checkpoint_files import ROOMY, read, run, write
from safetensors.torch import save_file

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore"),
]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 40}
EXACT, NEAR = "exact", "near"


def llama(**more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **more))


def gpt2(**more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    words = {"bos_token_id": 0, "eos_token_id": 1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, **words, **more))


def experts(kind: str, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    own = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    config = transformers.CONFIG_MAPPING[kind](**SIZES, **own, head_dim=8, **more)
    return transformers.AutoModelForCausalLM.from_config(config)


def resnet() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[12, 20], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


def whisper() -> Any:
    transformers = pytest.importorskip("transformers")
    layers = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    widths = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8, "vocab_size": 40}
    words = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**layers, **widths, **words))


def lora(**more: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **more})


def other(kind: str, **more: Any) -> Any:
    return getattr(pytest.importorskip("peft"), kind)(**more)


def disturb(model: Any, seed: int = 1) -> None:
    """Gives all that an adapter has values of its own."""
    generator = torch.Generator().manual_seed(seed)
    own = ("lora_", "ia3_", "hada_", "lokr_", "modules_to_save", "trainable_tokens_delta", "ln_tuning_layers")
    for name, parameter in model.named_parameters():
        if any(part in name for part in own) and "original_module" not in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data = (parameter.data.float() + noise).to(parameter.dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "lora_" not in name and parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.2


def merged_by_both(folder: Path, model: Any, config: Any, dtype: torch.dtype, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is made here of a model and an adapter, and what PEFT makes."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = model.to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "src")
    tuned = peft.get_peft_model(model, config)
    disturb(tuned)
    tuned.save_pretrained(folder / "adapter")
    tuned.merge_and_unload().save_pretrained(folder / "wanted")
    words = ["convert", folder / "src", folder / "out", "--adapter", folder / "adapter", "--verify", "--quiet", "--max-memory", ROOMY]
    assert run(*words, *options) == 0
    return read(folder / "out"), read(folder / "wanted")


def check(made: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], how: str = EXACT) -> None:
    assert sorted(made) == sorted(wanted)
    for name, tensor in wanted.items():
        assert (made[name].dtype, made[name].shape) == (tensor.dtype, tensor.shape), name
        if how == EXACT or not tensor.is_floating_point():
            assert torch.equal(made[name], tensor), name
            continue
        places = made[name].double(), tensor.double()
        spacing = torch.finfo(tensor.dtype).eps * torch.maximum(*(place.abs() for place in places))
        assert bool(((places[0] - places[1]).abs() <= (1.01 if tensor.dtype != torch.float32 else 16) * spacing + 1e-7).all()), name


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "lora": (llama, lora, EXACT),
    "rslora": (llama, lambda: lora(use_rslora=True, rank_pattern={"q_proj": 6}, alpha_pattern={"down_proj": 3}), EXACT),
    "mica": (llama, lambda: lora(init_lora_weights="mica"), EXACT),
    "bias": (lambda: llama(attention_bias=True), lambda: lora(bias="lora_only"), EXACT),
    "all biases": (lambda: llama(attention_bias=True), lambda: lora(bias="all"), EXACT),
    "lora_bias": (lambda: llama(attention_bias=True), lambda: lora(target_modules=["q_proj"], lora_bias=True), EXACT),
    "embeddings": (llama, lambda: lora(target_modules=["embed_tokens", "lm_head", "v_proj"]), EXACT),
    "saved": (llama, lambda: lora(modules_to_save=["lm_head", "embed_tokens"]), EXACT),
    "tokens": (llama, lambda: lora(trainable_token_indices=[3, 7, 8, 9, 2]), EXACT),
    "tied tokens": (lambda: llama(tie_word_embeddings=True), lambda: lora(trainable_token_indices={"embed_tokens": [3, 7]}), EXACT),
    "dora": (llama, lambda: lora(use_dora=True), NEAR),
    "dora of embeddings": (llama, lambda: lora(use_dora=True, target_modules=["embed_tokens", "o_proj"]), NEAR),
    "gpt2": (gpt2, lambda: lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), EXACT),
    "gpt2, dora": (gpt2, lambda: lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True), NEAR),
    "tied, saved": (lambda: llama(tie_word_embeddings=True), lambda: lora(modules_to_save=["lm_head"]), EXACT),
    "tied, saved embedding": (lambda: llama(tie_word_embeddings=True), lambda: lora(modules_to_save=["embed_tokens"]), EXACT),
    "tied, saved together": (
        lambda: llama(tie_word_embeddings=True),
        lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        EXACT,
    ),
    "ia3": (
        lambda: llama(attention_bias=True),
        lambda: other("IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        EXACT,
    ),
    "gpt2, ia3": (
        gpt2,
        lambda: other("IA3Config", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
        EXACT,
    ),
    "loha": (llama, lambda: other("LoHaConfig", r=3, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}), EXACT),
    "lokr": (llama, lambda: other("LoKrConfig", r=2, target_modules=["q_proj", "down_proj"], decompose_both=True), NEAR),
    "lokr of large ranks": (llama, lambda: other("LoKrConfig", r=32, target_modules=["q_proj", "k_proj"]), EXACT),
    "loha of kernels": (resnet, lambda: other("LoHaConfig", r=3, target_modules=["convolution"], use_effective_conv2d=True), NEAR),
    "lokr of kernels": (resnet, lambda: other("LoKrConfig", r=2, target_modules=["convolution"], use_effective_conv2d=True), NEAR),
    "loha of lines": (whisper, lambda: other("LoHaConfig", r=3, target_modules=["conv1", "conv2"], use_effective_conv2d=True), NEAR),
    "lokr of lines": (whisper, lambda: other("LoKrConfig", r=2, target_modules=["conv1", "conv2"], use_effective_conv2d=True), NEAR),
    "norms": (llama, lambda: other("LNTuningConfig", target_modules=["input_layernorm", "norm"]), EXACT),
    "only tokens": (llama, lambda: other("TrainableTokensConfig", token_indices=[5, 1], target_modules=["embed_tokens"]), EXACT),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kinds(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, config, how = CASES[case]
    made, wanted = merged_by_both(tmp_path, model(), config(), dtype)
    check(made, wanted, how)
    said = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "wanted")]
    assert said[0].get("tie_word_embeddings") == said[1].get("tie_word_embeddings")


# Names and experts ---------------------------------------------------------------------------------------------------


def text_and_images(kind: str, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    words = {**SIZES, "num_key_value_heads": 2, **(text or {})}
    images = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, **(vision or {})}
    config = transformers.CONFIG_MAPPING[kind](text_config=words, vision_config=images, **more)
    return transformers.AutoModelForImageTextToText.from_config(config)


def causal(kind: str, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    own = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    return transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[kind](**SIZES, **own, **more))


def of_experts(*names: str, **more: Any) -> Any:
    return lora(target_modules=more.pop("target_modules", ["q_proj"]), target_parameters=list(names), **more)


STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "mixtral": (lambda: experts("mixtral"), lambda: of_experts(*STACKS, "mlp.gate.weight")),
    "mixtral, one parameter": (lambda: experts("mixtral"), lambda: of_experts(STACKS[1])),
    "qwen3_moe": (lambda: experts("qwen3_moe"), lambda: of_experts(*STACKS)),
    "qwen2_moe": (lambda: experts("qwen2_moe"), lambda: of_experts(*STACKS)),
    "olmoe": (lambda: experts("olmoe"), lambda: of_experts(*STACKS)),
    "gpt_oss": (lambda: experts("gpt_oss"), lambda: of_experts(*STACKS)),
    "deepseek_v3": (
        lambda: causal(
            "deepseek_v3",
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=24,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        ),
        lambda: of_experts(*STACKS, target_modules=["q_a_proj", "o_proj"]),
    ),
    "llava": (
        lambda: text_and_images("llava", {"model_type": "llama"}, {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}),
        lambda: lora(target_modules=["q_proj", "lm_head"]),
    ),
    "qwen2_vl": (
        lambda: text_and_images(
            "qwen2_vl",
            {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            {"embed_dim": 32, "depth": 1, "num_heads": 2, "hidden_size": 32, "patch_size": 4},
            tie_word_embeddings=False,
        ),
        lambda: lora(target_modules=["q_proj", "patch_embed.proj", "qkv"]),
    ),
    "qwen2": (lambda: causal("qwen2"), lora),
    "qwen3": (lambda: causal("qwen3"), lora),
    "mistral": (lambda: causal("mistral"), lora),
    "gemma": (lambda: causal("gemma"), lora),
    "gemma2": (lambda: causal("gemma2"), lora),
    "phi3": (lambda: causal("phi3"), lambda: lora(target_modules=["qkv_proj", "down_proj"])),
    "olmo2": (lambda: causal("olmo2"), lora),
    "granite": (lambda: causal("granite"), lora),
    "cohere": (lambda: causal("cohere"), lora),
    "gpt_neox": (lambda: causal("gpt_neox"), lambda: lora(target_modules=["query_key_value", "dense_4h_to_h"])),
    "opt": (
        lambda: causal("opt", ffn_dim=48, word_embed_proj_dim=32),
        lambda: lora(target_modules=["q_proj", "fc1"], modules_to_save=["final_layer_norm"]),
    ),
    "stablelm": (lambda: causal("stablelm"), lora),
    "starcoder2": (lambda: causal("starcoder2"), lambda: lora(target_modules=["q_proj", "c_fc"])),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", MODELS)
def test_models(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, config = MODELS[case]
    made, wanted = merged_by_both(tmp_path, model(), config(), dtype)
    check(made, wanted)


# What is read again --------------------------------------------------------------------------------------------------


def reloaded(folder: Path, model: Any, *adapters: str) -> dict[str, torch.Tensor]:
    """A model with adapters loaded from their folders and merged, one after the other, each saved before the next."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = folder / "src"
    for number, name in enumerate(adapters):
        own = type(model).from_pretrained(base, dtype="auto")
        assert isinstance(own, transformers.PreTrainedModel)
        base = folder / f"merged-{number}"
        peft.PeftModel.from_pretrained(own, folder / name).merge_and_unload().save_pretrained(base)
    return read(base)


def trained(folder: Path, name: str, model: Any, config: Any, seed: int, **saving: Any) -> None:
    """An adapter in a folder of that name."""
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(model, config)
    disturb(tuned, seed)
    tuned.save_pretrained(folder / name, **saving)
    tuned.unload()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("is_pickle", [False, True])
def test_dtypes_of_base_and_adapter(is_pickle: bool, dtype: torch.dtype, stored: torch.dtype, tmp_path: Path) -> None:
    model = llama().to(dtype)
    model.save_pretrained(tmp_path / "src")
    trained(tmp_path, "a", model, lora(modules_to_save=["lm_head"]), 1)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {name: tensor.to(stored) for name, tensor in read(file).items()}
    if is_pickle:
        file.unlink()
        torch.save(tensors, file.with_suffix(".bin"))
    else:
        save_file(tensors, file)
    assert run("convert", tmp_path / "src", tmp_path / "out", "--adapter", tmp_path / "a", "--quiet", "--max-memory", ROOMY) == 0
    check(read(tmp_path / "out"), reloaded(tmp_path, model, "a"))


def test_several(tmp_path: Path) -> None:
    model = llama().bfloat16()
    model.save_pretrained(tmp_path / "src")
    names = ("a", "b", "c")
    configs = lora(use_dora=True), lora(), other("IA3Config", target_modules=["q_proj"], feedforward_modules=[])
    for seed, (name, config) in enumerate(zip(names, configs, strict=True)):
        trained(tmp_path, name, model, config, seed)
    options = [word for name in names for word in ("--adapter", tmp_path / name)]
    assert run("convert", tmp_path / "src", tmp_path / "out", *options, "--quiet", "--max-memory", ROOMY) == 0
    check(read(tmp_path / "out"), reloaded(tmp_path, model, *names), NEAR)


@pytest.mark.parametrize("is_tied", [False, True])
def test_more_words(is_tied: bool, tmp_path: Path) -> None:
    """PEFT wants its user to resize the model first; here the adapter's rows are enough."""
    model = llama(tie_word_embeddings=is_tied).bfloat16()
    model.save_pretrained(tmp_path / "src")
    model.resize_token_embeddings(45)
    trained(tmp_path, "a", model, lora(), 1, save_embedding_layers=True)
    peft = pytest.importorskip("peft")
    own = type(model).from_pretrained(tmp_path / "src", dtype="auto")
    own.resize_token_embeddings(45)
    peft.PeftModel.from_pretrained(own, tmp_path / "a").merge_and_unload().save_pretrained(tmp_path / "wanted")
    assert run("convert", tmp_path / "src", tmp_path / "out", "--adapter", tmp_path / "a", "--quiet", "--max-memory", ROOMY) == 0
    check(read(tmp_path / "out"), read(tmp_path / "wanted"))
    said = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "wanted")]
    assert said[0]["vocab_size"] == said[1]["vocab_size"] == 45
    assert said[0]["tie_word_embeddings"] == said[1]["tie_word_embeddings"]


@pytest.mark.parametrize(
    "more",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens", "lm_head"]}],
    ids=str,
)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2, lambda **more: causal("gemma", **more)], ids=["llama", "gpt2", "gemma"])
def test_a_tied_model_computes_what_the_adapted_one_does(make: Any, together: bool, more: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = make(tie_word_embeddings=True)
    kind = type(model)
    model.save_pretrained(tmp_path / "src")
    if kind.__name__.startswith("GPT2"):
        more = {"target_modules": [{"embed_tokens": "wte"}.get(name, name) for name in more["target_modules"]]}
    tuned = peft.get_peft_model(model, lora(**more, ensure_weight_tying=together))
    disturb(tuned)
    tuned.save_pretrained(tmp_path / "a")
    words = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        wanted = tuned.eval()(words).logits
        assert run("convert", tmp_path / "src", tmp_path / "out", "--adapter", tmp_path / "a", "--quiet", "--max-memory", ROOMY) == 0
        made = kind.from_pretrained(tmp_path / "out").eval()(words).logits
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_native", [False, True])
def test_experts_one_by_one(is_native: bool, tmp_path: Path) -> None:
    """As transformers 4 had them, of files in either layout."""
    model = experts("mixtral")
    model.save_pretrained(tmp_path / "hub")
    stored = read(tmp_path / "hub")
    if is_native:
        model.save_pretrained(tmp_path / "src", save_original_format=False)
    else:
        (tmp_path / "hub").rename(tmp_path / "src")
    module = "model.layers.1.block_sparse_moe.experts.3.w1"
    tensors = low_rank(module, 48, 32)
    path = adapter(tmp_path / "adapter", tensors)
    assert run("convert", tmp_path / "src", tmp_path / "out", "--adapter", path, "--quiet", "--max-memory", ROOMY) == 0
    write(
        tmp_path / "wanted",
        {**stored, f"{module}.weight": added(stored[f"{module}.weight"], tensors, 3 / 2)},
        config=model.config.to_dict(),
    )
    made, wanted = (type(model).from_pretrained(tmp_path / name).state_dict() for name in ("out", "wanted"))
    check(made, wanted)
    assert read(tmp_path / "out").keys() == read(tmp_path / "src").keys()


def test_convolutions_with_magnitudes(tmp_path: Path) -> None:
    model = MODELS["qwen2_vl"][0]
    made, wanted = merged_by_both(tmp_path, model(), lora(target_modules=["patch_embed.proj", "qkv"], use_dora=True), torch.bfloat16)
    check(made, wanted, NEAR)
