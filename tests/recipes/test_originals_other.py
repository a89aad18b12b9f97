"""Gemma, Deformable DETR and ViP-LLaVA: original checkpoints to Hugging Face and back."""

from __future__ import annotations

import hashlib
import json
import math

import golden_cases
import pytest
import torch
from checkpoint_files import assert_same, numbered, random_tensor, raw, read, read_any, refusal, run, write
from detr_models import detr, original

import streamconv

BACK = {
    "gemma-original2hf": "gemma-hf2original",
    "deformable-detr-original2hf": "deformable-detr-hf2original",
    "vipllava-original2hf": "vipllava-hf2original",
}
CASES = {
    "gemma-a": ("gemma-original2hf", "model_state_dict"),
    "detr-a": ("deformable-detr-original2hf", "model"),
    "vipllava-a": ("vipllava-original2hf", None),
}


def convert(recipe, source, target, *more):
    assert run("convert", source, target, "--recipe", recipe, "--quiet", *more) == 0
    return read_any(target)


def there_and_back(tmp_path, recipe, tensors, root=None, config=None, *, lost=(), more=()):
    """What a recipe makes, after checking that the way back leads to where it began."""
    source = original(tmp_path / "source", tensors, root, config)
    made = convert(recipe, source, tmp_path / "hf", *more)
    assert run("verify", source, tmp_path / "hf", "--recipe", recipe, "--quiet", *more) == 0
    back = convert(BACK[recipe], tmp_path / "hf", tmp_path / "back")
    assert_same(back, {name: tensor for name, tensor in tensors.items() if name not in lost})
    return made


