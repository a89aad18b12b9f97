"""Memory: the kernel's high-water mark of whole processes, since what is promised is what a process takes in all.

The default run uses checkpoints of a few hundred megabytes; those marked slow use the sizes that users have.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from checkpoint_files import write
from processes import MB
from safetensors.torch import save_file

import streamconv
from streamconv.dtypes import CASTABLE
from streamconv.formats import safetensors
from streamconv.graph.node import apply
from streamconv.graph.ops import Cast
from streamconv.planning.compiler import compile_plan
from streamconv.planning.fitting import HELD_COMPUTE, Budget
from tools import make_checkpoint as made


def keep_others(*rules: dict[str, object]) -> dict[str, object]:
    """A recipe that rearranges ``extra.weight`` and leaves what else a BERT has."""
    others = [{"rule": f"{part}.{{rest*}}", "right": f"{part}.{{rest*}}"} for part in ("encoder", "embeddings", "pooler")]
    return {"rules": [*rules, *others]}


RECIPES: dict[str, dict[str, object]] = {
    "transpose": keep_others({"rule": "extra.weight", "right": "extra.weight", "layout": "a b -> b a"}),
    "heads": keep_others(
        {"rule": "extra.weight", "right": "extra.weight", "layout": "a (h two d) -> a (h d two)", "dims": {"two": 2, "d": 8}},
    ),
}


@pytest.fixture(scope="session")
def recipes(tmp_path_factory) -> Path:
    """Recipe files, by name."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return folder


