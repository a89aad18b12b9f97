"""Kills conversions of every kind at random moments, has them resumed, and compares the result with that of an undisturbed run.

    python -m tools.crash --kills 200

Each conversion runs in a process of its own, made slow and with its work cut small, so that a second holds many moments. SIGKILL comes
at a random one of them, sometimes again while the run is being resumed. What is printed: how many kills hit a run at work, and how many
bytes were written twice for each at most, which must not be more than one output file for each worker. They are gone on with by the same
command, or by what DST says itself. Kinds in parts are divided into 16,
of which several run at once, in random order; three are killed and run again, and sometimes the end is, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch  # noqa: F401 - before the forks, so that their time is that of work
import yaml

from streamconv.cli import command as cli
from streamconv.engine import order
from streamconv.planning import fitting
from streamconv.running import filling, making
from streamconv.running.output import LOG, PLAN, STATE

WORKERS = 2
SHARD = 1 << 20
PAUSE = 0.004  # seconds after each task
PARTS, AT_ONCE, KILLED = 16, 3, 3
LAYERS, HIDDEN, KV, FFN, VOCAB, RANK = 4, 256, 128, 768, 1024, 8
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN, "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "hidden_act": "silu",
    "torch_dtype": "float32",
}  # fmt: skip
FUSE = {
    "rules": [
        {
            "rule": "model.layers.{i}.self_attn.{q,k,v}_proj.weight",
            "right": "model.layers.{i}.self_attn.qkv.weight",
            "layout": "(g q d) c, (g d) c, (g d) c -> (g (q d + d + d)) c",
        },
        *(
            {"rule": name, "right": name}
            for name in (
                "model.embed_tokens.weight",
                "model.layers.{i}.self_attn.o_proj.weight",
                "model.layers.{i}.mlp.{part:gate,up,down}_proj.weight",
                "model.layers.{i}.{part:input,post_attention}_layernorm.weight",
                "model.norm.weight",
                "lm_head.weight",
            )
        ),
    ],
    "dims": {"g": 4, "d": 32},
}
KINDS = {
    "reshard": ["--max-shard-size", str(SHARD)],
    "fuse": ["--max-shard-size", str(SHARD), "--recipe", "{src}/../fuse.yaml"],
    "cast": ["--max-shard-size", str(SHARD), "--dtype", "bf16"],
    "torch": ["--max-shard-size", str(SHARD), "--format", "torch"],
    "mindspore": ["--max-shard-size", str(SHARD), "--format", "mindspore"],
    "sat": ["--recipe", "llama-hf2sat", "--set", "model_parallel=2"],
    "checksum": ["--max-shard-size", str(SHARD), "--checksum"],
    "overwrite": ["--max-shard-size", str(SHARD), "--format", "torch", "--overwrite"],
    "reclaim": ["--max-shard-size", str(SHARD), "--reclaim-source", "--yes"],
    "reclaim-fuse": ["--max-shard-size", str(SHARD), "--recipe", "{src}/../fuse.yaml", "--reclaim-source", "--yes"],
    "adapter": ["--max-shard-size", str(SHARD), "--adapter", "{src}/../lora"],
    "graft": ["--max-shard-size", str(SHARD), "--graft", "{src}/../donor", "--take", "*", "--replace"],
    "rename": ["--max-shard-size", str(SHARD), "--rename", "model.{{name*}} -> decoder.{{name*}}", "--drop", "*_layernorm.weight"],
    "merge": ["--max-shard-size", str(SHARD)],
    "parts": ["--max-shard-size", str(SHARD // 2)],
    "parts-fuse": ["--max-shard-size", str(SHARD // 2), "--recipe", "{src}/../fuse.yaml"],
    "parts-adapter": ["--max-shard-size", str(SHARD // 2), "--adapter", "{src}/../lora"],
}
"""What to convert how; the source is always the same."""


class CrashError(Exception):
    """A killed run did not end as an undisturbed one."""


@dataclass
class Count:
    """What came of a number of kills."""

    kind: str
    kills: int = 0
    hits: int = 0
    twice: int = 0
    allowed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kind:13} {self.kills:4} runs, {self.hits:4} killed while at work, all gone on with to the same bytes; "
            f"written twice for a kill: {self.twice} bytes at most, {self.allowed} allowed"
        )


def make_source(folder: Path) -> None:
    """A small checkpoint of Llama's names, in three files; beside it the recipe that fuses its q, k and v, an adapter, a graft, a merge."""
    numbers = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{part}_proj.weight": (HIDDEN if part in "qo" else KV, HIDDEN) for part in "qkvo"}
        shapes |= {f"{at}.mlp.{part}_proj.weight": (FFN, HIDDEN) for part in ("gate", "up")} | {f"{at}.mlp.down_proj.weight": (HIDDEN, FFN)}
        shapes |= {f"{at}.{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    folder.mkdir(parents=True)
    names = list(shapes)
    where = {name: f"model-{1 + k * 3 // len(names):05d}-of-00003.safetensors" for k, name in enumerate(names)}
    for file in sorted(set(where.values())):
        _write(folder / file, {name: shapes[name] for name in names if where[name] == file}, numbers)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder.parent / "fuse.yaml").write_text(yaml.safe_dump(FUSE))

    low_rank = {}
    for name, (outputs, inputs) in ((name, shape) for name, shape in shapes.items() if "_proj" in name):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        low_rank |= {f"{module}.lora_A.weight": (RANK, inputs), f"{module}.lora_B.weight": (outputs, RANK)}
    adapter, graft = folder.parent / "lora", folder.parent / "donor"
    for other in (adapter, graft):
        other.mkdir()
    _write(adapter / "adapter_model.safetensors", low_rank, numbers)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}))
    grafted = {name: shape for name, shape in shapes.items() if ".layers.0." in name or "lm_head" in name}
    _write(graft / "model.safetensors", grafted, numbers)
    (graft / "config.json").write_text(json.dumps(CONFIG))
    models = [{"model": f"{folder}+{adapter}", "parameters": {"weight": 0.7, "density": 0.3}}]
    merge = {"merge_method": "ties", "base_model": str(folder), "models": models, "parameters": {"rescale": True}}
    (folder.parent / "merge.yaml").write_text(yaml.safe_dump(merge))


