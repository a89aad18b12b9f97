"""The command line: every command, every refusal, and what is left on the disk in each case."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors
import torch
from checkpoint_files import ROOMY, assert_same, failure, numbered, random_tensor, read, refusal, run, write
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save, save_file
from safetensors_files import BAD, PT, container, make, tensor

import streamconv
from streamconv.cli import command as cli
from streamconv.dtypes import DTYPES
from streamconv.engine import io, writers
from streamconv.engine.check import OutputCheck
from streamconv.errors import RunError
from streamconv.planning.plan import Plan
from streamconv.running import local, results
from streamconv.running import run as running
from tools.make_checkpoint import write_shard

CONFIG = {
    "architectures": ["Tiny"],
    "torch_dtype": "float32",
    "text_config": {"dtype": "float32", "deeper": {"torch_dtype": "float32"}},
    "vision_config": {"dtype": None},
    "other": [1, "float32"],
}
SHAPES = {"embed.weight": (50, 8), "layers.0.w": (16, 8), "layers.1.w": (16, 8), "norm.weight": (8,), "head.weight": (50, 8)}
INDEX = "model.safetensors.index.json"
SIDECARS = {
    "tokenizer.json": b'{"a": 1}\r\n',
    "merges.txt": "é \n".encode(),
    "empty.txt": b"",
    "1_Pooling/config.json": b"{}",
    "assets/deep/er/picture.bin": bytes(range(256)),
}


def tensors() -> dict[str, torch.Tensor]:
    return {**numbered(SHAPES), "ids": torch.arange(7)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of three files with an index, a config and other files."""
    folder = write(tmp_path / "src", tensors(), shards=3, config=CONFIG)
    for name, data in SIDECARS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with what it holds: bytes, None for a folder, the target of a link."""
    found: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = os.fsencode(path.readlink()) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
    return found


def strict_json(text: str):
    """The one document that ``text`` is, with nothing that only Python calls JSON."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def document(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0):
    """What a command prints with --json; nothing else may be on stdout, nothing at all on stderr."""
    capsys.readouterr()
    assert run(*arguments, "--json") == code
    out, err = capsys.readouterr()
    assert not err
    return strict_json(out)


def streamconv_process(*arguments: object, **settings) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from streamconv.cli import main; sys.exit(main())", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **settings)


# JSON ------------------------------------------------------------------------------------------------------------


def test_inspect_says_where_every_tensor_lies(source, capsys):
    found = document(capsys, "inspect", source)
    assert set(found) >= {"format", "total_size", "total_parameters", "files", "tensors", "metadata", "sidecars"}
    assert found["format"] == "safetensors"
    assert found["metadata"] == PT
    assert found["sidecars"] == sorted([*SIDECARS, "config.json"])
    assert found["total_size"] == sum(t.nbytes for t in tensors().values())
    assert found["total_parameters"] == sum(t.numel() for t in tensors().values())
    assert {row["path"]: row["size"] for row in found["files"]} == {p.name: p.stat().st_size for p in source.glob("*.safetensors")}
    assert {row["name"] for row in found["tensors"]} == set(tensors())
    for row in found["tensors"]:
        assert set(row) >= {"name", "dtype", "shape", "nbytes", "file", "offset"}
        value = tensors()[row["name"]]
        assert (row["dtype"], row["shape"]) == (str(value.dtype).removeprefix("torch."), list(value.shape))
        content = (source / row["file"]).read_bytes()[row["offset"] : row["offset"] + row["nbytes"]]
        assert content == value.numpy().tobytes()


def test_inspect_of_one_file_and_of_files_in_folders(tmp_path, capsys):
    tensors = {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "f8": make(torch.float8_e4m3fn, 2, 2)}
    write(tmp_path / "sub", tensors)
    found = document(capsys, "inspect", tmp_path / "sub" / "model.safetensors")
    assert [row["path"] for row in found["files"]] == ["model.safetensors"]
    assert found["sidecars"] == []
    assert {row["name"]: (row["dtype"], row["shape"], row["nbytes"]) for row in found["tensors"]} == {
        "scalar": ("float32", [], 4),
        "empty": ("float32", [0, 3], 0),
        "f8": ("float8_e4m3fn", [2, 2], 4),
    }
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "sub/model.safetensors")}))
    found = document(capsys, "inspect", tmp_path)
    assert [row["path"] for row in found["files"]] == ["sub/model.safetensors"]
    assert {row["file"] for row in found["tensors"]} == {"sub/model.safetensors"}


def test_inspect_for_people_has_a_line_for_each_tensor(source, capsys):
    assert run("inspect", source, "--all") == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(tensors()) + 1
    assert "embed.weight  float32[50, 8]  1.6 kB  model-00001-of-00003.safetensors\n" in out


PLAN_KEYS = {"peak_memory", "bytes_read", "bytes_copied", "bytes_computed", "bytes_written", "disk_needed"}


