"""The tools for developers do what they say, since the other tests and the benchmarks believe them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tools import make_checkpoint as made
from tools import measure as measured


def contents(paths: list[Path]) -> dict[str, tuple[str, list[int], str]]:
    """Name -> dtype, shape, file, as the safetensors library reads them."""
    found = {}
    for path in paths:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                view = file.get_slice(name)
                found[name] = (view.get_dtype(), view.get_shape(), path.name)
    return found


@pytest.mark.parametrize("model", made.MODELS)
def test_sparse_checkpoint_of_each_model(model: str, tmp_path: Path) -> None:
    paths = made.make_checkpoint(model, tmp_path, layers=1, sparse=True, max_shard_size=500_000_000)
    config = json.loads((tmp_path / "config.json").read_text())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shapes = made.MODELS[model].shapes(config)
    found = contents(paths)
    assert {name: (kind, tuple(shape)) for name, (kind, shape, _) in found.items()} == {
        name: (made.DTYPES[dtype][0], shape) for name, (dtype, shape) in shapes.items()
    }
    assert index["weight_map"] == {name: file for name, (_, _, file) in found.items()}
    assert index["metadata"]["total_size"] == made.total_size(shapes)
    assert config["model_type"] == made.MODELS[model].config["model_type"]
    assert made.check_stamps(tmp_path) == []
    assert made.check_stamps(paths) == []
    assert sum(path.stat().st_blocks * 512 for path in paths) < 2_000_000


@pytest.mark.parametrize(
    ("model", "tensors", "parameters", "files"),
    [
        ("minilm", 104, 22_713_728, 1),
        ("llama-3-8b", 291, 8_030_261_248, 4),
        ("llama-3-70b", 723, 70_553_706_496, 30),
        ("mixtral-8x7b", 995, 46_702_792_704, 19),
        ("internvl3-8b", 781, 7_944_373_760, 4),
        ("internvl3-78b", 1_648, 78_408_318_336, 33),
        ("deepseek-v3", 91_991, 684_531_386_000, 163),
    ],
)
def test_full_size_is_the_published_one(model: str, tensors: int, parameters: int, files: int) -> None:
    known = made.MODELS[model]
    shapes = known.shapes(known.config)
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for _, shape in shapes.values()) == parameters
    assert len(made.split(shapes, made.parse_size(known.max_shard_size))) == files


def test_layers_of_deepseek() -> None:
    def layers(number: int) -> set[str]:
        known = made.MODELS["deepseek-v3"]
        return {name.split(".")[2] for name in known.shapes(made.with_layers(known.config, number)) if ".layers." in name}

    assert layers(3) == {"0", "1", "2"}
    assert layers(4) == {"0", "1", "2", "3", "4"}, "a layer with experts, and the one that predicts a token more"


@pytest.mark.parametrize("size", [1, 2_000_000_000, 8_000_000_000, 40_000_000_000])
def test_size_picks_the_nearest_number_of_layers(size: int) -> None:
    known = made.MODELS["llama-3-8b"]

    def total(layers: int) -> int:
        return made.total_size(known.shapes(made.with_layers(known.config, layers)))

    picked = made.with_size(known, known.config, size)["num_hidden_layers"]
    assert abs(total(picked) - size) == min(abs(total(layers) - size) for layers in range(1, 120))


def test_wrong_and_missing_stamps_are_found(tmp_path: Path) -> None:
    paths = made.make_checkpoint("minilm", tmp_path, layers=2, sparse=True, max_shard_size=10_000_000)
    assert len(paths) > 2
    shapes = made.MODELS["minilm"].shapes(json.loads((tmp_path / "config.json").read_text()))
    with paths[-1].open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    (name,) = made.check_stamps(tmp_path)
    assert name in made.split(shapes, 10_000_000)[-1]
    assert made.main(["--check", str(tmp_path)]) == 1
    os.truncate(paths[-1], paths[-1].stat().st_size - 8)
    assert made.check_stamps(tmp_path) == [name]
    gone = made.split(shapes, 10_000_000)[0]
    paths[0].unlink()
    assert made.check_stamps(tmp_path) == sorted([name, *gone])
    with pytest.raises(FileNotFoundError):
        made.check_stamps([])


def test_stamps_after_a_renaming(tmp_path: Path) -> None:
    shapes: made.Shapes = {"a.x": ("float32", (4, 4)), "a.tiny": ("float32", (3,)), "a.short": ("float32", (4,))}
    made.write_shard(tmp_path / "a.safetensors", shapes, sparse=True)
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data.replace(b'"a.', b'"b.'))
    assert made.check_stamps(tmp_path) == ["b.short", "b.x"]
    assert made.check_stamps(tmp_path, source_name=lambda name: "a" + name[1:]) == []


@pytest.mark.parametrize("dtype", made.FLOATS)
def test_dense_numbers_are_finite_and_differ(dtype: str, tmp_path: Path) -> None:
    paths = made.make_checkpoint("minilm", tmp_path, layers=1, dtype=dtype, one_tensor=20_000_000)
    seen = set()
    with safe_open(paths[0], framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name)
            if tensor.is_floating_point():
                assert tensor.dtype == getattr(torch, dtype)
                assert torch.isfinite(tensor).all()
                assert 0.001 < tensor.float().std() < 0.1
            seen.add(tensor.contiguous().view(torch.uint8).numpy().tobytes()[:64])
        assert len(seen) == len(list(file.keys()))
        assert abs(file.get_tensor("extra.weight").nbytes - 20_000_000) < 20_000


def test_dense_quantized_numbers_are_finite(tmp_path: Path) -> None:
    shapes: made.Shapes = {"w.weight": ("float8_e4m3fn", (3000, 3001)), "w.weight_scale_inv": ("float32", (24, 24))}
    made.write_shard(tmp_path / "w.safetensors", shapes)
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert torch.isfinite(file.get_tensor("w.weight").float()).all()
        assert (file.get_tensor("w.weight_scale_inv") > 0).all()


def test_dense_is_reproducible_and_seeded(tmp_path: Path) -> None:
    shapes: made.Shapes = {"w": ("bfloat16", (1000, 1000))}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made.write_shard(tmp_path / name, shapes, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_file_is_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    shapes: made.Shapes = {
        "b": ("bfloat16", (2, 3)),
        "é/a": ("float32", (5,)),
        "z": ("int64", ()),
        "f8": ("float8_e4m3fn", (7,)),
        "a": ("float32", (0, 4)),
        "h": ("float16", (1,)),
    }
    made.write_shard(tmp_path / "ours", shapes)
    with safe_open(tmp_path / "ours", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in shapes}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_make_checkpoint_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["minilm", str(tmp_path / "new"), "--size", "60MB", "--sparse"]
    assert made.main(arguments) == 0
    assert "1 files" in capsys.readouterr().out
    assert made.main(["--check", str(tmp_path / "new")]) == 0
    assert made.main(arguments) == 2, "the directory is no longer empty"
    assert made.main(["--check", str(tmp_path)]) == 2
    for wrong in (["minilm"], [], ["minilm", "x", "--layers", "0"], ["minilm", "x", "--size", "many"], ["minilm", "--check", "x"]):
        with pytest.raises(SystemExit, match="2"):
            made.main(wrong)


ALLOCATE = "import time; a = bytearray(b'x') * 50_000_000; time.sleep(1); raise SystemExit(7)"


def test_measure_sees_memory_time_and_exit_code() -> None:
    result = measured.measure([sys.executable, "-c", ALLOCATE])
    assert result.exit_code == 7
    assert 50_000_000 <= result.peak_anon <= result.peak_rss < 120_000_000
    assert result.peak_vmhwm >= 50_000_000
    assert result.maxrss >= 50_000_000
    assert result.peak_file > 0
    assert result.wall_seconds >= 1
    assert result.user_seconds >= 0
    assert len(result.samples) > 3
    assert result.cgroup is None


def test_measure_sees_children() -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ALLOCATE!r}])"
    result = measured.measure([sys.executable, "-c", parent])
    assert result.exit_code == 0
    assert result.processes == 2
    assert result.peak_anon >= 50_000_000


def test_measure_counts_written_bytes_and_signals(tmp_path: Path) -> None:
    size = 3_000_000
    code = f"import os; f = open({str(tmp_path / 'f')!r}, 'wb'); f.write(bytes({size})); f.flush(); os.kill(os.getpid(), 9)"
    probe = measured.measure([sys.executable, "-c", code])
    assert probe.exit_code == -9
    assert probe.write_bytes >= size or not on_disk(tmp_path)


def on_disk(path: Path) -> bool:
    """Whether the kernel counts writes to this directory: it does not for a tmpfs."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=False).stdout.strip()
    return kind.startswith(("ext", "xfs", "btrfs"))


