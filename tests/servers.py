"""Real servers on this machine: nginx, a proxy that fails on purpose, an S3 store, a stand-in for the Hugging Face Hub, computed files.

Each is a context manager; each listens on a port of its own and ends with its block. ``requests`` says what it was asked.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
from hub_server import Hub, hub, uploads_to_hub

from streamconv.units import parse_size
from tools import range_server
from tools.make_checkpoint import Shapes
from tools.range_server import Handler, Request, Server

__all__ = [
    "S3",
    "Computed",
    "Fault",
    "Flaky",
    "Hub",
    "Nginx",
    "Request",
    "computed",
    "flaky",
    "hub",
    "nginx",
    "s3",
    "silent_port",
    "unavailable",
    "uploads_to_hub",
]

ROOT = Path(__file__).parent.parent
_PATIENCE = 120.0
_BLOCK = 256 << 10

# Without this, a killed test would leave its servers behind.
_TIED = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []

T = TypeVar("T")


def _free_port() -> int:
    """A port that nobody listens on at this moment."""
    with silent_port() as port:
        return port


@contextmanager
def silent_port() -> Iterator[int]:
    """A port that nobody listens on, nor can while it is kept: who connects is refused."""
    with socket.socket() as kept:
        kept.bind(("127.0.0.1", 0))
        yield int(kept.getsockname()[1])


def _get(url: str) -> tuple[int, bytes]:
    """Status and body of a page of a server on this machine; status 0 where nobody answers."""
    parts = urlsplit(url)
    if parts.scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(parts.netloc, timeout=30, context=context)
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    try:
        connection.request("GET", parts.path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


@contextmanager
def _process(command: Sequence[str | Path], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with the block, or when this process dies, with what it started."""
    process = subprocess.Popen([*_TIED, *command], start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
            break
        process.wait(5)
        if process.stdout is not None:
            process.stdout.close()


# ---------------------------------------------------------------------------------------------------------------------------------
# nginx

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

_CONF = """
daemon off;
master_process off;
pid {temp}/nginx.pid;
error_log {temp}/error.log;
events {{ worker_connections 512; }}
http {{
    log_format records escape=json '{{"method": "$request_method", "path": "$request_uri", "status": $status, "sent": $body_bytes_sent,'
        ' "received": 0, "headers": {{"range": "$http_range", "authorization": "$http_authorization", "if-match": "$http_if_match",'
        ' "if-range": "$http_if_range", "user-agent": "$http_user_agent"}}}}';
    access_log {temp}/access.log records;
    client_body_temp_path {temp}/body;
    proxy_temp_path {temp}/proxy;
    fastcgi_temp_path {temp}/fastcgi;
    uwsgi_temp_path {temp}/uwsgi;
    scgi_temp_path {temp}/scgi;
    default_type application/octet-stream;
    types {{ text/html html; application/json json; }}
    sendfile on;
    absolute_redirect off;
    keepalive_timeout 30;
    server {{
        listen 127.0.0.1:{port}{tls};
        root {root};
        autoindex {autoindex};
        etag {etag};
        {rate}
        {ranges}
        {extra}
        location /noranges/ {{ alias {root}/; max_ranges 0; }}
        location /forbidden/ {{ return 403; }}
        location /private/ {{ alias {root}/; auth_basic "files"; auth_basic_user_file {temp}/users; }}
        location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
        {elsewhere}
        location = /.ready {{ access_log off; return 200 {temp}; }}
    }}
}}
"""


@dataclass
class Nginx:
    """A running nginx; ``requests`` has those that it is through with, as its access log tells (it may be a moment late).

    ``env`` is empty, or what makes requests, curl and Python's ssl trust its certificate.
    """

    url: str
    root: Path
    temp: Path
    env: dict[str, str]

    @property
    def requests(self) -> list[Request]:
        return [Request(**json.loads(line)) for line in (self.temp / "access.log").read_text().splitlines()]

    @property
    def errors(self) -> str:
        return (self.temp / "error.log").read_text()


def _certificate(folder: Path) -> dict[str, str]:
    """Makes ``certificate.pem`` and ``key.pem`` for this machine; returns the environment in which clients trust it."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    made: list[str | Path] = [
        "-keyout",
        folder / "key.pem",
        "-out",
        folder / "certificate.pem",
        "-subj",
        "/CN=localhost",
        "-days",
        "2",
        "-nodes",
    ]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run(["openssl", "req", "-x509", *made, *kind], check=True, capture_output=True, timeout=60)
    return dict.fromkeys(("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE"), str(folder / "certificate.pem"))


@contextmanager
def nginx(
    root: Path,
    *,
    rate: str | None = None,
    autoindex: bool = False,
    ranges: bool = True,
    etag: bool = True,
    elsewhere: str = "",
    user: str = "user",
    password: str = "password",
    tls: bool = False,
    extra: str = "",
) -> Iterator[Nginx]:
    """nginx serving the files under ``root``; the test is skipped where there is no nginx.

    The same files are also under ``/noranges/`` (ranges are ignored), ``/private/`` (HTTP basic authentication), ``/moved/`` (redirects
    to ``/``) and, where that is given, ``/elsewhere/`` (redirects to the server ``elsewhere``); whatever is under ``/forbidden/`` is a 403.

    Args:
        root: whose files are served; must be readable.
        rate: bytes per second of each connection, as nginx writes them (``"2m"``).
        autoindex: whether a directory is answered with a list of its files (HTML), else 403.
        ranges: False: ranges are ignored everywhere, the whole file comes with status 200.
        etag: False: no ETag, only Last-Modified.
        elsewhere: the base URL of another server.
        user: of ``/private/``.
        password: of ``/private/``.
        tls: serve https, with a certificate of its own (see ``Nginx.env``).
        extra: more lines for nginx's server block.
    """
    if NGINX is None:
        pytest.skip("nginx is not installed")
    with tempfile.TemporaryDirectory(prefix="nginx-") as name:
        temp = Path(name)
        (temp / "users").write_text(f"{user}:{{PLAIN}}{password}\n")
        for log in ("access.log", "error.log"):
            (temp / log).touch()
        env = _certificate(temp) if tls else {}
        for _ in range(5):
            port = _free_port()
            conf = _CONF.format(
                temp=temp,
                root=root.absolute(),
                port=port,
                tls=f" ssl; ssl_certificate {temp}/certificate.pem; ssl_certificate_key {temp}/key.pem" if tls else "",
                autoindex="on" if autoindex else "off",
                etag="on" if etag else "off",
                rate=f"limit_rate {rate};" if rate else "",
                ranges="" if ranges else "max_ranges 0;",
                elsewhere=f"location /elsewhere/ {{ rewrite ^/elsewhere/(.*)$ {elsewhere}/$1 redirect; }}" if elsewhere else "",
                extra=extra,
            )
            (temp / "nginx.conf").write_text(conf)
            with _process([NGINX, "-c", temp / "nginx.conf", "-e", temp / "error.log", "-p", temp]) as process:
                url = f"http{'s' * tls}://127.0.0.1:{port}"
                until = time.monotonic() + _PATIENCE
                while process.poll() is None and time.monotonic() < until:
                    if _get(f"{url}/.ready")[1] == str(temp).encode():  # and not another one, which was quicker to take the port
                        yield Nginx(url, root, temp, env)
                        return
                    time.sleep(0.01)
        raise RuntimeError(f"nginx does not start: {(temp / 'error.log').read_text()}")


# ---------------------------------------------------------------------------------------------------------------------------------
# A proxy that fails on purpose


@dataclass(frozen=True)
class Fault:
    """What happens to a request instead of, or to, its answer.

    Attributes:
        status: this status, with ``headers`` and the text ``body``, comes instead of an answer; the server behind never hears of it.
        drop: the connection is reset before any answer; the server behind never hears of the request.
        lose: the server behind does what it is asked, but the connection is reset instead of its answer.
        cut: the connection is closed after so many bytes of the answer's body (Content-Length tells of more).
        reset: the cut is a reset (RST) and not an orderly end.
        cut_upload: the connection is reset after so many bytes of the request's body; the server behind never hears of it.
        shorten: the answer is well-formed, but so many bytes shorter than it should be, its Content-Range included.
        delay: seconds of silence before the answer.
        stall: seconds of silence in the middle of the body, after ``cut`` bytes (0: after the first piece); it then goes on.
        headers: put in place of the answer's own, such as ``{"ETag": '"other"'}``; an empty text removes one.
        without: the server behind does not see these headers of the request, such as ``("range",)``.
    """

    status: int = 0
    drop: bool = False
    lose: bool = False
    cut: int = -1
    reset: bool = False
    cut_upload: int = -1
    shorten: int = 0
    delay: float = 0.0
    stall: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    body: str = ""


def unavailable(retry_after: str = "") -> Fault:
    """503, with or without Retry-After (seconds)."""
    return Fault(status=503, headers={"Retry-After": retry_after} if retry_after else {})


_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "content-length", "server", "date"}


class Flaky(Server):
    """The proxy. ``faults``, ``every``, ``probability``, ``first``, ``only``, ``latency`` and ``rate`` may be set at any time.

    ``requests`` has all that arrived, each with the ``fault`` that was done to it; ``injected`` counts those that had one.
    """

    upstream: str
    faults: Sequence[Fault] = ()
    every: int = 0
    probability: float = 0.0
    first: int = 0
    only: Callable[[Request], bool] | None = None
    latency: float = 0.0
    rate: float | None = None

    def __init__(self, upstream: str, host: str, seed: int) -> None:
        parts = urlsplit(upstream)
        self.upstream = parts.netloc
        self._random = random.Random(seed)
        self._stopping = threading.Event()
        self._eligible = 0
        self._drawn = 0
        super().__init__(_Proxy, host)
        self.url += parts.path

    def sleep(self, seconds: float) -> None:
        """Does nothing for so long; it ends with the server."""
        if self._stopping.wait(seconds):
            raise ConnectionAbortedError("the server ends")

    def stop(self) -> None:
        self._stopping.set()
        super().stop()

    @property
    def injected(self) -> int:
        return sum(bool(request.fault) for request in list(self.requests))

    def draw(self, request: Request) -> Fault | None:
        """The fault of this request, if it gets one; the faults take turns."""
        if not self.faults or (self.only is not None and not self.only(request)):
            return None
        with self.lock:
            self._eligible += 1
            due = not (self.every or self.probability or self.first)
            due |= bool(self.every) and self._eligible % self.every == 0
            due |= self._eligible <= self.first
            due |= bool(self.probability) and self._random.random() < self.probability
            if not due:
                return None
            self._drawn += 1
            fault = self.faults[(self._drawn - 1) % len(self.faults)]
        request.fault = ", ".join(f"{key}={value}" for key, value in vars(fault).items() if value != getattr(Fault, key, {}))
        return fault


class _Proxy(Handler):
    server: Flaky

    def answer(self) -> None:
        fault = self.server.draw(self.record) or Fault()
        if self.server.latency + fault.delay:
            self.server.sleep(self.server.latency + fault.delay)
        if fault.drop:
            self._break(reset=True)
            return
        if fault.status:
            for _ in self.body():
                pass
            self.send_text(fault.status, fault.body, fault.headers)
            return
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            response = self._forward(upstream, fault)
            if response is None or fault.lose:
                self._break(reset=True)
            else:
                self._return(response, fault)
                response.close()
        finally:
            upstream.close()

    def _forward(self, upstream: http.client.HTTPConnection, fault: Fault) -> http.client.HTTPResponse | None:
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in (_HOP - {"content-length"} | {"expect"} | set(fault.without)):
                upstream.putheader(name, value)
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        if chunked:
            upstream.putheader("Transfer-Encoding", "chunked")
        upstream.endheaders()
        for piece in self.body():
            if 0 <= fault.cut_upload < self.record.received:
                return None
            upstream.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        if chunked:
            upstream.send(b"0\r\n\r\n")
        return upstream.getresponse()

    def _return(self, response: http.client.HTTPResponse, fault: Fault) -> None:
        changed = {name.lower() for name in fault.headers}
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOP | changed]
        headers += [(name, value) for name, value in fault.headers.items() if value]
        length = response.getheader("Content-Length")
        if length is None and self.command != "HEAD" and response.status not in (204, 304):
            data = response.read()  # of unknown length: a page or a listing, which is short
            self.send(response.status, headers, self._pieces(iter([data]), fault), size=len(data))
            return
        size = int(length or 0)
        if fault.shorten:
            size = max(0, size - fault.shorten)
            headers = [(name, _shorter(value, size) if name.lower() == "content-range" else value) for name, value in headers]
        self.send(response.status, headers, self._pieces(self._read(response, size), fault), size=size)

    def _read(self, response: http.client.HTTPResponse, size: int) -> Iterator[bytes]:
        block = _BLOCK if self.server.rate is None else max(1024, min(_BLOCK, int(self.server.rate / 50)))
        while size and (piece := response.read(min(size, block))):
            size -= len(piece)
            yield piece
        if size:
            raise ConnectionResetError("the server behind ended too soon")

    def _pieces(self, pieces: Iterator[bytes], fault: Fault) -> Iterator[bytes]:
        done = 0
        started = time.monotonic()
        for piece in pieces:
            if 0 <= fault.cut <= done + len(piece):
                yield piece[: fault.cut - done]
                if not fault.stall:
                    self._break(reset=fault.reset)
                    return
                self.server.sleep(fault.stall)
                yield piece[fault.cut - done :]
                fault = Fault()
            else:
                yield piece
            done += len(piece)
            if self.server.rate:
                self.server.sleep(max(0.0, done / self.server.rate - (time.monotonic() - started)))

    def _break(self, *, reset: bool) -> None:
        if reset:  # an immediate close, with what is unsent thrown away
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            with suppress(OSError):  # the client was first
                self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError("as asked")


def _shorter(content_range: str, size: int) -> str:
    start = int(re.findall(r"\d+", content_range)[0])
    return re.sub(r"-\d+", f"-{start + size - 1}", content_range)


@contextmanager
def flaky(
    upstream: str,
    *faults: Fault,
    every: int = 0,
    probability: float = 0.0,
    first: int = 0,
    seed: int = 0,
    only: Callable[[Request], bool] | None = None,
    latency: float = 0.0,
    rate: float | None = None,
    host: str = "127.0.0.1",
) -> Iterator[Flaky]:
    """A proxy in front of ``upstream`` (a base URL) that injects faults, in turn, into the requests that are due.

    Args:
        upstream: the server behind; its path becomes part of the proxy's ``url``.
        *faults: what to inject; none: the proxy only counts (and slows down).
        every: each so manieth request is due.
        probability: of a request to be due, drawn from ``seed``.
        first: so many requests are due, then no more of them. Without ``every``, ``probability`` and ``first`` each is due.
        seed: for ``probability``.
        only: which requests count at all, such as ``lambda r: r.method == "GET" and r.range is not None``.
        latency: seconds before each answer.
        rate: bytes per second of each answer's body.
        host: where to listen; 127.0.0.2 and so on are other hosts to a client that must not tell them its token.
    """
    with Flaky(upstream, host, seed) as server:
        server.faults, server.every, server.probability, server.first = faults, every, probability, first
        server.only, server.latency, server.rate = only, latency, rate
        yield server


# ---------------------------------------------------------------------------------------------------------------------------------
# S3


@dataclass
class S3:
    """moto's S3 with one bucket, behind a proxy that counts, and fails if its ``faults`` are set.

    Attributes:
        bucket: name of the bucket.
        env: environment by which botocore, s3fs and what they are used by find it, with keys that any request may use.
        proxy: where clients' requests go; those of the methods here go past it.
    """

    bucket: str
    env: dict[str, str]
    proxy: Flaky
    client: Any

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def requests(self) -> list[Request]:
        return self.proxy.requests

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def put_folder(self, folder: Path, prefix: str = "") -> None:
        """Every file under a folder, as ``prefix`` and its relative name."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(prefix + path.relative_to(folder).as_posix(), path.read_bytes())

    def get(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return data

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def uploads(self) -> list[str]:
        """The keys of multipart uploads that were neither completed nor aborted; their parts would be paid for."""
        return [entry["Key"] for entry in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ())]

    def clear(self) -> None:
        """Empties the bucket and forgets every request, for the next test."""
        for key in self.keys():
            self.client.delete_object(Bucket=self.bucket, Key=key)
        for entry in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ()):
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=entry["Key"], UploadId=entry["UploadId"])
        self.proxy.faults = ()
        self.proxy.forget()


