"""What trainers have left over ranks, in flat partitions and in universal checkpoints: the tensors that their own mergers make of it."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, read, refusal, run, write
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file, save_file
from trainer_models import DEEPSPEED, TORCH, UNIVERSAL, make

import streamconv
from streamconv.errors import RunError
from streamconv.running.filling import LocalEngine

GOLDEN = Path(__file__).parent.parent / "golden" / "trainers"
KINDS = {
    **{
        f"{kind}.{form}": f"{kind}.expected" for kind in TORCH for form in ("dcp", "ranks", "shards") if (kind, form) != ("fsdp1", "shards")
    },
    "fsdp2.tables": "fsdp2.expected",
    **{kind: f"{kind}.expected" for kind in DEEPSPEED},
    **{f"{kind}.universal": f"{kind}.universal.expected" for kind in UNIVERSAL},
    "z1_slices.universal": "z1_slices.universal.expected",
    **{kind: f"{kind}.expected" for kind in ("mindspore2", "mindspore2_single")},
}
FROZEN = {"frozen.weight", "frozen.bias"}  # DeepSpeed's script leaves them out in some versions


def copied(kind: str, folder: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / kind, folder / kind))


def expected(kind: str, folder: Path = GOLDEN) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{KINDS[kind]}.safetensors")


def check(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """``found`` has it all, but for a head that is the embedding, and a buffer that one writer was not given."""
    assert found.keys() - wanted.keys() <= FROZEN
    assert wanted.keys() - found.keys() <= {"head.weight", "buf"}
    wanted = {name: tensor for name, tensor in wanted.items() if name in found}
    assert_same({name: found[name] for name in found if name in wanted}, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_put_together(kind: str, tmp_path: Path) -> None:
    assert run("convert", GOLDEN / kind, tmp_path / "out", "--verify", "--quiet", "--check-replicas", "--max-memory", ROOMY) == 0
    check(read(tmp_path / "out"), expected(kind))
    assert run("verify", GOLDEN / kind, tmp_path / "out", "--quiet", "--max-memory", ROOMY) == 0


@pytest.mark.oracle
@pytest.mark.parametrize("kind", [*TORCH, *DEEPSPEED])
def test_what_a_library_makes_here(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed" if kind in DEEPSPEED else "torch")
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "made", [kind])
    for name in (name for name in KINDS if name.partition(".")[0] == kind):
        check(dict(streamconv_tensors(tmp_path / "made" / name)), expected(name, tmp_path / "made"))


def streamconv_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: entry.torch() for name, entry in streamconv.open(path).items()}


def test_the_module_of_its_own_dtype(tmp_path: Path) -> None:
    assert run("convert", GOLDEN / "z2_bf16_shuffled", tmp_path / "out", "--set", "master=false", "--quiet", "--max-memory", ROOMY) == 0
    model = torch.load(GOLDEN / "z2_bf16_shuffled/global_step2/mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert_same(read(tmp_path / "out"), {name: tensor for name, tensor in model.items() if name != "head.weight"})  # tied
    assert read(tmp_path / "out")["a.weight"].dtype == torch.bfloat16


def test_experts_in_files_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = copied("z2_experts", tmp_path)
    assert "take the module's own tensors with --set master=false" in refusal(capsys, "convert", src, tmp_path / "out")
    assert run("convert", src, tmp_path / "out", "--set", "master=false", "--quiet", "--max-memory", ROOMY) == 0
    assert_same(read(tmp_path / "out"), load_file(GOLDEN / "z2_experts.expected.safetensors"))
    for gone in (3, 1):
        (src / "step" / f"layer_0_expert_{gone}_mp_rank_00_model_states.pt").unlink()
        told = refusal(capsys, "convert", src, tmp_path / "no", "--set", "master=false")
        assert f"no file of expert {gone} of layer 0: fetch the files of all experts" in told


def test_slices_are_joined_by_their_own_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "merge them with DeepSpeed's ds_to_universal" in refusal(capsys, "convert", GOLDEN / "z1_slices", tmp_path / "out")
    src = copied("z1_slices.universal", tmp_path)
    (src / "step_universal" / "mp_rank_00_model_states.pt").unlink()
    assert "no *mp_rank_00_model_states.pt" in refusal(capsys, "convert", src, tmp_path / "out")


def test_the_folder_of_a_step_is_its_checkpoint(tmp_path: Path) -> None:
    assert list(streamconv.open(GOLDEN / "z3_bf16" / "global_step2")) == list(streamconv.open(GOLDEN / "z3_bf16"))
    assert streamconv.open(GOLDEN / "z2_fp32").format == "zero"


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", GOLDEN / "fsdp2.dcp", tmp_path / "out", "--max-memory", ROOMY) == 0
    out = capsys.readouterr().out
    assert "left out, a trainer's and not the model's: 6 tensors of 916 B" in out
    assert run("convert", GOLDEN / "fsdp2.dcp", tmp_path / "all", "--set", "root=", "--quiet", "--max-memory", ROOMY) == 0
    assert "optimizer.state.a.weight.exp_avg" in read(tmp_path / "all")


ONE_OF_EACH = ("tp2d.dcp", "hsdp.ranks", "z2_bf16_shuffled", "z3_bf16.universal", "mcore_llama", "mindspore2", "fsdp2.shards")


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_from_a_store_into_a_store(kind: str) -> None:
    files = MemoryFileSystem()
    try:
        for path in (path for path in (GOLDEN / kind).rglob("*") if path.is_file()):
            files.pipe_file(f"/trained/{path.relative_to(GOLDEN).as_posix()}", path.read_bytes())
        here = streamconv_tensors(GOLDEN / kind)
        assert_same(streamconv_tensors(f"memory://trained/{kind}"), here)
        streamconv.convert(f"memory://trained/{kind}", "memory://trained/out", max_shard_size="300B", max_memory=ROOMY, verify=True)
        there = streamconv_tensors("memory://trained/out")
        assert_same(there, {name: tensor for name, tensor in here.items() if name in there})
    finally:
        files.store.clear()


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_an_interrupted_run_is_gone_on_with(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(self: LocalEngine, number: int) -> None:
        if number == 1:
            raise RunError("killed")
        finish(self, number)

    finish, options = LocalEngine._finish, {"max_shard_size": "100B", "max_memory": ROOMY}
    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "_finish", give_up)
        with pytest.raises(RunError):
            streamconv.convert(GOLDEN / kind, tmp_path / "out", **options)
    streamconv.convert(GOLDEN / kind, tmp_path / "out", resume=True, **options)
    streamconv.convert(GOLDEN / kind, tmp_path / "whole", **options)
    assert_same(read(tmp_path / "out"), read(tmp_path / "whole"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_made_in_parts(kind: str, tmp_path: Path) -> None:
    options = ("--max-shard-size", "300B", "--max-memory", ROOMY)
    assert run("plan", GOLDEN / kind, tmp_path / "out", "--out", tmp_path / "plan.json", *options) == 0
    for part in ("1/2", "2/2"):
        assert run("run", tmp_path / "plan.json", "--part", part, "--quiet") == 0
    assert run("run", tmp_path / "plan.json", "--finish", "--quiet") == 0
    streamconv.convert(GOLDEN / kind, tmp_path / "whole", max_shard_size="300B", max_memory=ROOMY)
    assert_same(read(tmp_path / "out"), read(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_made_by_ray(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    streamconv.convert(GOLDEN / kind, tmp_path / "out", engine="ray", max_shard_size="300B", max_memory=ROOMY)
    streamconv.convert(GOLDEN / kind, tmp_path / "whole", max_shard_size="300B", max_memory=ROOMY)
    assert_same(read(tmp_path / "out"), read(tmp_path / "whole"))


def test_folders_that_have_a_checkpoint_in_them(tmp_path: Path) -> None:
    inner = tmp_path / "accelerate" / "pytorch_model_fsdp_0"
    shutil.copytree(GOLDEN / "fsdp2.dcp", inner)
    (tmp_path / "accelerate" / "config.json").write_text("{}")
    assert run("convert", tmp_path / "accelerate", tmp_path / "out", "--quiet", "--max-memory", ROOMY) == 0
    check(read(tmp_path / "out"), expected("fsdp2.dcp"))
    assert (tmp_path / "out" / "config.json").exists()
    shutil.copytree(GOLDEN / "mcore_llama", tmp_path / "megatron" / "iter_0000100")
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("100")
    assert list(streamconv.open(tmp_path / "megatron")) == list(streamconv.open(GOLDEN / "mcore_llama"))
    assert streamconv.open(tmp_path / "megatron").format == "torch_dist"


def test_lightning_by_the_model_beside(tmp_path: Path) -> None:
    model = write(tmp_path / "model", LLAMA, config={"architectures": ["LlamaForCausalLM"]})
    trained = {f"model.{name}": tensor + 1 for name, tensor in LLAMA.items()}
    state = {"state_dict": trained, "pytorch-lightning_version": "2.6", "optimizer_states": [{"state": {}, "param_groups": []}]}
    torch.save(state, tmp_path / "last.ckpt")
    assert run("convert", tmp_path / "last.ckpt", tmp_path / "out", "--sidecars-from", model, "--quiet", "--max-memory", ROOMY) == 0
    assert_same(read(tmp_path / "out"), {name: tensor + 1 for name, tensor in LLAMA.items()})


def test_a_trainer_s_files_are_not_given_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = copied("fsdp2.dcp", tmp_path)
    before = {path.name: path.read_bytes() for path in src.iterdir()}
    assert "holds what is the trainer's, too" in refusal(capsys, "convert", src, tmp_path / "out", "--reclaim-source", "--yes")
    assert {path.name: path.read_bytes() for path in src.iterdir()} == before


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "gone", "told"),
    [
        ("fsdp2.dcp", ".metadata", "no .metadata, which is written last: the save was not finished"),
        ("fsdp2.dcp", "__1_0.distcp", "__1_0.distcp: not there, and "),
        ("fsdp2.tables", "__1.metadata", "no __1.metadata, and each rank wrote its own"),
        ("fsdp2.tables", "__2.metadata", "is in no file: fetch the files of all ranks"),
        ("hsdp.ranks", "model_world_size_4_rank_2.pt", "the file of rank 2 is not there, of 4 ranks"),
        ("z2_fp32", "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt", "1 files of an optimizer's state, of 2 ranks"),
        ("z3_bf16", "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "the file of rank 1 beside"),
        ("z3_bf16", "global_step2/zero_pp_rank_2_mp_rank_00_model_states.pt", "2 files of the model, and 3 of the optimizer"),
        ("z2_fp32", "global_step2/mp_rank_00_model_states.pt", "no *_model_states.pt"),
        ("z3_bf16.universal", "global_step2_universal/zero/a.bias/fp32.pt", "no a.bias/fp32.pt"),
    ],
)
def test_what_is_missing_is_named(kind: str, gone: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = copied(kind, tmp_path)
    (src / gone).unlink()
    assert told in refusal(capsys, "convert", src, tmp_path / "out")


def test_stage_3_has_no_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "leave out --set master=false" in refusal(capsys, "convert", GOLDEN / "z3_bf16", tmp_path / "out", "--set", "master=false")
    assert "of which that cannot be chosen" in refusal(capsys, "convert", GOLDEN / "tp2d.dcp", tmp_path / "out", "--set", "master=false")


def test_files_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = copied("fsdp2.ranks", tmp_path)
    shutil.copy(GOLDEN / "hsdp.ranks" / "model_world_size_4_rank_1.pt", src)
    assert "files of several runs" in refusal(capsys, "convert", src, tmp_path / "out")
    (src / "model_world_size_4_rank_1.pt").rename(src / "model_world_size_3_rank_1.pt")
    told = refusal(capsys, "convert", src, tmp_path / "out")
    assert "is of a mesh in which" in told or "should have" in told or "is in no file" in told


def test_files_of_two_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for rank, path in enumerate(sorted((GOLDEN / "fsdp2.ranks").iterdir())):
        shutil.copy(path, src / f"pytorch_model_fsdp_rank{rank}.bin")
        shutil.copy(path, src / f"pytorch_model_fsdp_1_rank{rank}.bin")
    assert "files of several runs or models" in refusal(capsys, "convert", src, tmp_path / "out")
    for rank in range(3):
        (src / f"pytorch_model_fsdp_1_rank{rank}.bin").unlink()
    assert run("convert", src, tmp_path / "out", "--quiet", "--max-memory", ROOMY) == 0
    check(read(tmp_path / "out"), expected("fsdp2.ranks"))
    shutil.copy(src / "pytorch_model_fsdp_rank2.bin", src / "pytorch_model_fsdp_rank02.bin")
    assert "are both of rank 2" in refusal(capsys, "convert", src, tmp_path / "again")


def test_a_last_shard_that_no_file_tells_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = copied("fsdp2.shards", tmp_path)
    (src / "shard-00003-model-00001-of-00001.safetensors").unlink()
    assert run("plan", src, tmp_path / "out") == 0
    assert "(--set ranks=N makes sure)" in capsys.readouterr().out
    assert "no shard-00003-*.safetensors" in refusal(capsys, "convert", src, tmp_path / "out", "--set", "ranks=3")
    assert "has files of 2 ranks" in refusal(capsys, "convert", src, tmp_path / "out", "--set", "ranks=1")
    assert "expected a number" in refusal(capsys, "convert", src, tmp_path / "out", "--set", "ranks=all")
    whole = copied("fsdp2.shards", tmp_path / "whole")
    assert run("convert", whole, tmp_path / "out", "--set", "ranks=3", "--quiet", "--max-memory", ROOMY) == 0


def test_words_that_no_shard_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (1, 2):
        info = {"embed_tokens.weight": {"saved_offsets": [2 * (rank - 1), 0]}}
        metadata = {"DCP_SHARDING_INFO": json.dumps(info)}
        save_file({"embed_tokens.weight": torch.ones(2, 3)}, tmp_path / f"shard-0000{rank}-model-00001-of-00001.safetensors", metadata)
    (tmp_path / "config.json").write_text('{"vocab_size": 6}')
    told = refusal(capsys, "convert", tmp_path, tmp_path / "out")
    assert "'embed_tokens.weight' has 4 rows, and config.json says 6 words: fetch the files of all ranks" in told


def test_a_file_of_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = GOLDEN / "fsdp2.ranks" / "model_world_size_3_rank_0.pt"
    assert "give the folder with the files of all ranks" in refusal(capsys, "convert", file, tmp_path / "out")


def test_replicas_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = copied("hsdp.ranks", tmp_path)
    path = src / "model_world_size_4_rank_2.pt"
    data = bytearray(path.read_bytes())
    whole = expected("hsdp.ranks")["emb.weight"][:7].contiguous().view(torch.uint8).numpy().tobytes()
    at = bytes(data).index(whole)
    data[at] ^= 1
    path.write_bytes(data)
    assert run("convert", src, tmp_path / "out", "--quiet", "--max-memory", ROOMY) == 0
    assert "emb.weight" in refusal(capsys, "convert", src, tmp_path / "again", "--check-replicas", "--max-memory", ROOMY)
    assert run("doctor", src) == 0
    assert run("doctor", src, "--data") == 1
    assert "ranks hold other values of the same part" in "".join(capsys.readouterr())


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_healthy(kind: str) -> None:
    assert run("doctor", GOLDEN / kind, "--data") == 0


def test_boxes_that_leave_a_hole_or_overlap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torch.distributed.checkpoint.metadata import Metadata

    for number, change in enumerate(("hole", "overlap")):
        src = copied("fsdp2.dcp", tmp_path / change)
        with (src / ".metadata").open("rb") as file:
            table: Metadata = pickle.load(file)
        entry = table.state_dict_metadata["model.emb.weight"]
        if number == 0:
            entry.chunks.pop(1)
        else:
            entry.size = torch.Size((12, 8))
        with (src / ".metadata").open("wb") as file:
            pickle.dump(table, file)
        told = refusal(capsys, "convert", src, tmp_path / "out")
        assert "'emb.weight'" in told
        assert run("doctor", src) == 1
        assert ("is in no file" if number == 0 else "ends beyond it") in told


def test_items_that_are_compressed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = copied("fsdp2.dcp", tmp_path)
    with (src / ".metadata").open("rb") as file:
        table = pickle.load(file)
    for info in table.storage_data.values():
        info.transform_descriptors = ["stream.zstd/1"]
    with (src / ".metadata").open("wb") as file:
        pickle.dump(table, file)
    told = refusal(capsys, "convert", src, tmp_path / "out")
    assert "is stored by way of ['stream.zstd/1'], which is not read: save the checkpoint without it" in told


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("it ran",)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("fsdp2.dcp", ".metadata"),
        ("fsdp2.ranks", "model_world_size_3_rank_1.pt"),
        ("z2_fp32", "global_step2/mp_rank_00_model_states.pt"),
        ("z2_fp32", "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    ],
)
def test_a_hostile_pickle_runs_nothing(kind: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = copied(kind, tmp_path)
    if file == ".metadata":
        (src / file).write_bytes(pickle.dumps(Hostile()))
    else:
        torch.save({"module": Hostile(), "optimizer_state_dict": Hostile()}, src / file)
    assert run("convert", src, tmp_path / "out") == 2
    assert "it ran" not in "".join(capsys.readouterr())
    assert not (tmp_path / "out").exists()


# What tensors are called ----------------------------------------------------------------------------------------------

LLAMA = {
    "model.embed_tokens.weight": torch.ones(4, 2),
    "model.layers.0.mlp.up_proj.weight": torch.zeros(3, 2),
    "lm_head.weight": torch.full((4, 2), 2.0),
}


def saved_as(folder: Path, names: dict[str, str], *, flat: bool = False) -> Path:
    """A DCP of the tensors of LLAMA under other names."""
    import warnings

    import torch.distributed.checkpoint as dcp

    state = {names[name]: tensor for name, tensor in LLAMA.items() if name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state if flat else {"model": state}, checkpoint_id=folder)
    return folder


@pytest.mark.parametrize("before", ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_names_are_those_of_the_model(before: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = saved_as(tmp_path / "src", {name: f"{before}{name}" for name in LLAMA}, flat=True)
    assert run("convert", src, tmp_path / "out", "--max-memory", ROOMY) == 0
    assert_same(read(tmp_path / "out"), LLAMA)
    told = "".join(capsys.readouterr())
    assert ("names as the model has them" in told) == bool(before)
    assert run("convert", src, tmp_path / "kept", "--set", "prefix=", "--quiet", "--max-memory", ROOMY) == 0
    assert sorted(read(tmp_path / "kept")) == sorted(f"{before}{name}" for name in LLAMA)


def test_names_by_a_model_beside(tmp_path: Path) -> None:
    headless = {name: name for name in LLAMA if name != "lm_head.weight"}
    src = saved_as(tmp_path / "src", headless, flat=True)
    assert run("convert", src, tmp_path / "kept", "--quiet", "--max-memory", ROOMY) == 0
    assert sorted(read(tmp_path / "kept")) == sorted(headless)
    write(tmp_path / "bare", {name.removeprefix("model."): LLAMA[name] for name in headless}, config={"architectures": ["LlamaModel"]})
    assert run("convert", src, tmp_path / "out", "--sidecars-from", tmp_path / "bare", "--quiet", "--max-memory", ROOMY) == 0
    assert sorted(read(tmp_path / "out")) == sorted(read(tmp_path / "bare"))
    assert (tmp_path / "out" / "config.json").exists()


def test_a_prefix_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = saved_as(tmp_path / "src", {name: f"policy.{name}" for name in LLAMA})
    assert run("convert", src, tmp_path / "out", "--set", "prefix=policy.", "--quiet", "--max-memory", ROOMY) == 0
    assert_same(read(tmp_path / "out"), LLAMA)
    assert "does not begin so" in refusal(capsys, "convert", src, tmp_path / "no", "--set", "prefix=critic.")


def test_an_adapter_is_not_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {
        "model.embed_tokens.weight": "base_model.q.base_layer.weight",
        "lm_head.weight": "base_model.q.lora_A.default.weight",
    }
    src = saved_as(tmp_path / "src", names)
    assert "is of an adapter that is not merged" in refusal(capsys, "convert", src, tmp_path / "out")
    assert run("convert", src, tmp_path / "out", "--set", "prefix=", "--quiet", "--max-memory", ROOMY) == 0
    assert sorted(read(tmp_path / "out")) == sorted(names.values())


def test_a_config_that_the_trainer_keeps_beside(tmp_path: Path) -> None:
    src = copied("fsdp2.ranks", tmp_path)
    (src / "huggingface").mkdir()
    (src / "huggingface" / "config.json").write_text('{"architectures": ["Toy"]}')
    (src / "huggingface" / "tokenizer.json").write_text("{}")
    (src / "fsdp_config.json").write_text("{}")
    assert run("convert", src, tmp_path / "out", "--quiet", "--max-memory", ROOMY) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
