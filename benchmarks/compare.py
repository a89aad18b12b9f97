"""Runs streamconv beside what a user would run instead, and reports time, memory, and bytes read and written.

    python -m benchmarks.compare --size 8GB --repeat 3
    python -m benchmarks.compare --operations reshard,verify --tools streamconv,cp,transformers
    python -m benchmarks.compare --render benchmarks/results/results.json

For each operation a checkpoint is generated, and every tool runs once per round, in another order each time, on cold caches. The time
is that of the command and of the ``sync`` after it; removing the output is not in it. ``x cp`` compares with ``cp -r`` of the source in the
same rounds: with the time that cp would take for as many bytes as the operation has to read and write, half of both together.
``x device`` compares with what the device allows: `competitors.device` reads and writes as many bytes as the operation has to, past the
page cache, and computes nothing. ``cgroup`` compares a re-shard inside a memory cgroup with the same outside of it; ``reflink-...`` a
re-shard on a file system that shares blocks, mounted from an image (which takes root), with ``cp --reflink=never``.
``llama-hf2ms`` converts about 2 GB at most to MindSpore's container, beside MindSpore Transformers (``pip install mindformers``, in an
environment of its own). ``dequantize-...`` makes as much quantized by a format bfloat16, in 150 MB, beside compressed-tensors;
``quantize-...`` goes the other way, beside llm-compressor. ``merge-...`` puts together what trainers leave of a model over four ranks, in
100 MB, beside their own mergers (``--trainers-python``: an interpreter that has verl, DeepSpeed and PEFT); ``adapter`` merges a LoRA of
rank 16 into as large a model, in 150 MB, beside PEFT. ``average`` merges two models of 1.5 GB in 150 MB, beside mergekit
(``--mergekit-python``).

Prints a table in Markdown; writes ``results.json``, ``table.md``, ``time.png`` and ``memory.png`` (the pictures take matplotlib).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from streamconv.units import format_size, parse_size
from tools.make_checkpoint import MODELS, llama_shapes, make_checkpoint, total_size
from tools.measure import Measurement, NotPermittedError, drop_caches, measure

HERE = Path(__file__).parent
COMPETITORS = HERE / "competitors"
GROUP_LIMIT = "256MB"
GROUP_MEMORY = "200MB"  # --max-memory of the runs that are compared inside and outside of the memory cgroup
HEADROOM = 1.3  # a tool that holds the whole model runs if this times its size is available
POINTS = 300  # of a curve of memory over time

OPERATIONS = {
    "reshard": "Re-shard",
    "fuse": "Fuse q, k, v",
    "rotary": "Permute q, k for rotary",
    "transpose": "Transpose every matrix",
    "to-fp32": "Cast bf16 to fp32",
    "to-bf16": "Cast fp32 to bf16",
    "verify": "Compare two checkpoints",
    "llama-hf2ms": "Llama to MindSpore",
    "dequantize-fp8": "Block fp8 to bf16",
    "dequantize-int4": "int4 in groups to bf16",
    "dequantize-mxfp4": "mxfp4 to bf16",
    "quantize-fp8-block": "bf16 to FP8_BLOCK",
    "quantize-w4a16": "bf16 to W4A16",
    "quantize-nvfp4a16": "bf16 to NVFP4A16",
    "merge-dcp": "DCP of 4 ranks to whole tensors",
    "merge-verl": "verl's 4 ranks to whole tensors",
    "merge-zero3": "ZeRO-3 of 4 ranks to float32",
    "average": "Two models averaged",
    "adapter": "LoRA of rank 16, merged",
    "cgroup": f"Re-shard in {GROUP_LIMIT}",
    "reflink-xfs": "Re-shard one file on XFS",
    "reflink-btrfs": "Re-shard one file on btrfs",
}
DTYPES = {"to-fp32": "float32", "to-bf16": "bfloat16"}
GROWTH = {"to-fp32": 2.0, "to-bf16": 0.5, "verify": 0.0}  # bytes written for each byte of the source, where that is not 1
SHARING = {"reflink-xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "reflink-btrfs": ["mkfs.btrfs", "-q"]}
SHARED_SIZE = 4_000_000_000  # bytes of the file that is re-sharded there, to quarters, with its tensors at whole blocks
LEAST_ROUNDS = {"cgroup": 5}
LAYOUTS = ("fuse", "rotary", "transpose")
MINDSPORE = "llama-hf2ms"
SMALL_SIZE = 2_000_000_000  # bytes of the source of that, and of quantized ones; other tools hold it several times
DEQUANTIZED = {f"dequantize-{kind}": f"llama-2-7b-{kind}" for kind in ("fp8", "int4", "mxfp4")}  # operation -> model
QUANTIZED = {f"quantize-{name.lower().replace('_', '-')}": name for name in ("FP8_BLOCK", "W4A16", "NVFP4A16")}  # operation -> scheme
DEQUANTIZED_MEMORY = "150MB"
MERGED = {f"merge-{kind}": kind for kind in ("dcp", "verl", "zero3")}  # operation -> kind of `competitors.trained`
MERGED_SIZE, MERGED_MEMORY = 1_500_000_000, "100MB"
AVERAGE, AVERAGE_MEMORY = "average", "150MB"
AVERAGED = "merge_method: linear\nmodels:\n  - {{model: {}, parameters: {{weight: 0.6}}}}\n  - {{model: {}, parameters: {{weight: 0.4}}}}\n"
ADAPTED, ADAPTED_MEMORY = "adapter", "150MB"
RECIPES = {
    "llama": {MINDSPORE: MINDSPORE, **{name: str(HERE / "recipes" / f"llama-{name}.yaml") for name in LAYOUTS}},
    "internvl": {"fuse": "internvl-hf2custom"},
}


class NotRunError(Exception):
    """A tool or an operation is left out; the message says why."""


# ---------------------------------------------------------------------------------------------------------------------------------
# The tools: each gives the command for a job, or None where it does not do that


@dataclass(frozen=True)
class Job:
    """One operation on one source.

    ``other`` is the second checkpoint to compare, or the source prepared for a tool; ``image`` holds the file system of source and
    target, where that is one that shares blocks between files.
    """

    operation: str
    source: Path
    target: Path
    source_bytes: int
    shard_size: int
    max_memory: str
    mergekit_python: str
    mindspore_python: str
    compressed_python: str
    compressor_python: str
    trainers_python: str
    recipe: str | None = None
    other: Path | None = None
    image: Path | None = None
    made_bytes: int | None = None

    @property
    def dtype(self) -> str | None:
        return DTYPES.get(self.operation)

    @property
    def output_bytes(self) -> int:
        return self.made_bytes or round(self.source_bytes * GROWTH.get(self.operation, 1.0))

    @property
    def makes_files(self) -> bool:
        return self.operation != "verify"


def _needs(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise NotRunError(f"{', '.join(missing)} not installed")


def _script(name: str, job: Job, *options: str) -> list[str]:
    shards = ["--shard-size", str(job.shard_size)]
    return [sys.executable, str(COMPETITORS / f"{name}.py"), str(job.source), str(job.target), *shards, *options]


def _cp(job: Job) -> list[str] | None:
    if job.operation in ("cgroup", AVERAGE):
        return None
    return ["cp", "-r", *(["--reflink=never"] if job.image else []), str(job.source), str(job.target)]


def _device(job: Job) -> list[str] | None:
    if job.operation in ("cgroup", ADAPTED, *MERGED) or job.image:
        return None
    takes_both = job.operation in ("verify", AVERAGE)
    sources = [str(path) for path in (job.source, job.other) if path and (path == job.source or takes_both)]
    target = ["--target", str(job.target), "--bytes", str(job.output_bytes)] if job.makes_files else []
    return [sys.executable, str(COMPETITORS / "device.py"), *sources, *target, "--shard-size", str(job.shard_size)]


def _streamconv(job: Job) -> list[str]:
    command = [sys.executable, "-m", "streamconv"]
    limits = {"cgroup": GROUP_MEMORY} | dict.fromkeys((*DEQUANTIZED, *QUANTIZED), DEQUANTIZED_MEMORY)
    limits |= dict.fromkeys(MERGED, MERGED_MEMORY) | {AVERAGE: AVERAGE_MEMORY, ADAPTED: ADAPTED_MEMORY}
    memory = ["--max-memory", limits.get(job.operation, job.max_memory)]
    if job.operation == "verify":
        return [*command, "verify", str(job.source), str(job.other), *memory, "--no-progress"]
    options = [*_recipe(job), "--max-shard-size", str(job.shard_size), *(["--align"] if job.image else [])]
    what = ["merge", str(_averaged(job))] if job.operation == AVERAGE else ["convert", str(job.source)]
    return [*command, *what, str(job.target), *options, *memory, "--no-progress"]


def _averaged(job: Job) -> Path:
    """The file that says what is averaged."""
    file = job.target.with_name("average.yaml")
    file.write_text(AVERAGED.format(job.source, job.other), encoding="utf-8")
    return file


def _recipe(job: Job) -> list[str]:
    recipe = ["--recipe", job.recipe] if job.recipe else []
    quantization = ["--dequantize"] if job.operation in DEQUANTIZED else []
    recipe += ["--adapter", str(job.other)] if job.operation == ADAPTED else []
    quantization += ["--quantize", QUANTIZED[job.operation]] if job.operation in QUANTIZED else []
    return [*recipe, *(["--dtype", job.dtype] if job.dtype else []), *quantization]


def _streamconv_losses(job: Job) -> list[str] | None:
    return [*_streamconv(job), "--losses"] if job.operation in DTYPES else None


def _streamconv_in_group(job: Job) -> list[str] | None:
    return _streamconv(job) if job.operation == "cgroup" else None


def _safetensors(job: Job) -> list[str] | None:
    if job.operation in ("cgroup", MINDSPORE, AVERAGE, ADAPTED, *DEQUANTIZED, *QUANTIZED, *MERGED) or job.image:
        return None
    _needs("safetensors", "huggingface_hub")
    if job.operation == "verify":
        return [sys.executable, str(COMPETITORS / "equal.py"), str(job.source), str(job.other)]
    change = ["--change", job.operation] if job.operation in LAYOUTS else []
    return _script("load_save", job, *change, *(["--dtype", job.dtype] if job.dtype else []))


def _hub(job: Job) -> list[str] | None:
    if job.operation not in ("reshard", *DTYPES):
        return None
    _needs("safetensors", "huggingface_hub")
    return _script("hub_save", job, *(["--dtype", job.dtype] if job.dtype else []))


def _transformers(job: Job) -> list[str] | None:
    if job.operation not in ("reshard", *DTYPES):
        return None
    _needs("transformers")
    return _script("pretrained", job, *(["--dtype", job.dtype] if job.dtype else []))


def _mergekit(job: Job) -> list[str] | None:
    """Passthrough, or what is asked for. Its ``--low-cpu-memory`` keeps results on an accelerator and does nothing without one."""
    if job.operation not in ("reshard", AVERAGE, *DTYPES):
        return None
    if subprocess.run([job.mergekit_python, "-c", "import mergekit"], capture_output=True, check=False).returncode:
        raise NotRunError("mergekit not installed (--mergekit-python gives the interpreter of another environment)")
    if job.operation == AVERAGE:
        config = _averaged(job)
    else:
        dtype = f"dtype: {job.dtype}\n" if job.dtype else ""
        config = job.target.with_name("mergekit.yaml")
        config.write_text(f"merge_method: passthrough\nmodels:\n  - model: {job.source}\n{dtype}", encoding="utf-8")
    shards = ["--out-shard-size", f"{max(1, job.shard_size // 10**6)}M"]
    options = ["--lazy-unpickle", "--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    return [job.mergekit_python, "-m", "mergekit.scripts.run_yaml", str(config), str(job.target), *shards, *options]


def _mindformers(job: Job) -> list[str] | None:
    """MindSpore Transformers' own function, which the command line of its ``convert_weight.py`` calls."""
    if job.operation != MINDSPORE:
        return None
    if subprocess.run([job.mindspore_python, "-c", "import mindformers, torch"], capture_output=True, check=False).returncode:
        raise NotRunError("mindformers not installed (--mindspore-python gives the interpreter of another environment)")
    return [job.mindspore_python, str(COMPETITORS / "mindformers_llama.py"), str(job.source), str(job.target)]


