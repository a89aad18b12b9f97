"""Checkpoints behind URLs: what is listed and read of them, how much of it, and what is said where something is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from checkpoint_files import ROOMY, assert_same, numbered, read_any, refusal, run, write, write_bin, write_ckpt
from fsspec.implementations.memory import MemoryFileSystem
from hub_server import hub
from servers import Fault, computed, flaky, nginx, s3, silent_port, unavailable

import streamconv
from streamconv import StreamconvError
from streamconv.advice import matching
from streamconv.checkpoint.opening import Checkpoint
from streamconv.diagnose.doctor import examine
from streamconv.storage import retries
from streamconv.storage.folder import IrregularFile
from streamconv.storage.locations import locate
from tools.range_server import Handler, Request, Server

SECRET = "hunter2"
CONFIG = {"model_type": "nothing", "architectures": ["Nothing"], "dtype": "float32"}
SHAPES = {f"layers.{k}.weight": (8, 4 + k) for k in range(12)} | {"embedding.weight": (40, 4), "step": ()}


def _sharded_bin(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    names, weight_map = list(tensors), {}
    for k in range(3):
        file = f"pytorch_model-{k + 1:05d}-of-00003.bin"
        torch.save({name: tensors[name] for name in names[k::3]}, folder / file)
        weight_map |= dict.fromkeys(names[k::3], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tensors in every container, with files beside them."""
    root, tensors = tmp_path_factory.mktemp("served"), numbered(SHAPES)
    found = {name: root / name for name in ("safetensors", "torch", "legacy", "mindspore", "sat")}
    write(found["safetensors"], tensors, shards=3, config=CONFIG)
    write_bin(found["torch"], {}, config=CONFIG)
    (found["torch"] / "pytorch_model.bin").unlink()
    _sharded_bin(found["torch"], tensors)
    write_bin(found["legacy"], {}, config=CONFIG)
    torch.save(tensors, found["legacy"] / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    write_ckpt(found["mindspore"], tensors, config=CONFIG)
    (found["sat"] / "7").mkdir(parents=True)
    for rank in range(2):
        torch.save({"module": tensors, "iteration": 7}, found["sat"] / f"7/mp_rank_{rank:02}_model_states.pt")
    (found["sat"] / "latest").write_text("7")
    (found["sat"] / "model_config.json").write_text(json.dumps(CONFIG))
    for folder in found.values():
        (folder / "tokenizer.json").write_text("{}")
        (folder / "assets").mkdir()
        (folder / "assets" / "a note, 100%.txt").write_text("read me")
    return found


@pytest.fixture
def memory(kinds: dict[str, Path]) -> Iterator[str]:
    """The folders in fsspec's file system in memory."""
    files = MemoryFileSystem()
    root = kinds["torch"].parent
    for path in (path for path in root.rglob("*") if path.is_file()):
        files.pipe_file(f"/served/{path.relative_to(root).as_posix()}", path.read_bytes())
    yield "memory://served"
    files.store.clear()


def same(found: Checkpoint, wanted: Checkpoint) -> None:
    """The same tensors, values, sidecars, ties and config."""
    assert list(found) == list(wanted)
    assert found.format == wanted.format
    assert found.sidecars == wanted.sidecars
    assert found.config == wanted.config
    assert found.ties == wanted.ties
    assert found.metadata == wanted.metadata
    assert found.contents.notes == wanted.contents.notes
    for name in (*list(found)[:2], *list(found)[-2:]):
        assert [(extent.offset, extent.nbytes) for extent in found[name].source.extents] == [
            (extent.offset, extent.nbytes) for extent in wanted[name].source.extents
        ]
        assert torch.equal(found[name].torch(), wanted[name].torch())


CONTAINERS = ["safetensors", "torch", "legacy", "mindspore", "sat"]


@pytest.mark.parametrize("name", CONTAINERS)
class TestEveryContainer:
    def test_in_a_file_system_of_fsspec(self, kinds, memory, name):
        same(streamconv.open(f"{memory}/{name}"), streamconv.open(kinds[name]))

    def test_on_a_server_with_listings(self, kinds, name):
        with nginx(kinds[name].parent, autoindex=True) as server:
            same(streamconv.open(f"{server.url}/{name}/"), streamconv.open(kinds[name]))
            same(streamconv.open(f"{server.url}/{name}"), streamconv.open(kinds[name]))
            same(streamconv.open(f"{server.url}/moved/{name}"), streamconv.open(kinds[name]))

    def test_on_a_server_without(self, kinds, name):
        with nginx(kinds[name]) as server:
            found, wanted = streamconv.open(server.url), streamconv.open(kinds[name])
            assert_same({tensor: found[tensor].torch() for tensor in found}, {tensor: wanted[tensor].torch() for tensor in wanted})
            assert found.config == wanted.config
            assert set(found.sidecars) == set(wanted.sidecars) - {"assets/a note, 100%.txt"}

    def test_on_the_hub(self, kinds, name, monkeypatch):
        with hub({"org/model": kinds[name]}) as server:
            server.patch(monkeypatch)
            found = streamconv.open("hf://org/model")
            same(found, streamconv.open(kinds[name]))
            commit = server.log("org/model")[0].oid
            assert str(found.path) == f"hf://org/model@{commit}"

    def test_plan_and_doctor_say_what_they_say_of_the_folder(self, kinds, memory, name, tmp_path):
        url, folder = f"{memory}/{name}", kinds[name]
        far, near = (streamconv.plan(source, tmp_path / "out", max_memory=ROOMY) for source in (url, folder))
        assert [(source.path.removeprefix(url), source.size) for source in far.sources] == [
            (source.path.removeprefix(str(folder)), source.size) for source in near.sources
        ]
        assert far.files == near.files
        assert far.notes == near.notes
        assert str(examine(url)).replace(url, str(folder)) == str(examine(folder))


def test_one_file_has_the_config_beside_it(kinds, memory):
    near = streamconv.open(kinds["safetensors"] / "model-00001-of-00003.safetensors")
    same(streamconv.open(f"{memory}/safetensors/model-00001-of-00003.safetensors"), near)
    with nginx(kinds["safetensors"]) as server:
        same(streamconv.open(f"{server.url}/model-00001-of-00003.safetensors"), near)
        assert not any("00002" in request.path for request in server.requests)


def test_rows_and_pieces(kinds, memory):
    far, near = streamconv.open(f"{memory}/torch"), streamconv.open(kinds["torch"])
    assert torch.equal(far["embedding.weight"].torch(slice(3, 9)), near["embedding.weight"].torch(slice(3, 9)))
    assert (far["embedding.weight"].numpy(slice(30, None)) == near["embedding.weight"].numpy(slice(30, None))).all()
    numbers = np.concatenate([*far["embedding.weight"].pieces(64)])
    assert torch.equal(torch.from_numpy(numbers), near["embedding.weight"].torch().flatten())


def test_a_scheme_of_ones_own(kinds):
    class Ours(MemoryFileSystem):
        """Tells sizes and nothing else, and reads by ranges only."""

        protocol = "ours"
        store: dict[str, object] = {}  # noqa: RUF012 - as the class above has it
        read = 0

        def info(self, path: str, **_options: object) -> dict[str, object]:
            found = super().info(path)
            return {key: found[key] for key in ("name", "size", "type")}

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_options: object) -> bytes:
            assert start is not None
            assert end is not None
            Ours.read += end - start
            with MemoryFileSystem.open(self, path) as file:
                file.seek(start)
                return bytes(file.read(end - start))

    fsspec.register_implementation("ours", Ours, clobber=True)
    files = fsspec.filesystem("ours")
    for path in (path for path in kinds["safetensors"].rglob("*") if path.is_file()):
        files.pipe_file(f"ours://bucket/{path.relative_to(kinds['safetensors']).as_posix()}", path.read_bytes())
    same(streamconv.open("ours://bucket"), streamconv.open(kinds["safetensors"]))
    assert Ours.read < 20_000


