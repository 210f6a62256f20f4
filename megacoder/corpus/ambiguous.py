"""Extensions that several languages share: the text of a file decides which one it is in.

Text decides for these extensions only; for all others the table of `languages.py` decides by name. Patterns are tried
in order and the first that matches decides; the last row is the default. None stands for a language outside the table.
The patterns are this project's own; each looks for what one language writes on most pages and the others cannot.
"""

import re

__all__ = ["AMBIGUOUS", "candidate_languages", "settled_language"]

_OBJECTIVE_C = r"^[ \t]*@(?:interface|implementation|protocol|property|end|class|import)\b|^[ \t]*#[ \t]*import\b"
_CPP = (
    r"^[ \t]*(?:(?:template[ \t]*<|namespace\b[\w \t:]*\{?[ \t]*$|using[ \t]+(?:namespace\b|\w+[ \t]*=))"
    r"|(?:class|struct)[ \t]+(?:\w+[ \t]+)?\w+[ \t]*(?:final[ \t]*)?:[ \t]*(?:public|protected|private|virtual)\b"
    r"|class[ \t]+\w+[^;()]*$|(?:public|protected|private)[ \t]*:|#[ \t]*include[ \t]*<[a-z_]+>)"
)
_CPP_WORDS = r"\bstd::\w|\bvirtual\b[^;]*\(|\bconstexpr\b|\bnoexcept\b|\b(?:static|dynamic|reinterpret)_cast<"
_XML = r"\A\s*<(?:\?xml|!DOCTYPE|[A-Za-z])"
_PERL = (
    r"^[ \t]*(?:use[ \t]+(?:strict|warnings|v?5|[A-Z]\w*(?:::\w+)*)|package[ \t]+[\w:]+;|my[ \t]*[($@%]|sub[ \t]+\w+)"
)
_PROLOG = r"^[ \t]*:-[ \t]*\w+|^[a-z]\w*(?:\([^\n]*\))?[ \t]*:-"

