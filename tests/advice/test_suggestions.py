"""What `inspect` and `doctor` suggest: commands that do what they say, of checkpoints of many kinds."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import golden_plans
import pytest
import torch
from checkpoint_files import numbered, run, write, write_bin, write_ckpt
from safetensors.torch import save_file
from seeded_defects import CONFIG, llama
from small_source import strict_json
from trainer_models import CONFIGS

from streamconv.advice.decision import SIDECARS
from streamconv.advice.suggestions import MOST

GOLDEN = Path(__file__).parent.parent / "golden"
WIDE = {**CONFIG, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}


def wide(folder: Path) -> Path:
    """A Llama that can be quantized in groups of 128."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (16, 128), "model.norm.weight": (128,), "lm_head.weight": (16, 128)}
    stem = "model.layers.0"
    shapes |= {f"{stem}.self_attn.{name}_proj.weight": (64 if name in "kv" else 128, 128) for name in "qkvo"}
    shapes |= {f"{stem}.mlp.{name}_proj.weight": (128, 128) for name in ("gate", "up", "down")}
    shapes |= {f"{stem}.{name}.weight": (128,) for name in ("input_layernorm", "post_attention_layernorm")}
    return write(folder, numbered(shapes, torch.bfloat16), shards=2, config=WIDE)


def quantized(scheme: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        assert run("convert", wide(folder / "whole"), folder / scheme, "--quantize", scheme, "--quiet") == 0
        return folder / scheme

    return make


def adapter(folder: Path) -> Path:
    """A LoRA beside its base."""
    base, own = wide(folder / "base"), folder / "lora"
    own.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{stem}.lora_A.weight": torch.ones(2, 128), f"{stem}.lora_B.weight": torch.ones(128, 2)}, own / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(base)}
    (own / "adapter_config.json").write_text(json.dumps(said))
    return own


def pipeline(folder: Path) -> Path:
    for name in ("unet", "vae"):
        (folder / name).mkdir(parents=True)
        save_file({"conv.weight": torch.ones(2, 3)}, folder / name / "diffusion_pytorch_model.safetensors")
        (folder / name / "config.json").write_text('{"_class_name": "Model"}')
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", "unet": ["diffusers", "M"], "vae": ["diffusers", "M"]}))
    return folder


def without_config(make: Callable[[Path], Path], **config: object) -> Callable[[Path], Path]:
    """A checkpoint whose config lies in a folder of its own, as `DIRECTORY` is called, beside it."""

    def move(folder: Path) -> Path:
        source = make(folder)
        (source / "config.json").unlink(missing_ok=True)
        beside = folder.parent / DIRECTORY
        beside.mkdir()
        (beside / "config.json").write_text(json.dumps(config or CONFIG))
        return source

    return move


def converted(*options: str) -> Callable[[Path], Path]:
    """What a conversion makes of a Llama."""

    def make(folder: Path) -> Path:
        assert run("convert", write(folder / "whole", llama(), config=CONFIG), folder / "own", *options, "--quiet") == 0
        return folder / "own"

    return make


def trained(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return Path(shutil.copytree(GOLDEN / "trainers" / name, folder))

    return make


def family(name: str) -> Callable[[Path], Path]:
    return golden_plans.families()[name].write


DIRECTORY = "model's"
TOY = {"model_type": "toy", "architectures": ["Toy"]}
KINDS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "llama": (wide, ["meta", "ms", "mcore", "fp8", "int4"]),
    "pickles": (lambda folder: write_bin(folder, llama(), config=CONFIG), ["hf", "meta", "ms"]),
    "mindspore": (lambda folder: write_ckpt(folder, numbered({"w": (2, 3)})), ["safetensors", "bf16"]),
    "fp8": (quantized("fp8"), ["meta", "ms", "mcore", "bf16"]),
    "int4": (quantized("W4A16"), ["meta", "ms", "mcore", "bf16"]),
    "adapter": (adapter, ["merged", "bf16"]),
    "pipeline": (pipeline, ["bf16", "one-file"]),
    "bare dcp": (without_config(trained("fsdp2.dcp"), **TOY), ["hf", "safetensors", "bf16", "one-file"]),
    "bare ranks": (without_config(trained("fsdp2.ranks"), **TOY), ["hf", "safetensors", "bf16", "one-file"]),
    "bare shards": (without_config(trained("fsdp2.shards"), **TOY), ["hf", "safetensors", "bf16", "one-file"]),
    "bare zero": (without_config(trained("z3_bf16"), **TOY), ["hf", "safetensors", "bf16", "one-file"]),
    "bare llama": (without_config(converted("--to", "dcp")), ["hf", "safetensors"]),
    "bare mindspore": (without_config(converted("--to", "ms")), ["hf", "safetensors"]),
    "bare pickle": (without_config(converted("--to", "bin")), ["hf", "safetensors"]),
    "bare megatron": (without_config(trained("mcore_mixtral"), **CONFIGS["mcore_mixtral"]), ["hf", "safetensors", "bf16", "one-file"]),
    "meta": (family("originals/llama"), ["hf"]),
    "mistral": (family("originals/mistral"), ["hf"]),
    "gguf": (family("originals/gguf"), ["hf", "safetensors", "bf16"]),
}


CONFIG_OF_LLAMA = {**CONFIG, "architectures": ["LlamaForCausalLM"]}


def sharded(folder: Path) -> Path:
    """A Llama's tensor-parallel ranks."""
    source = write(folder / "whole", llama(), config=CONFIG_OF_LLAMA)
    assert run("convert", source, folder / "ranks", "--to", "tp=2", "--quiet") == 0
    return folder / "ranks"


def native(folder: Path) -> Path:
    """A Mixtral as transformers keeps it in memory."""
    transformers = pytest.importorskip("transformers")
    sizes = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2)
    config = transformers.MixtralConfig(**sizes, hidden_size=8, intermediate_size=12, num_local_experts=2, vocab_size=16)
    model = transformers.MixtralForCausalLM(config)
    return write(folder, dict(model.state_dict()), config=config.to_dict() | {"architectures": ["MixtralForCausalLM"]})


