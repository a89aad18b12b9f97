"""The command line: every command, every refusal, and what is left on the disk in each case."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
import termios

import pytest
import torch
from checkpoint_files import ROOMY, random_tensor, read, refusal, run, write
from safetensors_files import BAD, PT, make
from small_source import INDEX, SIDECARS, document, streamconv_process, strict_json, tensors, tree

import streamconv
from streamconv.cli import command as cli
from streamconv.cli.parser import COMMANDS, FIRST
from tools.make_checkpoint import write_shard

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


def test_alone_it_says_what_people_need_first(capsys):
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == FIRST.rstrip("\n") + "\n"
    assert err == "streamconv: error: the following arguments are required: COMMAND; see 'streamconv --help'\n"
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert capsys.readouterr().out.startswith(FIRST)
    for line in FIRST.strip().splitlines():
        assert line.split()[1] in COMMANDS


def test_version_and_help(capsys):
    for arguments in (["--version"], ["--help"], ["convert", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"streamconv {streamconv.__version__}\n")


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
