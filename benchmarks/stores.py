"""An object store by s3fs, as it is written and read here, beside obstore, in pairs: first one, then the other, each in a new process.

    python -m benchmarks.stores --rounds 5 --size 256MB
    python -m benchmarks.stores --rounds 5 --size 1GB --before CHECKOUT

The store is moto's, behind a proxy that waits before each answer and lets a connection's bytes pass at a rate. Printed are the ratios of
seconds (above 1: obstore takes less), and what each process takes at most beside what its libraries take. It needs the tests' packages,
and ``pip install obstore``, which nothing else does.

With ``--before``, one file is read, written, and brought from a web server to S3 by the code of another checkout and by this one, in pairs,
of `tools.slow_store`. What is timed is the making of the file, without the requests before and after it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamconv import memory
from streamconv.units import format_size, parse_size

ROOT = Path(__file__).parent.parent
LATENCY, RATE = 0.1, 100e6  # seconds before an answer; bytes per second of a connection, either way
PIECE = 1 << 20  # bytes that are written or read at a time
SIDES = ("s3fs", "obstore")


# A process that is measured ------------------------------------------------------------------------------------------


def open_store() -> Any:
    from obstore.store import S3Store

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    return S3Store("bucket", endpoint=endpoint, client_options={"allow_http": True}, virtual_hosted_style_request=False)


def write_by_s3fs(name: str, nbytes: int) -> None:
    from streamconv.storage.objects import ObjectSink

    piece = memoryview(os.urandom(PIECE))
    with ObjectSink("s3://bucket").stream(name, nbytes) as write:
        for _ in range(nbytes // PIECE):
            write(piece)


def write_by_obstore(name: str, nbytes: int) -> None:
    import obstore

    from streamconv.storage.objects import BUFFERED, part_size

    piece = memoryview(bytearray(os.urandom(PIECE)))
    with obstore.open_writer(open_store(), name, buffer_size=part_size(nbytes), max_concurrency=BUFFERED) as file:
        for _ in range(nbytes // PIECE):
            file.write(bytes(piece))  # what is written from is used again


def read_by_s3fs(name: str, nbytes: int) -> None:
    from streamconv.storage.ranges import Ranges

    url, view, ranges = f"s3://bucket/{name}", memoryview(bytearray(PIECE)), Ranges()
    ranges.expect([(url, 0, nbytes)])
    for start in range(0, nbytes, PIECE):
        ranges.read(url, start, view)
    ranges.close()


def read_by_obstore(name: str, nbytes: int) -> None:
    import obstore

    view, filled = bytearray(PIECE), 0
    for chunk in obstore.get(open_store(), name, options={"range": (0, nbytes)}).stream(min_chunk_size=PIECE // 4):
        data = memoryview(chunk)
        while data:  # into a buffer, as a reader's is filled
            count = min(len(data), PIECE - filled)
            view[filled : filled + count] = data[:count]
            data, filled = data[count:], (filled + count) % PIECE


WORK: dict[tuple[str, str], Callable[[str, int], None]] = {
    ("write", "s3fs"): write_by_s3fs,
    ("write", "obstore"): write_by_obstore,
    ("read", "s3fs"): read_by_s3fs,
    ("read", "obstore"): read_by_obstore,
}


def measure(what: str, side: str, count: int, nbytes: int) -> None:
    """Does the work with ``count`` files at a time and prints what it takes, as JSON."""
    work = WORK[what, side]
    small = "warm" if what == "write" else "file0"
    work(small, PIECE)  # loads the libraries
    before, cpu, started = memory.resident(), time.process_time(), time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda number: work(f"file{number}", nbytes), range(count)))
    took = time.monotonic() - started
    print(json.dumps({"seconds": took, "cpu": time.process_time() - cpu, "memory": memory.peak() - before}))


def make_one_file(src: str, dst: str) -> None:
    """Makes a file of a checkpoint and prints what it takes, as JSON; by whatever code this process finds."""
    import streamconv
    from streamconv.running.making import make_files

    plan = streamconv.plan(src, dst, single_file=True)
    cpu, started = time.process_time(), time.monotonic()
    make_files(plan, range(len(plan.files)))
    took = time.monotonic() - started
    print(json.dumps({"seconds": took, "cpu": time.process_time() - cpu, "memory": memory.peak()}))


# The pairs ---------------------------------------------------------------------------------------------------------------


def slow_bodies(proxy: Any, rate: float) -> None:
    """Has the bodies of requests come at a rate, as those of answers do."""
    import servers

    whole = servers._Proxy.body

    def body(self: Any) -> Iterator[bytes]:
        started, done = time.monotonic(), 0
        for piece in whole(self):
            yield piece
            done += len(piece)
            proxy.sleep(max(0.0, done / rate - (time.monotonic() - started)))

    servers._Proxy.body = body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=parse_size, default=parse_size("256MiB"), help="bytes of a file")
    parser.add_argument("--files", type=int, nargs="+", default=[1, 4], help="how many at a time")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "SIDE"), help=argparse.SUPPRESS)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="compare with the code there instead of obstore")
    parser.add_argument("--make", nargs=2, metavar=("SRC", "DST"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_one_file(*args.make)
        return
    if args.before:
        compare_code(args.before, args.size, args.rounds)
        return
    size = args.size // PIECE * PIECE
    if args.measure:
        measure(*args.measure, args.files[0], size)
        return
    sys.path.insert(0, str(ROOT / "tests" / "fixtures"))
    import servers

    with servers.s3() as store:
        slow_bodies(store.proxy, RATE)
        for number in range(max(args.files)):
            store.put(f"file{number}", os.urandom(PIECE) * (size // PIECE))
        store.proxy.latency, store.proxy.rate = LATENCY, RATE
        for what in ("write", "read"):
            for count in args.files:
                compare(what, count, size, args.rounds, store.env)


def compare_code(before: Path, size: int, rounds: int) -> None:
    """Runs pairs of two checkouts on one file and prints their ratios."""
    sys.path.insert(0, str(ROOT))
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": os.devnull}
    with tempfile.TemporaryDirectory() as folder, _slow_store(size) as url:
        env = os.environ | keys | {"AWS_ENDPOINT_URL": url}
        here, there, made = f"{folder}/here", f"{url}/bucket/source/", f"{folder}/made"
        make = [sys.executable, str(Path(__file__).resolve()), "--make"]
        subprocess.run([*make, there, here], env=env | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
        rows = {"read": (there, made), "write": (here, "s3://bucket/written"), "web to S3": (there, "s3://bucket/brought")}
        for what, (src, dst) in rows.items():
            results: dict[Path, list[dict[str, float]]] = {before: [], ROOT: []}
            for number in range(rounds):
                for code in (before, ROOT) if number % 2 else (ROOT, before):
                    target = f"{dst}-{number}-{code.name}"
                    done = subprocess.run(
                        [*make, src, target], env=env | {"PYTHONPATH": str(code)}, check=True, capture_output=True, text=True
                    )
                    shutil.rmtree(target, ignore_errors=True)
                    results[code].append(json.loads(done.stdout))
            ratios = [old["seconds"] / new["seconds"] for old, new in zip(results[before], results[ROOT], strict=True)]
            print(f"{what} 1 x {format_size(size)}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            print_medians({"before": results[before], "now": results[ROOT]})


@contextmanager
def _slow_store(size: int) -> Iterator[str]:
    """The URL of a `tools.slow_store` in a process of its own."""
    command = [sys.executable, "-m", "tools.slow_store", "--size", str(size), "--latency", str(LATENCY), "--rate", str(int(RATE))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def print_medians(results: dict[str, list[dict[str, float]]]) -> None:
    """A line for each side."""
    for side, measured in results.items():
        seconds, cpu, taken = (statistics.median(row[key] for row in measured) for key in ("seconds", "cpu", "memory"))
        print(f"  {side:8} {seconds:6.1f} s, {cpu:5.1f} s of CPU, {format_size(int(taken))}", flush=True)


def compare(what: str, count: int, size: int, rounds: int, env: dict[str, str]) -> None:
    """Runs pairs and prints their ratios."""
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 else reversed(SIDES):
            command = [sys.executable, "-m", "benchmarks.stores", "--size", str(size), "--files", str(count), "--measure", what, side]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | env, check=True, capture_output=True, text=True)
            results[side].append(json.loads(done.stdout))
    ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(results["s3fs"], results["obstore"], strict=True)]
    print(f"{what} {count} x {format_size(size)}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print_medians(results)


if __name__ == "__main__":
    main()
