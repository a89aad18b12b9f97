"""Files of other programs: what they are called, and the command that makes of one a file that is read."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass

from streamconv.errors import FormatError
from streamconv.formats.files import show
from streamconv.formats.registry import containers
from streamconv.storage.folder import Location

_SAVE = "from safetensors.numpy import save_file; "
_IS_ARRAY = 'getattr(getattr(v, "dtype", None), "kind", "") in set("fiub")'
_TENSORFLOW_PART = re.compile(r"\.(index|data-\d{5}-of-\d{5})$")


@dataclass(frozen=True, slots=True)
class _Script:
    """Code for ``python -c`` in which OLD and NEW stand for the two files, the packages it needs, and how NEW ends."""

    code: str
    packages: str = "safetensors"
    suffix: str = ".safetensors"


_SCRIPTS = {
    "hdf5": _Script(
        f"import h5py, numpy; {_SAVE}d = {{}}; h5py.File(OLD).visititems(lambda name, item: d.update({{name: numpy.asarray(item[()])}}) "
        'if isinstance(item, h5py.Dataset) and item.dtype.kind in "fiub" else None); save_file(d, NEW)',
        "h5py safetensors",
    ),
    "npy": _Script(f'import numpy; {_SAVE}save_file({{"array": numpy.array(numpy.load(OLD), order="C")}}, NEW)'),
    "npz": _Script(f'import numpy; {_SAVE}save_file({{name: numpy.array(v, order="C") for name, v in numpy.load(OLD).items()}}, NEW)'),
    "flax": _Script(
        "from flax.serialization import msgpack_restore; from flax.traverse_util import flatten_dict; "
        'from safetensors.flax import save_file; save_file(flatten_dict(msgpack_restore(open(OLD, "rb").read()), sep="."), NEW)',
        "flax safetensors",
    ),
    "onnx": _Script(
        f"import numpy, onnx, onnx.numpy_helper as h; {_SAVE}save_file({{t.name: numpy.array(h.to_array(t), "
        'order="C") for t in onnx.load(OLD).graph.initializer}, NEW)',
        "onnx safetensors",
    ),
    "tensorflow": _Script(
        f"import numpy, tensorflow; {_SAVE}r = tensorflow.train.load_checkpoint(OLD); d = {{name: numpy.array(r.get_tensor(name), "
        f'order="C") for name in r.get_variable_to_shape_map()}}; save_file({{name: v for name, v in d.items() if {_IS_ARRAY}}}, NEW)',
        "tensorflow safetensors",
    ),
    "pickle": _Script(
        'import pickle, torch; from torch.utils._pytree import tree_map; d = pickle.load(open(OLD, "rb"), encoding="latin1"); '
        f"torch.save(tree_map(lambda v: torch.as_tensor(v) if {_IS_ARRAY} else v, d), NEW)",
        "",
        ".pt",
    ),
}
_UNPACKED = {  # by which command, of the shell
    "gzip": "gzip -dc OLD > NEW",
    "bzip2": "bzip2 -dc OLD > NEW",
    "xz": "xz -dc OLD > NEW",
    "zstd": "zstd -dc OLD > NEW",
    "tar": "mkdir NEW && tar -xf OLD -C NEW",
    "zip": "unzip OLD -d NEW",
    "7z": "7z x OLD",
    "keras": "unzip -p OLD model.weights.h5 > NEW.h5",
}
_STREAMS = ("gzip", "bzip2", "xz", "zstd")


def reads() -> str:
    """What is read, for messages about what is not."""
    *most, last = (container.summary for container in containers().values())
    return f"streamconv reads {', '.join(most)} and {last}"


def foreign(path: Location, what: str, way: str = "") -> FormatError:
    """The error for a file that is intact and of another format.

    Args:
        path: the file.
        what: what it is, after "this is".
        way: how it becomes readable: the name of a script or of a command, or nothing.
    """
    return FormatError(f"{show(path)}: this is {what}; {reads()}{_advice(path, way)}")


def _advice(path: Location, way: str) -> str:
    old = str(path) if path.local else path.name
    first = "" if path.local else "download it, then "
    if way in _UNPACKED:
        drops_suffix = path.suffix in (".gz", ".bz2", ".xz", ".zst") or way not in _STREAMS
        new = old.removesuffix(path.suffix) if drops_suffix and path.suffix else f"{old}.unpacked"
        return f"; unpack it: {first}{_put(_UNPACKED[way], shlex.quote(old), shlex.quote(new))}"
    if way not in _SCRIPTS:
        return ": get the model's weights in one of these"
    script = _SCRIPTS[way]
    new = f"{old}{script.suffix}"  # which hardly is the name of another file already
    if way == "tensorflow":  # a checkpoint is called by what its files have in common
        saved = f"{old.removesuffix(path.name)}variables/variables"
        old = saved if path.suffix == ".pb" else _TENSORFLOW_PART.sub("", old)
    code = _put(script.code, json.dumps(old), json.dumps(new))
    needs = f"with pip install {script.packages}" if script.packages else "if you trust who made it"
    return f"; {needs}, {first}python -c {shlex.quote(code)} makes it readable"


def _put(template: str, old: str, new: str) -> str:
    """A template with the two files in it, whatever they are called."""
    return re.sub("OLD|NEW", lambda match: old if match[0] == "OLD" else new, template)
