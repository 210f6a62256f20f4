"""Several hosts, as far as training can tell: network namespaces with their own addresses, names and links.

torchrun's rendezvous uses those addresses. A run gives the losses of one host; cutting a link ends it on both sides.
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

from megacoder.parallel.config import ParallelConfig
from megacoder.train.loop import train
from megacoder.train.metrics_log import read_metrics

LIMIT = 100
"""Far above what a run and its time-outs take: only one that hangs gets there."""
PORT = 29400
STATIC, C10D = "static", "c10d"


def torchrun(hosts, rendezvous, *arguments):
    """One process per host; their torchruns, first host first."""
    nnodes, runs = len(hosts.names) - 1, []
    for host in range(1, nnodes + 1):
        meet = {
            C10D: ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"10.98.7.1:{PORT}", "--rdzv-id", "test"],
            STATIC: ["--node-rank", str(host - 1), "--master-addr", "10.98.7.1", "--master-port", str(PORT)],
        }[rendezvous]
        run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nnodes), "--nproc-per-node", "1", *meet]
        runs.append(hosts.start(host, *run, "-m", "megacoder", *arguments))
    return runs


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