def _compressed_tensors(job: Job) -> list[str] | None:
    if job.operation not in DEQUANTIZED:
        return None
    if subprocess.run([job.compressed_python, "-c", "import compressed_tensors"], capture_output=True, check=False).returncode:
        raise NotRunError("compressed-tensors not installed (--compressed-python gives the interpreter of another environment)")
    return [job.compressed_python, str(COMPETITORS / "compressed.py"), str(job.source), str(job.target)]


def _llm_compressor(job: Job) -> list[str] | None:
    if job.operation not in QUANTIZED:
        return None
    if subprocess.run([job.compressor_python, "-c", "import llmcompressor"], capture_output=True, check=False).returncode:
        raise NotRunError("llmcompressor not installed (--compressor-python gives the interpreter of another environment)")
    scheme = ["--scheme", QUANTIZED[job.operation]]
    return [job.compressor_python, str(COMPETITORS / "model_free.py"), str(job.source), str(job.target), *scheme]


def _trainer(job: Job) -> list[str] | None:
    if job.operation not in MERGED:
        return None
    return [job.trainers_python, *_trained("merge", job.operation), str(job.source), str(job.target)]


def _trained(action: str, operation: str) -> list[str]:
    return ["-W", "ignore", str(COMPETITORS / "trained.py"), action, MERGED[operation]]


