"""Files of mergekit: what they say, and how what is wrong with them is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkpoint_files import read, write
from merged_models import models, refused

from streamconv.merging.file import read as read_file
from streamconv.merging.parameters import Lookup

EXAMPLES = {
    "gradient-slerp": """
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 40]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 40]
# or, the equivalent models: syntax:
# models:
#   - model: psmathur/orca_mini_v3_13b
#   - model: garage-bAInd/Platypus2-13B
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
""",
    "linear": """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: 1.0
  - model: WizardLM/WizardLM-13B-V1.2
    parameters:
      weight: 0.3
  - model: garage-bAInd/Platypus2-13B
    parameters:
      weight: 0.5
merge_method: linear
dtype: float16
""",
    "orcamini-platy-44layer": """
slices:
  - sources:
    - model: psmathur/orca_mini_v3_13b
      layer_range: [0, 24]
  - sources:
    - model: garage-bAInd/Platypus2-13B
      layer_range: [20, 40]
merge_method: passthrough
dtype: float16
""",
    "ties": """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
}
"""Of mergekit's repository, examples/*.yml."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_mergekit(name: str, tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(EXAMPLES[name])
    file = read_file(path)
    assert file.dtype == "float16"
    models = {"gradient-slerp": 2, "linear": 3, "orcamini-platy-44layer": 2, "ties": 4}
    assert len(file.models) == models[name]
    if name == "ties":
        (part,) = file.slices
        lookup = Lookup(file, part, 0.5)
        assert lookup.number("density", "model.layers.1.mlp.x", part.inputs[0]) == 0.7
        assert lookup.number("weight", "model.layers.1.mlp.x", part.inputs[1]) == 0.5
        assert [lookup.number("weight", name, part.inputs[2]) for name in ("mlp", "norm")] == [0.5, 0]
        assert lookup.flag("normalize", "x", usual=False)
    if name == "gradient-slerp":
        lookup = Lookup(file, file.slices[0], 0.125)
        assert [lookup.number("t", name) for name in ("self_attn", "mlp", "norm")] == [0.25, 0.75, 0.5]
        assert file.slices[0].base == "psmathur/orca_mini_v3_13b"


def test_parameters_are_looked_for_further_out(tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(
        """
modules:
  default:
    slices:
      - sources: [{model: a, layer_range: [0, 2], parameters: {weight: [{filter: x, value: 1}], scale: []}}]
        parameters: {weight: [{filter: "*", value: "2e-1"}]}
        base_model: b
    parameters: {weight: 9, density: 3}
merge_method: passthrough
base_model: c
parameters: {density: 4, scale: 5}
"""
    )
    file = read_file(path)
    (part,) = file.slices
    lookup = Lookup(file, part, 0.0)
    assert part.base == "b"
    assert [lookup.number(name, "x", part.inputs[0]) for name in ("weight", "density", "scale", "t")] == [1, 3, 5, None]
    assert lookup.number("weight", "y", part.inputs[0]) == 0.2


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three models."""
    folder = tmp_path_factory.mktemp("three")
    models(folder, 3)
    return folder


