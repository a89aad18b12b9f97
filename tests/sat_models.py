"""Small models of every family that SwissArmyTransformer has a recipe for: names and shapes of the other side, and its config."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]
H, FFN, HEADS, LAYERS = 32, 48, 8, 2
BLOCKS = range(LAYERS)


def linear(name: str, out: int, into: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, size: int = H) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def merged(parts: Iterator[Shapes]) -> Shapes:
    return {name: shape for part in parts for name, shape in part.items()}


def llama(kv_heads: int = 4, vocab: int = 1024, experts: int = 0) -> Shapes:
    def parts() -> Iterator[Shapes]:
        yield {"model.embed_tokens.weight": (vocab, H), "lm_head.weight": (vocab, H), "model.norm.weight": (H,)}
        for i in BLOCKS:
            at = f"model.layers.{i}"
            yield {f"{at}.{which}_layernorm.weight": (H,) for which in ("input", "post_attention")}
            yield linear(f"{at}.self_attn.q_proj", H, H, bias=False) | linear(f"{at}.self_attn.o_proj", H, H, bias=False)
            for which in "kv":
                yield linear(f"{at}.self_attn.{which}_proj", H // HEADS * kv_heads, H, bias=False)
            if not experts:
                yield linear(f"{at}.mlp.up_proj", FFN, H, bias=False) | linear(f"{at}.mlp.gate_proj", FFN, H, bias=False)
                yield linear(f"{at}.mlp.down_proj", H, FFN, bias=False)
                continue
            yield linear(f"{at}.block_sparse_moe.gate", experts, H, bias=False)
            for e in range(experts):
                expert = f"{at}.block_sparse_moe.experts.{e}"
                yield linear(f"{expert}.w1", FFN, H, bias=False) | linear(f"{expert}.w3", FFN, H, bias=False)
                yield linear(f"{expert}.w2", H, FFN, bias=False)

    return merged(parts())


LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": H, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 4, "vocab_size": 1024, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
MIXTRAL_CONFIG = {**LLAMA_CONFIG, "num_local_experts": 3, "num_experts_per_tok": 2, "rope_theta": 1e6, "model_type": "mixtral"}
VISION, VISION_FFN, POSITIONS = 24, 40, 5


@dataclass(frozen=True)
class CogVLM:
    """Sizes of a CogVLM."""

    vocab: int = 1024
    hidden: int = H
    ffn: int = FFN
    layers: int = LAYERS
    vision: int = VISION
    vision_ffn: int = VISION_FFN
    vision_layers: int = LAYERS
    positions: int = POSITIONS


COGVLM_17B = CogVLM(32000, 4096, 11008, 32, 1792, 15360, 63, 1226)


def cogvlm(sizes: CogVLM = CogVLM(), *, cross: bool = False) -> Shapes:
    h, ffn, vision = sizes.hidden, sizes.ffn, sizes.vision

    def parts() -> Iterator[Shapes]:
        yield {"model.embed_tokens.weight": (sizes.vocab, h), "lm_head.weight": (sizes.vocab, h), "model.norm.weight": (h,)}
        yield {f"model.vision.{which}": (1, 1, h) for which in ("boi", "eoi")}
        patch = "model.vision.patch_embedding"
        yield {f"{patch}.proj.weight": (vision, 3, 14, 14), f"{patch}.proj.bias": (vision,), f"{patch}.cls_embedding": (1, vision)}
        yield {f"{patch}.position_embedding.weight": (sizes.positions, vision)}
        projector = "model.vision.linear_proj"
        yield linear(f"{projector}.linear_proj", h, vision, bias=False) | norm(f"{projector}.norm1")
        yield linear(f"{projector}.dense_h_to_4h", ffn, h, bias=False) | linear(f"{projector}.gate_proj", ffn, h, bias=False)
        yield linear(f"{projector}.dense_4h_to_h", h, ffn, bias=False)
        for i in range(sizes.layers):
            at = f"model.layers.{i}"
            yield {f"{at}.{which}_layernorm.weight": (h,) for which in ("input", "post_attention")}
            for expert in ("language", "vision"):
                yield linear(f"{at}.self_attn.{expert}_expert_query_key_value", 3 * h, h, bias=False)
                yield linear(f"{at}.self_attn.{expert}_expert_dense", h, h, bias=False)
                yield linear(f"{at}.mlp.{expert}_mlp.up_proj", ffn, h, bias=False)
                yield linear(f"{at}.mlp.{expert}_mlp.gate_proj", ffn, h, bias=False)
                yield linear(f"{at}.mlp.{expert}_mlp.down_proj", h, ffn, bias=False)
            if cross:
                yield {f"{at}.post_cross_attention_layernorm.weight": (h,)}
                yield linear(f"{at}.cross_attn.query", 16, h, bias=False) | linear(f"{at}.cross_attn.key_value", 32, 12, bias=False)
                yield linear(f"{at}.cross_attn.dense", h, 16, bias=False)
        for i in range(sizes.vision_layers):
            tower = f"model.vision.transformer.layers.{i}"
            yield norm(f"{tower}.input_layernorm", vision) | norm(f"{tower}.post_attention_layernorm", vision)
            yield linear(f"{tower}.attention.query_key_value", 3 * vision, vision) | linear(f"{tower}.attention.dense", vision, vision)
            yield linear(f"{tower}.mlp.fc1", sizes.vision_ffn, vision) | linear(f"{tower}.mlp.fc2", vision, sizes.vision_ffn)
        if cross:
            yield {"model.vision.pos_embed": (sizes.positions - 1, vision), "model.cross_vision.pos_embed": (9, 12)}
            yield {"model.cross_vision.vit.model.cls_token": (1, 1, 12), "model.cross_vision.vit.model.rope.freqs_cos": (9, 6)}
            yield linear("model.cross_vision.vit.model.blocks.0.attn.q_proj", 12, 12, bias=False)

    return merged(parts())


COGVLM_CONFIG = {
    **{key: value for key, value in LLAMA_CONFIG.items() if key not in ("num_key_value_heads", "rope_theta", "model_type")},
    "architectures": ["CogVLMForCausalLM"], "pad_token_id": 0,
    "vision_config": {
        "dropout_prob": 0.0, "hidden_act": "gelu", "in_channels": 3, "num_hidden_layers": LAYERS, "hidden_size": VISION, "patch_size": 14,
        "num_heads": 4, "intermediate_size": VISION_FFN, "layer_norm_eps": 1e-6, "num_positions": POSITIONS, "image_size": 28,
    },
}  # fmt: skip
COGAGENT_CONFIG = {**COGVLM_CONFIG, "cross_hidden_size": 12, "cross_compute_hidden_size": 16, "cross_image_size": 42}


def chatglm() -> Shapes:
    def parts() -> Iterator[Shapes]:
        yield {"transformer.word_embeddings.weight": (1024, H), "lm_head.weight": (1024, H)} | norm("transformer.final_layernorm")
        for i in BLOCKS:
            at = f"transformer.layers.{i}"
            yield norm(f"{at}.input_layernorm") | norm(f"{at}.post_attention_layernorm")
            yield linear(f"{at}.attention.query_key_value", 3 * H, H) | linear(f"{at}.attention.dense", H, H)
            yield linear(f"{at}.mlp.dense_h_to_4h", FFN, H) | linear(f"{at}.mlp.dense_4h_to_h", H, FFN)

    return merged(parts())


CHATGLM_CONFIG = {
    "model_type": "chatglm", "num_layers": LAYERS, "hidden_size": H, "num_attention_heads": HEADS, "vocab_size": 1024,
    "max_sequence_length": 64, "inner_hidden_size": FFN, "layernorm_epsilon": 1e-5, "bos_token_id": 5, "mask_token_id": 6,
    "gmask_token_id": 7, "pad_token_id": 3,
}  # fmt: skip


def chatglm2() -> Shapes:
    def parts() -> Iterator[Shapes]:
        yield {"transformer.embedding.word_embeddings.weight": (1024, H), "transformer.output_layer.weight": (1024, H)}
        yield {"transformer.encoder.final_layernorm.weight": (H,)}
        for i in BLOCKS:
            at = f"transformer.encoder.layers.{i}"
            yield {f"{at}.{which}_layernorm.weight": (H,) for which in ("input", "post_attention")}
            yield linear(f"{at}.self_attention.query_key_value", H + 2 * H // HEADS * 4, H)
            yield linear(f"{at}.self_attention.dense", H, H, bias=False)
            yield linear(f"{at}.mlp.dense_h_to_4h", 2 * FFN, H, bias=False) | linear(f"{at}.mlp.dense_4h_to_h", H, FFN, bias=False)

    return merged(parts())


CHATGLM2_CONFIG = {
    "model_type": "chatglm", "num_layers": LAYERS, "hidden_size": H, "num_attention_heads": HEADS, "padded_vocab_size": 1024,
    "seq_length": 64, "ffn_hidden_size": FFN, "layernorm_epsilon": 1e-5, "multi_query_group_num": 4, "kv_channels": H // HEADS,
}  # fmt: skip


def gpt2() -> Shapes:
    def parts() -> Iterator[Shapes]:
        yield {"transformer.wte.weight": (1024, H), "transformer.wpe.weight": (16, H)} | norm("transformer.ln_f")
        for i in BLOCKS:
            at = f"transformer.h.{i}"
            yield norm(f"{at}.ln_1") | norm(f"{at}.ln_2")
            for name, into, out in (("attn.c_attn", H, 3 * H), ("attn.c_proj", H, H), ("mlp.c_fc", H, FFN), ("mlp.c_proj", FFN, H)):
                yield {f"{at}.{name}.weight": (into, out), f"{at}.{name}.bias": (out,)}

    return merged(parts())


GPT2_CONFIG = {
    "model_type": "gpt2", "n_layer": LAYERS, "n_embd": H, "n_head": HEADS, "n_inner": FFN, "n_positions": 16, "vocab_size": 1024,
    "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def bert(root: str = "bert") -> Shapes:
    def parts() -> Iterator[Shapes]:
        at = f"{root}.embeddings"
        yield {f"{at}.word_embeddings.weight": (1024, H), f"{at}.position_embeddings.weight": (16, H)} | norm(f"{at}.LayerNorm")
        for i in BLOCKS:
            at = f"{root}.encoder.layer.{i}"
            for which in ("query", "key", "value"):
                yield linear(f"{at}.attention.self.{which}", H, H)
            yield linear(f"{at}.attention.output.dense", H, H) | norm(f"{at}.attention.output.LayerNorm")
            yield linear(f"{at}.intermediate.dense", FFN, H) | linear(f"{at}.output.dense", H, FFN) | norm(f"{at}.output.LayerNorm")
        if root == "bert":
            yield {"bert.embeddings.token_type_embeddings.weight": (2, H), "cls.predictions.bias": (1024,)}
            yield linear("cls.predictions.transform.dense", H, H) | norm("cls.predictions.transform.LayerNorm")
        else:
            yield linear("lm_head.dense", H, H) | norm("lm_head.layer_norm") | {"lm_head.bias": (1024,)}

    return merged(parts())


BERT_CONFIG = {
    "model_type": "bert", "num_hidden_layers": LAYERS, "hidden_size": H, "num_attention_heads": HEADS, "intermediate_size": FFN,
    "vocab_size": 1024, "max_position_embeddings": 16, "layer_norm_eps": 1e-12, "type_vocab_size": 2, "tie_word_embeddings": True,
}  # fmt: skip


def block(at: str) -> Shapes:
    """A layer with timm's names."""
    return (
        norm(f"{at}.norm1") | norm(f"{at}.norm2") | linear(f"{at}.attn.qkv", 3 * H, H) | linear(f"{at}.attn.proj", H, H)
        | linear(f"{at}.mlp.fc1", FFN, H) | linear(f"{at}.mlp.fc2", H, FFN)
    )  # fmt: skip