def _peft(job: Job) -> list[str] | None:
    if job.operation != ADAPTED:
        return None
    if subprocess.run([job.trainers_python, "-c", "import peft"], capture_output=True, check=False).returncode:
        raise NotRunError("peft not installed (--trainers-python gives the interpreter of another environment)")
    places = [str(job.source), str(job.other), str(job.target), "--shard-size", str(job.shard_size)]
    return [job.trainers_python, *_adapted("merge"), *places]


def _adapted(action: str) -> list[str]:
    return ["-W", "ignore", str(COMPETITORS / "adapted.py"), action]


def _dcp(job: Job) -> list[str] | None:
    if job.operation != "reshard":
        return None
    return _script("consolidate", replace(job, source=job.other or job.source))


TOOLS: dict[str, tuple[str, Callable[[Job], list[str] | None]]] = {
    "cp": ("cp -r", _cp),
    "device": ("what the device allows", _device),
    "streamconv": ("streamconv", _streamconv),
    "streamconv-losses": ("streamconv --losses", _streamconv_losses),
    "streamconv-cgroup": (f"streamconv in {GROUP_LIMIT}", _streamconv_in_group),
    "safetensors": ("safetensors load, save", _safetensors),
    "huggingface_hub": ("huggingface_hub save", _hub),
    "transformers": ("transformers load, save", _transformers),
    "mergekit": ("mergekit", _mergekit),
    "dcp": ("torch DCP consolidation", _dcp),
    "mindformers": ("mindformers convert_weight", _mindformers),
    "llm-compressor": ("llm-compressor model_free_ptq", _llm_compressor),
    "compressed-tensors": ("compressed-tensors convert_checkpoint", _compressed_tensors),
    "trainer": ("the trainer's own merger", _trainer),
    "peft": ("PEFT merge_and_unload", _peft),
}
WHOLE_MODEL = ("safetensors", "huggingface_hub", "transformers", "mindformers", "peft")


# ---------------------------------------------------------------------------------------------------------------------------------
# The runs


def forget(files: Iterable[Path], how: str) -> str:
    """Makes ``files`` cold; gives how it was done: "all" caches dropped, or the pages of their "data" only, or "none"."""
    if how == "all":
        try:
            drop_caches()
        except NotPermittedError:
            how = "data"
        else:
            return how
    if how == "data":
        os.sync()
        for path in files:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
    return how


def _used(folder: Path) -> int:
    os.sync()
    return shutil.disk_usage(folder).used


