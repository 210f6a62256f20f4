"""A corpus from repositories, in passes over shards of whole repositories.

*Scan* reads each shard's files, runs the scan stages and writes texts, digests and drops to one Parquet file. The
*steps* see all shards and drop more files (`stages.py` lists stages and steps). The held-out part is chosen, and
cleared of copies of what is trained on. *Write* orders the files of each repository and writes the samples and the
record of every drop.

A shard task is a pure function of its inputs and is marked as done with a key over inputs and configuration, so that
after a crash the same command resumes where it stopped, and the output is the same for any number of workers.
`corpus.json` is written last: its presence says that the corpus is complete.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megacoder.core.console import progress, say
from megacoder.core.errors import CorpusError, DataError
from megacoder.corpus.accounts import (
    REPORT_NAME,
    Accounts,
    CorpusReport,
    heldout_repositories,
    load_report,
    save_report,
)
from megacoder.corpus.benchmarks import read_tests
from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.drops import DropFile, read_drops
from megacoder.corpus.engines import run_on
from megacoder.corpus.folder import WORK, claim_folder, give_up, keep_only
from megacoder.corpus.inputs import Inputs, find_inputs
from megacoder.corpus.leaks import drop_leaks
from megacoder.corpus.plan import gather_tables, plan_scans, table_states
from megacoder.corpus.pool import WorkerPool
from megacoder.corpus.scan import scan_shard
from megacoder.corpus.shards import disk_errors
from megacoder.corpus.sources import Source, machine_repositories
from megacoder.corpus.split import choose_heldout
from megacoder.corpus.stages import stage_names, steps
from megacoder.corpus.steps import RunTasks, Shard, hash_of
from megacoder.corpus.write import WriteTask, write_shard
from megacoder.data.parquet import read_table

__all__ = ["build_corpus"]

_COLUMNS = {"repository": "repo", "file": "path"}
"""What is held out as a whole, and the column of a shard that names it."""


def build_corpus(
    config: CorpusConfig, *, repositories: Sequence[Source] | None = None, quiet: bool = False
) -> CorpusReport:
    """Writes `train/`, `heldout/`, `dropped/` and `corpus.json` into `config.out`; what is finished there is reused.

    `repositories`, with unique names, replace those that `config.input` names. CorpusError if there is nothing to read
    or every file is dropped, or where the disk fails; ConfigError if the folder holds another corpus or two
    repositories share a name. A benchmark that cannot be read is reported before anything is read or written.
    """
    read_tests(config.benchmarks, config.decontamination.fields)
    if repositories is not None:
        inputs = Inputs(sources=tuple(repositories))
    else:
        inputs = find_inputs(config.input) if config.input else Inputs(sources=tuple(machine_repositories()))
    identity = config.identity()
    with claim_folder(config.out, identity), WorkerPool(config.workers) as pool:
        sources = [(source, source.inventory(config.selection)) for source in inputs.sources]
        told = [[source.identity(), found.fingerprint] for source, found in sources]
        key = hash_of([identity, told, table_states(inputs.tables)])
        if (report := _finished(config.out, key)) is not None:
            keep_only(config.out, report.files)
            return report
        run = _runner(config, pool, quiet)
        scans = plan_scans(sources, gather_tables(inputs, config, run), key, config)
        run(scan_shard, scans, "reading")
        shards = [
            Shard(name=f"{index:05d}", key=scan.key, scan_key=scan.key, scanned=scan.target, size=scan.size)
            for index, scan in enumerate(scans)
        ]
        for step in steps(config):
            shards = _without(shards, step(shards, config, run))
        unit, heldout = _hold_out(shards, config)
        shards = _without(shards, drop_leaks(shards, _COLUMNS[unit], heldout, run))
        if any(heldout) and not _holds(shards, _COLUMNS[unit], heldout):
            say("nothing is held out: all that was drawn for it are copies of files that are trained on")
            heldout = [frozenset[str]()] * len(shards)
        writes = _plan_writes(shards, unit, heldout, config)
        (config.out / REPORT_NAME).unlink(missing_ok=True)  # from here on, shards of an earlier corpus are replaced
        accounts, files = Accounts(dropped={name: {} for name in stage_names(config)}), {}
        for shard_accounts, shard_files in run(write_shard, writes, "writing"):
            accounts.merge(shard_accounts)
            files.update(shard_files)
        report = CorpusReport(
            key=key,
            config=identity,
            split_unit=unit if any(heldout) else "none",
            accounts=accounts,
            files=dict(sorted(files.items())),
        )
        with disk_errors(config.out):
            save_report(report, config.out)
        keep_only(config.out, files)
        return load_report(config.out)


def _finished(out: Path, key: str) -> CorpusReport | None:
    """The report in `out` if that corpus is complete and was built with `key`."""
    try:
        report = load_report(out)
    except DataError:
        return None
    if report.key == key and all((out / name).is_file() for name in report.files):
        return report
    say(f"{out}: the inputs have changed since it was built, or a file is missing; building again")
    return None


def _runner(config: CorpusConfig, pool: WorkerPool, quiet: bool) -> RunTasks:
    """Runs shard tasks, the largest first, under a progress bar over bytes."""

    def run(function: Callable[[Any], Any], tasks: Sequence[Any], title: str) -> list[Any]:
        sizes = [task.size for task in tasks]
        order = sorted(range(len(tasks)), key=lambda index: -sizes[index])
        completed = 0
        with progress(f"corpus: {title}", sum(sizes), quiet=quiet) as bar:

            def done(task: Any) -> None:
                nonlocal completed
                completed += task.size
                bar.update(completed, f"{completed / 1e6:.0f} MB")

            ordered = [tasks[index] for index in order]
            results = run_on(config.cluster, function, ordered, pool=pool, work=config.out / WORK, done=done)
        return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]

    return run


def _without(shards: Sequence[Shard], drops: Sequence[DropFile | None]) -> list[Shard]:
    return [shard.without(dropped) for shard, dropped in zip(shards, drops, strict=True)]


def _hold_out(shards: Sequence[Shard], config: CorpusConfig) -> tuple[str, list[frozenset[str]]]:
    """What is held out, repositories, or files where there is only one repository; and the names of each shard's."""
    sizes = _sizes_by("repo", shards)
    if not sizes:
        message = _nothing_left(shards)
        give_up(config.out, keep=(config.out / REPORT_NAME).exists())
        raise CorpusError(message)
    like = config.heldout.like
    unit = "repository" if like is not None or len(sizes) > 1 else "file"
    column = _COLUMNS[unit]
    if like is not None:
        chosen = heldout_repositories(like)
    else:
        chosen = choose_heldout(sizes if unit == "repository" else _sizes_by(column, shards), config.heldout)
    named = (shard.columns([column], shard.kept())[column].to_pylist() for shard in shards)
    return unit, [chosen.intersection(names) for names in named]


