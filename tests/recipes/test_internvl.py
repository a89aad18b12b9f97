"""InternVL's recipes where its own tools err or say nothing: norms, incomplete or mixed q/k/v, tied heads, InternLM2 text."""

import json

import golden_cases
import pytest
import torch
from checkpoint_files import assert_same, numbered, random_tensor, raw, read, refusal, run, write
from einops import rearrange

HEADS, GROUPS, DIM, HIDDEN, VISION, VOCAB = 4, 2, 6, 16, 8, 10
TEXT = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": DIM, "hidden_size": HIDDEN}


def hf(*, norm=False, extra=(), head=True, bias=True):
    """A small checkpoint in the Hugging Face layout."""
    kinds = ("weight", "bias") if bias else ("weight",)
    shapes = {
        "vision_tower.embeddings.cls_token": (1, 1, VISION),
        "vision_tower.embeddings.position_embeddings": (1, 5, VISION),
        "vision_tower.embeddings.patch_embeddings.projection.weight": (VISION, 3, 2, 2),
        "vision_tower.embeddings.patch_embeddings.projection.bias": (VISION,),
        **dict(extra),
    }
    for i in (0, 1):
        layer = f"vision_tower.encoder.layer.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            shapes |= {f"{layer}.attention.{part}.{kind}": (VISION, VISION) if kind == "weight" else (VISION,) for kind in kinds}
        if norm:
            shapes |= {f"{layer}.attention.{part}_norm.weight": (VISION,) for part in "qk"}
        shapes |= {f"{layer}.{name}.weight": (VISION,) for name in ("layernorm_before", "layernorm_after")}
        shapes |= {f"{layer}.lambda_{n}": (VISION,) for n in (1, 2)}
        shapes |= {f"{layer}.mlp.fc1.weight": (2 * VISION, VISION), f"{layer}.mlp.fc2.weight": (VISION, 2 * VISION)}
    for name, shape in (("layer_norm", (4 * VISION,)), ("linear_1", (HIDDEN, 4 * VISION)), ("linear_2", (HIDDEN, HIDDEN))):
        shapes |= {f"multi_modal_projector.{name}.weight": shape, f"multi_modal_projector.{name}.bias": shape[:1]}
    for i in (0, 1):
        layer = f"language_model.model.layers.{i}"
        for part, rows in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            shapes |= {f"{layer}.self_attn.{part}_proj.weight": (rows * DIM, HIDDEN)}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (HIDDEN, HEADS * DIM)}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (3, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (HIDDEN, 3)}
        shapes |= {f"{layer}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"language_model.model.norm.weight": (HIDDEN,), "language_model.model.embed_tokens.weight": (VOCAB, HIDDEN)}
    shapes |= {"language_model.lm_head.weight": (VOCAB, HIDDEN)} if head else {}
    return numbered(shapes, torch.bfloat16)


HF_CONFIG = {
    "model_type": "internvl",
    "architectures": ["InternVLForConditionalGeneration"],
    "text_config": {**TEXT, "model_type": "qwen2"},
}
OWN_CONFIG = {
    "model_type": "internvl_chat",
    "architectures": ["InternVLChatModel"],
    "vision_config": {"hidden_size": VISION, "image_size": 4, "patch_size": 2, "qk_normalization": True, "qkv_bias": True},
    "llm_config": {**TEXT, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16", "top_k": 50},
}
OWN_INTERNLM2 = {**OWN_CONFIG, "llm_config": {**TEXT, "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]}}


def to_custom(source, target, *more):
    return run("convert", source, target, "--recipe", "internvl-hf2custom", "--quiet", *more)


def to_hf(source, target, *more):
    return run("convert", source, target, "--recipe", "internvl-custom2hf", "--quiet", *more)


def there_and_back(tmp_path, tensors, config=HF_CONFIG, *more):
    """InternVL's own form of a Hugging Face checkpoint, after checking that the way back leads to where it began."""
    source = write(tmp_path / "hf", tensors, shards=2, config=config)
    assert to_custom(source, tmp_path / "custom", *more) == 0
    assert to_hf(tmp_path / "custom", tmp_path / "back") == 0
    assert_same(read(tmp_path / "back"), tensors)
    return read(tmp_path / "custom")


# The vision tower --------------------------------------------------------------------------------------------------


def test_norms_of_q_and_k_keep_their_values(tmp_path):
    tensors = hf(norm=True)
    custom = there_and_back(tmp_path, tensors)
    for i in (0, 1):
        for part in "qk":
            found = custom[f"vision_model.encoder.layers.{i}.attn.{part}_norm.weight"]
            assert raw(found) == raw(tensors[f"vision_tower.encoder.layer.{i}.attention.{part}_norm.weight"])
    assert not [name for name in custom if "attention" in name and name.startswith("vision_model")]


def test_no_bias_of_q_k_and_v(tmp_path):
    custom = there_and_back(tmp_path, hf(bias=False))
    assert "vision_model.encoder.layers.0.attn.qkv.weight" in custom
    assert "vision_model.encoder.layers.0.attn.qkv.bias" not in custom


def test_what_the_own_model_does_not_have_keeps_its_name(tmp_path):
    extra = {
        "vision_tower.layernorm.weight": (VISION,),
        "vision_tower.layernorm.bias": (VISION,),
        "vision_tower.embeddings.mask_token": (1, 1, VISION),
    }
    assert set(extra) <= set(there_and_back(tmp_path, hf(extra=extra)))


def test_names_as_transformers_has_them_in_memory(tmp_path):
    def in_memory(name):
        if name == "language_model.lm_head.weight":
            return "lm_head.weight"
        return f"model.{name.replace('language_model.model.', 'language_model.')}"

    tensors = hf(norm=True)
    there = there_and_back(tmp_path, tensors)
    source = write(tmp_path / "memory", {in_memory(name): tensor for name, tensor in tensors.items()}, config=HF_CONFIG)
    assert {"model.vision_tower.embeddings.cls_token", "model.language_model.norm.weight", "lm_head.weight"} <= set(read(source))
    assert to_custom(source, tmp_path / "again") == 0
    assert_same(read(tmp_path / "again"), there)


def test_incomplete_q_k_v_is_refused(tmp_path, capsys):
    tensors = hf()
    del tensors["vision_tower.encoder.layer.1.attention.k_proj.bias"]
    message = refusal(
        capsys, "convert", write(tmp_path / "hf", tensors, config=HF_CONFIG), tmp_path / "out", "--recipe", "internvl-hf2custom"
    )
    assert "vision_tower.encoder.layer.1.attention.k_proj.bias is missing" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["attn.qkv.weight_scale", "attn.qkv.weight.scale", "attn.qkv"])
def test_only_exact_names_are_fused_weights(name, tmp_path, capsys):
    write(tmp_path / "hf", hf(), config=HF_CONFIG)
    assert to_custom(tmp_path / "hf", tmp_path / "custom") == 0
    tensors = read(tmp_path / "custom") | {f"vision_model.encoder.layers.0.{name}": random_tensor(1)}
    source = write(tmp_path / "scaled", tensors, config=HF_CONFIG)
    message = refusal(capsys, "convert", source, tmp_path / "out", "--recipe", "internvl-custom2hf")
    assert f"vision_model.encoder.layers.0.{name}: no rule for it; the nearest rule is" in message


def test_fused_weights_that_are_no_three_thirds(tmp_path, capsys):
    write(tmp_path / "hf", hf(), config=HF_CONFIG)
    assert to_custom(tmp_path / "hf", tmp_path / "custom") == 0
    tensors = read(tmp_path / "custom") | {"vision_model.encoder.layers.0.attn.qkv.weight": random_tensor(3 * VISION + 1, VISION)}
    message = refusal(capsys, "convert", write(tmp_path / "odd", tensors), tmp_path / "out", "--recipe", "internvl-custom2hf")
    assert "vision_model.encoder.layers.0.attn.qkv.weight: " in message
    assert "25 elements cannot be (h + h + h)" in message


def test_mixed_dtypes_of_q_k_v_need_a_word(tmp_path, capsys):
    tensors = hf()
    parts = [f"vision_tower.encoder.layer.0.attention.{part}_proj.weight" for part in "qkv"]
    for part, dtype in zip(parts, (torch.float32, torch.bfloat16, torch.float16), strict=True):
        tensors[part] = random_tensor(VISION, VISION, dtype=dtype)
    source = write(tmp_path / "hf", tensors, config=HF_CONFIG)
    message = refusal(capsys, "convert", source, tmp_path / "out", "--recipe", "internvl-hf2custom")
    assert "bfloat16, float16, float32" in message
    assert "--dtype" in message
    assert to_custom(source, tmp_path / "out", "--dtype", "float32") == 0
    wanted = torch.cat([tensors[part].float() for part in parts])
    assert raw(read(tmp_path / "out")["vision_model.encoder.layers.0.attn.qkv.weight"]) == raw(wanted)


# Text --------------------------------------------------------------------------------------------------------------


def internlm2_of(tensors):
    """The text model's tensors as InternLM2 names and groups them."""
    found = {}
    names = {
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for i in (0, 1):
        layer = f"language_model.model.layers.{i}"
        q, k, v = (tensors[f"{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
        q = rearrange(q, "(g q d) z -> g q d z", g=GROUPS, d=DIM)
        k, v = (rearrange(part, "(g d) z -> g 1 d z", g=GROUPS) for part in (k, v))
        found[f"{layer}.attention.wqkv.weight"] = rearrange(torch.cat([q, k, v], 1), "g s d z -> (g s d) z")
        found |= {f"{layer}.{new}.weight": tensors[f"{layer}.{old}.weight"] for old, new in names.items()}
    found["language_model.model.tok_embeddings.weight"] = tensors["language_model.model.embed_tokens.weight"]
    found["language_model.output.weight"] = tensors["language_model.lm_head.weight"]
    return found | {"language_model.model.norm.weight": tensors["language_model.model.norm.weight"]}


def test_internlm2_both_ways(tmp_path):
    tensors = hf()
    custom = there_and_back(tmp_path, tensors, HF_CONFIG, "--set", "text=internlm2")
    assert_same({name: tensor for name, tensor in custom.items() if name.startswith("language_model")}, internlm2_of(tensors))


@pytest.mark.parametrize("sizes", [TEXT, {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "hidden_size": HEADS * DIM}])
def test_internlm2_from_its_own_config(sizes, tmp_path):
    tensors = hf()
    write(tmp_path / "hf", tensors, config=HF_CONFIG)
    assert to_custom(tmp_path / "hf", tmp_path / "custom", "--set", "text=internlm2") == 0
    config = {**OWN_INTERNLM2, "llm_config": {**OWN_INTERNLM2["llm_config"], "head_dim": None, **sizes}}
    own = write(
        tmp_path / "own",
        read(tmp_path / "custom") | {"language_model.model.layers.0.attention.rotary_emb.inv_freq": random_tensor(3)},
        config=config,
    )
    assert to_hf(own, tmp_path / "back") == 0
    assert_same(read(tmp_path / "back"), tensors)
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    assert found["text_config"]["model_type"] == "llama"
    assert found["image_token_id"] == 92546


def test_the_reference_folder_gives_config_tokenizer_and_text(tmp_path):
    tensors = hf()
    source = write(tmp_path / "hf", tensors, config=HF_CONFIG)
    (source / "tokenizer.json").write_text("source's")
    (source / "preprocessor_config.json").write_text("{}")
    reference = write(tmp_path / "reference", {"other": random_tensor(1)}, config=OWN_INTERNLM2)
    (reference / "tokenizer.json").write_text("reference's")
    (reference / "modeling_internvl_chat.py").write_text("# its code\n")
    assert to_custom(source, tmp_path / "custom", "--sidecars-from", reference) == 0
    assert "language_model.model.layers.1.attention.wqkv.weight" in read(tmp_path / "custom")
    names = {path.name for path in (tmp_path / "custom").iterdir()}
    assert names == {"config.json", "tokenizer.json", "modeling_internvl_chat.py", "model.safetensors"}
    for name in ("config.json", "tokenizer.json", "modeling_internvl_chat.py"):
        assert (tmp_path / "custom" / name).read_bytes() == (reference / name).read_bytes()
    assert to_hf(tmp_path / "custom", tmp_path / "back", "--sidecars-from", source) == 0
    assert_same(read(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == HF_CONFIG


def test_an_unknown_option_lists_the_known(tmp_path, capsys):
    source = write(tmp_path / "hf", hf(), config=HF_CONFIG)
    message = refusal(capsys, "convert", source, tmp_path / "out", "--recipe", "internvl-hf2custom", "--set", "txt=llama")
    assert message == "--set txt: recipe internvl-hf2custom has no such option; it has: text, tied; did you mean text?"
    message = refusal(capsys, "convert", source, tmp_path / "out", "--recipe", "internvl-hf2custom", "--set", "text=gpt")
    assert "expected one of llama, internlm2" in message


# Tied heads --------------------------------------------------------------------------------------------------------


def hf_says(own, text):
    """A Hugging Face config that says of ties "yes", "no" or nothing, for itself and in its text model's part."""
    return with_ties(HF_CONFIG, "text_config", own, text)


def custom_says(own, text):
    """The same for a config of InternVL's own."""
    return with_ties(OWN_CONFIG, "llm_config", own, text)


def with_ties(config, part, own, text):
    said = {"yes": {"tie_word_embeddings": True}, "no": {"tie_word_embeddings": False}, "": {}}
    return {**config, **said[own], part: {**config[part], **said[text]}}


@pytest.mark.parametrize("text", ["llama", "internlm2"])
@pytest.mark.parametrize(("own", "inner"), [("", ""), ("yes", "no"), ("", "yes"), ("no", "yes"), ("", "no")])
def test_a_head_that_is_not_stored_repeats_the_embedding(own, inner, text, tmp_path):
    tensors = hf(head=False)
    source = write(tmp_path / "hf", tensors, config=hf_says(own, inner))
    assert to_custom(source, tmp_path / "custom", "--set", f"text={text}") == 0
    custom = read(tmp_path / "custom")
    head = custom["language_model.output.weight" if text == "internlm2" else "language_model.lm_head.weight"]
    assert raw(head) == raw(tensors["language_model.model.embed_tokens.weight"])
    assert to_hf(tmp_path / "custom", tmp_path / "back", "--set", "tied=true") == 0
    assert_same(read(tmp_path / "back"), tensors)


def test_a_head_that_config_says_is_there_is_missed(tmp_path, capsys):
    source = write(tmp_path / "hf", hf(head=False), config=hf_says("no", ""))
    message = refusal(capsys, "convert", source, tmp_path / "out", "--recipe", "internvl-hf2custom")
    assert "rule 'language_model.lm_head.weight': no tensor for it" in message
    assert to_custom(source, tmp_path / "out", "--set", "tied=true") == 0


# What config.json of the source, and of the target where it is given, say about ties -> whether the head is left out.
SAYINGS = [
    (custom_says("yes", ""), None, True),
    (custom_says("", "yes"), None, True),
    (custom_says("no", "yes"), None, True),
    (custom_says("", ""), None, False),
    (custom_says("yes", "no"), None, False),
    (hf_says("yes", "no"), None, True),
    (hf_says("", "yes"), None, True),
    (hf_says("no", "yes"), None, False),
    (custom_says("no", ""), hf_says("yes", "no"), True),
    (custom_says("", "yes"), hf_says("no", "yes"), False),
    (custom_says("", "yes"), hf_says("", ""), False),
]


@pytest.mark.parametrize(("config", "target", "tied"), SAYINGS)
def test_who_says_that_the_head_is_tied(config, target, tied, tmp_path):
    tensors = hf()
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    write(tmp_path / "hf", tensors, config=HF_CONFIG)
    assert to_custom(tmp_path / "hf", tmp_path / "plain") == 0
    source = write(tmp_path / "custom", read(tmp_path / "plain"), config=config)
    more = []
    if target is not None:
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "config.json").write_text(json.dumps(target))
        more = ["--sidecars-from", tmp_path / "target"]
    assert to_hf(source, tmp_path / "back", *more) == 0
    if tied:
        del tensors["language_model.lm_head.weight"]
    assert_same(read(tmp_path / "back"), tensors)
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    if target is None and "llm_config" in config:
        assert found["tie_word_embeddings"] is found["text_config"]["tie_word_embeddings"] is tied


def test_a_head_of_its_own_is_never_left_out(tmp_path, capsys):
    write(tmp_path / "hf", hf(), config=HF_CONFIG)
    assert to_custom(tmp_path / "hf", tmp_path / "plain") == 0
    source = write(tmp_path / "custom", read(tmp_path / "plain"), config=custom_says("", "yes"))
    message = refusal(capsys, "convert", source, tmp_path / "back", "--recipe", "internvl-custom2hf")
    assert "language_model.lm_head.weight should hold the same bytes as language_model.model.embed_tokens.weight" in message
    assert not list((tmp_path / "back").glob("*.safetensors*"))
    assert to_hf(source, tmp_path / "kept", "--set", "tied=false") == 0
    assert_same(read(tmp_path / "kept"), hf())


def test_a_head_inside_of_the_own_text_model(tmp_path):
    write(tmp_path / "hf", hf(), config=HF_CONFIG)
    assert to_custom(tmp_path / "hf", tmp_path / "custom") == 0
    inside = {name.replace("language_model.lm_head", "language_model.model.lm_head"): t for name, t in read(tmp_path / "custom").items()}
    assert to_hf(write(tmp_path / "inside", inside), tmp_path / "back") == 0
    assert_same(read(tmp_path / "back"), hf())


# Config and comparison ---------------------------------------------------------------------------------------------


def test_the_config_that_is_made(tmp_path):
    case = golden_cases.load("originals/internvl-hfscript-a")
    source = golden_cases.write_source(case, tmp_path / "source")
    assert to_hf(source, tmp_path / "hf", "--dtype", "bf16") == 0
    found = json.loads((tmp_path / "hf" / "config.json").read_text())
    wanted = case["expected_config"]
    for key in ("architectures", "model_type", "downsample_ratio", "image_token_id", "projector_hidden_act", "image_seq_length"):
        assert found[key] == wanted[key], key
    for part in ("text_config", "vision_config"):
        for key, value in found[part].items():
            assert value == wanted[part].get(key, value), (part, key)
        assert found[part]["hidden_size"] == wanted[part]["hidden_size"]
    assert found["vision_config"]["use_qk_norm"] is False
    assert found["vision_config"]["attention_bias"] is True


def test_only_what_the_text_model_needs_goes_into_its_config(tmp_path):
    write(tmp_path / "hf", hf(norm=True), config=HF_CONFIG)
    assert to_custom(tmp_path / "hf", tmp_path / "plain") == 0
    source = write(tmp_path / "own", read(tmp_path / "plain"), config=OWN_CONFIG)
    assert to_hf(source, tmp_path / "back") == 0
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    assert not {"top_k", "torch_dtype"} & set(found["text_config"])
    assert found["text_config"]["num_key_value_heads"] == GROUPS
    assert found["vision_config"]["use_qk_norm"] is True
    assert found["vision_config"]["image_size"] == [4, 4]


FIGURES = {"hf2custom": ("682.622905", "0.00536114"), "custom2hf": ("760.216434", "0.00597054")}


@pytest.mark.parametrize("way", FIGURES)
def test_the_distance_that_the_reference_tool_prints(way, tmp_path, capsys):
    """InternVL's tools printed these figures for this source and, as reference, the source of the other direction's case."""
    source = golden_cases.write_source(golden_cases.load(f"originals/internvl-{way}-a"), tmp_path / "source")
    other = next(name for name in FIGURES if name != way)
    reference = golden_cases.write_source(golden_cases.load(f"originals/internvl-{other}-a"), tmp_path / "reference")
    convert = ("convert", source, tmp_path / "made", "--recipe", f"internvl-{way}", "--compare", reference)
    assert run(*convert, "--no-progress") == 0
    assert "L2 distance {}, per parameter {},".format(*FIGURES[way]) in capsys.readouterr().out
    assert run(*convert, "--json", "--overwrite") == 0
    comparison = json.loads(capsys.readouterr().out)["comparison"]
    assert (f"{comparison['l2']:.6f}", f"{comparison['l2_per_parameter']:.8f}") == FIGURES[way]

    made = read(tmp_path / "made")
    wanted = read(reference)
    distances = {name: torch.linalg.vector_norm(tensor.double() - wanted[name].double()).item() for name, tensor in made.items()}
    assert {row["name"]: pytest.approx(row["l2"], rel=1e-5) for row in comparison["tensors"]} == {
        name: distance for name, distance in distances.items() if distance
    }
    assert comparison["l2"] == pytest.approx(sum(distances.values()), rel=1e-5)


def test_no_distance_from_the_same_weights(tmp_path, capsys):
    source = write(tmp_path / "hf", hf(), config=HF_CONFIG)
    assert to_custom(source, tmp_path / "custom") == 0
    again = ("convert", source, tmp_path / "again", "--recipe", "internvl-hf2custom", "--compare", tmp_path / "custom", "--no-progress")
    assert run(*again) == 0
    assert "L2 distance 0.000000, per parameter 0.00000000," in capsys.readouterr().out