_RULES: dict[str, list[tuple[str, str | None]]] = {
    "h": [(_OBJECTIVE_C, None), (_CPP, "C++"), (_CPP_WORDS, "C++"), ("", "C")],
    "m": [
        (_OBJECTIVE_C, None),
        (r"^[ \t]*\(\*|\b[A-Z]\w*\[[^\]\n]*\]|:=|^[ \t]*(?:Begin|End)Package\[", "Mathematica"),
        (r"^[ \t]*:-[ \t]*(?:module|interface|implementation)\b", None),
        (r"^[ \t]*(?:%|function\b|classdef\b|end\b|for\b|if\b|clc\b|clear\b|close all\b|\w+[ \t]*=[^=])", "MATLAB"),
        ("", None),
    ],
    "pl": [(_PERL, "Perl"), (r"\A#!.*\bperl\b", "Perl"), (_PROLOG, "Prolog"), ("", "Perl")],
    "pro": [(_PROLOG, "Prolog"), (r"^[a-z]\w*\([^\n]*\)\.[ \t]*$", "Prolog"), ("", None)],
    "t": [(_PERL, "Perl"), (r"\A#!.*\bperl\b", "Perl"), ("", None)],
    "v": [
        (r"^[ \t]*(?:module|`timescale|`include|`define|`ifn?def|primitive|endmodule|input\b|output\b)", "Verilog"),
        (r"^[ \t]*(?:Require|Theorem|Lemma|Definition|Inductive|Proof|From\b.*\bRequire|Section|Notation)\b", None),
        (r"^[ \t]*(?:fn|pub fn|import|struct)\b|^module[ \t]+\w+[ \t]*$", None),
        ("", "Verilog"),
    ],
    "r": [(r"^[ \t]*(?i:rebol)[ \t]*\[", None), ("", "R")],
    "ts": [(r"\A\s*<(?:\?xml|!DOCTYPE|TS\b)", None), ("", "TypeScript")],
    "tsx": [(r"\A\s*<(?:\?xml|tileset\b)", None), ("", "TypeScript")],
    "rs": [(_XML, None), (r"^#pragma[ \t]+(?:version|rs)\b", None), ("", "Rust")],
    "cs": [(r"^[ \t]*![\w\s]+methodsFor:", "Smalltalk"), ("", "C#")],
    "fs": [
        (r"^[ \t]*(?:#version\b|precision[ \t]|uniform[ \t]|varying[ \t]|void[ \t]+main\b|layout[ \t]*\()", "GLSL"),
        (r"^[ \t]*:[ \t]+\S+|^[ \t]*\\[ \t]", None),
        ("", "F#"),
    ],
    "frag": [
        (r"^[ \t]*(?:#version\b|precision[ \t]|uniform[ \t]|varying[ \t]|void[ \t]+main|layout|in|out)\b", "GLSL"),
        (r"\b(?:var|function)\b", "JavaScript"),
        ("", "GLSL"),
    ],
    "f": [(r"^[ \t]*:[ \t]+\S+[^\n]*;|^\\[ \t]", None), ("", "Fortran")],
    "ml": [
        (r"^[ \t]*(?:structure|functor|signature|datatype|fun[ \t]+\w+)\b[^\n]*=", "Standard ML"),
        ("", "OCaml"),
    ],
    "cl": [(r"\b__kernel\b|\bkernel[ \t]+void\b|\b__(?:global|local)\b|^[ \t]*#", None), ("", "Common Lisp")],
    "cls": [
        (r"\A\s*VERSION[ \t]+\d|^[ \t]*Attribute VB_", "Visual Basic"),
        (r"^[ \t]*[\\%]", "TeX"),
        ("", None),
    ],
    "sc": [(r"^[ \t]*(?:object|package|import|trait|case class|def|val)\b", "Scala"), ("", None)],
    "st": [(r"^[ \t]*!|\b(?:subclass:|methodsFor:)|\|[\w ]+\||:=", "Smalltalk"), ("", None)],
    "pp": [
        (r"^[ \t]*(?:class|define|node)[ \t]+[\w:'\"]+[^;]*\{|=>", None),
        (r"(?i)^[ \t]*(?:unit|program|interface|uses|procedure|function|begin)\b", "Pascal"),
        ("", None),
    ],
    "inc": [
        (r"\A\s*<\?", "PHP"),
        (r"(?i)^[ \t]*(?:procedure|function|unit|uses)\b[^\n]*;[ \t]*$|\{\$\w+", "Pascal"),
        (r"(?i)^[ \t]*(?:\.?(?:macro|equ|section|globl|byte|word)\b|[a-z_]\w*:|mov[ \t])", "Assembly"),
        (_CPP, "C++"),
        (_CPP_WORDS, "C++"),
        (r"^[ \t]*#[ \t]*(?:include|define|if|ifdef|ifndef)\b|^[\w* \t]+\([^\n]*\)[ \t]*\{", "C"),
        ("", None),
    ],
    "g": [(r"^[ \t]*(?:(?:lexer|parser|tree)[ \t]+)?grammar\b|^class[ \t]+\w+[ \t]+extends\b", "ANTLR"), ("", None)],
    "bs": [(r"^[ \t]*(?:module|package|import|interface|rules|instance|typeclass)\b", "Bluespec"), ("", None)],
    "hh": [(r"\A\s*<\?", "PHP"), ("", "C++")],
    "do": [
        (r"(?i)^[ \t]*(?:use|gen|generate|replace|reg|regress|local|foreach|clear|set|insheet)\b", "Stata"),
        ("", None),
    ],
    "fun": [(r"\b(?:functor|structure|signature|struct|fun|val)\b", "Standard ML"), ("", None)],
    "sig": [(r"\b(?:signature|structure|sig|val|type)\b", "Standard ML"), ("", None)],
    "frm": [(r"\A\s*VERSION[ \t]+\d|^[ \t]*(?:Begin|Attribute)[ \t]", "Visual Basic"), ("", None)],
    "y": [(r"^%%", "Yacc"), ("", None)],
    "md": [(r"\A\s*(?:;;|\(define_)", None), ("", "Markdown")],  # GCC's machine descriptions
}

_NEEDED = {_OBJECTIVE_C: ("@", "import"), _CPP_WORDS: ("std::", "virtual", "constexpr", "noexcept", "_cast<")}
"""Slow patterns -> strings of which every match holds at least one: a cheap test before the search."""

AMBIGUOUS = {
    extension: [
        (_NEEDED.get(pattern, ("",)), re.compile(pattern, re.MULTILINE), language) for pattern, language in rules
    ]
    for extension, rules in _RULES.items()
}
"""Extension -> (strings of which a match holds one, pattern, language), in the order in which they are tried."""

_LOOKED_AT = 32_768  # characters; the language shows early


def candidate_languages(path: str, by_name: str | None) -> frozenset[str]:
    """Every language that the file at `path` could be in; `by_name` is what the table says."""
    rules = AMBIGUOUS.get(_extension(path))
    found = [by_name] if rules is None else [language for _, _, language in rules]
    return frozenset(language for language in found if language is not None)


def settled_language(path: str, by_name: str | None, text: str) -> str | None:
    """The language of a file with this text, None if it is none of the table's."""
    rules = AMBIGUOUS.get(_extension(path))
    if rules is None:
        return by_name
    start = text[:_LOOKED_AT].replace("\r\n", "\n").replace("\r", "\n")
    return next(
        language
        for needed, pattern, language in rules
        if any(word in start for word in needed) and pattern.search(start)
    )


def _extension(path: str) -> str:
    stem, dot, extension = path.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot and stem else ""
