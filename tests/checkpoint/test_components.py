"""Folders that a list names as components of a model: converted, cast and verified with it, each under the names of its library."""

import json
import shutil

import pytest
import torch
from checkpoint_files import assert_same, numbered, read, refusal, run, write
from safetensors.torch import load_file, save_file

import streamconv

UNET = {"conv.weight": (4, 3), "time.bias": (5,)}
TEXT = {"embed.weight": (6, 2)}
DENSE = {"linear.weight": (3, 4), "linear.bias": (3,)}


def component(folder, shapes, file, **config):
    folder.mkdir(parents=True)
    tensors = numbered(shapes)
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.fixture
def pipeline(tmp_path):
    """As diffusers has them, with what lies beside them in repositories."""
    root = tmp_path / "pipeline"
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30", "safety_checker": [None, None]}
    parts = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer", "scheduler": "DDIMScheduler"}
    component(root / "unet", UNET, "diffusion_pytorch_model.safetensors", _class_name="UNet2DConditionModel")
    component(root / "text_encoder", TEXT, "pytorch_model.bin", model_type="clip_text_model", torch_dtype="float32")
    for name in ("tokenizer/merges.txt", "scheduler/scheduler_config.json", "unet/diffusion_flax_model.msgpack"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    (root / "model_index.json").write_text(json.dumps(index | {name: ["diffusers", value] for name, value in parts.items()}))
    save_file({"everything": torch.ones(3)}, root / "v1-5.safetensors")
    return root


@pytest.fixture
def sentences(tmp_path):
    """As sentence-transformers has them."""
    root = tmp_path / "sentences"
    write(root, numbered(TEXT), config={"model_type": "bert", "dtype": "float32"})
    component(root / "2_Dense", DENSE, "pytorch_model.bin", in_features=4)
    (root / "1_Pooling").mkdir()
    (root / "1_Pooling" / "config.json").write_text("{}")
    (root / "modules.json").write_text(json.dumps([{"idx": k, "path": path} for k, path in enumerate(("", "1_Pooling", "2_Dense"))]))
    return root


def tree(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_pipeline_is_one_checkpoint(pipeline, tmp_path, capsys):
    found = streamconv.open(pipeline)
    assert set(found) == {"unet/conv.weight", "unet/time.bias", "text_encoder/embed.weight"}
    assert run("convert", pipeline, tmp_path / "out", "--dtype", "bf16", "--verify") == 0
    printed = capsys.readouterr().out
    assert "unet/diffusion_flax_model.msgpack (TensorFlow, Keras, Flax or JAX)" in printed
    assert "v1-5.safetensors" in printed
    assert tree(tmp_path / "out") == {
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "text_encoder/config.json",
        "text_encoder/model.safetensors", "tokenizer/merges.txt", "scheduler/scheduler_config.json",
    }  # fmt: skip
    made = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert_same(made, {name: tensor.bfloat16() for name, tensor in numbered(UNET).items()})
    assert json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (tmp_path / "out" / "unet" / "config.json").read_bytes() == (pipeline / "unet" / "config.json").read_bytes()


def test_its_components_are_sharded_each_with_its_index(pipeline, tmp_path):
    assert run("convert", pipeline, tmp_path / "out", "--max-shard-size", "48", "--quiet") == 0
    names = {name for name in tree(tmp_path / "out") if name.startswith("unet/")}
    shards = {f"unet/diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)}
    assert names == {*shards, "unet/diffusion_pytorch_model.safetensors.index.json", "unet/config.json"}
    index = json.loads((tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(UNET)
    assert run("verify", pipeline, tmp_path / "out") == 0
    assert run("convert", tmp_path / "out", tmp_path / "torch", "--format", "torch", "--quiet") == 0
    assert {"unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"} < tree(tmp_path / "torch")
    assert run("verify", pipeline, tmp_path / "torch") == 0


def test_overwriting_leaves_no_older_form_of_a_component(pipeline, tmp_path):
    old = tmp_path / "out" / "unet" / "diffusion_pytorch_model.bin"
    other = tmp_path / "out" / "mine" / "model.safetensors"
    for path in (old, other):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"old")
    assert run("convert", pipeline, tmp_path / "out", "--overwrite", "--quiet") == 0
    assert not old.exists()
    assert other.exists()


def test_one_file_or_a_recipe_takes_one_component(pipeline, tmp_path, capsys):
    for extra in ([tmp_path / "x.safetensors"], [tmp_path / "x", "--recipe", "llama-hf2meta"]):
        assert "give one of them as SRC" in refusal(capsys, "convert", pipeline, *extra)
    assert run("convert", pipeline / "unet", tmp_path / "unet", "--quiet") == 0
    assert tree(tmp_path / "unet") == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_modules_go_with_their_model(sentences, tmp_path, capsys):
    assert run("convert", sentences, tmp_path / "out", "--dtype", "fp16", "--quiet") == 0
    assert tree(tmp_path / "out") == {
        "model.safetensors", "config.json", "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
    }  # fmt: skip
    assert_same(load_file(tmp_path / "out" / "2_Dense" / "model.safetensors"), {k: v.half() for k, v in numbered(DENSE).items()})
    assert run("verify", sentences, tmp_path / "out", "--dtype", "fp16") == 0
    zeros = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in DENSE.items()}
    save_file(zeros, tmp_path / "out" / "2_Dense" / "model.safetensors")
    capsys.readouterr()
    assert run("verify", sentences, tmp_path / "out", "--dtype", "fp16") == 1
    assert "differs: 2_Dense/linear.weight" in capsys.readouterr().out
    assert run("convert", sentences, tmp_path / "one.safetensors") == 0
    assert "2_Dense: left behind, as DST is one file" in capsys.readouterr().out
    assert set(read(tmp_path / "one.safetensors")) == set(TEXT)


def test_a_recipe_is_for_the_model_and_modules_come_along(sentences, tmp_path):
    recipe = {"name": "mine", "rules": [{"rule": "embed.weight", "right": "wte.weight"}]}
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    assert run("convert", sentences, tmp_path / "out", "--recipe", tmp_path / "mine.json", "--quiet") == 0
    assert set(streamconv.open(tmp_path / "out")) == {"wte.weight", "2_Dense/linear.weight", "2_Dense/linear.bias"}
    assert run("verify", sentences, tmp_path / "out", "--recipe", tmp_path / "mine.json") == 0


def test_modules_among_which_one_chooses_lie_deeper(tmp_path):
    root = tmp_path / "router"
    for way in ("query", "document"):
        component(root / "0_Router" / f"{way}_0_Transformer", TEXT, "model.safetensors")
    (root / "modules.json").write_text('[{"path": "0_Router"}]')
    (root / "0_Router" / "router_config.json").write_text('{"types": {"query_0_Transformer": "a", "document_0_Transformer": "b"}}')
    names = {"0_Router/query_0_Transformer/embed.weight", "0_Router/document_0_Transformer/embed.weight"}
    assert set(streamconv.open(root)) == names
    assert run("convert", root, tmp_path / "out", "--quiet") == 0
    assert set(streamconv.open(tmp_path / "out")) == names


def test_doctor_and_inspect_see_components(sentences, capsys):
    assert run("doctor", sentences) in (0, 1)
    assert "4 tensors" not in capsys.readouterr().out.replace("3 tensors", "")
    data = (sentences / "2_Dense" / "pytorch_model.bin").read_bytes()
    (sentences / "2_Dense" / "pytorch_model.bin").write_bytes(data[:-100])
    (sentences / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9\n")
    assert run("doctor", sentences) == 1
    printed = capsys.readouterr().out
    assert "problem: 2_Dense: pytorch_model.bin" in printed
    assert "problem: tokenizer.json: it is a Git LFS pointer" in printed


@pytest.mark.parametrize(
    "text", ["[", "{}", "[1]", '[{"path": 3}]', '[{"path": "../other"}]', '[{"path": "/etc"}]', "[" * 9999, '[{"path": "a\\u0000"}]']
)
def test_a_list_that_cannot_be_right_is_refused(text, sentences, tmp_path, capsys):
    (sentences / "modules.json").write_text(text)
    if text == "{}":  # names nothing
        assert run("inspect", sentences) == 0
        return
    message = refusal(capsys, "convert", sentences, tmp_path / "out")
    assert "modules.json: " in message
    assert message.endswith("mend it")


def test_what_is_copied_is_listed_and_what_is_odd_is_said(sentences, tmp_path, capsys):
    (sentences / "thing.dat").touch()
    with (sentences / "thing.dat").open("r+b") as file:
        file.truncate(20_000_000)
    shutil.copy(sentences / "thing.dat", sentences / "tokenizer.json")
    (sentences / "vocab.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9\n")
    for step in (500, 1000):
        component(sentences / f"checkpoint-{step}", TEXT, "model.safetensors")
    component(sentences / "best", TEXT, "model.safetensors")
    assert run("plan", sentences, tmp_path / "out", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sidecars"] == [
        "1_Pooling/config.json", "2_Dense/config.json", "config.json", "modules.json", "thing.dat", "tokenizer.json", "vocab.txt",
    ]  # fmt: skip
    notes = "\n".join(found["notes"])
    assert "checkpoint-1000, checkpoint-500 (other checkpoints); best (models in folders that nothing names as components)" in notes
    assert "copied as they are, though nothing says what they are: thing.dat (20" in notes
    assert "vocab.txt: Git LFS pointers" in notes
    assert run("plan", sentences, tmp_path / "out") == 0
    assert "sidecars 1_Pooling/config.json, 2_Dense/config.json, config.json" in capsys.readouterr().out


@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_modules_whose_library_reads_no_shards_are_one_file(sentences, tmp_path, capsys, container):
    """sentence-transformers looks for one file of each of its own modules; the model in front is transformers'."""
    (sentences / "0_Text").mkdir()
    save_file(numbered({"a": (6, 2), "b": (6, 2)}), sentences / "0_Text" / "model.safetensors", {"format": "pt"})
    (sentences / "0_Text" / "config.json").write_text('{"model_type": "bert"}')
    modules = json.loads((sentences / "modules.json").read_text())
    (sentences / "modules.json").write_text(json.dumps([*modules, {"idx": 3, "path": "0_Text"}]))
    assert run("convert", sentences, tmp_path / "out", "--format", container, "--max-shard-size", "50", "--verify") == 0
    name, suffix = {"safetensors": ("model", ".safetensors"), "torch": ("pytorch_model", ".bin")}[container]
    found = tree(tmp_path / "out")
    assert {file for file in found if file.startswith("2_Dense/")} == {"2_Dense/config.json", f"2_Dense/{name}{suffix}"}
    assert {f"0_Text/{name}-0000{k}-of-00002{suffix}" for k in (1, 2)} < found
    assert f"note: 2_Dense/{name}{suffix}: one file, though larger than 50 B" in capsys.readouterr().out
