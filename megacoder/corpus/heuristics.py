"""Readability and modularity by rule of thumb: what a reviewer would send back, measured on text alone.

The paper drops "files with syntax errors, poor readability, and low modularity" and says no more; names, measures and
limits are ours. They aim at what is not written to be read: data and machine output under a programming language's
name, one endless function, code whose names are gone. Limits are loose, so that ordinary code passes.
"""

import re
from dataclasses import dataclass

import tree_sitter

from megacoder.core.errors import ConfigError

__all__ = ["HeuristicLimits", "modularity", "readability"]

_CONFLICT = re.compile(r"^<{7} [^\n]*\n(?:.*\n)*?={7}\n(?:.*\n)*?>{7} ", re.MULTILINE)
_WORDS = re.compile(r"[^\W\d]\w*|\d[\w.]*")
_FUNCTION = re.compile(r"function|method|constructor")


@dataclass(frozen=True, kw_only=True)
class HeuristicLimits:
    """Where a file stops to be readable or modular."""

    min_words: int = 200
    """files with fewer words are not judged by their words"""
    max_number_share: float = 0.9
    """of words that are numbers"""
    max_short_name_share: float = 0.8
    """of the distinct names that have one or two characters"""
    max_repeated_line_share: float = 0.95
    """of lines that an earlier line equals, blank ones aside"""
    long_file_lines: int = 1000
    """shorter files are not judged for modularity"""
    max_function_share: float = 0.9
    """of a long file's lines that are one function"""

    def __post_init__(self) -> None:
        for name in ("max_number_share", "max_short_name_share", "max_repeated_line_share", "max_function_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"screening {name} = {getattr(self, name)}: must be above 0 and at most 1")


def readability(text: str, limits: HeuristicLimits) -> str | None:
    """Why nobody would read this, or None."""
    if "<<<<<<< " in text and _CONFLICT.search(text):
        return "merge conflict"
    words = _WORDS.findall(text)
    if len(words) < limits.min_words:
        return None
    numbers = sum(word[0].isdigit() for word in words)
    if numbers > limits.max_number_share * len(words):
        return f"over {limits.max_number_share:.0%} numbers"
    names = {word for word in words if not word[0].isdigit()}
    short = sum(len(name) < 3 for name in names)
    if len(names) >= limits.min_words / 4 and short > limits.max_short_name_share * len(names):
        return f"over {limits.max_short_name_share:.0%} of names with one or two characters"
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if len(lines) - len(set(lines)) > limits.max_repeated_line_share * len(lines):
        return f"over {limits.max_repeated_line_share:.0%} repeated lines"
    return None


def modularity(tree: tree_sitter.Tree, num_lines: int, limits: HeuristicLimits) -> str | None:
    """Why a long file is not built of parts, or None; lines of functions inside a function are not that one's own."""
    if num_lines < limits.long_file_lines:
        return None
    own: list[int] = []  # lines of each function, less those of functions in it
    open_functions: list[int] = [-1]  # where the functions around the cursor stand in `own`
    cursor, going = tree.walk(), True
    while going:
        node = cursor.node
        assert node is not None
        if function := node.is_named and _FUNCTION.search(node.type) is not None and node.child_count > 0:
            lines = node.end_point[0] - node.start_point[0] + 1
            if open_functions[-1] >= 0:
                own[open_functions[-1]] -= lines
            own.append(lines)
        if cursor.goto_first_child():
            open_functions.append(len(own) - 1 if function else open_functions[-1])
            continue
        while not (going := cursor.goto_next_sibling()) and cursor.goto_parent():
            open_functions.pop()
    if max(own, default=0) > limits.max_function_share * num_lines:
        return f"one function over {limits.max_function_share:.0%} of a long file"
    return None