def _write(path: Path, shapes: Mapping[str, tuple[int, ...]], numbers: np.random.Generator) -> None:
    """A safetensors file of random float32 tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at, data = 0, []
    for name, shape in shapes.items():
        values = numbers.standard_normal(shape, dtype=np.float32).tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + len(values)]}
        at += len(values)
        data.append(values)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def read_tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def start(arguments: list[str], log: Path) -> int:
    """Converts in a process of its own, slowly; writes what it begins to write to ``log``. Returns its id."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.dup2(os.open(log.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        tempfile.tempdir = str(log.with_name("tmp"))
        _slow_down(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), PAUSE * (6 if arguments[0] == "run" else 1))
        code = cli.main([*arguments, "--quiet", *(["-j", str(WORKERS), "--max-memory", "4GB"] if arguments[0] != "run" else [])])
    finally:
        os._exit(code)


def _slow_down(log: int, pause: float) -> None:
    order.COPY_CHUNK = 128 << 10
    fitting.TILE = 128 << 10
    making.SAVE_BYTES = SHARD

    def slowly(made: Callable[..., int], nbytes: Callable[..., int]) -> Callable[..., int]:
        def do(engine: filling.LocalEngine, *task: object) -> int:
            os.write(log, b"%d\n" % nbytes(engine, *task))
            done = made(engine, *task)
            time.sleep(pause)
            return done

        return do

    filling.LocalEngine._copy = slowly(filling.LocalEngine._copy, lambda _, __, segment: segment.nbytes)  # type: ignore[method-assign]
    filling.LocalEngine._compute = slowly(  # type: ignore[method-assign]
        filling.LocalEngine._compute, lambda engine, _, segment, tile: tile.numel * engine._plan.nodes[segment.node].spec.dtype.itemsize
    )


