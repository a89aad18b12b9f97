"""Serves a checkpoint and takes files, as S3 does, each connection after a wait and at a rate: clients are measured with it, and no store.

    python -m tools.slow_store --size 256MB --latency 0.1 --rate 100MB

``bucket/source/`` is a checkpoint in one file, whose bytes are the same block again and again; it can be read by plain HTTP, too. Of what
is written, files of up to 1 MiB are kept, since runs keep their state in such, and of others the size. It knows of S3 what s3fs asks for.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import numpy as np

from streamconv.units import parse_size
from tools.range_server import Checkpoint, Handler, Server

BUCKET, SOURCE = "bucket", "source"
KEPT = 1 << 20  # bytes of a file whose content is kept
_BLOCK = memoryview(np.random.default_rng(0).bytes(1 << 20))
_AGE = "2026-01-01T00:00:00.000Z"


class Store(Server):
    """The store.

    Args:
        size: bytes of the source, about.
        latency: seconds before each answer.
        rate: bytes a second of each connection, in either direction.
        port: 0: one that is free.

    Attributes:
        files: sizes of what is there by name; ``contents`` those of small ones.
    """

    def __init__(self, size: int, latency: float, rate: float, port: int = 0) -> None:
        self.latency, self.rate = latency, rate
        checkpoint = Checkpoint({f"layers.{k}.weight": ("bfloat16", (size // 8 // 4096, 2048)) for k in range(8)}, max_shard_size=size * 2)
        self.heads = {f"{SOURCE}/{name}": file.head for name, file in checkpoint.files.items()}
        self.files = {f"{SOURCE}/{name}": file.size for name, file in checkpoint.files.items()}
        self.contents: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, int]] = {}
        self.numbers = count()
        super().__init__(_Handler, port=port)

    def read(self, name: str, start: int, stop: int) -> Iterator[bytes | memoryview]:
        """The bytes of a range, piece by piece."""
        head = self.contents.get(name) or self.heads.get(name, b"")
        if start < len(head):
            yield head[start:stop]
        at = max(start, len(head))
        while at < stop:
            offset = at % len(_BLOCK)
            piece = _BLOCK[offset : offset + min(stop - at, 256 << 10)]
            yield piece
            at += len(piece)


class _Handler(Handler):
    server: Store

    def answer(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        name = unquote(parts.path).lstrip("/").removeprefix(BUCKET).lstrip("/")
        if self.command in ("PUT", "POST"):
            self._take(name, query)
            return
        time.sleep(self.server.latency)
        if self.command == "DELETE":
            self.server.uploads.pop(query.get("uploadId", [""])[0], None)
            if "uploadId" not in query:
                self.server.files.pop(name, None)
            self.send(204, {}, size=0)
        elif not name:
            self._send_xml(self._listing(query))
        elif name in self.server.files:
            self.send_range(self.server.files[name], f"{self.server.files[name]:x}", partial(self._paced, name))
        else:
            self.send_text(404)

    def _take(self, name: str, query: dict[str, list[str]]) -> None:
        """Receives a file or a part of one, at the rate; or begins or completes an upload."""
        started, nbytes, content = time.monotonic(), 0, b""
        for piece in self.body():
            nbytes += len(piece)
            if nbytes <= KEPT:
                content += piece
            time.sleep(max(0.0, started + nbytes / self.server.rate - time.monotonic()))
        time.sleep(self.server.latency)
        upload = query.get("uploadId", [""])[0]
        if "uploads" in query:
            upload = f"upload{next(self.server.numbers)}"
            self.server.uploads[upload] = {}
            self._send_xml(f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>")
        elif self.command == "POST":
            self.server.files[name] = sum(self.server.uploads.pop(upload).values())
            self._send_xml("<CompleteMultipartUploadResult><ETag>1</ETag></CompleteMultipartUploadResult>")
        else:
            if upload:
                self.server.uploads[upload][int(query["partNumber"][0])] = nbytes
            else:
                self.server.files[name] = nbytes
                if nbytes <= KEPT:
                    self.server.contents[name] = content
            self.send(200, {"ETag": f'"{nbytes:x}"'}, size=0)

    def _listing(self, query: dict[str, list[str]]) -> str:
        if "uploads" in query:
            return "<ListMultipartUploadsResult></ListMultipartUploadsResult>"
        prefix = query.get("prefix", [""])[0]
        rows = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{size}</Size><ETag>{size:x}</ETag><LastModified>{_AGE}</LastModified></Contents>"
            for name, size in sorted(self.server.files.items())
            if name.startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"

    def _paced(self, name: str, start: int, stop: int) -> Iterator[bytes | memoryview]:
        """The bytes of a range, at the rate."""
        started, sent = time.monotonic(), 0
        for piece in self.server.read(name, start, stop):
            yield piece
            sent += len(piece)
            time.sleep(max(0.0, started + sent / self.server.rate - time.monotonic()))

    def _send_xml(self, text: str) -> None:
        data = f'<?xml version="1.0"?>{text}'.encode()
        self.send(200, {"Content-Type": "application/xml"}, [data], size=len(data))


def main(arguments: list[str] | None = None) -> int:
    """Serves until it is terminated."""
    parser = argparse.ArgumentParser(prog="python -m tools.slow_store", description="Serve a store that is slow in a way that is known.")
    parser.add_argument("--size", type=parse_size, default=parse_size("256MB"), help="bytes of the source (default: 256MB)")
    parser.add_argument("--latency", type=float, default=0.1, help="seconds before each answer (default: 0.1)")
    parser.add_argument("--rate", type=parse_size, default=parse_size("100MB"), help="bytes a second of a connection (default: 100MB)")
    parser.add_argument("--port", type=int, default=0, help="default: any that is free")
    options = parser.parse_args(arguments)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with Store(options.size, options.latency, options.rate, options.port) as store:
        print(store.url, flush=True)
        ended.wait()
        print(f"{store.peak} requests at the same time at most", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
