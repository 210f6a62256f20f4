"""How a program of each language is compiled and run, and which tools that takes on this machine.

A tool is the first of its candidates that is installed. A missing tool is reported before anything runs: it is the
machine's fault, and never counts against a model.
"""

import glob
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace

from megacoder.core.errors import ConfigError
from megacoder.evaluate.sandbox.program import PRELOADED_PYTHON, Limits, Program, Step

__all__ = ["LANGUAGES", "Language", "Library", "Toolchain", "find_toolchain", "installed_languages", "short_name"]


@dataclass(frozen=True, kw_only=True)
class Library:
    """A library that tests of a published set need besides the tools."""

    mention: str
    """a program that contains this text needs the library"""
    install: str
    """what to install"""
    is_there: Callable[[Mapping[str, str]], bool]
    """given a toolchain's paths"""


@dataclass(frozen=True)
class Language:
    """Commands are split at blanks; a word in braces is a tool."""

    name: str
    file: str
    run: str
    compile: str = ""
    _: KW_ONLY
    tools: Mapping[str, str] = field(default_factory=dict)
    """the names that each may be installed under, separated by blanks"""
    runtime: bool = False
    """whether a runtime reserves memory, starts threads and compiles while the program runs"""
    reserves: bool = False
    """whether it reserves much more address space than it uses"""
    complaint: str = ""
    """pattern of a line on stderr that means a failed test, where the exit code does not tell"""
    silent: bool = False
    """whether a program that prints anything fails, as in the published harness"""
    links: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """words added to `compile` for a program that contains the key"""
    libraries: tuple[Library, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


_ALL = [
    Language("python", "main.py", f"{PRELOADED_PYTHON} main.py"),
    Language("cpp", "main.cpp", "./main", "{c++} -std=c++17 main.cpp -o main", tools={"c++": "g++ clang++"},
             links={"openssl/": ("-lcrypto", "-lssl")}),  # for HumanEval's task 162, an MD5 sum
    Language("java", "Problem.java", "{java} -ea -Xss64m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -cp {jars} Problem",
             "{javac} -J-XX:+UseSerialGC -J-XX:TieredStopAtLevel=1 -cp {jars} Problem.java",
             tools={"java": "java", "javac": "javac"}, runtime=True,
             libraries=(Library(mention="org.javatuples", install="javatuples, its jar in CLASSPATH",
                                is_there=lambda paths: ".jar" in paths["jars"]),)),
    Language("js", "main.js", "{node} main.js", tools={"node": "node nodejs"}, runtime=True, silent=True),
    Language("ts", "main.ts", "{node} main.js", "{tsc} --target ES2015 --lib ES2015,DOM main.ts",
             tools={"node": "node nodejs", "tsc": "tsc"}, runtime=True),
    Language("cs", "main.cs", "{mono} main.exe", "{mcs} -d:DEBUG -out:main.exe main.cs",
             tools={"mcs": "mcs", "mono": "mono"}, runtime=True,
             environment={"MONO_TRACE_LISTENER": "Console.Error"}, complaint=r"^Fail\b"),
    Language("php", "main.php", "{php} -f main.php", tools={"php": "php"}),
    Language("sh", "main.sh", "{bash} main.sh", tools={"bash": "bash"}),
    Language("go", "main_test.go", "./main", "{go} test -c -o main main_test.go", tools={"go": "go"}, runtime=True,
             environment={"GOCACHE": "/tmp/home/go-build", "GOPATH": "/tmp/home/go", "GO111MODULE": "off"}),
    Language("rust", "main.rs", "./main", "{rustc} -A warnings main.rs -o main", tools={"rustc": "rustc"},
             reserves=True),
    Language("ruby", "main.rb", "{ruby} main.rb", tools={"ruby": "ruby"}),
    Language("perl", "main.pl", "{perl} main.pl", tools={"perl": "perl"},
             libraries=(Library(mention="Test::Deep", install="Test::Deep (libtest-deep-perl)",
                                is_there=lambda paths: _succeeds(paths["perl"], "-MTest::Deep", "-e", "1")),)),
    Language("r", "main.r", "{Rscript} --vanilla main.r", tools={"Rscript": "Rscript"}, reserves=True),
    Language("lua", "main.lua", "{lua} main.lua", tools={"lua": "lua lua5.4 lua5.3 lua5.2 lua5.1 luajit"},
             libraries=(Library(mention="luaunit", install="luaunit (lua-unit)",
                                is_there=lambda paths: _succeeds(paths["lua"], "-e", "require('luaunit')")),)),
    Language("scala", "Problem.scala", "{scala} -nocompdaemon -cp . Problem", "{scalac} Problem.scala",
             tools={"scala": "scala", "scalac": "scalac"}, runtime=True),
    Language("swift", "main.swift", "./main", "{swiftc} main.swift -o main", tools={"swiftc": "swiftc"},
             runtime=True),
    Language("julia", "main.jl", "{julia} --startup-file=no main.jl", tools={"julia": "julia"}, runtime=True),
    Language("racket", "main.rkt", "{racket} main.rkt", tools={"racket": "racket"}, reserves=True,
             complaint=r"\S"),
    Language("d", "main.d", "./main", "{dc} -unittest main.d -ofmain", tools={"dc": "ldmd2 dmd gdmd"}, reserves=True),
]  # fmt: skip
LANGUAGES: dict[str, Language] = {language.name: language for language in _ALL}
"""By the names that the multilingual HumanEval sets use, except for `python`."""
_ALIASES = {
    "py": "python", "c++": "cpp", "javascript": "js", "typescript": "ts", "c#": "cs", "csharp": "cs", "bash": "sh",
    "rs": "rust", "rb": "ruby", "pl": "perl", "jl": "julia", "rkt": "racket", "golang": "go", "go_test.go": "go",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """A language with its tools' paths on this machine."""

    language: Language
    paths: Mapping[str, str]

    @property
    def visible(self) -> list[str]:
        """Executables and jars that the sandbox must show."""
        paths = [path for word in self.paths.values() for path in word.split(":")]
        return [path for path in paths if path.startswith("/")]

    def missing_libraries(self, source: str) -> list[str]:
        """What must be installed before `source` can run, besides the tools."""
        wanted = [library for library in self.language.libraries if library.mention in source]
        return [library.install for library in wanted if not library.is_there(self.paths)]

    def program(self, source: str, *, seconds: float, memory_mb: int = 2048) -> Program:
        """`source`, compiled within half a minute of CPU time and run within `seconds`; twice that with a runtime."""
        language = self.language
        slower = 2.0 if language.runtime else 1.0
        limits = Limits(
            seconds=seconds * slower, memory_mb=memory_mb, processes=256 if language.runtime else 64,
            address_space=not (language.reserves or language.runtime),
        )  # fmt: skip
        compiling = replace(limits, seconds=30.0 * slower, address_space=False, processes=256)
        links = [word for mention, words in language.links.items() if mention in source for word in words]
        steps = [Step(argv=(*self._words(language.compile), *links), limits=compiling)] if language.compile else []
        steps.append(
            Step(argv=self._words(language.run), limits=limits, complaint=language.complaint, silent=language.silent)
        )
        return Program(files={language.file: source}, steps=tuple(steps), environment=language.environment)

    def _words(self, command: str) -> tuple[str, ...]:
        return tuple(self.paths[word[1:-1]] if word[:1] == "{" else word for word in command.split())


def short_name(name: str) -> str:
    """The name in `LANGUAGES` of a language with several, such as `ts` for TypeScript; any other in lower case."""
    return _ALIASES.get(name.lower(), name.lower())


def find_toolchain(name: str) -> Toolchain:
    """The tools of a language; ConfigError for an unknown one, or for tools that are not installed."""
    key = short_name(name)
    if key not in LANGUAGES:
        raise ConfigError(f"language {name!r}: not one of {', '.join(LANGUAGES)}")
    language = LANGUAGES[key]
    paths = {tool: _find(candidates) for tool, candidates in language.tools.items()}
    missing = [language.tools[tool].replace(" ", " or ") for tool, path in paths.items() if path is None]
    if missing:
        raise ConfigError(f"{key}: {', '.join(missing)} not installed; programs of this language cannot be run here")
    found = {tool: path for tool, path in paths.items() if path is not None}
    if key == "java":
        found["jars"] = ":".join([".", *_jars()])
    return Toolchain(language=language, paths=found)


def installed_languages() -> list[str]:
    """Languages whose tools are all installed."""
    names = []
    for name, language in LANGUAGES.items():
        if all(_find(candidates) for candidates in language.tools.values()):
            names.append(name)
    return names


def _find(candidates: str) -> str | None:
    for candidate in candidates.split():
        path = shutil.which(candidate)
        if path is None:
            continue
        if candidate == "rustc":  # rustup's is a proxy for the chosen toolchain's compiler, if one is chosen
            asked = subprocess.run([path, "--print", "sysroot"], capture_output=True, text=True, check=False)
            if asked.returncode != 0:
                continue
            real = os.path.join(asked.stdout.strip(), "bin", "rustc")
            path = real if os.path.exists(real) else path
        return path
    return None


def _succeeds(*words: str) -> bool:
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def _jars() -> list[str]:
    """The jars in CLASSPATH, and Debian's javatuples, which HumanEval's Java programs import."""
    known = os.environ.get("CLASSPATH", "").split(":")
    return [path for path in [*known, *glob.glob("/usr/share/java/javatuples*.jar")] if path.endswith(".jar")]
