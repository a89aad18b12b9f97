"""From what a checkpoint is and what is wanted to options: a function, and so a table."""

from __future__ import annotations

import pytest

from streamconv.advice.decision import Decision, NoWay, decide
from streamconv.advice.goals import GOALS, WORDS, read_goals
from streamconv.advice.recognition import Fit, Recognition
from streamconv.errors import UsageError
from streamconv.recipes import registry
from streamconv.schemes.registry import presets

LLAMA = Recognition(
    "Llama", "safetensors", "llama", named=True, dtypes=frozenset({"bfloat16"}),
    fits=(
        Fit("llama-hf2meta", ranks="model_parallel"), Fit("llama-hf2ms"), Fit("yi-hf2ms", related=False),
        Fit("transformers-hub2native", tried=False),
    ),
)  # fmt: skip
META = Recognition("Meta", fits=(Fit("llama-meta2hf"), Fit("mistral-original2hf", related=False)))
CODES = Recognition("codes", "safetensors", "llama", named=True, dtypes=frozenset({"bfloat16"}), quantization="gptq", decodable=True)
GGUF = Recognition("m.gguf", "gguf", quantization="gguf", decodable=True, fits=(Fit("gguf-gguf2hf"),))
ADAPTER = Recognition("lora", "safetensors", dtypes=frozenset({"float32"}), adapter_of="base")
DCP = Recognition("dcp", "dcp", "llama", named=True, dtypes=frozenset({"float32"}), is_trained=True)
SAT = Recognition("sat", "sat", fits=(Fit("llama-sat2hf"), Fit("sat-repartition", ranks="model_parallel")))


@pytest.mark.parametrize(
    ("source", "words", "options"),
    [
        (LLAMA, "meta", {"recipe": "llama-hf2meta"}),
        (LLAMA, "meta,tp=4", {"recipe": "llama-hf2meta", "options": ["model_parallel=4"]}),
        (LLAMA, "ms,fp16", {"recipe": "llama-hf2ms", "dtype": "float16"}),
        (LLAMA, "ms,bf16", {"recipe": "llama-hf2ms"}),
        (LLAMA, "native", {"recipe": "transformers-hub2native"}),
        (LLAMA, "fp8", {"quantize": "fp8"}),
        (LLAMA, "int4,bin", {"quantize": "W4A16", "format": "torch"}),
        (META, "hf", {"recipe": "llama-meta2hf"}),
        (META, "hf,fp32", {"recipe": "llama-meta2hf", "dtype": "float32"}),
        (CODES, "bf16", {"dtype": "bfloat16", "dequantize": True}),
        (CODES, "fp8", {"quantize": "fp8"}),
        (CODES, "dequantized", {"dequantize": True}),
        (GGUF, "hf", {"recipe": "gguf-gguf2hf", "dequantize": True}),
        (GGUF, "gguf2hf,fp16", {"recipe": "gguf-gguf2hf", "dequantize": True, "dtype": "float16"}),
        (ADAPTER, "bf16", {"dtype": "bfloat16"}),
        (DCP, "hf", {"format": "safetensors"}),
        (DCP, "hf,bf16,one-file", {"format": "safetensors", "dtype": "bfloat16", "single_file": True}),
        (SAT, "tp=2", {"recipe": "sat-repartition", "options": ["model_parallel=2"]}),
    ],
)
def test_options_follow(source, words, options):
    assert decide(source, read_goals([words])) == Decision(options)


def test_an_adapter_is_merged_into_its_base():
    assert decide(ADAPTER, read_goals(["merged,bf16"])) == Decision({"adapter": ["lora"], "dtype": "bfloat16"}, "base")


def test_a_recipe_that_is_chosen_is_taken():
    assert decide(LLAMA, read_goals(["ms"]), "yi-hf2ms").options == {"recipe": "yi-hf2ms"}
    with pytest.raises(UsageError, match="--to ms: --recipe llama-hf2meta does not lead there"):
        decide(LLAMA, read_goals(["ms"]), "llama-hf2meta")


