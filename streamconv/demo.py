"""The demo: builds a small InternVL-shaped checkpoint, converts it to InternVL's own layout and back, and verifies both."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streamconv.conversion import api
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import UsageError
from streamconv.formats import safetensors
from streamconv.interrupts import Unwinding
from streamconv.running.directory import Directory
from streamconv.running.output import check_free
from streamconv.storage import is_url
from streamconv.units import format_size

HIDDEN, HEADS, LAYERS, TEXT_HIDDEN, VOCAB = 512, 8, 8, 1024, 16000
CONFIG = {
    "model_type": "internvl",
    "architectures": ["InternVLForConditionalGeneration"],
    "dtype": "bfloat16",
    "text_config": {"model_type": "qwen2", "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_size": TEXT_HIDDEN},
    "vision_config": {"model_type": "internvl_vision", "num_attention_heads": HEADS, "hidden_size": HIDDEN},
}


def demo_specs() -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of the demo's checkpoint: a vision tower, a projector and a text model, about 340 MB."""
    shapes: dict[str, tuple[int, ...]] = {
        "vision_tower.embeddings.cls_token": (1, 1, HIDDEN),
        "vision_tower.embeddings.position_embeddings": (1, 257, HIDDEN),
        "vision_tower.embeddings.patch_embeddings.projection.weight": (HIDDEN, 3, 14, 14),
        "vision_tower.embeddings.patch_embeddings.projection.bias": (HIDDEN,),
    }
    for i in range(LAYERS):
        layer = f"vision_tower.encoder.layer.{i}"
        for name in ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.projection_layer"):
            shapes |= {f"{layer}.{name}.weight": (HIDDEN, HIDDEN), f"{layer}.{name}.bias": (HIDDEN,)}
        for name, shape in (("fc1", (4 * HIDDEN, HIDDEN)), ("fc2", (HIDDEN, 4 * HIDDEN))):
            shapes |= {f"{layer}.mlp.{name}.weight": shape, f"{layer}.mlp.{name}.bias": shape[:1]}
        for name in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{layer}.{name}.weight": (HIDDEN,), f"{layer}.{name}.bias": (HIDDEN,)}
        shapes |= {f"{layer}.lambda_1": (HIDDEN,), f"{layer}.lambda_2": (HIDDEN,)}
    projector: dict[str, tuple[int, ...]] = {"layer_norm": (4 * HIDDEN,)}
    projector |= {"linear_1": (TEXT_HIDDEN, 4 * HIDDEN), "linear_2": (TEXT_HIDDEN, TEXT_HIDDEN)}
    for name, size in projector.items():
        shapes |= {f"multi_modal_projector.{name}.weight": size, f"multi_modal_projector.{name}.bias": size[:1]}
    text: dict[str, tuple[int, ...]] = {"self_attn.q_proj": (TEXT_HIDDEN, TEXT_HIDDEN), "self_attn.k_proj": (TEXT_HIDDEN // 4, TEXT_HIDDEN)}
    text |= {"self_attn.v_proj": (TEXT_HIDDEN // 4, TEXT_HIDDEN), "self_attn.o_proj": (TEXT_HIDDEN, TEXT_HIDDEN)}
    text |= {"mlp.gate_proj": (4 * TEXT_HIDDEN, TEXT_HIDDEN), "mlp.up_proj": (4 * TEXT_HIDDEN, TEXT_HIDDEN)}
    text |= {"mlp.down_proj": (TEXT_HIDDEN, 4 * TEXT_HIDDEN)}
    for i in range(LAYERS):
        shapes |= {f"language_model.model.layers.{i}.{name}.weight": shape for name, shape in text.items()}
        shapes |= {
            f"language_model.model.layers.{i}.{name}.weight": (TEXT_HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    shapes |= {"language_model.model.norm.weight": (TEXT_HIDDEN,)}
    shapes |= {f"language_model.{name}.weight": (VOCAB, TEXT_HIDDEN) for name in ("model.embed_tokens", "lm_head")}
    return {name: TensorSpec(DTYPES["bfloat16"], shape) for name, shape in shapes.items()}


def build(folder: Path, *, max_shard_size: int = 100_000_000, seed: int = 0) -> None:
    """Writes the demo's checkpoint, with pseudo-random weights, shard by shard and a megabyte at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)  # noqa: S311 - weights, not secrets
    for layout in safetensors.lay_out(demo_specs(), metadata={"format": "pt"}, max_shard_size=max_shard_size):
        with (folder / layout.path).open("wb") as file:
            for offset, data in layout.literals:
                file.seek(offset)
                file.write(data)
            while (missing := layout.size - file.tell()) > 0:
                # High bytes between 0x38 and 0x3b: finite bfloat16 values of a weight's size.
                low, high = generator.randbytes(1 << 19), bytes(b & 0x83 | 0x38 for b in generator.randbytes(1 << 12)) * 128
                block = bytearray(1 << 20)
                block[0::2], block[1::2] = low, high
                file.write(block[:missing])
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


@contextmanager
def _place(directory: str | None) -> Iterator[Path]:
    if directory is not None:
        if is_url(directory):
            raise UsageError(f"{directory}: the demo is made on this machine: give a path")
        yield Path(directory)
        return
    with Unwinding(), tempfile.TemporaryDirectory(prefix="streamconv-demo-") as temporary:
        yield Path(temporary)


def run(directory: str | None = None, *, max_memory: str = "300MB", progress: bool = False) -> dict[str, Any]:
    """Runs the demo in ``directory`` (kept) or in a temporary one (removed); returns its figures.

    Raises:
        StreamconvError: a step failed, or ``directory`` has something in it.
    """
    with _place(directory) as place:
        source, custom, back = (place / name for name in ("hf", "custom", "back"))
        check_free(Directory(source))
        build(source)
        steps = [
            ("hf -> custom", api.convert(source, custom, recipe="internvl-hf2custom", max_memory=max_memory, progress=progress)),
            ("custom -> hf", api.convert(custom, back, recipe="internvl-custom2hf", max_memory=max_memory, progress=progress)),
        ]
        same = api.verify(source, back, max_memory=max_memory)
        rows = [
            {"step": name, "seconds": result.seconds, "peak_rss": result.peak_rss, **asdict(result.plan.totals)} for name, result in steps
        ]
        return {"place": str(place), "steps": rows, "compared": same.compared, "equal": same.equal, "l2": same.l2}


def describe(figures: dict[str, Any]) -> str:
    """The demo's figures in words."""
    lines = [
        f"{row['step']}: {format_size(row['bytes_written'])} in {row['seconds']:.2f} s "
        f"({format_size(row['bytes_written'] / max(row['seconds'], 1e-9))}/s), peak memory {format_size(row['peak_rss'])}"
        for row in figures["steps"]
    ]
    verdict = "equal, byte for byte" if figures["equal"] else f"DIFFERENT, L2 distance {figures['l2']:.6f}"
    return "\n".join([*lines, f"there and back again: {figures['compared']} tensors, {verdict}"])