TRIED_BY_TRANSFORMERS = {"ranks": (sharded, "hf"), "bare": (without_config(sharded, **CONFIG_OF_LLAMA), "hf"), "native": (native, "hub")}


@pytest.mark.oracle
@pytest.mark.parametrize(("make", "word"), TRIED_BY_TRANSFORMERS.values(), ids=TRIED_BY_TRANSFORMERS)
def test_what_transformers_knows_is_suggested_and_works(make, word, tmp_path, capsys):
    pytest.importorskip("transformers")
    commands = suggestions(make(tmp_path / "model"), capsys)
    assert word in commands
    check_commands(commands, tmp_path / "out", capsys)


def suggestions(source: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What both commands suggest, by the word that is aimed at."""
    commands = {}
    for command in ("inspect", "doctor"):
        assert run(command, source, "--json") in (0, 1)
        rows = strict_json(capsys.readouterr().out)["suggestions"]
        assert len(rows) <= MOST
        commands |= {row["command"].rpartition(" --to ")[2].split()[0]: row["command"] for row in rows}
    return commands


def check_commands(commands: dict[str, str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Carries suggestions out as they are; what they print is what the result is compared by."""
    folder.mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        for command in commands.values():
            program, *words = shlex.split(command.replace(SIDECARS, shlex.join(["--sidecars-from", str(folder.parent / DIRECTORY)])))
            assert program == "streamconv"
            assert run(*words) == 0, (command, capsys.readouterr().err)
            first, *rest = shlex.split(capsys.readouterr().out.splitlines()[0])
            assert (first, rest[:2], rest[3]) == ("=", ["streamconv", "convert"], words[2])
            compared = re.sub(r" --(format \S+|single-file)", "", shlex.join(["verify", *rest[2:]]))
            hollow = "mixtral-hf2original" in rest  # of so few tensors some of its eight files have none
            assert hollow or run(*shlex.split(compared), "--quiet") == 0, compared


@pytest.mark.parametrize(("make", "word"), [(adapter, "merged"), (pipeline, "bf16")])
def test_inspect_knows_what_has_no_config_of_its_own(make, word, tmp_path, capsys):
    assert run("inspect", make(tmp_path / "model")) == 0
    assert f" --to {word}  # " in capsys.readouterr().out


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_suggested_works(kind, tmp_path, capsys):
    make, words = KINDS[kind]
    commands = suggestions(make(tmp_path / "model"), capsys)
    assert set(words) <= set(commands)
    check_commands(commands, tmp_path / "out", capsys)


@pytest.mark.sampled(31)
@pytest.mark.parametrize("name", golden_plans.families())
def test_what_is_suggested_works_for_every_family(name, tmp_path, capsys):
    check_commands(suggestions(golden_plans.families()[name].write(tmp_path / "model"), capsys), tmp_path / "out", capsys)
