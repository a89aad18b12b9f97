"""MindSpore Transformers' families beside Llama's and GLM's: Bloom, Swin, TeleChat, WizardCoder, CodeGeeX2, ChatGLM-6B, ViT, MAE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from checkpoint_files import assert_same, first_and_last, numbered, read_any, refusal, run, write, write_bin, write_ckpt

from streamconv import recipes
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.formats import Source

Shapes = dict[str, tuple[int, ...]]


# Models as their own frameworks store them -------------------------------------------------------------------------


def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def norm(name: str, width: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (width,), **({f"{name}.bias": (width,)} if bias else {})}


def bloom(*, width: int = 12, layers: int = 2, prefix: str = "", head: bool = False) -> Shapes:
    found = {f"{prefix}word_embeddings.weight": (17, width)} | norm(f"{prefix}word_embeddings_layernorm", width)
    for at in (f"{prefix}h.{k}" for k in range(layers)):
        found |= norm(f"{at}.input_layernorm", width) | norm(f"{at}.post_attention_layernorm", width)
        found |= linear(f"{at}.self_attention.query_key_value", 3 * width, width) | linear(f"{at}.self_attention.dense", width, width)
        found |= linear(f"{at}.mlp.dense_h_to_4h", 4 * width, width) | linear(f"{at}.mlp.dense_4h_to_h", width, 4 * width)
    return found | norm(f"{prefix}ln_f", width) | ({"lm_head.weight": (17, width)} if head else {})


def wizardcoder(*, width: int = 12, heads: int = 3, layers: int = 2, rows: int = 0, head: bool = True) -> Shapes:
    found: Shapes = {"transformer.wte.weight": (17, width), "transformer.wpe.weight": (9, width)}
    for at in (f"transformer.h.{k}" for k in range(layers)):
        found |= norm(f"{at}.ln_1", width) | norm(f"{at}.ln_2", width)
        found |= linear(f"{at}.attn.c_attn", rows or width + 2 * (width // heads), width) | linear(f"{at}.attn.c_proj", width, width)
        found |= linear(f"{at}.mlp.c_fc", 4 * width, width) | linear(f"{at}.mlp.c_proj", width, 4 * width)
    return found | norm("transformer.ln_f", width) | ({"lm_head.weight": (17, width)} if head else {})


def vit(*, width: int = 8, layers: int = 2, decoder: int = 0, last: str = "norm", head: bool = False) -> Shapes:
    def blocks(at: str, width: int, count: int) -> Shapes:
        found: Shapes = {}
        for k in range(count):
            found |= norm(f"{at}.{k}.norm1", width) | norm(f"{at}.{k}.norm2", width)
            found |= linear(f"{at}.{k}.attn.qkv", 3 * width, width) | linear(f"{at}.{k}.attn.proj", width, width)
            found |= linear(f"{at}.{k}.mlp.fc1", 2 * width, width) | linear(f"{at}.{k}.mlp.fc2", width, 2 * width)
        return found

    found: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 5, width),
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,),
    }
    found |= blocks("blocks", width, layers) | norm(last, width)
    if decoder:
        found |= {"mask_token": (1, 1, 4), "decoder_pos_embed": (1, 5, 4)} | linear("decoder_embed", 4, width)
        found |= blocks("decoder_blocks", 4, decoder) | norm("decoder_norm", 4) | linear("decoder_pred", 48, 4)
    return found | (linear("head", 6, width) if head else {})


def swin(
    *, depths: tuple[int, ...] = (2, 3), prefix: str = "", bias: bool = True, buffers: bool = False, positions: bool = False
) -> Shapes:
    width = 4
    found = linear(f"{prefix}patch_embed.proj", width, 3) | norm(f"{prefix}patch_embed.norm", width)
    found |= {f"{prefix}absolute_pos_embed": (1, 9, width)} if positions else {}
    for stage, depth in enumerate(depths):
        for at in (f"{prefix}layers.{stage}.blocks.{k}" for k in range(depth)):
            found |= norm(f"{at}.norm1", width) | norm(f"{at}.norm2", width) | {f"{at}.attn.relative_position_bias_table": (25, 2)}
            found |= linear(f"{at}.attn.qkv", 3 * width, width, bias=bias) | linear(f"{at}.attn.proj", width, width)
            found |= linear(f"{at}.mlp.fc1", 2 * width, width) | linear(f"{at}.mlp.fc2", width, 2 * width)
            found |= {f"{at}.attn_mask": (4, 9, 9)} if buffers and at.endswith("1") else {}
        if stage + 1 < len(depths):
            found |= {f"{prefix}layers.{stage}.downsample.reduction.weight": (2 * width, 4 * width)}
            found |= norm(f"{prefix}layers.{stage}.downsample.norm", 4 * width)
            width *= 2
    found |= norm(f"{prefix}norm", width)
    return found | (
        {"encoder.mask_token": (1, 1, 4), "decoder.0.weight": (48, width, 1, 1), "decoder.0.bias": (48,)}
        if prefix
        else linear("head", 7, width)
    )


def telechat(
    *,
    prefix: str = "transformer.",
    heads: int = 4,
    groups: int = 2,
    dim: int = 4,
    layers: int = 2,
    experts: int = 0,
    dense: int = 0,
    head: bool = True,
) -> Shapes:
    width = 8
    found: Shapes = {f"{prefix}word_embeddings.weight": (17, width)}
    for k, at in enumerate(f"{prefix}h.{k}" for k in range(layers)):
        found |= norm(f"{at}.input_layernorm", width, bias=False) | norm(f"{at}.post_attention_layernorm", width, bias=False)
        found |= linear(f"{at}.self_attention.query", heads * dim, width, bias=False)
        found |= linear(f"{at}.self_attention.key_value", 2 * groups * dim, width, bias=False)
        found |= linear(f"{at}.self_attention.dense", width, heads * dim)
        sparse = experts and k >= dense
        found |= {f"{at}.mlp.router.weight": (experts, width)} if sparse else {}
        for mlp in [f"{at}.mlp.local_experts.{e}" for e in range(experts)] if sparse else [f"{at}.mlp"]:
            found |= linear(f"{mlp}.gate_proj", 6, width, bias=False) | linear(f"{mlp}.up_proj", 6, width, bias=False)
            found |= linear(f"{mlp}.down_proj", width, 6)
    return found | norm(f"{prefix}ln_f", width, bias=False) | ({"lm_head.weight": (17, width)} if head else {})


def telechat3(*, heads: int = 4, groups: int = 2, mapping: bool = False) -> Shapes:
    width, dim = 8, 4
    found: Shapes = {"model.embed_tokens.weight": (17, width)}
    for at in (f"model.layers.{k}" for k in range(2)):
        found |= norm(f"{at}.input_layernorm", width, bias=False) | norm(f"{at}.post_attention_layernorm", width, bias=False)
        for part, rows in (("q", heads), ("k", groups), ("v", groups)):
            found |= linear(f"{at}.self_attn.{part}_proj", rows * dim, width, bias=False)
        found |= linear(f"{at}.self_attn.o_proj", width, heads * dim) | linear(f"{at}.mlp.down_proj", width, 6)
        found |= linear(f"{at}.mlp.gate_proj", 6, width, bias=False) | linear(f"{at}.mlp.up_proj", 6, width, bias=False)
    found |= {f"model.embedding_hidden_mapping_{way}.weight": (width, width) for way in ("in", "out") if mapping}
    return found | norm("model.norm", width, bias=False) | {"lm_head.weight": (17, width)}


def codegeex2(*, layers: int = 2, buffer: bool = True) -> Shapes:
    width = 8
    found: Shapes = {"transformer.embedding.word_embeddings.weight": (17, width)}
    found |= {"transformer.rotary_pos_emb.inv_freq": (2,)} if buffer else {}
    for at in (f"transformer.encoder.layers.{k}" for k in range(layers)):
        found |= norm(f"{at}.input_layernorm", width, bias=False) | norm(f"{at}.post_attention_layernorm", width, bias=False)
        found |= linear(f"{at}.self_attention.query_key_value", 16, width) | linear(f"{at}.self_attention.dense", width, width, bias=False)
        found |= linear(f"{at}.mlp.dense_h_to_4h", 12, width, bias=False) | linear(f"{at}.mlp.dense_4h_to_h", width, 6, bias=False)
    return found | norm("transformer.encoder.final_layernorm", width, bias=False) | {"transformer.output_layer.weight": (17, width)}


def glm(*, layers: int = 2, lora: bool = False) -> Shapes:
    width = 8
    found: Shapes = {"transformer.word_embeddings.weight": (17, width)}
    for at in (f"transformer.layers.{k}" for k in range(layers)):
        found |= (
            norm(f"{at}.input_layernorm", width)
            | norm(f"{at}.post_attention_layernorm", width)
            | {f"{at}.attention.rotary_emb.inv_freq": (2,)}
        )
        found |= linear(f"{at}.attention.query_key_value", 3 * width, width) | linear(f"{at}.attention.dense", width, width)
        found |= linear(f"{at}.mlp.dense_h_to_4h", 12, width) | linear(f"{at}.mlp.dense_4h_to_h", width, 12)
        if lora:
            found |= {
                f"{at}.attention.query_key_value.lora_A.weight": (2, width),
                f"{at}.attention.query_key_value.lora_B.weight": (3 * width, 2),
            }
    return found | norm("transformer.final_layernorm", width) | {"lm_head.weight": (17, width)}


# There and back ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A family, its tensors, and what the recipe is told by config and options."""

    family: str
    shapes: Shapes
    config: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32

    def tensors(self) -> dict[str, torch.Tensor]:
        return numbered(self.shapes, self.dtype)


