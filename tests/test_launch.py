"""The launch scripts start ranks that train: on one host, on several, and under a Slurm of stubs."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import wait_until
from kill_test import descendants
from network_hosts import free_port
from train_cases import make_case

from megacoder.checkpoint.reader import CheckpointReader
from megacoder.train.metrics_log import read_metrics

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "examples" / "launch"
LIMIT = 200
"""Far above what a run of a few steps takes: only one that hangs gets there."""
STUBS = {
    # every task of a step is a process here; all are waited for, and the worst of their exit codes is the step's
    "srun": """
        while [ "${1#--}" != "$1" ]; do shift; done
        pids=
        for task in $(seq "$SLURM_NNODES"); do "$@" & pids="$pids $!"; done
        worst=0
        for pid in $pids; do wait "$pid" || worst=$?; done
        exit "$worst"
    """,
    "scontrol": """
        [ "$1" = show ] && yes localhost | head -n "$SLURM_NNODES" && exit
        echo "$*" >> "$SLURM_STUB_LOG"
    """,
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of a host without GPUs, whose PATH has this interpreter and Slurm's stubs."""
    folder = tmp_path_factory.mktemp("stubs")
    for name, text in {**STUBS, "python": f'exec "{sys.executable}" "$@"\n'}.items():
        (folder / name).write_text("#!/bin/sh\n" + text)
        (folder / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1", "DEVICE": "cpu", "GPUS_PER_NODE": "2", "RESTARTS": "0", "PORT": str(free_port()),
        "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost[1-2]",
        "SLURM_STUB_LOG": str(folder / "scontrol.log"),
    }  # fmt: skip


def start(script, environment, *words, **more):
    return subprocess.Popen(
        ["bash", str(SCRIPTS / script), *map(str, words)], cwd=ROOT, env={**environment, **more},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process):
    """(exit code, what it printed); nothing is left running."""
    try:
        said = process.communicate(timeout=LIMIT)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def check_trained(folder, *, steps, layout):
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, steps + 1))
    reader = CheckpointReader(folder / "checkpoints")
    assert reader.step == steps
    assert reader.layout == {"tp": 1, "cp": 1, **layout}
    assert len(list((folder / "logs").rglob("stderr.log"))) >= layout["pp"] * layout["dp"], "every rank has its own"


def test_one_node(case, environment):
    process = start("single_node.sh", environment, "train", case.toml("one"), "--steps", 3)
    code, said = finish(process)
    assert code == 0, said
    assert "is writable" in said
    check_trained(case.folder / "one", steps=3, layout={"pp": 1, "dp": 2})


def test_several_nodes(case, environment):
    toml = case.toml("several")
    together = {"HEAD": "localhost", "NODES": "2", "GPUS_PER_NODE": "1"}
    processes = [start("multi_node.sh", environment, "train", toml, "--steps", 3, **together) for _ in range(2)]
    for code, said in [finish(process) for process in processes]:
        assert code == 0, said
    check_trained(case.folder / "several", steps=3, layout={"pp": 1, "dp": 2})


