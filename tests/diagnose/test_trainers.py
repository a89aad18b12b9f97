"""What doctor says of trainers' checkpoints that are not whole: a line each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import run
from trainer_models import CONFIGS

GOLDEN = Path(__file__).parent.parent / "golden" / "trainers"


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def moved(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new)


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_text(text))


def void(_: object) -> None:
    """Nothing, of something."""


def iteration_of(number: int) -> Callable[[Path], None]:
    """The checkpoint as that of an iteration, and a file that names one."""

    def change(folder: Path) -> None:
        for path in [*folder.iterdir()]:
            (folder / "iter_0000100").mkdir(exist_ok=True)
            path.rename(folder / "iter_0000100" / path.name)
        (folder / "latest_checkpointed_iteration.txt").write_text(str(number))
        if number == 100:
            (folder / "iter_0000100" / ".metadata").unlink()

    return change


CASES = {
    "a rank of DCP": ("fsdp2.dcp", without("__1_0.distcp"), "__1_0.distcp: not there, and "),
    "a rank's table": ("fsdp2.tables", without("__1.metadata"), "no __1.metadata, and each rank wrote its own"),
    "the last rank's table": ("fsdp2.tables", without("__2.metadata"), "is in no file: fetch the files of all ranks"),
    "a rank of FSDP": ("hsdp.ranks", without("model_world_size_4_rank_2.pt"), "3 of 4 ranks are there, number 2 is not"),
    "a rank of ZeRO": (
        "z2_fp32", without("global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt"), "1 files of an optimizer's state, of 2 ranks",
    ),
    "a rank of stage 3": ("z3_bf16", without("global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"), "the file of rank 1 beside"),
    "a parameter's folder": ("z3_bf16.universal", without("global_step2_universal/zero/a.bias/fp32.pt"), "no a.bias/fp32.pt"),
    "a shard": ("fsdp2.shards", without("shard-00002-model-00001-of-00001.safetensors"), "no shard-00002-*.safetensors"),
    "a rank of MindSpore's": (
        "mindspore2", without("iteration_00000012/toy-model-0000003-0000004.safetensors"), "should lie in toy-model-0000003-0000004",
    ),
    "MindSpore's table": ("mindspore2", without("iteration_00000012/metadata.json"), "files of 4 ranks, and no metadata.json"),
    "a save that was not finished": ("fsdp2.dcp", moved(".metadata", ".metadata.tmp"), "the save was not finished"),
    "an iteration that was not": ("mcore_llama", iteration_of(100), "iter_0000100: no .metadata, which is written last"),
    "an iteration that is not there": ("mcore_llama", iteration_of(200), "names 'iter_0000200', in which there is no checkpoint"),
    "a step that is not there": ("z2_fp32", written("latest", "global_step9"), "it names 'global_step9', which is not there"),
    "worlds that disagree": (
        "fsdp2.ranks", moved("model_world_size_3_rank_1.pt", "model_world_size_4_rank_1.pt"), "ranks are there, number",
    ),
    "models of two runs": (
        "z3_bf16", without("global_step2/zero_pp_rank_2_mp_rank_00_model_states.pt"), "2 files of the model, and 3 of the optimizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_whole(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, change, told = CASES[case]
    folder = Path(shutil.copytree(GOLDEN / kind, tmp_path / "src"))
    change(folder)
    assert run("doctor", folder) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 1
    assert told in problems[0]


def test_a_head_of_megatron_s_is_one(tmp_path):
    source = Path(shutil.copytree(GOLDEN / "mcore_llama", tmp_path / "megatron"))
    (source / "config.json").write_text(json.dumps({**CONFIGS["mcore_llama"], "tie_word_embeddings": False}))
    assert run("doctor", source) == 0
