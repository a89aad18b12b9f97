"""Gemma, Deformable DETR and ViP-LLaVA as converted, in transformers: it finds every tensor and computes the same."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_files import assert_same, read, read_any, run, write
from detr_models import detr, original

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def randomized(model):
    """A model with random weights in every tensor, norms and biases included."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def load(kind, folder, **settings):
    """The model in a folder, after checking that its tensors are those that the model has."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, **settings)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # to aligned addresses: in which order floats are summed depends on that
    return model.eval()


def convert(recipe, source, target, *more):
    assert run("convert", source, target, "--recipe", recipe, "--quiet", *more) == 0


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gemma(groups, transformers, tmp_path):
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 60}
    model = randomized(transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes, num_key_value_heads=groups)))
    given = {
        name.replace("model.embed_tokens", "embedder"): tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    for i in (0, 1):
        layer = f"model.layers.{i}.self_attn"
        given[f"{layer}.qkv_proj.weight"] = torch.cat([given.pop(f"{layer}.{part}_proj.weight") for part in "qkv"])
    beside = {"freqs_cis": torch.polar(torch.ones(9, 4), torch.randn(9, 4))}
    source = original(tmp_path / "source", given | beside, "model_state_dict", name="gemma-2b.ckpt")
    convert("gemma-original2hf", source, tmp_path / "hf", "--set", "head_dim=8")
    again = load(transformers.GemmaForCausalLM, tmp_path / "hf")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert (again.config.num_key_value_heads, again.generation_config.eos_token_id) == (groups, 1)
    tokens = torch.tensor([[2, 5, 9, 33, 1]])
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    model.save_pretrained(tmp_path / "saved")
    assert_same(read(tmp_path / "hf"), read(tmp_path / "saved"))
    convert("gemma-hf2original", tmp_path / "saved", tmp_path / "back")
    assert_same(read_any(tmp_path / "back"), given)


@pytest.mark.parametrize(
    "variant",
    [{"levels": 3}, {"levels": 4, "refine": True}, {"levels": 4, "refine": True, "two_stage": True}, {"levels": 1}],
    ids=str,
)
def test_deformable_detr(variant, transformers, tmp_path):
    """All that is not the backbone is what the model has; its backbone takes timm, another one stands in."""
    source = original(tmp_path / "source", detr(width=256, **variant), "model")
    convert("deformable-detr-original2hf", source, tmp_path / "hf")
    made = json.loads((tmp_path / "hf" / "config.json").read_text())
    resnet = transformers.ResNetConfig(
        hidden_sizes=[8, 8, 8, 8], embedding_size=8, depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"] if variant["levels"] > 1 else ["stage4"],
    )  # fmt: skip
    of_backbone = {"use_timm_backbone": False, "backbone": None, "backbone_config": resnet}
    config = transformers.DeformableDetrConfig(**{**made, **of_backbone, "use_pretrained_backbone": False})
    state, found = transformers.DeformableDetrForObjectDetection(config).state_dict(), read(tmp_path / "hf")
    widths = [f"model.input_proj.{level}.0.weight" for level in range(variant["levels"])]
    kept = {name: tensor for name, tensor in state.items() if ".backbone." in name or name in widths}
    ours = {name: tensor for name, tensor in found.items() if ".backbone." not in name and name not in widths}
    assert len(ours) > 60
    folder = write(tmp_path / "whole", kept | ours)
    config.save_pretrained(folder)
    model = load(transformers.DeformableDetrForObjectDetection, folder)
    loaded = model.model.decoder.layers[1].self_attn
    assert torch.equal(loaded.k_proj.weight, found["model.decoder.layers.1.self_attn.k_proj.weight"])


TEXT = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 20, "num_hidden_layers": 12, "num_attention_heads": 1,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def vipllava(transformers, rows=100):
    config = transformers.VipLlavaConfig(
        text_config=TEXT | {"vocab_size": rows}, vision_config=VISION, image_token_index=100, tie_word_embeddings=False
    )
    return randomized(transformers.VipLlavaForConditionalGeneration(config))


def vipllava_original(folder):
    """A saved model's tensors under the names of the original code."""
    found = {}
    for name, tensor in read(folder).items():
        name = name.replace("vision_tower.vision_model.", "vision_tower.").removeprefix("language_model.")  # noqa: PLW2901
        name = name.replace("vision_tower.", "model.vision_tower.vision_tower.vision_model.")  # noqa: PLW2901
        name = name.replace("multi_modal_projector.projector_layernorm", "model.mm_projector.clip_layernorm")  # noqa: PLW2901
        name = name.replace("multi_modal_projector.linear_1", "model.mm_projector.final_linear.0")  # noqa: PLW2901
        found[name.replace("multi_modal_projector.linear_2", "model.mm_projector.final_linear.2")] = tensor
    return found


@torch.no_grad()
def answers(model):
    pixels = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
    tokens = torch.tensor([[1, 5, 100, 100, 100, 100, 7, 9]])
    return model(input_ids=tokens, pixel_values=pixels, attention_mask=torch.ones_like(tokens)).logits


def test_vipllava(transformers, tmp_path):
    small = vipllava(transformers)
    small.save_pretrained(tmp_path / "saved")
    given = vipllava_original(tmp_path / "saved")
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight" in given
    source = original(tmp_path / "source", given, config=TEXT)
    convert("vipllava-original2hf", source, tmp_path / "hf")
    again = load(transformers.VipLlavaForConditionalGeneration, tmp_path / "hf", dtype=torch.float32)
    assert again.get_input_embeddings().weight.shape == (128, 16)
    assert again.config.text_config.vocab_size == 128
    small.resize_token_embeddings(128, mean_resizing=False)
    for mine, other in zip(
        (small.get_input_embeddings(), small.get_output_embeddings()),
        (again.get_input_embeddings(), again.get_output_embeddings()),
        strict=True,
    ):
        assert torch.equal(mine.weight[:100], other.weight[:100])
        mine.weight.data[100:] = other.weight.data[100:]
    assert torch.equal(answers(again), answers(small))
    again.save_pretrained(tmp_path / "again")
    for folder in ("hf", "again"):
        convert("vipllava-hf2original", tmp_path / folder, tmp_path / f"{folder}-back")
        assert_same(read_any(tmp_path / f"{folder}-back"), given)


def test_vipllava_tokenizer_and_processor(transformers, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{k}": k for k in range(3, 100)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "text")
    (tmp_path / "text" / "config.json").write_text(json.dumps(TEXT))
    vipllava(transformers).save_pretrained(tmp_path / "saved")
    source = original(tmp_path / "source", vipllava_original(tmp_path / "saved"))
    convert("vipllava-original2hf", source, tmp_path / "hf", "--sidecars-from", tmp_path / "text")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.image_token_index, config.pad_token_id) == (100, 101)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("w5 <image> w7<pad>").input_ids == [5, 100, 7, 101]
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("<pad>", 101, 102)
    assert tokenizer.decode([5, 100, 101, 7], skip_special_tokens=True) == "w5 w7"
    pytest.importorskip("PIL")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    assert type(processor).__name__ == "LlavaProcessor"
    made = processor(text="w5 <image> w7", images=torch.zeros(3, 40, 50, dtype=torch.uint8), return_tensors="pt")
    assert made["input_ids"].tolist() == [[5, 100, 100, 100, 100, 7]]
    assert made["pixel_values"].shape == (1, 3, 28, 28)
