"""What conversions of hundreds of gigabytes to terabytes take on one machine or many, by arithmetic and by a simulation of the same.

    python -m benchmarks.scale                # the tables, from benchmarks/results/costs.json and plans.json
    python -m benchmarks.scale measure        # makes costs.json: what a byte, a request, a task and a tensor cost here
    python -m benchmarks.scale plan           # makes plans.json: files, bytes, requests and tasks of real plans

Nothing here is a run of such a conversion. The costs are measured on small ones (``benchmarks/costs.py``); files, requests and bytes are
those of the real plans, of checkpoints that a server has the headers of; machines, networks and stores are assumptions (`CLUSTERS`).

``estimate`` is closed-form: a worker takes as long as what it needs most of at the same time (processors, network in and out, the store,
connections), and files are made in waves. ``simulate`` has the requests of every file as events: each waits for its answer, shares the
worker's network and the store's with all others, may be cut and continued, is computed on a core that is free, and sent. It also knows what
arithmetic does not: workers that are slow and workers that die.

What a worker does is what the engine does: into a store each of its threads makes a file of its own, one piece after the other (read,
compute, send); into files of a disk all threads take pieces of the same files.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import streamconv
from benchmarks import costs as measuring
from streamconv import memory
from streamconv.engine.order import COPY_CHUNK
from streamconv.engine.remote import join
from streamconv.graph.evaluate import reads
from streamconv.graph.moves import region
from streamconv.planning.plan import Compute, Copy, FilePlan, Plan
from streamconv.storage.objects import part_size
from streamconv.units import format_size, parse_size
from tools import range_server
from tools.make_checkpoint import MODELS, Model, llama_shapes, with_dtype

RESULTS = Path(__file__).parent / "results"
COSTS, PLANS = RESULTS / "costs.json", RESULTS / "plans.json"
PAGE = Path(__file__).parent.parent / "docs" / "clusters.md"
BLOCK = re.compile(r"^<!-- scale -->\n(.*?)\n?<!-- end of scale -->$", re.MULTILINE | re.DOTALL)  # of the page, where the tables are
GB = 1e9
PIECES, SHARED_PIECES = 16, 64
TOLERANCE, MOSTLY = 0.5, 0.1  # of the arithmetic, by which the simulation of like workers may differ: always, and 19 times in 20
DST = "memory://target"  # a URL: files are laid out as streams

# ---------------------------------------------------------------------------------------------------------------------------------
# What is to be done: real plans, as numbers for each output file


class Output(NamedTuple):
    """An output file: bytes that are read, copied, computed and written (headers, too); range requests if it is a stream; tasks if not."""

    read: int
    copied: int
    computed: int
    written: int
    requests: int
    tasks: int


@dataclass(frozen=True)
class Job:
    """A conversion. ``work`` is the row of costs that its computed bytes fall under; ``settings`` are those of `streamconv.plan`."""

    title: str
    model: Model
    work: str
    settings: dict[str, Any]
    dtype: str | None = None


MOE_2T = Model(
    # Nobody has published such a config. Layers, widths and experts continue the row of DeepSeek-V3 (61 layers, width 7168, 256
    # experts of 2048) and Kimi K2 (61, 7168, 384 of 2048); names are Mixtral's.
    MODELS["mixtral-8x7b"].config
    | {
        "hidden_size": 8192,
        "intermediate_size": 2560,
        "num_attention_heads": 64,
        "num_hidden_layers": 82,
        "num_key_value_heads": 8,
        "num_local_experts": 384,
        "vocab_size": 163840,
    },
    llama_shapes,
    "10GB",
)
_DEEPSEEK = MODELS["deepseek-v3"]
_SETTINGS = {"max_shard_size": "2GB", "max_memory": "2GB"}
JOBS = {
    "671B-fuse": Job("DeepSeek-V3 671B, experts stacked", _DEEPSEEK, "copy", {"recipe": "transformers-hub2native"}),
    "671B-bf16": Job("DeepSeek-V3 671B, fp8 to bf16", _DEEPSEEK, "dequantize", {"recipe": "deepseek3-hf2ms"}),
    "2T-reshard": Job("MoE of 2T in bf16, other shards", MOE_2T, "copy", {}),
    "2T-bf16": Job("MoE of 2T, fp32 to bf16", MOE_2T, "cast", {"dtype": "bfloat16"}, "float32"),
}


def count(plan: Plan) -> list[Output]:
    """The numbers of a plan's files."""
    return [_count(plan, file) for file in plan.files]


