"""``--dequantize``: quantized weights are numbers before a recipe, or the target, sees them, and configs speak of no quantization."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from streamconv.checkpoint.opening import CONFIG, Checkpoint, prefixed, read_config
from streamconv.conversion.casting import Casting
from streamconv.conversion.opening import find_beside
from streamconv.conversion.options import Options
from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import UsageError
from streamconv.graph.node import AnyNode, apply
from streamconv.graph.ops import Add
from streamconv.recipe import Conversion
from streamconv.rows import Row
from streamconv.schemes.configs import FILES, find_method, model_dtype, with_files
from streamconv.schemes.decoding import Decoded, decode
from streamconv.schemes.detection import codes_in, find_quantization
from streamconv.schemes.experts import put_together
from streamconv.schemes.scheme import Scheme
from streamconv.storage.folder import Folder

OPTION = "--dequantize"
PARAMS = "params.json"  # config of Mistral's own checkpoints


@dataclass(frozen=True)
class Dequantization:
    """What has become of a checkpoint.

    Attributes:
        checkpoint: the same, with numbers in the place of what they are made of.
        made_of: for each tensor that was quantized, the stored ones that it is made of.
        dropped: stored tensors that only served the quantization, with the reason.
        quantized: for each component that was quantized, how, and the dtype that its numbers have.
    """

    checkpoint: Checkpoint
    made_of: Mapping[str, tuple[str, ...]]
    dropped: Mapping[str, str]
    quantized: Mapping[str, tuple[Scheme, str]]

    def account(self, conversion: Conversion) -> Conversion:
        """A conversion of that checkpoint, told as one of the stored tensors."""
        rows = [self._trace(row) for row in conversion.rows]
        dropped = [stored for name in conversion.dropped for stored in self.made_of.get(name, (name,))]
        reasons = {stored: why for name, why in conversion.reasons.items() for stored in self.made_of.get(name, (name,))}
        return replace(conversion, rows=rows, dropped=[*dropped, *self.dropped], reasons={**reasons, **self.dropped})

    def _trace(self, row: Row) -> Row:
        if not any(name in self.made_of for name in row.sources):
            return row
        sources = tuple(dict.fromkeys(stored for name in row.sources for stored in self.made_of.get(name, (name,))))
        return row._replace(sources=sources, layout=", then ".join(filter(None, ("dequantize", row.layout))))

    def revise(self, name: str, before: Mapping[str, Any]) -> dict[str, Any]:
        """What a file of JSON beside the weights says afterwards."""
        folder, _, file = name.rpartition("/")
        if file == PARAMS:
            return {key: value for key, value in before.items() if key != "quantization"}
        if file != CONFIG or folder not in self.quantized:
            return dict(before)
        scheme, dtype = self.quantized[folder]
        return scheme.config(before, dtype)

    def is_left(self, name: str) -> bool:
        """Whether a file beside the weights says how they were quantized, and nothing else."""
        folder, _, file = name.rpartition("/")
        return file in FILES and folder in self.quantized


def config_of(checkpoint: Checkpoint, component: str) -> dict[str, Any]:
    """The config of a component, with what other files beside it say of quantization."""
    where = checkpoint.folder.folder(component) if component else checkpoint.folder
    return _read_all(where, checkpoint.config_of(component))


def with_config_of(checkpoint: Checkpoint, beside: Folder | None) -> Checkpoint:
    """A checkpoint with the config of a folder, if that says how it is quantized, and nothing else does."""
    if beside is None or list(checkpoint.components) != [""] or find_method(config_of(checkpoint, "")):
        return checkpoint
    config = _read_all(beside, read_config(beside))
    return checkpoint.replace(checkpoint.components, {"": config}) if find_method(config) else checkpoint


def _read_all(folder: Folder, config: Mapping[str, Any]) -> dict[str, Any]:
    return with_files(config, {name: read_config(folder, name) for name in FILES})


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether any component is, in a way that is known or not; a config that says so of numbers is one that was left there."""
    for folder, contents in checkpoint.components.items():
        specs = {name: node.spec for name, node in contents.entries.items()}
        config = config_of(checkpoint, folder)
        quantization = find_quantization(config, {}, specs)
        if quantization is None:
            continue
        scheme = quantization.scheme
        if scheme is None or codes_in(specs) or scheme.match(config, specs, OPTION).groups:
            return True
    return False


def dequantize_as_asked(options: Options, checkpoint: Checkpoint, casting: Casting, *, renames: bool) -> Dequantization | None:
    """`dequantize`, where that is asked for, or where what is quantized is to be quantized in another way."""
    checkpoint = with_config_of(checkpoint, find_beside(options))
    if options.dequantize or (options.quantize and is_quantized(checkpoint)):
        return dequantize(checkpoint, casting, renames=renames, stacked=not options.quantize)
    return None


