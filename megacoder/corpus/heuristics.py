"""Readability and modularity by rule of thumb: what a reviewer would send back, measured on text alone.

The paper drops "files with syntax errors, poor readability, and low modularity" and says no more; names, measures and
limits are ours. They target what was not written to be read: data and machine output under a programming language's
name, one endless function, code whose names are gone. Limits are loose, so that ordinary code passes.
"""

import re
from dataclasses import dataclass

import tree_sitter

from megacoder.core.errors import ConfigError
from megacoder.corpus.text_counts import word_counts

__all__ = ["FUNCTION_WORDS", "HeuristicLimits", "modularity", "readability"]

_CONFLICT = re.compile(r"^<{7} [^\n]*\n(?:.*\n)*?={7}\n(?:.*\n)*?>{7} ", re.MULTILINE)
FUNCTION_WORDS = ("function", "method", "constructor")
"""In every grammar, a syntax node whose type contains one of these is a function."""
_FUNCTION = re.compile("|".join(FUNCTION_WORDS))


@dataclass(frozen=True, kw_only=True)
class HeuristicLimits:
    """Beyond these limits a file counts as unreadable or not modular."""

    min_words: int = 200
    """files with fewer words are not judged by their words"""
    max_number_share: float = 0.9
    """largest share of words that are numbers"""
    max_short_name_share: float = 0.8
    """largest share of distinct names that have one or two characters"""
    max_repeated_line_share: float = 0.95
    """largest share of non-blank lines that repeat an earlier one"""
    long_file_lines: int = 1000
    """shorter files are not judged for modularity"""
    max_function_share: float = 0.9
    """largest share of a long file's lines that are one function"""

    def __post_init__(self) -> None:
        for name in ("max_number_share", "max_short_name_share", "max_repeated_line_share", "max_function_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"screening {name} = {getattr(self, name)}: must be above 0 and at most 1")


def readability(text: str, limits: HeuristicLimits) -> str | None:
    """Why the text counts as unreadable, or None."""
    if "<<<<<<< " in text and _CONFLICT.search(text):
        return "merge conflict"
    counts = word_counts(text)
    if counts.words < limits.min_words:
        return None
    if counts.numbers > limits.max_number_share * counts.words:
        return f"over {limits.max_number_share:.0%} numbers"
    if counts.names >= limits.min_words / 4 and counts.short_names > limits.max_short_name_share * counts.names:
        return f"over {limits.max_short_name_share:.0%} of names with one or two characters"
    if counts.lines - counts.distinct_lines > limits.max_repeated_line_share * counts.lines:
        return f"over {limits.max_repeated_line_share:.0%} repeated lines"
    return None


def modularity(tree: tree_sitter.Tree, num_lines: int, limits: HeuristicLimits) -> str | None:
    """Why a long file counts as not modular, or None; lines of nested functions do not count for the outer one."""
    if num_lines < limits.long_file_lines:
        return None
    most = limits.max_function_share * num_lines
    wide = [tree.root_node]  # only nodes over the limit can contain a function over it
    while wide:
        node = wide.pop()
        if _is_function(node) and _own_lines(node, most) > most:
            return f"one function over {limits.max_function_share:.0%} of a long file"
        wide += (child for child in node.children if _lines(child) > most)
    return None


def _own_lines(function: tree_sitter.Node, most: float) -> int:
    """Lines of a function without those of functions nested in it; stops counting once they are not over `most`."""
    own = _lines(function)
    within = list(function.children)  # a copy: the node returns the same list each time
    while within and own > most:
        node = within.pop()
        if _is_function(node):
            own -= _lines(node)
        else:
            within += node.children
    return own


def _is_function(node: tree_sitter.Node) -> bool:
    return node.is_named and node.child_count > 0 and _FUNCTION.search(node.type) is not None


def _lines(node: tree_sitter.Node) -> int:
    return node.end_point[0] - node.start_point[0] + 1
