"""Several hosts, as far as training can tell: network namespaces with their own addresses, names and links.

torchrun's rendezvous uses those addresses. A run gives the losses of one host, also while hosts come and go; cutting a
link ends it on both sides.
"""

import contextlib
import os
import signal
import sys
import time

import pytest
from command_line import wait_until
from network_hosts import Hosts, need_namespaces
from train_cases import losses_of, make_case

from megacoder.checkpoint.folders import CHECKPOINTS, open_checkpoint, step_folders
from megacoder.parallel.config import ParallelConfig
from megacoder.train.loop import train
from megacoder.train.metrics_log import read_metrics

LIMIT = 100
"""Far above what a run and its time-outs take: only one that hangs gets there."""
PORT = 29400
STATIC, C10D = "static", "c10d"
MEET = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"10.98.7.1:{PORT}", "--rdzv-id", "test"]


def torchrun(hosts, rendezvous, *arguments):
    """One process per host; their torchruns, first host first."""
    nnodes, runs = len(hosts.names) - 1, []
    for host in range(1, nnodes + 1):
        meet = {
            C10D: MEET,
            STATIC: ["--node-rank", str(host - 1), "--master-addr", "10.98.7.1", "--master-port", str(PORT)],
        }[rendezvous]
        runs.append(start(hosts, host, ["--nnodes", str(nnodes), *meet], *arguments))
    return runs


def start(hosts, host, options, *arguments):
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", *options]
    return hosts.start(host, *run, "-m", "megacoder", *arguments, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


def outputs(runs):
    """[(exit code, lines of megacoder's ranks)] of each; nothing is left running."""
    try:
        texts = [run.communicate(timeout=LIMIT)[1] for run in runs]
    finally:
        for run in runs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    return [
        (run.returncode, [line for line in text.splitlines() if line.startswith("megacoder: ")], text)
        for run, text in zip(runs, texts, strict=True)
    ]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    need_namespaces()
    return make_case(tmp_path_factory.mktemp("multinode"))


@pytest.mark.parametrize(
    ("size", "rendezvous", "parallel"),
    [(2, C10D, ParallelConfig()), (2, STATIC, ParallelConfig(tp=2)), (3, C10D, ParallelConfig(pp=3))],
)
def test_hosts_compute_the_same_as_one_process(case, tmp_path, size, rendezvous, parallel):
    alone = case.config(f"alone-{size}-{rendezvous}", steps=4)
    train(alone)
    toml = case.toml(f"hosts-{size}-{rendezvous}", steps=4, parallel=parallel, timeout_seconds=30.0)
    with Hosts(size, tmp_path) as hosts:
        for code, _, text in outputs(torchrun(hosts, rendezvous, "train", str(toml))):
            assert code == 0, text
    assert losses_of(case.folder / f"hosts-{size}-{rendezvous}") == pytest.approx(losses_of(alone.output), rel=1e-5)


@pytest.mark.parametrize("rendezvous", [C10D, STATIC])
def test_a_cut_link_ends_both_sides_with_the_reason(case, tmp_path, rendezvous):
    name = f"cut-{rendezvous}"
    toml = case.toml(name, steps=1_000_000, checkpoint_every=1_000_000, timeout_seconds=4.0)
    with Hosts(2, tmp_path) as hosts:
        runs = torchrun(hosts, rendezvous, "train", str(toml))
        wait_until(lambda: len(read_metrics(case.folder / name / "metrics.jsonl")) >= 3, LIMIT)
        time.sleep(2.0)
        hosts.cut(2)
        (first_code, first, first_text), (second_code, second, second_text) = outputs(runs)
    assert first_code != 0
    assert second_code != 0
    for lines, text in ((first, first_text), (second, second_text)):
        assert len(lines) == 1, text
        assert lines[0].startswith("megacoder: rank 1 (host host-2, node 1, pid ")
    assert " has not answered for " in first[0]
    assert "; rank 0 at step " in first[0]
    assert ", microbatch " in second[0]
    assert " over ranks 0, 1 failed: Timed out" in second[0]
    assert second[0].endswith(" does not answer either: its host is down or the network is cut")


def test_a_run_goes_on_with_the_host_that_is_left_and_again_with_one_that_joins(case, tmp_path):
    settings = {"checkpoint_every": 20, "schedule": {"kind": "constant"}, "global_batch_size": 64}
    toml = case.toml("elastic", steps=1_000_000, timeout_seconds=4.0, **settings)
    patience = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=5"  # a third of torch's own
    options = ["--nnodes", "1:2", "--max-restarts", "2", *MEET, "--rdzv-conf", patience]
    output, runs = case.folder / "elastic", []

    def wait_for_save(dp, after):
        """Step of a checkpoint that `dp` ranks have written past step `after`."""
        wait_until(lambda: layout_of_newest(output, after) == dp, LIMIT)
        return step_folders(output / CHECKPOINTS)[-1][0]

    with Hosts(2, tmp_path) as hosts:
        try:
            runs += [start(hosts, host, options, "train", str(toml)) for host in (1, 2)]
            step = wait_for_save(dp=2, after=0)
            for pid in hosts.pids(2):
                os.kill(pid, signal.SIGKILL)
            step = wait_for_save(dp=1, after=step)
            runs.append(start(hosts, 2, options, "train", str(toml)))
            step = wait_for_save(dp=2, after=step)
        finally:
            for pid in hosts.pids(1) + hosts.pids(2):
                os.kill(pid, signal.SIGKILL)
            texts = [run.communicate()[1] for run in runs]
    assert "rank 1 (host host-2, node 1, pid " in texts[0], texts[0]
    alone = case.config("elastic-alone", steps=step, **settings)
    train(alone)
    assert losses_of(output)[:step] == pytest.approx(losses_of(alone.output), rel=1e-4)


def layout_of_newest(output, after):
    """Data-parallel ranks that wrote the newest checkpoint, if it is past step `after`."""
    saved = step_folders(output / CHECKPOINTS)
    return open_checkpoint(saved[-1][1]).layout["dp"] if saved and saved[-1][0] > after else None