@pytest.mark.parametrize("name", CASES)
def test_golden_cases(name, tmp_path):
    case = golden_cases.load(f"originals/{name}")
    recipe, root = CASES[name]
    given = golden_cases.source_tensors(case)
    lost = [name for name in given if name == "freqs_cis" or name.endswith(".inv_freq")]
    found = there_and_back(tmp_path, recipe, given, root, case["config"], lost=lost)
    wanted = case.get("expected_on_disk", case["expected"])
    assert sorted(found) == sorted(wanted)
    for tensor, record in wanted.items():
        if "prefix_rows" not in record:
            assert golden_cases.describe(found[tensor]) == record
            continue
        assert (str(found[tensor].dtype), list(found[tensor].shape)) == (f"torch.{record['dtype']}", record["shape"])
        assert hashlib.sha256(raw(found[tensor][: record["prefix_rows"]])).hexdigest() == record["prefix_sha256"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    guessed = {"head_dim", "image_seq_length", "transformers_version", "torch_dtype", "dtype"}
    for key, value in case.get("expected_config", {}).items():
        if isinstance(value, dict):
            said = {inner: config[key][inner] for inner in value if inner not in {*guessed, "projection_dim", "num_attention_heads"}}
            assert said == {inner: value[inner] for inner in said}
        elif key not in guessed:
            assert config[key] == value, key


# Gemma -------------------------------------------------------------------------------------------------------------


def gemma(heads=4, groups=1, dim=6, hidden=8, layers=2, dtype=torch.bfloat16):
    shapes = {"embedder.weight": (20, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.qkv_proj.weight": ((heads + 2 * groups) * dim, hidden)}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (hidden, heads * dim), f"{layer}.mlp.down_proj.weight": (hidden, 10)}
        shapes |= {f"{layer}.mlp.{part}_proj.weight": (10, hidden) for part in ("gate", "up")}
        shapes |= {f"{layer}.{part}layernorm.weight": (hidden,) for part in ("input_", "post_attention_")}
    return numbered(shapes | {"model.norm.weight": (hidden,)}, dtype)


@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 1, 6), (4, 4, 6), (4, 2, 6), (6, 3, 5), (7, 1, 3), (1, 1, 1), (5, 5, 7)])
def test_gemma_q_k_v_of_any_number_of_heads(heads, groups, dim, tmp_path):
    given = gemma(heads, groups, dim)
    found = there_and_back(tmp_path, "gemma-original2hf", given, "model_state_dict", {"head_dim": dim})
    for i in (0, 1):
        q, k, v = given[f"model.layers.{i}.self_attn.qkv_proj.weight"].split([heads * dim, groups * dim, groups * dim])
        for part, wanted in zip("qkv", (q, k, v), strict=True):
            assert raw(found[f"model.layers.{i}.self_attn.{part}_proj.weight"]) == raw(wanted)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert [config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")] == [heads, groups, dim]
    assert (config["num_hidden_layers"], config["vocab_size"], config["intermediate_size"]) == (2, 20, 10)
    assert "lm_head.weight" not in found


def test_gemma_back_to_what_its_code_loads(tmp_path):
    given = gemma()
    there_and_back(tmp_path, "gemma-original2hf", given, "model_state_dict")
    loaded = torch.load(tmp_path / "back" / "gemma.pth", weights_only=True)
    assert list(loaded) == ["model_state_dict"]
    assert_same(loaded["model_state_dict"], given)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("recipe", ["gemma-original2hf", None])
def test_gemma_as_ckpt(recipe, legacy, tmp_path):
    """The published files end in .ckpt, as MindSpore's do."""
    given = gemma()
    folder = tmp_path / "source"
    folder.mkdir()
    torch.save({"model_state_dict": given}, folder / "gemma-2b.ckpt", _use_new_zipfile_serialization=not legacy)
    chosen = ["--recipe", recipe] if recipe else []
    found = []
    for number, source in enumerate((folder, folder / "gemma-2b.ckpt")):
        assert streamconv.open(source).format == "torch"
        assert run("convert", source, tmp_path / f"hf{number}", *chosen, "--quiet") == 0
        found.append(read(tmp_path / f"hf{number}"))
    assert_same(*found)
    assert recipe or sorted(found[0]) == sorted(given)


def test_gemma_with_a_head_that_repeats_the_embedding(tmp_path, capsys):
    given = gemma()
    hf = convert("gemma-original2hf", original(tmp_path / "source", given, "model_state_dict"), tmp_path / "hf")
    same = write(tmp_path / "same", hf | {"lm_head.weight": hf["model.embed_tokens.weight"]})
    assert_same(convert("gemma-hf2original", same, tmp_path / "back"), given)
    other = write(tmp_path / "other", hf | {"lm_head.weight": random_tensor(20, 8, dtype=torch.bfloat16, seed=5)})
    message = refusal(capsys, "convert", other, tmp_path / "out", "--recipe", "gemma-hf2original")
    assert "lm_head.weight should hold the same bytes as model.embed_tokens.weight" in message


def test_gemma_heads_that_nothing_tells(tmp_path, capsys):
    source = original(tmp_path / "source", gemma(groups=2), "model_state_dict")
    assert run("convert", source, tmp_path / "hf", "--recipe", "gemma-original2hf", "--no-progress") == 0
    output = "".join(capsys.readouterr())
    assert "config.json is not written: no value for head_dim, num_attention_heads, num_key_value_heads: give --set head_dim=N" in output
    assert not (tmp_path / "hf" / "config.json").exists()
    convert("gemma-original2hf", source, tmp_path / "said", "--set", "head_dim=6", "--dtype", "float32")
    config = json.loads((tmp_path / "said" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["dtype"]) == (4, 2, "float32")


@pytest.mark.parametrize(("hidden", "heads", "groups"), [(2048, 8, 1), (3072, 16, 16)])
def test_gemma_sizes_that_were_published(hidden, heads, groups, tmp_path):
    source = original(tmp_path / "source", gemma(heads, groups, 256, hidden, layers=1), "model_state_dict")
    convert("gemma-original2hf", source, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert [config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")] == [heads, groups, 256]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.self_attn.qkv_proj.weight_scaler": (36,)}, "weight_scaler: no rule for it"),
        ({"model.layers.0.pre_feedforward_layernorm.weight": (8,)}, "pre_feedforward_layernorm.weight: no rule for it"),
        ({"model.layers.1.self_attn.qkv_proj.weight": (35, 8)}, "model.layers.1.self_attn.qkv_proj.weight: "),
    ],
)
def test_gemma_of_another_kind_is_refused(change, message, tmp_path, capsys):
    source = original(tmp_path / "source", gemma() | numbered(change, torch.bfloat16), "model_state_dict")
    assert message in refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", "gemma-original2hf")