def layer(at: str) -> Shapes:
    """A layer with transformers' names."""
    shapes = norm(f"{at}.layernorm_before") | norm(f"{at}.layernorm_after")
    for which in ("query", "key", "value"):
        shapes |= linear(f"{at}.attention.attention.{which}", H, H)
    shapes |= linear(f"{at}.attention.output.dense", H, H)
    return shapes | linear(f"{at}.intermediate.dense", FFN, H) | linear(f"{at}.output.dense", H, FFN)


def original(prefix: str = "", positions: int = 5, *, head: bool = True) -> Shapes:
    shapes: Shapes = {f"{prefix}cls_token": (1, 1, H), f"{prefix}pos_embed": (1, positions, H)} | norm(f"{prefix}norm")
    shapes |= {f"{prefix}patch_embed.proj.weight": (H, 3, 16, 16), f"{prefix}patch_embed.proj.bias": (H,)}
    for i in BLOCKS:
        shapes |= block(f"{prefix}blocks.{i}")
    return shapes | (linear("head", 10, H) if head else {})


def transformers(positions: int = 5, *, head: bool = True) -> Shapes:
    at = "vit.embeddings"
    shapes: Shapes = {f"{at}.cls_token": (1, 1, H), f"{at}.position_embeddings": (1, positions, H)} | norm("vit.layernorm")
    shapes |= {f"{at}.patch_embeddings.projection.weight": (H, 3, 16, 16), f"{at}.patch_embeddings.projection.bias": (H,)}
    for i in BLOCKS:
        shapes |= layer(f"vit.encoder.layer.{i}")
    return shapes | (linear("classifier", 10, H) if head else {})


