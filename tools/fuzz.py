"""Feeds mutated files to the readers and says what they did: only refusals in our own words are right.

    python -m tools.fuzz --reader safetensors --count 1000000
    python -m tools.fuzz --reader all --seconds 60 --seed 7

A case is a valid file with bytes flipped, cut, repeated, moved, or numbers in it replaced by ones that hurt. It fails if anything but a
`StreamconvError` comes out, if it takes longer than `--limit` seconds, or if the process has more than `--memory` bytes resident
afterwards. A failing file is kept in the folder `--keep`. With atheris installed, `--guided` lets coverage choose the mutations.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from streamconv import recipes
from streamconv.errors import StreamconvError
from streamconv.formats import gguf, mindspore, safetensors
from streamconv.formats import torch as torch_files
from streamconv.storage.locations import locate
from streamconv.trainers import dcp, fsdp, hf_shards, mindspore2, torch_dist, zero

NUMBERS = [0, 1, 7, 8, 127, 128, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
TEXTS = [b"9" * 30, b"-1", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b"[" * 300, b'"\\ud800"', b"../../x", b"/etc/passwd"]
TEXTS += [b"\0", b"\xff"]


# Valid files -------------------------------------------------------------------------------------------------------


def safetensors_seeds() -> list[bytes]:
    """Files as the safetensors library writes them."""
    import torch
    from safetensors.torch import save

    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
    many = {f"layers.{k}.weight": torch.ones(2, k % 3, dtype=kinds[k % len(kinds)]) for k in range(12)}
    return [save(many, {"format": "pt"}), save({"a": torch.ones(())}), save({}, {"format": "pt"})]


def index_seeds() -> list[bytes]:
    """Indexes of a checkpoint of two files."""
    files = {name: f"model-0000{k}-of-00002.safetensors" for k, name in enumerate("ab", 1)}
    table = {"metadata": {"total_size": 16}, "weight_map": files}
    return [json.dumps(table).encode(), json.dumps(table, indent=2).encode()]


def mindspore_seeds() -> list[bytes]:
    """Files as MindSpore writes them."""
    folder = Path(__file__).parent.parent / "tests" / "data" / "ckpt"
    return [path.read_bytes() for path in sorted(folder.glob("*.ckpt")) if path.stat().st_size < 1 << 16]


def gguf_seeds() -> list[bytes]:
    """Files by the words of GGUF's specification: pairs of each type of value, tensors that are numbers, and blocks."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    words = [b"<s>", b"a", "\u00e9".encode()]
    pairs = {
        b"general.architecture": struct.pack("<I", 8) + text(b"llama"),
        b"general.alignment": struct.pack("<II", 4, 32),
        b"llama.block_count": struct.pack("<II", 4, 1),
        b"llama.rope.freq_base": struct.pack("<If", 6, 1e4),
        b"general.flag": struct.pack("<IB", 7, 1),
        b"general.size": struct.pack("<IQ", 10, 1 << 40),
        b"tokenizer.ggml.tokens": struct.pack("<IIQ", 9, 8, len(words)) + b"".join(map(text, words)),
        b"tokenizer.ggml.scores": struct.pack("<IIQ3f", 9, 6, 3, 0.0, 1.0, 2.0),
    }
    tensors = {
        b"token_embd.weight": (0, (4, 8), 128),
        b"blk.0.attn_q.weight": (8, (2, 64), 136),
        b"blk.0.ffn_up.weight": (12, (1, 256), 144),
    }
    seeds = []
    for version, count in ((3, 3), (2, 1)):
        head = b"GGUF" + struct.pack("<IQQ", version, count, len(pairs))
        head += b"".join(text(key) + value for key, value in pairs.items())
        offset, data = 0, b""
        for name, (kind, shape, size) in list(tensors.items())[:count]:
            head += text(name) + struct.pack("<I2QIQ", len(shape), *reversed(shape), kind, offset)
            data += bytes(size + -size % 32)
            offset = len(data)
        seeds.append(head + bytes(-len(head) % 32) + data)
    return seeds


