"""Files made by tasks of a Ray cluster, a task for each, on whatever nodes have room.

Every node is asked first whether it sees the sources and DST as they are here, and what a process takes there: each file is planned for
that. Its task declares the workers and the memory of that plan, and never takes more. Ray finds it a node, and another one when its process
or its node is lost.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from streamconv import memory
from streamconv.engine.io import describe_os_error
from streamconv.errors import BudgetError, DestinationError, Interrupted, RunError, StreamconvError, UsageError
from streamconv.planning.fitting import MARGIN, Budget, base_of, refit
from streamconv.planning.plan import Plan
from streamconv.running import making
from streamconv.running.cluster import first_line, join_cluster, name_of, nodes_of, offers_of
from streamconv.running.directory import new_suffix
from streamconv.running.executors import MakeFiles
from streamconv.running.local import Progress, check_sources
from streamconv.running.output import LOG, STATE, state_name
from streamconv.storage import is_url
from streamconv.storage.sinks import open_sink
from streamconv.units import format_size

JOINED = 42 << 20  # bytes: what a connection to Ray takes in a process that has loaded it, and what tasks leave in theirs, ...
LEFT = 12 << 20  # bytes: ... which is this after ...
TASKS = 12  # ... so many, when a process ends: more of them would leave more
RETRIES = 4  # of a file whose process or node was lost, by Ray
OOM_RETRIES = "RAY_task_oom_retries"  # variable: the same where a node ran out of memory; there Ray would go on without end
ANSWER = 120.0  # seconds that nodes have to say what they see: a process has to start there
STEP = 64 << 20  # bytes of a file after which its task says so: always as often, however many attempts there are
LOOK = 0.1  # seconds between two looks at what a task's process takes
PATIENCE = 10.0  # seconds that cancelled tasks have to clear up
_log = logging.getLogger(__name__)


@dataclass
class _Task:
    """What is known of a file's task: what it declared, where it runs, how many bytes have come."""

    path: str
    workers: int
    memory: int
    node: str = ""
    done: int = 0


class Ray:
    """The executor ``ray``."""

    threads = 1

    def load(self, root: str) -> int:
        if root.startswith("hf://"):
            raise UsageError(f"--engine ray: files go up to {root} from one machine: leave it out, or give a DST that all nodes reach")
        os.environ.setdefault(OOM_RETRIES, str(RETRIES))
        try:
            importlib.import_module("ray")
        except ImportError:
            raise UsageError("--engine ray needs Ray: pip install 'streamconv[ray]'") from None
        return JOINED

    @contextmanager
    def open(self, plan: Plan, here: MakeFiles, address: str | None) -> Iterator[MakeFiles]:  # noqa: ARG002 - files are made by nodes
        self.load(plan.root)
        with join_cluster(address) as ray:
            cluster = _Cluster(ray, plan)
            cluster.check()
            yield cluster.make_files


EXECUTOR = Ray()