def test_plan_says_what_convert_does_and_writes_nothing(source, tmp_path, capsys):
    before = tree(tmp_path)
    arguments = (source, tmp_path / "dst", "--max-shard-size", "2KB", "--dtype", "bf16", "--keep-dtype", "norm.*")
    planned = document(capsys, "plan", *arguments)
    assert tree(tmp_path) == before
    assert set(planned) >= {*PLAN_KEYS, "outputs", "mapping", "dropped"}
    assert planned["dropped"] == []
    assert [row["target"] for row in planned["mapping"]] == [row["name"] for row in document(capsys, "inspect", source)["tensors"]]
    for row in planned["mapping"]:
        value = tensors()[row["target"]]
        kept = row["target"] in {"norm.weight", "ids"}
        dtype = str(value.dtype).removeprefix("torch.") if kept else "bfloat16"
        assert row == {"target": row["target"], "sources": [row["target"]], "layout": "", "dtype": dtype, "shape": list(value.shape)}
    done = document(capsys, "convert", *arguments)
    assert set(done) >= {*PLAN_KEYS, "seconds", "peak_rss", "peak_anonymous", "outputs", "verified"}
    assert {key: done[key] for key in PLAN_KEYS - {"peak_memory"}} == {key: planned[key] for key in PLAN_KEYS - {"peak_memory"}}
    assert done["outputs"] == planned["outputs"]
    assert done["verified"] is None
    found = {path: len(data) for path, data in tree(tmp_path / "dst").items() if data is not None}
    assert {row["path"]: row["size"] for row in done["outputs"]} == found
    assert done["bytes_written"] == sum(found.values())
    with_tensors = {row["path"]: row["tensors"] for row in done["outputs"] if row["tensors"]}
    assert with_tensors.keys() == {path.name for path in (tmp_path / "dst").glob("*.safetensors")}
    for path, names in with_tensors.items():
        assert sorted(names) == sorted(read(tmp_path / "dst" / path))
    assert isinstance(done["seconds"], float)
    assert 0 < done["peak_anonymous"] <= done["peak_rss"]


def test_totals_count_bytes(source, tmp_path, capsys):
    floats = sum(t.nbytes for name, t in tensors().items() if name != "ids")
    beside = sum(map(len, SIDECARS.values()))
    done = document(capsys, "plan", source, tmp_path / "dst", "--dtype", "float16")
    assert done["bytes_computed"] == floats // 2
    assert done["bytes_copied"] == tensors()["ids"].nbytes + beside
    assert done["bytes_read"] == floats + done["bytes_copied"]
    assert done["disk_needed"] == done["bytes_written"] == sum(row["size"] for row in done["outputs"])


def test_verify_compares(source, tmp_path, capsys):
    found = document(capsys, "verify", source, source)
    assert found == {
        "equal": True,
        "compared": 6,
        "missing": [],
        "unexpected": [],
        "shape_mismatch": [],
        "dtype_mismatch": [],
        "l2": 0.0,
        "l2_per_parameter": 0.0,
        "max_abs": 0.0,
        "nonfinite": 0,
        "tensors": [],
    }
    other = tensors()
    other["embed.weight"][0, 0] += 3
    other["embed.weight"][1, 1] += 4
    other["norm.weight"][:] = torch.tensor([float("nan"), float("inf"), -float("inf"), *other["norm.weight"][3:]])
    other["layers.0.w"] = other["layers.0.w"].bfloat16()
    other["layers.1.w"] = other["layers.1.w"].reshape(8, 16)
    other["new"] = other.pop("head.weight")
    write(tmp_path / "other", other)
    found = document(capsys, "verify", source, tmp_path / "other", code=1)
    half = float((tensors()["layers.0.w"] - other["layers.0.w"].float()).norm())
    assert found["equal"] is False
    assert (found["compared"], found["missing"], found["unexpected"]) == (5, ["head.weight"], ["new"])
    assert (found["shape_mismatch"], found["dtype_mismatch"]) == (["layers.1.w"], ["layers.0.w"])
    assert found["l2"] == pytest.approx(5 + half, rel=1e-5)
    parameters = sum(tensors()[name].numel() for name in ("embed.weight", "layers.0.w", "norm.weight", "ids"))
    assert found["l2_per_parameter"] == pytest.approx(found["l2"] / parameters)
    assert found["max_abs"] == pytest.approx(4)
    assert found["nonfinite"] == 3
    rows = {row["name"]: row for row in found["tensors"]}
    assert rows.keys() == {"embed.weight", "norm.weight", "layers.0.w", "layers.1.w"}
    assert not any(row["equal"] for row in rows.values())
    assert (rows["embed.weight"]["l2"], rows["embed.weight"]["max_abs"]) == (pytest.approx(5), pytest.approx(4))
    assert capsys.readouterr().out == ""
    assert run("verify", source, tmp_path / "other") == 1
    assert "5 tensors compared: different" in capsys.readouterr().out


def test_recipes_are_listed_explained_and_matched(source, capsys):
    found = document(capsys, "recipes")
    assert {row["name"] for row in found} >= {"internvl-hf2custom", "internvl-custom2hf"}
    for row in found:
        assert set(row) >= {"name", "summary", "source_format", "target_format", "options", "reference"}
        assert isinstance(row["options"], list)
    one = document(capsys, "recipes", "internvl-hf2custom")
    assert one["name"] == "internvl-hf2custom"
    assert one["rules"]
    assert run("recipes", "internvl-hf2custom") == 0
    out = capsys.readouterr().out
    for part in (
        "vision_tower.embeddings.cls_token",
        "(g q d) ..., (g d) ..., (g d) ... -> (g (q d + d + d)) ...",
        "--set text",
        "2410d1d",
    ):
        assert part in out
    assert document(capsys, "recipes", "--match", source) == []
    assert run("recipes") == 0
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_recipes_that_match_a_checkpoint(tmp_path, capsys):
    from streamconv.demo import CONFIG as config
    from streamconv.demo import demo_specs

    write_shard(tmp_path / "model.safetensors", {name: ("bfloat16", spec.shape) for name, spec in demo_specs().items()}, sparse=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = document(capsys, "recipes", "--match", tmp_path)
    assert [row["name"] for row in rows if not row["needs"]] == ["internvl-hf2custom"]
    assert rows[0]["name"] == "internvl-hf2custom"


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


@pytest.mark.parametrize("backend", ["auto", "mmap", "pread"])
@pytest.mark.parametrize("workers", [1, 3])
def test_backends_and_workers_do_not_change_bytes(source, tmp_path, backend, workers):
    options = ["--max-shard-size", "1KB", "--quiet", "--verify"]
    for name, more in {"plain": [], "cast": ["--dtype", "bf16"]}.items():
        assert run("convert", source, tmp_path / name, *options, *more) == 0
        other = tmp_path / f"{name}2"
        assert run("convert", source, other, *options, *more, "--read-backend", backend, "-j", workers) == 0
        assert tree(tmp_path / name) == tree(other)


# What is printed ---------------------------------------------------------------------------------------------------


def test_two_lines_for_people_none_when_quiet(source, tmp_path, capsys):
    assert run("convert", source, tmp_path / "a") == 0
    out, err = capsys.readouterr()
    assert not err
    assert out.count("\n") == 2
    assert "6 tensors" in out
    assert "peak memory" in out
    assert "6 copied" in out
    for quiet in ("-q", "--quiet"):
        assert run("convert", source, tmp_path / quiet, quiet, "--verify") == 0
        assert run("plan", source, tmp_path / "none", quiet) == 0
        assert run("verify", source, tmp_path / quiet, quiet) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("options", "shown"), [([], True), (["--no-progress"], False), (["--quiet"], False), (["--json"], True)])
