"""What inspect and plan print, and the page of --report, opened in a browser where there is one."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import failure, numbered, refusal, run, write

import streamconv
from streamconv.diagnose import report

LAYERS = 6


def tensors() -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (50, 8)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.self_attn.{part}_proj.weight": (8, 8) for part in "qkv"}
        shapes |= {f"model.layers.{i}.norm.weight": (8,)}
    return numbered(shapes | {"model.norm.weight": (8,), "lm_head.weight": (50, 8)}, torch.bfloat16)


RECIPE = {
    "name": "toy",
    "summary": "fuses",
    "rules": [
        {
            "rule": "model.layers.{i}.self_attn.{q,k,v}_proj.weight",
            "right": "blocks.{i}.qkv.weight",
            "layout": "a c, b c, d c -> (a + b + d) c",
        },
        {"rule": "model.layers.{i}.norm.weight", "right": "blocks.{i}.norm.weight"},
        {"rule": "model.embed_tokens.weight", "right": "model.embed_tokens.weight"},
        {"rule": "model.norm.weight", "right": "norm.weight"},
        {"drop": "lm_head.weight", "reason": "not wanted"},
    ],
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "src", tensors(), shards=2, config={"hidden_size": 8})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(RECIPE))
    return path


def data_of(path: Path) -> dict:
    """What a page holds."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


# inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_is_a_tree_with_layers_folded(source, capsys):
    assert run("inspect", source) == 0
    out, _, suggested = capsys.readouterr().out.partition("you can:\n")
    assert suggested.count("streamconv convert ") == len(suggested.splitlines()) > 0
    lines = out.splitlines()
    assert any(line.endswith("  layers.[0-5].self_attn.q_proj.weight  bf16 [8, 8] x6") for line in lines)
    assert any(line.strip() == "800 B  embed_tokens.weight  bf16 [50, 8]" for line in lines)
    assert "lm_head  800 B  400 parameters" in lines
    total = sum(t.nbytes for t in tensors().values())
    assert f"{len(tensors())} tensors" in lines[-1]
    assert f"bfloat16 {report.format_size(total)}" in lines[-1]
    assert len(lines) == 10


def test_inspect_sums_modules(source, capsys):
    assert run("inspect", source) == 0
    module = capsys.readouterr().out.splitlines()[0]
    inside = [tensor for name, tensor in tensors().items() if name.startswith("model.")]
    assert module == f"model  {report.format_size(sum(t.nbytes for t in inside))}  {sum(t.numel() for t in inside):,} parameters"


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("model.layers.{i}.self_attn.{q,k}_proj.weight", 2 * LAYERS),
        ("*.norm.weight", LAYERS + 1),
        ("lm_head", 1),
        ("layers.[12].*", 0),
        ("*.[12].*", 8),
    ],
)
def test_inspect_of_some_tensors(source, capsys, pattern, count):
    if not count:
        assert f"no name of {len(tensors())} tensors" in refusal(capsys, "inspect", source, "--filter", pattern)
        return
    assert run("inspect", source, "--filter", pattern, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["tensors"]) == count
    assert found["total_size"] == sum(row["nbytes"] for row in found["tensors"])
    assert run("inspect", source, "--filter", pattern, "--all") == 0
    assert len(capsys.readouterr().out.splitlines()) == count + 1


def test_a_filter_that_nothing_matches_names_what_is_near(source, capsys):
    line = refusal(capsys, "inspect", source, "--filter", "lm_haed.weight")
    assert "lm_head.weight" in line


