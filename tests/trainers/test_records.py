"""Tables of contents with very many boxes: read at once, they are what the machine makes step by step, and take little."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata

from streamconv.errors import FormatError
from streamconv.storage.locations import locate
from streamconv.trainers import dcp, records

GOLDEN = Path(__file__).parent.parent / "golden" / "trainers"


def write_table(folder: Path, ranks: int, tensors: int, protocol: int = 4) -> Path:
    """A table of tensors that are cut over ranks; each rank's names are texts of its own, as they are when ranks send them."""
    state: dict[str, Any] = {}
    storage = {}
    sizes = torch.Size([8, 512])
    for number in range(tensors):
        boxes = [ChunkStorageMetadata(offsets=torch.Size([8 * rank, 0]), sizes=torch.Size([8, 512])) for rank in range(ranks)]
        spec = TensorProperties(dtype=torch.bfloat16), torch.Size([8 * ranks, 512])
        state[f"model.layers.{number}.self_attn.\u00f6_proj.weight"] = TensorStorageMetadata(*spec, boxes)
    for rank in range(ranks):
        file = f"__{rank}_0.distcp"
        for number, name in enumerate(state):
            own = "".join(list(name)) if rank % 3 else name.replace("\u00f6", "o") if number % 5 == 4 else name
            index = MetadataIndex(own, torch.Size([8 * rank, 0]), None if rank % 5 == 0 else rank)
            storage[index] = _StorageInfo(file, number * 70_000, sizes.numel() * 2 + 1300)
    folder.mkdir(exist_ok=True)
    with (folder / ".metadata").open("wb") as file_:
        pickle.dump(Metadata(state, {name: ("model", name[6:]) for name in state}, storage), file_, protocol=protocol)
    return folder / ".metadata"


def read_both(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """What a table says, read at once and step by step; what it is refused for."""
    found = []
    for limit in (1 << 30, -1):
        monkeypatch.setattr(records, "_MAX_SCAN", limit)
        try:
            table = dcp._read_table(locate(path))
            found.append((table.tensors, table.objects, table.paths, dict(sorted(table.items.items()))))
        except FormatError as error:
            found.append(str(error))
    return found[0], found[1]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_at_once_is_step_by_step(protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, by_steps = read_both(write_table(tmp_path, 40, 12, protocol), monkeypatch)
    assert at_once == by_steps
    assert len(at_once[0]) == 12
    assert all(len(tensor.chunks) == 40 for tensor in at_once[0].values())


@pytest.mark.parametrize("kind", ["fsdp1.dcp", "fsdp2.dcp", "hsdp.dcp", "tp2d.dcp", "mcore_llama", "mcore_mixtral"])
def test_of_what_torch_wrote(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, by_steps = read_both(GOLDEN / kind / ".metadata", monkeypatch)
    assert at_once == by_steps


def test_of_damaged_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one is refused the other is: what the memo was not going to be asked for is another message at most."""
    path, chance = write_table(tmp_path, 6, 4), random.Random(0)
    whole = path.read_bytes()
    for _ in range(80):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 2))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        at_once, by_steps = read_both(path, monkeypatch)
        assert at_once == by_steps or (type(at_once) is str and type(by_steps) is str)


def test_records_are_at_one_place(tmp_path: Path) -> None:
    """What counts a record's bytes once has it once: neither the memo nor a second place on the stack holds it."""
    data = write_table(tmp_path, 40, 4).read_bytes()
    end = data.index(b"ub", data.index(b"storage_data") - 300) + 2  # what one byte asks for is never read at once
    for step in (b"2", b"q\x05", b"r\x05\0\0\0"):
        (tmp_path / ".metadata").write_bytes(data[:end] + step + data[end:])
        with pytest.raises(FormatError, match="ChunkStorageMetadata at two places"):
            dcp._read_table(locate(tmp_path / ".metadata"))


def test_memory_of_a_box(tmp_path: Path) -> None:
    path = write_table(tmp_path, 100, 30)
    dcp._read_table(locate(path))
    tracemalloc.start()
    dcp._read_table(locate(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 700 * 3000


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "tensors", "limit"), [(256, 300, 100), (1024, 723, 480)])
def test_memory_of_many_ranks(ranks: int, tensors: int, limit: int, tmp_path: Path) -> None:
    path = write_table(tmp_path, ranks, tensors)
    code = (
        "import sys\nfrom streamconv.storage.locations import locate\nfrom streamconv.trainers import dcp\n"
        "table = dcp._read_table(locate(sys.argv[1]))\n"
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(sum(len(one.chunks) for one in table.tensors.values()), peak)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    count, peak = map(int, done.stdout.split())
    assert count == ranks * tensors
    assert peak < limit * 1000
