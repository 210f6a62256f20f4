"""Hosts of their own, as far as training can tell: network namespaces with their own addresses, names and links.

torchrun meets over those addresses. The same run gives the same losses, and a link that is cut ends it on both sides.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from train_cases import make_case

from megacoder.parallel.config import ParallelConfig
from megacoder.train.loop import train
from megacoder.train.metrics_log import read_metrics

ROOT = Path(__file__).parent.parent
LIMIT = 100
"""Far above what a run and its time-outs take: only one that hangs gets there."""
PORT = 29400
STATIC, C10D = "static", "c10d"


class Hosts:
    """`size` namespaces on one bridge, which has a namespace of its own; host i is 10.98.7.i, its name host-i."""

    def __init__(self, size, folder):
        self.names = [f"megacoder-{uuid.uuid4().hex[:6]}-{index}" for index in range(size + 1)]
        self.folder = folder
        lines = ["127.0.0.1 localhost", *(f"10.98.7.{host} host-{host}" for host in range(1, size + 1))]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        (folder / "resolv.conf").write_text("")  # nobody to ask, so that nobody waits for an answer

    def __enter__(self):
        switch = self.names[0]
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for host, name in enumerate(self.names[1:], 1):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("link", "add", "eth", "netns", name, "type", "veth", "peer", "name", f"port{host}", "netns", switch)
            ip("-n", name, "addr", "add", f"10.98.7.{host}/24", "dev", "eth")
            ip("-n", name, "link", "set", "eth", "up")
            ip("-n", switch, "link", "set", f"port{host}", "master", "bridge", "up")
        return self

    def __exit__(self, *exception):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def cut(self, host):
        ip("-n", self.names[host], "link", "set", "eth", "down")

    def torchrun(self, rendezvous, *arguments):
        """One process per host; their torchruns, first host first."""
        nnodes, runs = len(self.names) - 1, []
        for host, name in enumerate(self.names[1:], 1):
            meet = {
                C10D: ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"10.98.7.1:{PORT}", "--rdzv-id", "test"],
                STATIC: ["--node-rank", str(host - 1), "--master-addr", "10.98.7.1", "--master-port", str(PORT)],
            }[rendezvous]
            identity = (
                f"hostname host-{host}; mount --bind {self.folder}/hosts /etc/hosts;"
                f'mount --bind {self.folder}/resolv.conf /etc/resolv.conf; exec "$@"'
            )
            command = [
                "ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", identity, "sh",
                sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nnodes), "--nproc-per-node", "1", *meet,
                "-m", "megacoder", *arguments,
            ]  # fmt: skip
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            runs.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
                )
            )
        return runs


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


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
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs `ip` of iproute2 and `unshare` of util-linux")
    probe = f"megacoder-{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", probe], check=False, capture_output=True).returncode:
        pytest.skip("may not make network namespaces: needs root and CAP_SYS_ADMIN")
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return make_case(tmp_path_factory.mktemp("multinode"))


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("size", "rendezvous", "parallel"),
    [(2, C10D, ParallelConfig()), (2, STATIC, ParallelConfig(tp=2)), (3, C10D, ParallelConfig(pp=3))],
)
def test_hosts_compute_what_one_process_does(case, tmp_path, size, rendezvous, parallel):
    alone = case.config(f"alone-{size}-{rendezvous}", steps=4)
    train(alone)
    toml = case.toml(f"hosts-{size}-{rendezvous}", steps=4, parallel=parallel, timeout_seconds=30.0)
    with Hosts(size, tmp_path) as hosts:
        for code, _, text in outputs(hosts.torchrun(rendezvous, "train", str(toml))):
            assert code == 0, text
    assert losses(case.folder / f"hosts-{size}-{rendezvous}") == pytest.approx(losses(alone.output), rel=1e-5)


@pytest.mark.parametrize("rendezvous", [C10D, STATIC])
def test_a_cut_link_ends_both_sides_with_the_reason(case, tmp_path, rendezvous):
    name = f"cut-{rendezvous}"
    toml = case.toml(name, steps=1_000_000, checkpoint_every=1_000_000, timeout_seconds=4.0)
    with Hosts(2, tmp_path) as hosts:
        runs = hosts.torchrun(rendezvous, "train", str(toml))
        deadline = time.monotonic() + LIMIT
        while len(read_metrics(case.folder / name / "metrics.jsonl")) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2.0)
        hosts.cut(2)
        (first_code, first, first_text), (second_code, second, second_text) = outputs(runs)
    assert first_code != 0
    assert second_code != 0
    assert len(first) == 1, first_text
    assert first[0].startswith("megacoder: rank 1 (host host-2, node 1, pid ")
    assert " has not answered for " in first[0]
    assert "; rank 0 at step " in first[0]
    assert len(second) == 1, second_text
    assert second[0].startswith("megacoder: rank 1 (host host-2, node 1, pid ")
    assert ", microbatch " in second[0]
    assert " over ranks 0, 1 failed: Timed out" in second[0]
    assert second[0].endswith(" does not answer either: its host is down or the network is cut")
