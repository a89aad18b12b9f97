"""Exit code 2 says that nothing was written: whatever goes wrong later is 3, whichever class of error it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streamconv import errors
from streamconv.cli import command as cli
from streamconv.conversion import api
from streamconv.diagnose import report_page
from streamconv.running import filling, lease
from streamconv.running import run as running
from streamconv.running.directory import Directory

CLASSES = [
    getattr(errors, name) for name in ("UsageError", "DestinationError", "FormatError", "CoverageError", "SpaceError", "RecipeError")
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    save_file({f"w{k}": torch.arange(64.0) + k for k in range(4)}, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    return tmp_path / "src"


def code_of(*arguments: object) -> int:
    return cli.main([*map(str, arguments), "--quiet", "--no-progress"])


def failing(kind: type[Exception]):
    def fail(*_given: object, **_more: object) -> None:
        raise kind("in the middle")

    return fail


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    ("where", "name", "options"),
    [
        (filling.LocalEngine, "_copy", []),
        (filling.LocalEngine, "_seal", []),
        (filling.LocalEngine, "_commit", []),
        (Directory, "remove", ["--overwrite"]),
        (report_page, "describe_conversion", ["--report", "{tmp}/report.html"]),
        (api, "compare", ["--compare", "{tmp}/src"]),
    ],
)
def test_what_fails_in_the_middle_is_3(where, name, options, kind, source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(where, name, failing(kind))
    assert code_of("convert", source, tmp_path / "dst", *(text.format(tmp=tmp_path) for text in options)) == 3
    assert "in the middle" in capsys.readouterr().err


@pytest.mark.parametrize("kind", CLASSES)
def test_so_it_is_in_parts(kind, source, tmp_path, monkeypatch):
    assert code_of("plan", source, tmp_path / "dst", "--out", tmp_path / "plan.json") == 0
    with monkeypatch.context() as patched:
        patched.setattr(filling.LocalEngine, "_copy", failing(kind))
        assert code_of("run", tmp_path / "plan.json", "--part", "1/1") == 3
    with monkeypatch.context() as patched:
        patched.setattr(Directory, "check_room", failing(kind))
        assert code_of("run", tmp_path / "plan.json", "--part", "1/1") == 2
    with monkeypatch.context() as patched:
        patched.setattr(lease.Lease, "take", failing(kind))
        assert code_of("run", tmp_path / "plan.json", "--part", "1/1") in (0, 2)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    ("where", "name"), [(Directory, "check_room"), (running, "check_replicas"), (Directory, "prepare"), (running, "check_sources")]
)
def test_what_fails_before_is_2(where, name, kind, source, tmp_path, monkeypatch):
    monkeypatch.setattr(where, name, failing(kind))
    assert code_of("convert", source, tmp_path / "dst") == 2
    assert not (tmp_path / "dst").exists()


def test_each_error_of_a_class_has_its_own_code():
    with pytest.raises(errors.UsageError) as caught, errors.writing():
        raise errors.UsageError("late")
    assert (caught.value.exit_code, errors.UsageError.exit_code, errors.UsageError("early").exit_code) == (3, 2, 2)
    with pytest.raises(errors.Interrupted) as stopped, errors.writing():
        raise errors.Interrupted("stopped")
    assert stopped.value.exit_code == 130
