"""Files made by tasks of a Ray cluster, a task for each, on whatever nodes have room.

Every node is asked first whether it sees the sources and DST as they are here. A task is `making.make_files` within the memory that it
declares: it chooses tiles for the process that it finds itself in, and gives up when that takes more. What comes after a failed attempt
is decided here, so Ray's own retries are off: a file whose process or node was lost is made again elsewhere, and the bytes that were told
of it are taken back; want of memory means fewer workers, then smaller tiles.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from streamconv import errors, memory
from streamconv.engine.io import describe_os_error
from streamconv.errors import BudgetError, DestinationError, Interrupted, RunError, StreamconvError, UsageError
from streamconv.graph.losses import Losses
from streamconv.planning.fitting import MARGIN, Budget, base_of, refit
from streamconv.planning.plan import Plan
from streamconv.running import making
from streamconv.running.directory import new_suffix
from streamconv.running.executors import MakeFiles
from streamconv.running.filling import Progress, check_sources
from streamconv.running.output import LOG, STATE, state_name
from streamconv.storage import is_url
from streamconv.storage.sinks import open_sink
from streamconv.units import format_size

JOINED = 42 << 20  # bytes: what a connection to Ray takes in a process that has loaded it, and what tasks leave in theirs, ...
LEFT = 12 << 20  # bytes: ... which is this after ...
TASKS = 12  # ... so many, when a process ends: more of them would leave more
RETRIES = 4  # of a file whose process or node was lost
ANSWER = 120.0  # seconds that nodes have to say what they see: a process has to start there
EVERY = 0.5  # seconds between two messages of a task
LOOK = 0.1  # seconds between two looks at what a task's process takes
PATIENCE = 10.0  # seconds that cancelled tasks have to clear up
SHORT = "memory"  # the kind of a failure for want of it
_log = logging.getLogger(__name__)


class _Failure(NamedTuple):
    """Why a task ends without its file: the class of the error, its line, and the bytes of memory that it speaks of."""

    kind: str
    message: str
    nbytes: int = 0


_Said = str | int | dict[str, tuple[Any, ...]] | _Failure
"""What a task says, see `_make`."""


@dataclass(frozen=True)
class _Terms:
    """What a task keeps to. In bytes: ``memory`` is declared and never exceeded, tiles are chosen for ``limit``.

    ``mark`` is the name of a file in DST, and ``word`` stands in it.
    """

    workers: int
    memory: int
    limit: int
    mark: str
    word: str


@dataclass
class _Attempt:
    """A file that is being made: with how much, by which node, and how many bytes of it have come."""

    number: int
    workers: int
    memory: int = 0
    smallest: bool = False
    lost: int = 0
    node: str = ""
    done: int = 0

    def fits(self, offer: Mapping[str, float]) -> bool:
        """Whether a node that offers this has room for it."""
        return offer["CPU"] >= self.workers and offer.get("memory", 0) >= self.memory


# At the driver ---------------------------------------------------------------------------------------------------------


class Ray:
    """The executor ``ray``."""

    threads = 1

    def load(self, root: str) -> int:
        if root.startswith("hf://"):
            raise UsageError(f"--engine ray: files go up to {root} from one machine: leave it out, or give a DST that all nodes reach")
        try:
            importlib.import_module("ray")
        except ImportError:
            raise UsageError("--engine ray needs Ray: pip install 'streamconv[ray]'") from None
        return JOINED

    @contextmanager
    def open(self, plan: Plan, here: MakeFiles, address: str | None) -> Iterator[MakeFiles]:  # noqa: ARG002 - nodes make them
        self.load(plan.root)
        with _connect(address) as ray:
            cluster = _Cluster(ray, plan)
            cluster.check()
            yield cluster.make_files


EXECUTOR = Ray()


@contextmanager
def _connect(address: str | None) -> Iterator[Any]:
    """Ray, connected; a connection that was there stays."""
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
        raise UsageError(f"{where}: no cluster can be joined: {_first_line(error)}; see 'ray status', and RAY_AUTH_MODE") from error


def _wants_token(port: str) -> bool:
    """Whether the head of this machine's cluster asks for a token; Ray itself finds out by trying for 20 seconds."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "gcs_server" and f"--gcs_server_port={port}" in process.cmdline():
                return process.environ().get("RAY_AUTH_MODE", "").lower() == "token"
    return False