def test_a_bar_on_a_terminal_only(source, tmp_path, options, shown):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 200))
    command = [sys.executable, "-c", "import sys; from streamconv.cli import main; sys.exit(main())", "convert", source, tmp_path / "dst"]
    try:
        done = subprocess.run([*command, "--verify", *options], stdout=subprocess.PIPE, stderr=theirs, timeout=600, check=False)
        os.set_blocking(ours, False)
        with contextlib.suppress(OSError):
            text = b""
            text = os.read(ours, 1 << 16)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0
    assert (b"converting" in text and b"B/s" in text) == shown
    assert shown or not text
    if "--json" in options:
        strict_json(done.stdout.decode())


def test_no_bar_where_stderr_is_no_terminal(source, tmp_path):
    done = streamconv_process("convert", source, tmp_path / "dst", "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert ", verified;" in done.stdout


def test_verbose_adds_the_traceback(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / "none"), "-v"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("streamconv: error: ")


def test_a_closed_pipe_is_no_error(source):
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-c", "import sys; from streamconv.cli import main; sys.exit(main())", "inspect", source]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, timeout=600, check=False)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_path_that_is_no_text(source, tmp_path):
    dst = os.fsencode(tmp_path) + b"/\xff"
    command = [sys.executable, "-c", "import sys; from streamconv.cli import main; sys.exit(main())", "convert", os.fsencode(source), dst]
    for environment in ({"PYTHONIOENCODING": "utf-8"}, {"PYTHONIOENCODING": "ascii"}):
        done = subprocess.run([*command, "--overwrite"], capture_output=True, timeout=600, check=False, env={**os.environ, **environment})
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"6 tensors" in done.stdout


def test_version_and_help(capsys):
    for arguments in (["--version"], ["--help"], ["convert", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"streamconv {streamconv.__version__}\n")


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
    class Lying(local.LocalEngine):
        def run(self) -> None:
            super().run()
            with (tmp_path / "dst" / "model.safetensors").open("r+b") as file:
                file.seek(-2, os.SEEK_END)
                file.write(b"??")

    monkeypatch.setattr(running, "LocalEngine", Lying)
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


def change(path: Path, how: str) -> None:
    if how == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif how == "modified":
        data = path.read_bytes()
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()


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
    class Late(local.LocalEngine):
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
        monkeypatch.setattr(running, "LocalEngine", Late)
        monkeypatch.setattr(local, "check_sources", lambda *_, **__: None)
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range")
    message = failure(capsys, 3, "convert", source, tmp_path / "dst", "--read-backend", backend, *options)
    assert "model-00001-of-00003.safetensors" in message
    assert "plan again" in message


# Overwriting and resuming ------------------------------------------------------------------------------------------


def test_overwrite_removes_old_weights_and_nothing_else(source, tmp_path):
    dst = tmp_path / "dst"
    mine = {
        "README.md": b"mine",
        "sub/notes.txt": b"mine",
        "sub/model.safetensors": b"mine",
        "training_args.bin": b"mine",
        "vocab.txt": b"mine",
    }
    stale = [
        "model.safetensors",
        "model-00001-of-00009.safetensors",
        INDEX,
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "x.safetensors",
    ]
    for name, data in {**mine, **dict.fromkeys(stale, b"stale"), "config.json": b"{}"}.items():
        (dst / name).parent.mkdir(parents=True, exist_ok=True)
        (dst / name).write_bytes(data)
    (dst / "gone.safetensors").symlink_to("nowhere")
    assert run("convert", source, dst, "--overwrite", "--max-shard-size", "3KB", "--quiet") == 0
    assert run("convert", source, tmp_path / "fresh", "--max-shard-size", "3KB", "--quiet") == 0
    found = {name: data for name, data in tree(dst).items() if data is not None}
    assert found == {name: data for name, data in {**mine, **tree(tmp_path / "fresh")}.items() if data is not None}
    assert_same({name: entry.torch() for name, entry in streamconv.open(dst).items()}, tensors())


@pytest.mark.parametrize("shards", [("5GB", "2KB"), ("2KB", "5GB"), ("1KB", "3KB")])
def test_overwrite_of_another_number_of_shards(source, tmp_path, shards):
    for size in shards:
        assert run("convert", source, tmp_path / "dst", "--overwrite", "--max-shard-size", size, "--quiet") == 0
        assert_same({name: entry.torch() for name, entry in streamconv.open(tmp_path / "dst").items()}, tensors())
        assert_same(read(tmp_path / "dst"), tensors())


def test_overwrite_does_not_follow_links(source, tmp_path):
    dst, blobs = tmp_path / "dst", tmp_path / "blobs"
    blobs.mkdir()
    dst.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "model.safetensors.partial", "config.json.partial"):
        (blobs / name).write_bytes(b"precious")
        (dst / name).symlink_to(blobs / name)
    assert run("convert", source, dst, "--overwrite", "--quiet") == 0
    assert set(tree(blobs).values()) == {b"precious"}
    assert not any(path.is_symlink() for path in dst.rglob("*"))
    assert_same(read(dst), tensors())


@pytest.fixture
def snapshot(source, tmp_path) -> Path:
    """The checkpoint as the Hub's cache keeps it: links into blobs."""
    hub = tmp_path / "hub" / "models--a--b"
    folder = hub / "snapshots" / "0123"
    (hub / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        shutil.copy(path, hub / "blobs" / str(number))
        link = folder / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(hub / "blobs" / str(number), link.parent))
    return folder


def test_a_hub_snapshot_is_read_and_never_written_through(source, snapshot, tmp_path, capsys):
    hub = tmp_path / "hub"
    before = tree(hub)
    assert run("convert", source, tmp_path / "plain", "--quiet", "--max-shard-size", "3KB") == 0
    for dst in (tmp_path / "dst", snapshot.parent / "4567"):
        for more in ([], ["--overwrite"]):
            assert run("convert", snapshot, dst, "--quiet", "--max-shard-size", "3KB", *more) == 0
            assert tree(dst) == tree(tmp_path / "plain")
    assert {name: data for name, data in tree(hub).items() if not name.startswith("models--a--b/snapshots/4567")} == before
    for dst in (snapshot, snapshot / "new", snapshot.parent, snapshot.parent.parent / "blobs", hub, snapshot / "x.safetensors"):
        for more in ([], ["--overwrite"], ["--resume"]):
            refusal(capsys, "convert", snapshot, dst, *more)
    (tmp_path / "link").symlink_to(snapshot)
    assert "DST is SRC" in refusal(capsys, "convert", snapshot, tmp_path / "link", "--overwrite")
    assert {name: data for name, data in tree(hub).items() if not name.startswith("models--a--b/snapshots/4567")} == before


class Stop(RunError):
    """Raised on purpose."""


def stop_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Makes the next runs fail at the progress report of this number."""

    @contextlib.contextmanager
    def counting(total, title, *, show):
        left = [calls]

        def tell(nbytes):
            if not left[0]:
                raise Stop("stopped")
            left[0] -= 1

        yield tell

    monkeypatch.setattr(running, "bar", counting)


@pytest.mark.parametrize(
    ("options", "workers"),
    [
        pytest.param(["--max-shard-size", "2KB"], 1, marks=pytest.mark.slow),
        (["--max-shard-size", "2KB"], 3),
        (["--max-shard-size", "2KB", "--dtype", "bf16"], 3),
        (["--single-file"], 1),
    ],
)
def test_a_run_stopped_anywhere_resumes_to_the_same_bytes(source, tmp_path, capsys, monkeypatch, options, workers):
    assert run("convert", source, tmp_path / "whole", *options, "--quiet") == 0
    calls = 0
    while True:
        dst = tmp_path / f"dst{calls}"
        capsys.readouterr()
        with monkeypatch.context() as patch:
            stop_after(patch, calls)
            code = run("convert", source, dst, *options, "-j", workers, "--quiet")
        if code == 0:
            break
        assert code == 3
        assert capsys.readouterr().err == "streamconv: error: stopped\n"
        assert not {"model.safetensors", INDEX} & set(tree(dst)), "committed before it was complete"
        finished = {path.name: path.stat().st_ino for path in dst.glob("model-*.safetensors")}
        assert "--resume" in refusal(capsys, "convert", source, dst, *options)
        with monkeypatch.context() as patch:  # and again
            stop_after(patch, calls)
            assert run("convert", source, dst, *options, "--quiet", "--resume") in {0, 3}
        assert run("convert", source, dst, *options, "--quiet", "--resume") == 0
        assert tree(dst) == tree(tmp_path / "whole")
        assert {name: (dst / name).stat().st_ino for name in finished} == finished, "finished work was done again"
        calls += 1
    assert calls > 10


def test_resume_of_another_conversion_is_refused(source, tmp_path, capsys, monkeypatch):
    dst = tmp_path / "dst"
    stop_after(monkeypatch, 8)
    assert run("convert", source, dst, "--max-shard-size", "2KB", "--quiet") == 3
    monkeypatch.undo()
    before = tree(dst)
    for other in (["--max-shard-size", "3KB"], ["--max-shard-size", "2KB", "--dtype", "bf16"], ["--single-file"]):
        message = refusal(capsys, "convert", source, dst, "--resume", *other)
        assert "another one" in message
        assert "--overwrite" in message
        assert tree(dst) == before
    os.utime(source / "model-00002-of-00003.safetensors", ns=(5, 5))
    assert "another one" in refusal(capsys, "convert", source, dst, "--resume", "--max-shard-size", "2KB")
    assert run("convert", source, dst, "--overwrite", "--max-shard-size", "3KB", "--quiet") == 0
    assert run("convert", source, tmp_path / "whole", "--max-shard-size", "3KB", "--quiet") == 0
    assert tree(dst) == tree(tmp_path / "whole")


def test_resume_with_other_workers_and_memory_goes_on(source, tmp_path, monkeypatch):
    stop_after(monkeypatch, 8)
    assert run("convert", source, tmp_path / "dst", "--max-shard-size", "2KB", "--quiet", "-j", "4") == 3
    monkeypatch.undo()
    again = ["--max-memory", "3GB", "-j", "1", "--read-backend", "mmap", "--resume", "--verify", "--quiet", "--max-shard-size", "2KB"]
    assert cli.main(["convert", str(source), str(tmp_path / "dst"), *again]) == 0
    assert_same(read(tmp_path / "dst"), tensors())


def test_resume_with_a_damaged_log_is_refused(source, tmp_path, capsys, monkeypatch):
    stop_after(monkeypatch, 8)
    assert run("convert", source, tmp_path / "dst", "--quiet") == 3
    monkeypatch.undo()
    log = tmp_path / "dst" / ".streamconv" / "log.jsonl"
    for text in ("", "[]", '{"plan": 1', "null"):
        log.write_text(text)
        assert "--overwrite" in refusal(capsys, "convert", source, tmp_path / "dst", "--resume")


def test_resume_where_nothing_is_to_be_resumed(source, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "draft" / ".streamconv").mkdir(parents=True)
    (tmp_path / "draft" / ".streamconv" / "log.jsonl.new").write_text("{")
    for dst in (tmp_path / "new", tmp_path / "empty", tmp_path / "draft", tmp_path / "one.safetensors"):
        assert run("convert", source, dst, "--resume", "--quiet") == 0
    assert tree(tmp_path / "new") == tree(tmp_path / "empty") == tree(tmp_path / "draft")
    write(tmp_path / "foreign", {"w": random_tensor(3)}, shards=1)
    before = tree(tmp_path / "foreign")
    assert "not empty" in refusal(capsys, "convert", source, tmp_path / "foreign", "--resume")
    assert tree(tmp_path / "foreign") == before


def test_resume_checks_a_finished_destination(source, tmp_path, capsys):
    dst = tmp_path / "dst"
    assert run("convert", source, dst, "--quiet", "--max-shard-size", "3KB") == 0
    before = {path: path.stat().st_mtime_ns for path in dst.rglob("*")}
    found = document(capsys, "convert", source, dst, "--resume", "--max-shard-size", "3KB")
    assert found["verified"] is True
    assert {path: path.stat().st_mtime_ns for path in dst.rglob("*")} == before
    shard = dst / "model-00002-of-00002.safetensors"
    with shard.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"??")
    assert shard.name in refusal(capsys, "convert", source, dst, "--resume", "--max-shard-size", "3KB")
    shard.unlink()
    refusal(capsys, "convert", source, dst, "--resume", "--max-shard-size", "3KB")


SLOW = """
import os, signal, sys, threading
left, go_on = [3], threading.Event()
def interrupt(*given):
    go_on.set()
    signal.default_int_handler(*given)
signal.signal(signal.SIGINT, interrupt)
from streamconv.cli import command as cli
from streamconv.engine import writers
copy = writers.copy_range
def slow(*given):
    copy(*given)
    os.write(1, b"copied\\n")
    left[0] -= 1
    if left[0] <= 0:  # until the signal comes
        go_on.wait(600)
writers.copy_range = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_process_can_go_on(source, tmp_path, number, code):
    dst = tmp_path / "dst"
    options = ["--max-shard-size", "1KB", "-j", "2"]
    command = [sys.executable, "-c", SLOW, "convert", source, dst, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            assert process.stdout.readline() == "copied\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=600)
    assert process.returncode == code
    if code == 130:
        assert err.startswith("streamconv: error: interrupted")
        assert "--resume" in err
        assert err.count("\n") == 1
    assert INDEX not in tree(dst)
    assert run("convert", source, dst, *options, "--resume", "--verify", "--quiet") == 0
    assert run("convert", source, tmp_path / "whole", *options, "--quiet") == 0
    assert tree(dst) == tree(tmp_path / "whole")


@pytest.mark.parametrize("where", ["create", "check", "finish"])
def test_an_interrupt_at_any_step_says_how_to_go_on(source, tmp_path, capsys, monkeypatch, where):
    def interrupt(*_):
        raise KeyboardInterrupt

    if where == "create":
        monkeypatch.setattr(local.LocalEngine, "_create", interrupt)
    elif where == "finish":
        monkeypatch.setattr(local.LocalEngine, "_commit", interrupt)
    else:
        monkeypatch.setattr(OutputCheck, "run", interrupt)
    message = failure(capsys, 130, "convert", source, tmp_path / "dst", "--verify")
    assert "--resume" in message
    monkeypatch.undo()
    assert run("convert", source, tmp_path / "dst", "--resume", "--quiet") == 0
    assert_same(read(tmp_path / "dst"), tensors())


# The disk and the kernel -------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_no_room_on_the_disk(source, tmp_path, capsys, monkeypatch):
    before = tree(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 4096))
    message = refusal(capsys, "convert", source, tmp_path / "a" / "b" / "dst")
    assert "no room on the disk" in message
    assert "4.1 kB are free" in message
    assert tree(tmp_path) == before


def test_what_is_replaced_counts_as_room(source, tmp_path, monkeypatch):
    dst = tmp_path / "dst"
    stop_after(monkeypatch, 12)
    assert run("convert", source, dst, "--max-shard-size", "2KB", "--quiet") == 3
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 3000))
    assert run("convert", source, dst, "--max-shard-size", "2KB", "--quiet", "--resume") == 0
    assert run("convert", source, dst, "--single-file", "--quiet", "--overwrite") == 0