def torch_seeds() -> list[bytes]:
    """Files as torch.save writes them, new and old, of tables and modules, and one of torch.jit.save."""
    import io
    import itertools
    import warnings

    import torch

    shared = torch.arange(12.0)
    tables: list[Any] = [
        {"a": torch.ones(2, 3), "b": {"c": shared[:4], "d": shared[4:].view(2, 4).t()}, "n": 3, "s": "text"},
        {"state_dict": {"w": torch.ones(2, dtype=torch.bfloat16), "p": torch.nn.Parameter(torch.ones(1))}, "epoch": [1, 2]},
    ]
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    tables.append({"model": model, "args": argparse.Namespace(lr=0.1), "ids": {1, 2}, "optimizer": torch.optim.SGD(model.parameters())})
    found = []
    for table, zipped, protocol in itertools.product(tables, (True, False), (2, 4)):
        buffer = io.BytesIO()
        torch.save(table, buffer, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
        found.append(buffer.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(model), buffer)
    return [*found, buffer.getvalue()]


def recipe_seeds() -> list[bytes]:
    """Recipe files as JSON."""
    known = [recipe.to_dict() for name, recipe in recipes.registry().items() if name.startswith(("internvl", "llama")) and recipe.rules]
    return [json.dumps(data).encode() for data in known]


def yaml_seeds() -> list[bytes]:
    """Recipe files as YAML."""
    import yaml

    return [yaml.safe_dump(json.loads(seed)).encode() for seed in recipe_seeds()[:2]]


# Readers -----------------------------------------------------------------------------------------------------------


def read_index(path: Path) -> object:
    """Reads the directory that the index lies in."""
    return safetensors.read(locate(path.parent))


TRAINERS = Path(__file__).parent.parent / "tests" / "golden" / "trainers"
FOLDERS = {  # of a trainer's checkpoint: the folder, the file that is mutated, and the module that reads the folder
    "dcp": ("fsdp2.dcp", ".metadata", dcp),
    "dcp-items": ("tp2d.dcp", "__1_0.distcp", dcp),
    "dcp-tables": ("fsdp2.tables", "__1.metadata", dcp),
    "torch_dist": ("mcore_llama", ".metadata", torch_dist),
    "fsdp": ("tp2d.ranks", "model_world_size_4_rank_1.pt", fsdp),
    "hf_shards": ("tp2d.shards", "shard-00001-model-00001-of-00001.safetensors", hf_shards),
    "zero": ("z2_bf16_shuffled/global_step2", "mp_rank_00_model_states.pt", zero),
    "zero-optimizer": ("z3_bf16_groups/global_step2", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", zero),
    "zero-universal": ("z2_bf16_shuffled.universal/global_step2_universal", "mp_rank_00_model_states.pt", zero),
    "mindspore2": ("mindspore2/iteration_00000012", "metadata.json", mindspore2),
}


def folder_seeds(reader: str) -> Callable[[], list[bytes]]:
    """The file of a trainer's checkpoint that is mutated."""
    folder, name, _ = FOLDERS[reader]
    return lambda: [(TRAINERS / folder / name).read_bytes()]


def folder_reader(reader: str) -> Callable[[Path], object]:
    """Reads the folder that the file lies in."""
    _, _, module = FOLDERS[reader]
    return lambda path: module.read(locate(path.parent))


READERS: dict[str, tuple[Callable[[], list[bytes]], str, Callable[[Path], object]]] = {
    "safetensors": (safetensors_seeds, "model.safetensors", lambda path: safetensors.read(locate(path))),
    "index": (index_seeds, "model.safetensors.index.json", read_index),
    "mindspore": (mindspore_seeds, "model.ckpt", lambda path: mindspore.read(locate(path))),
    "gguf": (gguf_seeds, "model.gguf", lambda path: gguf.read(locate(path))),
    "torch": (torch_seeds, "model.bin", lambda path: torch_files.read(locate(path))),
    "recipe": (recipe_seeds, "recipe.json", recipes.load),
    "recipe-yaml": (yaml_seeds, "recipe.yaml", recipes.load),
    **{reader: (folder_seeds(reader), name, folder_reader(reader)) for reader, (_, name, _) in FOLDERS.items()},
}


def mutate(data: bytes, draw: random.Random) -> bytes:
    """A few changes to a file."""
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        at = draw.randrange(len(made) + 1) if draw.random() < 0.5 else min(len(made), int(draw.expovariate(1 / 200)))
        size = min(len(made) - at, draw.choice((1, 1, 2, 4, 8, 64, 1000)))
        match draw.randrange(9):
            case 0 if made:
                made[min(at, len(made) - 1)] ^= 1 << draw.randrange(8)
            case 1 if made:
                made[min(at, len(made) - 1)] = draw.randrange(256)
            case 2:
                del made[at : at + size]
            case 3:
                made[at:at] = made[at : at + size]
            case 4:
                del made[at:]
            case 5:
                made[at : at + 8] = struct.pack("<Q", draw.choice(NUMBERS) % 2**64)
            case 6:
                made[at : at + 4] = struct.pack("<I", draw.choice(NUMBERS) % 2**32)
            case 7:
                made[at : at + draw.choice((0, size))] = draw.choice(TEXTS)
            case 8:
                other = draw.randrange(len(made) + 1)
                made[at : at + size] = made[other : other + size]
    return bytes(made)


class TooSlow(Exception):
    """A case took longer than it may."""


def _alarm(*_: object) -> NoReturn:
    raise TooSlow


class Fuzzer:
    """Runs cases of one reader in a folder of its own."""

    def __init__(self, reader: str, folder: Path, *, limit: float, keep: Path) -> None:
        seeds, name, self._read = READERS[reader]
        self.reader, self.seeds, self.path = reader, seeds(), folder / name
        if reader == "index":
            (tensor,) = safetensors_seeds()[1:2]
            for file, called in (("model-00001-of-00002.safetensors", b"a"), ("model-00002-of-00002.safetensors", b"b")):
                (folder / file).write_bytes(tensor.replace(b'"a"', b'"' + called + b'"'))
        if reader in FOLDERS:
            shutil.copytree(TRAINERS / FOLDERS[reader][0], folder, dirs_exist_ok=True)
        self._limit, self._keep, self.most = limit, keep, sys.maxsize
        self.outcomes: Counter[str] = Counter()
        self.failures = 0

    def run(self, data: bytes) -> None:
        """One case."""
        self.path.write_bytes(data)
        signal.setitimer(signal.ITIMER_REAL, self._limit)
        try:
            self._read(self.path)
            outcome = "read"
        except StreamconvError as error:
            outcome = type(error).__name__
            if "\n" in str(error) or len(str(error)) > 4000:
                self._fail(data, f"a message of {len(str(error))} characters in {str(error).count(chr(10)) + 1} lines")
        except TooSlow:
            outcome = "slow"
            self._fail(data, f"longer than {self._limit} s")
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            outcome = type(error).__name__
            self._fail(data, f"{outcome}: {error}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.outcomes[outcome] += 1

    def check_memory(self) -> None:
        """Fails if the process ever took more than it may."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if peak > self.most:
            self._fail(b"", f"{peak} bytes were resident at some time")

    def _fail(self, data: bytes, problem: str) -> None:
        self.failures += 1
        self._keep.mkdir(parents=True, exist_ok=True)
        kept = self._keep / f"{self.reader}-{os.getpid()}-{self.failures}"
        kept.write_bytes(data)
        print(f"{self.reader}: {problem[:300]} ({kept})", file=sys.stderr, flush=True)


def fuzz(fuzzer: Fuzzer, count: int, seconds: float, seed: int) -> int:
    """Runs ``count`` cases, or as many as fit in ``seconds``; returns how many."""
    draw, started, done = random.Random(seed), time.monotonic(), 0
    while done < count and time.monotonic() - started < seconds:
        fuzzer.run(mutate(draw.choice(fuzzer.seeds), draw))
        done += 1
    fuzzer.check_memory()
    return done


def guided(fuzzer: Fuzzer, count: int) -> None:
    """Lets atheris choose the mutations."""
    import atheris

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], f"-runs={count}"], lambda data: fuzzer.run(bytes(data)))
    atheris.Fuzz()


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 1 if any case failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--reader", choices=[*READERS, "all"], default="all")
    parser.add_argument("--count", type=int, default=10_000, help="cases for each reader")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most so long for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=5.0, help="seconds that one case may take")
    parser.add_argument("--memory", type=int, default=0, help="bytes that may be resident (default: what is at the start, and 200 MB)")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for failing files")
    parser.add_argument("--guided", action="store_true", help="coverage-guided, with atheris")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGALRM, _alarm)
    failures = 0
    for reader in [*READERS] if args.reader == "all" else [args.reader]:
        with tempfile.TemporaryDirectory(prefix="streamconv-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            fuzzer = Fuzzer(reader, Path(folder), limit=args.limit, keep=args.keep)
            fuzzer.run(fuzzer.seeds[0])  # loads what the reader uses
            fuzzer.most = args.memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 200_000_000
            started = time.monotonic()
            if args.guided:
                guided(fuzzer, args.count)
                continue
            done = fuzz(fuzzer, args.count, args.seconds, args.seed)
            took = time.monotonic() - started
            outcomes = ", ".join(f"{name} {count}" for name, count in fuzzer.outcomes.most_common())
            print(f"{reader}: {done} cases in {took:.1f} s, {fuzzer.failures} failures ({outcomes})", flush=True)
            failures += fuzzer.failures
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
