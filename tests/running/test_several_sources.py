"""Plans of several sources: an adapter's and a graft's files are fingerprinted, resumed, read from URLs, made in parts, and named."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_files import ROOMY, failure, refusal, run
from fsspec.implementations.memory import MemoryFileSystem

import streamconv
from streamconv.cli.command import _read_given
from streamconv.conversion.adapters import _split
from streamconv.conversion.options import PlanOptions
from streamconv.planning.plan import Plan
from streamconv.running import filling
from streamconv.storage.addresses import private
from streamconv.storage.locations import Shown
from tools import crash
from tools.crash import read_tree

SMALL = ["--max-shard-size", "300KB", "--max-memory", ROOMY, "-j", "1"]
OPTIONS = {"adapter": ["--adapter", "lora"], "graft": ["--graft", "donor", "--take", "*", "--replace"]}
FILES = {"adapter": "lora/adapter_model.safetensors", "graft": "donor/model.safetensors"}
BOTH = [*OPTIONS["adapter"], *OPTIONS["graft"]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ``src``, ``lora`` and ``donor`` are."""
    monkeypatch.setattr(crash, "LAYERS", 2)
    monkeypatch.setattr(crash, "FFN", 64)
    monkeypatch.setattr(crash, "VOCAB", 64)
    monkeypatch.setattr(crash, "HIDDEN", 64)
    crash.make_source(tmp_path / "src")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(path: Path) -> None:
    """Gives a file another last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_source_that_changed_is_refused_when_a_run_goes_on(folder, kind, capsys, monkeypatch):
    options = [*OPTIONS[kind], *SMALL]
    done: list[int] = []
    copy = filling.LocalEngine._copy

    def stop(engine: filling.LocalEngine, number: int, segment: object) -> int:
        done.append(number)
        if len(done) > 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return copy(engine, number, segment)

    with monkeypatch.context() as patch:
        patch.setattr(filling.LocalEngine, "_copy", stop)
        failure(capsys, 3, "convert", "src", "out", *options, "--quiet")
    original = (folder / FILES[kind]).read_bytes(), (folder / FILES[kind]).stat()
    change(folder / FILES[kind])
    before = read_tree(folder / "out")
    told = refusal(capsys, "convert", "src", "out", *options, "--resume", "--quiet")
    assert FILES[kind] in told
    assert FILES[kind] in failure(capsys, 3, "run", "out", "--resume", "--quiet")
    assert read_tree(folder / "out").keys() >= before.keys()
    (folder / FILES[kind]).write_bytes(original[0])
    os.utime(folder / FILES[kind], ns=(original[1].st_atime_ns, original[1].st_mtime_ns))
    assert run("run", "out", "--resume", "--quiet") == 0
    assert run("convert", "src", "whole", *options, "--quiet") == 0
    assert read_tree(folder / "out") == read_tree(folder / "whole")


def test_in_parts(folder, capsys):
    assert run("plan", "src", "out", *BOTH, *SMALL, "--out", "plan.json") == 0
    for part in ("2/3", "0/3", "1/3"):
        assert run("run", "plan.json", "--part", part, "--quiet") == 0
    assert run("run", "plan.json", "--finish", "--verify", "--quiet") == 0
    assert run("convert", "src", "whole", *BOTH, *SMALL, "--quiet") == 0
    assert read_tree(folder / "out") == read_tree(folder / "whole")
    assert run("plan", "src", "again", *BOTH, *SMALL, "--out", "again.json") == 0
    for kind, file in FILES.items():
        change(folder / file)
        assert file in failure(capsys, 3, "run", "again.json", "--part", "0/3", "--quiet"), kind
    assert not (folder / "again").exists()


@pytest.fixture
def served(folder: Path) -> Iterator[str]:
    """The same in fsspec's file system in memory."""
    files = MemoryFileSystem()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        files.pipe_file(f"/served/{path.relative_to(folder).as_posix()}", path.read_bytes())
    yield "memory://served"
    files.store.clear()


def test_behind_urls(folder, served, capsys):
    assert run("convert", "src", "whole", *BOTH, *SMALL, "--quiet") == 0
    options = [f"{served}/{word}" if word in ("lora", "donor") else word for word in BOTH]
    for source in ("src", f"{served}/src"):
        assert run("convert", source, "out", *options, *SMALL, "--verify", "--overwrite", "--quiet") == 0
        assert read_tree(folder / "out") == read_tree(folder / "whole")
    assert run("convert", f"{served}/src", f"{served}/out", *options, *SMALL, "--quiet") == 0
    assert run("verify", f"{served}/src", f"{served}/out", *options, "--max-memory", ROOMY, "--quiet") == 0
    assert run("diff", f"{served}/src", f"{served}/out", *options, "--max-memory", ROOMY, "--quiet") == 0
    MemoryFileSystem().rm(f"/served/{FILES['adapter']}")
    assert f"{served}/lora" in refusal(capsys, "convert", f"{served}/src", "no", *options, *SMALL, "--quiet")


def test_what_follows_the_query_of_an_adapter_is_its_weight(folder):
    """And no query is kept beside a run, or shown."""
    (word,) = _read_given(["https://host/lora?sig=hunter2@0.5"])
    path, weight = _split(word)
    assert (word, path, weight) == ("https://host/lora@0.5", "https://host/lora", 0.5)
    assert isinstance(path, Shown)  # as which its query is not forgotten
    assert private(path) == "https://host/lora?sig=hunter2"
    urls = {"graft": "https://host/donor?sig=hunter2", "sidecars_from": "https://host/base?sig=hunter2"}
    kept = PlanOptions("src", "out", adapter=["https://host/lora?sig=hunter2@0.5"], **urls).identity()
    assert (kept["adapter"], kept["graft"], kept["sidecars_from"]) == (["https://host/lora@0.5"], "https://host/donor", "https://host/base")


def test_all_sources_are_named(folder, capsys):
    assert run("plan", "src", "out", *BOTH, *SMALL) == 0
    shown = capsys.readouterr().out
    reads = next(line for line in shown.splitlines() if line.startswith("  reads "))
    assert {"src/model-[00001-00003]-of-00003.safetensors x3", *FILES.values()} <= set(re.split(r"[:,] ", reads.strip()))
    assert "  note: --adapter lora: 14 " in shown
    assert "  note: --graft donor: 10 of its 10 tensors, " in shown
    paths = {
        Path(source.path) for source in Plan.from_json(streamconv.plan("src", "out", adapter=["lora"], max_memory=ROOMY).to_json()).sources
    }
    assert folder / FILES["adapter"] in {path.absolute() for path in paths}
    assert run("convert", "src", "out", *BOTH, *SMALL, "--report", "page.html", "--quiet") == 0
    page = (folder / "page.html").read_text()
    assert "lora: 14 " in page
    assert '["graft", "donor"]' in page
    for command in ("verify", "diff"):
        assert run(command, "src", "out", *BOTH, "--max-memory", ROOMY, "--report", "page.html", "--no-progress") == 0
        assert "note: --adapter lora: 14 " in capsys.readouterr().out
        assert "donor: 10 of its 10 tensors" in (folder / "page.html").read_text()
        assert run(command, "src", "out", *BOTH, "--max-memory", ROOMY, "--json", "--no-progress") == 0
        assert len(json.loads(capsys.readouterr().out)["notes"]) == 2
