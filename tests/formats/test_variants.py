"""Variants of weights, and the names of files: what is written is called as what was read, so that the same library finds it."""

import json

import pytest
import torch
from checkpoint_files import assert_same, numbered, refusal, run, write
from safetensors.torch import load_file, save_file

import streamconv
from streamconv.formats import safetensors
from streamconv.formats.variants import modern, variant_of

SHAPES = {"a.weight": (4, 3), "b.weight": (5,)}
PLAIN = numbered(SHAPES)
HALF = {name: tensor.half() for name, tensor in PLAIN.items()}


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def put(folder, **files):
    """Files of tensors; in their names, ``__`` is a dot and ``_s`` a safetensors file's suffix, ``_b`` a pickle's."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        stem, kind = name[:-2].replace("__", "."), name[-1]
        if kind == "s":
            save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
        else:
            torch.save(tensors, folder / f"{stem}.bin")
    return folder


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", None),
        ("model-00001-of-00002.safetensors", None),
        ("model.safetensors.index.json", None),
        ("model.fp16.safetensors", "fp16"),
        ("model.fp16-00001-of-00002.safetensors", "fp16"),
        ("model.safetensors.index.fp16.json", "fp16"),
        ("diffusion_pytorch_model.non_ema.safetensors", "non_ema"),
        ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.safetensors.fp16.index.json", "fp16"),
        ("consolidated.00.safetensors", None),
        ("my.model.safetensors", None),
        ("flux1-dev.fp8.safetensors", None),
    ],
)
def test_names_say_the_variant(name, variant):
    assert variant_of(name, safetensors.KIND) == variant
    assert variant_of(modern(name, safetensors.KIND), safetensors.KIND) == variant


def test_weights_that_are_of_no_variant_come_first(tmp_path, capsys):
    source = put(tmp_path / "in", model_s=PLAIN, model__fp16_s=HALF, model__bf16_s=HALF)
    assert run("convert", source, tmp_path / "plain", "--verify") == 0
    assert "model.safetensors is read; not read: model.bf16.safetensors, model.fp16.safetensors" in capsys.readouterr().out
    assert names_in(tmp_path / "plain") == ["model.safetensors"]
    assert_same(load_file(tmp_path / "plain" / "model.safetensors"), PLAIN)
    assert run("convert", source, tmp_path / "half", "--variant", "fp16", "--quiet") == 0
    assert names_in(tmp_path / "half") == ["model.fp16.safetensors"]
    assert run("verify", source, tmp_path / "half", "--variant", "fp16") == 0
    assert run("verify", source, tmp_path / "half") == 1
    assert streamconv.open(source, variant="fp16")["a.weight"].dtype == "float16"
    assert streamconv.doctor(source, variant="fp16").dtypes == {"float16": 2}
    assert streamconv.doctor(source).dtypes == {"float32": 2}
    assert "it is in" not in str(streamconv.doctor(source))


def test_a_pickle_comes_before_a_variant_of_another_container(tmp_path):
    source = put(tmp_path / "in", pytorch_model_b=PLAIN, model__fp16_s=HALF)
    assert streamconv.open(source).format == "torch"
    assert streamconv.open(source, variant="fp16").format == "safetensors"
    other = put(tmp_path / "other", model_s=PLAIN, pytorch_model__fp16_b=HALF)
    assert run("convert", other, tmp_path / "out", "--variant", "fp16", "--quiet") == 0
    assert names_in(tmp_path / "out") == ["model.fp16.safetensors"]


def test_shards_of_a_variant_have_an_index_of_theirs(tmp_path):
    source = put(tmp_path / "in", model__fp16_s=HALF, model_s=PLAIN)
    assert run("convert", source, tmp_path / "out", "--variant", "fp16", "--max-shard-size", "24", "--quiet") == 0
    shards = [f"model.fp16-0000{k}-of-00002.safetensors" for k in (1, 2)]
    assert names_in(tmp_path / "out") == [*shards, "model.safetensors.index.fp16.json"]
    for options, file in (([], "model.fp16.safetensors"), (["--format", "torch"], "pytorch_model.fp16.bin")):
        folder = tmp_path / f"again{len(options)}"
        assert run("convert", tmp_path / "out", folder, "--variant", "fp16", *options, "--quiet") == 0
        assert names_in(folder) == [file]
        assert run("verify", source, folder, "--variant", "fp16") == 0


def test_shards_as_diffusers_once_called_them(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    shards = {name: f"diffusion_pytorch_model-0000{k}-of-00002.fp16.safetensors" for k, name in enumerate(HALF, 1)}
    for name, file in shards.items():
        save_file({name: HALF[name]}, folder / file)
    (folder / "diffusion_pytorch_model.safetensors.fp16.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert run("convert", folder, tmp_path / "out", "--variant", "fp16", "--quiet") == 0
    assert names_in(tmp_path / "out") == ["diffusion_pytorch_model.fp16.safetensors"]


def test_where_only_variants_are_there(tmp_path, capsys):
    source = put(tmp_path / "in", model__fp16_s=HALF)
    assert run("convert", source, tmp_path / "out") == 0
    assert "only the variant fp16 of the weights is there: it is read" in capsys.readouterr().out
    assert names_in(tmp_path / "out") == ["model.safetensors"]
    put(source, model__bf16_s=HALF)
    assert "only variants of the weights are there, bf16, fp16" in refusal(capsys, "convert", source, tmp_path / "x")


@pytest.mark.parametrize("variant", ["fp8", "../x", "", "a.b"])
def test_a_variant_that_is_not_there_is_refused(variant, tmp_path, capsys):
    source = put(tmp_path / "in", model_s=PLAIN, model__fp16_s=HALF)
    assert f"--variant {variant}: " in refusal(capsys, "convert", source, tmp_path / "out", f"--variant={variant}")


def test_components_without_the_variant_give_what_they_have(tmp_path):
    root = tmp_path / "in"
    put(root / "unet", diffusion_pytorch_model_s=PLAIN, diffusion_pytorch_model__fp16_s=HALF)
    put(root / "vae", diffusion_pytorch_model_s=PLAIN)
    (root / "model_index.json").write_text(json.dumps({name: ["diffusers", "X"] for name in ("unet", "vae")}))
    assert run("convert", root, tmp_path / "out", "--variant", "fp16", "--quiet") == 0
    files = ["model_index.json", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    assert names_in(tmp_path / "out") == files


# Stems -----------------------------------------------------------------------------------------------------------------

STEMS = {  # file -> what it is called as safetensors, and as a pickle
    "diffusion_pytorch_model.safetensors": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "diffusion_pytorch_model.bin": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "adapter_model.bin": ("adapter_model.safetensors", "adapter_model.bin"),
    "open_clip_pytorch_model.bin": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "pytorch_lora_weights.safetensors": ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
    "pytorch_model.bin": ("model.safetensors", "pytorch_model.bin"),
    "model.safetensors": ("model.safetensors", "pytorch_model.bin"),
    "consolidated.00.pth": ("model.safetensors", "pytorch_model.bin"),
    "flux1-dev.safetensors": ("flux1-dev.safetensors", "flux1-dev.bin"),
}


@pytest.mark.parametrize("file", STEMS)
def test_files_keep_their_stem(file, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    if file.endswith(".safetensors"):
        save_file(PLAIN, source / file)
    else:
        torch.save(PLAIN, source / file)
    for container, name in zip(("safetensors", "torch"), STEMS[file], strict=True):
        assert run("convert", source, tmp_path / container, "--format", container, "--quiet") == 0
        assert names_in(tmp_path / container) == [name]
        assert run("verify", source, tmp_path / container) == 0


@pytest.mark.parametrize(
    ("config", "content", "stem"),
    [
        ("config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "model"),
        ("config.json", {"_class_name": "UNet2DConditionModel"}, "diffusion_pytorch_model"),
        ("adapter_config.json", {"peft_type": "LORA"}, "adapter_model"),
    ],
)
def test_a_stem_of_people_gives_way_to_the_one_that_the_configs_library_opens(config, content, stem, tmp_path):
    for name in ("mine_s", "mine-00001-of-00001_s"):
        source = put(tmp_path / name, **{name: PLAIN})
        (source / config).write_text(json.dumps(content))
        assert run("convert", source, tmp_path / f"out-{name}", "--quiet") == 0
        assert names_in(tmp_path / f"out-{name}") == [config, f"{stem}.safetensors"]


def test_shards_keep_it_too(tmp_path):
    stem = "diffusion_pytorch_model"
    source = put(tmp_path / "in", diffusion_pytorch_model_s=PLAIN)
    assert run("convert", source, tmp_path / "a", "--max-shard-size", "48", "--quiet") == 0
    shards = [f"{stem}-0000{k}-of-00002" for k in (1, 2)]
    assert names_in(tmp_path / "a") == [*(f"{name}.safetensors" for name in shards), f"{stem}.safetensors.index.json"]
    assert run("convert", tmp_path / "a", tmp_path / "b", "--format", "torch", "--max-shard-size", "48", "--quiet") == 0
    assert names_in(tmp_path / "b") == [*(f"{name}.bin" for name in shards), f"{stem}.bin.index.json"]
    assert run("convert", tmp_path / "b", tmp_path / "c", "--quiet") == 0
    assert names_in(tmp_path / "c") == [f"{stem}.safetensors"]


@pytest.mark.parametrize(("stem", "torchs"), [("adapter_model", "adapter_model"), ("open_clip_model", "open_clip_pytorch_model")])
def test_what_no_library_reads_in_shards_is_one_file(stem, torchs, tmp_path, capsys):
    source = put(tmp_path / "in", **{f"{stem}_s": PLAIN})
    for container, name in (("safetensors", f"{stem}.safetensors"), ("torch", f"{torchs}.bin")):
        assert run("convert", source, tmp_path / container, "--format", container, "--max-shard-size", "48") == 0
        assert names_in(tmp_path / container) == [name]
        assert f"note: {name}: one file, though larger than 48 B" in capsys.readouterr().out


def test_one_file_gives_its_stem_where_a_library_looks_for_it(tmp_path):
    source = put(tmp_path / "in", adapter_model_s=PLAIN, mine_s=PLAIN)
    for name, made in (("adapter_model", "adapter_model"), ("mine", "model")):
        assert run("convert", source / f"{name}.safetensors", tmp_path / name, "--quiet") == 0
        assert names_in(tmp_path / name) == [f"{made}.safetensors"]


def test_an_adapter_beside_a_model_stays_behind_with_its_config(tmp_path, capsys):
    """Whose presence alone has transformers look for the adapter and its base."""
    source = put(tmp_path / "in", model_s=PLAIN, adapter_model_s=HALF)
    for name in ("config.json", "adapter_config.json"):
        (source / name).write_text("{}")
    assert run("convert", source, tmp_path / "out") == 0
    assert names_in(tmp_path / "out") == ["config.json", "model.safetensors"]
    said = capsys.readouterr().out
    assert "not read: adapter_model.safetensors" in said
    assert "adapter_config.json (an adapter that is not read)" in said
    (source / "model.safetensors").unlink()
    assert run("convert", source, tmp_path / "adapter", "--quiet") == 0
    assert names_in(tmp_path / "adapter") == ["adapter_config.json", "adapter_model.safetensors", "config.json"]


def test_other_forms_stay_behind(tmp_path):
    source = put(tmp_path / "in", diffusion_pytorch_model_s=PLAIN, diffusion_pytorch_model_b=HALF, diffusion_pytorch_model__fp16_b=HALF)
    write(source / "other", PLAIN, config={})
    (source / "config.json").write_text("{}")
    assert run("convert", source, tmp_path / "out", "--quiet") == 0
    assert names_in(tmp_path / "out") == ["config.json", "diffusion_pytorch_model.safetensors"]
