"""Conversions from and to PyTorch's own files, with torch as the oracle: what it saves is read, what is written it loads."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same, raw, read, refusal, run, write
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open

from streamconv.checkpoint.opening import open_checkpoint
from streamconv.conversion import api
from streamconv.digests import patches
from streamconv.planning.plan import Plan
from streamconv.running import filling

LEGACY = {"_use_new_zipfile_serialization": False}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tensors():
    """Some of several dtypes, one not contiguous, one without elements, one of no axes."""
    shared = torch.arange(600.0).reshape(20, 30)
    return {
        "lm_head.weight": shared,
        "layers.0.weight": torch.randn(40, 30).to(torch.bfloat16),
        "layers.0.bias": torch.randn(7, 40).t(),
        "embed.weight": shared,
        "step": torch.tensor(3),
        "none": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]),
    }


def torch_shards(folder, given, size=3000):
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(given, folder, max_shard_size=size, safe_serialization=False)
    (folder / "config.json").write_text('{"model_type": "x"}')
    return folder


def load(path):
    """All tensors of torch's files at ``path``, which are sound as zips."""
    found = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.bin")):
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
        found |= torch.load(file, weights_only=True, mmap=True)
    return found


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def single(folder, tree, **options):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tree, folder / "pytorch_model.bin", **options)
    return folder / "pytorch_model.bin"


