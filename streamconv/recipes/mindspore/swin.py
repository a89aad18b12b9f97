"""Swin in MindSpore Transformers: fine-tuned models (microsoft/Swin-Transformer) and pretrained ones (microsoft/SimMIM).

Facts: mindformers r1.3.0 (f90b5b9) ``models/swin/convert_{weight,reversed}.py``. Where those cast the indices of positions, read ``False``
as true, or drop q, k, v that are not complete, these rules do not.
"""

from __future__ import annotations

from itertools import product

from streamconv.recipe import Fact, Option, Recipe, Rule, Side, sparse
from streamconv.recipes.mindspore.mindformers import MS, REFERENCE, TRAINING

_BLOCK = "layers.{s}.blocks.{b}"
_BOTH, _OWN_BOTH = "{weight,bias}", "{gamma,beta}"
_KIND, _OWN_KIND = "{kind:weight,bias}", "{kind:gamma,beta}"


def _encoder(prefix: str, when: str) -> tuple[Fact, ...]:
    """All but the head."""
    left, right = f"{prefix}{_BLOCK}", f"encoder.{_BLOCK}"

    def rule(left: str, right: str, layout: str | None = None, *, optional: bool = False) -> Rule:
        return Rule(left, right, layout, when=when, optional=optional)

    return (
        rule(f"{prefix}patch_embed.proj.{_BOTH}", f"encoder.patch_embed.projection.{_BOTH}"),
        rule(f"{prefix}patch_embed.norm.{_BOTH}", f"encoder.patch_embed.norm.{_OWN_BOTH}", optional=True),
        rule(f"{prefix}norm.{_BOTH}", f"encoder.norm.{_OWN_BOTH}"),
        rule(f"{prefix}absolute_pos_embed", "encoder.absolute_pos_embed", optional=True),
        # Stages have different numbers of blocks.
        *sparse(
            rule(f"{left}.norm{{1,2}}.{_KIND}", f"{right}.norm{{1,2}}.{_OWN_KIND}"),
            rule(f"{left}.attn.qkv.{_KIND}", f"{right}.attn.{{q,k,v}}.{_KIND}", "(o + o + o) ... -> o ..., o ..., o ..."),
            rule(f"{left}.attn.proj.{_KIND}", f"{right}.attn.proj.{_KIND}"),
            rule(
                f"{left}.attn.relative_position_{{bias_table,index}}",
                f"{right}.attn.relative_position_bias.relative_position_{{bias_table,index}}",
            ),
            rule(f"{left}.attn_mask", f"{right}.attn_mask", optional=True),
            rule(f"{left}.mlp.{{fc1,fc2}}.weight", f"{right}.mlp.{{mapping,projection}}.weight", "o c -> c o"),
            rule(f"{left}.mlp.{{fc1,fc2}}.bias", f"{right}.mlp.{{mapping,projection}}.bias"),
        ),
        rule(
            f"{prefix}layers.{{d}}.downsample.{{reduction.weight,norm.weight,norm.bias}}",
            "encoder.layers.{d}.downsample.{reduction.weight,norm.gamma,norm.beta}",
            optional=True,
        ),
    )


def _in_every_block(block: str, *parts: str) -> dict[str, str]:
    """Conditions that all blocks have what any has."""
    return {
        f"count('{block}.{part}') in [0, count('{block}.attn.proj.weight')]": f"some blocks have no {part} and others do: mend the source"
        for part in parts
    }


def _each(parts: tuple[str, ...], kinds: tuple[str, str]) -> list[str]:
    """The names of both kinds of tensors of each of these parts."""
    return [f"{part}.{kind}" for part, kind in product(parts, kinds)]


_SWIN = Recipe(
    name="swin-hf2ms",
    summary="Swin: PyTorch (microsoft/Swin-Transformer, SimMIM) to MindSpore, q, k, v split",
    rules=(
        *_encoder("", "not is_pretrain"),
        Rule(f"head.{_BOTH}", f"head.{_BOTH}", when="not is_pretrain", optional=True),
        *_encoder("encoder.", "is_pretrain"),
        Rule("encoder.mask_token", "encoder.mask_token", when="is_pretrain"),
        Rule(f"decoder.0.{_BOTH}", f"decoder.{_BOTH}", when="is_pretrain"),
        *TRAINING,
    ),
    options={
        "is_pretrain": Option(
            "whether it is a SimMIM model, with a mask token and a decoder",
            default="{has('encoder.mask_token') or has('decoder.{rest*}')}",
            kind="bool",
        )
    },
    requires={
        **_in_every_block(
            f"{{at:,encoder.}}{_BLOCK}",
            *_each(("norm1", "norm2", "attn.qkv", "mlp.fc1", "mlp.fc2"), ("weight", "bias")),
            *(f"attn.{part}" for part in ("proj.bias", "relative_position_bias_table", "relative_position_index")),
        ),
        **_in_every_block(
            f"encoder.{_BLOCK}",
            *_each(("norm1", "norm2"), ("gamma", "beta")),
            *_each(("attn.q", "mlp.mapping", "mlp.projection"), ("weight", "bias")),
            *(f"attn.relative_position_bias.relative_position_{part}" for part in ("bias_table", "index")),
        ),
    },
    left=Side(root="model"),
    right=MS,
    reference=REFERENCE.format("models/swin"),
)

RECIPES = (_SWIN, _SWIN.inverse("swin-ms2hf", "Swin: MindSpore to PyTorch (microsoft/Swin-Transformer, SimMIM), q, k, v joined"))
