"""Does a file parse? The share of it that a grammar cannot read, for 64 of the 87 languages.

Python goes through CPython's own parser (by `symtable`: the same answers as `ast` without building its objects; an
added first line that parses but can have no symbol table stops the work after the parser). Before that, a recognizer in
C++ is asked: it is many times as fast, and accepts only what CPython accepts, and nearly all of that. Other languages
go through the tree-sitter grammars of `tree-sitter-language-pack` 0.13, the last release that contains them. One error
is not enough for a file to count as broken: grammars lag behind languages, and C or C++ before preprocessing often is
not C. So the result is the share of bytes that had to be skipped for the rest to parse:

- first by another recognizer, where it is compiled (csrc/cpp/recognizer.h): it follows a grammar's tables without
  building its tree, in a third of the time or less, skips whole lines around an error, and gives up on a file as soon
  as it has skipped more than is allowed;
- else by tree-sitter, which looks for a cheap way to recover: tokens directly below an ERROR node were skipped. Nodes
  that parsed inside one were not: a grammar may wrap a whole file in an ERROR for a tag that is never closed.

For literate languages the code in the document is parsed.
"""

import functools
import json
import math
import re
import symtable
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tree_sitter
import tree_sitter_language_pack

from megacoder.core.native import native
from megacoder.corpus.heuristics import FUNCTION_WORDS

__all__ = ["SCREENED", "Parsed", "parse"]


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """What a parser says about a text."""

    error_share: float
    """share of bytes skipped for the rest to parse; 1 where the parser only says yes or no, and says no"""
    problem: str | None = None
    """where the first error is or what the parser said, if known"""
    tree: tree_sitter.Tree | None = None
    """None where no grammar was used, or where none was needed"""


_GOOD = Parsed(error_share=0)
_NO_TABLE = "def f(x): global x\n"

# The grammar of each language; `_BY_ENDING` has others for some file endings.
_GRAMMARS = {
    "Ada": "ada", "Agda": "agda", "Assembly": "asm", "C": "c", "C#": "csharp", "Clojure": "clojure", "CMake": "cmake",
    "Common Lisp": "commonlisp", "C++": "cpp", "CSS": "css", "CUDA": "cuda", "Dart": "dart", "Dockerfile": "dockerfile",
    "Elixir": "elixir", "Elm": "elm", "Emacs Lisp": "elisp", "Erlang": "erlang", "F#": "fsharp", "Fortran": "fortran",
    "GLSL": "glsl", "Go": "go", "Groovy": "groovy", "Haskell": "haskell", "HTML": "html", "Java": "java",
    "Java Server Pages": "embeddedtemplate", "JavaScript": "javascript", "JSON": "json", "Julia": "julia",
    "Kotlin": "kotlin", "Literate Agda": "agda", "Literate Haskell": "haskell", "Lua": "lua", "Makefile": "make",
    "MATLAB": "matlab", "OCaml": "ocaml", "Pascal": "pascal", "Perl": "perl", "PHP": "php", "PowerShell": "powershell",
    "Protocol Buffer": "proto", "R": "r", "Racket": "racket", "RMarkdown": "r", "Ruby": "ruby", "Rust": "rust",
    "Scala": "scala", "Scheme": "scheme", "Shell": "bash", "Solidity": "solidity", "Sparql": "sparql", "SQL": "sql",
    "SystemVerilog": "verilog", "TCL": "tcl", "TeX": "latex", "Thrift": "thrift", "TypeScript": "typescript",
    "Verilog": "verilog", "VHDL": "vhdl", "XSLT": "xml", "YAML": "yaml", "Zig": "zig",
}  # fmt: skip
_TAKE_TEXT = frozenset({"embeddedtemplate", "html", "latex", "php"})  # with a line skipped, they may take code for text
_PREPROCESSED = frozenset({"c", "cpp", "cuda", "glsl"})  # #if and #else may each open what is closed once
_BY_ENDING = {".tsx": "tsx", ".mli": "ocaml_interface", ".fsi": "fsharp_signature"}

SCREENED = frozenset({"Python", "Jupyter Notebook", *_GRAMMARS})
"""The languages that `parse` knows."""


def parse(text: str, language: str, path: str, *, enough: float = 0, function_lines: float = math.inf) -> Parsed | None:
    """What is wrong with a text in `language`; None where the language is not in `SCREENED`.

    A share up to `enough` may be overestimated, though not beyond `enough`; a larger one is exact and comes with its
    place. A text with a share up to `enough` may come without its tree if no function in it is over `function_lines`.
    """
    if language == "Python":
        return _python(text)
    if language == "Jupyter Notebook":
        return _notebook(text)
    if language == "PHP" and "<?" not in text:  # its grammar takes any text for a page
        return Parsed(error_share=1, problem="no <?php")
    if language not in _GRAMMARS or path.endswith(".dtx"):  # documented TeX sources are not TeX before docstrip
        return None
    code = (_CODE[language](text) if language in _CODE else text).encode()
    if language in _CODE and not code.strip():
        return _GOOD
    grammars = [next((name for ending, name in _BY_ENDING.items() if path.endswith(ending)), _GRAMMARS[language])]
    if language == "C" and path.endswith(".h"):  # a header may be one of C++
        grammars.append("cpp")
    for grammar in grammars:
        if (left_out := _left_out(code, grammar, enough, function_lines)) >= 0:
            return Parsed(error_share=left_out / max(len(code), 1))
    best = _tree(code, grammars[0], enough)
    for grammar in grammars[1:]:
        if best.error_share > enough:
            best = min(best, _tree(code, grammar, enough), key=lambda parsed: parsed.error_share)
    return best