def test_statistics_are_those_of_torch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "PIECE", 64)
    values = {
        "a.0.w": torch.randn(33, 7),
        "a.1.w": torch.randn(33, 7) * 100,
        "half": torch.randn(50).half(),
        "f8": torch.randn(40).to(torch.float8_e4m3fn),
        "whole": torch.arange(-5, 90),
        "flags": torch.tensor([True, False, True]),
        "bad": torch.tensor([1.0, float("nan"), -3.0, float("inf")]),
        "worse": torch.tensor([float("nan")] * 3),
        "empty": torch.empty(0, 4),
        "complex": torch.ones(3, dtype=torch.complex64),
    }
    path = write(tmp_path / "src", values)
    assert run("inspect", path, "--stats", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["tensors"]}
    for name, tensor in values.items():
        row = rows[name]
        if name == "complex":
            assert "min" not in row
            continue
        wanted = tensor.double().flatten() if name != "f8" else tensor.float().double()
        finite = wanted[wanted.isfinite()]
        assert row["nonfinite"] == wanted.numel() - finite.numel()
        if not finite.numel():
            assert row["min"] is row["max"] is row["mean"] is row["norm"] is None
            continue
        assert (row["min"], row["max"]) == (finite.min(), finite.max())
        assert math.isclose(row["mean"], finite.mean(), rel_tol=1e-9, abs_tol=1e-12)
        assert math.isclose(row["norm"], finite.norm(), rel_tol=1e-9)
    assert run("inspect", path, "--stats") == 0
    out = capsys.readouterr().out
    both = torch.cat([values["a.0.w"], values["a.1.w"]]).double()
    assert f"min {both.min():.4g}  max {both.max():.4g}  mean {both.mean():.4g}  norm {both.norm():.4g}\n" in out
    assert "2 NaN or infinite" in out
    assert "3 values, none finite" in out
    assert run("inspect", path, "--stats", "--all") == 0
    assert f"mean {values['half'].double().mean():.4g}" in capsys.readouterr().out


# plan --------------------------------------------------------------------------------------------------------------


def test_a_plan_is_a_picture(source, recipe, tmp_path, capsys):
    assert run("plan", source, tmp_path / "dst", "--recipe", recipe, "--dtype", "fp32", "--keep-dtype", "norm.*") == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'dst'} (safetensors): 14 tensors, 2 files" in out
    assert "model-[00001-00002]-of-00002.safetensors x2" in out
    assert "peak memory at most" in out
    assert re.search(r"disk     \S+ \wB now, \S+ \wB afterwards", out)
    assert re.search(r"free     \S+ \wB now, \S+ \wB afterwards", out)
    fused = "".join(f"  model.layers.[0-5].self_attn.{part}_proj.weight\n" for part in "qkv")
    assert f"{fused}    [a c, b c, d c -> (a + b + d) c]\n    -> blocks.[0-5].qkv.weight  float32[24, 8]  x6\n" in out
    assert "  model.norm.weight -> norm.weight  bfloat16[8]\n" in out
    assert "  1 keep their names\n" in out
    assert "  dropped: lm_head.weight\n" in out
    assert "1 dropped (1 by 'lm_head.weight')" in out
    assert not (tmp_path / "dst").exists()


def test_a_folded_mapping_loses_no_tensor(source, recipe, tmp_path):
    plan = streamconv.plan(source, tmp_path / "dst", recipe=str(recipe), max_memory="4GB")
    members = [row for _, rows in plan.fold_mapping() for row in rows]
    assert sorted(members) == sorted(plan.mapping)
    assert streamconv.Plan.from_json(plan.to_json()).__str__() == str(plan)


# --report ----------------------------------------------------------------------------------------------------------