def _first_line(error: object) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0]


def _name(node: dict[str, Any]) -> str:
    """``host (192.0.2.7, 84b09ba1...)``: names may be shared, a node's id is not."""
    first, *others = dict.fromkeys((node["NodeManagerHostname"], node["NodeName"], node["NodeManagerAddress"], node["NodeID"]))
    return f"{first} ({', '.join(others)})"


class _Cluster:
    """A cluster that has been joined, for one plan."""

    def __init__(self, ray: Any, plan: Plan) -> None:
        self._ray, self._plan = ray, plan
        self._mark, self._word = f"{state_name(plan.single)}/{LOG}", plan.digest()
        self._base = self._bound = 0
        self._losses = Losses()
        self._task = ray.remote(max_calls=TASKS, max_retries=0, num_returns="streaming", scheduling_strategy="SPREAD")(_make)

    def check(self) -> None:
        """Asks every node whether it can take part, and sees to it that there is memory for every file.

        Raises:
            UsageError: a node lacks something.
            BudgetError: no node offers enough.
        """
        with self._leave_mark() as mark:
            self._base = MARGIN + LEFT + max(self._ask(self._nodes(), mark), default=0)
        self._bound = self._plan.peak_memory + max(0, self._base - base_of(self._plan))
        for number in range(len(self._plan.files)):
            self._agree(_Attempt(number, self._plan.workers))

    @contextmanager
    def _leave_mark(self) -> Iterator[str]:
        """The name of a file in DST that is there while the block runs; DST, too, unless there is one."""
        root = Path(self._plan.root)
        mark = f"{STATE}{new_suffix()}"
        with ExitStack() as stack:
            if not is_url(self._plan.root):
                try:
                    for folder in reversed([folder for folder in (root, *root.parents) if not folder.exists()]):
                        folder.mkdir()
                        stack.callback(_remove_folder, folder)
                    stack.callback((root / mark).unlink, missing_ok=True)
                    (root / mark).write_text(mark)
                except OSError as error:
                    raise DestinationError(f"{root}: cannot be written: {error.strerror}; give another DST") from error
            yield mark

    def _ask(self, nodes: Sequence[dict[str, Any]], mark: str) -> Iterator[int]:
        """Bytes that a process takes at each node, where all can take part."""
        affinity = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        asked = self._ray.put(_question(self._plan).to_json())
        look = self._ray.remote(num_cpus=0, max_retries=0)(_look)
        places = [affinity(node["NodeID"], soft=False) for node in nodes]
        answers = [look.options(scheduling_strategy=place).remote(asked, _version(), mark) for place in places]
        deadline = time.monotonic() + ANSWER
        for node, answer in zip(nodes, answers, strict=True):
            try:
                fault, nbytes = self._ray.get(answer, timeout=max(1.0, deadline - time.monotonic()))
            except self._ray.exceptions.GetTimeoutError:
                fault = f"does not answer within {ANSWER:.0f} s"
            except self._ray.exceptions.RayError as error:
                fault = f"cannot run streamconv {_version()}: {_first_line(getattr(error, 'cause', None) or error)}"
            if not fault:
                yield nbytes
            elif any(node["NodeID"] == other["NodeID"] for other in self._nodes()):  # else it is gone
                raise UsageError(f"node {_name(node)} {fault}; mend that, or take the node out of the cluster")

    def _nodes(self) -> list[dict[str, Any]]:
        """The nodes that run tasks.

        Raises:
            RunError: there is none.
        """
        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        if not nodes:
            raise RunError("--engine ray: no node of the cluster has a processor for tasks: start one, then run again with --resume")
        return nodes

    def _agree(self, attempt: _Attempt) -> _Terms:
        """How a file is to be made: with so many workers at most, within what some node offers.

        Raises:
            BudgetError: no node offers enough.
        """
        path, mine = self._plan.files[attempt.number].path, _bare(self._plan.for_files([attempt.number]))
        offers = [(int(node["Resources"]["CPU"]), int(node["Resources"].get("memory", 0))) for node in self._nodes()]
        room, workers = max(nbytes for _, nbytes in offers), attempt.workers
        limit = min(self._bound, room)
        try:
            if attempt.smallest:
                limit = min(limit, _find_least(mine, self._base))
            while True:
                fitted = refit(mine, Budget(limit, workers, lambda: self._base))
                if fitted.workers == 1 or any(cpus >= fitted.workers and nbytes >= fitted.peak_memory for cpus, nbytes in offers):
                    break
                workers = fitted.workers - 1
        except BudgetError as error:
            if room >= self._bound:
                raise BudgetError(f"{path}: {error}", error.needed) from None
            raise BudgetError(
                f"{path}: its task takes {format_size(error.needed)} of memory, and no node offers more than {format_size(room)}: "
                f"start one with 'ray start --memory {error.needed}' or more",
                error.needed,
            ) from None
        declared = max(fitted.peak_memory, min(attempt.memory, room))
        return _Terms(fitted.workers, declared, fitted.peak_memory, self._mark, self._word)

    def make_files(self, plan: Plan, numbers: Iterable[int], tell: Progress) -> Losses:
        """Makes these files of the plan, as `making.make_files` does; what their values have lost.

        Raises:
            StreamconvError: what the first task that failed for good raised; others are cancelled, and finished files stay.
        """
        waiting = deque(_Attempt(number, plan.workers) for number in numbers)
        running: dict[Any, _Attempt] = {}
        self._losses.clear()
        try:
            while waiting or running:
                ahead = 4 + 2 * sum(int(node["Resources"]["CPU"]) for node in self._nodes())
                while waiting and len(running) < ahead:
                    running[self._start(waiting[0])] = waiting[0]
                    waiting.popleft()
                ready, _ = self._ray.wait(list(running), timeout=1.0)
                for task in ready or self._find_stuck(running):
                    attempt = running[task]
                    following = self._hear(task, attempt, tell)
                    if following is not attempt:
                        del running[task]
                        if following:
                            tell(-attempt.done)
                            waiting.appendleft(following)
        finally:
            self._cancel(running)
        return self._losses

    def _start(self, attempt: _Attempt) -> Any:
        terms = self._agree(attempt)
        attempt.workers, attempt.memory = terms.workers, terms.memory
        make = self._task.options(num_cpus=terms.workers, memory=terms.memory)
        return make.remote(_bare(self._plan.for_files([attempt.number])).to_json(), terms)

    def _hear(self, task: Any, attempt: _Attempt, tell: Progress) -> _Attempt | None:
        """Takes in what a task says next; returns the attempt that follows: the same, another one, or none when the file is there."""
        file, raised = self._plan.files[attempt.number], self._ray.exceptions
        try:
            heard = self._ray.get(next(task))
        except StopIteration:
            tell(file.size - attempt.done)
            _log.info("%s: %s done by node %s", file.path, format_size(file.size), attempt.node)
            return None
        except raised.OutOfMemoryError:
            return self._with_less(attempt, "its node ran out of memory, and Ray stopped the task", attempt.memory)
        except (raised.RayTaskError, raised.RaySystemError) as error:
            if not isinstance(error, raised.TaskCancelledError):
                raise RunError(f"{file.path}: node {attempt.node}: {_first_line(getattr(error, 'cause', None) or error)}") from error
            lost = error
        except raised.RayError as error:
            lost = error
        else:
            return self._take(heard, attempt, tell)
        _log.info("%s: its task was lost: %s", file.path, _first_line(lost))
        if attempt.lost == RETRIES:
            raise RunError(
                f"{file.path}: its task was lost {RETRIES + 1} times, at last at node {attempt.node}: {_first_line(lost)}; "
                "mend that and rerun the same command with --resume"
            )
        following = replace(attempt, lost=attempt.lost + 1, node="", done=0)
        if isinstance(lost, raised.WorkerCrashedError):  # the kernel, too, ends processes for want of memory
            following.workers = max(1, attempt.workers // 2)
        return following

    def _take(self, heard: _Said, attempt: _Attempt, tell: Progress) -> _Attempt:
        if isinstance(heard, dict):
            self._losses += Losses.from_plain(heard)
        elif isinstance(heard, str):
            attempt.node = next((_name(node) for node in self._nodes() if node["NodeID"] == heard), heard)
        elif isinstance(heard, int):
            tell(heard - attempt.done)
            attempt.done = heard
        elif heard.kind == SHORT:
            return self._with_less(attempt, heard.message, heard.nbytes)
        else:
            raise getattr(errors, heard.kind)(f"{heard.message} (at node {attempt.node})")
        return attempt

    def _with_less(self, attempt: _Attempt, fault: str, nbytes: int) -> _Attempt:
        """The attempt after one that wanted for memory.

        Raises:
            RunError: there is nothing left to save.
        """
        path, had = self._plan.files[attempt.number].path, format_size(attempt.memory)
        _log.info("%s: %s; with %d workers, %s was declared", path, fault, attempt.workers, had)
        if attempt.smallest:
            needed = -(-(self._bound + max(0, nbytes - attempt.memory) + MARGIN) // 10**6)
            raise RunError(
                f"{path}: {fault} (node {attempt.node}), even with one worker and the smallest tiles, where {had} was declared: "
                f"rerun with --resume and --max-memory {needed}MB, on nodes that have it free"
            )
        workers, smallest = max(1, attempt.workers // 2), attempt.workers == 1
        return _Attempt(attempt.number, workers, attempt.memory, smallest=smallest, lost=attempt.lost)

    def _find_stuck(self, running: dict[Any, _Attempt]) -> list[Any]:
        """Tasks that wait for what no node offers any more; they are cancelled."""
        offers = [node["Resources"] for node in self._nodes()]
        waiting = {task: attempt for task, attempt in running.items() if not attempt.node}
        stuck = [task for task, attempt in waiting.items() if not any(attempt.fits(offer) for offer in offers)]
        for task in stuck:
            running[task].memory = 0
            self._ray.cancel(task)
        return stuck

    def _cancel(self, running: Iterable[Any]) -> None:
        """Ends tasks, and gives them time to remove what they have begun."""
        pending, deadline = list(running), time.monotonic() + PATIENCE
        for task in pending:
            self._ray.cancel(task)
        while pending and time.monotonic() < deadline:
            for task in self._ray.wait(pending, timeout=0.5)[0]:
                try:
                    self._ray.get(next(task))
                except (StopIteration, self._ray.exceptions.RayError):
                    pending.remove(task)


def _bare(plan: Plan) -> Plan:
    """A plan without what only speaks to users."""
    return replace(plan, checks=(), mapping=(), dropped=(), notes=())


def _question(plan: Plan) -> Plan:
    """What a node is asked about: the sources of a plan, and a node of each kind that there is to evaluate."""
    if not plan.nodes:
        return replace(_bare(plan), files=())
    from streamconv.graph.evaluate import kinds

    return replace(_bare(plan), nodes=tuple(kinds(plan.nodes)), names=(), files=())


def _find_least(plan: Plan, base: int) -> int:
    """Bytes of memory that one worker takes with the smallest tiles, in a process of ``base`` bytes."""
    try:
        return refit(plan, Budget(0, 1, lambda: base)).peak_memory
    except BudgetError as error:
        return error.needed


def _remove_folder(folder: Path) -> None:
    with suppress(OSError):  # somebody else has put something there
        folder.rmdir()


def _version() -> str:
    return str(importlib.import_module("streamconv").__version__)


# At the nodes ----------------------------------------------------------------------------------------------------------

_BASE = [0]  # bytes that this process took before its last task; what that left taken, the next one uses again


def _look(text: str, version: str, mark: str) -> tuple[str, int]:
    """What keeps this node from making files of a plan, if anything, and the bytes that a process here takes before it begins."""
    if (own := _version()) != version:
        return f"has streamconv {own}, not {version}", 0
    plan = Plan.from_json(text)
    if fault := _find_fault(plan, mark, mark):
        return fault, 0
    if plan.nodes:
        from streamconv.graph.evaluate import prepare

        prepare(plan.nodes)
    return "", memory.resident()


def _find_fault(plan: Plan, mark: str, word: str) -> str:
    """What of a plan this node does not see: DST, where the file ``mark`` has ``word`` in it, or a source."""
    root = Path(plan.root)
    try:
        if is_url(plan.root):
            open_sink(plan.root).list()  # which also loads what writing there takes
        else:
            if word not in (root / mark).read_text():
                return f"sees another {root} than the driver"
            draft = root / f"{STATE}{new_suffix()}"
            draft.touch(exist_ok=False)
            draft.unlink()
        check_sources(plan)
    except FileNotFoundError:
        return f"does not see DST {root} as the driver does: it has to be on a file system that all nodes share"
    except OSError as error:
        return f"cannot write to DST {root}: {error.strerror}"
    except StreamconvError as error:
        return f"does not see the sources as the driver does: {str(error).removesuffix('; plan again')}"
    return ""


def _make(text: str, terms: _Terms) -> Iterator[_Said]:
    """A task: makes a plan's one file.

    Says at which node it runs, then how many bytes have come, and at last what values have lost, or what went wrong.
    """
    plan, failures, stop = Plan.from_json(text), list[_Failure](), threading.Event()
    losses = Losses()
    over = threading.Event()  # an interrupted join() would take the thread for dead
    done = excess = 0

    def tell(nbytes: int) -> None:
        nonlocal done
        if stop.is_set():
            raise Interrupted(f"{plan.files[0].path}: interrupted")
        done += nbytes

    def work() -> None:
        try:
            failures.extend(_try_to_make(plan, terms, tell, losses))
        finally:
            over.set()

    threading.Thread(target=work, daemon=True).start()
    try:
        yield str(importlib.import_module("ray").get_runtime_context().get_node_id())
        last_look = time.monotonic()
        while not over.wait(LOOK):
            resident = memory.resident()
            if resident > terms.memory:
                excess = max(excess, resident)
                stop.set()
            if time.monotonic() - last_look >= EVERY:
                last_look = time.monotonic()
                yield done
    finally:
        stop.set()
        over.wait()
    if failures and excess:
        yield _Failure(SHORT, f"its task took {format_size(excess)} of memory", excess)
    elif failures:
        yield failures[0]
    elif losses:
        yield losses.plain()


def _try_to_make(plan: Plan, terms: _Terms, tell: Progress, losses: Losses) -> Iterator[_Failure]:
    """Makes a plan's one file, and adds to ``losses`` what its values have lost; yields why it could not."""
    memory.trim()
    path, overhang = plan.files[0].path, max(0, memory.resident() - _BASE[0]) if _BASE[0] else 0
    try:
        if fault := _find_fault(plan, terms.mark, terms.word):
            yield _Failure("RunError", f"{path}: its node {fault}; mend that and rerun the same command with --resume")
            return
        fitted = refit(plan, Budget(terms.limit, terms.workers, lambda: memory.resident() - overhang + LEFT))
        _BASE[0] = base_of(fitted) - LEFT
        losses += making.make_files(fitted, [0], tell)
    except BudgetError as error:
        yield _Failure(SHORT, "its process takes more before it begins than was planned", error.needed)
    except StreamconvError as error:
        yield _Failure(type(error).__name__, str(error))
    except OSError as error:
        yield _Failure("RunError", str(describe_os_error(error, path)))
    except MemoryError as error:
        yield _Failure(SHORT, f"its task ran out of memory ({error})", terms.memory)
    except Exception as error:  # noqa: BLE001 - the driver has to know
        yield _Failure("RunError", f"{path}: {type(error).__name__}: {error}")