def dequantize_other(options: Options, other: Checkpoint, casting: Casting) -> tuple[Checkpoint, set[str]]:
    """What a dequantized checkpoint is compared with, dequantized where it is quantized, too.

    Beside it the names of tensors of which a zero may have lost its sign, since their codes have no -0.
    """
    if not options.dequantize or options.quantize is not None or not is_quantized(other):
        return other, set()
    dequantization = dequantize(other, casting, renames=False)
    dtypes = {name: node.spec.dtype.name for name, node in other.contents.entries.items()}
    unsigned = {name for name, stored in dequantization.made_of.items() if dtypes[stored[0]].endswith("fnuz")}
    return dequantization.checkpoint, unsigned


def without_sign_of_zero(nodes: Mapping[str, AnyNode], names: Collection[str]) -> dict[str, AnyNode]:
    """Tensors, those with these names with 0 in the place of -0."""
    return {name: apply(Add(0.0), node) if name in names else node for name, node in nodes.items()}


def dequantize(checkpoint: Checkpoint, casting: Casting, *, renames: bool, stacked: bool = True) -> Dequantization:
    """A checkpoint with all that is quantized as numbers: of the dtype that ``casting`` gives, else of the one that its config does.

    Args:
        checkpoint: the source.
        casting: which dtype tensors shall have, by their names as targets.
        renames: whether a recipe gives them others.
        stacked: whether experts that were taken apart to be quantized are stacks again.

    Raises:
        UsageError: nothing is quantized, or in a way that is not known here.
        CoverageError: tensors of a quantization that do not go together.
    """
    if renames and casting.keeps_some:
        raise UsageError(f"{OPTION}: --keep-dtype names what a recipe makes, not what is quantized: leave out one of them")
    components, configs = dict(checkpoint.components), {}
    made_of: dict[str, tuple[str, ...]] = {}
    dropped: dict[str, str] = {}
    quantized: dict[str, tuple[Scheme, str]] = {}
    for folder, contents in checkpoint.components.items():
        own, config = checkpoint.config_of(folder), config_of(checkpoint, folder)
        scheme = _find_scheme(checkpoint, folder, config)
        if scheme is None:
            continue
        usual = model_dtype(config, OPTION)
        any_shape = TensorSpec(DTYPES[usual], ())

        def dtype_of(name: str, folder: str = folder, usual: str = usual, spec: TensorSpec = any_shape) -> str:
            return casting(prefixed(folder, name), spec) or usual

        decoded = decode(scheme, contents.entries, config, dtype_of, OPTION)
        if not decoded.made_of:
            continue
        if stacked:
            nodes, stacks = put_together(decoded.nodes, own)
            decoded = replace(decoded, nodes=nodes, made_of=_made_of(decoded, stacks))
        components[folder] = replace(contents, entries=decoded.nodes)
        quantized[folder] = scheme, casting.dtype or usual
        configs[folder] = scheme.config(own, casting.dtype or usual)
        made_of |= {prefixed(folder, name): _in_folder(folder, decoded, name) for name in decoded.made_of}
        dropped |= {prefixed(folder, name): why for name, why in decoded.dropped.items()}
    if not quantized:
        raise UsageError(f"{OPTION}: {checkpoint.location}: nothing in it is quantized: leave it out")
    return Dequantization(checkpoint.replace(components, configs), made_of, dropped, quantized)


def _made_of(decoded: Decoded, stacks: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """What tensors are made of, where some of them are put together to stacks."""
    made_of = dict(decoded.made_of)
    for stack, names in stacks.items():
        made_of[stack] = tuple(stored for name in names for stored in made_of.pop(name, (name,)))
    return made_of


def _in_folder(folder: str, decoded: Decoded, name: str) -> tuple[str, ...]:
    return tuple(prefixed(folder, stored) for stored in decoded.made_of[name])


def _find_scheme(checkpoint: Checkpoint, folder: str, config: Mapping[str, Any]) -> Scheme | None:
    """How a component is quantized, None: it is not. Raises UsageError where that is not known here."""
    specs = {name: node.spec for name, node in checkpoint.components[folder].entries.items()}
    quantization = find_quantization(config, {}, specs)
    if quantization is None:
        return None
    if quantization.scheme is None:
        what = f"{folder}: {quantization}" if folder else str(quantization)
        raise UsageError(f"{OPTION}: {what}: {quantization.remedy}")
    return quantization.scheme
