"""How a program of each language is compiled and run, and which tools that takes on this machine.

A tool is the first of its candidates that is installed. One that is missing is named before anything runs: it is the
machine's fault, and never counts against a model.
"""

import glob
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from megacoder.core.errors import ConfigError
from megacoder.evaluate.sandbox.program import PRELOADED_PYTHON, Limits, Program, Step

__all__ = ["LANGUAGES", "Language", "Toolchain", "find_toolchain", "installed_languages"]


@dataclass(frozen=True, kw_only=True)
class Language:
    """Words in braces are tools, each with the names it may be installed under in `tools`."""

    name: str
    file: str
    run: tuple[str, ...]
    compile: tuple[str, ...] = ()
    tools: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reserves: bool = False
    """whether its runtime reserves much more address space than it uses"""
    processes: int = 64
    """with threads, which some runtimes start by the dozen"""
    slower: float = 1.0
    """how many times the CPU time of a Python program is granted: start-up, and compilation while it runs"""
    environment: Mapping[str, str] = field(default_factory=dict)


def _language(
    name: str, file: str, run: str, compile: str = "", *, tools: Mapping[str, str], reserves: bool = False,
    runtime: bool = False, environment: Mapping[str, str] = MappingProxyType({}),
) -> Language:  # fmt: skip
    """`runtime`: one that reserves memory, starts threads and compiles while the program runs."""
    return Language(
        name=name, file=file, run=tuple(run.split()), compile=tuple(compile.split()),
        tools={tool: tuple(candidates.split()) for tool, candidates in tools.items()},
        reserves=reserves or runtime, processes=256 if runtime else 64, slower=2.0 if runtime else 1.0,
        environment=environment,
    )  # fmt: skip


