"""Measures what the parts of a conversion cost on this machine, for ``benchmarks.scale``.

Every figure is a slope: the same command on a small and on a larger checkpoint, and the difference of what the two processes took over the
difference of their sizes, so that neither starting nor the caches' first fill is in it. Processor time is counted, user's and system's, not
time on the clock: sources are served by the same machine, which would otherwise be measured with it. Servers speak plain HTTP here; what
TLS adds is measured by itself, on a connection without a network. moto's S3 does, too, and a client hashes what it sends then.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.compare import describe_machine
from tools import range_server
from tools.make_checkpoint import MODELS, Model, Shapes, deepseek_shapes, llama_shapes, make_checkpoint, with_layers
from tools.measure import Measurement, measure

GB = 1e9
RECIPES = Path(__file__).parent / "recipes"
LIMIT = "1GB"
LLAMA = Model(MODELS["llama-3-8b"].config | {"vocab_size": 32000}, llama_shapes)
# One expert in 64: the matrices have their shapes, and a layer fits a laptop.
DEEPSEEK = Model(
    MODELS["deepseek-v3"].config | {"n_routed_experts": 4, "vocab_size": 1280, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
    deepseek_shapes,
)
WORKS: dict[str, tuple[Model, list[str]]] = {
    "copy": (LLAMA, ["--max-shard-size", "800MB"]),
    "permute": (LLAMA, ["--recipe", str(RECIPES / "llama-rotary.yaml")]),
    "transpose": (LLAMA, ["--recipe", str(RECIPES / "llama-transpose.yaml")]),
    "cast": (Model(LLAMA.config | {"torch_dtype": "float32"}, llama_shapes), ["--dtype", "bfloat16"]),
    "dequantize": (DEEPSEEK, ["--recipe", "deepseek3-hf2ms"]),
}
LAYERS = (1, 4)
TINY, TENSORS = 2_000, 20_000  # tensors of 64 numbers, where a task's own cost is measured
RANGES = (200, 2_200)
_RANGES = """
import sys
from streamconv.storage.ranges import Ranges
ranges, view = Ranges(), memoryview(bytearray(4096))
for k in range(int(sys.argv[2])):
    ranges.read(sys.argv[1], k << 19, view)