TWO = Recognition("two", "safetensors", "qwen2", fits=(Fit("qwen-hf2ms"), Fit("qwen2_5-hf2ms"), Fit("llama-hf2ms", related=False)))
OTHER = Recognition("other", "safetensors", "granite", fits=(Fit("llama-hf2ms", related=False),))
PIPELINE = Recognition("sd", "safetensors", components=("unet", "vae"))


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        (
            Recognition("raw", "dcp", fits=(Fit("gemma-hf2original", related=False),)),
            "original",
            "by names and shapes one fits: gemma-hf2original; say which by --recipe, or give --sidecars-from DIR, a folder of the model",
        ),
        (TWO, "ms", "--to ms: 2 fit: qwen-hf2ms, qwen2_5-hf2ms; say which by --recipe"),
        (OTHER, "ms", "config.json says model type granite, .* one fits: llama-hf2ms; say by --recipe that it is meant"),
    ],
)
def test_what_is_ambiguous_is_asked(source, words, message):
    with pytest.raises(UsageError, match=message) as refused:
        decide(source, read_goals([words]))
    assert not isinstance(refused.value, NoWay)


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        (LLAMA, "hf", "Llama is that already"),
        (LLAMA, "bf16", "Llama is that already"),
        (LLAMA, "bf16,safetensors", "--to bf16,safetensors: Llama is that already"),
        (LLAMA, "internvl", "no recipe leads there from Llama, of model type llama"),
        (LLAMA, "ms,tp=2", "llama-hf2ms makes no ranks: leave out tp=2"),
        (LLAMA, "merged", "Llama is no PEFT adapter"),
        (META, "bf16", "Meta is files of ranks, which only a recipe joins"),
        (CODES, "hf", "codes is that already"),
        (ADAPTER, "hf", "'streamconv convert base DST --adapter lora' merges it"),
        (PIPELINE, "meta", "sd consists of unet, vae"),
        (Recognition("raw", "dcp"), "hf", "config.json is missing, .*: give --sidecars-from DIR, a folder of the model"),
        (Recognition("raw", "dcp", "odd"), "hf", "config.json does not say model type and class"),
        (Recognition("odd", "safetensors", quantization="hqq", remedy="known are x"), "bf16", "quantized by hqq; known are x"),
    ],
)
def test_what_is_so_already_or_leads_nowhere_is_refused(source, words, message):
    with pytest.raises(NoWay, match=message):
        decide(source, read_goals([words]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bf17", "nothing is called so; did you mean bf16.*known are hf, meta"),
        ("bf16,fp16", "bf16 and fp16 both say a dtype"),
        ("hf,meta", "hf and meta both say a layout"),
        ("tp", "expected tp=N"),
        ("tp=0", "expected tp=N"),
        ("gguf", "GGUF is read, not written; known are"),
        ("hf=2", "hf takes no number"),
        ("", "nothing is called so"),
    ],
)
def test_words_that_are_none(words, message):
    with pytest.raises(UsageError, match=message):
        read_goals([words])


def test_words_are_one_each_and_name_what_there_is():
    spellings = [word for goal in GOALS for word in (goal.word, *goal.also)]
    assert len(spellings) == len(set(spellings))
    assert len(WORDS) == len(GOALS)
    assert {goal.options["quantize"] for goal in GOALS if "quantize" in goal.options} <= presets().keys()
    for goal in GOALS:
        assert goal.kind not in ("layout", "number of ranks") or any(map(goal.leads, registry())), goal
    assert [str(goal) for goal in read_goals(["FP16", "tp=4, HuggingFace"])] == ["hf", "tp=4", "fp16"]


def test_every_recipe_is_led_to_by_a_word():
    assert [name for name in registry() if not any(goal.leads(name) for goal in GOALS)] == []
