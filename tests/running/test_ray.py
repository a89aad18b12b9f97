"""Files made by Ray: refusals without a cluster, and, slow, what three nodes on this machine make of a conversion."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import servers
import torch
from checkpoint_files import ROOMY, random_tensor, refusal, write

from streamconv import memory
from streamconv.conversion import api
from streamconv.errors import BudgetError, RunError, UsageError
from streamconv.planning.fitting import Budget, base_of, refit
from streamconv.planning.plan import Plan
from streamconv.running.filling import LocalEngine
from streamconv.running.log import Log
from streamconv.running.progress import Progress
from streamconv.running.run import run
from tools.crash import make_source, read_tree

STORE = 80_000_000  # bytes: the least that Ray takes


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {f"w{k}": random_tensor(300, 400 + k, seed=k) for k in range(12)}
    return write(tmp_path / "src", tensors, shards=3, config={"dtype": "float32"})


@pytest.fixture
def ray() -> ModuleType:
    return pytest.importorskip("ray")


# Without a cluster -----------------------------------------------------------------------------------------------------


def test_the_extra_is_named_where_ray_is_missing(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in ("convert", "plan"):
        message = refusal(capsys, command, source, tmp_path / "dst", "--engine", "ray")
        assert message == "--engine ray needs Ray: pip install 'streamconv[ray]'"
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_one_line(source, tmp_path, capsys, ray, address):
    message = refusal(capsys, "convert", source, tmp_path / "dst", "--engine", "ray", "--ray-address", address)
    assert message.startswith(f"--ray-address {address}: ")
    assert not (tmp_path / "dst").exists()
    assert not ray.is_initialized()


def test_the_hub_is_written_from_one_machine(source, capsys, ray):
    assert "hf://org/name" in refusal(capsys, "convert", source, "hf://org/name", "--engine", "ray")


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"format": "torch"}, {"options": {"resize_vocab": 700}}])
def test_a_plan_for_another_process_makes_the_same_files(tmp_path, options):
    tensors = {"model.embed_tokens.weight": random_tensor(300, 800), "w": random_tensor(900, 800)}
    source = write(tmp_path / "src", tensors, config={"vocab_size": 300, "dtype": "float32"})
    plan = api.plan(source, tmp_path / "dst", max_memory=ROOMY, max_shard_size="2MB", **options)
    with pytest.raises(BudgetError) as refused:
        refit(plan, Budget(0, 8))
    small = refit(plan, Budget(refused.value.needed, 1))
    assert small.peak_memory <= refused.value.needed
    assert small.peak_memory < plan.peak_memory or not plan.nodes
    assert refit(small, Budget(4 << 30, plan.workers, lambda: base_of(plan))) == plan
    assert 20 << 20 < base_of(plan) < plan.peak_memory
    for number in range(len(plan.files)):
        LocalEngine(small.for_files([number]), Log()).run()
    api.convert(source, tmp_path / "whole", max_memory=ROOMY, max_shard_size="2MB", **options)
    assert read_tree(tmp_path / "dst") == read_tree(tmp_path / "whole")


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}])
def test_what_a_node_is_asked_about_is_a_plan(tmp_path, options):
    from streamconv.running.executors.ray import _question

    source = write(tmp_path / "src", {"a": random_tensor(30, 8), "b": random_tensor(9)})
    plan = api.plan(source, tmp_path / "dst", max_memory=ROOMY, **options)
    asked = Plan.from_json(_question(plan).to_json())
    assert [source.path for source in asked.sources] == [source.path for source in plan.sources]
    assert len(asked.nodes) == min(1, len(plan.nodes))


# On a cluster ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes, the last with four processors."""
    pytest.importorskip("ray")
    with start(1, 1, 4) as made:
        yield made