def _count(plan: Plan, file: FilePlan) -> Output:
    read = copied = computed = requests = tasks = 0
    for segment in file.segments:
        if isinstance(segment, Copy):
            copied += segment.nbytes
            read += segment.nbytes
            requests += 1
            tasks += -(-segment.nbytes // COPY_CHUNK)
        else:
            tiles, asked, nbytes = _tiles(plan, segment)
            computed += segment.move.numel * plan.nodes[segment.node].spec.dtype.itemsize
            read += tiles * nbytes
            requests += tiles * asked
            tasks += tiles
    return Output(read, copied, computed, file.size, requests, tasks)


def _tiles(plan: Plan, segment: Compute) -> tuple[int, int, int]:
    """How many tiles a segment has, and the requests and bytes of one as large as they are on average."""
    tiles = math.prod(-(-size // tile) for size, tile in zip(segment.move.sizes, segment.tile, strict=True))
    first = next(segment.move.tiles(segment.tile))
    wanted = list(reads(plan.nodes[segment.node], region(first)))
    share = segment.move.numel / tiles / first.numel
    return tiles, len(list(join(wanted))), round(share * sum(nbytes for _, _, nbytes in wanted))


def serve(job: Job) -> range_server.Server:
    """A server of a job's source, whose bytes nobody asks for."""
    config = with_dtype(job.model.config, job.dtype) if job.dtype else job.model.config
    size = parse_size(job.model.max_shard_size)
    return range_server.serve(range_server.Checkpoint(job.model.shapes(config), max_shard_size=size, config=config))


def describe_plan(name: str) -> dict[str, Any]:
    """A job's row of plans.json; to be called once in a process, whose memory it tells."""
    command = [sys.executable, "-m", "benchmarks.scale", "serve", "--only", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url, started = server.stdout.readline().strip(), time.process_time()
        plan = streamconv.plan(url, DST, **_SETTINGS | JOBS[name].settings)
        seconds = time.process_time() - started
        server.communicate()  # it ends with its input
    return {
        "tensors": len(plan.mapping),
        "planning_seconds": round(seconds, 1),
        "planning_memory": memory.peak(),
        "peak_memory": plan.peak_memory,
        "workers": plan.workers,
        "files": count(plan),
    }


# ---------------------------------------------------------------------------------------------------------------------------------
# What it is done with


@dataclass(frozen=True)
class Cluster:
    """Workers, their network and what they read from and write to; bytes and seconds.

    Attributes:
        workers: processes, each on a machine of its own.
        cores: of a worker.
        inward, outward: a worker's network in each direction; ``outward`` is its disk where ``sink`` is "file".
        sink: "file" or "s3", as rows of costs.
        threads: of a worker, each with a connection in and out (as planned, ``--workers``).
        connection: bytes per second of one connection to the store.
        latency: until a request's first byte.
        store: what the source, and the sink, give to all workers together.
        failures: the share of requests that are cut at some point and continued from there, and ``backoff`` before that.
        losses: how often a worker dies over a file, for each file; what it has of it is lost.
        slow: the share of workers that are ``slowness`` times slower in everything. Only the simulation knows of it.
    """

    name: str
    workers: int = 1
    cores: int = 8
    inward: float = 1.25 * GB
    outward: float = 1.25 * GB
    sink: str = "s3"
    threads: int = 32
    connection: float = 85e6
    latency: float = 0.1
    store: float = 12.5 * GB
    failures: float = 0.0
    backoff: float = 1.0
    losses: float = 0.0
    slow: float = 0.0
    slowness: float = 2.0

    @property
    def streams(self) -> bool:
        """Whether each thread makes a file of its own."""
        return self.sink != "file"


# A connection of 85 MB/s and 0.1 s until the first byte are what AWS's guide to S3's performance tells users to reckon with.
_VM = Cluster("1 VM, 10 Gbit/s")
CLUSTERS = (
    Cluster("1 laptop, 1 Gbit/s", inward=0.125 * GB, outward=1 * GB, sink="file", threads=8),
    _VM,
    replace(_VM, name="16 workers", workers=16),
    replace(_VM, name="64 workers", workers=64),
)
TROUBLE = {"failures": 0.01, "losses": 0.01, "slow": 0.1}


@dataclass(frozen=True)
class Costs:
    """Processor seconds: for a byte of output by what becomes of it, for a request and for a task; and seconds until a worker works.

    ``header`` are bytes of a request and of its answer beside the data.
    """

    copy: float
    compute: float
    request: float = 0.0
    task: float = 0.0
    start: float = 0.0
    header: float = 0.0

    @classmethod
    def of(cls, measured: dict[str, Any], sink: str, work: str) -> Costs:
        """What was measured, for a conversion from https to ``sink`` whose computed bytes are ``work``."""
        rows, request = measured["cpu_seconds_per_gb"], measured["request"]
        route = rows["https to file" if sink == "file" else "https to stream"]
        beyond = rows["tls"] if sink == "file" else 2 * rows["tls"] + rows["https to s3"]["copy"] - route["copy"]
        return cls(
            (route["copy"] + beyond) / GB,
            (route[work] + beyond) / GB,
            request["cpu_seconds"],
            measured["task_cpu_seconds"],
            measured["start_seconds"],
            request["header_bytes"],
        )


@dataclass(frozen=True)
class Outcome:
    """Seconds until the last file is there; ``bound`` is what they are spent on; ``received`` and ``sent`` bytes; requests."""

    seconds: float
    bound: str
    received: float
    sent: float
    requests: float


@dataclass(frozen=True)
class _Task:
    """One of a file's tasks, all of which are taken to be alike: bytes, requests and processor seconds; and how many there are.

    A file of very many is cut into `PIECES`, since its one thread does them one after the other anyway; into more where threads share it.
    """

    inward: float
    outward: float
    requests: float
    cpu: float
    count: int

    @classmethod
    def of(cls, output: Output, costs: Costs, cluster: Cluster) -> _Task:
        pieces, asked = (PIECES, output.requests) if cluster.streams else (SHARED_PIECES, output.tasks)
        count = min(max(1, output.tasks), pieces)
        cpu = output.copied * costs.copy + output.computed * costs.compute + asked * costs.request + output.tasks * costs.task
        return cls(output.read / count, output.written / count, asked / count, cpu / count, count)


def _receiving(nbytes: float, cluster: Cluster) -> float:
    """Seconds that a connection takes for some bytes, if it is alone."""
    return nbytes / min(cluster.connection, cluster.inward, cluster.store)


def _sending(nbytes: float, file_size: int, cluster: Cluster) -> float:
    """Seconds that a connection takes for some bytes of a file, part by part, if it is alone; or the disk."""
    if not cluster.streams:
        return nbytes / cluster.outward
    return nbytes / min(cluster.connection, cluster.outward, cluster.store) + cluster.latency * nbytes / part_size(file_size)


# ---------------------------------------------------------------------------------------------------------------------------------
# Arithmetic


def _needs(output: Output, costs: Costs, cluster: Cluster) -> dict[str, float]:
    """Seconds of each resource that a file takes; of "connections", in the hands of one thread, or of all if they share the file."""
    task = _Task.of(output, costs, cluster)
    asked = task.requests / (1 - cluster.failures)
    inward = task.inward + asked * costs.header
    waits = asked * cluster.latency + (asked - task.requests) * cluster.backoff
    each = waits + _receiving(inward, cluster) + task.cpu + _sending(task.outward, output.written, cluster)
    again = cluster.losses / (1 - cluster.losses)  # so often half a file is made for nothing, and the worker starts anew
    needs = {
        "connections": each / (1 if cluster.streams else cluster.threads),
        "processors": task.cpu / cluster.cores,
        "network in": inward / cluster.inward,
        "network out" if cluster.streams else "disk": task.outward / cluster.outward,
        "store": max(inward, task.outward if cluster.streams else 0) / cluster.store,
    }
    found = {name: task.count * seconds * (1 + again / 2) for name, seconds in needs.items()}
    return found | {"connections": found["connections"] + again * costs.start, "one task": each}


def estimate(outputs: Sequence[Output], costs: Costs, cluster: Cluster) -> Outcome:
    """The time by arithmetic: waves of files over workers, each as long as what it needs most of."""
    needs = [_needs(output, costs, cluster) for output in outputs]
    longest = max(need["connections"] for need in needs)
    full = [need for need in needs if need["connections"] > longest / 2]  # small files find their place beside these
    mean = {name: statistics.mean(need[name] for need in full) for name in full[0]}
    slots = cluster.workers * (cluster.threads if cluster.streams else 1)
    waves, rest = divmod(len(full), slots)
    total: dict[str, float] = {}
    seconds = 0.0
    for files in [slots] * waves + [rest] * (rest > 0):
        on_one = -(-files // cluster.workers)  # at the same time
        wave = {name: mean[name] * {"connections": 1, "store": files}.get(name, on_one) for name in mean if name != "one task"}
        bound = max(wave, key=lambda name: wave[name])
        total[bound] = total.get(bound, 0.0) + wave[bound]
        seconds += wave[bound]
    bound = max(total, key=lambda name: total[name])
    seconds += 0.0 if bound == "connections" else mean["one task"]
    if not rest:  # no worker is idle in the last wave: what is small comes after it
        names = [name for name in mean if name not in ("one task", "store")]
        seconds += max((need[name] for need in needs if need["connections"] <= longest / 2 for name in names), default=0.0)
    # At least what all files together take of each resource, small ones too, and the longest file.
    shares = {name: sum(need[name] for need in needs) / (1 if name == "store" else cluster.workers) for name in mean if name != "one task"}
    shares["connections"] = max(longest, shares["connections"] * cluster.workers / slots)
    if shares[least := max(shares, key=lambda name: shares[name])] > seconds:
        bound, seconds = least, shares[least]
    asked = sum((output.requests if cluster.streams else output.tasks) for output in outputs) / (1 - cluster.failures)
    return Outcome(
        costs.start + seconds,
        bound,
        sum(output.read for output in outputs) + asked * costs.header,
        sum(output.written for output in outputs),
        asked,
    )


# ---------------------------------------------------------------------------------------------------------------------------------
# Simulation


class Line:
    """Serves one after the other, ``width`` at a time: a network card, a store, cores."""

    def __init__(self, width: int = 1) -> None:
        self._free = [0.0] * width

    def serve(self, now: float, seconds: float) -> float:
        """When something that comes now and takes so long is served."""
        done = max(now, self._free[0]) + seconds
        heapq.heapreplace(self._free, done)
        return done


@dataclass
class _Worker:
    cluster: Cluster
    slowness: float
    inward: Line = field(default_factory=Line)
    outward: Line = field(default_factory=Line)
    cores: Line = field(init=False)

    def __post_init__(self) -> None:
        self.cores = Line(self.cluster.cores)


class _Simulation:
    """Threads as generators that yield the time at which they go on."""

    def __init__(self, costs: Costs, cluster: Cluster, seed: int) -> None:
        self.costs, self.cluster, self.random = costs, cluster, random.Random(seed)
        self.now = 0.0
        self.given, self.taken = Line(), Line()  # the store's two directions
        self.received = self.sent = self.requests = 0.0

    def run(self, outputs: Sequence[Output], *, parts: bool) -> float:
        """Seconds until everything is done."""
        cluster, due = self.cluster, list[tuple[float, int, Generator[float]]]()
        slow = set(self.random.sample(range(cluster.workers), round(cluster.slow * cluster.workers)))
        workers = [_Worker(cluster, cluster.slowness if k in slow else 1.0) for k in range(cluster.workers)]
        queues = [list(reversed(outputs[k :: len(workers)])) for k in range(len(workers))] if parts else [list(reversed(outputs))]
        shared = [self.tasks(queues[k % len(queues)]) for k in range(len(workers))]
        for thread in range(cluster.threads):
            for k, worker in enumerate(workers):
                tasks = self.tasks(queues[k % len(queues)]) if cluster.streams else shared[k]
                due.append((self.costs.start, thread * len(workers) + k, self.thread(worker, tasks)))
        heapq.heapify(due)
        while due:
            self.now, number, process = due[0]
            if (then := next(process, None)) is None:
                heapq.heappop(due)
            else:
                heapq.heapreplace(due, (then, number, process))
        return self.now

    def tasks(self, queue: list[Output]) -> Iterator[tuple[Output, _Task, int, bool]]:
        """The tasks of file after file, with their numbers of requests; True with the last that a worker did before it died."""
        while queue:
            output = queue.pop()
            task = _Task.of(output, self.costs, self.cluster)
            asked = [round((k + 1) * task.requests) - round(k * task.requests) for k in range(task.count)]
            while self.random.random() < self.cluster.losses:
                lost = max(1, round(task.count * self.random.random()))
                for number in range(lost):
                    yield output, task, asked[number], number == lost - 1
            for number in asked:
                yield output, task, number, False

    def thread(self, worker: _Worker, tasks: Iterator[tuple[Output, _Task, int, bool]]) -> Generator[float]:
        cluster, costs, slow = self.cluster, self.costs, worker.slowness
        for output, task, wanted, died in tasks:
            waits, asked = self.ask(wanted)
            yield self.now + waits * slow
            nbytes = task.inward + asked * costs.header
            self.received += nbytes
            yield max(
                worker.inward.serve(self.now, nbytes / cluster.inward * slow),
                self.given.serve(self.now, nbytes / cluster.store),
                self.now + _receiving(nbytes, cluster) * slow,
            )
            yield worker.cores.serve(self.now, task.cpu * slow)
            self.sent += task.outward
            yield max(
                worker.outward.serve(self.now, task.outward / cluster.outward * slow),
                self.taken.serve(self.now, task.outward / cluster.store if cluster.streams else 0),
                self.now + _sending(task.outward, output.written, cluster) * slow,
            )
            if died:
                yield self.now + costs.start

    def ask(self, wanted: int) -> tuple[float, int]:
        """Seconds of waiting for the answers to so many requests, and how many it takes."""
        asked, waits = wanted, wanted * self.cluster.latency
        for _ in range(wanted if self.cluster.failures else 0):
            while self.random.random() < self.cluster.failures:
                asked += 1
                waits += self.cluster.latency + self.cluster.backoff
        self.requests += asked
        return waits, asked


def simulate(outputs: Sequence[Output], costs: Costs, cluster: Cluster, *, seed: int = 0, parts: bool = False) -> Outcome:
    """The time by events. A worker that is free takes the next file, or with ``parts`` those of its part only (``--part I/N``)."""
    simulation = _Simulation(costs, cluster, seed)
    seconds = simulation.run(outputs, parts=parts)
    return Outcome(seconds, "", simulation.received, simulation.sent, simulation.requests)


# ---------------------------------------------------------------------------------------------------------------------------------
# The tables


def table(measured: dict[str, Any], plans: dict[str, Any]) -> str:
    """What docs/clusters.md shows: the jobs, and their times on each cluster by arithmetic, with the simulation beside it."""
    facts = []
    for name, row in plans.items():
        found = [Output(*numbers) for numbers in row["files"]]
        cells = [
            format_size(sum(output.read for output in found)),
            format_size(sum(output.written for output in found)),
            f"{len(found):,}",
            f"{sum(output.requests for output in found):,}",
            f"{row['tensors']:,}",
            f"{_time(row['planning_seconds'])}, {format_size(row['planning_memory'])}",
            f"{format_size(row['peak_memory'])}, {row['workers']}",
        ]
        facts.append(f"| {JOBS[name].title} | {' | '.join(cells)} |")
    rows, troubled, ratios = [], [], []
    for name, row in plans.items():
        outputs, cells = [Output(*numbers) for numbers in row["files"]], []
        for known in CLUSTERS:
            cluster, costs = replace(known, threads=row["workers"]), Costs.of(measured, known.sink, JOBS[name].work)
            sums, events = estimate(outputs, costs, cluster), simulate(outputs, costs, cluster)
            ratios.append(events.seconds / sums.seconds)
            troubled.append(simulate(outputs, costs, replace(cluster, **TROUBLE)).seconds / events.seconds)
            cells.append(f"{_time(sums.seconds)}, {sums.bound} (× {ratios[-1]:.2f})")
        rows.append(f"| {JOBS[name].title} | {' | '.join(cells)} |")
    summary = (
        f"Simulated times are {min(ratios):.2f} to {max(ratios):.2f} of those by arithmetic. Where {TROUBLE['failures']:.0%} of the "
        f"requests are cut, {TROUBLE['losses']:.0%} of the files lose their worker, and {TROUBLE['slow']:.0%} of the workers are half "
        f"as fast, they are {min(troubled):.2f} to {max(troubled):.2f} times as long."
    )
    return "\n".join(
        [
            "| Conversion | Read | Written | Files | Requests | Tensors | Planning | A worker's memory, connections |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            *facts,
            "",
            f"| Time, bound by (× simulated) | {' | '.join(cluster.name for cluster in CLUSTERS)} |",
            f"|---|{'---|' * len(CLUSTERS)}",
            *rows,
            "",
            summary,
        ]
    )


def _time(seconds: float) -> str:
    """``54 s``, ``12 min``, ``1.5 h``."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------------------------------------------------------------------------
# The command


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables, or makes what they are made of."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description="What conversions of terabytes would take.")
    parser.add_argument("what", nargs="?", choices=("print", "measure", "plan", "serve"), default="print")
    parser.add_argument("--only", choices=JOBS, help="plan: this one, printed; serve: its source, until the input ends")
    parser.add_argument("--write", action="store_true", help="print: into docs/clusters.md, too")
    parser.add_argument("--rounds", type=int, default=3, help="measure: of which the middle counts")
    options = parser.parse_args(arguments)
    if options.what == "measure":
        with tempfile.TemporaryDirectory() as folder:
            COSTS.write_text(json.dumps(measuring.measure_all(Path(folder), options.rounds), indent=1) + "\n", encoding="utf-8")
    elif options.what == "serve":
        with serve(JOBS[options.only]) as server:
            print(server.url, flush=True)
            sys.stdin.read()
    elif options.what == "plan" and options.only:
        print(json.dumps(describe_plan(options.only)))
    elif options.what == "plan":
        rows = []
        for name in JOBS:
            command = [sys.executable, "-m", "benchmarks.scale", "plan", "--only", name]
            rows.append(f'"{name}": {subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()}')
        PLANS.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    else:
        found = table(json.loads(COSTS.read_text(encoding="utf-8")), json.loads(PLANS.read_text(encoding="utf-8")))
        print(found)
        if options.write:
            PAGE.write_text(BLOCK.sub(lambda _: f"<!-- scale -->\n{found}\n<!-- end of scale -->", PAGE.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
