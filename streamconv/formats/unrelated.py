"""What in a checkpoint's folder is no part of the model that is converted, by its name: other forms of it, and what training left.

`KINDS` is the place to add to. What it does not know comes along with the model, and what a container calls its own is none of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from streamconv.formats.registry import containers

OTHER_WEIGHTS = ("*.onnx", "*.h5", "*.msgpack", "*.ot", "*.partial")  # beside those that containers call their own

KINDS = {  # patterns of names of files and, with a slash, of folders; capitals make no difference
    "training state": (
        "optimizer*.pt", "optimizer*.bin", "optimizer*.safetensors", "scheduler*.pt", "scheduler*.bin", "scaler*.pt", "rng_state*.pth",
        "random_states*.pkl", "sampler*.bin", "dl_state_dict*.bin", "custom_checkpoint_*.pkl", "training_args.bin", "trainer_state.json",
        "zero_to_fp32.py", "zero_to_torch.py", "*_optim_states.pt", "pytorch_model_fsdp*/", "optimizer_*/", "optim_world_size_*_rank_*.pt",
        "extra_state_world_size_*_rank_*.pt", "fsdp_config.json", "lora_train_meta.json", "latest_universal",
        "latest_checkpointed_iteration.txt", "common.pt", "iteration_*/",
    ),
    "other checkpoints": (
        "checkpoint-*/", "checkpoint_*/", "last-checkpoint/", "tmp-checkpoint-*/", "global_step*/", "step_*/", "step-*/", "epoch_*/",
        "epoch-*/", "iter_*/", "original/", "metal/",
    ),
    "logs": (
        "runs/", "logs/", "wandb/", "mlruns/", "tensorboard/", "tb_logs/", "lightning_logs/", "*.log", "events.out.tfevents.*", "nohup.out",
        "slurm-*.out",
    ),
    "ONNX": ("onnx/", "*.onnx", "*.onnx_data*", "*.onnx.data*", "onnx__*"),
    "OpenVINO": ("openvino/", "openvino_*.xml", "openvino_*.bin"),
    "GGUF": ("gguf/", "*.gguf", "ggml-*.bin", "*.ggml", "*.llamafile"),
    "CoreML": ("coreml/", "*.mlpackage/", "*.mlmodelc/", "*.mlmodel"),
    "TensorFlow, Keras, Flax or JAX": (
        "*.h5", "*.keras", "*.msgpack", "*.msgpack.index.json", "*.tflite", "saved_model/", "saved_model.pb", "tf_model*", "flax_model*",
        "*.ckpt.index", "*.ckpt.meta", "*.ckpt.data-*",
    ),
    "other formats": (
        "*.nemo", "*.ot", "*.engine", "*.plan", "*.trt", "*.pte", "*.ptl", "*.mnn", "*.pdparams", "*.pdmodel", "*.pdiparams", "*.rknn",
        "*.dlc", "*.litertlm", "*.task",
    ),
}  # fmt: skip
UNSAID = {  # the same, of what nobody misses
    "hidden": (".*", ".*/"),
    "what Python left": ("__pycache__/", "*.pyc"),
    "what streamconv wrote of another set of files": ("*.streamconv.json", "*.streamconv.json.new", "sha256sums"),
}

TOKENIZERS = (
    "tokenizer.json", "*.model", "*.tiktoken", "*.spm", "vocab.*", "merges.txt", "tekken.json", "added_tokens.json", "spiece.*",
    "source.spm", "target.spm", "dict.txt", "*.vocab",
)  # fmt: skip
MEDIA = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.mp4", "*.wav", "*.mp3", "*.flac", "*.ogg", "*.pdf")


def is_weights(name: str) -> bool:
    """Whether a file of this name holds tensors, or says where they are, in any container."""
    return _fits(name, (*OTHER_WEIGHTS, *_of_containers()))


def kind_of(name: str, *, folder: bool = False) -> str:
    """Of which kind of `KINDS` or `UNSAID` a file or folder is; "" for what comes along."""
    text, own = f"{name}/" if folder else name, _of_containers()
    for kind, patterns in (KINDS | UNSAID).items():
        if _fits(text, [pattern for pattern in patterns if pattern not in own]):
            return kind
    return ""


def is_known(name: str) -> bool:
    """Whether a large file of this name is what one expects beside weights."""
    return _fits(name, TOKENIZERS) or _fits(name, MEDIA)


def _of_containers() -> set[str]:
    return set().union(*(container.names.globs for container in containers().values()))


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