LINEAR = "models: [{model: '{m0}', parameters: {weight: 1}}, {model: '{m1}', parameters: {weight: 1}}]\nmerge_method: linear\n"


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("text", "line"),
    [
        (LINEAR.replace("linear", "[1]"), r"FILE:2: merge_method: expected one of linear, .*, found a list"),
        (LINEAR.replace("linear", "magic"), r"FILE:2: merge_method magic is not supported: it is one of linear, slerp"),
        (LINEAR.replace("linear", "tties"), r"FILE:2: merge_method tties is not supported; did you mean ties\?"),
        ("models: [{model: '{m0}'}]\n", r"FILE:1: merge_method is missing"),
        (
            LINEAR + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
            "FILE:3: expected one of models and slices, found models and",
        ),
        ("merge_method: linear\n", "FILE:1: expected one of models and slices, found neither: name what is merged"),
        (LINEAR + "tokeniser_source: base\n", r"FILE:3: a merge has no key tokeniser_source; did you mean tokenizer_source\?"),
        (LINEAR + "tokenizer_source: union\n", "FILE:3: tokenizer_source: union is not supported"),
        (LINEAR + "chat_template: auto\n", "FILE:3: chat_template is not supported"),
        (LINEAR + "tokenizer: {source: base}\n", "FILE:3: tokenizer is not supported"),
        (LINEAR + "dtype: int8\n", "FILE:3: dtype int8: models are merged in float64"),
        (LINEAR + "dtype: float33\n", "FILE:3: dtype: unknown dtype 'float33'"),
        (LINEAR.replace("weight: 1}}]", "weight: much}}]"), "FILE:1: weight: 'much' is no number"),
        (LINEAR.replace("weight: 1}}]", "weight: [0.5, .inf]}}]"), "FILE:1: weight: inf is no number that float32 holds"),
        (LINEAR.replace("weight: 1}}]", "weight: [{value: 1}, 2]}}]"), "FILE:1: weight: expected a value, values, or a list of filter and"),
        (LINEAR.replace("weight: 1}}]", "weight: [{filter: x, value: 1}]}}]"), "FILE:1: linear: weight is missing for .* of FOLDER/m1"),
        (LINEAR.replace("weight: 1}}]", "weight: -1}}]"), "FILE:1: weights of .* add up to 0, by which nothing can be divided"),
        (LINEAR.replace("{m1}", "{m0}"), "FILE:1: FOLDER/m0 stands twice"),
        (LINEAR.replace("{m1}", "{m7}"), "FILE:1: FOLDER/m7: no such file or directory"),
        (LINEAR.replace("{m1}", "{m1}+{m7}"), "FILE:1: FOLDER/m7: no such file or directory"),
        (LINEAR.replace("linear", "ties"), "FILE:1: ties needs base_model"),
        (LINEAR.replace("linear", "passthrough"), "FILE:1: passthrough takes one model in each slice, found 2"),
        (
            LINEAR.replace("linear", "slerp") + "base_model: '{m2}'\n",
            "FILE:1: slerp goes between two models, one of them base_model, found 3",
        ),
        (LINEAR.replace("linear", "slerp") + "base_model: '{m0}'\n", "FILE:1: slerp: t is missing for "),
        (LINEAR + "parameters: {normalize: perhaps}\n", "FILE:3: normalize: 'perhaps' is neither true nor false"),
        (LINEAR + "  x: [\n", "FILE:3:4: cannot be parsed"),
        (LINEAR + "merge_method: ties\n", "FILE:3:1: 'merge_method' a second time"),
        ("- a\n", "FILE:1: expected a merge as keys and values, found a list"),
        ("", "FILE:1: expected a merge as keys and values, found nothing"),
    ],
)
def test_what_is_wrong_is_told_by_its_line(text: str, line: str, three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(three, text, capsys)
    assert re.search(line, said), said


SLICES = """
slices:
  - sources:
      - model: "{m0}"
        layer_range: [0, 2]
      - model: "{m1}"
        layer_range: [0, 3]
merge_method: linear
parameters: {weight: 1}
"""


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("", "", "FILE:6: layer_range has 3 layers, that of the slice's first source 2"),
        ("[0, 3]", "[2, 4]", "FILE:6: layer_range ends at 4, and FOLDER/m1 has 3 layers"),
        ("[0, 3]", "[2, 2]", r"FILE:7: layer_range \[2, 2\]: expected the first layer and the one after"),
        ("[0, 3]", "2", "FILE:7: layer_range 2: expected the first layer and the one after"),
        ("        layer_range: [0, 3]\n", "", "FILE:6: layer_range is missing"),
        ("3]\nmerge_method: linear", "2]\nmerge_method: ties\nbase_model: '{m2}'", "FILE:3: base_model FOLDER/m2 is none of the slice's"),
    ],
)
def test_slices_that_do_not_fit(old: str, new: str, line: str, three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(three, SLICES.replace(old, new) if old else SLICES, capsys)
    assert re.search(line, said), said


def test_models_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models(tmp_path, 2)
    tensors = read(tmp_path / "m1")
    write(tmp_path / "m1", tensors, config={"model_type": "llama"})
    assert "FILE:1: FOLDER/m1 is a model of type llama, FOLDER/m0 one of toy" in refused(tmp_path, LINEAR, capsys)
    write(tmp_path / "m1", tensors, config={"model_type": "toy", "quantization_config": {}})
    assert "FILE:1: FOLDER/m1 is quantized" in refused(tmp_path, LINEAR, capsys)
    alone = "slices: [{sources: [{model: '{m1}', layer_range: [0, 1]}]}]\nmerge_method: passthrough\n"
    assert "FILE:1: FOLDER/m1 is quantized" in refused(tmp_path, alone, capsys)
    write(tmp_path / "m1", {**tensors, "lm_head.weight": tensors["lm_head.weight"][:9]}, config={"model_type": "toy"})
    line = refused(tmp_path, LINEAR, capsys)
    assert "FILE:1: lm_head.weight is bfloat16[11, 6] in FOLDER/m0 and bfloat16[9, 6] in FOLDER/m1: rows are 11 and 9" in line
    assert "tokenizer_source: base" in line
    bias = {"model.layers.1.self_attn.q_proj.bias": tensors["model.norm.weight"]}
    write(tmp_path / "m1", {**tensors, **bias}, config={"model_type": "toy"})
    assert "FILE:1: FOLDER/m0 has no model.layers.1.self_attn.q_proj.bias, which others have" in refused(tmp_path, LINEAR, capsys)
