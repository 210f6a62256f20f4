"""The 87 languages of DeepSeek-Coder's corpus, and two kinds of text beside code, told apart by file name.

The names are Table 1's (arXiv 2401.14196); Markdown and reStructuredText are on the list in DeepSeek-Coder's
repository. The paper's own table of extensions is unpublished; this one gives every extension to one language, so that
a lookup reads no content. Extensions that several languages share (`.h`, `.m`, `.pl`, `.v`, ...) are settled by
content, in `ambiguous.py`; this table has what they mean by name alone.
"""

from dataclasses import dataclass

__all__ = [
    "BESIDE_CODE", "CODE_LANGUAGES", "LANGUAGES", "TEXT_LANGUAGES", "Language", "as_comment", "language_of",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Language:
    """One row of the table."""

    name: str
    extensions: tuple[str, ...]
    """lower case, without the dot"""
    filenames: tuple[str, ...]
    """complete file names, lower case"""
    comment: tuple[str, str]
    """what opens and closes a comment that fills a line"""


_SLASHES = ("// ", "")
_DASHES = ("-- ", "")
_SEMICOLONS = (";; ", "")
_PERCENT = ("% ", "")
_BLOCK = ("/* ", " */")
_ML = ("(* ", " *)")
_TAGS = ("<!-- ", " -->")
_APOSTROPHE = ("' ", "")
_HASH = ("# ", "")

# name: (extensions, how a comment opens and closes), in the order of the paper's Table 1
_TABLE: dict[str, tuple[str, tuple[str, str]]] = {
    "Ada": ("adb ads ada", _DASHES),
    "Agda": ("agda", _DASHES),
    "Alloy": ("als", _SLASHES),
    "ANTLR": ("g4 g", _SLASHES),
    "AppleScript": ("applescript", _DASHES),
    "Assembly": ("asm s nasm a51", ("; ", "")),
    "Augeas": ("aug", _ML),
    "AWK": ("awk gawk mawk", _HASH),
    "Batchfile": ("bat cmd", ("REM ", "")),
    "Bluespec": ("bsv bs", _SLASHES),
    "C": ("c h", _SLASHES),
    "C#": ("cs csx cake", _SLASHES),
    "Clojure": ("clj cljs cljc", _SEMICOLONS),
    "CMake": ("cmake", _HASH),
    "CoffeeScript": ("coffee cson iced", _HASH),
    "Common Lisp": ("lisp lsp cl asd", _SEMICOLONS),
    "C++": ("cpp cc cxx c++ hpp hh hxx h++ inl ipp tcc tpp", _SLASHES),
    "CSS": ("css", _BLOCK),
    "CUDA": ("cu cuh", _SLASHES),
    "Dart": ("dart", _SLASHES),
    "Dockerfile": ("dockerfile", _HASH),
    "Elixir": ("ex exs", _HASH),
    "Elm": ("elm", _DASHES),
    "Emacs Lisp": ("el emacs", _SEMICOLONS),
    "Erlang": ("erl hrl escript", _PERCENT),
    "F#": ("fs fsi fsx", _SLASHES),
    "Fortran": ("f90 f95 f03 f08 f for ftn f77", ("! ", "")),
    "GLSL": ("glsl vert frag geom comp tesc tese", _SLASHES),
    "Go": ("go", _SLASHES),
    "Groovy": ("groovy gradle gvy", _SLASHES),
    "Haskell": ("hs", _DASHES),
    "HTML": ("html htm xhtml", _TAGS),
    "Idris": ("idr", _DASHES),
    "Isabelle": ("thy", _ML),
    "Java": ("java", _SLASHES),
    "Java Server Pages": ("jsp jspx", ("<%-- ", " --%>")),
    "JavaScript": ("js mjs cjs jsx es6", _SLASHES),
    "JSON": ("json", _SLASHES),
    "Julia": ("jl", _HASH),
    "Jupyter Notebook": ("ipynb", _HASH),
    "Kotlin": ("kt kts", _SLASHES),
    "Lean": ("lean", _DASHES),
    "Literate Agda": ("lagda", _PERCENT),
    "Literate CoffeeScript": ("litcoffee", _HASH),
    "Literate Haskell": ("lhs", _PERCENT),
    "Lua": ("lua", _DASHES),
    "Makefile": ("mk mak make", _HASH),
    "Maple": ("mpl", _HASH),
    "Mathematica": ("nb wl wls wlt", _ML),
    "MATLAB": ("matlab", _PERCENT),
    "OCaml": ("ml mli mll mly", _ML),
    "Pascal": ("pas dpr lpr", _SLASHES),
    "Perl": ("pl pm perl plx psgi", _HASH),
    "PHP": ("php php3 php4 php5 phtml", _SLASHES),
    "PowerShell": ("ps1 psm1 psd1", _HASH),
    "Prolog": ("prolog pro yap", _PERCENT),
    "Protocol Buffer": ("proto", _SLASHES),
    "Python": ("py pyi pyw py3", _HASH),
    "R": ("r rsx", _HASH),
    "Racket": ("rkt rktd rktl scrbl", _SEMICOLONS),
    "RMarkdown": ("rmd", _TAGS),
    "Ruby": ("rb rake gemspec ru podspec thor", _HASH),
    "Rust": ("rs", _SLASHES),
    "SAS": ("sas", _BLOCK),
    "Scala": ("scala sbt sc", _SLASHES),
    "Scheme": ("scm ss sld sls sps", _SEMICOLONS),
    "Shell": ("sh bash zsh ksh bats", _HASH),
    "Smalltalk": ("st", ('"', '"')),
    "Solidity": ("sol", _SLASHES),
    "Sparql": ("sparql rq", _HASH),
    "SQL": ("sql", _DASHES),
    "Stan": ("stan", _SLASHES),
    "Standard ML": ("sml sig fun", _ML),
    "Stata": ("do ado", _SLASHES),
    "SystemVerilog": ("sv svh", _SLASHES),
    "TCL": ("tcl adp", _HASH),
    "Tcsh": ("tcsh csh", _HASH),
    "TeX": ("tex sty cls ltx dtx", _PERCENT),
    "Thrift": ("thrift", _SLASHES),
    "TypeScript": ("ts tsx mts cts", _SLASHES),
    "Verilog": ("v vh", _SLASHES),
    "VHDL": ("vhd vhdl", _DASHES),
    "Visual Basic": ("vb bas vbs frm", _APOSTROPHE),
    "XSLT": ("xslt xsl", _TAGS),
    "Yacc": ("y yy", _BLOCK),
    "YAML": ("yaml yml", _HASH),
    "Zig": ("zig", _SLASHES),
}

_TEXTS: dict[str, tuple[str, tuple[str, str]]] = {
    "Markdown": ("md markdown mdown mkd", _TAGS),
    "reStructuredText": ("rst", (".. ", "")),
}

_FILENAMES = {
    "CMake": "cmakelists.txt",
    "Dockerfile": "dockerfile containerfile",
    "Groovy": "jenkinsfile",
    "Makefile": "makefile gnumakefile",
    "Ruby": "rakefile gemfile podfile vagrantfile",
}

LANGUAGES: dict[str, Language] = {
    name: Language(
        name=name,
        extensions=tuple(extensions.split()),
        filenames=tuple(_FILENAMES.get(name, "").split()),
        comment=comment,
    )
    for name, (extensions, comment) in (_TABLE | _TEXTS).items()
}
"""By name."""

TEXT_LANGUAGES = frozenset(_TEXTS)
"""Natural language, read only where asked for by name: as a corpus of its own, it is mixed with code by weight."""

CODE_LANGUAGES = frozenset(_TABLE)
"""The paper's 87."""

BESIDE_CODE = frozenset({"JSON", "YAML", *_TEXTS})
"""Languages whose files alone do not make a folder a repository."""

_BY_EXTENSION = {extension: row.name for row in LANGUAGES.values() for extension in row.extensions}
_BY_FILENAME = {filename: row.name for row in LANGUAGES.values() for filename in row.filenames}


def language_of(path: str) -> str | None:
    """The language by file name, or None: `a/b.py` -> 'Python', `Makefile` -> 'Makefile'."""
    name = path.rpartition("/")[2].lower()
    stem, dot, extension = name.rpartition(".")
    by_extension = _BY_EXTENSION.get(extension) if dot and stem else None
    return by_extension or _BY_FILENAME.get(name)


def as_comment(line: str, language: str) -> str:
    """`line` as a comment of `language`."""
    opening, closing = LANGUAGES[language].comment
    return f"{opening}{line}{closing}"