def test_measure_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "took.json"
    assert measured.main(["--out", str(out), "--", sys.executable, "-c", "raise SystemExit(3)"]) == 3
    took = json.loads(out.read_text())
    assert took["exit_code"] == 3
    assert took["samples"] >= 1
    assert "exit code 3" in capfd.readouterr().err
    assert measured.main(["--", sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"]) == 143
    assert json.loads(capfd.readouterr().out)["exit_code"] == -15
    assert measured.main(["--", str(tmp_path / "no-such-command")]) == 2


def test_plot_without_matplotlib_is_refused_before_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured.importlib.util, "find_spec", lambda _name: None)
    assert measured.main(["--plot", str(tmp_path / "x.png"), "--", "touch", str(tmp_path / "ran")]) == 2
    assert "matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    samples = [measured.Sample(float(t), 3, 2, 1) for t in range(5)]
    result = measured.measure(["true"])
    measured.plot(measured.dataclasses.replace(result, samples=samples), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_cgroup_limits_memory() -> None:
    limit = 64 << 20
    try:
        fits = measured.measure([sys.executable, "-c", "a = bytearray(b'x') * 20_000_000"], cgroup=limit)
    except measured.NotPermittedError as error:
        pytest.skip(str(error))
    assert fits.exit_code == 0
    assert fits.cgroup is not None
    assert fits.cgroup.limit == limit
    assert fits.cgroup.oom_kills == 0
    assert fits.cgroup.peak is None or 20_000_000 < fits.cgroup.peak <= limit
    bursts = measured.measure([sys.executable, "-c", "a = bytearray(b'x') * 200_000_000"], cgroup=limit)
    assert bursts.exit_code == -9
    assert bursts.cgroup is not None
    assert bursts.cgroup.oom_kills == 1
    assert bursts.cgroup.limit_hits > 0


def test_cgroup_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(measured, "_places", lambda: iter([(1, tmp_path / "nowhere")]))
    assert measured.main(["--cgroup", "1GB", "--", "true"]) == 2
    assert "no memory cgroup" in capsys.readouterr().err