def _files(*folders: Path | None) -> list[Path]:
    return [path for folder in folders if folder for path in folder.rglob("*") if path.is_file()]


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def run_once(name: str, job: Job, command: list[str], *, cold: str, interval: float, log: Path) -> tuple[dict[str, Any], Measurement]:
    """Runs a tool on cold caches, then ``sync``.

    Raises:
        NotRunError: it failed, or did not make what it should.
    """
    done = forget([*_files(job.source, job.other), *([job.image] if job.image else [])], cold)
    limit = parse_size(GROUP_LIMIT) if name == "streamconv-cgroup" else None
    used = _used(job.target.parent)
    with log.open("w", encoding="utf-8") as output:
        try:
            found = measure(command, interval=interval, cgroup=limit, stdout=output, stderr=subprocess.STDOUT)
        except NotPermittedError as error:
            raise NotRunError(str(error)) from None
    started = time.perf_counter()
    os.sync()
    synced = time.perf_counter() - started
    if found.exit_code:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise NotRunError(f"failed with exit code {found.exit_code}: {said[-1].strip()[:200] if said else 'it said nothing'}")
    if job.makes_files and not 0.99 < _size_of(job.target) / (job.source_bytes if name == "cp" else job.output_bytes) < 1.01:
        raise NotRunError(f"made {format_size(_size_of(job.target))} instead of {format_size(job.output_bytes)}")
    row = {key: value for key, value in found.to_json().items() if key not in ("command", "samples", "exit_code")}
    blocks = {"new_bytes": _used(job.target.parent) - used} if job.image else {}
    return {"seconds": found.wall_seconds + synced, "sync_seconds": synced, "caches": done, **blocks, **row}, found


