"""What the command prints: nothing that a terminal obeys, no secret, paths as they were given; and how it ends on Ctrl-C."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOMY, refusal, run, write
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from seeded_defects import CONFIG, llama

import streamconv
from streamconv.cli.command import main
from streamconv.cli.console import Console
from streamconv.text import did_you_mean, join_lines, one_line, without_secrets

# Of every kind that a terminal, or a reader of lines, takes for something else than a character.
NASTY = "\x1b[2J\x1b]0;owned\x07|\r|\n|\x85|\u2028|\u2029|\x9b31m|\x7f|\x08|\u202e|\u2066|\u200b|\ufeff|\x00|\t"
IN_NAMES = NASTY.replace("\x00", "")
SECRET = "5EcReT"
SIGNED = f"https://host.example/m.safetensors?X-Amz-Signature={SECRET}&X-Amz-Date=1"
SAS = f"https://account.blob.example/c/m.safetensors?sv=2022-11-02&ss=b&sig={SECRET}%3D"
LOGIN = f"https://user:{SECRET}@host.example/m.safetensors"


def unprintable(text: str) -> list[str]:
    return [char for char in text if not char.isprintable() and char != "\n"]


@given(st.text() | st.text(st.sampled_from(NASTY + "\ud800\udcff")))
def test_one_line_is_one_and_printable(text):
    assert one_line(text).isprintable()
    assert one_line(text) == text or not text.isprintable()
    assert join_lines([text, text]).count("\n") == 1


def test_what_is_printable_stays():
    text = "model.layers.0 — größer 模型 🙂 \\n"
    assert one_line(text) is text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (SIGNED, "https://host.example/m.safetensors"),
        (f"--out {SAS}: cannot be written", "--out https://account.blob.example/c/m.safetensors cannot be written"),
        (LOGIN, "https://host.example/m.safetensors"),
        (f"https:/host/a?sig={SECRET}", "https:/host/a"),
        (f"'s3://key:{SECRET}/+x@bucket/y'", "'s3://bucket/y'"),
        ("hf://org/name@main: no such revision", "hf://org/name@main: no such revision"),
        ("http://127.0.0.1:80/a@b/c", "http://127.0.0.1:80/a@b/c"),
        (f"?sv=2022-11-02&sig={SECRET}&se=1 is none", "?sv=2022-11-02&sig=...&se=1 is none"),
        (f"X-Amz-Signature={SECRET}", "X-Amz-Signature=..."),
        ("--set pad_token=3 n=4", "--set pad_token=... n=4"),
        ("model.safetensors: 5 bytes", "model.safetensors: 5 bytes"),
    ],
)
def test_secrets_are_taken_out(text, shown):
    assert without_secrets(text).replace(": cannot", " cannot") == shown


WRONG_PLACES = {
    "an extra argument": ("inspect", "{src}", "{url}"),
    "an extra argument of convert": ("convert", "{src}", "{dst}", "{url}"),
    "a command": ("{url}",),
    "a recipe": ("convert", "{src}", "{dst}", "--recipe", "{url}"),
    "a recipe, joined": ("convert", "{src}", "{dst}", "--recipe={url}"),
    "a plan to write": ("plan", "{src}", "{dst}", "--out", "{url}"),
    "a report": ("convert", "{src}", "{dst}", "--report", "{url}"),
    "an option": ("convert", "{src}", "{dst}", "--set", "root={url}"),
    "an unknown option": ("convert", "{src}", "{dst}", "--set", "{url}=1"),
    "a misspelt option": ("convert", "{src}", "{dst}", "--sidecars-form={url}"),
    "an engine": ("convert", "{src}", "{dst}", "--engine", "{url}"),
    "a number": ("convert", "{src}", "{dst}", "--workers", "{url}"),
    "a size": ("convert", "{src}", "{dst}", "--max-memory", "{url}"),
    "a dtype": ("convert", "{src}", "{dst}", "--dtype", "{url}"),
    "a format": ("convert", "{src}", "{dst}", "--format", "{url}"),
    "a filter": ("inspect", "{src}", "--filter", "{url}"),
    "a plan": ("run", "{url}"),
    "a part": ("run", "plan.json", "--part", "{url}"),
    "a recipe to explain": ("recipes", "{url}"),
    "where a demo goes": ("demo", "{url}"),
}


@pytest.mark.parametrize("where", WRONG_PLACES)
def test_a_signed_url_in_a_wrong_place_is_not_printed(where, tmp_path, capsys, monkeypatch):
    src = write(tmp_path / "src", {"w": torch.ones(2)})
    monkeypatch.chdir(tmp_path)
    for url in (SIGNED, SAS, LOGIN):
        for verbose in ((), ("-v",)):
            words = [part.format(url=url, src=src, dst=tmp_path / "dst") for part in WRONG_PLACES[where]]
            assert main([*words, *verbose]) == 2
            found = capsys.readouterr()
            assert SECRET not in found.out + found.err
            assert found.err
            assert verbose or found.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path):
    """A checkpoint whose every name holds what a terminal obeys."""
    folder = tmp_path / f"model{IN_NAMES}".replace("/", "")
    tensors = {f"layers.{k}.{IN_NAMES}.weight": torch.full((2, 2), float(k)) for k in range(4)}
    folder.mkdir()
    save_file(tensors, folder / f"model{IN_NAMES}.safetensors", metadata={"format": "pt", NASTY: NASTY})
    config = {"model_type": NASTY, "architectures": [NASTY], "torch_dtype": NASTY, "auto_map": {"AutoModel": f"{NASTY}.X"}, NASTY: NASTY}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / f"notes{IN_NAMES}.txt").write_text("x")
    return folder


def test_nothing_that_a_terminal_obeys_is_printed(hostile, tmp_path, capsys):
    other = write(tmp_path / "other", {f"layers.9.{NASTY}": torch.ones(2)})
    recipe = tmp_path / "mine.json"
    rules = [{"rule": f"layers.{{i}}.{IN_NAMES}.weight", "right": f"made.{{i}}.{IN_NAMES}"}]
    recipe.write_text(json.dumps({"name": "mine", "summary": NASTY, "rules": rules, "options": {"n": {"help": NASTY}}}))
    dst = tmp_path / f"dst{IN_NAMES}"
    page = tmp_path / "page.html"
    commands: list[tuple[object, ...]] = [
        ("inspect", hostile),
        ("inspect", hostile, "--all"),
        ("inspect", hostile, "--filter", f"nothing{IN_NAMES}"),
        ("inspect", hostile, "--stats"),
        ("inspect", tmp_path / IN_NAMES),
        ("doctor", hostile),
        ("verify", hostile, other),
        ("verify", hostile, hostile),
        ("diff", hostile, other),
        ("recipes", recipe),
        ("recipes", "--match", hostile),
        ("recipes", "--new", hostile, other),
        ("recipes", NASTY.replace("\x00", "")),
        ("plan", hostile, dst),
        ("plan", hostile, dst, "--recipe", recipe),
        ("plan", hostile, dst, "--recipe", "llama-hf2meta"),
        ("convert", hostile, dst, "--max-memory", ROOMY, "--report", page, "-v"),
        ("convert", hostile, dst, "--max-memory", ROOMY),
        ("convert", hostile, dst, "--max-memory", ROOMY, "--resume"),
        ("convert", hostile, tmp_path / "fp", "--dtype", IN_NAMES),
        ("convert", hostile, tmp_path / "fp", "--set", f"{IN_NAMES}=1"),
        ("convert", hostile, tmp_path / "fp", "--format", IN_NAMES),
    ]
    for command in commands:
        words = [str(part) for part in command]
        main(words)
        found = capsys.readouterr()
        assert found.out + found.err, command
        assert not unprintable(found.out + found.err), (command, found)
        if command[0] in ("inspect", "doctor", "plan", "verify", "diff") and "--stats" not in command:
            main([*words, "--json"])
            told = capsys.readouterr()
            assert not unprintable(told.out + told.err), command
            if told.out:
                json.loads(told.out)
    names = {row["name"] for row in _inspected(hostile, capsys)["tensors"]}
    assert names == {f"layers.{k}.{IN_NAMES}.weight" for k in range(4)}
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL) or [page.read_text()]
    assert not unprintable(data)
    assert "\\u001b" not in data
    assert "\\u202e" not in data.replace("\\\\u202e", "")


def _inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, list[dict[str, object]]]:
    assert run("inspect", path, "--json") == 0
    found: dict[str, list[dict[str, object]]] = json.loads(capsys.readouterr().out)
    return found


def test_paths_stand_as_they_were_given(tmp_path, capsys, monkeypatch):
    write(tmp_path / "model", {"w": torch.ones(2)})
    monkeypatch.chdir(tmp_path)
    for command, shown in (
        ("model", "model:"),
        ("./model", "./model:"),
        ("model/", "model:"),
        (str(tmp_path / "model"), f"{tmp_path}/model:"),
    ):
        assert run("inspect", command) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith(shown)
    assert run("convert", "model", "out", "--max-memory", ROOMY) == 0
    assert capsys.readouterr().out.startswith("out: 1 tensors")
    assert run("convert", "model", "out", "--max-memory", ROOMY) == 2
    assert (
        capsys.readouterr().err
        == "streamconv: error: out: already exists and is not empty: give another DST, or --overwrite, or --resume\n"
    )
    out = Console(["model", "--set", "a=b"])
    assert out.show(f"{tmp_path}/model-2/x and {tmp_path}/model/x, {tmp_path}/b") == f"{tmp_path}/model-2/x and model/x, {tmp_path}/b"


# Near misses ---------------------------------------------------------------------------------------------------------


def test_what_comes_near(tmp_path, capsys):
    src = write(tmp_path / "src", {"lm_head.weight": torch.ones(2)})
    dst = tmp_path / "dst"
    for command, near in (
        (("convrt", src, dst), "did you mean convert?"),
        (("convert", src, dst, "--dtpye", "float32"), "unknown option --dtpye; did you mean --dtype?"),
        (("convert", src, dst, "--max-mem=1GB"), "did you mean --max-memory?"),
        (("inspect", src, "--recipe", "x"), "inspect has no option --recipe; convert, plan, verify, diff have"),
        (("inspect", src, src), "one argument too many"),
        (("convert", src, dst, "--engine", "rya"), "did you mean ray?"),
        (("convert", src, dst, "--dtype", "bfolat16"), "did you mean bfloat16?"),
        (("convert", src, dst, "--format", "safetensor"), "did you mean safetensors?"),
        (("convert", src, dst, "--set", "resize_vcoab=3"), "did you mean resize_vocab?"),
        (("convert", src, dst, "--recipe", "llama-meta2fh"), "did you mean llama-meta2hf"),
        (("recipes", "intervl-hf2custom"), "did you mean internvl-hf2custom"),
    ):
        assert run(*command) == 2
        line = capsys.readouterr().err
        assert near in line, line
        assert len(line) < 500, line
    assert did_you_mean("nothing like it", ["abc"]) == ""
    checkpoint = streamconv.open(src)
    with pytest.raises(KeyError) as caught:
        checkpoint["lm_head.weigth"]
    assert str(caught.value).endswith("no tensor 'lm_head.weigth' among 1; did you mean 'lm_head.weight'?")
    assert checkpoint.get("lm_head.weigth") is None
    assert "lm_head.weigth" not in checkpoint


def test_a_misspelt_key_of_a_config_is_named(tmp_path, capsys):
    config = {key.replace("attention", "atention"): value for key, value in CONFIG.items()}
    src = write(tmp_path / "src", llama(), config=config)
    assert "; config.json has num_atention_heads" in refusal(capsys, "plan", src, tmp_path / "dst", "--recipe", "llama-hf2meta")
    recipe = tmp_path / "mine.json"
    dropped = (
        "model.layers.{i}.mlp.{r*}",
        "model.layers.{i}.{input,post_attention}_layernorm.weight",
        "model.layers.{i}.self_attn.o_proj.weight",
        "model.{embed_tokens,norm}.weight",
        "lm_head.weight",
    )
    rules: list[dict[str, str]] = [{"drop": name, "reason": "not here"} for name in dropped]
    layout = {"rule": "model.layers.{i}.self_attn.{q,k,v}_proj.weight", "right": "a.{i}.{q,k,v}", "layout": "(h d) c -> (d h) c"}
    recipe.write_text(json.dumps({"name": "mine", "dims": {"h": "num_attention_heads"}, "rules": [layout, *rules]}))
    assert "; config.json has num_atention_heads" in refusal(capsys, "plan", src, tmp_path / "dst", "--recipe", recipe)


@pytest.mark.parametrize("name", ["x.gguf", "x.onnx", "x.h5", "x.safetensor", "x.pkl", "X.GGUF"])
def test_a_dst_called_like_a_file_that_is_not_written_is_no_folder(name, tmp_path, capsys):
    src = write(tmp_path / "src", {"w": torch.ones(2)})
    assert "files are not written" in refusal(capsys, "convert", src, tmp_path / name)
    assert not (tmp_path / name).exists()
    for fine in ("Llama-3.1-8B", "out.v2", "x.d"):
        assert run("plan", src, tmp_path / fine, "--quiet") == 0


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum")
def test_checksums_of_names_that_are_no_text(tmp_path):
    src = write(tmp_path / "src", {"w": torch.ones(2)})
    (src / os.fsdecode(b"odd\xff\n\x85.txt")).write_text("x")
    assert run("convert", src, tmp_path / "dst", "--checksum", "--max-memory", ROOMY, "--quiet") == 0
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    subprocess.run(check, cwd=tmp_path / "dst", check=True, timeout=60)
    (tmp_path / "SHA256SUMS").write_bytes(b"0" * 64 + b"  \xff\x85\n")
    assert run("convert", src, tmp_path / "one.safetensors", "--checksum", "--max-memory", ROOMY, "--quiet") == 0
    first, second, _ = (tmp_path / "SHA256SUMS").read_bytes().split(b"\n")
    assert first == b"0" * 64 + b"  \xff\x85"
    assert second.endswith(b"  one.safetensors")


# Ctrl-C --------------------------------------------------------------------------------------------------------------


def _interrupt(command: list[str], after: float, *, twice: bool) -> tuple[int, str]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    if twice:
        time.sleep(random.uniform(0, 0.1))
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def _check_interrupts(tmp_path: Path, tries: int) -> None:
    """Ctrl-C, once or twice, at random moments from the first import on."""
    size = (1 << 20) if tries > 20 else (1 << 12)
    src = write(tmp_path / "src", {f"layers.{k}.w": torch.rand(size, dtype=torch.float32).bfloat16() for k in range(40)})
    commands = [
        ("convert", src, tmp_path / "dst", "--dtype", "float32", "--overwrite", "--no-progress"),
        ("inspect", src, "--stats"),
        ("verify", src, src),
        ("plan", src, tmp_path / "none", "--dtype", "float16", "--format", "torch"),
        ("doctor", src, "--data"),
    ]
    script = tmp_path / "streamconv"
    script.write_text("import sys\nfrom streamconv.cli.command import main\nsys.exit(main())\n")
    random.seed(0)
    started = time.monotonic()
    subprocess.run([sys.executable, script, *map(str, commands[0])], check=True, capture_output=True, timeout=120)
    whole = time.monotonic() - started
    for k in range(tries):
        command = [sys.executable, str(script), *map(str, commands[k % len(commands)])]
        code, err = _interrupt(command, random.uniform(0.3, 1.0) * whole, twice=k % 2 == 1)
        ended = code in (0, 1) and not err  # before Ctrl-C came
        assert ended or (code == 130 and re.fullmatch(r"streamconv: error: interrupted.*\n", err)), (command, code, err)


def test_ctrl_c_is_one_line(tmp_path):
    _check_interrupts(tmp_path, 1)


@pytest.mark.slow
def test_ctrl_c_is_one_line_at_any_moment(tmp_path):
    _check_interrupts(tmp_path, 200)


def test_the_package_leaves_signals_alone_where_it_is_not_the_command():
    code = "import signal; before = signal.getsignal(2); import streamconv; print(signal.getsignal(2) is before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "True\n"


# stdout --------------------------------------------------------------------------------------------------------------


def test_a_full_stdout(tmp_path):
    src = write(tmp_path / "src", {"w": torch.ones(2)})
    with Path("/dev/full").open("w") as full:
        for command, code in ((["inspect", src], 3), (["convert", src, tmp_path / "dst"], 0)):
            done = subprocess.run(
                [sys.executable, "-m", "streamconv", *map(str, command)],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == code
            assert done.stderr.startswith("streamconv: error: stdout" if code else "note: all is done, but stdout")
            assert done.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "dst").iterdir()] == ["model.safetensors"]
