"""Clusters of Ray: joining one, or starting one here, and what its nodes offer."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from streamconv.errors import RunError, UsageError


@contextmanager
def join_cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected; a connection that was there stays. Nothing is printed on stdout meanwhile.

    Args:
        address: of the cluster; unless given, that of ``RAY_ADDRESS``, of this machine's, or of one that is started here.

    Raises:
        UsageError: it does not answer, or this process has joined another one.
    """
    ray: Any = importlib.import_module("ray")
    with ExitStack() as stack:
        if ray.is_initialized():
            joined = ray.get_runtime_context().gcs_address
            if address not in {None, "auto", joined}:
                raise UsageError(f"--ray-address {address}: this process has joined {joined} already: call ray.shutdown() first")
            stack.enter_context(redirect_stdout(sys.stderr))  # Ray prints there what happens to nodes
        else:
            stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
            if threading.current_thread() is threading.main_thread():
                stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
            stack.callback(ray.shutdown)
            _init(ray, address or os.environ.get("RAY_ADDRESS"))
        yield ray


def _init(ray: Any, address: str | None) -> None:
    """Joins or starts a cluster.

    Raises:
        UsageError: it does not answer.
    """
    if "://" in (address or ""):
        raise UsageError(f"--ray-address {address}: give HOST:PORT, and run on a machine that is a node of that cluster")
    here = ""  # the last cluster that was started on this machine, perhaps long gone
    with suppress(OSError):
        here = (Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster").read_text()
    known = (here or address) if address in {None, "auto"} else address
    try:
        try:
            host, colon, port = (known or "").rpartition(":")
            if colon:  # Ray itself would try for minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
        except OSError:
            if address:
                raise
            known = "local"
        if known and known == here and _wants_token(port):
            known = "auto"  # to which alone Ray sends this machine's token
        ray.init(address=known, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        where = f"--ray-address {address}" if address else "--engine ray"
        raise UsageError(f"{where}: no cluster can be joined: {first_line(error)}; see 'ray status', and RAY_AUTH_MODE") from error


def _wants_token(port: str) -> bool:
    """Whether the head of this machine's cluster asks for a token; Ray itself finds out by trying for 20 seconds."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "gcs_server" and f"--gcs_server_port={port}" in process.cmdline():
                return process.environ().get("RAY_AUTH_MODE", "").lower() == "token"
    return False


def first_line(error: object) -> str:
    """What an error of Ray says before it goes into detail."""
    return str(error).strip().split("\n", maxsplit=1)[0]


def name_of(node: dict[str, Any]) -> str:
    """``host (192.0.2.7, 84b09ba1...)``: names may be shared, a node's id is not."""
    first, *others = dict.fromkeys((node["NodeManagerHostname"], node["NodeName"], node["NodeManagerAddress"], node["NodeID"]))
    return f"{first} ({', '.join(others)})"


def nodes_of(ray: Any) -> list[dict[str, Any]]:
    """The nodes that run tasks.

    Raises:
        RunError: there is none.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not nodes:
        raise RunError("--engine ray: no node of the cluster has a processor for tasks: start one, then run again with --resume")
    return nodes


def offers_of(ray: Any) -> set[tuple[int, int]]:
    """Processors and bytes of memory, as nodes have them for tasks."""
    return {(int(node["Resources"]["CPU"]), int(node["Resources"].get("memory", 0))) for node in nodes_of(ray)}
