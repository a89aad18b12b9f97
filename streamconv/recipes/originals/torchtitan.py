"""Llama as torchtitan trains it <-> Hugging Face: its names, and rows of queries and keys as Meta's code rotates them.

Facts: ``torchtitan/models/llama3/state_dict_adapter.py`` of torchtitan (b5bcd76), which renamed the projections and the head after 0.2.
"""

from __future__ import annotations

from streamconv.recipe import Drop, Option, Recipe, Rule, Side, Tie, from_config

_HF, _OWN = "model.layers.{i}", "layers.{i}"
_PAIRS = "(h two j) c -> (h j two) c"  # half of a head's rows, then the other half, against pairs of rows
_NEW, _OLD = "names == 'new'", "names == 'old'"

RULES = (
    Rule("model.embed_tokens.weight", "tok_embeddings.weight"),
    Rule(f"{_HF}.self_attn.{{q,k}}_proj.weight", f"{_OWN}.attention.qkv_linear.{{wq,wk}}.weight", _PAIRS, when=_NEW),
    Rule(f"{_HF}.self_attn.{{q,k}}_proj.weight", f"{_OWN}.attention.{{wq,wk}}.weight", _PAIRS, when=_OLD),
    Rule(f"{_HF}.self_attn.v_proj.weight", f"{_OWN}.attention.qkv_linear.wv.weight", when=_NEW),
    Rule(f"{_HF}.self_attn.v_proj.weight", f"{_OWN}.attention.wv.weight", when=_OLD),
    Rule(f"{_HF}.self_attn.o_proj.weight", f"{_OWN}.attention.wo.weight"),
    Rule(f"{_HF}.mlp.{{gate,down,up}}_proj.weight", f"{_OWN}.feed_forward.{{w1,w2,w3}}.weight"),
    Rule(f"{_HF}.{{input,post_attention}}_layernorm.weight", f"{_OWN}.{{attention_norm,ffn_norm}}.weight"),
    Rule("model.norm.weight", "norm.weight"),
    Rule("lm_head.weight", "lm_head.weight", when=f"not tied and {_NEW}"),
    Rule("lm_head.weight", "output.weight", when=f"not tied and {_OLD}"),
    Tie("model.embed_tokens.weight", "lm_head.weight", "tok_embeddings.weight", when=f"tied and {_NEW}"),
    Tie("model.embed_tokens.weight", "output.weight", "tok_embeddings.weight", when=f"tied and {_OLD}"),
    Drop(f"{_HF}.self_attn.rotary_emb.inv_freq", "the model computes it from its config"),
)

_TITAN = Recipe(
    name="llama-hf2titan",
    summary="Llama: Hugging Face to a checkpoint that torchtitan starts from",
    rules=RULES,
    dims={"i": "n_layers", "two": 2, "h": {"q": "=n_heads", "k": "=n_kv_heads"}},
    options={
        **from_config(n_layers="num_hidden_layers", n_heads="num_attention_heads", n_kv_heads="num_key_value_heads num_attention_heads"),
        "names": Option(
            "torchtitan's, after version 0.2 (new) or until then; by default those in SRC",
            default="{'old' if has('layers.0.attention.wq.weight') else 'new'}",
            choices=("new", "old"),
        ),
        "tied": Option(
            "whether the head is the embedding, which Hugging Face's side then stores once; torchtitan's repeats it",
            default="{(config.tie_word_embeddings or sidecar.tie_word_embeddings) == True}",
            kind="bool",
        ),
    },
    reference="torchtitan/models/llama3/state_dict_adapter.py",
    left=Side(expects=("tokenizer_config.json",)),
    right=Side(format="dcp"),
)

RECIPES = (_TITAN, _TITAN.inverse("llama-titan2hf", "Llama: torchtitan's distributed checkpoints to Hugging Face"))
