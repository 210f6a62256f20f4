"""Where shard tasks run: on this machine's cores, on a Ray cluster, or as a Slurm job array.

A task is a pure function of files and writes its result under names that the plan fixes, so the corpus is the same on
any engine, byte for byte, and a task lost with its host is simply run again. The input and output folders must be the
same on every host (a shared file system), and so must the installed megacoder.
"""

import importlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import tyro

from megacoder.core.errors import ConfigError, CorpusError, MegacoderError
from megacoder.core.files import replacing
from megacoder.corpus.messages import from_json, to_json
from megacoder.corpus.pool import WorkerPool

__all__ = ["ClusterConfig", "run_on"]

_POLL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where shard tasks run; the output does not depend on it."""

    engine: Annotated[Literal["local", "ray", "slurm"], tyro.conf.arg(aliases=["--engine"])] = "local"
    """this machine's cores, an existing Ray cluster (extra `ray`), or Slurm (extra `slurm`)"""
    ray_address: Annotated[str, tyro.conf.arg(aliases=["--ray-address"])] = "auto"
    """HOST:PORT of the cluster's head; `auto` finds the one that was started on this host"""
    partition: str = ""
    """Slurm partition"""
    time: str = "20:00:00"
    """time limit of a Slurm job"""
    memory_gb: int = 2
    """memory of a Slurm task, in GB"""


def run_on(
    config: ClusterConfig,
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    *,
    pool: WorkerPool,
    work: Path,
    done: Callable[[Any], Any],
) -> list[Any]:
    """The results of `function(task)` in the order of `tasks`; `done(task)` is called as each one ends.

    `pool.workers` is how many run at a time, None: as many as fit; on a cluster the pool itself starts no process.
    `work` is a folder for the files that engines exchange. The first error that a task raises stops the run.
    """
    if config.engine == "ray":
        return _run_on_ray(config, function, tasks, pool.workers, done)
    if config.engine == "slurm":
        return _run_on_slurm(config, function, tasks, pool.workers, work, done)
    return pool.run(function, tasks, done=done)


def _run_on_ray(
    config: ClusterConfig,
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    workers: int | None,
    done: Callable[[Any], Any],
) -> list[Any]:
    ray = _extra("ray", "ray")
    if not ray.is_initialized():
        try:
            _knock(config.ray_address)
            ray.init(address=config.ray_address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            raise CorpusError(
                f"no Ray cluster at {config.ray_address!r} ({str(error).splitlines()[0]}); start one with "
                "`ray start --head` on one host and `ray start --address=HOST:6379` on the others"
            ) from None
    # tasks of a lost host are run again, however many hosts are lost
    remote = ray.remote(num_cpus=1, max_retries=-1, scheduling_strategy="SPREAD")(_call)
    results: dict[int, Any] = {}
    waiting = list(enumerate(tasks))[::-1]
    running: dict[Any, int] = {}
    most = workers or max(1, 2 * int(ray.cluster_resources().get("CPU", 1)))  # the next one is queued when one ends
    while waiting or running:
        while waiting and len(running) < most:
            index, task = waiting.pop()
            running[remote.remote(function, task)] = index
        ended, _ = ray.wait(list(running), num_returns=1)
        for reference in ended:
            index = running.pop(reference)
            results[index] = _result(ray.get(reference))
            done(tasks[index])
    return [results[index] for index in range(len(tasks))]


def _knock(address: str) -> None:
    """OSError if nothing listens at HOST:PORT, ValueError without a port; Ray itself would try for ten minutes."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=10).close()


def _call(function: Callable[[Any], Any], task: Any) -> tuple[Any, MegacoderError | None]:
    """Runs a task; errors meant for the user are returned, so that the engine adds no traceback."""
    try:
        return function(task), None
    except MegacoderError as error:
        return None, error


def _result(outcome: tuple[Any, MegacoderError | None]) -> Any:
    result, error = outcome
    if error is not None:
        raise error
    return result


def _run_on_slurm(
    config: ClusterConfig,
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    workers: int | None,
    work: Path,
    done: Callable[[Any], Any],
) -> list[Any]:
    """One job array through datatrove's executor, task i as rank i; their results come back as files."""
    executor = _extra("datatrove.executor.slurm", "slurm").SlurmPipelineExecutor
    folder = work / f"slurm-{function.__name__}-{time.time_ns()}"
    folder.mkdir(parents=True)
    for index, task in enumerate(tasks):
        (folder / f"task-{index:05d}").write_text(to_json(task))
    job = executor(
        pipeline=[_Step(function, folder)], tasks=len(tasks), workers=workers or -1,
        time=config.time, partition=config.partition, job_name=f"megacoder-{function.__name__}",
        logging_dir=str(folder / "logs"), mem_per_cpu_gb=config.memory_gb, venv_path=None,
        env_command=f"export PATH={Path(sys.executable).parent}:$PATH", qos="", max_array_launch_parallel=True,
    )  # fmt: skip
    job.run()
    missing = set(range(len(tasks)))
    while missing:
        alive = _in_queue(str(job.job_id))  # asked before looking for results: one may arrive in between
        for index in [index for index in missing if (folder / f"result-{index:05d}").exists()]:
            _result(from_json((folder / f"result-{index:05d}").read_text()))
            missing.remove(index)
            done(tasks[index])
        if missing and not alive:
            raise CorpusError(
                f"Slurm job {job.job_id} ended without {len(missing)} of {len(tasks)} tasks; see {folder / 'logs'}, "
                "then run the same command again"
            )
        if missing:
            time.sleep(_POLL_SECONDS)
    return [_result(from_json((folder / f"result-{index:05d}").read_text())) for index in range(len(tasks))]


class _Step:
    """A pipeline step as datatrove calls it, without datatrove's base class, which only the extra installs."""

    name = "megacoder"
    type = "megacoder"

    def __init__(self, function: Callable[[Any], Any], folder: Path) -> None:
        self._function, self._folder = function, folder

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        task = from_json((self._folder / f"task-{rank:05d}").read_text())
        with replacing(self._folder / f"result-{rank:05d}") as temporary:
            temporary.write_text(to_json(_call(self._function, task)))
        return data


def _in_queue(job: str) -> bool:
    asked = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False)
    return asked.returncode == 0 and bool(asked.stdout.strip())


def _extra(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"--engine {extra} needs an extra: pip install 'megacoder[{extra}]'") from None
