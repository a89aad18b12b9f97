"""The servers that other tests rely on, as the ecosystem's own clients see them."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import servers
import torch
from safetensors import safe_open
from servers import Fault, flaky, nginx, unavailable

from tools import range_server

DATA = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    (folder / "model.bin").write_bytes(DATA)
    (folder / "config.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "small.txt").write_text("small")
    return folder


@pytest.fixture(scope="module")
def web(root: Path) -> Iterator[servers.Nginx]:
    with nginx(root, elsewhere="http://127.0.0.2:1") as server:
        yield server


def get(url: str, first: int | None = None, last: int | None = None, /, **headers: str) -> requests.Response:
    if first is not None:
        headers["Range"] = f"bytes={first}-{'' if last is None else last}"
    return requests.get(url, headers={"Accept-Encoding": "identity", **headers}, timeout=10)


def logged(server: servers.Nginx, path: str, number: int) -> list[servers.Request]:
    """The requests of nginx for a path, once it has written so many; a log line follows the answer."""
    until = time.monotonic() + 120
    while len(found := [r for r in server.requests if r.path == path]) < number and time.monotonic() < until:
        time.sleep(0.01)
    return found


# ---------------------------------------------------------------------------------------------------------------------------------
# nginx


def test_nginx_serves_ranges_and_tells_of_them(web: servers.Nginx) -> None:
    url = f"{web.url}/model.bin?logged"
    whole = get(url)
    assert whole.status_code == 200
    assert whole.content == DATA
    assert whole.headers["Accept-Ranges"] == "bytes"
    part = get(url, 1000, 1999)
    assert part.status_code == 206
    assert part.content == DATA[1000:2000]
    assert part.headers["Content-Range"] == f"bytes 1000-1999/{len(DATA)}"
    assert part.headers["ETag"] == whole.headers["ETag"]
    assert get(url, len(DATA)).status_code == 416
    seen = logged(web, "/model.bin?logged", 3)
    assert [(r.method, r.range, r.status) for r in seen] == [
        ("GET", None, 200),
        ("GET", (1000, 1999), 206),
        ("GET", (len(DATA), None), 416),
    ]
    assert [r.sent for r in seen[:2]] == [len(DATA), 1000]


def test_nginx_places(web: servers.Nginx) -> None:
    ignored = get(f"{web.url}/noranges/model.bin", 5, 9)
    assert (ignored.status_code, len(ignored.content)) == (200, len(DATA))
    assert get(f"{web.url}/forbidden/model.bin").status_code == 403
    assert get(f"{web.url}/").status_code == 403
    assert get(f"{web.url}/nothing").status_code == 404
    assert get(f"{web.url}/private/config.json").status_code == 401
    assert requests.get(f"{web.url}/private/config.json", auth=("user", "wrong"), timeout=10).status_code == 401
    assert requests.get(f"{web.url}/private/config.json", auth=("user", "password"), timeout=10).text == "{}"
    assert get(f"{web.url}/moved/config.json").text == "{}"
    there = requests.get(f"{web.url}/elsewhere/config.json", timeout=10, allow_redirects=False)
    assert (there.status_code, there.headers["Location"]) == (302, "http://127.0.0.2:1/config.json")


def test_nginx_variants(root: Path) -> None:
    with nginx(root, autoindex=True, ranges=False, etag=False, rate="700k") as server:
        assert 'href="model.bin"' in get(f"{server.url}/").text
        started = time.monotonic()
        answer = get(f"{server.url}/model.bin", 0, 9)
        assert (answer.status_code, len(answer.content)) == (200, len(DATA))
        assert time.monotonic() - started > 0.3  # the first second's bytes come at once
        assert "ETag" not in answer.headers
        curl = subprocess.run(["curl", "-sf", f"{server.url}/config.json"], check=True, capture_output=True, timeout=10)
        assert curl.stdout == b"{}"
        port = int(server.url.rpartition(":")[2])
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), 1):
        pass
    assert not server.temp.exists()


def test_nginx_over_tls(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with nginx(root, tls=True) as server:
        assert server.url.startswith("https://")
        with pytest.raises(requests.exceptions.SSLError):
            get(f"{server.url}/config.json")
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        assert get(f"{server.url}/model.bin", 5, 9).content == DATA[5:10]
        curl = subprocess.run(["curl", "-sf", f"{server.url}/config.json"], check=True, capture_output=True, timeout=10)
        assert curl.stdout == b"{}"


# ---------------------------------------------------------------------------------------------------------------------------------
# The proxy


def test_proxy_passes_all_and_counts(web: servers.Nginx) -> None:
    with flaky(f"{web.url}/sub") as proxy:
        assert proxy.url.endswith("/sub")
        answer = get(f"{proxy.url}/small.txt", Authorization="Bearer secret")
        assert answer.text == "small"
        assert answer.headers["ETag"] == get(f"{web.url}/sub/small.txt").headers["ETag"]
        head = requests.head(f"{proxy.url}/small.txt", timeout=10)
        assert (head.status_code, head.headers["Content-Length"]) == (200, "5")
        assert [(r.method, r.path, r.status, r.sent, r.fault) for r in proxy.requests] == [
            ("GET", "/sub/small.txt", 200, 5, ""),
            ("HEAD", "/sub/small.txt", 200, 0, ""),
        ]
        assert proxy.requests[0].headers["authorization"] == "Bearer secret"
        assert (proxy.sent, proxy.injected) == (5, 0)
        proxy.forget()
        assert proxy.requests == []


def test_proxy_takes_turns(web: servers.Nginx) -> None:
    with flaky(web.url, unavailable(), unavailable("3"), every=2) as proxy:
        answers = [get(f"{proxy.url}/config.json") for _ in range(6)]
        assert [a.status_code for a in answers] == [200, 503, 200, 503, 200, 503]
        assert [a.headers.get("Retry-After") for a in answers[1::2]] == [None, "3", None]
        assert proxy.injected == 3
        proxy.every, proxy.first, proxy.faults = 0, 7, [Fault(status=429)]  # the first six are over
        assert [get(f"{proxy.url}/config.json").status_code for _ in range(2)] == [429, 200]
        proxy.first, proxy.only = 0, lambda r: r.range is not None
        assert get(f"{proxy.url}/config.json").status_code == 200
        assert get(f"{proxy.url}/config.json", 0, 1).status_code == 429


def test_proxy_draws_the_same_from_the_same_seed(web: servers.Nginx) -> None:
    def statuses(seed: int) -> list[int]:
        with flaky(web.url, unavailable(), probability=0.5, seed=seed) as proxy:
            return [get(f"{proxy.url}/config.json").status_code for _ in range(16)]

    assert statuses(1) == statuses(1)
    assert statuses(1) != statuses(2)
    assert set(statuses(1)) == {200, 503}


@pytest.mark.parametrize("reset", [False, True])
def test_cut_connections(web: servers.Nginx, reset: bool) -> None:
    with flaky(web.url, Fault(cut=300_000, reset=reset)) as proxy:
        with requests.get(f"{proxy.url}/model.bin", stream=True, timeout=10) as answer:
            assert int(answer.headers["Content-Length"]) == len(DATA)
            got = b""
            with pytest.raises(Exception, match="reset" if reset else "IncompleteRead"):  # noqa: PT012
                while piece := answer.raw.read(1000):
                    got += piece
            assert DATA.startswith(got)
            assert len(got) <= 300_000
            if not reset:  # a reset throws away what is under way
                assert len(got) == 300_000
        assert proxy.requests[0].sent == 300_000
        assert proxy.requests[0].fault.startswith("cut=300000")


def test_dropped_lost_and_stalled(web: servers.Nginx) -> None:
    with flaky(web.url, Fault(drop=True), Fault(lose=True), Fault(delay=600), Fault(cut=100, stall=600)) as proxy:
        for name in ("dropped", "lost"):
            with pytest.raises(requests.ConnectionError):
                get(f"{proxy.url}/config.json?{name}")
        assert len(logged(web, "/config.json?lost", 1)) == 1
        assert logged(web, "/config.json?dropped", 0) == []
        with pytest.raises(requests.Timeout):
            requests.get(f"{proxy.url}/config.json", timeout=0.1)
        with pytest.raises(requests.RequestException, match="timed out"):
            requests.get(f"{proxy.url}/model.bin", timeout=0.1)
        proxy.faults = [Fault(cut=100, stall=0.01)]
        assert get(f"{proxy.url}/model.bin").content == DATA


def test_changed_answers(web: servers.Nginx) -> None:
    with flaky(
        web.url, Fault(shorten=10), Fault(headers={"ETag": '"new"'}), Fault(headers={"ETag": ""}), Fault(without=("range",))
    ) as proxy:
        short = get(f"{proxy.url}/model.bin", 100, 199)
        assert (short.content, short.headers["Content-Range"]) == (DATA[100:190], f"bytes 100-189/{len(DATA)}")
        assert get(f"{proxy.url}/model.bin", 0, 1).headers["ETag"] == '"new"'
        assert "ETag" not in get(f"{proxy.url}/model.bin", 0, 1).headers
        assert get(f"{proxy.url}/model.bin", 0, 1).status_code == 200


def test_proxy_counts_concurrency_and_limits_the_rate(web: servers.Nginx) -> None:
    with flaky(web.url) as proxy:
        together = threading.Barrier(4)  # none is answered before all have come
        proxy.faults, proxy.only = [Fault()], lambda _: bool(together.wait(120) < 0)
        threads = [threading.Thread(target=get, args=(f"{proxy.url}/config.json",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert proxy.peak == 4
        proxy.faults, proxy.rate = (), 4e6
        started = time.monotonic()
        assert get(f"{proxy.url}/model.bin").content == DATA
        assert time.monotonic() - started > 0.2


def test_another_host_gets_no_token(web: servers.Nginx, root: Path) -> None:
    with flaky(web.url, host="127.0.0.2") as other, nginx(root, elsewhere=other.url) as first, flaky(first.url) as here:
        assert get(f"{here.url}/elsewhere/config.json", Authorization="Bearer secret").text == "{}"
        assert "authorization" in here.requests[0].headers
        assert "authorization" not in other.requests[0].headers


# ---------------------------------------------------------------------------------------------------------------------------------
# S3


@pytest.fixture(scope="module")
def store() -> Iterator[servers.S3]:
    with servers.s3() as server:
        yield server


@pytest.fixture
def s3fs_there(store: servers.S3, monkeypatch: pytest.MonkeyPatch) -> Any:
    import s3fs  # type: ignore[import-untyped]

    for name, value in store.env.items():
        monkeypatch.setenv(name, value)
    store.clear()
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3fs.S3FileSystem()
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3_through_s3fs(store: servers.S3, s3fs_there: Any) -> None:
    store.put("in/model.bin", DATA)
    assert s3fs_there.info(f"{store.bucket}/in/model.bin")["size"] == len(DATA)
    assert s3fs_there.cat_file(f"{store.url}/in/model.bin", start=1000, end=2000) == DATA[1000:2000]
    part = next(r for r in store.requests if r.range is not None)
    assert (part.range, part.status, part.sent) == ((1000, 1999), 206, 1000)
    with s3fs_there.open(f"{store.bucket}/out/model.bin", "wb", block_size=5 << 20) as file:
        for _ in range(11):
            file.write(DATA)
        assert store.uploads() == ["out/model.bin"]
    assert store.uploads() == []
    assert store.keys("out/") == ["out/model.bin"]
    assert store.get("out/model.bin") == DATA * 11
    with pytest.raises(FileNotFoundError):
        s3fs_there.info(f"{store.bucket}/in/nothing")


def test_s3_uploads_that_are_left(store: servers.S3, s3fs_there: Any) -> None:
    file = s3fs_there.open(f"{store.bucket}/out/left.bin", "wb", block_size=5 << 20)
    file.write(DATA * 6)
    assert store.uploads() == ["out/left.bin"]
    file.discard()
    file.closed = True  # or it would try to complete what is gone when it is collected
    assert store.uploads() == []
    assert store.keys() == []


def test_s3_faults_are_retried(store: servers.S3, s3fs_there: Any) -> None:
    store.proxy.faults, store.proxy.every = [unavailable(), Fault(cut_upload=1 << 20), Fault(lose=True)], 2
    with s3fs_there.open(f"{store.bucket}/out/model.bin", "wb", block_size=5 << 20) as file:
        file.write(DATA * 11)
    assert store.get("out/model.bin") == DATA * 11
    assert store.proxy.injected > 1


def test_s3_folder(store: servers.S3, root: Path) -> None:
    store.clear()
    store.put_folder(root, "x/")
    assert store.keys() == ["x/config.json", "x/model.bin", "x/sub/small.txt"]


# ---------------------------------------------------------------------------------------------------------------------------------
# The Hub


@pytest.fixture
def there(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Hub]:
    with servers.hub({"org/model": root}) as server:
        server.patch(monkeypatch)
        yield server


def test_hub_lists_and_reads(there: servers.Hub, tmp_path: Path) -> None:
    from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download

    api = HfApi()
    info = api.model_info("org/model", files_metadata=True)
    sha = there.repos["org/model"].refs["main"]
    assert (info.id, info.sha) == ("org/model", sha)
    assert [(f.rfilename, f.size, f.lfs and f.lfs.sha256) for f in info.siblings or ()] == [
        ("config.json", 2, None),
        ("model.bin", len(DATA), hashlib.sha256(DATA).hexdigest()),
        ("sub/small.txt", 5, None),
    ]
    there.page = 2
    assert [entry.path for entry in api.list_repo_tree("org/model", recursive=True)] == ["config.json", "model.bin", "sub", "sub/small.txt"]
    assert [entry.path for entry in api.list_repo_tree("org/model", "sub", expand=True)] == ["sub/small.txt"]
    assert sum("cursor=" in r.path for r in there.requests) == 1
    assert [p.path for p in api.get_paths_info("org/model", ["sub", "model.bin", "nothing"])] == ["sub", "model.bin"]
    assert Path(hf_hub_download("org/model", "model.bin")).read_bytes() == DATA
    assert Path(hf_hub_download("org/model", "sub/small.txt", revision=sha)).read_text() == "small"
    assert (Path(snapshot_download("org/model", local_dir=tmp_path)) / "model.bin").read_bytes() == DATA
    fs = HfFileSystem()
    assert sorted(fs.find("org/model")) == ["org/model/config.json", "org/model/model.bin", "org/model/sub/small.txt"]
    there.cdn.forget()
    assert fs.cat_file(f"hf://org/model@{sha}/model.bin", start=1000, end=2000) == DATA[1000:2000]
    (part,) = there.cdn.requests  # fsspec reads ahead
    assert (part.range, part.status, part.sent) == ((1000, len(DATA) - 1), 206, len(DATA) - 1000)
    assert all("authorization" in r.headers for r in there.requests if r.path.startswith("/api/models/"))
    assert not any("authorization" in r.headers for r in there.cdn.requests)
    new = there.put("org/model", {"config.json": b"{1}", "sub/small.txt": None})
    assert Path(hf_hub_download("org/model", "config.json")).read_bytes() == b"{1}"
    assert Path(hf_hub_download("org/model", "config.json", revision=sha)).read_bytes() == b"{}"
    assert [c.commit_id for c in api.list_repo_commits("org/model")] == [new, sha]
    assert api.list_repo_refs("org/model").branches[0].target_commit == new


def test_hub_signed_urls(there: servers.Hub) -> None:
    url = f"{there.url}/org/model/resolve/main/model.bin"
    headers = {"Authorization": f"Bearer {there.token}"}
    head = requests.head(url, headers=headers, timeout=10, allow_redirects=False)
    assert head.status_code == 302
    assert head.headers["X-Linked-Size"] == str(len(DATA))
    assert head.headers["X-Linked-Etag"] == f'"{hashlib.sha256(DATA).hexdigest()}"'
    assert head.headers["X-Repo-Commit"] == there.repos["org/model"].refs["main"]
    signed = head.headers["Location"]
    assert signed.startswith("http://127.0.0.2:")
    assert get(signed, 0, 9).content == DATA[:10]
    assert get(signed, Authorization="Bearer x").status_code == 400
    assert get(signed.replace("lfs/", "lfs/0")).status_code == 403
    there.expire()
    assert get(signed, 0, 9).status_code == 403
    there.lifetime = 0.0
    assert get(requests.head(url, timeout=10).headers["Location"], 0, 9).status_code == 403
    with flaky(there.cdn.url, host="127.0.0.2") as cdn:
        there.cdn_url, there.lifetime = cdn.url, 60
        assert get(url, 5, 9, **headers).content == DATA[5:10]
        assert [(r.range, "authorization" in r.headers) for r in cdn.requests] == [((5, 9), False)]
    small = get(f"{there.url}/org/model/resolve/main/config.json", 1, 1)
    assert (small.status_code, small.content, len(small.history)) == (206, b"}", 1)


def test_hub_refuses(there: servers.Hub, root: Path) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    there.add("org/private", root, private=True)
    there.add("org/gated", root, gated=True)
    api, reader, wrong, nobody = HfApi(), HfApi(token=there.read_token), HfApi(token="hf_wrong"), HfApi(token=False)
    for client in (reader, nobody):
        with pytest.raises(RepositoryNotFoundError):
            client.repo_info("org/private")
        with pytest.raises(RepositoryNotFoundError):
            client.repo_info("org/nothing")
        with pytest.raises(GatedRepoError):
            client.auth_check("org/gated")
        with pytest.raises(GatedRepoError):
            client.hf_hub_download("org/gated", "config.json")
        assert client.model_info("org/gated").gated == "manual"
    assert api.model_info("org/private").private
    assert Path(api.hf_hub_download("org/gated", "config.json")).read_text() == "{}"
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        wrong.repo_info("org/model")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info("org/model", revision="nothing")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("org/model", "nothing")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("org/model", "nothing"))
    for client in (reader, nobody):
        with pytest.raises(HfHubHTTPError):
            client.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/model")
        with pytest.raises(HfHubHTTPError):
            client.create_repo("org/new")
    assert there.files("org/model") == ["config.json", "model.bin", "sub/small.txt"]
    assert api.whoami()["auth"]["accessToken"]["role"] == "write"
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"


@servers.uploads_to_hub
def test_hub_takes_commits(there: servers.Hub, tmp_path: Path) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    api = HfApi()
    assert api.create_repo("org/new", private=True) == f"{there.url}/org/new"
    assert api.create_repo("org/new", exist_ok=True) == f"{there.url}/org/new"
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("org/new")
    first = there.repos["org/new"].refs["main"]
    new = DATA[::-1]
    (tmp_path / "a.safetensors").write_bytes(new)
    there.part_size, there.multipart_above = 300_000, 400_000
    done = api.upload_file(path_or_fileobj=tmp_path / "a.safetensors", path_in_repo="x/a.safetensors", repo_id="org/new")
    assert done.oid == there.repos["org/new"].refs["main"] != first
    puts = [r for r in there.cdn.requests if r.method == "PUT"]
    assert [r.received for r in puts] == [300_000] * 3 + [len(new) - 900_000]
    there.multipart_above = 1 << 30
    api.upload_file(path_or_fileobj=b"other" * 1000, path_in_repo="b.bin", repo_id="org/new")
    assert there.read("org/new", "x/a.safetensors") == new
    assert there.read("org/new", "b.bin") == b"other" * 1000
    there.cdn.forget()
    api.upload_file(path_or_fileobj=new, path_in_repo="again.bin", repo_id="org/new")
    assert there.cdn.requests == []  # the content is known
    assert there.unfinished() == []
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete]
    operations = [CommitOperationAdd("config.json", b"{}"), CommitOperationDelete("x/"), CommitOperationDelete("b.bin")]
    api.create_commit("org/new", operations, commit_message="all at once")
    assert there.files("org/new") == ["again.bin", "config.json"]
    assert there.log("org/new")[0].title == "all at once"
    with pytest.raises(EntryNotFoundError):
        api.delete_file("nothing", "org/new")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("org/new", [CommitOperationAdd("c", b"")], commit_message="late", parent_commit=first)
    api.delete_repo("org/new")
    assert "org/new" not in there.repos


@servers.uploads_to_hub
@pytest.mark.parametrize("writes", [False, True])
def test_hub_takes_pull_requests(there: servers.Hub, writes: bool) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=there.token if writes else there.read_token)
    add = CommitOperationAdd("model.safetensors", DATA[:1000])
    done = api.create_commit("org/model", [add], commit_message="Adding safetensors", commit_description="why", create_pr=True)
    assert (done.pr_num, done.pr_revision) == (1, "refs/pr/1")
    assert done.pr_url == f"{there.url}/org/model/discussions/1"
    assert there.files("org/model") == ["config.json", "model.bin", "sub/small.txt"]
    api.upload_file(path_or_fileobj=b"[]", path_in_repo="index.json", repo_id="org/model", revision="refs/pr/1")
    assert there.read("org/model", "index.json", "refs/pr/1") == b"[]"
    assert there.read("org/model", "model.safetensors", "refs/pr/1") == DATA[:1000]
    assert Path(api.hf_hub_download("org/model", "index.json", revision="refs/pr/1")).read_bytes() == b"[]"
    found = list(api.get_repo_discussions("org/model", discussion_status="open"))
    assert [(d.num, d.title, d.is_pull_request, d.status) for d in found] == [(1, "Adding safetensors", True, "open")]
    assert api.get_discussion_details("org/model", 1).target_branch == "refs/heads/main"
    assert api.create_pull_request("org/model", "Another").num == 2
    if writes:
        api.merge_pull_request("org/model", 1)
        assert "model.safetensors" in there.files("org/model")


def test_hub_behind_a_proxy(there: servers.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    with flaky(there.url, unavailable(), first=1) as proxy:
        there.endpoint = proxy.url
        there.page = 1
        there.patch(monkeypatch)
        assert len(list(HfApi().list_repo_tree("org/model"))) == 3
        assert [r.status for r in proxy.requests] == [503, 200, 200, 200]
        assert len(there.requests) == 3


def test_hub_of_computed_files(there: servers.Hub) -> None:
    from huggingface_hub import HfApi, HfFileSystem

    checkpoint = range_server.of_model("deepseek-v3")
    there.add_computed("org/huge", checkpoint)
    sizes = {file.rfilename: file.size for file in HfApi().model_info("org/huge", files_metadata=True).siblings or ()}
    assert sizes == {name: file.size for name, file in checkpoint.files.items()}
    assert sum(file.size for file in checkpoint.files.values()) > 680_000_000_000
    name, start, _ = checkpoint.places["model.norm.weight"]
    with HfFileSystem().open(f"org/huge/{name}", block_size=1 << 16) as file:
        file.seek(start)
        assert file.read(1000) == b"".join(map(bytes, checkpoint.files[name].read(start, start + 1000)))


def test_hub_in_another_process(there: servers.Hub) -> None:
    code = "from huggingface_hub import hf_hub_download; print(open(hf_hub_download('org/model', 'config.json')).read())"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | there.env, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "{}\n"


# ---------------------------------------------------------------------------------------------------------------------------------
# Computed files

SHAPES = {"a": ("bfloat16", (1000, 700)), "b": ("float32", (300, 1000)), "c": ("float8_e4m3fn", (1 << 21,)), "d": ("float16", (3,))}


def byte_at(seed: int, offset: int) -> int:
    """One computed byte, the slow way: splitmix64 of the tile's number over the tile, without the bits that make numbers huge."""
    number, within = divmod(offset, 1 << 20)
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    tile = np.random.PCG64(20).random_raw(within // 8 + 1)
    word = (int(tile[within // 8]) ^ z ^ z >> 31) & 0xBFBFBFBFBFBFBFBF
    return word >> 8 * (within % 8) & 0xFF


@pytest.mark.parametrize("start", [0, 5, (1 << 20) - 3, 7 * (1 << 20) + 9])
@pytest.mark.parametrize("size", [1, 8, 21, (1 << 20) + 1])
def test_computed_bytes(start: int, size: int) -> None:
    data = b"".join(map(bytes, range_server.computed(3, start, start + size)))
    assert len(data) == size
    for place in {0, 1, size // 2, size - 1} & set(range(size)):
        assert data[place] == byte_at(3, start + place)


def test_computed_checkpoint(tmp_path: Path) -> None:
    with servers.computed(SHAPES, max_shard_size="2.2MB", seed=5) as server:
        index = get(f"{server.url}/model.safetensors.index.json").json()
        assert index["weight_map"] == {name: file for name, (file, _, _) in sorted(server.checkpoint.places.items())}
        assert len(set(index["weight_map"].values())) == 3
        for name in set(index["weight_map"].values()):
            whole = get(f"{server.url}/{name}")
            (tmp_path / name).write_bytes(whole.content)
            assert len(whole.content) == server.checkpoint.files[name].size
            assert get(f"{server.url}/{name}", 7, 3000, **{"If-Match": whole.headers["ETag"]}).content == whole.content[7:3001]
            assert get(f"{server.url}/{name}", 7, 3000, **{"If-Match": '"other"'}).status_code == 412
            assert get(f"{server.url}/{name}", len(whole.content)).status_code == 416
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / file, framework="pt") as opened:
                tensor = opened.get_tensor(name)
            dtype, shape = SHAPES[name]
            assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{dtype}", shape)
            assert tensor.float().isfinite().all()
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert server.checkpoint.digest([name]) == hashlib.sha256(data).hexdigest()
        everything = hashlib.sha256(b"head" + b"".join(bytes(piece) for name in "ab" for piece in server.checkpoint.read(name)))
        assert server.checkpoint.digest("ab", b"head") == everything.hexdigest()
        assert get(f"{server.url}/nothing").status_code == 404
        assert [r.range for r in server.requests if r.status == 206] == [(7, 3000)] * 3


def test_computed_model_of_any_size() -> None:
    with servers.computed(size="20GB") as server:
        files = server.checkpoint.files
        assert abs(sum(file.size for file in files.values()) - 20_000_000_000) < 500_000_000
        assert len([name for name in files if name.endswith(".safetensors")]) == 5
        assert get(f"{server.url}/config.json").json()["model_type"] == "llama"
        name, start, stop = server.checkpoint.places["model.norm.weight"]
        assert hashlib.sha256(get(f"{server.url}/{name}", start, stop - 1).content).hexdigest() == server.checkpoint.digest(
            ["model.norm.weight"]
        )
        head = requests.head(f"{server.url}/{name}", timeout=10)
        assert (int(head.headers["Content-Length"]), head.headers["ETag"]) == (files[name].size, f'"{files[name].tag}"')


def test_failure_of_a_server_is_not_lost() -> None:
    class Broken(range_server.Handler):
        def answer(self) -> None:
            raise ZeroDivisionError

    server = range_server.Server(Broken)
    with pytest.raises(requests.ConnectionError):
        get(server.url)
    with pytest.raises(ZeroDivisionError):
        server.stop()
