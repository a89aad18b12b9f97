"""What options make of a conversion, what a plan says of it, and what comparing its result says."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors
import torch
from checkpoint_files import assert_same, failure, read, refusal, run, write
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save, save_file
from safetensors_files import PT, container, make, tensor
from small_source import CONFIG, INDEX, SIDECARS, change, document, tensors, tree

import streamconv
from streamconv.dtypes import DTYPES
from streamconv.engine.check import OutputCheck
from streamconv.planning.plan import Plan
from streamconv.running import filling, results

# Options -----------------------------------------------------------------------------------------------------------


def test_underscores_are_dashes_in_options(source, tmp_path, capsys):
    underscored = ["--max_shard_size", "1KB", "--read_backend=pread", "--no_progress", "--keep_dtype", "norm.*", "--dtype=fp32"]
    dashed = [option.replace("_", "-") if option.startswith("--") else option for option in underscored]
    assert run("convert", source, tmp_path / "a", *underscored, "--quiet") == 0
    assert run("convert", source, tmp_path / "b", *dashed, "--quiet") == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert "a_b" in failure(capsys, 2, "convert", source, tmp_path / "c", "--set", "a_b=1")


@pytest.mark.parametrize("spelling", ["bfloat16", "bf16", "BF16", "torch.bfloat16"])
def test_dtype_casts_floating_tensors_and_the_config(source, tmp_path, spelling):
    assert run("convert", source, tmp_path / "dst", "--dtype", spelling, "--quiet") == 0
    assert_same(read(tmp_path / "dst"), {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors().items()})
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config == {
        "architectures": ["Tiny"],
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "deeper": {"torch_dtype": "bfloat16"}},
        "vision_config": {"dtype": "bfloat16"},
        "other": [1, "float32"],
    }
    assert list(config) == list(CONFIG)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (["layers.*"], {"layers.0.w", "layers.1.w"}),
        (["layers.{i}.w"], {"layers.0.w", "layers.1.w"}),
        (["norm.weight", "layers.1.{rest*}"], {"norm.weight", "layers.1.w"}),
        (["*.weight"], {"embed.weight", "norm.weight", "head.weight"}),
    ],
)
def test_keep_dtype_takes_globs_and_name_patterns(source, tmp_path, keep, kept):
    options = [part for pattern in keep for part in ("--keep-dtype", pattern)]
    assert run("convert", source, tmp_path / "dst", "--dtype", "fp16", *options, "--quiet") == 0
    expected = {name: t.half() if t.is_floating_point() and name not in kept else t for name, t in tensors().items()}
    assert_same(read(tmp_path / "dst"), expected)
    assert run("verify", source, tmp_path / "dst", "--dtype", "fp16", *options, "--quiet") == 0


def test_shards_are_those_of_huggingface_hub(source, tmp_path):
    for size in (100, 1000, 1600, 2112, "3KB", "4KB", "5KB", "1KiB", "5GB"):
        shutil.rmtree(tmp_path / "dst", ignore_errors=True)
        assert run("convert", source, tmp_path / "dst", "--max-shard-size", size, "--quiet") == 0
        number = int(size[:-3]) * 1024 if str(size).endswith("KiB") else size
        theirs = split_torch_state_dict_into_shards(
            {name: read(source)[name] for name in streamconv.open(source)},
            max_shard_size=number,
            filename_pattern="model{suffix}.safetensors",
        )
        assert {path.name for path in (tmp_path / "dst").glob("*.safetensors")} == set(theirs.filename_to_tensors)
        for file, names in theirs.filename_to_tensors.items():
            assert (tmp_path / "dst" / file).read_bytes() == save({name: tensors()[name] for name in names}, PT)
        assert (tmp_path / "dst" / INDEX).exists() == theirs.is_sharded
        if theirs.is_sharded:
            index = json.loads((tmp_path / "dst" / INDEX).read_text())
            assert index["weight_map"] == theirs.tensor_to_filename
            assert index["metadata"]["total_size"] == theirs.metadata["total_size"]
            assert index["metadata"]["total_parameters"] == sum(t.numel() for t in tensors().values())


def test_single_file_and_a_file_as_destination(source, tmp_path, capsys):
    assert run("convert", source, tmp_path / "dst", "--single-file", "--max-shard-size", "1KB", "--quiet") == 0
    assert [path.name for path in (tmp_path / "dst").glob("*.safetensors*")] == ["model.safetensors"]
    single = (tmp_path / "dst" / "model.safetensors").read_bytes()
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "model.safetensors").write_bytes(b"another")
    file = tmp_path / "files" / "mine.safetensors"
    assert run("convert", source, file, "--max-shard-size", "1KB") == 0
    assert str(file.parent) in capsys.readouterr().out
    assert tree(tmp_path / "files") == {"mine.safetensors": single, "model.safetensors": b"another"}
    assert "already exists" in refusal(capsys, "convert", source, file)
    assert run("convert", file, tmp_path / "files" / "again.safetensors", "--quiet", "--verify") == 0
    assert (tmp_path / "files" / "again.safetensors").read_bytes() == single
    assert run("convert", source, file, "--overwrite", "--dtype", "fp16", "--quiet") == 0
    assert_same(read(file), {name: t.half() if t.is_floating_point() else t for name, t in tensors().items()})
    assert (tmp_path / "files" / "model.safetensors").read_bytes() == b"another"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_destination_file_called_model_safetensors_is_one_file_too(source, tmp_path, overwrite):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"another")
    assert run("convert", source, folder / "model.safetensors", *(["--overwrite"] if overwrite else [])) == 0
    assert sorted(tree(folder)) == ["model.safetensors", "pytorch_model.bin"]


def test_other_files_are_copied_as_they_are(source, tmp_path):
    (source / "config.json").write_bytes(b'{"torch_dtype":\t"float32" }\r\n')
    for junk in ("pytorch_model.bin", "model.gguf", "old.safetensors.partial", ".streamconv.json", "assets/weights.safetensors"):
        (source / junk).write_bytes(b"weights")
    (source / ".cache" / "huggingface").mkdir(parents=True)
    (source / ".cache" / "huggingface" / "lock").write_bytes(b"")
    (source / "1_Pooling" / "model.safetensors").write_bytes(save({"w": make(torch.float32, 2)}, {"format": "pt"}))
    (source / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    assert run("convert", source, tmp_path / "dst", "--quiet", "--verify") == 0
    found = tree(tmp_path / "dst")
    expected = {**SIDECARS, **{name: (source / name).read_bytes() for name in ("config.json", "modules.json")}}
    expected["1_Pooling/model.safetensors"] = (source / "1_Pooling" / "model.safetensors").read_bytes()
    assert {name: data for name, data in found.items() if data is not None and name != "model.safetensors"} == expected


def test_sidecars_from_another_directory(source, tmp_path):
    model = tmp_path / "reference"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text('{"dtype": "float32"}')
    (model / "sub" / "tokenizer.model").write_bytes(b"\0\1")
    (model / "model.safetensors").write_bytes(b"stays")
    assert run("convert", source, tmp_path / "dst", "--sidecars-from", model, "--dtype", "bf16", "--quiet") == 0
    found = tree(tmp_path / "dst")
    assert json.loads(found.pop("config.json")) == {"dtype": "bfloat16"}
    assert found.pop("sub/tokenizer.model") == b"\0\1"
    assert found.keys() == {"sub", "model.safetensors"}


@pytest.mark.parametrize(
    ("stated", "written"),
    [
        ({"dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}, {"dtype": "float16", "text_config": {"dtype": "float16"}}),
        ({"torch_dtype": "torch.bfloat16"}, {"torch_dtype": "float16"}),
        ({"dtype": "float32"}, None),  # as a norm has it
        ({"dtype": "auto"}, None),
        ({"hidden_size": 3}, None),
    ],
)
def test_a_config_from_elsewhere_says_the_dtype_that_the_tensors_have(stated, written, tmp_path, capsys):
    src = write(tmp_path / "src", {"w": torch.ones(64, 8, dtype=torch.float16), "norm": torch.ones(8)})
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(stated))
    assert run("convert", src, tmp_path / "dst", "--sidecars-from", other) == 0
    note = "note: config.json says dtype float16, as the tensors have it, and not what the one of "
    assert (note in capsys.readouterr().out) == (written is not None)
    assert json.loads((tmp_path / "dst" / "config.json").read_text()) == (written or stated)


def test_every_type_is_resharded_byte_for_byte(tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    types = [getattr(torch, name) for name in DTYPES if not name.startswith(("float6", "float4"))]
    values = {f"{i}.{str(dtype)[6:]}": make(dtype, 3, 4) for i, dtype in enumerate(types)}
    values |= {"f4": make(torch.float4_e2m1fn_x2, 2, 3), "nan": torch.tensor([0x7FA00001, -1], dtype=torch.int32).view(torch.float32)}
    values |= {f"scalar.{i}": make(dtype) for i, dtype in enumerate(types)} | {
        f"empty.{i}": make(dtype, 2, 0) for i, dtype in enumerate(types)
    }
    metadata = {"format": "pt", "licence": "é", "z": ""}
    save_file(values, folder / "x-1.safetensors", metadata=metadata)
    six = {"f6": tensor(0, 3, "F6_E2M3", [4]), "f6b": tensor(3, 6, "F6_E3M2", [2, 2])}
    (folder / "x-2.safetensors").write_bytes(container(six, bytes(range(6))))

    def contents(path: Path):
        found = {}
        for file in path.glob("*.safetensors"):
            for name, info in safetensors.deserialize(file.read_bytes()):
                assert name not in found
                found[name] = (info["dtype"], info["shape"], bytes(info["data"]))
        return found

    for options in (["--max-shard-size", "30"], ["--max-shard-size", "1KB"], ["--dtype", "fp32"], []):
        shutil.rmtree(tmp_path / "dst", ignore_errors=True)
        assert run("convert", folder, tmp_path / "dst", *options, "--verify", "--quiet") == 0
        found, wanted = contents(tmp_path / "dst"), contents(folder)
        if "--dtype" in options:
            cast = {name for name, (dtype, _, _) in wanted.items() if dtype in {"F64", "F16", "BF16"}}
            assert {found.pop(name)[0] for name in cast} == {"F32"}
            wanted = {name: value for name, value in wanted.items() if name not in cast}
        assert found == wanted
        header = next((tmp_path / "dst").glob("*.safetensors")).read_bytes()
        assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == metadata
    (folder / "x-2.safetensors").unlink()
    assert run("convert", folder, tmp_path / "one.safetensors", "--quiet") == 0
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == metadata
    assert len((tmp_path / "one.safetensors").read_bytes()) == (folder / "x-1.safetensors").stat().st_size


def test_a_checkpoint_without_tensors(tmp_path):
    (tmp_path / "src").mkdir()
    save_file({}, tmp_path / "src" / "model.safetensors", metadata=PT)
    assert run("convert", tmp_path / "src", tmp_path / "dst", "--quiet", "--verify") == 0
    assert tree(tmp_path / "dst") == tree(tmp_path / "src")
    assert run("inspect", tmp_path / "dst", "--json") == 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize("backend", ["auto", "mmap", "pread"])
@pytest.mark.parametrize("workers", [1, 3])
def test_backends_and_workers_do_not_change_bytes(source, tmp_path, backend, workers):
    options = ["--max-shard-size", "1KB", "--quiet", "--verify"]
    for name, more in {"plain": [], "cast": ["--dtype", "bf16"]}.items():
        assert run("convert", source, tmp_path / name, *options, *more) == 0
        other = tmp_path / f"{name}2"
        assert run("convert", source, other, *options, *more, "--read-backend", backend, "-j", workers) == 0
        assert tree(tmp_path / name) == tree(other)


# Comparing and checking --------------------------------------------------------------------------------------------


def test_compare_prints_figures_and_does_not_fail(source, tmp_path, capsys):
    other = tensors()
    other["norm.weight"][0] += 2
    write(tmp_path / "other", other)
    assert run("convert", source, tmp_path / "a", "--compare", tmp_path / "other") == 0
    out = capsys.readouterr().out
    assert f"compared with {tmp_path / 'other'}: 6 tensors compared: different" in out
    assert "differs: norm.weight  l2 2  max 2" in out
    found = document(capsys, "convert", source, tmp_path / "b", "--compare", source)
    assert found["comparison"]["equal"] is True
    found = document(capsys, "convert", source, tmp_path / "one.safetensors", "--compare", tmp_path / "other")
    assert found["comparison"]["l2"] == pytest.approx(2)


@pytest.mark.parametrize("options", [[], ["--dtype", "bf16"]])
@pytest.mark.parametrize("file", ["model-00003-*", "config.json", INDEX])
def test_a_damaged_output_is_noticed(source, tmp_path, options, file):
    plan = tmp_path / "plan.json"
    assert run("plan", source, tmp_path / "dst", "--max-shard-size", "1KB", *options, "--out", plan, "--quiet") == 0
    assert run("run", plan, "--quiet", "--verify") == 0
    made = Plan.from_json(plan.read_text())
    assert OutputCheck(made).run() is None
    (path,) = (tmp_path / "dst").glob(file)
    good = path.read_bytes()
    for position in (0, len(good) // 2, len(good) - 1):
        damaged = bytearray(good)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert OutputCheck(made).run() == path.name
    path.write_bytes(good)
    assert OutputCheck(made).run() is None


def test_verify_fails_where_the_disk_lies(source, tmp_path, capsys, monkeypatch):
    class Lying(filling.LocalEngine):
        def run(self) -> None:
            super().run()
            with (tmp_path / "dst" / "model.safetensors").open("r+b") as file:
                file.seek(-2, os.SEEK_END)
                file.write(b"??")

    monkeypatch.setattr("streamconv.running.lock.LocalEngine", Lying)
    assert run("convert", source, tmp_path / "dst", "--quiet") == 0
    message = failure(capsys, 3, "convert", source, tmp_path / "dst", "--overwrite", "--verify", "--quiet")
    assert "model.safetensors does not hold what was written" in message


# Plans in files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--dtype", "fp16", "--keep-dtype", "norm.*"], ["--max-shard-size", "1KB", "-j", "2"]])
def test_a_plan_from_a_file_does_the_same(source, tmp_path, capsys, options):
    assert run("plan", source, tmp_path / "a", "--out", tmp_path / "plan.json", *options) == 0
    assert str(tmp_path / "a") in capsys.readouterr().out
    assert not (tmp_path / "a").exists()
    made = Plan.from_json((tmp_path / "plan.json").read_text())
    assert Plan.from_json(made.to_json()).to_json() == made.to_json()
    found = document(capsys, "run", tmp_path / "plan.json", "--verify")
    assert found["verified"] is True
    assert run("convert", source, tmp_path / "b", "--quiet", *options) == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert "not empty" in refusal(capsys, "run", tmp_path / "plan.json")
    assert run("run", tmp_path / "plan.json", "--resume", "--quiet") == 0
    assert run("run", tmp_path / "plan.json", "--overwrite", "--quiet") == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("how", ["truncated", "modified", "gone"])
@pytest.mark.parametrize("file", ["model-00001-of-00003.safetensors", "tokenizer.json"])
def test_a_source_that_changed_after_planning(source, tmp_path, capsys, how, file):
    assert run("plan", source, tmp_path / "dst", "--out", tmp_path / "plan.json", "--quiet") == 0
    change(source / file, how)
    message = failure(capsys, 3, "run", tmp_path / "plan.json")
    assert file in message
    assert "plan again" in message
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("backend", ["pread", "mmap"])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("options", [[], ["--dtype", "bf16"], ["--verify"]])
def test_a_source_that_is_cut_while_it_is_read(source, tmp_path, capsys, monkeypatch, backend, options, kernel):
    class Late(filling.LocalEngine):
        def run(self) -> None:
            change(source / "model-00001-of-00003.safetensors", "truncated")
            super().run()

    class TooLate(OutputCheck):
        def run(self) -> str | None:
            change(source / "model-00001-of-00003.safetensors", "truncated")
            return super().run()

    if "--verify" in options:
        monkeypatch.setattr(results, "OutputCheck", TooLate)
    else:
        monkeypatch.setattr("streamconv.running.lock.LocalEngine", Late)
        monkeypatch.setattr(filling, "check_sources", lambda *_, **__: None)
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range")
    message = failure(capsys, 3, "convert", source, tmp_path / "dst", "--read-backend", backend, *options)
    assert "model-00001-of-00003.safetensors" in message
    assert "plan again" in message