def test_a_file_url_is_a_path(kinds):
    assert locate(f"file://{kinds['torch']}").local == kinds["torch"]
    same(streamconv.open(f"file://{kinds['torch']}"), streamconv.open(kinds["torch"]))


def test_an_object_store(kinds, monkeypatch):
    s3fs = pytest.importorskip("s3fs")
    with s3() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        server.put_folder(kinds["torch"], "models/tiny/")
        same(streamconv.open(f"{server.url}/models/tiny"), streamconv.open(kinds["torch"]))
        assert len(server.requests) < 40
        assert "no such file" in refused(f"{server.url}/models/tin")
        assert "no such file" in refused("s3://nobucket/model")
        s3fs.S3FileSystem.clear_instance_cache()


# What it takes -------------------------------------------------------------------------------------------------------

MANY = 160


@pytest.fixture(scope="module")
def enormous():
    """A server of 160 files of 4.3 GB each."""
    with computed({f"layers.{k}.weight": ("bfloat16", (65536, 32768)) for k in range(MANY)}, max_shard_size="5GB") as server:
        yield server


def spent(server: object, before: int) -> list[Request]:
    """The requests since there were so many, without those that ask how many."""
    return [request for request in server.requests[before:] if request.path != "/.requests"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("what", ["inspect", "plan", "doctor"])
def test_looking_at_700_gb_costs_little(enormous, what, tmp_path, capsys):
    before = len(enormous.requests)
    if what == "doctor":  # what the command does beside is to look for recipes
        assert examine(enormous.url).tensors == MANY
    else:
        assert run(what, enormous.url, *([tmp_path / "out"] if what == "plan" else []), "--json") == 0
        assert "layers.159.weight" in capsys.readouterr().out
    found = spent(enormous, before)
    assert sum(request.sent for request in found) < 3_000_000
    assert len(found) < 2.5 * MANY + 60
    assert not list(tmp_path.iterdir())


def test_a_file_of_many_storages_costs_few_requests(tmp_path):
    torch.save({f"layers.{k}.weight": torch.full((40, k % 7 + 1), k) for k in range(600)}, tmp_path / "pytorch_model.bin")
    with nginx(tmp_path, autoindex=True) as server:
        same(streamconv.open(server.url), streamconv.open(tmp_path))
        assert len([request for request in server.requests if request.path == "/pytorch_model.bin"]) < 12


def test_a_zip_that_others_wrote_is_read_header_by_header(tmp_path):
    import zipfile

    torch.save({f"layers.{k}.weight": torch.full((50, 1), float(k)) for k in range(30)}, tmp_path / "made.pt")
    with zipfile.ZipFile(tmp_path / "made.pt") as old, zipfile.ZipFile(tmp_path / "packed.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    (tmp_path / "made.pt").unlink()
    with nginx(tmp_path) as server:
        same(streamconv.open(f"{server.url}/packed.pt"), streamconv.open(tmp_path / "packed.pt"))


# Servers that fail ---------------------------------------------------------------------------------------------------


def refused(url: str) -> str:
    """The one line with which a URL is refused."""
    with pytest.raises(StreamconvError) as caught:
        streamconv.open(url)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def impatient(monkeypatch):
    """No waiting between attempts."""
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", ["safetensors", "torch"])
def test_a_server_that_fails_now_and_then(kinds, name):
    with nginx(kinds[name], autoindex=True) as server, flaky(server.url) as proxy:
        proxy.every = 3
        proxy.faults = [unavailable(), unavailable("0"), *(Fault(cut=size, reset=reset) for size in (0, 5, 100) for reset in (False, True))]
        same(streamconv.open(proxy.url), streamconv.open(kinds[name]))
        assert proxy.injected > 3


def test_what_a_server_does_not_give(kinds):
    with nginx(kinds["safetensors"]) as server:
        for place in ("noranges/", "noranges/model-00001-of-00003.safetensors"):
            assert "knows no ranges: download" in refused(f"{server.url}/{place}")
        for place in ("forbidden/", "forbidden/model.safetensors"):
            assert "access is denied (HTTP 403)" in refused(f"{server.url}/{place}")
        assert "without credentials (HTTP 401)" in refused(f"{server.url}/private/")
        for place in ("nothing/", "nothing.safetensors"):
            assert "no such file or directory (HTTP 404)" in refused(f"{server.url}/{place}")
        (missing := kinds["safetensors"] / "model-00002-of-00003.safetensors").rename(missing.with_suffix(".gone"))
        assert "model-00002-of-00003.safetensors: no such file" in refused(server.url)
        missing.with_suffix(".gone").rename(missing)


def test_a_page_about_something_else_is_no_listing(kinds, tmp_path):
    shutil.copytree(kinds["safetensors"], tmp_path / "site")
    (tmp_path / "site" / "index.html").write_text("<p>See <a href='about.html'>this</a> and <a href='../other/'>that</a>")
    with nginx(tmp_path / "site") as server:
        assert list(streamconv.open(server.url)) == list(streamconv.open(kinds["safetensors"]))


def test_too_many_folders(tmp_path):
    for k in range(300):
        (tmp_path / f"model-{k}").mkdir()
    with nginx(tmp_path, autoindex=True) as server:
        assert "there are 300 folders below it" in refused(server.url)


def test_an_untrusted_certificate(kinds):
    with nginx(kinds["safetensors"], tls=True) as server:
        assert "set REQUESTS_CA_BUNDLE" in refused(f"{server.url}/model.safetensors")


def test_a_trusted_certificate(kinds, monkeypatch):
    with nginx(kinds["safetensors"], tls=True, autoindex=True) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        same(streamconv.open(server.url), streamconv.open(kinds["safetensors"]))


def test_a_login_in_netrc(kinds, tmp_path, monkeypatch):
    with nginx(kinds["safetensors"], user="me", password=SECRET) as server:
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
        (tmp_path / "netrc").chmod(0o600)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        found = streamconv.open(f"{server.url}/private")
        assert torch.equal(found["step"].torch(), streamconv.open(kinds["safetensors"])["step"].torch())


def test_nobody_there(impatient, capsys):
    with silent_port() as port:
        assert run("inspect", f"http://127.0.0.1:{port}/model.safetensors") == 3
    assert capsys.readouterr().err == (
        f"streamconv: error: http://127.0.0.1:{port}/model.safetensors: no answer (Connection refused, attempts: 4): "
        "check the address and the network, then try again\n"
    )


def test_an_unknown_scheme(capsys):
    assert "no store of that kind is known" in refusal(capsys, "inspect", "gopher://somewhere/model")


def test_a_package_that_is_missing():
    needed = {"s3": "s3fs", "gs": "gcsfs", "https": "requests", "hf": "huggingface_hub", "memory": "fsspec"}
    code = f"""
import sys
from streamconv.cli.command import main
for scheme, package in {needed}.items():
    sys.modules[package] = None
    assert main(["inspect", scheme + "://org/model"]) == 2
    del sys.modules[package]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    lines = (
        f"streamconv: error: {scheme}:// needs the package {name}: pip install 'streamconv[remote]'" for scheme, name in needed.items()
    )
    assert done.stderr.splitlines() == [*lines]


def test_nothing_of_it_is_imported_for_paths(kinds):
    code = (
        "import sys, streamconv\n"
        f"streamconv.plan({str(kinds['safetensors'])!r}, 'nowhere-to-be-written', max_memory='4GB')\n"
        "print([name for name in ('fsspec', 'requests', 'huggingface_hub', 'ssl', 'http.client') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout == "[]\n"


# Secrets -------------------------------------------------------------------------------------------------------------


class Signed(Handler):
    """Gives its folder's files to those who have the signature in the query."""

    folder: Path

    def answer(self) -> None:
        path, _, query = self.path.partition("?")
        file = self.folder / path.strip("/")
        if query != f"sig={SECRET}":
            self.send_text(403, f"no {SECRET}")
        elif not file.is_file():
            self.send_text(404)
        else:
            data = file.read_bytes()
            self.send_range(len(data), "1", lambda start, stop: [data[start:stop]])


@pytest.fixture
def signed(kinds):
    handler = type("Own", (Signed,), {"folder": kinds["safetensors"]})
    with Server(handler) as server:
        yield server


def test_a_signature_is_used_and_never_shown(signed, kinds, tmp_path, capsys):
    url = f"{signed.url}/?sig={SECRET}"
    out = tmp_path / "out"
    assert run("inspect", url, "--json") == 0
    assert run("doctor", url) in (0, 1)
    assert run("plan", url, out, "--json", "--out", tmp_path / "plan.json") == 0
    assert run("convert", url, out, "-v", "--report", tmp_path / "page.html") == 0
    assert run("verify", url, out, "--report", tmp_path / "second.html") == 0
    assert run("recipes", "--match", url) in (0, 2)
    (out / "model.safetensors").unlink()
    assert run("convert", url, out, "-v") == 2
    assert_same(read_any(kinds["safetensors"]), {name: entry.torch() for name, entry in streamconv.open(url).items()})
    said = capsys.readouterr()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 3
    for text in (said.out, said.err, *(path.read_text("utf-8", "replace") for path in written)):
        assert SECRET not in text
    assert f"{signed.url}/model-00001-of-00003.safetensors" in (tmp_path / "plan.json").read_text()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("what", ["expired", "gone", "no server", "in the name"])
def test_a_refusal_shows_no_signature(signed, what, capsys):
    with silent_port() as port:
        url = {
            "expired": f"{signed.url}/?sig={SECRET}%20old",
            "gone": f"{signed.url}/gone.safetensors?sig={SECRET}",
            "no server": f"http://127.0.0.1:{port}/model.safetensors?sig={SECRET}",
            "in the name": signed.url.replace("//", f"//me:{SECRET}@"),
        }[what]
        assert run("inspect", url, "-v") in (2, 3)
        assert run("convert", url, "nowhere", "-v") in (2, 3)
        with pytest.raises(StreamconvError) as caught:
            streamconv.open(url)
    said = capsys.readouterr()
    assert "Traceback" in said.err
    for text in (said.out, said.err, repr(caught.value), "".join(traceback.format_exception(caught.value))):
        assert SECRET not in text


def test_what_a_query_means_elsewhere_is_not_guessed(memory):
    message = refused(f"{memory}/torch?{SECRET}")
    assert "has no query" in message
    assert SECRET not in message


# The Hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(kinds, monkeypatch):
    with hub({"org/model": kinds["safetensors"]}) as server:
        server.patch(monkeypatch)
        yield server


def test_a_revision_is_what_it_was_when_it_was_opened(repository, kinds):
    found, commit = streamconv.open("hf://org/model"), repository.log("org/model")[0].oid
    repository.put("org/model", {"model-00001-of-00003.safetensors": b"other", "config.json": b"{}"})
    same(found, streamconv.open(kinds["safetensors"]))
    same(streamconv.open(f"hf://org/model@{commit}"), streamconv.open(kinds["safetensors"]))
    assert "model-00001-of-00003.safetensors" in refused("hf://org/model@main")
    repository.repos["org/model"].refs["refs/pr/3"] = commit
    same(streamconv.open("hf://org/model@refs/pr/3"), streamconv.open(kinds["safetensors"]))


def test_files_and_folders_of_a_repository(repository, kinds):
    near = streamconv.open(kinds["safetensors"] / "model-00002-of-00003.safetensors")
    same(streamconv.open("hf://org/model/model-00002-of-00003.safetensors"), near)
    repository.put("org/model", {f"old/{path.name}": path.read_bytes() for path in kinds["safetensors"].iterdir() if path.is_file()})
    found = streamconv.open("hf://org/model/old")
    assert list(found) == list(streamconv.open(kinds["safetensors"]))
    assert found.sidecars == ["config.json", "tokenizer.json"]


def test_a_page_of_the_hub_is_its_repository(repository, kinds):
    for page in ("", "/", "/tree/main"):
        same(streamconv.open(f"https://huggingface.co/org/model{page}"), streamconv.open(kinds["safetensors"]))
    file = "model-00002-of-00003.safetensors"
    same(streamconv.open(f"https://huggingface.co/org/model/blob/main/{file}"), streamconv.open(kinds["safetensors"] / file))


def test_tokens_open_what_is_private(repository, kinds, monkeypatch):
    for name, settings in (("org/private", {"private": True}), ("org/gated", {"gated": True})):
        repository.add(name, kinds["safetensors"], **settings)
        same(streamconv.open(f"hf://{name}"), streamconv.open(kinds["safetensors"]))
    monkeypatch.setenv("HF_TOKEN", repository.read_token)
    assert "set HF_TOKEN" in (message := refused("hf://org/private"))
    assert repository.read_token not in message
    assert "accept the model's terms" in refused("hf://org/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "hf_expired" not in refused("hf://org/private")


def test_what_the_hub_does_not_have(repository):
    assert "no such repository" in refused("hf://org/other")
    assert "no such revision" in refused("hf://org/model@other")
    assert "no such file" in refused("hf://org/model/other.safetensors")
    assert "expected hf://organization/name" in refused("hf:///org")


@pytest.mark.usefixtures("impatient")
def test_a_hub_that_fails_now_and_then(repository, kinds, monkeypatch):
    with flaky(repository.url) as proxy, flaky(repository.cdn.url, host="127.0.0.2") as cdn:
        repository.endpoint, repository.cdn_url = proxy.url, cdn.url
        repository.patch(monkeypatch)
        for server in (proxy, cdn):
            server.every, server.faults = 3, [unavailable(), Fault(drop=True), Fault(cut=7)]
        same(streamconv.open("hf://org/model"), streamconv.open(kinds["safetensors"]))
        assert proxy.injected
        assert cdn.injected


def test_offline_the_cache_is_what_there_is(repository, kinds, monkeypatch):
    from huggingface_hub import snapshot_download

    snapshot_download("org/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(repository.requests)
    found = streamconv.open("hf://org/model")
    same(found, streamconv.open(kinds["safetensors"]))
    assert found.location.local is not None
    assert "not in the local cache, and HF_HUB_OFFLINE is set" in refused("hf://org/other")
    assert len(repository.requests) == asked


# Plans ---------------------------------------------------------------------------------------------------------------


def test_sidecars_come_from_a_url_too(kinds, memory, tmp_path):
    (tmp_path / "model").mkdir()
    near = write(tmp_path / "bare", numbered(SHAPES))
    made = streamconv.plan(near, tmp_path / "out", sidecars_from=f"{memory}/torch", max_memory=ROOMY)
    assert {f"{memory}/torch/config.json", f"{memory}/torch/tokenizer.json"} <= {source.path for source in made.sources}
    with pytest.raises(streamconv.UsageError, match="not a directory"):
        streamconv.plan(near, tmp_path / "out", sidecars_from=f"{memory}/torch/config.json", max_memory=ROOMY)


def test_recipes_are_found_by_the_config_behind_a_url(tmp_path, memory):
    layer = {f"self_attn.{part}_proj": (16, 16) for part in "qkvo"} | {"mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16)}
    layer |= {"mlp.down_proj": (16, 24), "input_layernorm": (16,), "post_attention_layernorm": (16,)}
    shapes = {f"model.layers.{k}.{name}.weight": shape for k in range(2) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,), "lm_head.weight": (40, 16)}
    config = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40}
    near = write(tmp_path / "llama", numbered(shapes), config=config)
    for path in near.iterdir():
        MemoryFileSystem().pipe_file(f"/served/llama/{path.name}", path.read_bytes())
    assert matching.match_recipes(f"{memory}/llama") == matching.match_recipes(near)
    assert "llama-hf2meta" in matching.suggest_recipes(f"{memory}/llama", streamconv.open(f"{memory}/llama"))


def test_folders_behind_urls_are_like_folders(memory, kinds):
    near = locate(kinds["safetensors"]).folder
    far = locate(f"{memory}/safetensors").folder
    assert (near.local, far.local) == (kinds["safetensors"], None)
    assert sorted(far.list()) == sorted(near.list())
    for folders in (far.walk(), near.walk()):
        walked = {inner: (sorted(inside), sorted(files)) for inner, inside, files in folders}
        assert walked.keys() == {"", "assets"}
        assert "assets" in walked[""][0]
        assert walked["assets"] == ([], ["a note, 100%.txt"])
    for folder in (far, near):
        file = folder.file("assets/a note, 100%.txt")
        assert (file.name, file.suffix, file.size, file.is_folder) == ("a note, 100%.txt", ".txt", 7, False)
        assert str(file) == f"{folder.url}/assets/a note, 100%.txt"
        assert folder.folder("assets").file(file.name).below(folder) == file.relative
        assert folder.folder("") is folder
        assert [folder.has(name) for name in ("assets", file.relative, "nothing")] == [True, True, False]
        assert [folder.has_file(name) for name in ("assets", file.relative, "nothing")] == [False, True, False]
        assert [folder.has_folder(name) for name in ("assets", file.relative, "nothing")] == [True, False, False]
        with pytest.raises(FileNotFoundError):
            folder.open("nothing")
        with pytest.raises(IrregularFile):
            folder.open("assets")
        with closing(folder.open(file.relative)) as opened:
            assert (opened.size, opened.pread(4, 5), opened.tell()) == (7, b"me", 0)
            assert opened.seek(-2, os.SEEK_END) == 5
            assert opened.read(10) == b"me"
            assert opened.read(10) == b""


def test_a_plan_is_of_the_files_whose_headers_were_read(kinds, tmp_path):
    folder = tmp_path / "served"
    shutil.copytree(kinds["safetensors"], folder)
    with nginx(folder, autoindex=True) as server:
        source = locate(server.url)
        streamconv.open(source)
        file = folder / "model-00001-of-00003.safetensors"
        file.write_bytes(file.read_bytes() + b" ")
        made = streamconv.plan(source, tmp_path / "out", max_memory=ROOMY)
        with pytest.raises(streamconv.SourceChanged, match="model-00001"):
            streamconv.run(made)


@pytest.mark.parametrize("url", ["s3://", "hf://", "https://", "memory://", "gs:///"])
def test_a_scheme_alone_names_no_place(url, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "src", numbered({"a": (2, 3)}))
    assert "names no place" in refusal(capsys, "convert", source, url)
    assert "names no place" in refusal(capsys, "convert", url, tmp_path / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]
