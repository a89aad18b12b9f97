"""What people say that a checkpoint shall become: the words of ``--to``, a row for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from streamconv.errors import UsageError
from streamconv.text import did_you_mean

OPTION = "--to"
LAYOUT, RANKS, DTYPE, SCHEME, CONTAINER, FILES = "layout", "number of ranks", "dtype", "quantization", "container", "number of files"
MERGE = "merge"


@dataclass(frozen=True)
class Goal:
    """What a word of ``--to`` means.

    Attributes:
        word: the word; ``tp=N`` is ``tp``.
        kind: of what it says something: of two words of one kind only one can hold.
        what: what comes out, in a few words.
        recipes: which recipes lead there, by their names; nothing: it takes none.
        options: of `Options`, by field, that always bring it about.
        also: other words for it.
        number: what stands behind ``=`` in it; None: nothing may.
    """

    word: str
    kind: str
    what: str
    recipes: str = r"(?!)"
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    also: tuple[str, ...] = ()
    number: int | None = None

    def leads(self, recipe: str) -> bool:
        """Whether a recipe of that name leads there."""
        return re.fullmatch(self.recipes, recipe) is not None

    def __str__(self) -> str:
        return self.word if self.number is None else f"{self.word}={self.number or 'N'}"


GOALS = (
    Goal("hf", LAYOUT, "Hugging Face's layout, in safetensors", r".*2hf|tp-merge", also=("huggingface",)),
    Goal("meta", LAYOUT, "Meta's consolidated.NN.pth", r".*-hf2meta"),
    Goal("internvl", LAYOUT, "InternVL's own layout", r"internvl-hf2custom"),
    Goal("original", LAYOUT, "the layout of its makers", r".*-hf2(original|custom|meta|mp)"),
    Goal("ms", LAYOUT, "MindSpore Transformers' layout", r".*-hf2ms", also=("mindspore", "mindformers")),
    Goal("mcore", LAYOUT, "Megatron Core's torch_dist", r"mcore-hf2gpt", also=("megatron",)),
    Goal("titan", LAYOUT, "torchtitan's distributed checkpoint", r".*-hf2titan", also=("torchtitan",)),
    Goal("sat", LAYOUT, "a SwissArmyTransformer folder", r".*-hf2sat"),
    Goal("mp", LAYOUT, "the ranks of DeepSeek's own code", r".*-hf2mp"),
    Goal("native", LAYOUT, "the layout that transformers keeps in memory", r"transformers-hub2native"),
    Goal("hub", LAYOUT, "the layout on the Hub, of what transformers keeps in memory", r"transformers-native2hub"),
    Goal("gguf2hf", LAYOUT, "Hugging Face's layout, of GGUF", r"gguf-gguf2hf"),
    Goal("fused", LAYOUT, "q, k, v and gate, up in one tensor each, for MindSpore", r".*-ms-fuse"),
    Goal("unfused", LAYOUT, "q, k, v and gate, up apart, for MindSpore", r".*-ms-unfuse"),
    Goal("merged", MERGE, "the base with the adapter in it"),
    Goal("tp", RANKS, "tensor-parallel ranks", r"tp-split|sat-repartition", number=0, also=("mp_size",)),
    Goal("bf16", DTYPE, "in bfloat16", options={"dtype": "bfloat16"}, also=("bfloat16",)),
    Goal("fp16", DTYPE, "in float16", options={"dtype": "float16"}, also=("float16", "half")),
    Goal("fp32", DTYPE, "in float32", options={"dtype": "float32"}, also=("float32",)),
    Goal("dequantized", SCHEME, "numbers instead of codes", options={"dequantize": True}),
    Goal("fp8", SCHEME, "linear weights in 8 bits", options={"quantize": "fp8"}),
    Goal("int4", SCHEME, "linear weights in 4 bits", options={"quantize": "W4A16"}, also=("w4a16",)),
    Goal("int8", SCHEME, "linear weights in 8 bits", options={"quantize": "W8A16"}, also=("w8a16",)),
    Goal("nvfp4", SCHEME, "linear weights in 4 bits", options={"quantize": "NVFP4A16"}, also=("nvfp4a16",)),
    Goal("mxfp4", SCHEME, "linear weights in 4 bits", options={"quantize": "MXFP4A16"}, also=("mxfp4a16",)),
    Goal("mxfp8", SCHEME, "linear weights in 8 bits", options={"quantize": "MXFP8A16"}, also=("mxfp8a16",)),
    Goal("safetensors", CONTAINER, "safetensors", options={"format": "safetensors"}),
    Goal("bin", CONTAINER, "files of torch.save", options={"format": "torch"}, also=("torch", "pt", "pth")),
    Goal("ckpt", CONTAINER, "MindSpore's .ckpt, names as they are", options={"format": "mindspore"}),
    Goal("dcp", CONTAINER, "torch's distributed checkpoint", options={"format": "dcp"}),
    Goal("one-file", FILES, "one file", options={"single_file": True}, also=("single-file",)),
)  # fmt: skip
"""All of them; those that a checkpoint is most likely wanted to become first."""
SCHEMES = tuple(str(goal.options["quantize"]) for goal in GOALS if "quantize" in goal.options)
WORDS = tuple(map(str, GOALS))
_BY_WORD = {word: goal for goal in GOALS for word in (goal.word, *goal.also)}


def read_goals(texts: Iterable[str]) -> list[Goal]:
    """What was said, each once; ``texts`` may have several words each, between commas.

    Raises:
        UsageError: a word that is none, or two that cannot both hold.

    >>> [str(goal) for goal in read_goals(["meta,bf16", "tp=4"])]
    ['meta', 'tp=4', 'bf16']
    """
    goals: dict[str, Goal] = {}
    for word in (part.strip() for text in texts for part in text.split(",")):
        goal = _read_goal(word)
        other = goals.setdefault(goal.kind, goal)
        if other != goal:
            raise UsageError(f"{OPTION}: {other} and {goal} both say a {goal.kind}: leave out one of them")
    return [goal for one in GOALS for goal in goals.values() if goal.word == one.word]


def _read_goal(word: str) -> Goal:
    name, mark, number = word.lower().partition("=")
    goal = _BY_WORD.get(name)
    if goal is None:
        hint = ": GGUF is read, not written" if name == "gguf" else did_you_mean(word, _BY_WORD)
        raise UsageError(f"{OPTION} {word}: nothing is called so{hint}; known are {', '.join(WORDS)}")
    if goal.number is None and mark:
        raise UsageError(f"{OPTION} {word}: {goal.word} takes no number: leave out ={number}")
    if goal.number is None:
        return goal
    if not re.fullmatch(r"[1-9]\d{0,3}", number, re.ASCII):
        raise UsageError(f"{OPTION} {word}: expected {goal.word}=N, the number of ranks, such as {goal.word}=4")
    return replace(goal, number=int(number))