# Deformable DETR ---------------------------------------------------------------------------------------------------


def by_rules(tensors):
    """What the reference script's ordered substring rules make of these names, its loop over layers included."""
    found = {}
    for key, tensor in tensors.items():
        name = key.replace("backbone.0.body", "backbone.conv_encoder.model").replace("transformer.", "")
        name = name.replace("norm1", "self_attn_layer_norm" if "encoder" in name else "encoder_attn_layer_norm")
        name = name.replace("norm2", "final_layer_norm" if "encoder" in name else "self_attn_layer_norm")
        name = name.replace("norm3", "final_layer_norm").replace("linear1", "fc1").replace("linear2", "fc2")
        name = name.replace("query_embed", "query_position_embeddings").replace("cross_attn", "encoder_attn")
        if "in_proj_" in name:
            parts = tensor.chunk(3)
            found |= {name.replace("in_proj_", f"{part}_proj."): third for part, third in zip("qkv", parts, strict=True)}
        else:
            found[name] = tensor
    heads = ("class_embed", "bbox_embed")
    return {name if name.startswith(heads) else f"model.{name}": tensor for name, tensor in found.items()}


RESNET50 = [f"layer{n}.{k}.conv1.weight" for n, blocks in zip((1, 2, 3, 4), (3, 4, 6, 3), strict=True) for k in range(blocks)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "variant",
    [
        {}, {"levels": 1}, {"levels": 4, "encoder": 6, "decoder": 6}, {"width": 48, "encoder": 1, "decoder": 1},
        {"refine": True}, {"refine": True, "two_stage": True}, {"two_stage": True}, {"body": RESNET50},
    ],
    ids=str,
)  # fmt: skip
def test_deformable_detr_by_the_reference_rules(variant, tmp_path):
    given = detr(**variant)
    found = there_and_back(tmp_path, "deformable-detr-original2hf", given, "model")
    assert_same(found, by_rules(given))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    sizes = {"levels": 2, "width": 16, "encoder": 2, "decoder": 3, "refine": False, "two_stage": False, **variant}
    keys = ("num_feature_levels", "d_model", "encoder_layers", "decoder_layers", "with_box_refine", "two_stage")
    assert dict(zip(sizes, (config[key] for key in keys), strict=False)) == {k: v for k, v in sizes.items() if k != "body"}
    assert (config["encoder_n_points"], config["decoder_n_points"], config["decoder_ffn_dim"]) == (4, 4, 24)
    assert config.get("backbone") == ("resnet50" if "body" in variant else None)
    assert len(config["id2label"]) == 5
    assert (tmp_path / "hf" / "preprocessor_config.json").exists()
    assert list(torch.load(tmp_path / "back" / "checkpoint.pth", weights_only=True)) == ["model"]


def test_deformable_detr_says_what_is_missing(tmp_path, capsys):
    source = original(tmp_path / "source", detr(), "model")
    assert run("convert", source, tmp_path / "hf", "--recipe", "deformable-detr-original2hf", "--no-progress") == 0
    output = "".join(capsys.readouterr())
    assert "does not name its classes" in output
    assert "config.json names no backbone: stages of (1, 0, 0, 0) blocks" in output
    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "config.json").write_text(json.dumps({"model_type": "deformable_detr", "id2label": {"0": "N/A"}}))
    (reference / "preprocessor_config.json").write_text("{}\n")
    convert("deformable-detr-original2hf", source, tmp_path / "known", "--sidecars-from", reference)
    assert json.loads((tmp_path / "known" / "config.json").read_text())["id2label"] == {"0": "N/A"}


@pytest.mark.parametrize("name", ["transformer.decoder.layers.0.self_attn.in_proj.weight", "transformer.norm.weight", "mask_head.weight"])
def test_deformable_detr_of_another_kind_is_refused(name, tmp_path, capsys):
    source = original(tmp_path / "source", detr() | {name: random_tensor(4)}, "model")
    assert f"{name}: no rule for it" in refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", "deformable-detr-original2hf")


# ViP-LLaVA ---------------------------------------------------------------------------------------------------------

