"""A quantization that this module alone defines, int8 with a scale for each row: written, read, resumed, verified, told and refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from checkpoint_files import ROOMY, assert_same, random_tensor, read, refusal, run, write

import streamconv
from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.errors import CoverageError, UsageError
from streamconv.graph.node import apply
from streamconv.graph.ops import Blocks, Elementwise, Reduce, as_torch
from streamconv.library.bridge import conclude
from streamconv.planning.plan import Plan
from streamconv.recipe import Recipe
from streamconv.schemes.registry import register
from streamconv.schemes.scheme import Group, Match, Scheme

SCALE = "_row_scale"


@dataclass(frozen=True)
class Decode(Elementwise):
    """Codes times the scale of their row."""

    kind: ClassVar[str] = "decode-of-a-test"

    shape: tuple[int, int]
    dtype: str

    @property
    def rows(self):
        return Blocks(self.shape, (1, self.shape[1]))

    def infer(self, inputs):
        if inputs[0].shape != self.shape or inputs[1].shape != self.shape[:1]:
            raise CoverageError(f"{inputs[0]} takes a scale for each row, found {inputs[1]}")
        return TensorSpec(DTYPES[self.dtype], self.shape)

    def needs(self, region, inputs):  # noqa: ARG002
        return [region, self.rows.around(region)]

    def reach(self, numel, inputs):
        return [numel, inputs[1].numel]

    def scratch(self, inputs):  # noqa: ARG002
        return 1 << 26  # what torch takes for a tile, which the test keeps small

    def values(self, region, parts, out):
        given, stored = (part.torch() for part in parts)
        scales = torch.empty(region.sizes)
        for move in self.rows.spread(region):
            here = stored.as_strided(move.sizes, move.src_strides, move.src)
            scales.as_strided(move.sizes, move.dst_strides, move.dst).copy_(here)
        out.torch().copy_(self.apply(given.float(), scales))
        return 0

    def apply(self, values, scales):
        return values * scales


@dataclass(frozen=True)
class Encode(Decode):
    """The way back, rounded."""

    kind: ClassVar[str] = "encode-of-a-test"

    def apply(self, values, scales):
        return (values / scales).round_().clamp_(-127, 127)


@dataclass(frozen=True)
class RowScales(Reduce):
    """The largest magnitude of each row, over 127."""

    kind: ClassVar[str] = "row-scales-of-a-test"

    def infer(self, inputs):
        return TensorSpec(DTYPES["float32"], inputs[0].shape[:1])

    def buffers(self, inputs):
        rows, columns = inputs[0].shape
        return [(columns, inputs[0].dtype.itemsize), (rows, 4)]

    def reduce(self, inputs, fetch, buffers):
        row, scales = (as_torch(buffer, spec) for buffer, spec in zip(buffers, (inputs[0].dtype, DTYPES["float32"]), strict=True))
        for k in range(len(scales)):
            fetch(0, k * len(row), buffers[0])
            scales[k] = row.float().abs().max() / 127


@dataclass(frozen=True)
class Int8(Group):
    def decode(self, nodes, dtype):
        codes, scales = (nodes[name] for name in self.tensors)
        return apply(Decode(codes.spec.shape, dtype), codes, scales)


class Int8Rows(Scheme):
    methods = ("int8-of-a-test",)

    def match(self, config, specs, title):  # noqa: ARG002
        groups = []
        for name, spec in specs.items():
            if spec.dtype.name == "int8":
                if name + SCALE not in specs:
                    raise CoverageError(f"{title}: {name} is {spec}, and there is no {name}{SCALE}: mend the source")
                groups.append(Int8(name, (name, name + SCALE)))
        return Match(groups, {name: "of activations" for name in specs if name.endswith("input_scale")})

    def encode(self, name, node):
        if len(node.spec.shape) != 2 or node.spec.dtype.name not in CASTABLE:
            return {}
        scales = apply(RowScales(), node)
        return {name: apply(Encode(node.spec.shape, "int8"), node, scales), name + SCALE: scales}


SCHEME = Int8Rows()
register(SCHEME)


@dataclass(frozen=True)
class Quantize(Recipe):
    """All matrices as the scheme has them."""

    def make(self, nodes, rows, scope, values, recast):  # noqa: ARG002
        encoded = {}
        for name, node in nodes.items():
            encoded |= SCHEME.encode(name, node) or {name: node}
        return conclude(nodes, rows, encoded, {}, recast)


CONFIG = {"dtype": "float32", "quantization_config": {"quant_method": "int8-of-a-test"}, "hidden_size": 70}
W, NORM = "layers.{}.w", "norm"


@pytest.fixture
def quantized(tmp_path):
    """A checkpoint that the scheme has made of a floating one."""
    values = {NORM: torch.ones(70), **{W.format(k): random_tensor(300, 70, seed=k) for k in (0, 1)}}
    src = write(tmp_path / "floating", values)
    streamconv.convert(src, tmp_path / "x", recipe=Quantize("quantize-hf2own", "", ()), max_memory=ROOMY, verify=True)
    (tmp_path / "x" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "x"


def numbers(src, dtype=torch.float32):
    stored = read(src)
    decoded = {W.format(k): (stored[W.format(k)].float() * stored[W.format(k) + SCALE][:, None]).to(dtype) for k in (0, 1)}
    return {NORM: stored[NORM], **decoded}


def test_what_it_writes_is_what_its_words_say(quantized, tmp_path):
    stored, floating = read(quantized), read(tmp_path / "floating")
    for name in (W.format(0), W.format(1)):
        scales = floating[name].abs().amax(1) / 127
        assert torch.equal(stored[name + SCALE], scales)
        assert torch.equal(stored[name], (floating[name] / scales[:, None]).round().to(torch.int8))
    assert torch.equal(stored[NORM], floating[NORM])


def test_it_is_planned_converted_resumed_and_verified(quantized, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("streamconv.planning.fitting.TILE", 1 << 12)
    plan = streamconv.plan(quantized, out, dequantize=True, max_memory=ROOMY)
    assert Plan.from_json(plan.to_json()).digest() == plan.digest()
    calls, own = [], Decode.apply

    def stop(self, codes, scales):
        calls.append(codes)
        if len(calls) == 5:
            raise OSError("the disk is gone")
        return own(self, codes, scales)

    monkeypatch.setattr(Decode, "apply", stop)
    with pytest.raises(streamconv.StreamconvError, match="the disk is gone"):
        streamconv.convert(quantized, out, dequantize=True, max_memory=ROOMY, workers=1)
    monkeypatch.setattr(Decode, "apply", own)
    assert run("convert", quantized, out, "--dequantize", "--resume", "--verify", "--quiet") == 0
    assert_same(read(out), numbers(quantized))
    assert json.loads((out / "config.json").read_text()) == {"dtype": "float32", "hidden_size": 70}
    assert run("verify", quantized, out, "--dequantize", "--quiet") == 0
    assert run("convert", quantized, tmp_path / "half", "--dequantize", "--dtype", "bf16", "--keep-dtype", NORM, "--quiet") == 0
    assert_same(read(tmp_path / "half"), numbers(quantized, torch.bfloat16))


def test_casts_and_messages_know_it(quantized, tmp_path, capsys):
    line = refusal(capsys, "convert", quantized, tmp_path / "out", "--dtype", "bf16")
    assert "quantized by int8-of-a-test (by config.json)" in line
    assert "--dequantize --dtype bf16" in line
    others = {name: tensor for name, tensor in read(quantized).items() if name != W.format(0) + SCALE}
    broken = write(tmp_path / "broken", others, config=CONFIG)
    assert f"there is no {W.format(0)}{SCALE}" in refusal(capsys, "plan", broken, tmp_path / "out", "--dequantize")
    unknown = write(tmp_path / "unknown", others, config={"quantization_config": {"quant_method": "hqq"}})
    assert "int8-of-a-test" in refusal(capsys, "plan", unknown, tmp_path / "out", "--dequantize")
    with pytest.raises(UsageError, match="there is a quantization by int8-of-a-test already"):
        register(Int8Rows())
