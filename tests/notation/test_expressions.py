from __future__ import annotations

import pytest

from streamconv.errors import NotationError
from streamconv.notation.expressions import check, evaluate

SCOPE = {
    "n": 12,
    "zero": 0,
    "name": "llama",
    "config": {"heads": 8, "sizes": [1, 2, 3], "inner": {"head_dim": None, "kinds": ["a", "b"]}, "get": 5},
    "double": lambda x: 2 * x,
    "has": lambda text: text == "lm_head.weight",
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n", 12),
        ("-n", -12),
        ("3 + n * 2 - 1", 26),
        ("n // config.heads", 1),
        ("n / 4", 3),
        ("missing / 4", None),
        ("config.inner.head_dim or n // 4", 3),
        ("zero or config.heads", 8),
        ("n and name", "llama"),
        ("config.sizes[1]", 2),
        ("config.sizes[-1]", 3),
        ("config['heads']", 8),
        ("config.get", 5),
        ("'a' in config.inner.kinds", True),
        ("'c' not in config.inner.kinds", True),
        ("name in ('llama', 'qwen')", True),
        ("1 < n <= 12", True),
        ("1 < n < 12", False),
        ("name == 'llama' and not zero", True),
        ("1 if zero else 2", 2),
        ("double(n + 1)", 26),
        ("has('lm_head.weight') and 'tied'", "tied"),
        ("[n, 1]", [12, 1]),
        ("None", None),
        # what is missing is None
        ("missing", None),
        ("missing.deeper[3].still", None),
        ("config.heads.x", None),
        ("config.sizes[7]", None),
        ("config.sizes.x", None),
        ("missing + 1", None),
        ("2 * missing // 3", None),
        ("-missing", None),
        ("missing or 4", 4),
        ("missing == None", True),
        ("'a' in missing", False),
        ("'a' not in missing", True),
        ("not missing", True),
    ],
)
def test_values(text: str, value: object) -> None:
    check(text)
    assert evaluate(text, SCOPE) == value


@pytest.mark.parametrize(
    "text",
    ["n // zero", "n + name", "missing < 3", "name - 1", "config[config.sizes]", "n(1)", "missing(1)", "print(1)", "config.get('heads')"],
)
def test_values_that_do_not_go_together(text: str) -> None:
    check(text)
    with pytest.raises(NotationError, match="cannot be evaluated"):
        evaluate(text, SCOPE)


@pytest.mark.parametrize(
    "text",
    [
        "", "n +", "n = 1", "import os", "(lambda: 1)()", "[x for x in config.sizes]", "{x for x in config.sizes}", "{'a': 1}",
        "{1, 2}", "(x for x in config.sizes)", "f'{n}'", "(n := 3)", "config.sizes[0:1]", "n ** n", "n % 2", "n << 3",
        "n | 1", "~n", "+n", "n is None", "await n", "yield n", "double(x=1)", "double(*config.sizes)", "double(**config)", "n; n",
        "not " * 100_000 + "n", "(" * 5000 + "n" + ")" * 5000, "\0",
    ],
)  # fmt: skip
def test_nothing_else_is_an_expression(text: str) -> None:
    for use in (check, lambda text: evaluate(text, SCOPE)):
        with pytest.raises(NotationError) as caught:
            use(text)
        assert 0 <= caught.value.position <= len(text)


@pytest.mark.parametrize(
    "text", ["n.__class__", "config.__class__", "name.__class__.__mro__", "double.__globals__", "config.keys", "name.upper"]
)
def test_attributes_are_looked_up_in_mappings_only(text: str) -> None:
    assert evaluate(text, SCOPE) is None


@pytest.mark.parametrize("text", ["__import__('os')", "eval('1')", "open('x')", "name.upper()", "''.join(config.sizes)", "(double)(1)(2)"])
def test_only_functions_of_the_scope_are_called(text: str) -> None:
    with pytest.raises(NotationError, match="has no value here"):
        evaluate(text, SCOPE)


def test_errors_point_at_the_character() -> None:
    with pytest.raises(NotationError, match=r"n \+ n\[>>>1:2\]") as caught:
        check("n + n[1:2]")
    assert caught.value.position == 6


def test_division_must_come_out_even() -> None:
    with pytest.raises(NotationError, match="12 cannot be divided by 8"):
        evaluate("n / config.heads", SCOPE)