def check_output(job: Job) -> str:
    """Compares a tool's output with what streamconv computes from the source: "equal", or what is not."""
    source = _averaged(job) if job.operation == AVERAGE else job.source
    command = [sys.executable, "-m", "streamconv", "verify", str(source), str(job.target), *_recipe(job), "--no-progress"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return "equal" if found.returncode == 0 else " ".join((found.stdout + found.stderr).split())[:300]


def _remove(*folders: Path | None) -> None:
    for folder in folders:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def _curve(measurement: Measurement) -> list[list[float]]:
    """Seconds, resident, anonymous and mapped bytes; of each stretch of time the sample with the most."""
    samples = measurement.samples
    step = -(-len(samples) // POINTS)
    highest = [max(samples[k : k + step], key=lambda sample: sample.rss) for k in range(0, len(samples), step)]
    return [[round(sample.seconds, 3), sample.rss, sample.anon, sample.file] for sample in highest]


def _check_memory(nbytes: float) -> None:
    if (free := psutil.virtual_memory().available) < nbytes:
        raise NotRunError(f"holds the whole model: may take {format_size(nbytes)}, {format_size(free)} of memory are available")


def compare(job: Job, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one operation."""
    tools: dict[str, dict[str, Any]] = {}
    commands: dict[str, list[str]] = {}
    for name in names:
        label = TOOLS[name][0] + (" --reflink=never" if name == "cp" and job.image else "")
        entry: dict[str, Any] = {"name": name, "label": label, "runs": [], "curve": [], "skipped": None}
        try:
            command = TOOLS[name][1](job)
            if command is None:
                continue
            if name in WHOLE_MODEL:
                _check_memory(max(job.source_bytes, job.output_bytes) * HEADROOM)
            commands[name] = command
        except NotRunError as reason:
            entry["skipped"] = str(reason)
            _say(f"  {name}: skipped: {reason}")
        tools[name] = entry
    curves: dict[str, list[tuple[float, Measurement]]] = {name: [] for name in commands}
    rounds = max(options.repeat, LEAST_ROUNDS.get(job.operation, 1))
    for turn in range(rounds):
        order = list(commands)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            if tools[name]["skipped"]:
                continue
            try:
                log = job.target.with_name("log.txt")
                row, found = run_once(name, job, commands[name], cold=options.cold, interval=options.interval, log=log)
                if options.check and turn == 0 and job.makes_files and (name != "cp" or job.operation == "reshard"):
                    row["check"] = check_output(job)
                tools[name]["runs"].append(row)
                curves[name].append((row["seconds"], found))
                checked = f", {row['check']}" if "check" in row else ""
                _say(f"  {turn + 1}: {name}: {row['seconds']:.2f} s, {format_size(found.peak_rss)}{checked}")
            except NotRunError as reason:
                tools[name]["skipped"] = str(reason)
                _say(f"  {turn + 1}: {name}: {reason}")
            finally:
                _remove(job.target)
    for name, found in curves.items():
        if found:
            tools[name]["curve"] = _curve(sorted(found, key=lambda pair: pair[0])[(len(found) - 1) // 2][1])
    return {
        "name": job.operation,
        "title": OPERATIONS[job.operation] + (f", {rounds} rounds" if rounds != options.repeat else ""),
        "source_bytes": job.source_bytes,
        "output_bytes": job.output_bytes,
        "tools": list(tools.values()),
    }


# ---------------------------------------------------------------------------------------------------------------------------------
# The checkpoints


class Sources:
    """The checkpoints of a comparison, made when first needed."""

    def __init__(self, work: Path, model: str) -> None:
        self._work, self._model = work, model
        self._made: dict[tuple[str, str, int], Path] = {}

    def get(self, dtype: str, size: int, model: str | None = None) -> Path:
        """The checkpoint of that element type and about ``size`` bytes; others are removed."""
        model = model or self._model
        key = (model, dtype, size)
        for other in set(self._made) - {key}:
            _remove(self._made.pop(other))
        if key not in self._made:
            folder = self._work / f"source-{dtype}"
            _say(f"making {model}, about {format_size(size)}, {dtype}")
            _check_room(self._work, size)
            make_checkpoint(model, folder, size=size, dtype=dtype)
            self._made[key] = folder
        return self._made[key]


def _check_room(folder: Path, nbytes: float) -> None:
    if (free := shutil.disk_usage(folder).free) < nbytes * 1.02:
        raise NotRunError(f"no room on the disk: takes {format_size(nbytes)}, {format_size(free)} are free")


@contextmanager
def prepared(job: Job, names: Sequence[str]) -> Iterator[Job]:
    """The job with its second checkpoint, if it takes one."""
    other = job.target.with_name("other")
    if job.operation == AVERAGE:
        try:
            make_checkpoint("llama-2-7b", other, size=MERGED_SIZE, seed=1)
            yield replace(job, other=other, source_bytes=2 * job.source_bytes, made_bytes=job.source_bytes)
        finally:
            _remove(other)
        return
    if job.operation == "verify":
        command = _streamconv(replace(job, operation="reshard", target=other))
    elif job.operation in MERGED:
        command = [job.trainers_python, *_trained("make", job.operation), str(job.source), str(other)]
    elif job.operation == ADAPTED:
        command = [job.trainers_python, *_adapted("make"), str(job.source), str(other)]
    elif job.operation == "reshard" and "dcp" in names:
        command = [*_script("consolidate", replace(job, target=other)), "--prepare"]
    else:
        yield job
        return
    try:
        _check_room(job.target.parent, job.source_bytes * 2)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL if job.operation in MERGED else None)
        if job.operation in MERGED:
            made = job.source_bytes * (2 if job.operation == "merge-zero3" else 1)
            yield replace(job, source=other, source_bytes=_size_of(other), made_bytes=made)
        else:
            yield replace(job, other=other)
    finally:
        _remove(other)


@contextmanager
def mounted(make: Sequence[str], image: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes that ``make`` makes, in the file ``image``.

    Raises:
        NotRunError: it cannot be made or mounted here.
    """
    if shutil.which(make[0]) is None:
        raise NotRunError(f"{make[0]} is not installed")
    if os.geteuid():
        raise NotRunError("mounting takes root")
    place = image.with_name("mounted")
    try:
        place.mkdir()
        image.touch()
        os.truncate(image, size)
        for command in ([*make, str(image)], ["mount", "-o", "loop", str(image), str(place)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotRunError(f"{command[0]} fails here: {' '.join(done.stderr.split())[:200]}")
        try:
            yield place
        finally:
            subprocess.run(["umount", str(place)], check=True)
    finally:
        image.unlink(missing_ok=True)
        place.rmdir()


@contextmanager
def _sharing_job(operation: str, options: argparse.Namespace) -> Iterator[Job]:
    """One file with its tensors at whole blocks, on a file system that can share them, and quarters of it to make."""
    size = min(options.size, SHARED_SIZE)
    _check_room(options.work, 2 * size)
    image = options.work / "image"
    with mounted(SHARING[operation], image, 3 * size + (1 << 30)) as place:
        _say(f"making {options.model}, about {format_size(size)}, in one file on {operation.removeprefix('reflink-')}")
        plain, source = place / "plain", place / "source"
        make_checkpoint(options.model, plain, size=size, max_shard_size=2 * size)
        job = replace(_make_job(operation, plain, source, options, shard_size=2 * size), image=image)
        subprocess.run(_streamconv(job), check=True, stdout=subprocess.DEVNULL)
        _remove(plain)
        yield replace(job, source=source, target=place / "target", shard_size=size // 4)


@contextmanager
def _job(operation: str, sources: Sources, options: argparse.Namespace) -> Iterator[Job]:
    """What is to be done, with all that it takes at hand."""
    if operation in SHARING:
        with _sharing_job(operation, options) as job:
            yield job
        return
    recipe = RECIPES.get(MODELS[options.model].config["model_type"], {}).get(operation)
    if operation in (*LAYOUTS, MINDSPORE) and recipe is None:
        raise NotRunError(f"there is no recipe for {options.model}")
    size = min(options.size, SMALL_SIZE) if operation in (MINDSPORE, *DEQUANTIZED, *QUANTIZED) else options.size
    size = min(size, MERGED_SIZE) if operation in (AVERAGE, ADAPTED, *MERGED) else size
    model = DEQUANTIZED.get(operation, "llama-2-7b" if operation in (AVERAGE, ADAPTED, *QUANTIZED, *MERGED) else None)
    source = sources.get("float32" if operation == "to-bf16" else "bfloat16", size, model)
    job = replace(_make_job(operation, source, options.work / "target", options, shard_size=options.shard_size), recipe=recipe)
    if operation in DEQUANTIZED:
        job = replace(job, made_bytes=_dequantized_bytes(source))
    if operation in QUANTIZED:
        job = replace(job, made_bytes=_quantized_bytes(job))
    _check_room(options.work, max(job.output_bytes, job.source_bytes))
    with prepared(job, options.tools) as job:
        yield job


def _make_job(operation: str, source: Path, target: Path, options: argparse.Namespace, *, shard_size: int) -> Job:
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    pythons = (options.mergekit_python, options.mindspore_python, options.compressed_python, options.compressor_python)
    pythons = (*pythons, options.trainers_python)
    return Job(operation, source, target, total, shard_size, options.max_memory, *pythons)


def _quantized_bytes(job: Job) -> int:
    """What the tensors take afterwards, as streamconv plans it."""
    command = [sys.executable, "-m", "streamconv", "plan", str(job.source), str(job.target), *_recipe(job), "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return int(found["bytes_written"])


def _dequantized_bytes(source: Path) -> int:
    """What the tensors of a Llama take without quantization."""
    return total_size(llama_shapes(json.loads((source / "config.json").read_text(encoding="utf-8"))))


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """All operations; the results as JSON values."""
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise NotRunError(f"{work} is not empty: give another --work")
    sources = Sources(work, options.model)
    found: list[dict[str, Any]] = []
    try:
        for operation in options.operations:
            _say(f"{OPERATIONS[operation]}:")
            try:
                with _job(operation, sources, options) as job:
                    found.append(compare(job, list(dict.fromkeys([*options.tools, "streamconv-cgroup"])), options))
            except NotRunError as reason:
                _say(f"  skipped: {reason}")
    finally:
        _remove(work)
    settings = {key: getattr(options, key) for key in ("model", "size", "repeat", "cold", "max_memory", "shard_size")}
    return {"settings": settings, "machine": describe_machine(work), "operations": found}


def describe_machine(folder: Path) -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for name in ("streamconv", "torch", "safetensors", "huggingface_hub", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    above = [part for part in psutil.disk_partitions(all=True) if folder.absolute().is_relative_to(part.mountpoint)]
    return {
        "processor": processor,
        "processors": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "filesystem": max(above, key=lambda part: len(part.mountpoint)).fstype if above else "unknown",
        "python": platform.python_version(),
        "versions": versions,
    }


# ---------------------------------------------------------------------------------------------------------------------------------
# The figures


@dataclass(frozen=True)
class Figures:
    """What a tool took for an operation: seconds, medians of the bytes moved, and the highest of each memory."""

    label: str
    median: float
    fastest: float
    slowest: float
    ratio: float | None
    device: float | None
    rss: int
    anon: int
    file: int
    high_water: int
    read: int
    written: int
    hits: int | None

    @property
    def peak(self) -> int:
        return max(self.rss, self.high_water)


def figures(operation: dict[str, Any]) -> dict[str, Figures]:
    """Figures of the tools that ran, by name; ``ratio`` is to the time cp takes for as many bytes, ``device`` to what the device allows."""

    def median(name: str, key: str = "seconds") -> float | None:
        runs = next((tool["runs"] for tool in operation["tools"] if tool["name"] == name), [])
        return statistics.median(run[key] for run in runs) if runs else None

    copying, device = median("cp"), median("device")
    share = (operation["source_bytes"] * (2 if operation["name"] == "verify" else 1) + operation["output_bytes"]) / 2
    allowed = copying * share / operation["source_bytes"] if copying else None
    found = {}
    for tool in operation["tools"]:
        if not tool["runs"] or tool["skipped"]:
            continue
        runs, name = tool["runs"], tool["name"]
        seconds = [run["seconds"] for run in runs]
        base = copying if name == "cp" else allowed
        groups = [run["cgroup"]["limit_hits"] for run in runs if run["cgroup"]]
        found[name] = Figures(
            label=tool["label"],
            median=statistics.median(seconds),
            fastest=min(seconds),
            slowest=max(seconds),
            ratio=statistics.median(seconds) / base if base else None,
            device=statistics.median(seconds) / device if device else None,
            rss=max(run["peak_rss"] for run in runs),
            anon=max(run["peak_anon"] for run in runs),
            file=max(run["peak_file"] for run in runs),
            high_water=max(run["peak_vmhwm"] for run in runs),
            read=round(median(name, "read_bytes") or 0),
            written=round(median(name, "write_bytes") or 0),
            hits=max(groups) if groups else None,
        )
    return found


@dataclass(frozen=True)
class Goal:
    """Something that should hold: ``value`` of at most (or at least) ``bound``."""

    text: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


DEVICE = 1.25  # times what the device allows, that an operation may take ...
DEQUANTIZED_DEVICE = 1.5  # ... one that dequantizes
TIMES = dict.fromkeys(SHARING, 0.15) | {"reshard": 0.75, "fuse": 0.85, "rotary": 1.0, "transpose": 1.5, "to-fp32": 1.0, "to-bf16": 1.0}


def goals(results: dict[str, Any]) -> list[Goal]:
    """The project's own targets, as far as these results tell."""
    found = []
    for operation in results["operations"]:
        name, title = operation["name"], operation["title"]
        tools = figures(operation)
        mine = tools.get("streamconv")
        if mine is None:
            continue
        if name in TIMES and mine.ratio is not None:
            found.append(Goal(f"{title}: time / cp", mine.ratio, TIMES[name]))
        if mine.device is not None and name not in (AVERAGE, *QUANTIZED):
            found.append(Goal(f"{title}: time / device", mine.device, DEQUANTIZED_DEVICE if name in DEQUANTIZED else DEVICE))
        source, output = operation["source_bytes"], operation["output_bytes"]
        passes = 2 if name == "verify" else 1
        if name not in QUANTIZED:  # which read weights once for each tensor that is made of them
            found.append(Goal(f"{title}: bytes read / input", mine.read / (source * passes), 1.05))
        if output:
            found.append(Goal(f"{title}: bytes written / output", mine.written / output, 1.05))
        if name == "reshard":
            for other, bound in (("mergekit", 2.5), ("transformers", 1.5)):
                if other in tools:
                    found.append(Goal(f"{title}: time of {other} / streamconv", tools[other].median / mine.median, bound, at_least=True))
            if "transformers" in tools:
                found.append(Goal(f"{title}: peak memory of transformers / streamconv", tools["transformers"].peak / mine.peak, 20, True))  # noqa: FBT003
        if name == AVERAGE and "mergekit" in tools:
            found.append(Goal(f"{title}: time / mergekit", mine.median / tools["mergekit"].median, 0.6))
        if "mindformers" in tools:
            found.append(Goal(f"{title}: time of mindformers / streamconv", tools["mindformers"].median / mine.median, 1.0, at_least=True))
        peers = [peer for peer in ("compressed-tensors", "llm-compressor") if peer in tools]
        found += [Goal(f"{title}: time / {peer}", mine.median / tools[peer].median, 0.5) for peer in peers]
        if "streamconv-losses" in tools:
            found.append(Goal(f"{title}: time with --losses / without", tools["streamconv-losses"].median / mine.median, 1.1))
        if "trainer" in tools:
            found.append(Goal(f"{title}: time / the trainer's merger", mine.median / tools["trainer"].median, 0.6))
        if "peft" in tools:
            found.append(Goal(f"{title}: time / PEFT", mine.median / tools["peft"].median, 0.5))
        runs = next(tool["runs"] for tool in operation["tools"] if tool["name"] == "streamconv")
        if name in SHARING:
            found.append(Goal(f"{title}: new blocks / output", statistics.median(run["new_bytes"] for run in runs) / output, 0.1))
        if "streamconv-cgroup" in tools:
            found.append(Goal(f"{title}: time inside the cgroup / outside", tools["streamconv-cgroup"].median / mine.median, 1.15))
    return found


def _describe_source(results: dict[str, Any]) -> str:
    sizes = sorted({format_size(operation["source_bytes"]) for operation in results["operations"]})
    return f"{results['settings']['model']} cut to {' and '.join(sizes)}"


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    settings, machine = results["settings"], results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    cold = sorted({run["caches"] for operation in results["operations"] for tool in operation["tools"] for run in tool["runs"]})
    caches = {"all": "all caches dropped", "data": "the checkpoint out of the page cache", "none": "warm caches"}
    rounds = f"medians of {settings['repeat']} interleaved runs, each with {' or '.join(caches[how] for how in cold)} before it"
    what = f"{_describe_source(results)}; {rounds} and `sync` in its time"
    where = f"{machine['processors']} processors ({machine['processor']}), {format_size(machine['memory'])} of memory"
    lines = [
        f"{what}; streamconv with `--max-memory {settings['max_memory']}`.",
        "",
        f"{where}, {machine['filesystem']}, {machine['system']}; Python {machine['python']}, {versions}.",
        "",
    ]
    head = (
        "Operation",
        "Tool",
        "Time (s)",
        "min – max",
        "× cp",
        "× device",
        "Peak RSS",
        "Anonymous",
        "Mapped",
        "High-water",
        "Read",
        "Written",
    )
    lines += [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    left_out = []
    for operation in results["operations"]:
        title = operation["title"]
        for name, row in figures(operation).items():
            label = f"**{row.label}**" if name.startswith("streamconv") else row.label
            ratios = ["–" if ratio is None else f"{ratio:.2f}" for ratio in (row.ratio, row.device)]
            sizes = map(format_size, (row.rss, row.anon, row.file, row.high_water, row.read, row.written))
            cells = [title, label, f"{row.median:.2f}", f"{row.fastest:.2f} – {row.slowest:.2f}", *ratios, *sizes]
            lines.append(f"| {' | '.join(cells)} |")
            title = ""
        left_out += [f"- {operation['title']}: {tool['label']}: {tool['skipped']}" for tool in operation["tools"] if tool["skipped"]]
    lines += ["", "Left out:", "", *left_out] if left_out else []
    if found := goals(results):
        lines += ["", "| Target | Measured | Bound | Holds |", "|---|---:|---:|---|"]
        lines += [
            f"| {goal.text} | {goal.value:.2f} | {'≥' if goal.at_least else '≤'} {goal.bound:g} | {'yes' if goal.holds else '**no**'} |"
            for goal in found
        ]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------------------
# The pictures

COLOURS = {
    "cp": "#6b7280",
    "device": "#b5bac2",
    "streamconv": "#d1495b",
    "streamconv-cgroup": "#e8a33d",
    "safetensors": "#2f6f9f",
    "huggingface_hub": "#66a182",
    "transformers": "#7d5ba6",
    "mergekit": "#8d6a4f",
    "dcp": "#3aa6b9",
    "mindformers": "#b08ea2",
}


COLUMNS = 2


def _panels(count: int, heights: Sequence[float]) -> tuple[Any, list[Any]]:
    """A figure of ``count`` panels in rows of these heights, in inches."""
    size = (9, 0.8 + sum(heights))
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(len(heights), min(COLUMNS, count), squeeze=False, gridspec_kw={"height_ratios": heights})
    panels = [axes for row in grid for axes in row]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels


def draw_times(results: dict[str, Any], path: Path) -> None:
    """A panel of bars for each operation: medians, and lines from the fastest to the slowest run."""
    operations = [operation for operation in results["operations"] if figures(operation)]
    counts = [len(figures(operation)) for operation in operations]
    bars = [max(counts[k : k + COLUMNS]) for k in range(0, len(counts), COLUMNS)]
    figure, panels = _panels(len(operations), [0.6 + 0.22 * most for most in bars])
    for number, (axes, operation) in enumerate(zip(panels, operations, strict=False)):
        found, most = figures(operation), bars[number // COLUMNS]
        names = list(reversed(found))
        widths = [found[name].median for name in names]
        spread = [[found[n].median - found[n].fastest for n in names], [found[n].slowest - found[n].median for n in names]]
        places = range(most - len(names), most)
        axes.barh(places, widths, color=[COLOURS[name] for name in names], height=0.72)
        if results["settings"]["repeat"] > 1:
            axes.errorbar(widths, places, xerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        for k, name in zip(places, names, strict=True):
            place = (found[name].slowest, k)
            axes.annotate(f"{found[name].median:.1f} s", place, (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_ylim(-0.6, most - 0.4)
        axes.set_yticks(places, [found[name].label for name in names])
        for text, name in zip(axes.get_yticklabels(), names, strict=True):
            text.set_fontweight("bold" if name.startswith("streamconv") else "normal")
        axes.set_xlim(0, max(found[name].slowest for name in names) * 1.2)
        axes.set_title(operation["title"], fontsize=10, loc="left")
    figure.suptitle(f"Time in seconds: {_describe_source(results)}", fontsize=11)
    figure.savefig(path)


def draw_memory(results: dict[str, Any], path: Path) -> None:
    """A panel of curves for each operation: resident memory of the process tree over time, on a logarithmic scale."""
    operations = [operation for operation in results["operations"] if any(tool["curve"] for tool in operation["tools"])]
    figure, panels = _panels(len(operations), [2.1] * -(-len(operations) // COLUMNS))
    shown: dict[str, Any] = {}
    for axes, operation in zip(panels, operations, strict=False):
        for tool in operation["tools"]:
            if tool["curve"] and not tool["skipped"]:
                # A sample taken after the last process has gone says nothing.
                points = [(point[0], point[1] / 1e6) for point in tool["curve"] if point[1]]
                width = 2.2 if tool["name"].startswith("streamconv") else 1.2
                label = tool["label"]
                (line,) = axes.plot(*zip(*points, strict=True), color=COLOURS[tool["name"]], linewidth=width, label=label)
                shown.setdefault(label, line)
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=1)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        axes.yaxis.set_major_formatter(lambda value, _: format_size(value * 1e6))
        axes.set_title(operation["title"], fontsize=10, loc="left")
        axes.set_xlabel("seconds", fontsize=8)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"Resident memory of the process tree: {_describe_source(results)}", fontsize=11)
    figure.savefig(path)


def render(results: dict[str, Any], folder: Path) -> None:
    """Prints the table; writes it and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    text = table(results)
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)
    if importlib.util.find_spec("matplotlib") is None:
        _say("no pictures: matplotlib is not installed")
    elif any(tool["curve"] for operation in results["operations"] for tool in operation["tools"]):
        draw_times(results, folder / "time.png")
        draw_memory(results, folder / "memory.png")


# ---------------------------------------------------------------------------------------------------------------------------------
# The command


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _chosen(known: Iterable[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; known are {', '.join(known)}")
        return names

    return read


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"not a number of rounds: {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Compare streamconv with other tools.")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3-8b", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--size", type=parse_size, default="8GB", help="of each source checkpoint, about (8GB)")
    parser.add_argument("--repeat", type=_positive, default=3, metavar="N", help="rounds (3)")
    parser.add_argument("--operations", type=_chosen(OPERATIONS), default=list(OPERATIONS), metavar="A,B", help=", ".join(OPERATIONS))
    parser.add_argument("--tools", type=_chosen(TOOLS), default=list(TOOLS), metavar="A,B", help=", ".join(TOOLS))
    parser.add_argument("--work", type=Path, default=HERE / "scratch", metavar="DIR", help="checkpoints go here; removed at the end")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR", help="results.json, table.md and pictures go here")
    parser.add_argument("--max-memory", default="300MB", metavar="SIZE", help="streamconv's (300MB)")
    parser.add_argument("--shard-size", type=parse_size, default="2GB", metavar="SIZE", help="of outputs (2GB)")
    parser.add_argument("--cold", choices=["all", "data", "none"], default="all", help="what is not cached when a tool starts (all)")
    parser.add_argument("--interval", type=float, default=0.1, metavar="SECONDS", help="between two samples of memory (0.1)")
    parser.add_argument("--check", action="store_true", help="compare what each tool makes in the first round, byte for byte")
    parser.add_argument("--mergekit-python", default=sys.executable, metavar="PATH", help="an interpreter that has mergekit")
    parser.add_argument("--mindspore-python", default=sys.executable, metavar="PATH", help="an interpreter that has mindformers")
    parser.add_argument(
        "--trainers-python", default=sys.executable, metavar="PATH", help="an interpreter that has verl, DeepSpeed and PEFT"
    )
    parser.add_argument("--compressed-python", default=sys.executable, metavar="PATH", help="an interpreter that has compressed-tensors")
    parser.add_argument("--compressor-python", default=sys.executable, metavar="PATH", help="an interpreter that has llmcompressor")
    parser.add_argument("--render", type=Path, metavar="results.json", help="print and draw these results, run nothing")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    options = _parser().parse_args(arguments)
    options.work = options.work.absolute()
    if options.render:
        render(json.loads(options.render.read_text(encoding="utf-8")), options.out)
        return 0
    try:
        results = run_all(options)
    except NotRunError as error:
        _say(f"compare: {error}")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    render(results, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
