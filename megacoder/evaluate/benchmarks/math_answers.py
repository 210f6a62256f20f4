"""Whether an answer to a maths question is the published one: as a number, as LaTeX text, or as an expression.

The rules are those of DeepSeek-Coder's PAL-Math evaluation (`utils/parser.py` and `utils/grader.py`, after Hendrycks'
MATH release): both sides are normalized; numbers are equal within 1e-4 of their size, also as percentages either way,
texts where they differ only in brackets, and expressions where sympy finds no difference. One rule is not followed:
sympy's LaTeX parser reads as much as it understands there, so that `x**2` equals `x**3` and `2\\sqrt3` equals
`2\\sqrt5`. `_expression` reads all of a text, LaTeX or Python, or nothing.

The text of this module is part of every PAL program, which finds no megacoder: it imports none.
"""

import re
from collections.abc import Callable
from math import isclose
from typing import Any

__all__ = ["normalized", "same_answer"]

_FUNCTIONS = r"\\(sin|cos|tan|cot|sec|csc|log|ln|exp)\b"
_GROUPS = (
    (re.compile(r"\\frac{([^{}]*)}{([^{}]*)}"), r"((\1)/(\2))"),
    (re.compile(r"\\sqrt\[([^\[\]]*)\]{([^{}]*)}"), r"((\2)**(1/(\1)))"),
    (re.compile(r"\\sqrt{([^{}]*)}"), r"sqrt(\1)"),
    (re.compile(r"(?<![}\]])(?<!\\frac)(?<!\\sqrt){([^{}]*)}"), r"(\1)"),
)
"""LaTeX with braces, and what parse_expr reads instead; innermost first."""


def normalized(answer: object) -> str:
    """An answer as it is compared: without units, currency, percent signs and blanks, its fractions in one form."""
    text = _without(_without(str(answer).strip(), "\n").rstrip("."), "\\!", "\\ ")
    text = text.replace("\\\\", "\\").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    text = _without(text, "\\left", "\\right")
    text = re.sub(r"\\text{.*?}$", "", text).strip() or text  # a unit, unless there is nothing else
    text = _without(text, "^{\\circ}", "^\\circ", "\\$", "$", "\\text", "x\\in", "\\%", "%")
    text = _without(text.replace(" .", " 0.").replace("{.", "{0."), "\\cdot").replace("infinity", "\\infty")
    text = text if "\\infty" in text else text.replace("inf", "\\infty")
    text = re.sub(r"\\mbox{.*?}", "", _without(text, "and", "\\mathbf"))
    text = text if "i" in text else text.replace("j", "i")
    text = re.sub(r"(\d)\.0+(?=\D|$)", r"\1", text)
    text = f"0{text}" if text.startswith(".") else text
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        text = value
    text = re.sub(r"\\sqrt(\w+)", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])(.)", lambda found: f"\\frac{{{found[1]}}}{_braced(found[2])}", text)
    above, slash, below = text.partition("/")
    return f"\\frac{{{above}}}{{{below}}}" if slash and _is_plain(above) and _is_plain(below) else text


def _without(text: str, *parts: str) -> str:
    for part in parts:
        text = text.replace(part, "")
    return text


def _braced(character: str) -> str:
    return character if character == "{" else f"{{{character}}}"


def _is_plain(side: str) -> bool:
    """Whether `side` of a fraction a/b is a whole number, or has a root in it."""
    return "/" not in side and ("sqrt" in side or re.fullmatch(r"0|-?[1-9]\d*", side) is not None)


def same_answer(truth: str, answer: str) -> bool:
    """Whether two normalized answers are the same."""
    number, other = _number(truth), _number(answer)
    if number is not None and other is not None:
        return any(isclose(number, size, rel_tol=1e-4) for size in (other / 100, other, other * 100))
    if not truth:
        return False
    bare, other_bare = _without_brackets(truth, answer)
    if bare == other_bare:
        return True
    if _bracket(truth) and _bracket(truth) == _bracket(answer):
        parts, others = truth[1:-1].split(","), answer[1:-1].split(",")
        if len(parts) == len(others) and all(map(same_answer, parts, others)):
            return True
    return _same_expression(_expression(truth), _expression(answer))


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _bracket(text: str) -> str:
    """The kind of bracket around all of `text`, if there is one."""
    return text[0] if text[:1] + text[-1:] in ("()", "[]") else ""


def _without_brackets(truth: str, answer: str) -> tuple[str, str]:
    """Both without braces and parentheses; without square brackets too, where they do not stand against parentheses."""
    if (kind := _bracket(truth)) and not answer.startswith("([".replace(kind, "")):
        truth, answer = truth.strip("[]()"), answer.strip("[]()")
    return _without(truth, *"{}()"), _without(answer, *"{}()")


def _expression(text: str) -> Any:
    """What sympy makes of `text` once its LaTeX is rewritten; None where something is left that is no expression."""
    from sympy.parsing.sympy_parser import (  # type: ignore[import-untyped]
        convert_xor,
        implicit_multiplication,
        parse_expr,
        split_symbols,
        standard_transformations,
    )

    before = ""
    while text != before:
        before = text
        for pattern, plain in _GROUPS:
            text = pattern.sub(plain, text)
    text = re.sub(_FUNCTIONS, r" \1 ", text.replace("\\pi", " pi ").replace("\\infty", " oo ").replace("\\times", "*"))
    if "\\" in text:
        return None
    transformations = (*standard_transformations, convert_xor, split_symbols, implicit_multiplication)
    return _tried(lambda: parse_expr(text, transformations=transformations))


def _same_expression(one: Any, other: Any) -> bool:
    from sympy import N, simplify  # type: ignore[import-untyped]

    if one is None or other is None:
        return False
    return bool(_tried(lambda: simplify(one - other) == 0) or _tried(lambda: isclose(N(one), N(other), rel_tol=1e-3)))


def _tried(call: Callable[[], Any]) -> Any:
    """What `call` returns; None where sympy fails, which raises whatever it stumbles over in an answer."""
    try:
        return call()
    except MemoryError:  # the sandbox's to judge: such a program is tried once more, alone
        raise
    except Exception:
        return None
