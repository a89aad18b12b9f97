"""An embedding and a head that are one tensor: an adapter of one of them makes two of it, as the model is where that was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from streamconv.adapters.folder import Adapter
from streamconv.adapters.keys import Contents
from streamconv.adapters.tokens import SLOTS as TOKENS
from streamconv.adapters.weights import UNTIED, Weights
from streamconv.errors import CoverageError

TIES, VOCABULARY = "tie_word_embeddings", "vocab_size"
_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|tokens_embed|shared)\.weight")
_HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out)\.weight")
_OTHERS = re.compile(r".*(?:ForMaskedLM|ForPreTraining)")  # classes with heads of other names
_HEADED = re.compile(rf".*(?:ForCausalLM|LMHeadModel|ForConditionalGeneration)|{_OTHERS.pattern}")
_MANY = re.compile(r"(?:.*\.)?shared\.weight")
_TEXT = "text_config"


def is_of_words(name: str) -> bool:
    """Whether a tensor is an embedding of words, or a head."""
    return (_EMBEDDING.fullmatch(name) or _HEAD.fullmatch(name)) is not None


def untie(adapter: Adapter, contents: Contents, weights: Weights) -> Mapping[str, str]:
    """Has a head of its own beside the embedding, where they are one and the adapter is for one of them; gives what it replaces.

    Raises:
        CoverageError: a model ties more than these two, or its head is not known.
    """
    targets = {f"{layer.module}.weight" for layer in contents.layers if not any(slot in layer for slot in TOKENS)}
    saved = {name for name in contents.whole if adapter.names("modules_to_save", name.removesuffix(".weight"))}
    own_head = next((name for name in (*targets, *contents.whole) if _HEAD.fullmatch(name)), None)
    embedding = next((name for name in weights.entries if _EMBEDDING.fullmatch(name)), None)
    stored_head = next((name for name in weights.entries if _HEAD.fullmatch(name)), None)
    if embedding is None or not _is_tied(weights.config, has_head=stored_head is not None, knows_head=own_head is not None):
        return contents.whole
    head = stored_head or own_head or _head_of(embedding)
    changed = {embedding, head} & targets
    replaced = {embedding, head} & contents.whole.keys()
    if not changed and (adapter.config.get("ensure_weight_tying") or (embedding in replaced and not replaced & saved)):
        if head in replaced and head not in weights.entries:  # it is the embedding, which is replaced, too
            own = contents.whole.get(embedding, contents.whole[head])
            return {name: key for name, key in {**contents.whole, embedding: own}.items() if name != head}
        return contents.whole
    if not changed | replaced:
        return contents.whole
    if _MANY.fullmatch(embedding) or weights.config.get("is_encoder_decoder") or _OTHERS.fullmatch(_class_of(weights.config)):
        raise CoverageError(f"{adapter.title}: {embedding} is tied to more than a head, or to one of another name: merge it with PEFT")
    if head not in weights.entries:
        weights.former[head] = embedding
        weights.entries[head] = weights.entries[embedding]
        weights.changed[head] = UNTIED
    text = weights.config.get(_TEXT)
    weights.config_changes |= {TIES: False, **({f"{_TEXT}.{TIES}": False} if isinstance(text, Mapping) and TIES in text else {})}
    return contents.whole


def _class_of(config: Mapping[str, Any]) -> str:
    """The first of a config's classes, "": it says none."""
    classes = config.get("architectures")
    return str(classes[0]) if isinstance(classes, list) and classes else ""


def _is_tied(config: Mapping[str, Any], *, has_head: bool, knows_head: bool) -> bool:
    """Whether a model's head is its embedding. What no config says the class does, and that no head is stored."""
    said = [part[TIES] for part in (config, config.get(_TEXT) or {}) if isinstance(part, Mapping) and type(part.get(TIES)) is bool]
    if has_head:
        return bool(said) and said[0]
    is_headed = not _class_of(config) or _HEADED.fullmatch(_class_of(config)) is not None
    return (knows_head or is_headed) and (not said or said[0])


def _head_of(embedding: str) -> str:
    """What the head is called beside an embedding."""
    if embedding.endswith("embed_in.weight"):
        return "embed_out.weight"
    outer, model, _ = embedding.rpartition("language_model.model.")
    return f"{outer}language_model.lm_head.weight" if model else "lm_head.weight"


def replace_whole(adapter: Adapter, replaced: Mapping[str, str], weights: Weights) -> None:
    """Puts an adapter's own tensors in the place of the model's; embeddings and heads may have another number of rows.

    Raises:
        CoverageError: one that the model has not, or of another shape.
    """
    for name, key in replaced.items():
        own = adapter.tensors[key]
        base = weights.find(name, adapter.title, key)
        fits = own.spec.shape == base.spec.shape or (is_of_words(name) and own.spec.shape[1:] == base.spec.shape[1:])
        if not fits:
            raise CoverageError(f"{adapter.title}: {key} is {own.spec}, and {name} of SRC {base.spec}: is it an adapter of this model?")
        weights.replace(name, own)


def check_words(adapter: Adapter, before: Mapping[str, Any], weights: Weights) -> None:
    """Has the config say how many words there are now.

    Raises:
        CoverageError: the embedding and the head do not agree.
    """
    names = [name for name in weights.entries if is_of_words(name)]
    if all(weights.entries[name].spec.shape == before[name].spec.shape for name in names if name in before):
        return
    rows = {name: weights.entries[name].spec.shape[0] for name in names}
    if len(set(rows.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise CoverageError(f"{adapter.title}: rows of the vocabulary do not agree: {said}: save both embeddings in it")
    text = weights.config.get(_TEXT)
    prefix = f"{_TEXT}." if isinstance(text, Mapping) and VOCABULARY in text else ""
    weights.config_changes[prefix + VOCABULARY] = next(iter(rows.values()))