def finish(pid: int) -> int:
    """Waits for a process; its exit code, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def written(log: Path) -> int:
    """Bytes that the runs with this log have begun to write."""
    return sum(map(int, log.read_text().split())) if log.exists() else 0


def crash(kind: str, kills: int, folder: Path, chance: random.Random) -> Count:
    """Kills conversions of a kind.

    Raises:
        CrashError: one did not resume, or not to the same bytes, or wrote too much twice.
    """
    original = folder / "src"
    if not original.exists():
        make_source(original)
    src, dst, log = folder / kind / "src", folder / kind / "dst", folder / kind / "log"
    arguments = ["convert", str(src), str(dst), *(text.format(src=original) for text in KINDS[kind])]
    if kind == "merge":
        arguments[:2] = ["merge", str(original.with_name("merge.yaml"))]

    def clean() -> None:
        shutil.rmtree(folder / kind, ignore_errors=True)
        shutil.copytree(original, src)
        log.with_name("tmp").mkdir()
        if kind == "overwrite":
            dst.mkdir()
            shutil.copy(next(original.glob("*.safetensors")), dst / "model.safetensors")

    clean()
    began = time.monotonic()
    if code := finish(start(arguments, log)):
        raise CrashError(f"{kind}: exit code {code}: {log.with_suffix('.err').read_text()}")
    length, payload, wanted = time.monotonic() - began, written(log), read_tree(dst)
    allowed = WORKERS * max(map(len, wanted.values()))
    count = Count(kind, allowed=allowed)
    for _ in range(kills):
        clean()
        hits, resumed = 0, False
        for again in range(1 + (chance.random() < 0.3)):
            pid = start([*arguments, "--resume"] if again else arguments, log)
            time.sleep(chance.uniform(0, length))
            os.kill(pid, signal.SIGKILL)
            code = finish(pid)
            hits += code < 0
            resumed = bool(again)
            if code > 0:
                raise CrashError(f"{kind}: {'resumed, ' if resumed else ''}exit code {code}: {log.with_suffix('.err').read_text()}")
        command = [*arguments, "--resume"]
        if chance.random() < 0.5 and (dst / STATE / LOG).exists() and (dst / STATE / PLAN).exists():  # DST knows how to go on, too
            command = ["run", str(dst), "--resume", *(["--checksum"] if "--checksum" in arguments else [])]
        if code := finish(start(command, log)):
            raise CrashError(f"{kind}: resumed, exit code {code}: {log.with_suffix('.err').read_text()}; left in {folder / kind}")
        if (found := read_tree(dst)) != wanted:
            differing = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
            raise CrashError(f"{kind}: {', '.join(differing)} differ after a resumed run; left in {folder / kind}")
        left = [path.name for path in log.with_name("tmp").iterdir()]
        if left and command[0] == "convert":  # only what makes temporary files clears up those of others
            raise CrashError(f"{kind}: {left} left among temporary files; left in {folder / kind}")
        twice = (written(log) - payload) // max(1, hits)
        if twice > allowed:
            raise CrashError(f"{kind}: {twice} bytes written twice, {allowed} allowed; left in {folder / kind}")
        if kind.startswith("reclaim") and any(src.glob("*.safetensors")):
            raise CrashError(f"{kind}: the source is still there; left in {folder / kind}")
        count.kills, count.hits, count.twice = count.kills + 1, count.hits + hits, max(count.twice, twice)
    shutil.rmtree(folder / kind)
    return count


def crash_parts(kind: str, rounds: int, folder: Path, chance: random.Random) -> Count:
    """Makes outputs in parts, of which some are killed and run again.

    Raises:
        CrashError: a part failed, or the output is not that of an ordinary conversion.
    """
    original, dst, log = folder / "src", folder / kind / "dst", folder / kind / "log"
    if not original.exists():
        make_source(original)
    plan = folder / kind / "plan.json"
    log.with_name("tmp").mkdir(parents=True)
    given = [text.format(src=original) for text in KINDS[kind]]

    def complete(*arguments: str) -> None:
        if code := finish(start(list(arguments), log)):
            raise CrashError(f"{kind}: exit code {code}: {log.with_suffix('.err').read_text()}; left in {folder / kind}")

    complete("convert", str(original), str(dst), *given)
    wanted, payload = read_tree(dst), written(log)
    files = sorted(map(len, wanted.values()), reverse=True)
    count = Count(kind, allowed=sum(files[: -(-len(files) // PARTS)]))
    for _ in range(rounds):
        shutil.rmtree(dst)
        log.unlink()
        complete("plan", str(original), str(dst), *given, "--out", str(plan))
        order = chance.sample(range(PARTS), PARTS)
        order += (victims := chance.sample(order, KILLED))
        hits, running = 0, dict[int, int]()
        for at, number in enumerate(order):
            while len(running) >= AT_ONCE or number in running:
                _wait_for_part(kind, running)
            pid = start(["run", str(plan), "--part", f"{number}/{PARTS}"], log.with_name(f"log-{number}"))
            if at >= PARTS or number not in victims:
                running[number] = pid
                continue
            time.sleep(chance.uniform(0.02, 0.15))
            os.kill(pid, signal.SIGKILL)
            hits += finish(pid) < 0
        while running:
            _wait_for_part(kind, running)
        if chance.random() < 0.5:
            pid = start(["run", str(plan), "--finish"], log)
            time.sleep(chance.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
            finish(pid)
        complete("run", str(plan), "--finish")
        if (found := read_tree(dst)) != wanted:
            differing = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
            raise CrashError(f"{kind}: {', '.join(differing)} differ; left in {folder / kind}")
        twice = (sum(written(path) for path in log.parent.glob("log*[!r]")) - payload) // max(1, hits)
        if twice > count.allowed:
            raise CrashError(f"{kind}: {twice} bytes written twice, {count.allowed} allowed; left in {folder / kind}")
        for path in log.parent.glob("log-*"):
            path.unlink()
        count.kills, count.hits, count.twice = count.kills + KILLED, count.hits + hits, max(count.twice, twice)
    shutil.rmtree(folder / kind)
    return count


def _wait_for_part(kind: str, running: dict[int, int]) -> None:
    """Waits for the part that was begun first."""
    number = next(iter(running))
    if code := finish(running.pop(number)):
        raise CrashError(f"{kind}: part {number}: exit code {code}")


def main(argv: list[str] | None = None) -> int:
    """Runs the kills and prints what came of them."""
    parser = argparse.ArgumentParser(description="Kill conversions at random moments and have them resumed.")
    parser.add_argument("--kills", type=int, default=200, help="in all, over every kind")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", help="where to work (default: a temporary directory)")
    args = parser.parse_args(argv)
    kinds = args.kind or list(KINDS)
    folder = Path(tempfile.mkdtemp(dir=args.dir, prefix="crash-"))
    chance = random.Random(args.seed)
    try:
        for number, kind in enumerate(kinds):
            kills = len(range(number, args.kills, len(kinds)))
            print(
                crash_parts(kind, -(-kills // KILLED), folder, chance) if "parts" in kind else crash(kind, kills, folder, chance),
                flush=True,
            )
    except CrashError as error:
        print(f"crash: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