def bert(folder: Path, size: int, one_tensor: int, model: str = "minilm") -> Path:
    """Hundreds of small tensors and a large one, in shards a quarter of the size."""
    made.make_checkpoint(model, folder, size=size, one_tensor=one_tensor, dtype="bfloat16", max_shard_size=(size + one_tensor) // 4)
    return folder


def internvl(folder: Path, *, vision_layers: int = 1) -> Path:
    """Layers of a vision tower of 6B parameters, before a small text model; 140 MB with one layer."""
    config = copy.deepcopy(made.MODELS["internvl3-78b"].config)
    config["vision_config"] |= {"num_hidden_layers": vision_layers, "intermediate_size": 3200}
    config["text_config"] |= {"num_hidden_layers": 1, "hidden_size": 512, "intermediate_size": 512, "vocab_size": 1000}
    config["text_config"] |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    shapes = made.MODELS["internvl3-78b"].shapes(config)
    assert made.nbytes(*shapes["vision_tower.encoder.layer.0.attention.q_proj.weight"]) > 20 * MB
    folder.mkdir(parents=True, exist_ok=True)
    made.write_shard(folder / "model.safetensors", shapes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    return bert(tmp_path_factory.mktemp("dense"), 40 * MB, 60 * MB)


@pytest.fixture(scope="session")
def fused(tmp_path_factory) -> Path:
    return internvl(tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deepseek")
    made.make_checkpoint("deepseek-v3", folder, sparse=True)
    return folder


OPERATIONS: Mapping[str, tuple[str, list[str]]] = {
    "reshard": ("dense", ["--max-shard-size", "30MB"]),
    "fuse": ("fused", ["--recipe", "internvl-hf2custom"]),
    "transpose": ("dense", ["--recipe", "{recipes}/transpose.yaml"]),
    "heads": ("dense", ["--recipe", "{recipes}/heads.yaml"]),
    "cast": ("dense", ["--dtype", "float32"]),
    "transpose and cast": ("dense", ["--recipe", "{recipes}/transpose.yaml", "--dtype", "float16"]),
    "fuse and cast": ("fused", ["--recipe", "internvl-hf2custom", "--dtype", "float16"]),
}
COPIES = {"reshard", "fuse"}
COMPUTED = [name for name in OPERATIONS if name not in COPIES]
SMALLEST = 62  # MB in which anything can be computed


@pytest.fixture
def operation(request, dense, fused, recipes) -> Callable[[str], tuple[Path, list[str]]]:
    sources = {"dense": dense, "fused": fused}

    def find(name: str) -> tuple[Path, list[str]]:
        source, options = OPERATIONS[name]
        return sources[source], [option.replace("{recipes}", str(recipes)) for option in options]

    return find


# What is loaded ----------------------------------------------------------------------------------------------------


def test_torch_is_never_loaded_and_numpy_only_where_something_is_computed(process, convert, operation):
    for name in ("reshard", "fuse"):
        source, options = operation(name)
        found = convert(source, *options, "--verify", max_memory=1000 * MB)
        assert not {"torch", "numpy"} & found.modules, name
    for name in ("heads", "fuse and cast"):
        source, options = operation(name)
        assert "torch" not in convert(source, *options, "--verify", max_memory=1000 * MB).modules, name
    for arguments in (("inspect", source), ("recipes",), ("recipes", "--match", source)):
        assert not {"torch", "numpy"} & process(*arguments).modules
    assert "torch" not in process("verify", source, source).modules


def test_the_package_loads_light():
    code = "import sys, streamconv; assert not {'torch', 'numpy', 'yaml', 'tqdm', 'psutil'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


# The promised figures ----------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("workers", [None, pytest.param(1, marks=pytest.mark.slow), 64])
@pytest.mark.parametrize("name", ["reshard", "fuse"])
def test_moving_bytes_takes_64_mb_on_any_number_of_cores(convert, operation, name, workers):
    source, options = operation(name)
    more = [] if workers is None else ["--workers", workers]
    assert convert(source, *options, *more, max_memory=64 * MB).peak <= 64 * MB
    if workers is None:  # the default budget does not make it take more than it needs
        assert convert(source, *options, max_memory=1000 * MB).peak <= 64 * MB


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", COMPUTED)
def test_computing_keeps_to_100_mb(convert, operation, name):
    source, options = operation(name)
    assert convert(source, *options, "--verify", max_memory=100 * MB).peak <= 100 * MB


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", CASTABLE)
def test_casts_of_any_type_keep_to_the_smallest_budget(convert, tmp_path, dtype):
    source = write(tmp_path / "source", {"w": torch.ones(1500, 1000, dtype=getattr(torch, dtype))})
    for other in CASTABLE:
        if other != dtype:
            assert convert(source, "--dtype", other, max_memory=SMALLEST * MB).peak <= SMALLEST * MB


def test_strided_tensors_of_any_size_keep_to_their_bound(convert, process, tmp_path):
    """60 MB in as many pieces as elements."""
    tensors = {
        "transposed": torch.ones(4000, 5000, dtype=torch.bfloat16).t(),
        "steps": torch.ones(2000, 10_000, dtype=torch.bfloat16)[:, ::2],
    }
    torch.save(tensors, tmp_path / "x.bin")
    done = convert(tmp_path / "x.bin", "--verify", max_memory=70 * MB)
    assert done.peak <= 70 * MB
    assert "torch" not in done.modules
    found = process("verify", tmp_path / "x.bin", tmp_path / "x.bin", "--max-memory", 70 * MB)
    assert (found.code, found.peak <= 70 * MB) == (0, True), found.error


def compare_sizes(convert, recipes, small: Path, large: Path) -> None:
    """The larger checkpoint takes the same memory. With two workers the small one keeps both busy too."""
    for name in ("reshard", "transpose and cast"):
        options = [option.replace("{recipes}", str(recipes)) for option in OPERATIONS[name][1]]
        limit = (64 if name in COPIES else 100) * MB
        peaks = [convert(source, *options, "-j", 2, max_memory=limit).peak for source in (small, large)]
        assert peaks[1] <= 1.1 * peaks[0], (name, peaks)


def test_memory_does_not_grow_with_the_checkpoint(convert, recipes, tmp_path):
    compare_sizes(convert, recipes, bert(tmp_path / "small", 10 * MB, 50 * MB), bert(tmp_path / "large", 100 * MB, 50 * MB))


@pytest.mark.slow
def test_memory_does_not_grow_to_gigabytes(convert, recipes, tmp_path, monkeypatch):
    minilm = made.MODELS["minilm"]
    config = minilm.config | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    monkeypatch.setitem(made.MODELS, "large", dataclasses.replace(minilm, config=config))
    small = bert(tmp_path / "small", 700 * MB, 100 * MB, "large")
    compare_sizes(convert, recipes, small, bert(tmp_path / "large", 8000 * MB, 100 * MB, "large"))


@pytest.mark.slow
def test_memory_does_not_grow_with_a_tensor_of_2_gb(convert, recipes, tmp_path):
    compare_sizes(convert, recipes, bert(tmp_path / "small", 100 * MB, 100 * MB), bert(tmp_path / "large", 100 * MB, 2000 * MB))


@pytest.mark.slow
def test_fusion_of_gigabytes_takes_64_mb(convert, tmp_path):
    source = internvl(tmp_path / "large", vision_layers=20)
    assert convert(source, "--recipe", "internvl-hf2custom", max_memory=64 * MB).peak <= 64 * MB


def write_small_tensors(path: Path, count: int, dtype: torch.dtype = torch.float32) -> Path:
    """A file of so many tensors of a few bytes each."""
    save_file({f"layers.{number // 100}.block.{number % 100}.weight": torch.zeros(4, 4, dtype=dtype) for number in range(count)}, path)
    return path


def smallest(process, *command: object) -> int:
    """The megabytes with which a command is not refused: what reading a header takes may be refused before what the run takes."""
    needed = 60
    while (done := process(*command, "--max-memory", f"{needed}MB")).code == 2:
        needed = int(re.search(r"use (?:--max-memory )?(\d+)MB", done.error)[1])
    return needed


@pytest.mark.slow
def test_a_hundred_thousand_small_tensors_keep_to_the_budget(process, tmp_path):
    """What a run holds of each tensor, from planning to its end, is counted."""
    source, out = write_small_tensors(tmp_path / "source.safetensors", 100_000), tmp_path / "out.safetensors"
    needed = smallest(process, "plan", source, out, "--dtype", "bfloat16")
    for given in ([], ["--verify", "--checksum", "--overwrite"]):
        done = process("convert", source, out, "--dtype", "bfloat16", "--max-memory", f"{needed}MB", *given)
        assert done.code == 0, done.error
        assert done.document["peak_rss"] <= done.document["peak_memory"] <= needed * MB
    other = write_small_tensors(tmp_path / "other.safetensors", 100_000, torch.bfloat16)
    needed = smallest(process, "verify", source, other)
    done = process("verify", source, other, "--max-memory", f"{needed}MB")
    assert done.code == 1, done.error
    assert done.peak <= needed * MB


def test_what_a_run_holds_of_each_segment_is_counted(tmp_path):
    peaks = []
    for count in (1, 1001):
        source = write_small_tensors(tmp_path / f"{count}.safetensors", count)
        checkpoint = streamconv.open(source)
        outputs = {name: apply(Cast("bfloat16"), entry.source) for name, entry in checkpoint.items()}
        layouts = safetensors.lay_out({name: node.spec for name, node in outputs.items()}, max_shard_size=None, metadata={})
        budget = Budget(1 << 30, 1, lambda: 0)
        plan = compile_plan(outputs, layouts, root=str(tmp_path), format="safetensors", budget=budget)
        peaks.append(plan.peak_memory)
    assert peaks[1] - peaks[0] == 1000 * HELD_COMPUTE


# The smallest budget -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reshard", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fuse", "transpose")), "cast"])
def test_a_refusal_names_the_number_that_does(process, convert, operation, name, tmp_path):
    source, options = operation(name)
    refused = process("convert", source, tmp_path / "refused", *options, "--max-memory", "1MB")
    assert refused.code == 2
    assert not refused.document
    assert refused.error.count("\n") == 1
    assert refused.error.startswith("streamconv: error: --max-memory 1 MB is too small")
    assert not (tmp_path / "refused").exists()
    needed = int(re.search(r"use --max-memory (\d+)MB", refused.error)[1])
    assert needed < (64 if name in COPIES else SMALLEST + 10)  # what one process may differ from the next is added
    convert(source, *options, max_memory=needed * MB)


# Any setting -------------------------------------------------------------------------------------------------------

BUDGETS = (64, 100, 1000)
GRID = [
    (name, workers, budget, backend)
    for (number, name), (k, budget) in itertools.product(enumerate(OPERATIONS), enumerate(BUDGETS))
    if (name in COPIES or budget >= 100) and (number % 2 == k % 2 or name == "reshard") and k < 2
    for workers, backend in [((1, 2, 8)[(number + k) % 3], ("auto", "mmap", "pread")[(number + 2 * k) % 3])]
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "workers", "budget", "backend"), GRID)
def test_no_run_exceeds_its_plan(convert, operation, name, workers, budget, backend):
    source, options = operation(name)
    convert(source, *options, "--workers", workers, "--read-backend", backend, max_memory=budget * MB)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_run_of_any_setting_exceeds_its_plan(convert, operation, name):
    source, options = operation(name)
    for workers, budget, backend in itertools.product((1, 2, 8), BUDGETS, ("auto", "mmap", "pread")):
        if name in COPIES or budget >= 100:
            convert(source, *options, "--workers", workers, "--read-backend", backend, "--verify", max_memory=budget * MB)


@pytest.mark.parametrize("budget", [64, pytest.param(120, marks=pytest.mark.slow), 300])
def test_comparing_keeps_to_the_budget(process, tmp_path, budget):
    write(tmp_path / "a", {"w": torch.zeros(1000, 1000), "v": torch.zeros(10, 10)})
    write(tmp_path / "b", {"w": torch.ones(1000, 1000), "v": torch.zeros(10, 10)})
    found = process("verify", tmp_path / "a", tmp_path / "b", "--max-memory", f"{budget}MB")
    assert found.code in {1, 2}
    assert found.peak <= budget * MB


@pytest.mark.parametrize("budget", [64, pytest.param(300, marks=pytest.mark.slow)])
def test_comparing_equal_checkpoints_keeps_to_the_budget(process, dense, fused, tmp_path, budget):
    found = process("verify", dense, dense, "--max-memory", f"{budget}MB")
    assert (found.code, found.document["equal"]) == (0, True)
    assert found.peak <= budget * MB


# Large shapes ------------------------------------------------------------------------------------------------------


def test_deepseek_v3_is_inspected_and_planned_in_300_mb(process, deepseek, tmp_path):
    found = process("inspect", deepseek)
    assert found.code == 0
    assert found.document["total_parameters"] == 684_531_386_000
    assert len(found.document["tensors"]) == 91_991
    assert found.peak <= 300 * MB
    found = process("plan", deepseek, tmp_path / "dst", "--max-memory", "300MB")
    assert found.code == 0
    assert sum(len(row["tensors"]) for row in found.document["outputs"]) == 91_991
    assert found.document["disk_needed"] < 2000 * MB
    assert found.peak <= 300 * MB
    assert not (tmp_path / "dst").exists()


@pytest.mark.slow
def test_deepseek_v3_plan_for_a_cast_in_500_mb(process, deepseek, tmp_path):
    found = process("plan", deepseek, tmp_path / "dst", "--dequantize", "--dtype", "float16", "--max-memory", "500MB")
    assert found.code == 0
    assert found.peak <= 500 * MB


def test_llama_3_70b_is_resharded_with_its_holes(process, tmp_path):
    source, dst = tmp_path / "src", tmp_path / "dst"
    made.make_checkpoint("llama-3-70b", source, sparse=True)
    found = process("convert", source, dst, "--max-shard-size", "3GB", "--max-memory", "64MB")
    assert found.code == 0
    assert found.document["bytes_written"] > 141_000 * MB
    assert found.document["peak_rss"] <= found.document["peak_memory"] <= 64 * MB
    files = sorted(dst.glob("*.safetensors"))
    assert len(files) > len(list(source.glob("*.safetensors")))
    blocks = sum(file.stat().st_blocks * 512 for file in files)
    assert blocks <= found.document["disk_needed"] + 4096 * len(files)
    assert found.document["disk_needed"] < 20 * MB
    assert made.check_stamps(dst) == []


# File descriptors --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """130 files of one tensor each."""
    return write(tmp_path_factory.mktemp("shards"), {f"t.{i}": torch.full((100, 100), float(i)) for i in range(130)}, shards=130)


@pytest.mark.parametrize(
    ("options", "files"),
    [
        (["--max-shard-size", "40KB", "-j", "4"], 130),
        pytest.param(["--single-file", "-j", "1", "--read-backend", "mmap"], 1, marks=pytest.mark.slow),
        (["--max-shard-size", "40KB", "--dtype", "float16", "-j", "4"], 65),
    ],
)
def test_64_open_files_are_enough(process, shards, tmp_path, options, files):
    found = process("convert", shards, tmp_path / "dst", *options, "--verify", files=64)
    assert found.code == 0, found.error
    assert len(list((tmp_path / "dst").glob("*.safetensors"))) == files


@pytest.mark.parametrize("workers", [pytest.param(16, marks=pytest.mark.slow), 64])
def test_64_open_files_are_enough_for_many_workers(process, shards, tmp_path, workers):
    found = process("convert", shards, tmp_path / "dst", "--max-shard-size", "40KB", "-j", workers, files=64)
    assert found.code == 0, found.error


@pytest.mark.slow
def test_64_open_files_are_enough_where_outputs_interleave(process, shards, recipes, tmp_path):
    """Every source tensor has a part in every output file."""
    recipe = tmp_path / "slices.yaml"
    recipe.write_text(json.dumps({"rules": [{"rule": "t.{i}", "right": "out.{j}", "layout": "i j c -> j i c"}]}))
    found = process("convert", shards, tmp_path / "dst", "--recipe", recipe, "--max-shard-size", "100KB", "-j", "2", files=64)
    assert found.code == 0, found.error
    assert len(list((tmp_path / "dst").glob("*.safetensors"))) == 100