def mae(*, own: bool) -> Shapes:
    prefix = "" if own else "decoder."
    shapes = original(head=False) if own else transformers(head=False)
    shapes |= {f"{prefix}mask_token": (1, 1, H), f"{prefix}decoder_pos_embed": (1, 5, H)} | norm(f"{prefix}decoder_norm")
    for i in BLOCKS:
        shapes |= block(f"decoder_blocks.{i}") if own else layer(f"decoder.decoder_layers.{i}")
    return shapes | linear(f"{prefix}decoder_embed", H, H) | linear(f"{prefix}decoder_pred", 768, H)


def yolos(*, own: bool) -> Shapes:
    shapes = original("backbone.", 8, head=False) if own else transformers(8, head=False)
    shapes |= {"backbone.det_token" if own else "vit.embeddings.detection_tokens": (1, 3, H)}
    for head, out in (("class_embed" if own else "class_labels_classifier", 6), ("bbox_embed" if own else "bbox_predictor", 4)):
        for k, size in enumerate((H, H, out)):
            shapes |= linear(f"{head}.layers.{k}", size, H)
    return shapes


def cait() -> Shapes:
    shapes = original(positions=4)
    for i in BLOCKS:
        shapes |= {f"blocks.{i}.gamma_1": (H,), f"blocks.{i}.gamma_2": (H,)}
        shapes |= linear(f"blocks.{i}.attn.proj_l", HEADS, HEADS) | linear(f"blocks.{i}.attn.proj_w", HEADS, HEADS)
        at = f"blocks_token_only.{i}"
        shapes |= {f"{at}.gamma_1": (H,), f"{at}.gamma_2": (H,)} | norm(f"{at}.norm1") | norm(f"{at}.norm2")
        for which in ("q", "k", "v", "proj"):
            shapes |= linear(f"{at}.attn.{which}", H, H)
        shapes |= linear(f"{at}.mlp.fc1", FFN, H) | linear(f"{at}.mlp.fc2", H, FFN)
    return shapes