TEXT = {"model_type": "llama", "num_attention_heads": 2, "hidden_size": 8, "vocab_size": 100, "bos_token_id": 1, "_name_or_path": "x"}
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def vipllava(vocabulary=100, hidden=8, dtype=torch.float16):
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        shapes |= {f"{layer}.self_attn.rotary_emb.inv_freq": (2,)}
        shapes |= {f"{layer}.mlp.{part}_proj.weight": (hidden, hidden) for part in ("gate", "up", "down")}
        shapes |= {f"{layer}.{part}layernorm.weight": (hidden,) for part in ("input_", "post_attention_")}
    vision = "model.vision_tower.vision_tower.vision_model"
    shapes |= {f"{vision}.embeddings.class_embedding": (4,), f"{vision}.embeddings.patch_embedding.weight": (4, 3, 2, 2)}
    shapes |= {f"{vision}.embeddings.position_embedding.weight": (10, 4)}
    both = {f"{vision}.{name}": (4,) for name in ("pre_layrnorm", "post_layernorm")}
    for n in range(3):
        block = f"{vision}.encoder.layers.{n}"
        both |= {f"{block}.self_attn.{part}_proj": (4, 4) for part in ("q", "k", "v", "out")}
        both |= {f"{block}.mlp.fc1": (6, 4), f"{block}.mlp.fc2": (4, 6), f"{block}.layer_norm1": (4,), f"{block}.layer_norm2": (4,)}
    both |= {"model.mm_projector.clip_layernorm": (20,), "model.mm_projector.final_linear.0": (hidden, 20)}
    both |= {"model.mm_projector.final_linear.2": (hidden, hidden)}
    shapes |= {f"{name}.weight": shape for name, shape in both.items()} | {f"{name}.bias": shape[:1] for name, shape in both.items()}
    return numbered(shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}, dtype)


def hf_name(name):
    """The name that the reference script's ordered replacements give."""
    for find, put in (
        ("model.vision_tower.", ""), ("model.mm_projector", "multi_modal_projector"), ("model", "model.model"),
        ("vision_model.model", "vision_model"), ("lm_head", "language_model.lm_head"), ("model.model", "language_model.model"),
        ("multi_modal_projector.0", "multi_modal_projector.linear_1"), ("multi_modal_projector.2", "multi_modal_projector.linear_2"),
        ("final_linear.0", "linear_1"), ("final_linear.2", "linear_2"),
        ("multi_modal_projector.clip_layernorm", "multi_modal_projector.projector_layernorm"),
    ):  # fmt: skip
        name = name.replace(find, put)
    return name


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("vocabulary", "rows"), [(100, 128), (126, 128), (127, 192), (62, 64), (30, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_vipllava_by_the_reference_rules(vocabulary, rows, dtype, tmp_path):
    given = vipllava(vocabulary, dtype=dtype)
    lost = [name for name in given if name.endswith("inv_freq")]
    found = there_and_back(tmp_path, "vipllava-original2hf", given, config=TEXT | {"vocab_size": vocabulary}, lost=lost)
    assert {name: found[name].shape for name in (EMBEDDING, HEAD)} == dict.fromkeys((EMBEDDING, HEAD), (rows, 8))
    kept = {hf_name(name): tensor for name, tensor in given.items() if name not in lost}
    assert_same({name: tensor[:vocabulary] if name in (EMBEDDING, HEAD) else tensor for name, tensor in found.items()}, kept)
    old = given["model.embed_tokens.weight"].double()
    spread = math.sqrt(1e-5) * old.std(0)
    for name in (EMBEDDING, HEAD):  # the head's new rows are like the embedding's too
        far = (found[name][vocabulary:].double() - old.mean(0)) / spread
        assert far.abs().max() < (6 if dtype is torch.float32 else 20)
    assert not torch.equal(found[EMBEDDING][vocabulary:], found[HEAD][vocabulary:])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"], config["text_config"]["vocab_size"]) == (vocabulary, vocabulary + 1, rows)
    assert config["vision_config"]["image_size"] == 6
    assert "_name_or_path" not in config["text_config"]


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), {"attention_bias": True}),
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), {"attention_bias": True}),
        (("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), {"mlp_bias": True}),
        (("input_layernorm", "post_attention_layernorm"), {}),
    ],
)
def test_vipllava_passes_biases_of_the_text_model_through(tmp_path, modules, says):
    biases = numbered({f"model.layers.{i}.{module}.bias": (8,) for i in range(2) for module in modules}, torch.float16)
    given = vipllava() | biases
    lost = [name for name in given if name.endswith("inv_freq")]
    found = there_and_back(tmp_path, "vipllava-original2hf", given, config=TEXT, lost=lost)
    assert_same({hf_name(name): found[hf_name(name)] for name in biases}, {hf_name(name): tensor for name, tensor in biases.items()})
    text = json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]
    assert {key: text[key] for key in ("attention_bias", "mlp_bias") if key in text} == says


