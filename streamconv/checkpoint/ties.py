"""Of a tensor that goes by several names, the one under which it is kept where a container stores it once.

It is the name that transformers' ``save_pretrained`` keeps, so that base classes find it, too: the embedding rather than the head, what is
shared rather than the encoder's or the decoder's. Most names tell; where they do not, the model's class may (see `model.choose_kept`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from streamconv.graph.node import AnyNode, made_of

Choice = Callable[[Sequence[str]], str | None]
"""Names of one tensor, in the model's order -> the one that is kept, None where that is not known."""

_EMBEDDING = (
    r"(embed_tokens|tokens_embed|embed_in|embed|embd|emb|embeddings?|wte|w|embedding_(projection|table)"
    r"|(word|tok|token|text|entity|codec|input)_emb(ed(ding)?s?)?)(\.weight)?"
)
_HEAD = (
    r"((generator_)?lm_head|lm_heads\.\d+|lm_loss|ctc_head|codec_head|head|proj_out|output(_layer|_projection)?|embed_out|ff_out"
    r"|vocab_projector|pred_layer\.proj|unembedding_projection|(lm_)?head\.out_proj)(\.weight|\.bias)?"
)
_OUTPUT = r"decoder(\.weight|\.bias)?"
_PART = r"(.*\.)?(text_)?(en|de)coder\..*"
_KINDS = (  # patterns of whole names; of several names, those that the first pattern takes are kept
    r"(.*\.)?shared\.weight",
    rf"(?!{_PART})(.*\.)?{_EMBEDDING}",
    rf"(.*\.)?{_EMBEDDING}",
    rf"(?!(.*\.)?({_HEAD}|{_OUTPUT})$).*",
    rf"(.*\.)?{_HEAD}",
    r".*",
)
_BIAS = re.compile(r"(?P<stem>(.*\.)?(predictions|lm_head))\.decoder\.bias")  # another name of that of the module above
_COMPUTED = re.compile(r"(.*\.)?((original_)?inv_freq|position_ids|token_type_ids|masked_bias|(cos|sin)_cached|relative_position_index)")
_BY_CLASS = (  # classes that keep another name than their like
    (r"Blt.*|OpenAIGPTDoubleHeadsModel", r"lm_head\.weight"),
    (r"Flava.*", r"m\w+_head\.decoder\.bias"),
    (r"Luke.*", r"lm_head\.decoder\.bias"),
    (r"FSMT.*", r"(model\.)?decoder\.embed_tokens\.weight"),
    (r"(MM)?GroundingDino.*|DeformableDetr.*|Deta.*|DabDetr.*", r"(class_embed|bbox_embed|bbox_predictor)\..*"),
)


def find_ties(entries: Mapping[str, AnyNode], architecture: str, choose: Choice) -> dict[str, str]:
    """The names of tensors that are another one, in the same bytes with the same dtype and shape, and the name of that.

    Args:
        entries: the tensors, in the model's order.
        architecture: the model's class, as config.json names it.
        choose: asked where the names do not tell; what it does not know either, is kept under the first name.
    """
    alike: dict[object, list[str]] = {}
    for name, node in entries.items():
        if node.spec.nbytes:
            alike.setdefault(made_of(node), []).append(name)
    kept_of: dict[str, str] = {}
    for names in alike.values():
        if len(names) > 1:
            kept = _first_kind(names, architecture)
            chosen = kept[0] if len(kept) == 1 else choose(names) or kept[0]
            kept_of |= {name: chosen for name in names if name != chosen}
    return {name: kept_of[name] for name in entries if name in kept_of}


def _first_kind(names: Iterable[str], architecture: str) -> list[str]:
    """Those of the names that nothing but the model's class, or their order, can decide between."""
    own = (pattern for known, pattern in _BY_CLASS if re.fullmatch(known, architecture))
    for pattern in (*own, *_KINDS):
        matches = [name for name in names if re.fullmatch(pattern, name, re.DOTALL)]
        if matches:
            return matches
    raise AssertionError("the last kind takes every name")


# What files say ------------------------------------------------------------------------------------------------------


def says_tie(name: str, kept: str) -> bool:
    """Whether ``name: kept`` among a file's metadata says that a tensor goes by two names, and is not about something else.

    Metadata may say anything, ``note: w`` where there is a tensor ``w``. Both must be a parameter's name, that of a module and at its end
    the same word, or be called as heads and embeddings are: a tie that is not seen stays as metadata, one that is none would be a tensor
    made up.
    """
    module, _, parameter = name.rpartition(".")
    other, _, own = kept.rpartition(".")
    if module and other:
        return parameter == own and name.isprintable() and " " not in name
    either_end = re.compile(rf"{_EMBEDDING}|{_HEAD}|{_OUTPUT}")
    return either_end.fullmatch(name) is not None and either_end.fullmatch(kept) is not None


def explain_absent(name: str, present: Collection[str], *, untied: bool) -> str | None:
    """Why a tensor that an index names need be in no file: the one that it is another name of, or that code computes it. None: it is lost.

    Args:
        name: of the tensor.
        present: what files hold.
        untied: the config says that the head is not the embedding.
    """
    if _COMPUTED.fullmatch(name):
        return "which the model's code computes"
    match = _BIAS.fullmatch(name)
    if match:
        bias = f"{match['stem']}.bias"
        return f"another name of {bias}" if bias in present else None
    head = re.fullmatch(rf"(.*\.)?({_HEAD}|{_OUTPUT})", name, re.DOTALL)
    if (head and not untied) or re.fullmatch(rf"(.*\.)?{_EMBEDDING}", name, re.DOTALL):
        kept = next((other for other in present if re.fullmatch(rf"(.*\.)?{_EMBEDDING}", other, re.DOTALL)), None)
        return f"another name of {kept}" if kept else None
    return None