@contextmanager
def start(*cpus: int, **options: Any) -> Iterator[Any]:
    """A cluster of nodes with so many processors."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(
            initialize_head=True, head_node_args={"num_cpus": cpus[0], "object_store_memory": STORE, "include_dashboard": False, **options}
        )
        try:
            for count in cpus[1:]:
                made.add_node(num_cpus=count, object_store_memory=STORE, **options)
            yield made
        finally:
            made.shutdown()


@contextmanager
def start_with(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes, for whose processes and those started here these variables are set."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with start(1, 1) as made:
        yield made


@contextmanager
def joined(cluster: Any, hook: Callable[[], None] | None = None) -> Iterator[Any]:
    """This process as a driver, whose tasks' processes begin with ``hook``: it is pickled with all that it refers to."""
    import ray

    runtime = {"worker_process_setup_hook": hook} if hook else None
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", runtime_env=runtime)
    try:
        yield ray
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def noting(log: Path, *, delay: float = 0.0, ballast: int = 0, threads: int = 0, deaths: int = 0) -> Callable[[], None]:
    """A hook that notes files as they are begun and done, and has copies take time; or memory, by more than so many threads.

    The first ``deaths`` processes that begin a weight file end there.
    """

    def hook() -> None:
        import os
        import time

        import ray

        from streamconv.running import filling, making

        make, copy = making.make_files, filling.LocalEngine._copy

        def note(*words: object) -> None:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(fd, (" ".join(map(str, words)) + "\n").encode())
            os.close(fd)

        def make_files(plan: Any, numbers: Any, tell: Any) -> Any:
            node = ray.get_runtime_context().get_node_id()
            note("begun", plan.files[0].path, node, plan.workers)
            if log.read_text().count(f"begun {plan.files[0].path} ") <= deaths and plan.files[0].tensors:
                os._exit(1)
            overflowed = make(plan, numbers, tell)
            note("done", plan.files[0].path, node, plan.workers)
            return overflowed

        def slow_copy(engine: Any, number: int, segment: Any) -> int:
            held = b"x" * (ballast if engine._plan.workers > threads else 0)
            time.sleep(delay)
            return copy(engine, number, segment) + 0 * len(held)

        making.make_files, filling.LocalEngine._copy = make_files, slow_copy

    return hook