@contextmanager
def s3(bucket: str = "bucket") -> Iterator[S3]:
    """moto's S3 server, in a process of its own; parts of uploads but the last must have 5 MiB, as S3 has it.

    The environment is not touched: ``for name, value in s3.env.items(): monkeypatch.setenv(name, value)``, or ``os.environ | s3.env``
    for a process. s3fs keeps instances: a test in this process starts with ``s3fs.S3FileSystem.clear_instance_cache()``.
    """
    import boto3  # type: ignore[import-untyped]
    from botocore.config import Config  # type: ignore[import-untyped]

    with tempfile.TemporaryDirectory(prefix="moto-") as name, (Path(name) / "log").open("wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        with _process(command, stdout=subprocess.DEVNULL, stderr=log, cwd=name, env=os.environ | {"TMPDIR": name}) as process:
            found = _await(process, lambda: re.search(r"Running on (http://\S+?)[\x1b\s]", (Path(name) / "log").read_text()))
            keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_DEFAULT_REGION": "us-east-1"}
            client = boto3.client(
                "s3",
                endpoint_url=found[1],
                aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
                region_name=keys["AWS_DEFAULT_REGION"],
                config=Config(retries={"mode": "standard"}),
            )
            client.create_bucket(Bucket=bucket)
            with flaky(found[1]) as proxy:
                none = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"}
                yield S3(bucket, {**keys, **none, "AWS_ENDPOINT_URL": proxy.url}, proxy, client)
            client.close()


def _await(process: subprocess.Popen[bytes], ready: Callable[[], T | None]) -> T:
    """What ``ready`` gives once it gives something, while the process lives."""
    until = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < until:
        if (found := ready()) is not None:
            return found
        time.sleep(0.01)
    raise RuntimeError(f"{process.args!r} does not start")


# ---------------------------------------------------------------------------------------------------------------------------------
# Checkpoints that never exist


@dataclass
class Computed:
    """A server of computed files in a process of its own, and the same ``checkpoint`` here, to know what they hold."""

    url: str
    checkpoint: range_server.Checkpoint

    @property
    def requests(self) -> list[Request]:
        return [Request(**entry) for entry in json.loads(_get(f"{self.url}/.requests")[1])]


@contextmanager
def computed(
    shapes: Shapes | None = None, *, model: str = "llama-3-8b", size: str = "", max_shard_size: str = "5GB", seed: int = 0
) -> Iterator[Computed]:
    """Serves a safetensors checkpoint whose bytes are computed when they are asked for (``tools.range_server``).

    Args:
        shapes: dtype (``"bfloat16"``) and shape of each tensor by its name; or else those of ``model``.
        model: a key of ``tools.make_checkpoint.MODELS``; there is a config.json then.
        size: about how big, by the number of layers, such as ``"20GB"``.
        max_shard_size: of a file.
        seed: other bytes.
    """
    shard = parse_size(max_shard_size)
    with tempfile.TemporaryDirectory(prefix="computed-") as name:
        what = [model, *(["--size", size] if size else [])]
        if shapes is None:
            checkpoint = range_server.of_model(model, size=parse_size(size) if size else None, max_shard_size=shard, seed=seed)
        else:
            checkpoint = range_server.Checkpoint(shapes, max_shard_size=shard, seed=seed)
            (Path(name) / "shapes.json").write_text(json.dumps(shapes))
            what = ["--shapes", f"{name}/shapes.json"]
        command = [sys.executable, "-m", "tools.range_server", *what, "--max-shard-size", str(shard), "--seed", str(seed)]
        with (Path(name) / "url").open("wb") as out, _process(command, stdout=out, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
            found = _await(process, lambda: re.fullmatch(r"(\S+)\n", (Path(name) / "url").read_text()))
            yield Computed(found[1], checkpoint)