VIT_CONFIG = {
    "model_type": "vit", "num_hidden_layers": LAYERS, "hidden_size": H, "num_attention_heads": HEADS, "intermediate_size": FFN,
    "image_size": 32, "patch_size": 16, "num_channels": 3, "layer_norm_eps": 1e-12,
}  # fmt: skip


def clip() -> Shapes:
    shapes: Shapes = {"logit_scale": (), "visual_projection.weight": (8, H), "text_projection.weight": (8, H)}
    for model in ("vision_model", "text_model"):
        for i in BLOCKS:
            at = f"{model}.encoder.layers.{i}"
            shapes |= norm(f"{at}.layer_norm1") | norm(f"{at}.layer_norm2")
            for which in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= linear(f"{at}.self_attn.{which}", H, H)
            shapes |= linear(f"{at}.mlp.fc1", FFN, H) | linear(f"{at}.mlp.fc2", H, FFN)
    at = "vision_model.embeddings"
    shapes |= {f"{at}.class_embedding": (H,), f"{at}.patch_embedding.weight": (H, 3, 16, 16), f"{at}.position_embedding.weight": (5, H)}
    shapes |= norm("vision_model.pre_layrnorm") | norm("vision_model.post_layernorm") | norm("text_model.final_layer_norm")
    at = "text_model.embeddings"
    return shapes | {f"{at}.token_embedding.weight": (1024, H), f"{at}.position_embedding.weight": (7, H)}