def test_a_page_of_a_conversion(source, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    page = tmp_path / "new" / "report.html"
    assert (
        run("convert", source, tmp_path / "dst", "--recipe", recipe, "--verify", "--report", page, "--quiet", "--max-shard-size", "1KB")
        == 0
    )
    text = page.read_text()
    assert str(tmp_path) not in text
    assert not re.search(r"(src|href)=\"?(https?:)?//|@import|url\(", text)
    found = data_of(page)
    assert (found["source"], found["target"], found["state"]) == ("~/src", "~/dst", "good")
    assert {row["target"]: (row["kind"], row["count"]) for row in found["mapping"]} == {
        "blocks.[0-5].qkv.weight": ("rearranged", LAYERS),
        "blocks.[0-5].norm.weight": ("renamed", LAYERS),
        "model.embed_tokens.weight": ("kept", 1),
        "norm.weight": ("renamed", 1),
    }
    assert found["dropped"] == ["lm_head.weight"]
    assert {row["state"] for row in found["checks"]} == {"equal"}
    assert sum(row["count"] for row in found["checks"]) == 14
    assert [phase["title"] for phase in found["phases"]] == ["converting", "verifying"]
    plan = streamconv.plan(source, tmp_path / "other", recipe=str(recipe), max_memory="4GB", max_shard_size="1KB")
    assert {(file["path"], file["size"]) for file in found["files"]} == {(file.path, file.size) for file in plan.files}
    for file in found["files"]:
        assert sum(part[3] for part in file["parts"]) == file["tensors"]
        assert sum(part[2] for part in file["parts"]) in (file["copied"] + file["computed"], 0)
    assert dict(found["settings"])["recipe"] == "~/toy.json"
    (group,) = found["groups"]
    assert (len(group["sources"]), group["target"], group["count"]) == (3, "blocks.0.qkv.weight", LAYERS)
    assert group["layout"] == "a c, b c, d c -> (a + b + d) c"
    spent = dict(found["times"])
    assert list(spent) == ["read", "compute", "write", "copy", "wait"]
    assert sum(spent.values()) > 0


def test_a_run_that_fails_has_a_page_of_how_far_it_came(tmp_path, capsys):
    write(tmp_path / "src", {"w": torch.full((64, 64), 1e30), "v": torch.ones(8)})
    page = tmp_path / "report.html"
    options = ["--dtype", "fp16", "--strict-values", "--report", page]
    assert "too large" in failure(capsys, 3, "convert", tmp_path / "src", tmp_path / "dst", *options)
    found = data_of(page)
    assert (found["state"], found["verdict"]) == ("bad", "failed")
    assert "too large" in found["failure"]
    assert found["phases"][0]["title"] == "converting"
    page.unlink()
    failure(capsys, 2, "convert", tmp_path / "src", tmp_path / "src", *options)
    assert not page.exists(), "nothing had begun"


def test_a_page_of_what_values_lost(tmp_path):
    tensors = {f"model.layers.{layer}.{part}.weight": torch.rand(4, 4) + layer for layer in range(3) for part in ("up", "down")}
    src = write(tmp_path / "src", {**tensors, "head.weight": torch.ones(2, 2)})
    page = tmp_path / "page.html"
    assert run("convert", src, tmp_path / "out", "--dtype", "bfloat16", "--losses", "--report", page, "--quiet", "--max-memory", "4GB") == 0
    losses = data_of(page)["losses"]
    assert {kind["kind"]: [layer for layer, _ in kind["points"]] for kind in losses["kinds"]} == {
        "model.layers.*.up.weight": [0, 1, 2],
        "model.layers.*.down.weight": [0, 1, 2],
    }
    assert all(0 < error < 0.01 for kind in losses["kinds"] for _, error in kind["points"])
    assert losses["lines"][0].startswith("6 tensors changed")
    assert run("convert", src, tmp_path / "again", "--report", page, "--quiet", "--max-memory", "4GB") == 0
    assert data_of(page)["losses"] == {"lines": [], "kinds": []}


def test_a_page_of_a_comparison(source, tmp_path):
    changed = tensors()
    changed["model.norm.weight"] += 1
    changed["extra"] = changed.pop("lm_head.weight")
    other = write(tmp_path / "other", changed)
    page = tmp_path / "report.html"
    assert run("verify", source, other, "--report", page, "--quiet") == 1
    found = data_of(page)
    assert (found["kind"], found["state"]) == ("Comparison", "bad")
    by_state = {state: [row for row in found["checks"] if row["state"] == state] for state in ("missing", "unexpected", "differs", "equal")}
    assert [row["name"] for row in by_state["missing"]] == ["lm_head.weight"]
    assert [row["name"] for row in by_state["unexpected"]] == ["extra"]
    assert [row["name"] for row in by_state["differs"]] == ["model.norm.weight"]
    assert by_state["differs"][0]["detail"].startswith("L2 ")
    assert sum(row["count"] for row in by_state["equal"]) == len(tensors()) - 2


def test_a_page_of_a_diff(source, tmp_path):
    changed = tensors()
    for i in range(LAYERS):
        changed[f"model.layers.{i}.self_attn.q_proj.weight"] *= 1 + i
    changed["extra"] = changed.pop("lm_head.weight")
    other = write(tmp_path / "other", changed, config={"hidden_size": 9})
    page = tmp_path / "report.html"
    assert run("diff", source, other, "--report", page, "--quiet") == 1
    found = data_of(page)
    assert (found["kind"], found["verdict"], found["notes"]) == ("Diff", "different", ["config.json: hidden_size: 8 -> 9"])
    (plot,) = found["losses"]["kinds"]
    assert plot["kind"] == "model.layers.*.self_attn.q_proj.weight"
    assert plot["points"] == [[i, pytest.approx(i, rel=1e-2)] for i in range(1, LAYERS)]
    rows = [(row["state"], row["name"]) for row in found["checks"]]
    assert ("moved", "lm_head.weight → extra") in rows
    assert rows[0] == ("changed", f"model.layers.{LAYERS - 1}.self_attn.q_proj.weight")


def test_a_page_with_a_reference(source, tmp_path):
    page = tmp_path / "report.html"
    assert run("convert", source, tmp_path / "dst", "--compare", source, "--report", page, "--quiet") == 0
    found = data_of(page)
    assert "equal to" in found["verdict"]
    assert sum(row["count"] for row in found["checks"]) == len(tensors())


def test_names_cannot_leave_the_page_s_data(tmp_path):
    name = '</script><img src=x onerror=alert(1)>"\\'
    source = write(tmp_path / "src", {name: torch.ones(2)})
    assert run("convert", source, tmp_path / "dst", "--report", tmp_path / "r.html", "--quiet") == 0
    assert "<img" not in (tmp_path / "r.html").read_text()
    assert data_of(tmp_path / "r.html")["mapping"][0]["target"] == name


@pytest.mark.parametrize("place", ["", "file/r.html"])
def test_a_page_that_cannot_be_written_is_refused_first(source, tmp_path, capsys, place):
    (tmp_path / "file").write_text("")
    assert "--report" in refusal(capsys, "convert", source, tmp_path / "dst", "--report", tmp_path / place)
    assert not (tmp_path / "dst").exists()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        try:
            path = shutil.which("chromium") or shutil.which("google-chrome")
            found = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error)[:100]}")
        yield found
        found.close()


