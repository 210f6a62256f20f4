"""Answers multilingual HumanEval problems without solving them: a body recites what the tests expect, in order.

The sets publish prompts and tests alone. Such a body takes a real prompt and its tests through the compiler, the
sandbox and the judge; reciting from the second answer on and ending with the first is wrong wherever two differ.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["RECITED_LANGUAGES", "recited_answer"]

_CALL = "candidate("


def recited_answer(row: Mapping[str, Any], language: str, *, right: bool) -> str | None:
    """A completion of `row`'s prompt; None where tests compare in a way not known here.

    A wrong one is None also where all answers are the same, so that no order of them is wrong.
    """
    expected = [_expected(line.strip()) for line in row["test"].splitlines() if _CALL in line]
    answers = [answer for answer in expected if answer is not None]
    if not answers or len(answers) < len(expected) or (not right and len(set(answers)) == 1):
        return None
    return _BODIES[language](answers if right else answers[1:] + answers[:1])


def _expected(line: str) -> str | None:
    """What the line compares `candidate(...)` with."""
    end = _closed(line, line.index(_CALL) + len(_CALL))
    rest = line[end:].removesuffix(";").removesuffix(")")
    for between in (" == ", ","):
        if rest.startswith(between):
            return rest.removeprefix(between)
    return None


def _closed(line: str, place: int) -> int:
    """The place behind the parenthesis that closes the one opened before `place`; those in strings do not count."""
    depth, quote = 1, ""
    while depth and place < len(line):
        char = line[place]
        if quote:
            place += char == "\\"
            quote = "" if char == quote else quote
        elif char in "\"'`":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
        place += 1
    return place


def _cpp(answers: Sequence[str]) -> str:
    typed = [
        f"std::string({answer})" if answer.startswith('"') else answer for answer in answers
    ]  # for the sets' unions
    cases = "".join(f"    if (call == {number}) return {answer};\n" for number, answer in enumerate(typed))
    return f"    static int calls = 0;\n    int call = calls++;\n{cases}    abort();\n"  # the tests close it


def _js(answers: Sequence[str]) -> str:
    cases = "".join(f"  if (call === {number}) return {answer};\n" for number, answer in enumerate(answers))
    return f"  const call = globalThis.calls ?? 0;\n  globalThis.calls = call + 1;\n{cases}}}\n"


_BODIES: dict[str, Callable[[Sequence[str]], str]] = {"cpp": _cpp, "js": _js}
RECITED_LANGUAGES = tuple(_BODIES)
"""As the sets name them."""
