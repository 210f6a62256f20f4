"""Does a file parse? The share of it that a grammar cannot read, for 64 of the 87 languages.

Python goes through CPython's own parser (by `symtable`: the same answers as `ast` without building its objects; a first
line that parses but can have no symbol table ends the work behind the parser); before it a recogniser in C++ is asked,
twenty times as fast, which takes only what CPython takes, and nearly all of that. Other languages go through the
tree-sitter grammars of `tree-sitter-language-pack` 0.13, the last release that contains them; a parser that recovers
from errors tells how many bytes it had to skip, and a file counts as broken above a share of them. One error is not
enough: grammars lag behind languages, and C or C++ before the preprocessor often is not C. Skipped are tokens that hang
from an ERROR node; what was understood inside one is not: a grammar may wrap a whole file in an ERROR for a tag that is
never closed. For literate languages the code in the document is parsed.
"""

import functools
import json
import re
import symtable
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import tree_sitter
import tree_sitter_language_pack

from megacoder.core.native import native

__all__ = ["SCREENED", "Parsed", "parse"]


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """What a parser says about a text."""

    error_share: float
    """bytes that it could not read, of all; 1 where the parser only says yes or no, and says no"""
    problem: str | None = None
    """where the first of them is"""
    tree: tree_sitter.Tree | None = None
    """None where no grammar was used"""


_GOOD = Parsed(error_share=0)
_NO_TABLE = "def f(x): global x\n"

# Languages whose grammar is not called as the language is in lower case; a path's ending may ask for another one.
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
_BY_ENDING = {".tsx": "tsx", ".mli": "ocaml_interface", ".fsi": "fsharp_signature"}

SCREENED = frozenset({"Python", "Jupyter Notebook", *_GRAMMARS})
"""The languages that `parse` knows."""


def parse(text: str, language: str, path: str, *, enough: float = 0) -> Parsed | None:
    """What is wrong with a text in `language`; None where the language is not in `SCREENED`.

    A share up to `enough` may be told as more than it is, though not as over `enough`; of one above, all is told.
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
    grammar = next((name for ending, name in _BY_ENDING.items() if path.endswith(ending)), _GRAMMARS[language])
    parsed = _tree(code, grammar, enough)
    if language == "C" and path.endswith(".h") and parsed.error_share > enough:  # a header may be one of C++
        return min(parsed, _tree(code, "cpp", enough), key=lambda found: found.error_share)
    return parsed


def _python(text: str) -> Parsed:
    surely_python = getattr(native(), "surely_python", None)  # None where it is not built: csrc/cpp/python_statements.h
    if surely_python is not None and surely_python(text):
        return _GOOD
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


def _tree(code: bytes, grammar: str, enough: float) -> Parsed:
    """The share of `code` that was skipped; nobody counts on below `enough`, whatever is left to look at."""
    tree = _parser(grammar).parse(code)
    root = tree.root_node
    if not root.has_error:
        return Parsed(error_share=0, tree=tree)
    skipped, rows = 0, []
    pending, left = [root], _size(root)  # nodes with an error in them, or that are one, and their bytes
    while pending and (skipped + left) > enough * len(code):
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
    problem = f"line {min(rows) + 1}" if rows else None
    return Parsed(error_share=min((skipped + left) / max(len(code), 1), 1.0), problem=problem, tree=tree)


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
    """Literate Haskell: lines behind `>`, or between `\\begin{code}` and `\\end{code}`."""
    lines = [f" {line[1:]}" for line in text.split("\n") if line.startswith(">")]
    return "\n".join(lines) if lines else _between(r"\\begin\{code\}", r"\\end\{code\}")(text)


_CODE: dict[str, Callable[[str], str]] = {
    "Literate Agda": _between(r"\\begin\{code\}", r"\\end\{code\}"),
    "Literate Haskell": _bird_tracks,
    "RMarkdown": _between(r"```+ *\{ *[rR]\b", r"```"),
}
"""For literate languages, the code in the document."""