def visit(browser, path: Path, scheme: str, width: int):
    """An open page, and what its console says; requests to anywhere else are counted there too."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    page.goto(path.as_uri())
    return page, said


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("dark", 380)])
def test_a_page_in_a_browser(browser, source, recipe, tmp_path, scheme, width):
    path = tmp_path / "report.html"
    assert run("convert", source, tmp_path / "dst", "--recipe", recipe, "--verify", "--report", path, "-q", "--max-shard-size", "1KB") == 0
    page, said = visit(browser, path, scheme, width)
    assert "converted and verified" in page.locator("#verdict").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#time svg path").count() == 4
    rows = page.locator("#mapping-list .row")
    assert rows.count() == 5
    assert "[object" not in page.locator("body").inner_text()
    assert page.locator("#spent rect").count() >= 1
    assert page.locator("#groups rect").count() == 5

    page.locator("#mapping-list input").fill("QKV blocks")
    assert rows.count() == 1
    rows.locator("summary").click()
    assert "a c, b c, d c -> (a + b + d) c" in rows.locator("pre").inner_text()
    for text, count in (("layers.4.self_attn.q_proj", 1), ("layers.9.self", 0), ("blocks.[0-5].qkv", 1), ("S.5.N bl", 1), ("(.*", 0)):
        page.locator("#mapping-list input").fill(text)
        assert rows.count() == count, text
    page.locator("#mapping-list input").fill("nothing of the kind")
    assert "Nothing matches" in page.locator("#mapping-list").inner_text()
    page.locator("#mapping-list input").fill("")
    page.locator("#mapping-list button", has_text="dropped").click()
    assert rows.count() == 1
    assert "lm_head.weight" in rows.inner_text()
    page.locator("#mapping-list button", has_text="dropped").click()
    assert rows.count() == 5

    page.locator("#shards .bar i").first.click()
    assert "model-00001" in page.locator(".readout").inner_text()
    page.locator("#time svg").first.hover()
    assert " at " in page.locator("#time h3 span").first.inner_text()
    assert page.locator("#check-list .row").count() == 4
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == before
    assert said == []


def test_a_page_of_a_diff_in_a_browser(browser, source, tmp_path):
    path = tmp_path / "report.html"
    other = write(tmp_path / "other", tensors() | {"model.norm.weight": torch.zeros(8)})
    assert run("diff", source, other, "--report", path, "-q") == 1
    page, said = visit(browser, path, "light", 800)
    assert "different" in page.locator("#verdict").inner_text()
    assert page.locator("#losses svg").count() == 1
    assert page.locator("#check-list .row").count() == 1
    assert said == []


def test_a_page_of_a_comparison_in_a_browser(browser, source, tmp_path):
    path = tmp_path / "report.html"
    assert run("verify", source, source, "--report", path, "-q") == 0
    page, said = visit(browser, path, "light", 800)
    assert "equal" in page.locator("#verdict").inner_text()
    page.locator("#check-list input").fill("q_proj")
    assert page.locator("#check-list .row").count() == 1
    assert said == []
