"""Serves byte ranges of checkpoints that never exist: headers are laid out, data bytes are computed from their offsets.

    python -m tools.range_server llama-3-8b --size 20GB --max-shard-size 5GB --port 8000

It prints its address when it listens, and answers ``/.requests`` with what it has been asked so far, as JSON. The bytes of any range
can also be had without the server (``Checkpoint.read``, ``Checkpoint.digest``), so that what a conversion made of them can be judged.
The classes ``Server`` and ``Handler`` are what the stand-in servers of the tests are made of.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import numpy as np

from streamconv.errors import UsageError
from streamconv.units import format_size, parse_size
from tools import make_checkpoint as made

# ---------------------------------------------------------------------------------------------------------------------------------
# A server that remembers what it was asked

Pieces = Iterable[bytes | memoryview]
Headers = Mapping[str, str] | Iterable[tuple[str, str]]
_BLOCK = 256 << 10


@dataclass
class Request:
    """A request as a server saw it: ``sent`` counts bytes of the answer's body, ``received`` those of the request's, times are seconds."""

    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0
    received: int = 0
    fault: str = ""
    started: float = field(default_factory=time.monotonic)
    ended: float = 0.0

    @property
    def range(self) -> tuple[int, int | None] | None:
        """First and last byte asked for; None where the whole file was."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        return (int(found[1]), int(found[2]) if found[2] else None) if found else None