def test_a_bias_that_one_layer_of_vipllava_lacks_is_refused(tmp_path, capsys):
    given = vipllava() | numbered({f"model.layers.{i}.self_attn.{part}_proj.bias": (8,) for i in range(2) for part in "qkv"}, torch.float16)
    del given["model.layers.1.self_attn.k_proj.bias"]
    source = original(tmp_path / "source", given, config=TEXT)
    line = refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", "vipllava-original2hf")
    assert "model.layers.1.self_attn.k_proj.bias" in line


def test_vipllava_from_the_row_that_the_reference_has(tmp_path):
    given = vipllava()
    source = original(tmp_path / "source", given, config=TEXT)
    found = convert("vipllava-original2hf", source, tmp_path / "hf", "--set", "first_new_row=90", "--set", "seed=3")
    assert raw(found[HEAD][:90]) == raw(given["lm_head.weight"][:90])
    assert len(found[HEAD]) == 128
    assert not (found[HEAD][90:100] == given["lm_head.weight"][90:]).all(1).any()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["image_token_index"] == 90
    assert streamconv.open(tmp_path / "hf").metadata == {"format": "pt", "seed": "3"}
    back = convert("vipllava-hf2original", tmp_path / "hf", tmp_path / "back", "--set", "vocab_size=95")
    assert len(back["lm_head.weight"]) == 95