def test_a_disk_that_fills_up_can_be_gone_on_with(source, tmp_path, capsys, monkeypatch):
    real, left = io.copy_range, [2]

    def full(*given):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*given)

    monkeypatch.setattr(writers, "copy_range", full)
    message = failure(capsys, 3, "convert", source, tmp_path / "dst", "--max-shard-size", "2KB")
    assert "no room left" in message
    assert "--resume" in message
    monkeypatch.undo()
    assert run("convert", source, tmp_path / "dst", "--max-shard-size", "2KB", "--resume", "--quiet", "--verify") == 0


@pytest.mark.parametrize("step", ["truncate", "fsync", "pwrite"])
def test_an_error_of_the_disk_is_one_line(source, tmp_path, capsys, monkeypatch, step):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, step, fail)
    message = failure(capsys, 3, "convert", source, tmp_path / "dst", "--dtype", "bf16")
    assert os.strerror(errno.EIO) in message
    monkeypatch.undo()
    assert run("convert", source, tmp_path / "dst", "--dtype", "bf16", "--overwrite", "--quiet") == 0


def raising(number: int):
    def copy(*_):
        raise OSError(number, os.strerror(number))

    return copy


@pytest.mark.parametrize(
    "how", ["absent", "short", *map(errno.errorcode.get, sorted({errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}))]
)
@pytest.mark.parametrize("preadv", [True, False])
def test_kernels_that_copy_otherwise(source, tmp_path, monkeypatch, how, preadv):
    real = os.copy_file_range
    if how == "absent":
        monkeypatch.delattr(os, "copy_file_range")
    elif how == "short":
        monkeypatch.setattr(os, "copy_file_range", lambda a, b, n, *offsets: real(a, b, min(n, 7), *offsets))
    else:
        monkeypatch.setattr(os, "copy_file_range", raising(getattr(errno, how)))
    if not preadv:
        monkeypatch.delattr(os, "preadv")
        monkeypatch.delattr(os, "pwrite")
    assert run("convert", source, tmp_path / "dst", "--quiet", "--max-shard-size", "1KB", "--verify") == 0
    assert_same(read(tmp_path / "dst"), tensors())
    if not preadv:  # whether direct reads can be had is asked once, when the module is loaded
        return
    large = numbered({"a": (700, 501), "odd": (3,), "b": (333, 777)})
    write(tmp_path / "large", {**large, "byte": torch.tensor([True])}, shards=2)
    for backend in ("auto", "mmap"):
        options = ["--max-shard-size", "1MB", "--overwrite", "--verify", "--read-backend", backend]
        assert run("convert", tmp_path / "large", tmp_path / "dst2", *options, "--quiet") == 0
        assert_same(read(tmp_path / "dst2"), read(tmp_path / "large"))