CLIP_CONFIG = {
    "model_type": "clip", "projection_dim": 8, "vision_config": VIT_CONFIG,
    "text_config": {**BERT_CONFIG, "max_position_embeddings": 7},
}  # fmt: skip


def eva2() -> Shapes:
    shapes = {name: shape for name, shape in original(head=False).items() if ".attn.qkv" not in name and ".mlp." not in name}
    shapes |= {"mask_token": (1, 1, H), "rope.freqs_cos": (4, 4), "rope.freqs_sin": (4, 4)} | linear("lm_head", 12, H)
    for i in BLOCKS:
        at = f"blocks.{i}"
        for which in "qkv":
            shapes |= linear(f"{at}.attn.{which}_proj", H, H, bias=False)
        shapes |= {f"{at}.attn.q_bias": (H,), f"{at}.attn.v_bias": (H,)} | norm(f"{at}.mlp.ffn_ln", FFN)
        shapes |= linear(f"{at}.mlp.w1", FFN, H) | linear(f"{at}.mlp.w2", FFN, H) | linear(f"{at}.mlp.w3", H, FFN)
    return shapes


Family = tuple[Callable[[], Shapes], dict[str, Any]]
FAMILIES: dict[str, Family] = {  # the part before "/" is the recipe's name
    "llama": (llama, LLAMA_CONFIG),
    "llama/all heads": (lambda: llama(HEADS), {**LLAMA_CONFIG, "num_key_value_heads": HEADS}),
    "llama/few words": (lambda: llama(vocab=96), {**LLAMA_CONFIG, "vocab_size": 96}),
    "mixtral-8x7b": (lambda: llama(experts=3), MIXTRAL_CONFIG),
    "cogvlm": (cogvlm, COGVLM_CONFIG),
    "cogagent": (lambda: cogvlm(cross=True), COGAGENT_CONFIG),
    "chatglm": (chatglm, CHATGLM_CONFIG),
    "chatglm2": (chatglm2, CHATGLM2_CONFIG),
    "chatglm3": (chatglm2, {**CHATGLM2_CONFIG, "rope_ratio": 50}),
    "gpt2": (gpt2, GPT2_CONFIG),
    "bert": (bert, BERT_CONFIG),
    "roberta": (lambda: bert("roberta"), {**BERT_CONFIG, "model_type": "roberta", "type_vocab_size": 1}),
    "vit": (transformers, VIT_CONFIG),
    "vit/original": (original, VIT_CONFIG),
    "deit": (transformers, VIT_CONFIG),
    "deit/original": (original, VIT_CONFIG),
    "cait": (cait, VIT_CONFIG),
    "mae": (lambda: mae(own=False), VIT_CONFIG),
    "mae/original": (lambda: mae(own=True), VIT_CONFIG),
    "yolos": (lambda: yolos(own=False), VIT_CONFIG),
    "yolos/original": (lambda: yolos(own=True), VIT_CONFIG),
    "clip": (clip, CLIP_CONFIG),
    "eva2": (eva2, VIT_CONFIG),
}
