"""The arithmetic of conversions that are too large to try, against a simulation of them, and against what the engine does on small ones."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamconv
from benchmarks import scale
from benchmarks.scale import Cluster, Costs, Output, estimate, simulate
from streamconv.engine.order import COPY_CHUNK
from tools import make_checkpoint as made
from tools import range_server

FREE = Costs(0.0, 0.0)
FAST = {"cores": 1, "inward": 1e15, "outward": 1e15, "connection": 1e15, "latency": 0.0, "store": 1e15}


def log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(math.log10(low), math.log10(high)).map(lambda power: float(10**power))


@st.composite
def jobs(draw: st.DrawFn) -> list[Output]:
    """Files of one size, as shards are, and what comes beside them: a smaller last one, an index, a config."""
    size = draw(st.sampled_from([1, 2, 5, 10])) * 10**9
    ratio = draw(st.sampled_from([0.5, 1.0, 2.0]))
    copied = draw(st.sampled_from([0.0, 0.5, 1.0]))
    tasks = -(-size // draw(st.sampled_from([8 << 20, COPY_CHUNK])))
    requests = draw(st.sampled_from([1, tasks, 2 * tasks]))
    last = draw(st.floats(0.01, 1.0))

    def file(share: float) -> Output:
        numbers = (size * ratio, size * copied, size * (1 - copied), size, requests, tasks)
        return Output(*(math.ceil(number * share) for number in numbers))

    return [*[file(1.0)] * draw(st.integers(1, 120)), file(last), Output(0, 0, 0, 10**6, 0, 0), Output(1000, 1000, 0, 1000, 1, 1)]


costs = st.builds(
    Costs, log_uniform(1e-10, 5e-9), log_uniform(1e-10, 5e-9), st.just(1e-3), st.just(1e-3), st.sampled_from([0.0, 5.0]), st.just(1000.0)
)
clusters = st.builds(
    Cluster,
    name=st.just(""),
    workers=st.sampled_from([1, 2, 3, 7, 16, 64]),
    cores=st.sampled_from([1, 2, 8, 32]),
    inward=log_uniform(1e7, 1e10),
    outward=log_uniform(1e7, 1e10),
    sink=st.sampled_from(["file", "s3"]),
    threads=st.sampled_from([1, 2, 8, 16]),
    connection=log_uniform(1e7, 1e9),
    latency=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    store=log_uniform(1e8, 1e11),
)


@settings(max_examples=60, deadline=None)
@given(jobs(), costs, clusters, st.booleans())
def test_arithmetic_and_simulation_agree(outputs, prices, cluster, parts):
    sums, events = estimate(outputs, prices, cluster), simulate(outputs, prices, cluster, parts=parts)
    assert events.seconds == pytest.approx(sums.seconds, rel=scale.TOLERANCE)
    assert events.sent == pytest.approx(sums.sent)
    assert events.requests == sums.requests
    assert events.received == pytest.approx(sums.received)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_they_mostly_agree_to_a_tenth(seed):
    chance = random.Random(seed)

    def near(base: Cluster) -> bool:
        """Whether they do for files of a random number on workers like these with one thing changed."""
        slower = {name: getattr(base, name) * 10 ** chance.uniform(-1, 0) for name in ("inward", "outward", "connection", "store")}
        cluster = replace(
            base, workers=chance.choice([1, 3, 7, 16, 64]), threads=chance.choice([1, 4, 16]), cores=chance.choice([1, 8]), **slower
        )
        outputs = [Output(10**9, 10**9, 0, 10**9, 30, 30)] * chance.randint(1, 200)
        prices = Costs(10 ** chance.uniform(-10, -8), 0.0, start=2.0)
        return abs(simulate(outputs, prices, cluster).seconds / estimate(outputs, prices, cluster).seconds - 1) < scale.MOSTLY

    found = [near(chance.choice(scale.CLUSTERS)) for _ in range(100)]
    assert sum(found) >= 0.95 * len(found)


FILES = [Output(10**9, 10**9, 0, 10**9, 32, 32)] * 12


@pytest.mark.parametrize("run", [estimate, simulate])
class TestLimits:
    """What must come out where one thing alone takes time."""

    def test_one_thread_does_one_thing_after_the_other(self, run):
        cluster = replace(Cluster("", **FAST), threads=1, latency=0.1, connection=1e8)
        part = scale.part_size(10**9)
        one = 32 * 0.1 + 1e9 / 1e8 + 0.5 + 1e9 / 1e8 + 0.1 * 1e9 / part  # waiting, receiving, computing, sending
        assert run(FILES, Costs(0.5e-9, 0.0, start=7.0), cluster).seconds == pytest.approx(7 + 12 * one)

    def test_network_without_an_end(self, run):
        cluster = replace(Cluster("", **FAST), cores=3, threads=12)
        assert run(FILES, Costs(1e-9, 0.0), cluster).seconds == pytest.approx(12 / 3, rel=0.02)

    @pytest.mark.parametrize(("name", "bound"), [("inward", "network in"), ("outward", "network out"), ("store", "store")])
    def test_one_narrow_place(self, run, name, bound):
        found = run(FILES, FREE, replace(Cluster("", **FAST), threads=4, **{name: 1e8}))
        assert found.seconds == pytest.approx(120, rel=0.02)
        assert found.bound in ("", bound)

    def test_a_disk(self, run):
        found = run(FILES, FREE, replace(Cluster("", **FAST), sink="file", threads=4, outward=1e8))
        assert found.seconds == pytest.approx(120, rel=0.02)
        assert found.bound in ("", "disk")

    def test_as_many_workers_as_files(self, run):
        cluster = replace(Cluster("", **FAST), threads=1, inward=1e8)
        alone = run(FILES[:1], FREE, cluster).seconds
        assert [run(FILES, FREE, replace(cluster, workers=k)).seconds for k in (12, 1000)] == pytest.approx([alone, alone])

    def test_the_last_wave(self, run):
        cluster = replace(Cluster("", **FAST), threads=1, inward=1e8)
        waves = [run(FILES, FREE, replace(cluster, workers=k)).seconds / 10 for k in (1, 4, 5, 6, 11)]
        assert waves == pytest.approx([12, 3, 3, 2, 2], rel=1e-6)

    def test_requests_that_are_cut(self, run):
        cluster = replace(Cluster("", **FAST), threads=1, latency=0.5)
        found = run(FILES * 20, FREE, replace(cluster, failures=0.2))
        sending = 12 * 20 * 0.5 * 1e9 / scale.part_size(10**9)
        assert found.requests == pytest.approx(12 * 20 * 32 / 0.8, rel=0.05)
        assert found.seconds - sending == pytest.approx(12 * 20 * 32 * (0.5 / 0.8 + 0.2 / 0.8), rel=0.05)

    def test_workers_that_die_over_files(self, run):
        cluster = replace(Cluster("", **FAST), threads=1, inward=1e8)
        many = FILES * 50
        ratio = run(many, FREE, replace(cluster, losses=0.2)).seconds / run(many, FREE, cluster).seconds
        assert ratio == pytest.approx(1 + 0.2 / 0.8 / 2, rel=0.05)


def test_slow_workers_cost_more_where_each_has_its_part():
    cluster = Cluster("", **FAST | {"inward": 1e8}, workers=6, threads=1, slow=0.2)
    outputs = FILES * 10
    even = simulate(outputs, FREE, replace(cluster, slow=0.0)).seconds
    assert simulate(outputs, FREE, cluster, parts=True).seconds == pytest.approx(2 * even)
    assert even < simulate(outputs, FREE, cluster).seconds < 1.2 * even


SHAPES: made.Shapes = {
    **{f"layers.{k}.{name}.weight": ("bfloat16", (1024, 2048)) for k in range(6) for name in ("up", "down")},
    **{f"layers.{k}.norm.weight": ("float32", (2048,)) for k in range(6)},
}


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_requests_and_bytes_are_counted_as_they_are_made(dtype, tmp_path):
    """A plan's numbers beside what a server was asked while it ran."""
    pytest.importorskip("fsspec").filesystem("memory").store.clear()
    checkpoint = range_server.Checkpoint(SHAPES, max_shard_size=12_000_000, config={"model_type": "none"})
    with range_server.serve(checkpoint) as server:
        plan = streamconv.plan(server.url, "memory://scale", dtype=dtype, max_shard_size="20MB", max_memory="8GB")
        server.forget()
        streamconv.run(plan)
        asked = [request for request in server.requests if request.sent > 1]  # one byte is asked for to see that a file is as it was
    outputs = scale.count(plan)
    assert sum(output.written for output in outputs) == plan.totals.bytes_written
    assert sum(output.copied for output in outputs) == plan.totals.bytes_copied
    assert sum(output.computed for output in outputs) == plan.totals.bytes_computed
    assert sum(output.read for output in outputs) == sum(request.sent for request in asked) == plan.totals.bytes_read
    assert sum(output.requests for output in outputs) == len(asked)


@pytest.mark.slow
def test_the_documentation_prints_what_the_program_does():
    found = scale.BLOCK.search(scale.PAGE.read_text())
    assert found
    assert found[1] == scale.table(json.loads(scale.COSTS.read_text()), json.loads(scale.PLANS.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("name", scale.JOBS)
def test_plans_are_as_they_were(name):
    kept = json.loads(scale.PLANS.read_text())[name]
    fresh = scale.describe_plan(name)
    assert [list(output) for output in fresh["files"]] == kept["files"]
    assert fresh["tensors"] == kept["tensors"]
