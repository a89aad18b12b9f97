"""The comparison itself: that the other tools do the same work, and that its figures are what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streamconv
from benchmarks import compare
from benchmarks.competitors import consolidate, equal, hub_save, load_save

CONFIG = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SHARD = 60_000


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small layers in two files."""
    folder = tmp_path_factory.mktemp("llama") / "source"
    folder.mkdir()
    shapes = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
    state = {"model.embed_tokens.weight": (100, 64), "model.norm.weight": (64,), "lm_head.weight": (100, 64)}
    for i in range(2):
        layer = f"model.layers.{i}"
        state |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in shapes.items()}
        state |= {
            f"{layer}.mlp.gate_proj.weight": (96, 64),
            f"{layer}.mlp.up_proj.weight": (96, 64),
            f"{layer}.mlp.down_proj.weight": (64, 96),
        }
        state |= {f"{layer}.{name}_layernorm.weight": (64,) for name in ("input", "post_attention")}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in state.items()}
    names = sorted(tensors)
    files = {f"model-0000{k + 1}-of-00002.safetensors": names[k::2] for k in range(2)}
    for file, mine in files.items():
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, mine in files.items() for name in mine}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def is_as_converted(source: Path, found: Path, **settings: Any) -> bool:
    return streamconv.verify(source, found, max_memory="8GB", **settings).equal


@pytest.mark.parametrize("change", compare.LAYOUTS)
def test_layouts_are_the_same_work(change: str, llama: Path, tmp_path: Path) -> None:
    load_save.main([str(llama), str(tmp_path / "made"), "--shard-size", str(SHARD), "--change", change])
    assert is_as_converted(llama, tmp_path / "made", recipe=compare.RECIPES["llama"][change])


@pytest.mark.parametrize("tool", [load_save, hub_save])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_shards_and_casts_are_the_same_work(tool: Any, dtype: str | None, llama: Path, tmp_path: Path) -> None:
    tool.main([str(llama), str(tmp_path / "made"), "--shard-size", str(SHARD), *(["--dtype", dtype] if dtype else [])])
    assert is_as_converted(llama, tmp_path / "made", dtype=dtype)
    streamconv.convert(llama, tmp_path / "mine", dtype=dtype, max_shard_size=SHARD, max_memory="8GB")
    assert len(list((tmp_path / "made").glob("*.safetensors"))) == len(list((tmp_path / "mine").glob("*.safetensors"))) > 1


def test_consolidation_is_the_same_work(llama: Path, tmp_path: Path) -> None:
    consolidate.main([str(llama), str(tmp_path / "ranks"), "--prepare"])
    consolidate.main([str(tmp_path / "ranks"), str(tmp_path / "made"), "--shard-size", str(SHARD)])
    assert is_as_converted(llama, tmp_path / "made")


def test_equal_is_the_same_work(llama: Path, tmp_path: Path) -> None:
    load_save.main([str(llama), str(tmp_path / "made"), "--shard-size", str(SHARD)])
    assert equal.main([str(llama), str(tmp_path / "made")]) == 0
    load_save.main([str(llama), str(tmp_path / "other"), "--change", "rotary"])
    assert equal.main([str(llama), str(tmp_path / "other")]) == 1


def run(seconds: float, **figures: Any) -> dict[str, Any]:
    zeros = dict.fromkeys(("peak_rss", "peak_anon", "peak_file", "peak_vmhwm", "read_bytes", "write_bytes"), 0)
    return {"seconds": seconds, "caches": "all", "cgroup": None, **zeros, **figures}


def operation(name: str, source: int, output: int, **tools: list[dict[str, Any]]) -> dict[str, Any]:
    entries = [{"name": tool, "label": tool, "runs": runs, "curve": [], "skipped": None} for tool, runs in tools.items()]
    return {"name": name, "title": name, "source_bytes": source, "output_bytes": output, "tools": entries}


@pytest.mark.parametrize(
    ("name", "output", "share"), [("reshard", 100, 1.0), ("to-fp32", 200, 1.5), ("to-bf16", 50, 0.75), ("verify", 0, 1.0)]
)
def test_times_are_relative_to_copying_as_many_bytes(name: str, output: int, share: float) -> None:
    found = compare.figures(operation(name, 100, output, cp=[run(3), run(2), run(4)], streamconv=[run(9), run(5), run(6)]))
    assert found["cp"].ratio == 1
    mine = found["streamconv"]
    assert (mine.median, mine.fastest, mine.slowest) == (6, 5, 9)
    assert mine.ratio == pytest.approx(2 / share)


def test_goals() -> None:
    mine = run(1.4, peak_rss=10, peak_vmhwm=11, read_bytes=104, write_bytes=106)
    resharding = operation("reshard", 100, 100, cp=[run(2)], streamconv=[mine], transformers=[run(2), run(2.2)], mergekit=[run(9)])
    resharding["tools"][2]["runs"][1]["peak_rss"] = 230
    grouped = operation("cgroup", 100, 100, streamconv=[run(1)])
    grouped["tools"].append({**grouped["tools"][0], "name": "streamconv-cgroup", "runs": [run(1.2)]})
    found = {goal.text: (pytest.approx(goal.value), goal.holds) for goal in compare.goals({"operations": [resharding, grouped]})}
    assert found == {
        "reshard: time / cp": (0.7, True),
        "reshard: bytes read / input": (1.04, True),
        "reshard: bytes written / output": (1.06, False),
        "reshard: time of mergekit / streamconv": (9 / 1.4, True),
        "reshard: time of transformers / streamconv": (1.5, True),
        "reshard: peak memory of transformers / streamconv": (230 / 11, True),
        "cgroup: bytes read / input": (0, True),
        "cgroup: bytes written / output": (0, True),
        "cgroup: time inside the cgroup / outside": (1.2, False),
    }