MODELS = {
    "bloom": Model("bloom", bloom(), {"n_head": 4, "hidden_size": 12}),
    "bloom, one head": Model("bloom", bloom(width=5), {"num_attention_heads": 1, "n_embed": 5}, dtype=torch.bfloat16),
    "bloom, each row a head": Model("bloom", bloom(width=6, layers=11), {}, ("n_head=6", "hidden_size=6")),
    "bloom, prefix and head": Model("bloom", bloom(prefix="transformer.", head=True), {"n_head": 3, "n_layer": 2}, dtype=torch.float16),
    "wizardcoder": Model("wizardcoder", wizardcoder(), {"n_embd": 12, "n_head": 3, "n_layer": 2, "multi_query": True}),
    "wizardcoder, odd": Model("wizardcoder", wizardcoder(width=15, heads=5, layers=1), {"n_head": 5}, ("layers=40",), torch.float16),
    "wizardcoder, no config": Model("wizardcoder", wizardcoder(width=20, heads=4)),
    "vit": Model("vit", vit(head=True)),
    "vit, fc_norm": Model("vit", vit(width=6, last="fc_norm", head=True), dtype=torch.bfloat16),
    "vit, a deep head": Model("vit", vit() | {"head.0.running_mean": (8,), "head.1.weight": (3, 8)}),
    "mae": Model("mae", vit(decoder=3)),
    "mae, the encoder": Model("mae", vit(width=5, layers=11), dtype=torch.float16),
    "swin": Model("swin", swin()),
    "swin, buffers": Model("swin", swin(buffers=True, positions=True), dtype=torch.float16),
    "swin, no bias": Model("swin", swin(depths=(1, 1, 12, 1), bias=False), {}, ("is_pretrain=False",)),
    "swin, pretrained": Model("swin", swin(prefix="encoder."), dtype=torch.bfloat16),
    "swin, pretrained, said so": Model("swin", swin(prefix="encoder."), {}, ("is_pretrain=true",)),
    "telechat 7b": Model("telechat", telechat(prefix="", groups=4, head=False), {"n_layer": 2}),
    "telechat 12b": Model("telechat", telechat(groups=4), {}, ("telechat_type=telechat_12b",), torch.float16),
    "telechat2": Model("telechat2", telechat(), {"n_head": 4}, dtype=torch.bfloat16),
    "telechat2, tied": Model("telechat2", telechat(head=False, layers=11)),
    "telechat2, experts": Model("telechat2", telechat(experts=11), {}, ("num_experts=11",)),
    "telechat2, one expert": Model("telechat2", telechat(experts=1)),
    "telechat2, some with experts": Model("telechat2", telechat(experts=3, layers=4, dense=1), {"num_experts": 3}, dtype=torch.float16),
    "telechat3": Model("telechat3", telechat3(groups=1), {"num_hidden_layers": 2}),
    "telechat3, mapping": Model("telechat3", telechat3(mapping=True), {"tie_word_embeddings": False}, dtype=torch.float16),
    "codegeex2": Model("codegeex2", codegeex2(), {"num_layers": 2}),
    "codegeex2, no buffer": Model("codegeex2", codegeex2(layers=11, buffer=False), dtype=torch.bfloat16),
    "glm": Model("glm", glm(), {"num_layers": 2}, dtype=torch.float16),
    "glm, any dtype": Model("glm", glm(layers=11), {}, ("half=false",)),
    "glm, factors": Model("glm", glm(lora=True), {}, ("half=no",), torch.bfloat16),
}  # fmt: skip