def _python(text: str) -> Parsed:
    surely_python = getattr(native(), "surely_python", None)  # None where it is not built: csrc/cpp/python_statements.h
    return _GOOD if surely_python is not None and surely_python(text) else _by_cpython(text)


def _by_cpython(text: str) -> Parsed:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in strings
        try:
            symtable.symtable(_NO_TABLE + text, "<text>", "exec")
        except SyntaxError as error:
            if error.msg != _no_table_message():
                line = None if error.lineno is None else error.lineno - 1
                return Parsed(error_share=1, problem=f"line {line}: {error.msg}")
        except (ValueError, RecursionError, MemoryError) as error:  # MemoryError: the parser's stack, on deep nesting
            return Parsed(error_share=1, problem=f"{type(error).__name__}: {error}")
    return _GOOD


@functools.cache
def _no_table_message() -> str:
    try:
        symtable.symtable(_NO_TABLE, "<text>", "exec")
    except SyntaxError as error:
        return error.msg
    raise AssertionError("CPython's symbol table takes a parameter that is global")


def _notebook(text: str) -> Parsed:
    try:
        notebook = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Parsed(error_share=1, problem=str(error))
    whole = isinstance(notebook, dict) and ("cells" in notebook or "worksheets" in notebook)
    return _GOOD if whole else Parsed(error_share=1, problem="no cells")


def _left_out(code: bytes, grammar: str, enough: float, function_lines: float) -> int:
    """Bytes to skip for the recognizer to accept `code`; -1 where they may exceed the limit, or a tree is needed."""
    recognizer = _recognizer(grammar)
    if recognizer is None:
        return -1
    share = 0 if grammar in _TAKE_TEXT else enough
    found: int = recognizer.left_out(code, share, function_lines, grammar in _PREPROCESSED)
    return found


@functools.cache
def _recognizer(grammar: str) -> Any:
    made = getattr(native(), "Recognizer", None)  # None where nothing is compiled
    language = tree_sitter_language_pack.get_binding(grammar)  # type: ignore[arg-type]
    return None if made is None else made(language, FUNCTION_WORDS)


def _tree(code: bytes, grammar: str, enough: float) -> Parsed:
    tree = _parser(grammar).parse(code)
    if not tree.root_node.has_error:
        return Parsed(error_share=0, tree=tree)
    error_share, row = _skipped(tree, len(code), enough)
    return Parsed(error_share=error_share, problem=None if row is None else f"line {row + 1}", tree=tree)


def _skipped(tree: tree_sitter.Tree, num_bytes: int, enough: float) -> tuple[float, int | None]:
    """The share skipped, and the first row with an error; once it cannot exceed `enough`, all unvisited bytes count."""
    root = tree.root_node
    skipped, rows = 0, []
    pending, left = [root], _size(root)  # nodes with an error in them, or that are one, and their bytes
    while pending and (skipped + left) > enough * num_bytes:
        node = pending.pop()
        left -= _size(node)
        within = _is_bad(node)
        if within:
            rows.append(node.start_point[0])
            skipped += 0 if node.child_count else _size(node)
        for child in node.children:
            if child.child_count == 0:
                if bad := _is_bad(child):
                    rows.append(child.start_point[0])
                skipped += _size(child) if bad or within else 0
            elif child.has_error or child.is_error:
                pending.append(child)
                left += _size(child)
    return min((skipped + left) / max(num_bytes, 1), 1.0), min(rows, default=None)


def _is_bad(node: tree_sitter.Node) -> bool:
    return node.is_error or node.is_missing


def _size(token: tree_sitter.Node) -> int:
    return max(token.end_byte - token.start_byte, 1)


@functools.cache
def _parser(grammar: str) -> tree_sitter.Parser:
    return tree_sitter_language_pack.get_parser(grammar)  # type: ignore[arg-type]


def _between(opening: str, closing: str) -> Callable[[str], str]:
    """The lines between a line that matches `opening` and the next that matches `closing`."""
    block = re.compile(rf"^{opening}[^\n]*\n(.*?)^{closing}", re.MULTILINE | re.DOTALL)
    return lambda text: "\n".join(block.findall(text))


def _bird_tracks(text: str) -> str:
    """Literate Haskell: lines that start with `>`, or those between `\\begin{code}` and `\\end{code}`."""
    lines = [f" {line[1:]}" for line in text.split("\n") if line.startswith(">")]
    return "\n".join(lines) if lines else _between(r"\\begin\{code\}", r"\\end\{code\}")(text)


_CODE: dict[str, Callable[[str], str]] = {
    "Literate Agda": _between(r"\\begin\{code\}", r"\\end\{code\}"),
    "Literate Haskell": _bird_tracks,
    "RMarkdown": _between(r"```+ *\{ *[rR]\b", r"```"),
}
"""For literate languages, the code in the document."""