class Server(ThreadingHTTPServer):
    """A server on a free port (or the one given) in a thread of its own.

    Attributes:
        requests: what it was asked, in order of arrival; an entry grows while it is answered.
        errors: what went wrong in the server itself; ``stop`` raises the first of them.
        peak: the most requests that were being answered at the same time.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, handler: type[Handler], host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), handler)
        self.url = f"http://{host}:{self.server_address[1]}"
        self.requests: list[Request] = []
        self.errors: list[BaseException] = []
        self.peak = 0
        self.lock = threading.Lock()
        self._open = 0
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name=f"server {self.url}", daemon=True)
        self._thread.start()

    @property
    def sent(self) -> int:
        """Bytes of all answers' bodies."""
        return sum(request.sent for request in list(self.requests))

    def forget(self) -> None:
        """Starts the records afresh."""
        with self.lock:
            self.requests.clear()
            self.peak = 0

    def begin(self, request: Request) -> None:
        with self.lock:
            self.requests.append(request)
            self._open += 1
            self.peak = max(self.peak, self._open)

    def end(self, request: Request) -> None:
        """Called before the last piece is sent: whoever has it and asks anew is not counted twice."""
        with self.lock:
            if not request.ended:
                request.ended = time.monotonic()
                self._open -= 1

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        with self.lock:
            self._connections[thread] = request
        thread.start()

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self._connections.pop(threading.current_thread(), None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError | TimeoutError):
            self.errors.append(error)

    def stop(self) -> None:
        """Ends it and every connection; raises what went wrong in it."""
        self.shutdown()
        self._thread.join()
        with self.lock:
            connections = dict(self._connections)
            for connection in connections.values():
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # the client was first
        for thread in connections:
            thread.join(10)
        self.server_close()
        if self.errors:
            raise self.errors[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Handler(BaseHTTPRequestHandler):
    """Answers by ``answer``; takes care of the records, bodies and ranges."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    record: Request

    def answer(self) -> None:
        """Answers a request of any method."""
        raise NotImplementedError

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.record = Request(self.command, self.path, headers)
        self._left = int(headers.get("content-length") or 0)
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self.server.begin(self.record)
        try:
            self.answer()
            for _ in self.body():
                pass  # what was not read would be taken for the next request
        finally:
            self.server.end(self.record)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _serve  # noqa: N815 - as http.server wants them

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Says nothing: there are records."""

    def send_response_only(self, code: int, message: str | None = None) -> None:
        if code >= 200 and hasattr(self, "record"):
            self.record.status = int(code)
        super().send_response_only(code, message)

    def body(self) -> Iterator[bytes]:
        """The request's body, piece by piece."""
        while self._chunked:
            size = int(self.rfile.readline().split(b";")[0] or b"0", 16)
            if size:
                yield self._received(self.rfile.read(size))
            else:
                self._chunked = False
            self.rfile.readline()
        while self._left:
            piece = self.rfile.read(min(self._left, _BLOCK))
            if not piece:
                raise ConnectionResetError("the client left in the middle of its request")
            self._left -= len(piece)
            yield self._received(piece)

    def _received(self, piece: bytes) -> bytes:
        self.record.received += len(piece)
        return piece

    def send(self, status: int, headers: Headers, pieces: Pieces = (), *, size: int) -> None:
        """Sends an answer whose body has ``size`` bytes; a HEAD request gets the same without the body."""
        self.send_response(status)
        for name, value in headers.items() if isinstance(headers, Mapping) else headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command != "HEAD":
            self.send_pieces(pieces, size)

    def send_pieces(self, pieces: Pieces, size: int) -> None:
        for piece in pieces:
            self.record.sent += len(piece)
            if self.record.sent >= size:
                self.server.end(self.record)
            try:
                self.wfile.write(piece)
            except OSError:
                self.record.sent -= len(piece)
                raise

    def send_text(self, status: int, text: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Sends a short text."""
        data = (text or HTTPStatus(status).phrase).encode()
        self.send(status, {"Content-Type": "text/plain; charset=utf-8", **(headers or {})}, [data], size=len(data))

    def send_json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Sends a value as JSON."""
        data = json.dumps(value).encode()
        self.send(status, {"Content-Type": "application/json", **(headers or {})}, [data], size=len(data))

    def send_range(self, size: int, tag: str, read: Callable[[int, int], Pieces], headers: Mapping[str, str] | None = None) -> None:
        """Sends a file of ``size`` bytes or the one range asked for, as RFC 9110 has it; a range in another form gets the whole file."""
        known = {"Accept-Ranges": "bytes", "ETag": f'"{tag}"', "Content-Type": "application/octet-stream", **(headers or {})}
        wanted = self.headers.get("If-Match")
        if wanted and wanted not in ("*", f'"{tag}"'):
            self.send_text(412)
            return
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not found or not any(found.groups()) or self.headers.get("If-Range", f'"{tag}"') != f'"{tag}"':
            self.send(200, known, read(0, size), size=size)
            return
        first, last = found.groups()
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= min(size, stop):
            self.send_text(416, headers={"Content-Range": f"bytes */{size}"})
            return
        self.send(206, {**known, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, read(start, stop), size=stop - start)


# ---------------------------------------------------------------------------------------------------------------------------------
# Bytes computed from their offsets

TILE = 1 << 20
# The bits that stay keep the exponents of every float type small: no number is infinite or none at all.
_KEPT = 0xBFBF_BFBF_BFBF_BFBF
_WORD = (1 << 64) - 1


@functools.cache
def _tile() -> np.ndarray[Any, np.dtype[np.uint64]]:
    # A bit generator's stream, unlike that of the methods built on it, is the same in every version.
    return np.random.PCG64(20).random_raw(TILE // 8) & np.uint64(_KEPT)


def tile_key(seed: int, number: int) -> int:
    """What every word of a tile is xor-ed with: splitmix64 of the tile's number."""
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return (z ^ (z >> 31)) & _KEPT


def computed(seed: int, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes from ``start`` to ``stop`` of an endless file, tile by tile. A piece is valid until the next is asked for."""
    room = np.empty(TILE // 8, dtype=np.uint64)
    view = room.data.cast("B")
    while start < stop:
        number, offset = divmod(start, TILE)
        end = min(TILE, offset + stop - start)
        words = slice(offset // 8, -(-end // 8))
        np.bitwise_xor(_tile()[words], np.uint64(tile_key(seed, number)), out=room[words])
        yield view[offset:end]
        start += end - offset


# ---------------------------------------------------------------------------------------------------------------------------------
# Checkpoints made of them


@dataclass(frozen=True)
class File:
    """A file that is never stored: first some literal bytes, then computed ones. ``tag`` is its ETag."""

    name: str
    head: bytes
    size: int
    seed: int

    @property
    def tag(self) -> str:
        return hashlib.sha256(self.head + struct.pack("<QQ", self.size, self.seed)).hexdigest()[:32]

    def read(self, start: int, stop: int) -> Iterator[bytes | memoryview]:
        """The bytes of a range, piece by piece."""
        if start < len(self.head):
            yield self.head[start:stop]
        yield from computed(self.seed, max(start - len(self.head), 0), max(stop, len(self.head)) - len(self.head))


class Checkpoint:
    """A sharded safetensors checkpoint, with an index and a config, that exists as a description only.

    Attributes:
        files: every file by its name.
        places: for each tensor its file and where in it its bytes are, from the start of the file.
    """

    def __init__(
        self, shapes: made.Shapes, *, max_shard_size: int = 5_000_000_000, config: Mapping[str, Any] | None = None, seed: int = 0
    ) -> None:
        self.files: dict[str, File] = {}
        self.places: dict[str, tuple[str, int, int]] = {}
        shards = made.split(shapes, max_shard_size)
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            head, tensors = made.layout(shard)
            own = int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest())
            self.files[name] = File(name, head, tensors[-1].offset + tensors[-1].nbytes, own)
            for tensor in tensors:
                self.places[tensor.name] = (name, tensor.offset, tensor.offset + tensor.nbytes)
        weight_map = {name: self.places[name][0] for name in sorted(self.places)}
        index = {"metadata": {"total_size": made.total_size(shapes)}, "weight_map": weight_map}
        self._literal("model.safetensors.index.json", index)
        if config is not None:
            self._literal("config.json", config)

    def _literal(self, name: str, value: object) -> None:
        data = json.dumps(value, indent=2).encode() + b"\n"
        self.files[name] = File(name, data, len(data), 0)

    def read(self, tensor: str) -> Iterator[bytes | memoryview]:
        """The bytes of a tensor, piece by piece; a piece is valid until the next is asked for."""
        file, start, stop = self.places[tensor]
        return self.files[file].read(start, stop)

    def digest(self, tensors: Iterable[str], head: bytes = b"") -> str:
        """The sha256 of ``head`` and the bytes of some tensors, one after the other: what a file with them must have."""
        total = hashlib.sha256(head)
        for tensor in tensors:
            for piece in self.read(tensor):
                total.update(piece)
        return total.hexdigest()


def of_model(model: str, *, size: int | None = None, max_shard_size: int | None = None, seed: int = 0) -> Checkpoint:
    """A checkpoint of a known model (``tools.make_checkpoint.MODELS``), of about ``size`` bytes by its number of layers."""
    known = made.MODELS[model]
    config = known.config if size is None else made.with_size(known, known.config, size)
    return Checkpoint(known.shapes(config), max_shard_size=max_shard_size or parse_size(known.max_shard_size), config=config, seed=seed)


def serve(checkpoint: Checkpoint, host: str = "127.0.0.1", port: int = 0) -> Server:
    """Serves the files of a checkpoint under ``/``; the caller stops it."""

    class Files(Handler):
        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path == "/.requests":
                self.send_json([asdict(request) for request in list(self.server.requests) if request is not self.record])
                return
            file = checkpoint.files.get(path.lstrip("/"))
            if file is None or self.command not in ("GET", "HEAD"):
                self.send_text(404 if file is None else 405)
                return
            self.send_range(file.size, file.tag, file.read)

    return Server(Files, host, port)


# ---------------------------------------------------------------------------------------------------------------------------------
# The command


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(arguments: list[str] | None = None) -> int:
    """Serves until it is terminated."""
    parser = argparse.ArgumentParser(prog="python -m tools.range_server", description="Serve a checkpoint whose bytes are computed.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("model", nargs="?", choices=sorted(made.MODELS), metavar="MODEL", help=", ".join(made.MODELS))
    source.add_argument("--shapes", type=Path, metavar="FILE", help='JSON: {"name": ["bfloat16", [2, 3]], ...}')
    parser.add_argument("--size", type=_size, help="as many layers as bring the total near this size, such as 20GB")
    parser.add_argument("--max-shard-size", type=_size, metavar="SIZE", help="of a file (default: the model's, or 5GB)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="default: any that is free")
    options = parser.parse_args(arguments)
    if options.shapes is not None:
        shapes = {name: (dtype, tuple(shape)) for name, (dtype, shape) in json.loads(options.shapes.read_text()).items()}
        checkpoint = Checkpoint(shapes, max_shard_size=options.max_shard_size or 5_000_000_000, seed=options.seed)
    else:
        checkpoint = of_model(options.model, size=options.size, max_shard_size=options.max_shard_size, seed=options.seed)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with serve(checkpoint, options.host, options.port) as server:
        print(server.url, flush=True)
        total = sum(file.size for file in checkpoint.files.values())
        print(f"{len(checkpoint.files)} files, {format_size(total)}", file=sys.stderr)
        ended.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
