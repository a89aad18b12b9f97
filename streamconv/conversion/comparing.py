"""Two checkpoints tensor by tensor: what options make of the first, beside the second as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamconv.checkpoint.opening import Checkpoint
from streamconv.conversion.casting import Casting
from streamconv.conversion.dequantizing import dequantize_as_asked, dequantize_other, is_quantized, without_sign_of_zero
from streamconv.conversion.merges import merge_as_asked
from streamconv.conversion.opening import check_backend, find_own_beside, find_recipe, open_both, split_settings
from streamconv.conversion.options import Options, VerifyOptions
from streamconv.conversion.pipeline import alter_as_asked
from streamconv.conversion.quantizing import quantize_as_asked
from streamconv.conversion.renaming import names_change
from streamconv.conversion.sides import open_other
from streamconv.conversion.targets import all_tensors, convert_tensors
from streamconv.graph.node import AnyNode
from streamconv.recipe import Recipe, Side


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
    merger = merge_as_asked(options.a, options)
    side = recipe.target if recipe else Side()
    a, b = (merger.checkpoint, open_other(options.b, side, options.variant)) if merger else open_both(options, recipe, reading)
    casting = Casting(options.dtype, options.keep_dtype)
    only_b = is_either_quantized and options.dequantize and is_quantized(b) and not is_quantized(a)
    expected, notes = convert_side(options, a, recipe, settings, casting, dequantizes=not only_b)
    other, unsigned = dequantize_other(options, b, casting)
    actual = other.contents.entries if recipe is not None or names_change(options) else all_tensors(other)
    notes = [*(merger.notes if merger else ()), *notes]
    return Sides(a, b, without_sign_of_zero(expected, unsigned), without_sign_of_zero(actual, unsigned), notes)


def convert_side(
    options: Options,
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    settings: Mapping[str, object],
    casting: Casting,
    *,
    dequantizes: bool = True,
) -> tuple[Mapping[str, AnyNode], list[str]]:
    """The tensors that options make of a checkpoint, by name, whatever they will be written to; and notes on other sources of them.

    Raises:
        StreamconvError: the options do not fit.
    """
    casting.ask_class(checkpoint.config)
    is_renamed = recipe is not None or names_change(options)
    dequantization = dequantize_as_asked(options, checkpoint, casting, renames=is_renamed) if dequantizes else None
    if dequantization is not None:
        checkpoint = dequantization.checkpoint
    checkpoint, altered = alter_as_asked(options, checkpoint, casting, is_renamed=is_renamed)
    is_stated = dequantization is None and not is_renamed
    conversion = convert_tensors(checkpoint, recipe, settings, casting, find_own_beside(options, checkpoint), is_stated=is_stated)
    conversion, _ = quantize_as_asked(options, conversion, checkpoint)
    return conversion.outputs, [note for one in altered for note in one.notes]