def store(folder, model: Model, tensors: dict[str, torch.Tensor]):
    """The model as its framework stores it."""
    if model.family in ("vit", "mae", "swin"):
        return write_bin(folder, {"model": tensors, "epoch": 3}, config=model.config or None)
    return write(folder, tensors, config=model.config or None)


def settings(model: Model) -> list[str]:
    return ["--quiet", *(word for option in model.options for word in ("--set", option))]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tmp_path):
    model = MODELS[name]
    tensors = model.tensors()
    source = store(tmp_path / "source", model, tensors)
    assert run("convert", source, tmp_path / "own", "--recipe", f"{model.family}-hf2ms", "--verify", *settings(model)) == 0
    assert [path.name for path in (tmp_path / "own").glob("*.ckpt")] == ["model.ckpt"]
    assert run("convert", tmp_path / "own", tmp_path / "back", "--recipe", f"{model.family}-ms2hf", "--verify", *settings(model)) == 0
    assert_same(read_any(tmp_path / "back"), tensors)


def test_these_recipes_say_what_is_lost():
    lost = {
        name: recipes.get(name).lost
        for family in {model.family for model in MODELS.values()}
        for name in (f"{family}-hf2ms", f"{family}-ms2hf")
    }
    assert all("the training" in lines[-1] for name, lines in lost.items() if name.endswith("-hf2ms"))
    assert {name for name, lines in lost.items() if lines and name.endswith("-ms2hf")} == {
        "glm-ms2hf", "telechat-ms2hf", "telechat2-ms2hf", "telechat3-ms2hf", "wizardcoder-ms2hf"
    }  # fmt: skip
    assert any("casts to float16" in line for line in lost["glm-ms2hf"])