def small_33b(case, name, **changes):
    """Words that make the 33B recipe as small as the others here."""
    config = case.config(name)
    settings = {
        "output": config.output, "data.train": config.data.train[0], "data.weights": 1.0, "data.fim-rates": 0.5,
        "data.valid": config.data.valid[0], "data.tokenizer": config.data.tokenizer,
        "data.stream.seq-length": 32, "data.stream.num-streams": 16,
        "global-batch-size": 8, "micro-batch-size": 2, "eval-batches": 1, "dtype": "float32", "parallel.pp": 2,
        **{f"model.{key}": value for key, value in vars(config.model).items() if type(value) in (int, float)},
        **changes,
    }  # fmt: skip
    return [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def test_slurm_signals_ahead_of_time_and_the_job_queues_itself_again(case, environment):
    folder, log = case.folder / "queued", case.folder / "queued.log"
    words = small_33b(case, "queued", **{"schedule.warmup-steps": 2})
    process = start("slurm_33b_512.sh", environment, *words, GPUS_PER_NODE="1", SLURM_STUB_LOG=str(log))
    wait_until(lambda: len(read_metrics(folder / "metrics.jsonl")) >= 3 or process.poll() is not None, LIMIT)
    for pid in step_processes(process.pid) if process.poll() is None else ():
        os.kill(pid, signal.SIGUSR1)
    code, said = finish(process)
    assert code == 0, said
    check_trained(folder, steps=len(read_metrics(folder / "metrics.jsonl")), layout={"pp": 2, "dp": 1})
    assert log.read_text() == "requeue 7\n"


def test_slurm_requeues_a_job_that_ends_at_once_but_not_a_finished_one(case, environment):
    toml, log = case.toml("done"), case.folder / "done.log"
    more = {"GPUS_PER_NODE": "1", "SLURM_STUB_LOG": str(log)}
    code, said = finish(start("slurm.sh", environment, "train", toml, "--model.vocab-size", "999", **more))
    assert code != 0
    times = said.count("megacoder: model.vocab_size = 999, but the tokenizer")
    assert times in (1, 2), "once on each host, unless the other's end came first"
    assert not read_metrics(case.folder / "done" / "metrics.jsonl")
    assert log.read_text() == "requeue 7\n", "the script cannot tell a mistake in the settings from a fault"
    code, said = finish(start("slurm.sh", environment, "train", toml, "--steps", "3", **more))
    assert code == 0, said
    check_trained(case.folder / "done", steps=3, layout={"pp": 1, "dp": 2})
    assert log.read_text() == "requeue 7\n"


def test_slurm_requeues_after_progress_and_three_times_in_a_row_without(tmp_path, environment):
    """`srun` is a stub here that leaves behind what a run would have, and fails."""
    output, log, stubs = tmp_path / "run", tmp_path / "scontrol.log", tmp_path / "stubs"
    stubs.mkdir()
    log.touch()
    for name, text in {
        "python": f"""printf 'output = "{output}"\\nsteps = 8\\n'""",
        "srun": f"""case "$*" in *check_environment*) exit 0;; esac; cd {output}; eval "$LEAVES"; exit 1""",
    }.items():
        (stubs / name).write_text(f"#!/bin/sh\n{text}\n")
        (stubs / name).chmod(0o755)
    path = f"{stubs}:{environment['PATH']}"

    def requeued(leaves, *, job="7"):
        before = len(log.read_text().splitlines())
        more = {"PATH": path, "LEAVES": leaves, "SLURM_STUB_LOG": str(log), "SLURM_JOB_ID": job}
        code, said = finish(start("slurm.sh", environment, "train", "run.toml", **more))
        assert code == 1
        return len(log.read_text().splitlines()) - before, said

    def logs(*steps):
        return "".join(f"""echo '{{"step": {step}, "loss": 1}}' {'>>' if n else '>'} metrics.jsonl; """
                       for n, step in enumerate(steps))  # fmt: skip

    assert [requeued(":") for _ in range(3)] == [(1, "")] * 3
    left = f"see {output}/logs/7\n"
    assert requeued(":") == (0, f"not requeued: the job has ended four times in a row without progress; {left}")
    assert requeued(":", job="8") == (1, ""), "another job counts anew"
    assert requeued(logs(1, 2, 3)) == (1, ""), "a fault before the first checkpoint"
    assert [requeued(logs(1, 2, 3)) for _ in range(3)] == [(1, "")] * 3, "no further than before"
    assert requeued(logs(1, 2))[0] == 0
    assert requeued(logs(*range(1, 12))) == (1, "")
    assert [requeued(logs(*range(1, end))) for end in (6, 12, 8)] == [(1, "")] * 3, "no further than ever"
    assert requeued(logs(*range(1, 10)))[0] == 0
    assert requeued("mkdir -p checkpoints/step-00000004; " + logs(1, 2)) == (1, "")
    assert requeued("touch stopped") == (0, f"not requeued: {output}/stopped says why the run has ended\n")
    assert requeued("rm stopped; mkdir checkpoints/step-00000008") == (0, "")


def step_processes(pid):
    """Slurm signals every process of a job's steps, here those below `srun`, and not the script that starts them."""
    step = next(below for below in descendants(pid) if b"srun" in Path(f"/proc/{below}/cmdline").read_bytes())
    return descendants(step)


def test_both_slurm_scripts_of_33b_differ_only_in_nodes():
    small, large = ((SCRIPTS / f"slurm_33b_{gpus}.sh").read_text() for gpus in (512, 1024))
    nodes = [int(re.search(r"^#SBATCH --nodes=(\d+)$", text, re.MULTILINE)[1]) for text in (small, large)]
    assert nodes == [64, 128]
    assert [line for line in small.splitlines() if "nodes" not in line and "#   " not in line] == [
        line for line in large.splitlines() if "nodes" not in line and "#   " not in line
    ]
