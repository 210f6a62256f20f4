"""The stages, in order, each skipped when its output is there already.

Every stage is a command of its own (`corpus build`, `tokenizer train`, `preprocess`, `train`, `eval`, `checkpoint
export`) and writes its output whole or not at all, so that after Ctrl-C or a crash the same command goes on. The options
of a folder are fixed by its first run.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megacoder.cli.corpus_report import print_report
from megacoder.cli.quickstart.options import Places, QuickstartOptions
from megacoder.cli.quickstart.recipe import choose_recipe, run_config, seconds_per_step, steps_within
from megacoder.core.config import load_toml, parse_args, to_dict, to_toml
from megacoder.core.console import say
from megacoder.core.device import probe
from megacoder.core.errors import ConfigError
from megacoder.core.files import write_json, write_text
from megacoder.corpus.build import build_corpus
from megacoder.corpus.config import CorpusConfig
from megacoder.train.config import RunConfig
from megacoder.train.launch import launch_workers

__all__ = ["main", "run_quickstart"]


def main(argv: Sequence[str]) -> None:
    """Runs or resumes every stage and ends with three infilled holes and the place of the report."""
    run_quickstart(parse_args(QuickstartOptions, argv, prog="megacoder quickstart"))
