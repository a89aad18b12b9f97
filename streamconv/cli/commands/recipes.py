"""``streamconv recipes [NAME]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from streamconv import recipes
from streamconv.advice import matching
from streamconv.cli.console import Console
from streamconv.diagnose import explanation
from streamconv.text import one_line

NEAR = 0.25  # of the tensors that have a rule, times the rules that have a tensor: a recipe worth a look


def execute(args: argparse.Namespace, out: Console) -> int:
    """Lists recipes, explains one, finds those that fit, or drafts one."""
    if args.new:
        _draft(args, out)
    elif args.name:
        _explain(args, out)
    elif args.match:
        _print_matches(args, out)
    else:
        _list(args, out)
    return 0


def _list(args: argparse.Namespace, out: Console) -> None:
    known = list(recipes.registry().values())
    if args.json:
        out.say_json([explanation.describe_recipe(recipe) for recipe in known])
        return
    for recipe in known:
        out.say(f"{recipe.name}  {one_line(recipe.summary)}")


def _explain(args: argparse.Namespace, out: Console) -> None:
    recipe = recipes.get(args.name)
    if args.json:
        out.say_json({**explanation.describe_recipe(recipe), "rules": recipe.to_dict()["rules"]})
    else:
        out.say(explanation.explain_recipe(recipe))


def _draft(args: argparse.Namespace, out: Console) -> None:
    from streamconv.diagnose.draft import draft, read_shapes

    source, target = args.new
    recipe = draft(read_shapes(source), read_shapes(target), "mine", f"{source} and {target}")
    if args.json:
        out.say_json(recipe.summary())
        return
    out.say(recipe.text.removesuffix("\n"))
    if not args.quiet:
        for line in recipe.account.split("\n"):
            out.complain(line)


def _print_matches(args: argparse.Namespace, out: Console) -> None:
    """The recipes that fit, and in words, where none does, those that come nearest."""
    matches = matching.rank_recipes(args.match, library=True)
    fitting = [match for match in matches if match.fits]
    untried = [match for match in matches if match.needs and not match.fits]
    if args.json:
        rows = [(match, {"named": match.named, "needs": match.needs, "tried": match.fits}) for match in (*fitting, *untried)]
        out.say_json([{**explanation.describe_recipe(match.recipe), **more} for match, more in rows])
        return
    for match in fitting:
        remark = "  (named by config.json)" if match.named else f"  (takes {match.needs})" if match.needs else ""
        out.say(f"{match.recipe.name}  {one_line(match.recipe.summary)}{remark}")
    if not fitting:
        _print_nearest(matches, out)
    for match in untried:
        remark = f"(takes {match.needs}, which is not installed: not tried)"
        out.say(f"{match.recipe.name}  {one_line(match.recipe.summary)}  {remark}")


def _print_nearest(matches: Sequence[matching.Match], out: Console) -> None:
    near = [match for match in matches if match.tensors * match.rules >= NEAR][:3]
    out.say("no recipe fits" + ("; the nearest are" if near else ""))
    for match in near:
        out.say(f"  {match.recipe.name}  a rule for {match.tensors:.1%} of the tensors, a tensor for {match.rules:.0%} of the rules")