def notes(log: Path, word: str) -> list[list[str]]:
    """File, node and threads of each line with this word."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.split()[1:] for line in lines if line.startswith(f"{word} ")]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "streamconv", *map(str, arguments)]


def convert(cluster: Any, *arguments: object) -> subprocess.CompletedProcess[str]:
    given = command("convert", *arguments, "--max-shard-size", "600KB", "--engine", "ray", "--ray-address", cluster.address)
    return subprocess.run(given, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture
def whole(source, tmp_path) -> dict[str, bytes]:
    """What the local engine makes of the source."""
    api.convert(source, tmp_path / "whole", max_memory=ROOMY, max_shard_size="600KB")
    return read_tree(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("options", [["-j", "2"], ["--dtype", "bfloat16", "--verify"], ["--format", "torch", "--checksum"]])
def test_the_files_are_those_of_the_local_engine(cluster, source, tmp_path, options):
    local = command("convert", source, tmp_path / "whole", "--max-shard-size", "600KB", "--quiet", *options)
    subprocess.run(local, check=True, timeout=600)
    done = convert(cluster, source, tmp_path / "dst", "--json", *options)
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    assert figures["verified"] is (True if "--verify" in options else None)
    assert figures["workers"] == (2 if "-j" in options else 1)
    assert figures["peak_rss"] < figures["peak_memory"]
    assert read_tree(tmp_path / "dst") == read_tree(tmp_path / "whole")


@pytest.mark.slow
def test_files_of_several_sources(cluster, tmp_path):
    make_source(tmp_path / "src")
    options = ["--adapter", tmp_path / "lora", "--graft", tmp_path / "donor", "--take", "*", "--replace"]
    local = command("convert", tmp_path / "src", tmp_path / "whole", "--max-shard-size", "600KB", "--quiet", *options)
    subprocess.run(local, check=True, timeout=600)
    done = convert(cluster, tmp_path / "src", tmp_path / "dst", "--verify", "--json", *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_tree(tmp_path / "dst") == read_tree(tmp_path / "whole")


@pytest.mark.slow
def test_values_that_overflow_at_nodes_are_counted(cluster, tmp_path):
    tensors = {name: torch.full((count,), 1e6) for name, count in (("a", 300), ("b", 2))}
    source = write(tmp_path / "large", tensors | {"c": torch.ones(5)}, shards=3)
    done = convert(cluster, source, tmp_path / "dst", "--dtype", "float16", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)["overflowed"]
    assert (told["tensors"], told["values"], told["complete"]) == (2, 302, True)


@pytest.mark.slow
def test_a_plan_made_without_ray_is_run_by_it(cluster, source, tmp_path, whole):
    made = command("plan", source, tmp_path / "dst", "--max-shard-size", "600KB", "--out", tmp_path / "plan.json", "--quiet")
    subprocess.run(made, check=True, timeout=600)
    there = command("run", tmp_path / "plan.json", "--engine", "ray", "--ray-address", cluster.address, "--quiet")
    subprocess.run(there, check=True, timeout=600)
    assert read_tree(tmp_path / "dst") == whole


@pytest.mark.slow
def test_a_node_that_is_killed_costs_its_unfinished_files(cluster, source, tmp_path, whole):
    plan = api.plan(source, tmp_path / "dst", max_memory=ROOMY, max_shard_size="600KB", engine="ray")
    log, progress = tmp_path / "log", Progress(show=False, record=True)
    victim = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    with joined(cluster, noting(log, delay=0.7)):
        engine = threading.Thread(target=lambda: run(plan, engine="ray", progress=progress))
        engine.start()
        while len(mine := [line for line in notes(log, "begun") if line[1] == victim.node_id]) < 2 and engine.is_alive():
            time.sleep(0.02)
        cluster.remove_node(victim, allow_graceful=False)
        engine.join(timeout=600)
    assert len(mine) >= 2, "it was killed in the middle"
    assert read_tree(tmp_path / "dst") == whole
    begun = Counter(path for path, _, _ in notes(log, "begun"))
    unfinished = {path for path, node, _ in notes(log, "begun") if node == victim.node_id}
    unfinished -= {path for path, node, _ in notes(log, "done") if node == victim.node_id}
    assert unfinished == {mine[-1][0]}
    assert begun == {file.path: 1 + (file.path in unfinished) for file in plan.files if file.segments}
    assert progress.phases[0].done == sum(file.size for file in plan.files if file.segments)


@pytest.mark.slow
def test_a_process_that_dies_costs_its_file_another_attempt(cluster, source, tmp_path):
    api.convert(source, tmp_path / "whole", max_memory=ROOMY, max_shard_size="3MB")
    plan = api.plan(source, tmp_path / "dst", max_memory=ROOMY, max_shard_size="3MB", engine="ray", workers=4)
    with joined(cluster, noting(tmp_path / "log", deaths=1)):
        run(plan, engine="ray")
    begun = notes(tmp_path / "log", "begun")
    for file in plan.files:
        assert [int(count) for path, _, count in begun if path == file.path] == ([4, 2] if file.tensors else [4] * bool(file.segments))
    assert read_tree(tmp_path / "dst") == read_tree(tmp_path / "whole")
    with joined(cluster, noting(tmp_path / "log", deaths=99)), pytest.raises(RunError, match="lost 5 times"):
        run(replace(plan, root=str(tmp_path / "again")), engine="ray")


@pytest.mark.slow
def test_a_task_that_takes_too_much_has_fewer_workers_next(cluster, source, tmp_path, whole):
    plan = api.plan(source, tmp_path / "dst", max_memory=ROOMY, max_shard_size="600KB", engine="ray", workers=4)
    with joined(cluster, noting(tmp_path / "log", delay=0.5, ballast=100 << 20, threads=1)):
        run(plan, engine="ray")
    assert read_tree(tmp_path / "dst") == whole
    large = [file.path for file in plan.files if file.size > 100_000]
    threads = {path: [int(count) for name, _, count in notes(tmp_path / "log", "begun") if name == path] for path in large}
    assert set(map(tuple, threads.values())) == {(4, 2, 1)}
    assert [path for path in (tmp_path / "dst").iterdir() if path.name.endswith(".partial")] == []


@pytest.mark.slow
def test_a_task_that_always_takes_too_much_is_refused_by_name(cluster, source, tmp_path):
    plan = api.plan(source, tmp_path / "dst", max_memory=ROOMY, max_shard_size="600KB", engine="ray")
    with joined(cluster, noting(tmp_path / "log", delay=0.5, ballast=100 << 20)), pytest.raises(RunError, match="--max-memory") as refused:
        run(plan, engine="ray")
    assert str(refused.value).startswith("model-000")
    assert int(str(refused.value).partition("--max-memory ")[2].partition("MB")[0]) > (plan.peak_memory + (50 << 20)) / 1e6
    assert not [path for path in (tmp_path / "dst").iterdir() if path.name.endswith(".partial")]


@pytest.mark.slow
def test_a_task_that_ray_kills_for_memory_is_refused_by_name(source, tmp_path, monkeypatch, ray):
    from streamconv.running.executors import ray as engine

    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    monkeypatch.setattr(engine._Cluster, "_ask", lambda *_: iter([memory.resident()]))  # which Ray would kill as well
    plan = api.plan(source, tmp_path / "dst", max_memory=ROOMY, max_shard_size="600KB", engine="ray")
    with start(2) as cluster, joined(cluster, noting(tmp_path / "log", delay=20)), pytest.raises(RunError) as refused:
        run(plan, engine="ray")
    assert "ran out of memory" in str(refused.value)
    assert str(refused.value).startswith("model-000")


@pytest.mark.slow
def test_what_no_node_offers_is_refused_before_anything_is_written(source, tmp_path, whole, ray):
    plan = api.plan(source, tmp_path / "dst", max_memory=ROOMY, max_shard_size="600KB", engine="ray", workers=4)
    with start(8, memory=STORE) as cluster, joined(cluster), pytest.raises(BudgetError, match="no node offers more than 80 MB") as refused:
        run(plan, engine="ray")
    assert not (tmp_path / "dst").exists()
    with start(8, memory=refused.value.needed) as cluster, joined(cluster, noting(tmp_path / "log")):
        run(plan, engine="ray")
    assert {int(line[2]) for line in notes(tmp_path / "log", "begun")} <= {1, 2, 3}
    assert read_tree(tmp_path / "dst") == whole


@pytest.mark.slow
def test_another_release_at_a_node_is_named(cluster, source, tmp_path):
    def hook() -> None:
        import streamconv

        streamconv.__version__ = "0.0.1"

    plan = api.plan(source, tmp_path / "dst", max_memory=ROOMY, max_shard_size="600KB", engine="ray")
    with joined(cluster, hook) as ray:
        with pytest.raises(UsageError, match=r"has streamconv 0\.0\.1, not ") as refused:
            run(plan, engine="ray")
        assert any(node["NodeID"] in str(refused.value) for node in ray.nodes())
    assert not (tmp_path / "dst").exists()


@contextmanager
def apart(cluster: Any, script: str) -> Iterator[str]:
    """A node more, with mounts of its own that the script makes; its id."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("mount namespaces are not for this user")
    before = set(cluster.global_state._live_node_ids())
    begin = f"{script} && exec {sys.executable} -m ray.scripts.scripts start --address {cluster.address} --num-cpus 1"
    node = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"{begin} --object-store-memory {STORE} --disable-usage-stats --block"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (new := set(cluster.global_state._live_node_ids()) - before):
            assert node.poll() is None
            time.sleep(0.1)
        yield new.pop()
    finally:
        node.terminate()
        node.wait(timeout=600)
        while set(cluster.global_state._live_node_ids()) - before:
            time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("mount -t tmpfs none {0}/src", "does not see the sources as the driver does: {0}/src/"),
        ("mount -t tmpfs none {0}/place", "does not see DST {0}/place/dst as the driver does"),
        ("mount --bind {0}/place {0}/place && mount -o remount,ro,bind {0}/place", "cannot write to DST {0}/place/dst: Read-only"),
    ],
)
def test_a_node_that_sees_something_else_is_named(cluster, source, tmp_path, script, fault):
    (tmp_path / "place").mkdir()
    with apart(cluster, script.format(tmp_path)) as node:
        refused = convert(cluster, source, tmp_path / "place" / "dst")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert f"{node}) {fault.format(tmp_path)}" in refused.stderr
    assert not list((tmp_path / "place").iterdir())