SOURCES = {
    "sharded": lambda folder: torch_shards(folder, tensors()),
    "single": lambda folder: single(folder, tensors()),
    "legacy": lambda folder: single(folder, tensors(), **LEGACY),
    "nested": lambda folder: single(folder, {"epoch": 3, "state_dict": tensors()}),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("layout", [["--max-shard-size", "3KB"], ["--single-file"]])
def test_there_and_back(tmp_path, kind, layout):
    source = SOURCES[kind](tmp_path / "source")
    given = tensors_like(source)
    assert run("convert", source, tmp_path / "st", *layout, "--verify", "--quiet") == 0
    assert_same(read(tmp_path / "st"), {name: tensor for name, tensor in given.items() if name != "lm_head.weight"})
    assert run("convert", tmp_path / "st", tmp_path / "back", *layout, "--format", "torch", "--verify", "--quiet") == 0
    assert run("convert", source, tmp_path / "again", *layout, "--format", "torch", "--verify", "--quiet") == 0
    for made in (tmp_path / "back", tmp_path / "again"):
        loaded = load(made)
        assert_same(loaded, given)
        assert loaded["lm_head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()
        assert (made / "pytorch_model.bin").exists() == (layout == ["--single-file"])
        assert run("verify", source, made, "--quiet") == run("verify", made, tmp_path / "st", "--quiet") == 0


def tensors_like(source):
    found = {}
    for file in [source] if source.is_file() else sorted(source.glob("*.bin")):
        tree = torch.load(file, weights_only=True)
        found |= tree.get("state_dict", tree)
    return found


def test_shards_and_index_are_those_of_huggingface_hub(tmp_path):
    given = {f"w{k}": torch.full((100,), float(k)) for k in range(9)}
    theirs = torch_shards(tmp_path / "theirs", given, size=1000)
    write(tmp_path / "st", given, shards=2, config={"model_type": "x"})
    assert run("convert", tmp_path / "st", tmp_path / "ours", "--format", "torch", "--max-shard-size", "1000B", "--quiet") == 0
    assert listing(tmp_path / "ours") == listing(theirs)
    for path in theirs.glob("*.bin"):
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes()


def test_a_single_file_is_that_of_torch_save(tmp_path):
    given = {name: tensors()[name].contiguous() for name in ("layers.0.weight", "layers.0.bias", "step", "none", "mask")}
    given |= {"embed": given["layers.0.weight"].T[0].clone()}
    given |= {"head": given["embed"][:]}
    (tmp_path / "theirs").mkdir()
    torch.save(given, tmp_path / "theirs" / "x.pt")
    assert run("convert", tmp_path / "theirs" / "x.pt", tmp_path / "ours" / "x.pt", "--quiet") == 0
    assert (tmp_path / "ours" / "x.pt").read_bytes() == (tmp_path / "theirs" / "x.pt").read_bytes()
    assert listing(tmp_path / "ours") == ["x.pt"]


def test_ties_are_recorded_as_huggingface_hub_records_them(tmp_path):
    source = SOURCES["single"](tmp_path / "source")
    (tmp_path / "theirs").mkdir()
    save_torch_state_dict({name: tensor.contiguous() for name, tensor in tensors().items()}, tmp_path / "theirs")
    assert run("convert", source, tmp_path / "ours", "--quiet") == 0
    found = []
    for side in ("ours", "theirs"):
        with safe_open(tmp_path / side / "model.safetensors", "pt") as file:
            found.append((file.metadata(), set(file.keys())))
    assert found[0] == found[1]
    assert found[0][0]["lm_head.weight"] == "embed.weight"


def test_ties_can_be_copied(tmp_path, capsys):
    source = SOURCES["single"](tmp_path / "source")
    for target in ("st", "copy.bin"):
        assert run("convert", source, tmp_path / target, "--set", "tied=copy", "--verify", "--quiet") == 0
    assert_same(read(tmp_path / "st"), tensors_like(source))
    loaded = load(tmp_path / "copy.bin")
    assert loaded["lm_head.weight"].data_ptr() != loaded["embed.weight"].data_ptr()
    assert_same(loaded, tensors_like(source))
    message = refusal(capsys, "convert", source, tmp_path / "x", "--set", "tie=copy")
    assert "resize_vocab, root, seed, tied" in message
    assert "keep, copy" in refusal(capsys, "convert", source, tmp_path / "x", "--set", "tied=maybe")
    assert not (tmp_path / "x").exists()


def test_a_tie_that_a_cast_breaks_is_written_twice(tmp_path):
    source = SOURCES["single"](tmp_path / "source")
    assert run("convert", source, tmp_path / "st", "--dtype", "float16", "--keep-dtype", "lm_head.*", "--quiet") == 0
    found = read(tmp_path / "st")
    assert (found["lm_head.weight"].dtype, found["embed.weight"].dtype) == (torch.float32, torch.float16)


def test_other_metadata_is_no_tie(tmp_path):
    write(tmp_path / "st", {"pt": torch.ones(2), "b": torch.ones(3)})
    assert run("convert", tmp_path / "st", tmp_path / "x.bin", "--quiet") == 0
    assert sorted(load(tmp_path / "x.bin")) == ["b", "pt"]


def test_ties_are_ordinary_sources_of_a_recipe(tmp_path):
    source = SOURCES["single"](tmp_path / "source")
    recipe = {"name": "a-b", "rules": [{"rule": "{name*}", "right": "model.{name*}"}]}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    assert run("convert", source, tmp_path / "st", "--recipe", tmp_path / "r.json", "--quiet", "--verify") == 0
    assert_same(read(tmp_path / "st"), {f"model.{name}": tensor for name, tensor in tensors_like(source).items()})
    assert run("convert", source, tmp_path / "x.bin", "--recipe", tmp_path / "r.json", "--quiet", "--verify") == 0
    assert_same(load(tmp_path / "x.bin"), {f"model.{name}": tensor for name, tensor in tensors_like(source).items()})


def test_roots(tmp_path, capsys):
    tree = {"model": {"a": torch.ones(2)}, "ema": {"deep": {"a": torch.zeros(3)}}, "epoch": 7}
    source = single(tmp_path / "source", tree)
    notes = api.plan(source, tmp_path / "x").notes
    assert any("'model'" in note for note in notes)
    assert any("'ema'" in note and "'epoch'" in note for note in notes)
    assert run("convert", source, tmp_path / "st", "--set", "root=ema.deep", "--quiet") == 0
    assert_same(read(tmp_path / "st"), tree["ema"]["deep"])
    assert "'nothing'" in refusal(capsys, "convert", source, tmp_path / "x", "--set", "root=nothing")
    assert "safetensors" in refusal(capsys, "convert", tmp_path / "st", tmp_path / "x", "--set", "root=ema")
    assert run("verify", source, tmp_path / "st", "--set", "root=ema.deep", "--quiet") == 0


def test_inspect(tmp_path, capsys):
    source = SOURCES["sharded"](tmp_path / "source")
    assert run("inspect", source, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["metadata"], found["sidecars"]) == ("torch", {}, ["config.json"])
    rows = {row["name"]: row for row in found["tensors"]}
    given = tensors_like(source)
    assert rows.keys() == given.keys()
    with (source / rows["layers.0.weight"]["file"]).open("rb") as file:
        file.seek(rows["layers.0.weight"]["offset"])
        assert file.read(rows["layers.0.weight"]["nbytes"]) == raw(given["layers.0.weight"])
    assert run("inspect", SOURCES["nested"](tmp_path / "nested")) == 0
    assert "'state_dict'" in capsys.readouterr().out


def test_verify_sees_a_difference(tmp_path):
    source = SOURCES["single"](tmp_path / "source")
    other = tensors()
    other["step"] += 1
    assert run("verify", source, single(tmp_path / "other", other | {"layers.0.weight": tensors_like(source)["layers.0.weight"]})) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_casts(tmp_path, dtype):
    source = SOURCES["sharded"](tmp_path / "source")
    wanted = {name: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for name, t in tensors_like(source).items()}
    assert run("convert", source, tmp_path / "st", "--dtype", dtype, "--verify", "--quiet") == 0
    assert run("convert", source, tmp_path / "x.bin", "--dtype", dtype, "--verify", "--quiet") == 0
    assert_same(load(tmp_path / "x.bin"), wanted)
    assert_same(read(tmp_path / "st"), {name: tensor for name, tensor in wanted.items() if name != "lm_head.weight"})


def test_detection_order(tmp_path):
    both = torch_shards(tmp_path / "both", {"a": torch.ones(900), "b": torch.ones(900)})
    assert open_checkpoint(both).format == "torch"
    write(both, {"a": torch.ones(2)})
    assert open_checkpoint(both).format == "safetensors"
    assert open_checkpoint(both).sidecars == ["config.json"], "neither container's files are sidecars"
    assert run("convert", both, tmp_path / "st", "--quiet") == 0
    assert listing(tmp_path / "st") == ["config.json", "model.safetensors"]


def test_the_suffix_of_a_destination_and_its_format(tmp_path, capsys):
    write(tmp_path / "st", {"a": torch.ones(2)})
    for name in ("x.bin", "x.pt", "x.pth"):
        assert run("convert", tmp_path / "st", tmp_path / name, "--quiet") == 0
        assert_same(load(tmp_path / name), {"a": torch.ones(2)})
    assert "--format safetensors" in refusal(capsys, "convert", tmp_path / "st", tmp_path / "y.bin", "--format", "safetensors")
    assert "safetensors, torch" in refusal(capsys, "convert", tmp_path / "st", tmp_path / "y", "--format", "tf")


def test_overwrite_removes_the_other_container(tmp_path):
    write(tmp_path / "st", {"a": torch.ones(2)})
    dst = torch_shards(tmp_path / "dst", {"a": torch.ones(900), "b": torch.ones(900)})
    assert run("convert", tmp_path / "st", dst, "--overwrite", "--quiet") == 0
    assert listing(dst) == ["config.json", "model.safetensors"]
    write(tmp_path / "st2", {"a": torch.ones(3)})
    assert run("convert", tmp_path / "st2", dst, "--overwrite", "--format", "torch", "--quiet") == 0
    assert listing(dst) == ["config.json", "pytorch_model.bin"]


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil",))


def saved_bytes():
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(5)}, buffer)
    return buffer.getvalue()