@pytest.mark.parametrize("names", ["old", "memory", "flat", "flat memory", "projector"])
def test_vipllava_by_other_names(names, tmp_path):
    given = {name: tensor for name, tensor in vipllava().items() if not name.endswith("inv_freq")}
    source = original(tmp_path / "source", given, config=TEXT)
    found = convert("vipllava-original2hf", source, tmp_path / "hf")
    if "memory" in names or "flat" in names:
        again = {name.replace("vision_model.", "") if "flat" in names else name: tensor for name, tensor in found.items()}
        if "memory" in names:
            again = {
                name.removeprefix("language_model.") if "lm_head" in name
                else f"model.{name.replace('language_model.model.', 'language_model.')}": tensor
                for name, tensor in again.items()
            }  # fmt: skip
            assert "model.language_model.embed_tokens.weight" in again
        source = write(tmp_path / "memory", again, config=json.loads((tmp_path / "hf" / "config.json").read_text()))
        assert_same(convert("vipllava-hf2original", source, tmp_path / "back"), given)
        return
    if names == "old":
        changed = given | {"model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(10)}
    else:
        changed = {name.replace("final_linear.", ""): tensor for name, tensor in given.items()}
        assert "model.mm_projector.2.weight" in changed
    assert_same(convert("vipllava-original2hf", original(tmp_path / "changed", changed, config=TEXT), tmp_path / "again"), found)


@pytest.mark.parametrize("name", ["model.image_newline", "extra.weight"])
def test_vipllava_of_another_kind_is_refused(name, tmp_path, capsys):
    source = original(tmp_path / "source", vipllava() | {name: random_tensor(8)}, config=TEXT)
    assert f"{name}: no rule for it" in refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", "vipllava-original2hf")


def test_vipllava_tokenizer_and_processor(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "config.json").write_text(json.dumps(TEXT))
    token = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    (text / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"<s>": 1, "a": 99}}, "added_tokens": [{"id": 1, **token}]}))
    (text / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"1": token}, "bos_token": "<s>"}))
    (text / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    (text / "tokenizer.model").write_bytes(b"\0\1")
    source = original(tmp_path / "source", vipllava())
    convert("vipllava-original2hf", source, tmp_path / "hf", "--sidecars-from", text)

    def said(name):
        return json.loads((tmp_path / "hf" / name).read_text())

    added = [(one["id"], one["content"], one["special"], one["normalized"]) for one in said("tokenizer.json")["added_tokens"]]
    assert added == [(1, "<s>", True, False), (100, "<image>", True, False), (101, "<pad>", True, False)]
    settings = said("tokenizer_config.json")
    assert {number: one["content"] for number, one in settings["added_tokens_decoder"].items()} == {
        "1": "<s>", "100": "<image>", "101": "<pad>",
    }  # fmt: skip
    assert (settings["pad_token"], settings["bos_token"]) == ("<pad>", "<s>")
    assert said("special_tokens_map.json")["pad_token"]["content"] == "<pad>"
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"\0\1"
    assert said("processor_config.json")["patch_size"] == 2
    assert said("preprocessor_config.json")["crop_size"] == {"height": 6, "width": 6}
    assert said("generation_config.json")["pad_token_id"] == 101
    assert said("config.json")["image_token_index"] == 100

    convert("vipllava-original2hf", source, tmp_path / "again", "--sidecars-from", tmp_path / "hf")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_vipllava_says_what_is_missing(tmp_path, capsys):
    source = original(tmp_path / "source", vipllava())
    assert run("convert", source, tmp_path / "hf", "--recipe", "vipllava-original2hf", "--no-progress") == 0
    output = "".join(capsys.readouterr())
    assert "no tokenizer and no processor files: --sidecars-from a folder of the text model gives them" in output
    assert "config.json is not written" in output


@pytest.mark.parametrize(
    ("recipe", "make", "missing"),
    [
        ("gemma-original2hf", gemma, "model.layers.1.mlp.up_proj.weight"),
        ("gemma-original2hf", gemma, "model.layers.0.self_attn.qkv_proj.weight"),
        ("deformable-detr-original2hf", detr, "transformer.encoder.layers.1.norm2.bias"),
        ("deformable-detr-original2hf", detr, "transformer.decoder.layers.2.self_attn.in_proj_bias"),
        ("vipllava-original2hf", vipllava, "model.layers.1.self_attn.q_proj.weight"),
        ("vipllava-original2hf", vipllava, "model.vision_tower.vision_tower.vision_model.encoder.layers.2.mlp.fc2.bias"),
        ("vipllava-original2hf", vipllava, "model.mm_projector.clip_layernorm.bias"),
    ],
)
def test_what_is_missing_is_named(recipe, make, missing, tmp_path, capsys):
    source = original(tmp_path / "source", {name: tensor for name, tensor in make().items() if name != missing}, config=TEXT)
    assert f"{missing} is missing" in refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", recipe)


@pytest.mark.parametrize(("name", "variant"), [("class_embed", {}), ("bbox_embed", {"refine": True})])
def test_deformable_detr_without_heads_is_refused(name, variant, tmp_path, capsys):
    given = {key: tensor for key, tensor in detr(**variant).items() if name not in key}
    source = original(tmp_path / "source", given, "model")
    assert f"there is no {name}" in refusal(capsys, "convert", source, tmp_path / "hf", "--recipe", "deformable-detr-original2hf")


def test_deformable_detr_with_shared_heads_stored_once(tmp_path):
    """As transformers saves them: with refinement in the decoder only, without it the first."""
    for variant in ({"refine": True, "two_stage": True}, {}):
        given = by_rules(detr(**variant))
        heads = ("class_embed.", "bbox_embed.")
        kept = {k: v for k, v in given.items() if not k.startswith(heads) or (not variant and ".0." in k.replace(".layers.0", ""))}
        folder = tmp_path / f"hf{len(variant)}"
        back = convert("deformable-detr-hf2original", write(folder, kept), tmp_path / f"back{len(variant)}")
        assert by_rules(back).keys() == kept.keys()


@pytest.mark.parametrize(("recipe", "what"), [("gemma-hf2original", "freqs_cis"), ("vipllava-hf2original", "inv_freq")])
def test_what_does_not_come_back_is_said(recipe, what):
    assert [line for line in streamconv.recipes.get(recipe).lost if what in line]
