"""``--check-load``: what another process's library says of a checkpoint, by stand-ins for such libraries."""

from __future__ import annotations

import json
import sys

import pytest
from checkpoint_files import failure, run
from fake_libraries import write_config

import streamconv
from streamconv.library import loading


@pytest.fixture
def model(source):
    write_config(source)
    return source


def test_a_conversion_ends_with_what_the_library_says(model, tmp_path, fake_transformers, capfd):
    assert run("convert", model, tmp_path / "a", "--check-load", "--json") == 0
    out, err = capfd.readouterr()
    assert not err, "what libraries print stays in their process"
    expected = {"library": "transformers", "version": "5.24.0", "class": "LlamaForCausalLM"}
    assert json.loads(out)["load"] == expected | {key: [] for key in ("missing", "unexpected", "mismatched", "errors", "unchecked")}
    fake_transformers(missing=["b", "a"], unexpected=["c"], mismatched=[("d", (3, 2), (2, 3))])
    assert run("convert", model, tmp_path / "b", "--check-load") == 1
    out, _ = capfd.readouterr()
    assert "problem: transformers 5.24.0 (LlamaForCausalLM): 2 missing: a, b\n" in out
    assert "1 unexpected: c\n" in out
    assert "1 of another shape: d (stored [3, 2], the model has [2, 3])\n" in out


def test_the_doctor_asks_the_library(model, fake_transformers, capsys):
    fake_transformers(missing=["a"])
    examination = streamconv.doctor(model, check_load=True)
    assert examination.load.missing == ("a",)
    assert "problem: transformers 5.24.0 (LlamaForCausalLM): 1 missing: a." in str(examination)
    assert not examination.healthy
    assert examination.summary()["load"]["missing"] == ("a",)


def test_the_end_of_a_run_in_parts_asks_too(model, tmp_path, fake_transformers, capsys):
    assert run("plan", model, tmp_path / "out", "--out", tmp_path / "plan.json", "--quiet") == 0
    assert "goes with --finish" in failure(capsys, 2, "run", tmp_path / "plan.json", "--part", "0/1", "--check-load")
    assert run("run", tmp_path / "plan.json", "--part", "0/1", "--quiet") == 0
    fake_transformers(unexpected=["a"])
    assert run("run", tmp_path / "plan.json", "--finish", "--check-load", "--quiet") == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "--check-load needs transformers: pip install"),
        ({"model_type": None}, "nothing says which library opens it"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(config, words, model, tmp_path, fake_transformers, capsys):
    library = tmp_path / "libraries" / "transformers" / "__init__.py"
    library.write_text("raise ImportError('no', name='transformers')")
    write_config(model, **config)
    if config:
        (model / "config.json").write_text("{}")
    assert words in failure(capsys, 2, "convert", model, tmp_path / "out", "--check-load")
    assert not (tmp_path / "out").exists()
    assert words in failure(capsys, 2, "doctor", model, "--check-load")


def test_code_beside_a_checkpoint_is_not_run(model, tmp_path, fake_transformers, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = {"architectures": ["Mine"], "model_type": "mine", "auto_map": {"AutoModel": "mine.Mine"}}
    write_config(model, **own)
    (model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "transformers.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")  # nor what lies where the command is given
    assert "code beside a checkpoint is not run" in failure(capsys, 2, "convert", model, tmp_path / "out", "--check-load")
    assert not (tmp_path / "ran").exists()
    (model / "config.json").unlink()
    (model / "modules.json").write_text(json.dumps([{"path": "", "type": "os.path.Mine"}]))
    assert "only sentence_transformers' own code" in failure(capsys, 2, "doctor", model, "--check-load")


@pytest.mark.parametrize(("dst", "more"), [("out.safetensors", []), ("out", ["--format", "mindspore"])])
def test_a_destination_that_no_library_opens(dst, more, model, tmp_path, capsys):
    assert "--check-load: " in failure(capsys, 2, "convert", model, tmp_path / dst, *more, "--check-load")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells what another process takes")
def test_the_process_is_bounded_and_its_end_is_told(model, fake_transformers, monkeypatch):
    monkeypatch.setenv("LOADING", "__import__('os')._exit(7)")
    with pytest.raises(streamconv.RunError, match=r"ended by itself \(exit code 7\)"):
        loading.check_load(model)
    monkeypatch.setattr(loading, "LIMIT", 200 << 20)
    monkeypatch.setenv("LOADING", "[bytearray(50 << 20) + b'1' for _ in range(8)] and __import__('time').sleep(600)")
    with pytest.raises(streamconv.RunError, match=r"stopped at .* of memory"):
        loading.check_load(model)