"""


class Bench:
    """Servers, a folder for what is made, and the commands that are measured."""

    def __init__(self, folder: Path, stack: ExitStack, rounds: int) -> None:
        self.folder, self.stack, self.rounds = folder, stack, rounds
        self._served: dict[str, str] = {}

    def serve(self, model: Model, layers: int) -> str:
        """Where a checkpoint of a model with so many layers can be read."""
        key = f"{model.config['model_type']} {model.config['torch_dtype']} {layers}"
        if key not in self._served:
            config = with_layers(model.config, layers)
            self._served[key] = self.serve_shapes(model.shapes(config), config)
        return self._served[key]

    def serve_shapes(self, shapes: Shapes, config: dict[str, Any] | None = None) -> str:
        checkpoint = range_server.Checkpoint(shapes, max_shard_size=2_000_000_000, config=config)
        return self.stack.enter_context(range_server.serve(checkpoint)).url

    def store(self, model: Model, layers: int) -> str:
        """The same on the disk."""
        path = self.folder / f"{model.config['model_type']}-{model.config['torch_dtype']}-{layers}"
        if not path.exists():
            make_checkpoint(model, path, layers=layers)
        return str(path)

    def run(self, *arguments: str, env: dict[str, str] | None = None) -> Measurement:
        """A streamconv command of its own process.

        Raises:
            RuntimeError: it failed.
        """
        command = [sys.executable, "-m", "tools.hashing", *arguments]
        with tempfile.TemporaryFile() as log:
            found = measure(command, env=os.environ | (env or {}), stdout=subprocess.DEVNULL, stderr=log)
            log.seek(0)
            if found.exit_code:
                raise RuntimeError(f"{' '.join(command)}: exit code {found.exit_code}: {log.read().decode(errors='replace')[-500:]}")
        return found

    def convert(self, source: str, target: str, *options: str, env: dict[str, str] | None = None) -> tuple[Measurement, int]:
        """What a conversion took, and the bytes that it wrote."""
        settings = [source, target, *options, "--max-memory", LIMIT, "--overwrite"]
        planned = subprocess.run(
            [sys.executable, "-m", "tools.hashing", "plan", *settings, "--json"],
            capture_output=True,
            check=True,
            env=os.environ | (env or {}),
        )
        return self.run("convert", *settings, "--no-progress", env=env), int(json.loads(planned.stdout)["bytes_written"])

    def slope(self, small: Callable[[], tuple[Measurement, float]], large: Callable[[], tuple[Measurement, float]]) -> float:
        """Processor seconds for each more, the middle of several rounds."""
        found = []
        for _ in range(self.rounds):
            (low, few), (high, many) = small(), large()
            found.append((cpu(high) - cpu(low)) / (many - few))
        return statistics.median(found)


def cpu(found: Measurement) -> float:
    """Processor seconds of a command."""
    return found.user_seconds + found.system_seconds


def measure_all(folder: Path, rounds: int) -> dict[str, Any]:
    """Every figure; ``folder`` needs room for some gigabytes, and takes them all back."""
    with ExitStack() as stack:
        bench = Bench(folder, stack, rounds)
        memory: dict[str, int] = {}
        rows: dict[str, dict[str, float]] = {
            "file to file": {work: _row(bench, work, "file", "file", memory) for work in ("copy", "permute", "transpose", "cast")},
            "https to file": {work: _row(bench, work, "https", "file", memory) for work in WORKS},
            "https to stream": {work: _row(bench, work, "https", "stream", memory) for work in WORKS},
            "https to s3": {"copy": _row(bench, "copy", "https", "s3", memory)},
        }
        sha256 = _row(bench, "copy", "https", "sha256", memory) - rows["https to stream"]["copy"]
        return {
            "machine": describe_machine(folder) | {"openssl": ssl.OPENSSL_VERSION},
            "cpu_seconds_per_gb": rows | {"sha256": sha256, "tls": _tls(rounds)},
            **_tasks_and_tensors(bench),
            "request": _request(bench),
            "peak_memory": memory,
        }


def _row(bench: Bench, work: str, origin: str, sink: str, memory: dict[str, int]) -> float:
    """Processor seconds for a GB of output."""
    model, options = WORKS[work]
    source = bench.serve if origin == "https" else bench.store
    env: dict[str, str] = {}
    if sink == "s3":
        sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "fixtures"))
        from servers import s3

        store = bench.stack.enter_context(s3())
        env, target = store.env, f"{store.url}/target"
    else:
        target = {"file": str(bench.folder / "target"), "stream": "discard://target", "sha256": "sha256://target"}[sink]

    def of(layers: int) -> Callable[[], tuple[Measurement, float]]:
        def run() -> tuple[Measurement, float]:
            found, total = bench.convert(source(model, layers), target, *options, env=env)
            memory[f"{origin} to {sink}, {work}"] = max(found.peak_vmhwm, memory.get(f"{origin} to {sink}, {work}", 0))
            return found, total / GB

        return run

    found = bench.slope(of(LAYERS[0]), of(LAYERS[1]))
    print(f"{origin} to {sink}, {work}: {found:.3f} s of processor time for a GB", file=sys.stderr)
    return found


def _tasks_and_tensors(bench: Bench) -> dict[str, float]:
    """What a tensor costs in planning and a task in running: casts of very many very small tensors."""
    served = {
        count: bench.serve_shapes({f"layers.{k}.weight": ("float32", (64,)) for k in range(count)}, {"model_type": "none"})
        for count in (TINY, TENSORS)
    }
    peaks: dict[int, int] = {}

    def plan(count: int) -> tuple[Measurement, float]:
        found = bench.run("plan", served[count], str(bench.folder / "none"), "--dtype", "bfloat16", "--quiet")
        peaks[count] = found.peak_vmhwm
        return found, count

    def convert(count: int) -> tuple[Measurement, float]:
        return bench.run("convert", served[count], "discard://none", "--dtype", "bfloat16", "--quiet", "--overwrite"), count

    planning = bench.slope(lambda: plan(TINY), lambda: plan(TENSORS))
    converting = bench.slope(lambda: convert(TINY), lambda: convert(TENSORS))
    few = bench.serve_shapes({"weight": ("float32", (64,))}, {"model_type": "none"})
    starts = [cpu(bench.run("convert", few, "discard://none", "--dtype", "bfloat16", "--quiet", "--overwrite")) for _ in range(3)]
    return {
        "start_seconds": statistics.median(starts),
        "planning_cpu_seconds_per_tensor": planning,
        "planning_bytes_per_tensor": (peaks[TENSORS] - peaks[TINY]) / (TENSORS - TINY),
        "task_cpu_seconds": max(0.0, converting - planning),
    }


def _request(bench: Bench) -> dict[str, float]:
    """What a range request costs beside its data: processor seconds, and bytes of the request and of the answer's head."""
    address = bench.serve(LLAMA, LAYERS[1]) + "/model-00001-of-00002.safetensors"

    def ask(count: int) -> tuple[Measurement, float]:
        return measure([sys.executable, "-c", _RANGES, address, str(count)], stdout=subprocess.DEVNULL), count

    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    connection.request("GET", urlsplit(address).path, headers={"Range": "bytes=0-4095"})
    answer = connection.getresponse()
    connection.close()
    # urllib3 sends a few headers more than http.client does: some 150 bytes.
    head = len(f"GET {urlsplit(address).path} HTTP/1.1\r\n\r\n") + 150
    return {
        "cpu_seconds": bench.slope(lambda: ask(RANGES[0]), lambda: ask(RANGES[1])),
        "header_bytes": head + sum(len(name) + len(value) + 4 for name, value in answer.getheaders()),
    }


def _tls(rounds: int, size: int = 1 << 28) -> float:
    """Processor seconds that decrypting a GB takes a client."""
    with tempfile.TemporaryDirectory() as name:
        key, certificate = f"{name}/key.pem", f"{name}/certificate.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-subj", "/CN=localhost"],
            check=True, capture_output=True,
        )  # fmt: skip
        serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        serving.load_cert_chain(certificate, key)
        asking = ssl.create_default_context(cafile=certificate)
        there, here = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = serving.wrap_bio(there, here, server_side=True)
        client = asking.wrap_bio(here, there, server_hostname="localhost")
        for side in (client, server, client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    block, room, found = bytes(1 << 20), bytearray(1 << 20), []
    for _ in range(rounds):
        seconds = 0.0
        for _ in range(size >> 20):
            server.write(block)
            begin, left = time.process_time(), len(block)
            while left:
                left -= client.read(left, room)
            seconds += time.process_time() - begin
        found.append(seconds / size * GB)
    return statistics.median(found)