@pytest.mark.slow
def test_urls_are_read_and_written_by_the_nodes(source, tmp_path, whole, monkeypatch, ray):
    with servers.s3() as store, start_with(store.env, monkeypatch) as cluster:
        store.put_folder(source, "src/")
        done = convert(cluster, f"{store.url}/src", f"{store.url}/dst", "--quiet")
        assert (done.stderr, done.returncode) == ("", 0)
        assert {key.removeprefix("dst/"): store.get(key) for key in store.keys("dst/")} == whole
        assert not store.uploads()


@pytest.mark.slow
def test_interrupted_runs_are_gone_on_with(cluster, source, tmp_path, whole):
    arguments = [source, tmp_path / "dst", "--max-shard-size", "600KB", "--engine", "ray", "--ray-address", cluster.address, "-v"]
    with subprocess.Popen(command("convert", *arguments), stderr=subprocess.PIPE, text=True) as begun:
        while "done by" not in begun.stderr.readline():
            assert begun.poll() is None
        begun.send_signal(signal.SIGINT)
        begun.communicate(timeout=600)
    if begun.returncode == 0:
        pytest.skip("it was quicker")
    assert begun.returncode == 130
    left = read_tree(tmp_path / "dst")
    assert not [name for name in left if name.endswith(".partial")]
    assert "--resume" in convert(cluster, source, tmp_path / "dst").stderr
    again = convert(cluster, source, tmp_path / "dst", "--resume", "-v")
    assert again.returncode == 0
    assert not [name for name in left if f"{name}: " in again.stderr]
    assert read_tree(tmp_path / "dst") == whole