def pickle_in_zip(value):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"a": value}, protocol=2))
    return buffer.getvalue()


def compress(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"N." * 100)


DAMAGED = {
    "evil": lambda path: path.write_bytes(pickle_in_zip(Evil())),
    "truncated": lambda path: path.write_bytes(saved_bytes()[:-30]),
    "no torch file": lambda path: path.write_bytes(b"hello"),
    "empty": lambda path: path.write_bytes(b""),
    "no tensors": lambda path: torch.save({"epoch": 1}, path),
    "compressed": compress,
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("command", [["convert"], ["plan"], ["convert", "--format", "torch"]])
def test_damaged_files_are_refused(tmp_path, capsys, monkeypatch, kind, command):
    monkeypatch.chdir(tmp_path)
    DAMAGED[kind](tmp_path / "x.bin")
    message = refusal(capsys, command[0], tmp_path / "x.bin", tmp_path / "dst", *command[1:])
    assert str(tmp_path / "x.bin") in message
    assert listing(tmp_path) == ["x.bin"]


def test_a_plan_runs_later(tmp_path, capsys):
    source = SOURCES["single"](tmp_path / "source")
    options = ["--format", "torch", "--max-shard-size", "3KB"]
    assert run("plan", source, tmp_path / "dst", *options, "--json", "--out", tmp_path / "plan.json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["format"] == "torch"
    assert [file["path"] for file in summary["outputs"]][-1] == "pytorch_model.bin.index.json"
    assert (
        {row["target"] for row in summary["mapping"]} == {name for file in summary["outputs"] for name in file["tensors"]} == set(tensors())
    )
    made = Plan.from_json((tmp_path / "plan.json").read_text())
    assert Plan.from_json(made.to_json()).files == made.files
    assert not (tmp_path / "dst").exists()
    assert run("run", tmp_path / "plan.json", "--verify", "--quiet") == 0
    assert_same(load(tmp_path / "dst"), tensors_like(source))
    assert sum(file["size"] for file in summary["outputs"]) == summary["bytes_written"]


@pytest.mark.parametrize("place", ["data", "checksum"])
def test_verify_after_writing_sees_damage(tmp_path, monkeypatch, capsys, place):
    source = SOURCES["single"](tmp_path / "source")
    whole = filling.LocalEngine.run

    def damage(engine):
        whole(engine)
        path = tmp_path / "dst" / "pytorch_model.bin"
        data = bytearray(path.read_bytes())
        file = engine._plan.files[-1]
        at = file.segments[0].dst if place == "data" else next(patches(file.checksums, [0] * len(file.checksums)))[0]
        data[at] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(filling.LocalEngine, "run", damage)
    assert run("convert", source, tmp_path / "dst", "--format", "torch", "--verify", "--quiet") == 3
    assert "does not hold what was written" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_resume(tmp_path, monkeypatch, stop):
    source = SOURCES["single"](tmp_path / "source")
    command = ["convert", source, tmp_path / "dst", "--format", "torch", "--max-shard-size", "3KB", "--quiet", "-j", "1"]
    calls = []

    def interrupted(self, number, path, fd, seal=filling.LocalEngine._seal):
        calls.append(path)
        if len(calls) == stop:
            raise OSError(5, "unplugged")
        seal(self, number, path, fd)

    with monkeypatch.context() as patch:
        patch.setattr(filling.LocalEngine, "_seal", interrupted)
        first = run(*command)
    assert first == (3 if len(calls) >= stop else 0)
    assert run(*command, "--resume", "--verify") == 0
    assert run("convert", source, tmp_path / "whole", *command[3:]) == 0
    assert listing(tmp_path / "dst") == listing(tmp_path / "whole")
    for name in listing(tmp_path / "whole"):
        assert (tmp_path / "dst" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# Memory ------------------------------------------------------------------------------------------------------------

PROCESS = """
import json, sys
from streamconv.cli.command import main
code = main(sys.argv[1:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
loaded = {name: name in sys.modules for name in ("torch", "numpy")}
print(json.dumps({"code": code, "peak": int(status["VmHWM"].split()[0]) * 1024, **loaded}))
"""


def in_a_process(*arguments):
    done = subprocess.run([sys.executable, "-c", PROCESS, *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False)
    lines = done.stdout.splitlines()
    found = json.loads(lines[-1])
    assert found["code"] == 0, done.stderr
    return found, json.loads(lines[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks the kernel for memory figures")
def test_memory_there_and_back(tmp_path):
    given = {f"w{k}": torch.full((4 << 20,), float(k), dtype=torch.bfloat16) for k in range(12)}  # 100 MB
    source = single(tmp_path / "source", given)
    for backend in ("auto", "mmap", "pread"):
        shutil.rmtree(tmp_path / "st", ignore_errors=True)
        options = ["--max-memory", "64MB", "--max-shard-size", "25MB", "--read-backend", backend, "--json"]
        found, document = in_a_process("convert", source, tmp_path / "st", *options)
        assert not found["torch"]
        assert not found["numpy"]
        assert document["peak_rss"] <= document["peak_memory"] <= 64_000_000
    found, document = in_a_process("convert", tmp_path / "st", tmp_path / "back", "--format", "torch", "--max-memory", "300MB", "--json")
    assert document["peak_rss"] <= document["peak_memory"] <= 300_000_000
    assert found["peak"] <= 300_000_000
    assert (tmp_path / "back" / "pytorch_model.bin").read_bytes() == source.read_bytes()


# Stops at the second task until the signal comes.
HALTED = """
import os, signal, sys, threading
halted, go_on = iter([False]), threading.Event()
def interrupt(*given):
    go_on.set()
    signal.default_int_handler(*given)
signal.signal(signal.SIGINT, interrupt)
from streamconv.cli import command as cli
from streamconv.running import filling
copy = filling.LocalEngine._copy
def halt(*given):
    if next(halted, True):
        os.write(1, b"halted\\n")  # at once, whichever thread it is
        go_on.wait(600)
    return copy(*given)
filling.LocalEngine._copy = halt
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="sends a signal")
def test_an_interrupted_run_goes_on(tmp_path):
    given = {f"w{k}": torch.full((4 << 20,), float(k), dtype=torch.bfloat16) for k in range(12)}
    write(tmp_path / "st", given)
    command = ["convert", tmp_path / "st", tmp_path / "x.bin", "--max-memory", "300MB", "--quiet"]
    halted = [sys.executable, "-c", HALTED, *map(str, command)]
    with subprocess.Popen(halted, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "halted\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "--resume" in err
    assert (tmp_path / "x.bin.partial").exists()
    assert run(*command, "--resume") == 0
    (tmp_path / "theirs").mkdir()
    torch.save(dict(sorted(given.items())), tmp_path / "theirs" / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == (tmp_path / "theirs" / "x.bin").read_bytes()


# What others make --------------------------------------------------------------------------------------------------


@pytest.mark.oracle
def test_transformers_reads_what_is_made(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Qwen2Config(vocab_size=96, tie_word_embeddings=True, **sizes)
    model = transformers.Qwen2ForCausalLM(config).eval()
    source = torch_shards(tmp_path / "source", model.state_dict(), size=20_000)
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(source)
    assert run("convert", source, tmp_path / "st", "--quiet", "--verify") == 0
    assert run("convert", tmp_path / "st", tmp_path / "back", "--format", "torch", "--max-shard-size", "20KB", "--quiet", "--verify") == 0
    tokens = torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        wanted = model(tokens).logits
        for path in (tmp_path / "st", tmp_path / "back"):
            found = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
            assert torch.equal(found(tokens).logits, wanted)