_ALL = [
    Language(name="python", file="main.py", run=(PRELOADED_PYTHON, "main.py")),
    _language("cpp", "main.cpp", "./main", "{c++} -std=c++17 main.cpp -o main", tools={"c++": "g++ clang++"}),
    _language("java", "Main.java", "{java} -ea -Xss64m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -cp {jars} Main",
              "{javac} -J-XX:+UseSerialGC -J-XX:TieredStopAtLevel=1 -cp {jars} Main.java",
              tools={"java": "java", "javac": "javac"}, runtime=True),
    _language("js", "main.js", "{node} main.js", tools={"node": "node nodejs"}, runtime=True),
    _language("ts", "main.ts", "{node} main.js", "{tsc} --target ES2015 --lib ES2015,DOM main.ts",
              tools={"node": "node nodejs", "tsc": "tsc"}, runtime=True),
    _language("cs", "main.cs", "{mono} main.exe", "{mcs} -d:DEBUG -out:main.exe main.cs",
              tools={"mcs": "mcs", "mono": "mono"}, runtime=True),
    _language("php", "main.php", "{php} -f main.php", tools={"php": "php"}),
    _language("sh", "main.sh", "{bash} main.sh", tools={"bash": "bash"}),
    _language("go", "main.go", "./main", "{go} build -o main main.go", tools={"go": "go"}, runtime=True,
              environment={"GOCACHE": "/tmp/home/go-build", "GOPATH": "/tmp/home/go", "GO111MODULE": "off"}),
    _language("rust", "main.rs", "./main", "{rustc} -A warnings main.rs -o main", tools={"rustc": "rustc"},
              reserves=True),
    _language("ruby", "main.rb", "{ruby} main.rb", tools={"ruby": "ruby"}),
    _language("perl", "main.pl", "{perl} main.pl", tools={"perl": "perl"}),
    _language("r", "main.r", "{Rscript} --vanilla main.r", tools={"Rscript": "Rscript"}, reserves=True),
    _language("lua", "main.lua", "{lua} main.lua", tools={"lua": "lua lua5.4 lua5.3 lua5.2 lua5.1 luajit"}),
    _language("scala", "Main.scala", "{scala} -nocompdaemon -cp . Main", "{scalac} Main.scala",
              tools={"scala": "scala", "scalac": "scalac"}, runtime=True),
    _language("swift", "main.swift", "./main", "{swiftc} main.swift -o main", tools={"swiftc": "swiftc"},
              runtime=True),
    _language("julia", "main.jl", "{julia} --startup-file=no main.jl", tools={"julia": "julia"}, runtime=True),
    _language("racket", "main.rkt", "{racket} main.rkt", tools={"racket": "racket"}, reserves=True),
    _language("d", "main.d", "./main", "{dc} main.d -ofmain", tools={"dc": "ldmd2 dmd gdmd"}, reserves=True),
]  # fmt: skip
LANGUAGES: dict[str, Language] = {language.name: language for language in _ALL}
"""By the names that the multilingual HumanEval sets use, `python` apart."""
_ALIASES = {
    "py": "python", "c++": "cpp", "javascript": "js", "typescript": "ts", "c#": "cs", "csharp": "cs", "bash": "sh",
    "rs": "rust", "rb": "ruby", "pl": "perl", "jl": "julia", "rkt": "racket", "golang": "go",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """A language with its tools' paths on this machine."""

    language: Language
    paths: Mapping[str, str]

    @property
    def visible(self) -> list[str]:
        """Executables that the sandbox must show."""
        return [path for path in self.paths.values() if path.startswith("/")]

    def program(self, source: str, *, seconds: float, memory_mb: int = 2048) -> Program:
        """`source` to be compiled, within half a minute, and run for `seconds` of CPU time."""
        language = self.language
        limits = Limits(
            seconds=seconds * language.slower, memory_mb=memory_mb, processes=language.processes,
            address_space=not language.reserves,
        )  # fmt: skip
        compiling = replace(limits, seconds=30.0 * language.slower, address_space=False, processes=256)
        steps = [Step(argv=self._words(language.compile), limits=compiling)] if language.compile else []
        steps.append(Step(argv=self._words(language.run), limits=limits))
        return Program(files={language.file: source}, steps=tuple(steps), environment=language.environment)

    def _words(self, words: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self.paths[word[1:-1]] if word[:1] == "{" else word for word in words)


def find_toolchain(name: str) -> Toolchain:
    """The tools of a language; ConfigError for an unknown one, or for tools that are not installed."""
    key = _ALIASES.get(name.lower(), name.lower())
    if key not in LANGUAGES:
        raise ConfigError(f"language {name!r}: not one of {', '.join(LANGUAGES)}")
    language = LANGUAGES[key]
    paths = {tool: _find(candidates) for tool, candidates in language.tools.items()}
    missing = [" or ".join(language.tools[tool]) for tool, path in paths.items() if path is None]
    if missing:
        raise ConfigError(f"{key}: {', '.join(missing)} not installed; programs of this language cannot be run here")
    found = {tool: path for tool, path in paths.items() if path is not None}
    if key == "java":
        found["jars"] = ":".join([".", *_jars()])
    return Toolchain(language=language, paths=found)


def installed_languages() -> list[str]:
    """Those whose tools are all there."""
    names = []
    for name, language in LANGUAGES.items():
        if all(_find(candidates) for candidates in language.tools.values()):
            names.append(name)
    return names


def _find(candidates: tuple[str, ...]) -> str | None:
    for candidate in candidates:
        path = shutil.which(candidate)
        if path is None:
            continue
        if candidate == "rustc":  # rustup's stands for the compiler of the toolchain that is chosen, if one is
            asked = subprocess.run([path, "--print", "sysroot"], capture_output=True, text=True, check=False)
            if asked.returncode != 0:
                continue
            real = os.path.join(asked.stdout.strip(), "bin", "rustc")
            path = real if os.path.exists(real) else path
        return path
    return None


def _jars() -> list[str]:
    """javatuples, which HumanEval's Java programs import, where Debian or CLASSPATH have it."""
    known = os.environ.get("CLASSPATH", "").split(":")
    return [path for path in [*known, *glob.glob("/usr/share/java/javatuples*.jar")] if path.endswith(".jar")]