class _Cluster:
    """A cluster that has been joined, for one plan."""

    def __init__(self, ray: Any, plan: Plan) -> None:
        self._ray, self._plan = ray, plan
        self._base = self._bound = 0
        options = {"max_calls": TASKS, "max_retries": RETRIES, "num_returns": "streaming", "scheduling_strategy": "SPREAD"}
        self._make = ray.remote(**options)(_make)

    # Before the first byte ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Asks every node whether it can take part, and sees to it that there is memory for every file.

        Raises:
            UsageError: a node lacks something.
            BudgetError: no node offers enough.
        """
        with _leave_mark(self._plan.root) as mark:
            self._base = MARGIN + LEFT + max(self._ask(nodes_of(self._ray), mark), default=0)
        self._bound = self._plan.peak_memory + max(0, self._base - base_of(self._plan))
        for number in range(len(self._plan.files)):
            self._fit(self._plan, number)

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
                fault = f"cannot run streamconv {_version()}: {first_line(getattr(error, 'cause', None) or error)}"
            if not fault:
                yield nbytes
            elif any(node["NodeID"] == other["NodeID"] for other in nodes_of(self._ray)):  # else it is gone
                raise UsageError(f"node {name_of(node)} {fault}; mend that, or take the node out of the cluster")

    def _fit(self, plan: Plan, number: int) -> Plan:
        """The plan of a file alone: for as many workers as some node has processors for, in the memory that it offers.

        Raises:
            BudgetError: no node offers enough.
        """
        mine, shortage = _bare(plan.for_files([number])), None
        offers = sorted(offers_of(self._ray), key=lambda offer: (min(offer[0], mine.workers), offer[1]), reverse=True)
        for cpus, nbytes in offers:
            try:
                return refit(mine, Budget(min(self._bound, nbytes), min(cpus, mine.workers), lambda: self._base))
            except BudgetError as error:
                shortage = error
        assert shortage is not None
        path, room, needed = mine.files[0].path, max(nbytes for _, nbytes in offers), shortage.needed
        if room >= self._bound:
            raise BudgetError(f"{path}: {shortage}", needed)
        raise BudgetError(
            f"{path}: its task takes {format_size(needed)} of memory, and no node offers more than {format_size(room)}: "
            f"start one with 'ray start --memory {needed}' or more",
            needed,
        )

    # Files -------------------------------------------------------------------------------------------------------------

    def make_files(self, plan: Plan, numbers: Iterable[int], tell: Progress) -> Counter[str]:
        """Makes these files of the plan; what has overflowed in them.

        Raises:
            StreamconvError: what the first task that failed for good raised; others are cancelled, and finished files stay.
        """
        waiting, running = iter(numbers), dict[Any, _Task]()
        overflowed: Counter[str] = Counter()
        try:
            while True:
                ahead = 4 + 2 * sum(cpus for cpus, _ in offers_of(self._ray))
                for number in islice(waiting, max(0, ahead - len(running))):
                    file = self._fit(plan, number)
                    running[self._start(file)] = _Task(file.files[0].path, file.workers, file.peak_memory)
                if not running:
                    return overflowed
                ready, _ = self._ray.wait(list(running), timeout=1.0)
                if not ready:
                    self._check_offered(running.values())
                for reference in ready:
                    task = running[reference]
                    try:
                        task.node, nbytes, counts = self._ray.get(next(reference))
                    except StopIteration:
                        _log.info("%s: %s done by node %s", task.path, format_size(task.done), self._describe(task))
                        del running[reference]
                        continue
                    except self._ray.exceptions.RayError as error:
                        raise self._failure(task, error) from error
                    task.done += nbytes
                    tell(nbytes)
                    overflowed.update(counts)
        finally:
            self._cancel(running)

    def _start(self, file: Plan) -> Any:
        mark = f"{state_name(self._plan.single)}/{LOG}"
        make = self._make.options(num_cpus=file.workers, memory=file.peak_memory)
        return make.remote(file.to_json(), self._bound, mark, self._plan.digest())

    def _describe(self, task: _Task) -> str:
        """The node of a task, as people know it."""
        return next((name_of(node) for node in self._ray.nodes() if node["NodeID"] == task.node), task.node)

    def _failure(self, task: _Task, error: Exception) -> StreamconvError:
        """Why a task has failed for good."""
        cause, where = getattr(error, "cause", None), self._describe(task)
        if isinstance(cause, StreamconvError):
            return type(cause)(f"{cause} (at node {where})")
        fault = first_line(cause or error)
        if isinstance(error, self._ray.exceptions.OutOfMemoryError):
            fault = "ran out of memory, and Ray stopped the task"
        elif not isinstance(error, self._ray.exceptions.RayTaskError):
            fault = f"its task was lost {RETRIES + 1} times: {fault}"
        return RunError(f"{task.path}: node {where}: {fault}; mend that and rerun the same command with --resume")

    def _check_offered(self, tasks: Iterable[_Task]) -> None:
        """Raises RunError for a task that no node can run any more, which Ray would wait for."""
        offers = offers_of(self._ray)
        for task in tasks:
            if not any(cpus >= task.workers and nbytes >= task.memory for cpus, nbytes in offers):
                wanted = f"{task.workers} processors and {format_size(task.memory)} of memory"
                raise RunError(f"{task.path}: the nodes that offered {wanted} are gone: rerun the same command with --resume")

    def _cancel(self, running: Iterable[Any]) -> None:
        """Ends tasks, and gives them time to remove what they have begun."""
        left, deadline = list(running), time.monotonic() + PATIENCE
        for task in left:
            self._ray.cancel(task)
        while left and time.monotonic() < deadline:
            for task in self._ray.wait(left, timeout=0.5)[0]:
                try:
                    self._ray.get(next(task))
                except (StopIteration, self._ray.exceptions.RayError):
                    left.remove(task)


@contextmanager
def _leave_mark(dst: str) -> Iterator[str]:
    """The name of a file in DST that is there while the block runs, with its name in it; DST, too, unless there is one."""
    root, mark = Path(dst), f"{STATE}{new_suffix()}"
    with ExitStack() as stack:
        if not is_url(dst):
            try:
                for folder in reversed([folder for folder in (root, *root.parents) if not folder.exists()]):
                    folder.mkdir()
                    stack.callback(_remove_folder, folder)
                stack.callback((root / mark).unlink, missing_ok=True)
                (root / mark).write_text(mark)
            except OSError as error:
                raise DestinationError(f"{root}: cannot be written: {error.strerror}; give another DST") from error
        yield mark


def _remove_folder(folder: Path) -> None:
    with suppress(OSError):  # somebody else has put something there
        folder.rmdir()


def _bare(plan: Plan) -> Plan:
    """A plan without what only speaks to users."""
    return replace(plan, checks=(), mapping=(), dropped=(), notes=())


def _question(plan: Plan) -> Plan:
    """What a node is asked about: the sources of a plan, and a node of each kind that there is to evaluate."""
    if not plan.nodes:
        return replace(_bare(plan), files=())
    from streamconv.graph.evaluate import kinds

    return replace(_bare(plan), nodes=tuple(kinds(plan.nodes)), names=(), files=())


def _version() -> str:
    return str(importlib.import_module("streamconv").__version__)


# At the nodes ----------------------------------------------------------------------------------------------------------


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


def _make(text: str, bound: int, mark: str, word: str) -> Iterator[tuple[str, int, Mapping[str, int]]]:
    """A task: makes a plan's one file, in the memory of that plan; ``bound`` is what no file's may exceed.

    Yields at which node it runs, how many bytes have come since the last time, and at the end what has overflowed: always as many times,
    since of another attempt Ray passes on what follows what it has passed on of the one before.
    """
    plan, stop = Plan.from_json(text), threading.Event()
    path, size, limit = plan.files[0].path, plan.files[0].size, plan.peak_memory
    node = str(importlib.import_module("ray").get_runtime_context().get_node_id())
    yield node, 0, {}
    if fault := _find_fault(plan, mark, word):
        raise RunError(f"{path}: its node {fault}; mend that and rerun the same command with --resume")
    memory.trim()
    done = told = most = 0

    def tell(nbytes: int) -> None:
        nonlocal done
        if stop.is_set():
            raise Interrupted(f"{path}: interrupted")
        done += nbytes

    thread = ThreadPoolExecutor(1)  # cancelling interrupts this one
    making_it = thread.submit(making.make_files, plan, [0], tell)
    try:
        while not wait([making_it], LOOK).done:
            most = max(most, memory.resident())
            if most > limit:
                stop.set()
            while told + STEP <= min(done, size):
                told += STEP
                yield node, STEP, {}
    finally:
        stop.set()
        thread.shutdown()
    error = making_it.exception()
    if isinstance(error, MemoryError) or (isinstance(error, Interrupted) and most > limit):
        needed = -(-(bound + max(0, most - limit) + MARGIN) // 10**6)
        raise RunError(
            f"{path}: its task ran out of memory: it took {format_size(most)}, {format_size(limit)} were declared: "
            f"rerun with --resume, -j 1 and --max-memory {needed}MB, on nodes that have it free"
        )
    if error:
        raise describe_os_error(error, path) if isinstance(error, OSError) else error
    while told + STEP <= size:
        told += STEP
        yield node, STEP, {}
    yield node, size - told, making_it.result()