def test_a_kernel_that_copies_nothing_is_done_without(source, tmp_path, monkeypatch):
    """A file system may have no such thing and say so by 0, which is also what there is past a file's end."""
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    assert run("convert", source, tmp_path / "dst", "--quiet", "--verify") == 0
    assert_same(read(tmp_path / "dst"), tensors())


@pytest.mark.parametrize("how", [raising(errno.EIO), raising(errno.ENOSPC)], ids=["EIO", "ENOSPC"])
def test_kernels_that_do_not_copy(source, tmp_path, capsys, monkeypatch, how):
    monkeypatch.setattr(os, "copy_file_range", how)
    assert str(tmp_path) in failure(capsys, 3, "convert", source, tmp_path / "dst")


def test_holes_stay_holes(tmp_path, capsys):
    folder = tmp_path / "src"
    folder.mkdir()
    header = {"a": tensor(0, 1 << 30), "b": tensor(1 << 30, (1 << 30) + 8)}
    path = folder / "model.safetensors"
    path.write_bytes(container(header))
    start = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(start + (1 << 30) + 8)
        for offset in (0, 123_456_789, (1 << 30) - 1):
            file.seek(start + offset)
            file.write(b"!")
        file.write(b"tensor b")
    for name, options in {"two": ["--max-shard-size", "1GiB"], "one": [], "file.safetensors": []}.items():
        done = document(capsys, "convert", folder, tmp_path / name, *options)
        assert done["bytes_written"] > 1 << 30
        assert done["disk_needed"] < 1 << 20
        files = [tmp_path / name] if name.endswith("s") else list((tmp_path / name).glob("*.safetensors"))
        assert sum(file.stat().st_blocks * 512 for file in files) < 1 << 20
        entries = streamconv.open(tmp_path / name)
        assert entries["b"].numpy().tobytes() == b"tensor b"
        for offset in (0, 123_456_789, (1 << 30) - 1):
            assert entries["a"].numpy(rows=slice(offset, offset + 1)).tobytes() == b"!"


