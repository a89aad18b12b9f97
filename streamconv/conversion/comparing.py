"""Two checkpoints tensor by tensor: what options make of the first, beside the second as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamconv.checkpoint.opening import Checkpoint
from streamconv.conversion.casting import Casting
from streamconv.conversion.dequantizing import dequantize_as_asked, dequantize_other, is_quantized, without_sign_of_zero
from streamconv.conversion.merges import merge_as_asked
from streamconv.conversion.opening import check_backend, find_own_beside, find_recipe, open_both, split_settings
from streamconv.conversion.options import VerifyOptions
from streamconv.conversion.pipeline import alter_as_asked
from streamconv.conversion.quantizing import quantize_as_asked
from streamconv.conversion.renaming import names_change
from streamconv.conversion.sides import open_other
from streamconv.conversion.targets import all_tensors, convert_tensors
from streamconv.graph.node import AnyNode
from streamconv.recipe import Side


@dataclass(frozen=True)
class Sides:
    """What is compared.

    Attributes:
        a: the first checkpoint, as it is stored.
        b: the second.
        expected: the tensors that the first becomes, by name.
        actual: those of the second.
        notes: on other sources that went into the first.
    """

    a: Checkpoint
    b: Checkpoint
    expected: Mapping[str, AnyNode]
    actual: Mapping[str, AnyNode]
    notes: Sequence[str]


def open_sides(options: VerifyOptions, *, is_either_quantized: bool = False) -> Sides:
    """Opens what is compared.

    Args:
        options: what is asked for.
        is_either_quantized: with ``--dequantize`` it will do that the second is quantized, and the first is not.

    Raises:
        StreamconvError: one cannot be read, or the options do not fit.
    """
    check_backend(options)
    recipe = find_recipe(options)
    reading, settings = split_settings(options, recipe)
    merged = merge_as_asked(options.a, options)
    side = recipe.target if recipe else Side()
    a, b = (merged.checkpoint, open_other(options.b, side, options.variant)) if merged else open_both(options, recipe, reading)
    casting = Casting(options.dtype, options.keep_dtype)
    casting.ask_class(a.config)
    is_renamed = recipe is not None or names_change(options)
    changed, dequantization = a, None
    if not (is_either_quantized and options.dequantize and is_quantized(b) and not is_quantized(a)):
        dequantization = dequantize_as_asked(options, a, casting, renames=is_renamed)
    if dequantization is not None:
        changed = dequantization.checkpoint
    changed, altered = alter_as_asked(options, changed, casting, is_renamed=is_renamed)
    is_stated = dequantization is None and not is_renamed
    conversion = convert_tensors(changed, recipe, settings, casting, find_own_beside(options, changed), is_stated=is_stated)
    conversion, _ = quantize_as_asked(options, conversion, changed)
    other, unsigned = dequantize_other(options, b, casting)
    actual = other.contents.entries if is_renamed else all_tensors(other)
    notes = [note for one in altered for note in one.notes]
    return Sides(a, b, without_sign_of_zero(conversion.outputs, unsigned), without_sign_of_zero(actual, unsigned), notes)