def _holds(shards: Sequence[Shard], column: str, heldout: Sequence[frozenset[str]]) -> bool:
    """Whether anything is left of `heldout`."""
    return any(
        not names.isdisjoint(shard.columns([column], shard.kept())[column].to_pylist())
        for shard, names in zip(shards, heldout, strict=True)
        if names
    )


def _plan_writes(
    shards: Sequence[Shard], unit: str, heldout: Sequence[frozenset[str]], config: CorpusConfig
) -> list[WriteTask]:
    writes = []
    for shard, units in zip(shards, heldout, strict=True):
        writes.append(
            WriteTask(
                key=hash_of([shard.key, unit, sorted(units)]),
                scanned=shard.scanned,
                size=sum(shard.columns(["size"], shard.kept())["size"].to_pylist()),
                name=shard.name,
                drops=shard.drops,
                heldout=units,
                by_file=unit == "file",
                config=config,
            )
        )
    return writes


def _nothing_left(shards: Sequence[Shard]) -> str:
    reasons: Counter[str] = Counter()
    for shard in shards:
        reasons.update(read_table(shard.scanned, ["reason"])["reason"].drop_null().to_pylist())
        reasons.update(reason for _, _, reason, _ in read_drops(shard.drops))
    if not reasons:
        return "the inputs hold no files"
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
    return f"nothing is left to train on: all {reasons.total()} files were dropped ({listed})"


def _sizes_by(column: str, shards: Sequence[Shard]) -> dict[str, int]:
    """Bytes of the kept files by repository or path; one shard's rows are in memory at a time."""
    sizes: dict[str, int] = {}
    for shard in shards:
        table = shard.columns([column, "size"], shard.kept())
        for name, size in zip(table[column].to_pylist(), table["size"].to_pylist(), strict=True):
            sizes[name] = sizes.get(name, 0) + size
    return sizes
