"""tp-split's ranks beside those of transformers' own sharding, on a group of processes."""

from __future__ import annotations

import os
import re
import socket
import warnings

import pytest
import torch
from checkpoint_files import assert_same, run
from ranked_models import MODELS
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.oracle
HEADS = re.compile(r"\.[kv]_proj\.")


def shard(rank, size, port, folder, out):
    """One process of the group: loads each model and stores what it has of it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import transformers

    # A package that only the placing on devices takes is asked for; nothing is placed.
    transformers.modeling_utils.check_and_set_device_map = lambda device: device and {"": device}
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    for kind, (name, _) in MODELS.items():
        model = getattr(transformers, f"{name}ForCausalLM").from_pretrained(f"{folder}/{kind}/hub", tp_plan="auto")
        mine = {name: tensor.to_local() if hasattr(tensor, "to_local") else tensor for name, tensor in model.state_dict().items()}
        save_file({name: tensor.contiguous().clone() for name, tensor in mine.items()}, f"{out}/{kind}-{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_hold_what_the_library_gives_them(checkpoints, tmp_path, size):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(shard, (size, port, str(checkpoints), str(tmp_path)), nprocs=size)
    for kind in MODELS:
        out = tmp_path / kind
        assert run("convert", checkpoints / kind / "native", out, "--recipe", "tp-split", "--set", f"model_parallel={size}", "--quiet") == 0
        for rank in range(size):
            wanted = load_file(tmp_path / f"{kind}-{rank}.safetensors")
            found = load_file(out / f"model{rank}-mp{size}.safetensors")
            assert any(found[name].shape != tensor.shape for name, tensor in load_whole(checkpoints / kind / "native").items())
            if size > MODELS[kind][1]["num_key_value_heads"]:  # which the library cuts
                found, wanted = ({name: of[name] for name in of if not HEADS.search(name)} for of in (found, wanted))
            assert_same(found, wanted)


def load_whole(folder):
    return load_file(folder / "model.safetensors")
