"""Gathers real source code for bench_corpus.py: Debian source packages and PyPI archives, one folder a repository.

    python tools/corpus_sources.py /tmp/bench-corpus

Needs apt-get, dpkg-source and a network once; sources already in the folder are not fetched again. The system's
package lists are not touched: apt works in folders of its own. Packages are named without versions, so a later run may
get different files; a benchmark's record gives the number of files and bytes.
"""

import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from bench_common import run_tool
from tyro.conf import Positional

from megacoder.core.config import parse_args

__all__ = ["gather"]

DEBIAN = """
    redis leveldb sqlite3 nginx curl lua5.4 zstd jansson fmtlib spdlog rapidjson protobuf
    guava-libraries commons-lang3 gson junit5 jackson-databind netty libspring-java
    mono kotlin scala php-symfony wordpress phpmyadmin rails jekyll vagrant
    node-typescript node-undici node-webpack node-rollup angular.js d3 vue.js
    golang-1.19 prometheus hugo docker.io rust-regex rust-syn rust-tokio cargo ghc-testsuite pandoc julia
    erlang elixir-lang ocaml emacs-ess texlive-extra cmake vim tcllib r-cran-dplyr perl
""".split()  # noqa: SIM905
PYPI = """
    Django==4.2.1 Django==4.2.11 Django==5.0 Flask==2.3.0 Flask==2.3.3 networkx==3.2 networkx==3.2.1
    SQLAlchemy==2.0.20 SQLAlchemy==2.0.23 sympy==1.12 scikit-learn==1.3.2 pandas==2.1.4 scipy==1.11.4
    matplotlib==3.8.2 requests==2.31.0 requests==2.32.0 pytest==7.4.0 pytest==7.4.3 ansible==8.7.0 botocore==1.34.0
    transformers==4.36.0 transformers==4.36.2 twisted==23.10.0 salt==3006.5
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Options:
    """Gathers source code of Debian and PyPI."""

    folder: Positional[Path]
    """where to; what is there is kept"""


def gather(folder: Path) -> None:
    """Fetches and unpacks what is missing under `folder/repos`; what cannot be had is named and left out."""
    archives, repos = folder / "archives", folder / "repos"
    for path in (archives, repos, folder / "apt/lists/partial", folder / "apt/cache/archives/partial"):
        path.mkdir(parents=True, exist_ok=True)
    for package in PYPI:
        if not (repos / package).exists():
            _pypi(package, archives, repos)
    apt = _apt(folder / "apt")
    subprocess.run([*apt, "-qq", "update"], check=False)
    for package in DEBIAN:
        if not (repos / package).exists():
            _debian(package, apt, archives, repos)


def _pypi(package: str, archives: Path, repos: Path) -> None:
    target = archives / package
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":none:", "-d", str(target)]
    if subprocess.run([*fetch, package], check=False, capture_output=True).returncode:
        print(f"{package}: not available")
        return
    for archive in target.iterdir():
        place = repos / package
        if archive.suffix in (".whl", ".zip"):
            zipfile.ZipFile(archive).extractall(place)
        else:
            with tarfile.open(archive) as opened:
                opened.extractall(place, filter="data")
    print(package)


def _apt(folder: Path) -> list[str]:
    """apt-get with sources and lists of its own."""
    sources = folder / "sources.list"
    sources.write_text("deb-src http://deb.debian.org/debian bookworm main\n")
    options = {
        "Dir::Etc::sourcelist": sources, "Dir::Etc::sourceparts": "-", "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder / "cache", "APT::Get::List-Cleanup": 0,
    }  # fmt: skip
    return ["apt-get", *(f"-o{name}={value}" for name, value in options.items())]


def _debian(package: str, apt: list[str], archives: Path, repos: Path) -> None:
    target = archives / package
    target.mkdir(exist_ok=True)
    done = subprocess.run(
        [*apt, "-qq", "source", "--download-only", package], check=False, cwd=target, capture_output=True
    )
    descriptions = list(target.glob("*.dsc"))
    if done.returncode or not descriptions:
        print(f"{package}: not available")
        return
    unpack = ["dpkg-source", "--no-check", "--skip-patches", "-x", str(descriptions[0]), str(repos / package)]
    subprocess.run(unpack, check=False, capture_output=True)
    print(package)


def main() -> None:
    """The command."""
    gather(parse_args(Options, None, prog="corpus_sources.py").folder)


if __name__ == "__main__":
    run_tool(main)