# Refusals ----------------------------------------------------------------------------------------------------------

RECIPES = {
    "no.yaml": "{}",
    "text.yaml": "hello",
    "broken.yaml": "rules: [",
    "deep.yaml": "[" * 1000,
    "broken.json": "{",
    "kind.yaml": "rules: [{left: a}]",
    "field.yaml": "rules: [{rule: a, right: b, colour: red}]",
    "pattern.yaml": "rules: [{rule: 'a{', right: b}]",
    "layout.yaml": "rules: [{rule: a, right: b, layout: 'a b -> a'}]",
    "code.yaml": "rules: [{rule: a, right: a}]\nconfig: 'os:system'",
    "tag.yaml": "rules: !!python/object/apply:os.getcwd []",
    "fits.yaml": "rules: [{rule: 'embed.weight', right: 'e'}]",
    "unused.yaml": "rules: [{rule: '{rest*}', right: '{rest*}'}, {rule: 'other.weight', right: 'o'}]",
}
REFUSED = {
    "no command": ([], "required"),
    "unknown command": (["frobnicate"], "frobnicate"),
    "no arguments": (["convert"], "SRC, DST"),
    "one argument": (["convert", "{src}"], "DST"),
    "three arguments": (["convert", "{src}", "{dst}", "more"], "more"),
    "unknown option": (["convert", "{src}", "{dst}", "--colour", "red"], "--colour"),
    "abbreviated option": (["convert", "{src}", "{dst}", "--max-mem", "1GB"], "--max-mem"),
    "SRC missing": (["convert", "{tmp}/none", "{dst}"], "none: no such file"),
    "SRC file missing": (["convert", "{tmp}/none.safetensors", "{dst}"], "no such file"),
    "SRC empty": (["convert", "{tmp}/empty", "{dst}"], "empty"),
    "SRC a URL of no store": (["convert", "gopher://a/b", "{dst}"], "no store of that kind"),
    "SRC name too long": (["convert", "{tmp}/" + "n" * 300, "{dst}"], "too long"),
    "SRC a text": (["convert", "{src}/tokenizer.json", "{dst}"], "tokenizer.json"),
    "inspect missing": (["inspect", "{tmp}/none"], "no such file"),
    "verify missing": (["verify", "{src}", "{tmp}/none"], "no such file"),
    "match missing": (["recipes", "--match", "{tmp}/none"], "no such file"),
    "recipes unknown": (["recipes", "internvl-hf2custm"], "did you mean internvl-hf2custom"),
    "DST is SRC": (["convert", "{src}", "{src}"], "DST is SRC"),
    "DST is SRC by another name": (["convert", "{src}", "{tmp}/x/../src/."], "DST is SRC"),
    "DST is SRC by a link": (["convert", "{src}", "{tmp}/link"], "DST is SRC"),
    "DST is SRC, a file": (["convert", "{src}/model-00001-of-00003.safetensors", "{src}/model-00001-of-00003.safetensors"], "DST is SRC"),
    "DST is SRC, overwrite": (["convert", "{src}", "{src}", "--overwrite"], "DST is SRC"),
    "DST is SRC, resume": (["convert", "{src}", "{src}", "--resume"], "DST is SRC"),
    "DST inside SRC": (["convert", "{src}", "{src}/out"], "DST lies inside SRC"),
    "DST inside SRC by a link": (["convert", "{src}", "{tmp}/link/out/put"], "DST lies inside SRC"),
    "DST a file inside SRC": (["convert", "{src}", "{src}/all.safetensors"], "DST lies inside SRC"),
    "SRC inside DST": (["convert", "{src}", "{tmp}", "--overwrite"], "lies inside DST"),
    "SRC file inside DST": (["convert", "{src}/model-00001-of-00003.safetensors", "{src}", "--overwrite"], "lies inside DST"),
    "DST not empty": (["convert", "{src}", "{tmp}/full"], "not empty"),
    "DST a file": (["convert", "{src}", "{tmp}/file.txt"], ".txt files are not written"),
    "DST a file, overwrite": (["convert", "{src}", "{tmp}/file.txt", "--overwrite"], ".txt files are not written"),
    "DST file exists": (["convert", "{src}", "{tmp}/old.safetensors"], "already exists"),
    "DST file is a dead link": (["convert", "{src}", "{tmp}/dead.safetensors"], "already exists"),
    "DST below a file": (["convert", "{src}", "{tmp}/file.txt/dst"], "not a directory"),
    "DST far below a file": (["convert", "{src}", "{tmp}/file.txt/a/b/dst"], "not a directory"),
    "DST below a dead link": (["convert", "{src}", "{tmp}/dead.safetensors/dst"], "not a directory"),
    "DST a URL": (["convert", "{src}", "s3://bucket/dst"], "s3://bucket/dst"),
    "DST name too long": (["convert", "{src}", "{tmp}/" + "n" * 300], "too long"),
    "DST file name too long": (["convert", "{src}", "{tmp}/" + "n" * 300 + ".safetensors"], "too long"),
    "recipe unknown": (["convert", "{src}", "{dst}", "--recipe", "internvl"], "unknown recipe 'internvl'"),
    "recipe file missing": (["convert", "{src}", "{dst}", "--recipe", "{tmp}/none.yaml"], "none.yaml"),
    "recipe file a directory": (["convert", "{src}", "{dst}", "--recipe", "{tmp}/folder.yaml"], "folder.yaml"),
    "recipe does not fit": (["convert", "{src}", "{dst}", "--recipe", "internvl-hf2custom"], "internvl-hf2custom"),
    "set without =": (["convert", "{src}", "{dst}", "--recipe", "internvl-hf2custom", "--set", "text"], "KEY=VALUE"),
    "set without key": (["convert", "{src}", "{dst}", "--recipe", "internvl-hf2custom", "--set", "=x"], "KEY=VALUE"),
    "set twice": (["convert", "{src}", "{dst}", "--recipe", "internvl-hf2custom", "--set", "text=llama", "--set", "text=llama"], "twice"),
    "set unknown": (["convert", "{src}", "{dst}", "--recipe", "internvl-hf2custom", "--set", "txt=llama"], "it has: text, tied"),
    "set wrong": (["convert", "{src}", "{dst}", "--recipe", "internvl-hf2custom", "--set", "text=gpt"], "llama, internlm2"),
    "set without recipe": (["convert", "{src}", "{dst}", "--set", "a=1"], "no recipe"),
    "dtype nonsense": (["convert", "{src}", "{dst}", "--dtype", "nonsense"], "nonsense"),
    "dtype empty": (["convert", "{src}", "{dst}", "--dtype", ""], "dtype"),
    "dtype not for casts": (["convert", "{src}", "{dst}", "--dtype", "int8"], "--dtype int8"),
    "dtype for storage only": (["convert", "{src}", "{dst}", "--dtype", "float4_e2m1fn"], "float4_e2m1fn"),
    "keep-dtype malformed": (["convert", "{src}", "{dst}", "--dtype", "bf16", "--keep-dtype", "a{"], "a{"),
    "format nonsense": (["convert", "{src}", "{dst}", "--format", "nonsense"], "--format nonsense"),
    "format and suffix": (["convert", "{src}", "{tmp}/x.safetensors", "--format", "nonsense"], "nonsense"),
    "shard size 0": (["convert", "{src}", "{dst}", "--max-shard-size", "0"], "'0'"),
    "shard size 0, one file": (["convert", "{src}", "{dst}", "--max-shard-size", "0", "--single-file"], "'0'"),
    "shard size negative": (["convert", "{src}", "{dst}", "--max-shard-size=-5GB"], "-5GB"),
    "shard size nonsense": (["convert", "{src}", "{dst}", "--max-shard-size", "5 apples"], "5 apples"),
    "shard size infinite": (["convert", "{src}", "{dst}", "--max-shard-size", "inf"], "inf"),
    "memory 0": (["convert", "{src}", "{dst}", "--max-memory", "0"], "'0'"),
    "memory nonsense": (["convert", "{src}", "{dst}", "--max-memory", "much"], "much"),
    "workers 0": (["convert", "{src}", "{dst}", "--workers", "0"], "--workers 0"),
    "workers negative": (["convert", "{src}", "{dst}", "-j", "-1"], "-1"),
    "workers nonsense": (["convert", "{src}", "{dst}", "-j", "many"], "many"),
    "backend": (["convert", "{src}", "{dst}", "--read-backend", "magic"], "magic"),
    "engine": (["convert", "{src}", "{dst}", "--engine", "steam"], "steam"),
    "sidecars missing": (["convert", "{src}", "{dst}", "--sidecars-from", "{tmp}/none"], "none"),
    "sidecars a file": (["convert", "{src}", "{dst}", "--sidecars-from", "{tmp}/file.txt"], "file.txt"),
    "compare missing": (["convert", "{src}", "{dst}", "--compare", "{tmp}/none"], "none"),
    "plan out": (["plan", "{src}", "{dst}", "--out", "{tmp}/none/plan"], "--out"),
    "plan out a directory": (["plan", "{src}", "{dst}", "--out", "{tmp}"], "--out"),
    "run missing": (["run", "{tmp}/none"], "none"),
    "run text": (["run", "{tmp}/file.txt"], "plan"),
    "run bytes": (["run", "{src}/assets/deep/er/picture.bin"], "picture.bin"),
    "run list": (["run", "{tmp}/list.json"], "plan"),
    "run version": (["run", "{tmp}/version.json"], "version"),
    "run hollow": (["run", "{tmp}/hollow.json"], "plan"),
    "demo in a full directory": (["demo", "{tmp}/demo"], "not empty"),
    **{f"recipe {name}": (["convert", "{src}", "{dst}", "--recipe", f"{{tmp}}/{name}"], name.split(".")[0]) for name in RECIPES},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_nothing_behind(source, tmp_path, capsys, case):
    (tmp_path / "link").symlink_to("src")
    (tmp_path / "dead.safetensors").symlink_to("nowhere")
    for name, text in {
        **RECIPES,
        "file.txt": "text",
        "old.safetensors": "old",
        "list.json": "[]",
        "version.json": '{"streamconv_plan": 99}',
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "hollow.json").write_text('{"streamconv_plan": 1}')
    for name in ("empty", "folder.yaml", "x"):
        (tmp_path / name).mkdir()
    for name in ("full/mine.txt", "demo/hf/mine.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine")
    before = tree(tmp_path)
    arguments, part = REFUSED[case]
    given = [
        argument.replace("{src}", str(source)).replace("{dst}", str(tmp_path / "dst")).replace("{tmp}", str(tmp_path))
        for argument in arguments
    ]
    capsys.readouterr()
    if given[:1] == ["convert"]:
        given[1:1] = ["--max-memory", ROOMY]  # a later one counts
    assert cli.main(given) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("streamconv: error: ")
    assert err.count("\n") == 1
    assert part in err
    assert tree(tmp_path) == before
    if given[:1] == ["convert"] and "--compare" not in given:  # planning refuses the same
        assert cli.main(["plan", *given[1:]]) == 2
        assert tree(tmp_path) == before


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_refused_by_every_command(tmp_path, capsys, case):
    content, part, _ = BAD[case]
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "model.safetensors").write_bytes(content)
    write(tmp_path / "good", {"w": random_tensor(2)})
    before = tree(tmp_path)
    for arguments in (
        ("inspect", bad),
        ("inspect", bad / "model.safetensors", "--json"),
        ("plan", bad, tmp_path / "dst"),
        ("convert", bad, tmp_path / "dst", "--dtype", "bf16"),
        ("convert", tmp_path / "good", tmp_path / "dst", "--compare", bad),
        ("verify", bad, tmp_path / "good"),
        ("verify", tmp_path / "good", bad),
        ("recipes", "--match", bad),
    ):
        assert part in refusal(capsys, *arguments)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": ' + "[" * 100_000, "\ud800", "null"])
def test_a_config_that_cannot_be_read(source, tmp_path, capsys, text):
    (source / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    before = tree(tmp_path)
    assert "config.json" in refusal(capsys, "convert", source, tmp_path / "dst", "--dtype", "bf16")
    assert tree(tmp_path) == before


def test_a_sidecar_that_is_a_dead_link(source, tmp_path, capsys):
    (source / "vocab.txt").symlink_to("nowhere")
    assert "vocab.txt" in refusal(capsys, "convert", source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
def test_directories_without_permission(source, tmp_path, capsys):
    for mode in (0o000, 0o300):
        source.chmod(mode)
        assert "src" in refusal(capsys, "convert", source, tmp_path / "dst")
        source.chmod(0o700)
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "locked" in refusal(capsys, "convert", source, tmp_path / "locked")
    assert "locked" in refusal(capsys, "convert", source, tmp_path / "locked" / "dst")


def test_a_process_says_no_in_one_line(source, tmp_path):
    done = streamconv_process("convert", source, tmp_path / "dst", "--max-memory", "1MB")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("streamconv: error: --max-memory 1 MB is too small")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "dst").exists()


# The demo ----------------------------------------------------------------------------------------------------------


def test_the_demo_converts_there_and_back(tmp_path):
    done = streamconv_process("demo", tmp_path / "demo", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    figures = strict_json(done.stdout)
    assert figures["equal"] is True
    assert figures["compared"] > 100
    for step in figures["steps"]:
        assert step["seconds"] > 0
        assert step["peak_rss"] < 300_000_000
    assert run("verify", tmp_path / "demo" / "hf", tmp_path / "demo" / "back", "--quiet") == 0
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"hf", "custom", "back"}
    again = streamconv_process("demo", tmp_path / "demo")
    assert again.returncode == 2
    assert "not empty" in again.stderr