def test_goals_of_shared_blocks() -> None:
    sharing = operation(
        "reflink-xfs", 100, 100, cp=[run(2)], streamconv=[run(0.2, new_bytes=3), run(0.4, new_bytes=20), run(0.5, new_bytes=12)]
    )
    found = {goal.text: (pytest.approx(goal.value), goal.holds) for goal in compare.goals({"operations": [sharing]})}
    assert found["reflink-xfs: time / cp"] == (0.2, False)
    assert found["reflink-xfs: new blocks / output"] == (0.12, False)
    sharing["tools"][1]["runs"] = [run(0.3, new_bytes=9)]
    assert all(goal.holds for goal in compare.goals({"operations": [sharing]}))


@pytest.mark.parametrize("name", [pytest.param("reflink-xfs", marks=pytest.mark.slow), "reflink-btrfs"])
def test_a_comparison_on_a_file_system_that_shares_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    given = ["--model", "minilm", "--size", "90MB", "--repeat", "1", "--cold", "data", "--interval", "0.02", "--check"]
    out = tmp_path / "out"
    assert (
        compare.main(
            [*given, "--operations", name, "--tools", "cp,streamconv,safetensors", "--work", str(tmp_path / "work"), "--out", str(out)]
        )
        == 0
    )
    assert not (tmp_path / "work").exists()
    (sharing,) = json.loads((out / "results.json").read_text())["operations"] or [None]
    if sharing is None:
        pytest.skip(capsys.readouterr().err.splitlines()[-1])
    copied, mine = (tool["runs"] for tool in sharing["tools"])
    assert [row["check"] for row in mine] == ["equal"]
    assert copied[0]["new_bytes"] > 0.9 * sharing["source_bytes"] > mine[0]["new_bytes"]
    assert "--reflink=never" in sharing["tools"][0]["label"]


def test_an_image_that_cannot_be_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare.os, "geteuid", lambda: 0)
    for make, said in ((["no-such-mkfs"], "not installed"), (["false"], "fails here"), (["true"], "fails here")):
        with pytest.raises(compare.NotRunError, match=said), compare.mounted(make, tmp_path / "image", 1 << 20):
            pass
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_comparison_in_a_cgroup(tmp_path: Path) -> None:
    given = ["--model", "minilm", "--size", "90MB", "--repeat", "1", "--cold", "none", "--interval", "0.02"]
    out = tmp_path / "out"
    chosen = ["--operations", "cgroup", "--tools", "cp,streamconv"]
    assert compare.main([*given, *chosen, "--work", str(tmp_path / "work"), "--out", str(out)]) == 0
    (grouped,) = json.loads((out / "results.json").read_text())["operations"]
    assert grouped["title"].endswith("5 rounds")
    outside, inside = grouped["tools"]
    assert len(outside["runs"]) == 5
    if inside["skipped"]:
        pytest.skip(inside["skipped"])
    assert [row["cgroup"]["oom_kills"] for row in inside["runs"]] == [0] * 5


def test_a_comparison_with_a_tool_of_another_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compare.MODELS["llama-3-8b"]
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 64}
    monkeypatch.setitem(compare.MODELS, "llama-3-8b", replace(model, config=model.config | sizes))
    given = ["--size", "9MB", "--repeat", "1", "--cold", "none", "--interval", "0.02", "--mindspore-python", "false", "--check"]
    chosen = ["--operations", compare.MINDSPORE, "--tools", "streamconv,safetensors,mindformers"]
    assert compare.main([*given, *chosen, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]) == 0
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text())["operations"]
    mine, other = found["tools"]
    assert (mine["name"], [row["check"] for row in mine["runs"]]) == ("streamconv", ["equal"])
    assert (other["name"], other["runs"]) == ("mindformers", [])
    assert "--mindspore-python" in other["skipped"]


def test_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", "minilm", "--size", "90MB", "--repeat", "1", "--shard-size", "20MB", "--cold", "none", "--interval", "0.02"]
    chosen = ["--operations", "reshard,fuse,verify", "--tools", "cp,streamconv,mergekit", "--mergekit-python", "false", "--check"]
    out = tmp_path / "out"
    assert compare.main([*given, *chosen, "--work", str(tmp_path / "work"), "--out", str(out)]) == 0
    assert not (tmp_path / "work").exists()
    printed, said = capsys.readouterr()
    assert "there is no recipe for minilm" in said
    results = json.loads((out / "results.json").read_text())
    assert str(tmp_path) not in json.dumps(results)
    resharding, verifying = results["operations"]
    assert [tool["name"] for tool in resharding["tools"]] == ["cp", "streamconv", "mergekit"]
    assert [[row["check"] for row in tool["runs"]] for tool in resharding["tools"]] == [["equal"], ["equal"], []]
    assert "mergekit not installed" in resharding["tools"][2]["skipped"]
    assert [tool["name"] for tool in verifying["tools"]] == ["cp", "streamconv"]
    mine = compare.figures(resharding)["streamconv"]
    assert 0 < mine.anon < mine.rss
    if compare.figures(resharding)["cp"].written:  # the kernel does not count what is written to memory
        assert resharding["output_bytes"] <= mine.written < resharding["output_bytes"] * 1.05
    assert (out / "table.md").read_text() == printed.removesuffix("\n")
    assert "| **streamconv** |" in printed
    assert compare.main(["--render", str(out / "results.json"), "--out", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out == printed
    assert {path.name for path in (tmp_path / "again").iterdir()} <= {"table.md", "time.png", "memory.png"}