# Values, by torch ---------------------------------------------------------------------------------------------------


def converted(tmp_path, model: Model, *more: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model's tensors, and what becomes of them."""
    tensors = model.tensors()
    source = store(tmp_path / "source", model, tensors)
    assert run("convert", source, tmp_path / "own.ckpt", "--recipe", f"{model.family}-hf2ms", *settings(model), *more) == 0
    return tensors, read_any(tmp_path / "own.ckpt")


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 12])
def test_bloom_interleaves_q_k_v_by_head(heads, tmp_path):
    given, made = converted(tmp_path, Model("bloom", bloom(), {"n_head": heads}))
    at, own = "h.1.self_attention", "blocks.1.attention"
    for kind in ("weight", "bias"):
        fused = given[f"{at}.query_key_value.{kind}"].unflatten(0, (heads, 3, 12 // heads))
        for part in range(3):
            assert made[f"{own}.dense{part + 1}.{kind}"].equal(fused[:, part].flatten(0, 1))
    assert made[f"{own}.projection.weight"].equal(given[f"{at}.dense.weight"].T)
    assert made["blocks.0.output.mapping.weight"].equal(given["h.0.mlp.dense_h_to_4h.weight"].T)
    assert made["blocks.0.layernorm2.beta"].equal(given["h.0.post_attention_layernorm.bias"])
    assert made["embedding.word_embedding.embedding_table"].equal(given["word_embeddings.weight"])


@pytest.mark.parametrize(("width", "heads"), [(12, 3), (12, 12), (15, 1), (20, 2)])
def test_wizardcoder_has_one_key_and_value(width, heads, tmp_path):
    config = {"n_embd": width, "n_head": heads, "tie_word_embeddings": True}
    given, made = converted(tmp_path, Model("wizardcoder", wizardcoder(width=width, heads=heads, head=False), config))
    for kind in ("weight", "bias"):
        parts = given[f"transformer.h.0.attn.c_attn.{kind}"].split([width, width // heads, width // heads])
        for number, part in enumerate(parts, 1):
            assert made[f"backbone.blocks.0.attention.dense{number}.{kind}"].equal(part)
    assert made["head.head_weight"].equal(given["transformer.wte.weight"])
    assert made["backbone.embedding.position_embedding.embedding_table"].equal(given["transformer.wpe.weight"])
    assert made["backbone.blocks.1.output.projection.weight"].equal(given["transformer.h.1.mlp.c_proj.weight"].T)


@pytest.mark.parametrize(("family", "norm_name"), [("vit", "vit.layernorm"), ("mae", "vit.norm")])
def test_vit_and_mae_differ_in_the_last_norm(family, norm_name, tmp_path):
    given, made = converted(tmp_path, Model(family, vit(decoder=1)))
    assert made[f"{norm_name}.gamma"].equal(given["norm.weight"])
    assert made["vit.decoder_norm.beta" if family == "mae" else "vit.decoder_layernorm.beta"].equal(given["decoder_norm.bias"])
    assert made["vit.cls_tokens"].equal(given["cls_token"])
    for number, part in enumerate(given["decoder_blocks.0.attn.qkv.weight"].chunk(3), 1):
        assert made[f"vit.decoder_blocks.0.attention.dense{number}.weight"].equal(part)
    assert made["vit.blocks.1.output.mapping.weight"].equal(given["blocks.1.mlp.fc1.weight"].T)


@pytest.mark.parametrize(("family", "other"), [("vit", "mae"), ("mae", "vit")])
def test_vit_and_mae_read_each_other(family, other, tmp_path):
    given, _ = converted(tmp_path, Model(family, vit(decoder=1)))
    assert run("convert", tmp_path / "own.ckpt", tmp_path / "back", "--recipe", f"{other}-ms2hf", "--quiet") == 0
    assert_same(read_any(tmp_path / "back"), given)


def test_torch_files_hold_these_models_as_their_frameworks_do(tmp_path):
    given, _ = converted(tmp_path, Model("swin", swin()))
    assert run("convert", tmp_path / "own.ckpt", tmp_path / "swin.pth", "--recipe", "swin-ms2hf", "--quiet") == 0
    loaded = torch.load(tmp_path / "swin.pth", weights_only=True)
    assert list(loaded) == ["model"]
    assert_same(loaded["model"], given)


def test_swin_keeps_whole_numbers(tmp_path):
    index = {f"layers.{stage}.blocks.0.attn.relative_position_index": torch.arange(81).reshape(9, 9) for stage in range(2)}
    source = write_bin(tmp_path / "source", {"model": numbered(swin(depths=(1, 1))) | index})
    assert run("convert", source, tmp_path / "own.ckpt", "--recipe", "swin-hf2ms", "--dtype", "bf16", "--quiet") == 0
    made = read_any(tmp_path / "own.ckpt")
    assert made["encoder.layers.1.blocks.0.attn.relative_position_bias.relative_position_index"].equal(torch.arange(81).reshape(9, 9))
    assert made["encoder.layers.0.blocks.0.attn.relative_position_bias.relative_position_bias_table"].dtype == torch.bfloat16
    assert run("convert", tmp_path / "own.ckpt", tmp_path / "back", "--recipe", "swin-ms2hf", "--dtype", "fp16", "--quiet") == 0
    assert read_any(tmp_path / "back")["layers.0.blocks.0.attn.relative_position_index"].dtype == torch.int64


def test_telechat2_stacks_experts_in_the_order_of_their_numbers(tmp_path):
    given, made = converted(tmp_path, Model("telechat2", telechat(experts=11)))
    at, own = "transformer.h.1.mlp", "model.layers.1.feed_forward"
    for part, own_part in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        assert made[f"{own}.ffn.{own_part}.weight"].equal(
            torch.stack([given[f"{at}.local_experts.{e}.{part}_proj.weight"] for e in range(11)])
        )
    assert made[f"{own}.ffn.w2.bias"].equal(
        torch.stack([given[f"{at}.local_experts.{e}.down_proj.bias"] for e in range(11)])[None, :, None]
    )
    assert made[f"{own}.router.dense.weight"].equal(given[f"{at}.router.weight"])


HEADS = [(4, 2, 4), (3, 3, 2), (4, 1, 5), (1, 1, 128)]


@pytest.mark.parametrize(("heads", "groups", "dim"), HEADS)
def test_telechat2_fuses_and_unfuses(heads, groups, dim, tmp_path):
    config = {"n_head": heads, "num_key_value_heads": groups}
    given, made = converted(tmp_path, Model("telechat2", telechat(heads=heads, groups=groups, dim=dim), config))
    own = write_ckpt(tmp_path / "own", made, config=config)
    assert run("convert", own, tmp_path / "fused", "--recipe", "telechat2-ms-fuse", "--quiet") == 0
    fused = read_any(tmp_path / "fused")
    keys, values = given["transformer.h.1.self_attention.key_value.weight"].unflatten(0, (groups, 2, dim)).unbind(1)
    joined = torch.cat([given["transformer.h.1.self_attention.query.weight"], keys.flatten(0, 1), values.flatten(0, 1)])
    assert fused["model.layers.1.attention.w_qkv.weight"].equal(joined)
    both = [given[f"transformer.h.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert fused["model.layers.1.feed_forward.w_gate_hidden.weight"].equal(torch.cat(both))
    assert not any(".wq." in name or ".w1." in name for name in fused)
    assert run("convert", tmp_path / "fused", tmp_path / "parts", "--recipe", "telechat2-ms-unfuse", "--quiet") == 0
    assert_same(read_any(tmp_path / "parts"), made)


def test_telechat2_fuses_layers_with_experts(tmp_path):
    config = {"n_head": 4, "num_key_value_heads": 2}
    _, made = converted(tmp_path, Model("telechat2", telechat(experts=2), config))
    own = write_ckpt(tmp_path / "own", made, config=config)
    assert run("convert", own, tmp_path / "fused", "--recipe", "telechat2-ms-fuse", "--quiet") == 0
    assert run("convert", tmp_path / "fused", tmp_path / "parts", "--recipe", "telechat2-ms-unfuse", "--quiet") == 0
    assert_same(read_any(tmp_path / "parts"), made)


@pytest.mark.parametrize("asked", [None, "float32", "bfloat16", "float16"])
def test_glm_goes_through_half_as_the_reference_does(asked, tmp_path):
    given, made = converted(tmp_path, Model("glm", glm()), *(["--dtype", asked] if asked else []))
    dtype = getattr(torch, asked or "float16")
    for name, own, wanted in (
        ("transformer.word_embeddings.weight", "transformer.word_embeddings.embedding_table", dtype),
        ("transformer.layers.0.attention.dense.weight", "transformer.layers.0.attention.dense.weight", dtype),
        ("transformer.layers.0.post_attention_layernorm.bias", "transformer.layers.0.post_attention_layernorm.beta", dtype),
        ("transformer.layers.1.input_layernorm.weight", "transformer.layers.1.input_layernorm.gamma", torch.float16),
    ):
        assert_same({own: made[own]}, {own: given[name].half().to(wanted)})


@pytest.mark.parametrize("asked", [None, "bfloat16"])
def test_glm_without_half(asked, tmp_path):
    given, made = converted(tmp_path, Model("glm", glm(), options=("half=false",)), *(["--dtype", asked] if asked else []))
    dtype = getattr(torch, asked or "float32")
    assert {tensor.dtype for tensor in made.values()} == {dtype}
    assert made["transformer.layers.0.input_layernorm.beta"].equal(given["transformer.layers.0.input_layernorm.bias"].to(dtype))


def test_glm_keeps_what_is_stored_on_the_way_back(tmp_path):
    converted(tmp_path, Model("glm", glm(), options=("half=false",)))
    assert run("convert", tmp_path / "own.ckpt", tmp_path / "back", "--recipe", "glm-ms2hf", "--quiet") == 0
    assert {tensor.dtype for tensor in read_any(tmp_path / "back").values()} == {torch.float32}


def test_glm_renames_factors(tmp_path):
    given, made = converted(tmp_path, MODELS["glm, factors"])
    at = "transformer.layers.1.attention.query_key_value"
    assert made[f"{at}.tk_delta_lora_a"].equal(given[f"{at}.lora_A.weight"])
    assert made[f"{at}.tk_delta_lora_b"].equal(given[f"{at}.lora_B.weight"])


def test_sizes_may_come_from_the_other_folder(tmp_path):
    given, made = converted(tmp_path, MODELS["bloom"])
    own = write_ckpt(tmp_path / "own", made)
    back = ("convert", own, tmp_path / "back", "--recipe", "bloom-ms2hf", "--sidecars-from", tmp_path / "source", "--quiet")
    assert run(*back) == 0
    assert_same(read_any(tmp_path / "back"), given)
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "source" / "config.json").read_bytes()


def test_training_state_is_left_out_on_the_way_back(tmp_path):
    given, made = converted(tmp_path, Model("bloom", bloom(), {"n_head": 2}))
    state = {f"adam_m.{name}": tensor for name, tensor in made.items()} | {"global_step": torch.tensor([7], dtype=torch.int32)}
    own = write_ckpt(tmp_path / "own", made | state, config={"n_head": 2})
    assert run("convert", own, tmp_path / "back", "--recipe", "bloom-ms2hf", "--quiet") == 0
    assert_same(read_any(tmp_path / "back"), given)


def test_a_tied_head_is_left_out_only_if_asked_for(tmp_path):
    given, _ = converted(tmp_path, Model("wizardcoder", wizardcoder(head=False), {"n_head": 3}))
    back = ("convert", tmp_path / "own.ckpt", tmp_path / "back", "--recipe", "wizardcoder-ms2hf", "--quiet")
    assert run(*back) == 0
    assert_same(read_any(tmp_path / "back"), given | {"lm_head.weight": given["transformer.wte.weight"]})
    assert run(*back, "--overwrite", "--set", "tie_word_embeddings=true") == 0
    assert_same(read_any(tmp_path / "back"), given)


@pytest.mark.parametrize("layers", [1, 2, 3, 12])
def test_layers(layers, tmp_path, capsys):
    given, made = converted(tmp_path, Model("wizardcoder", wizardcoder(layers=3), {"n_head": 3, "n_layer": 3}, (f"layers={layers}",)))
    assert {int(name.split(".")[2]) for name in made if ".blocks." in name} == set(range(min(3, layers)))
    capsys.readouterr()
    settled = ("plan", tmp_path / "source", tmp_path / "other", "--recipe", "wizardcoder-hf2ms", "--set", f"layers={layers}")
    assert run(*settled) == 0
    assert ("  dropped: " in capsys.readouterr().out) == (layers < 3)
    assert run("convert", tmp_path / "own.ckpt", tmp_path / "back", "--recipe", "wizardcoder-ms2hf", "--quiet", "--set", "layers=1") == 0
    assert_same(read_any(tmp_path / "back"), {name: tensor for name, tensor in given.items() if ".h." not in name or ".h.0." in name})


# Refusals -----------------------------------------------------------------------------------------------------------


def refused(tmp_path, capsys, model: Model, *, without: str = "", beside: Shapes | None = None, back: bool = False) -> str:
    """Why the model is refused without some tensor and with others."""
    tensors = model.tensors()
    recipe = f"{model.family}-hf2ms"
    if back:
        source = store(tmp_path / "first", model, tensors)
        assert run("convert", source, tmp_path / "first.ckpt", "--recipe", recipe, *settings(model)) == 0
        tensors, recipe = read_any(tmp_path / "first.ckpt"), f"{model.family}-ms2hf"
    tensors = {name: tensor for name, tensor in tensors.items() if name != without} | numbered(beside or {})
    source = write_ckpt(tmp_path / "source", tensors, config=model.config) if back else store(tmp_path / "source", model, tensors)
    said = refusal(capsys, "convert", source, tmp_path / "target", "--recipe", recipe, *settings(model))
    assert not (tmp_path / "target").exists()
    return said


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Model("bloom", bloom(), {"n_head": 5}), "H=5"),
        (Model("bloom", bloom(), {"n_head": 4}, ("hidden_size=16",)), "hidden_size=16 columns"),
        (Model("bloom", bloom(), {"n_head": 4, "n_layer": 3}), "h.2.input_layernorm.weight is missing"),
        (Model("bloom", bloom()), "give them with --set"),
        (Model("wizardcoder", wizardcoder(rows=36), {"n_head": 3, "multi_query": False}), "multi_query false"),
        (Model("wizardcoder", wizardcoder(rows=36)), "multi_query false"),
        (Model("wizardcoder", wizardcoder(), {"n_head": 6}), "n_embd=12, n_head=6"),
        (Model("wizardcoder", wizardcoder(head=False), {"n_head": 3, "tie_word_embeddings": False}), "lm_head.weight"),
        (Model("telechat", telechat(groups=4), {}, ("telechat_type=telechat_7b",)), "no rule"),
        (Model("telechat", telechat(groups=4), {}, ("telechat_type=telechat_52b",)), "telechat_7b, telechat_12b"),
        (Model("telechat2", telechat(experts=3), {}, ("num_experts=4",)), "local_experts.3.down_proj.weight is missing"),
        (Model("telechat2", telechat(head=False), {"tie_word_embeddings": False}), "lm_head.weight"),
        (Model("swin", swin(prefix="encoder."), {}, ("is_pretrain=False",)), "no rule"),
        (Model("swin", swin(), {}, ("is_pretrain=maybe",)), "true or false"),
    ],
)
def test_what_does_not_fit_is_refused(model, said, tmp_path, capsys):
    assert said in refused(tmp_path, capsys, model)


@pytest.mark.parametrize(
    ("model", "without", "said"),
    [
        (MODELS["bloom"], "blocks.1.attention.dense2.weight", "blocks.1.attention.dense2.weight is missing"),
        (MODELS["vit"], "vit.blocks.0.attention.dense3.bias", "vit.blocks.0.attention.dense3.bias is missing"),
        (MODELS["swin"], "encoder.layers.1.blocks.2.attn.k.weight", "encoder.layers.1.blocks.2.attn.k.weight is missing"),
        (MODELS["wizardcoder"], "head.head_weight", "head.head_weight"),
        (MODELS["telechat2, experts"], "model.layers.1.feed_forward.ffn.w3.weight", "no weight of w3"),
    ],
)
def test_incomplete_parts_are_refused_on_the_way_back(model, without, said, tmp_path, capsys):
    assert said in refused(tmp_path, capsys, model, without=without, back=True)


def test_other_heads_than_the_model_has_are_not_fused_or_taken_apart(tmp_path, capsys):
    config = {"n_head": 4, "num_key_value_heads": 2}
    _, made = converted(tmp_path, Model("telechat2", telechat(dim=6), config))
    own = write_ckpt(tmp_path / "own", made, config=config)
    for wrong in ("n_head=5", "n_head=2", "num_key_value_heads=1", "num_key_value_heads=4"):
        said = refusal(capsys, "convert", own, tmp_path / "fused", "--recipe", "telechat2-ms-fuse", "--set", wrong)
        assert "elements" in said
    assert run("convert", own, tmp_path / "fused", "--recipe", "telechat2-ms-fuse", "--quiet") == 0
    said = refusal(capsys, "convert", tmp_path / "fused", tmp_path / "hf", "--recipe", "telechat2-ms2hf")
    assert "w_qkv.weight" in said
    for wrong in ("n_head=2", "num_key_value_heads=4", "num_key_value_heads=1"):
        said = refusal(capsys, "convert", tmp_path / "fused", tmp_path / "parts", "--recipe", "telechat2-ms-unfuse", "--set", wrong)
        assert "rows of w_qkv" in said


FREE = {  # what a model may have or not, by the words in its names
    "bloom": ("lm_head.weight", "head.weight"),
    "wizardcoder": ("lm_head.weight",),  # the embedding where config does not say otherwise
    "vit": ("head.0.", "head.1."),
    "swin": ("absolute_pos_embed", "attn_mask"),
    "telechat2": ("lm_head.weight",),
    "telechat3": ("lm_head.weight",),
    "codegeex2": ("inv_freq",),
    "glm": ("inv_freq", "lora"),
}


def entries(shapes: Shapes) -> dict[str, Source]:
    return {name: Source(TensorSpec(DTYPES["float16"], shape), ()) for name, shape in shapes.items()}


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", MODELS)
def test_no_layer_may_miss_a_tensor(name):
    model = MODELS[name]
    options = dict(option.split("=") for option in model.options)
    recipe, back = (recipes.get(f"{model.family}-{way}") for way in ("hf2ms", "ms2hf"))
    made = recipe.apply(entries(model.shapes), model.config, options).outputs
    own = {target: node.spec.shape for target, node in made.items()}
    passed = []
    for direction, shapes in ((recipe, model.shapes), (back, own)):
        for missing in first_and_last(shapes):
            rest = {other: shape for other, shape in shapes.items() if other != missing}
            try:
                direction.apply(entries(rest), model.config, options)
            except CoverageError:
                continue
            passed.append(missing)
    assert [missing for missing in passed if not any(word in missing for word in FREE.get(model.family, ()))] == []


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stray", ["stray.weight", "transformer.h.0.stray.weight", "model.layers.0.stray.weight", "blocks.0.stray.weight"])
def test_unknown_names_are_refused(name, stray):
    model = MODELS[name]
    options = dict(option.split("=") for option in model.options)
    with pytest.raises(CoverageError, match="no rule"):
        recipes.get(f"{model.family}-hf2ms").apply(entries({**model.shapes, stray: (3,)}), model.config, options)
