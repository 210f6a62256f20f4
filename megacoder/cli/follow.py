"""`megacoder eval NAME --follow`: a training run's checkpoints, scored beside it as they appear.

The checkpoints that are there are scored in order of step, each loaded alone; then the folder is looked at every few
seconds until the run has ended: all its steps are done, or its guard has stopped it. A run that was interrupted has not
ended, since it may be resumed. What is scored is written at once (`megacoder.train.scores`), so that the same command
goes on after an interruption. A checkpoint that the run removes first, or that is damaged, is named and left out.
"""

import gc
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch

from megacoder.checkpoint.folders import CHECKPOINTS, open_checkpoint, step_folders
from megacoder.checkpoint.manifest import MANIFEST
from megacoder.cli.eval_inputs import model_content
from megacoder.core.config import load_toml
from megacoder.core.console import counted, say
from megacoder.core.errors import CheckpointError, ConfigError, MegacoderError
from megacoder.core.files import exclusive
from megacoder.evaluate.benchmarks.scoring import keep_settings
from megacoder.train.config import RUN_TOML, RunConfig
from megacoder.train.run_folder import STOPPED
from megacoder.train.scores import ScoreLog, scores_folder

__all__ = ["follow"]

_LOOK_SECONDS = 5.0


def follow(
    run: Path, name: str, score: Callable[[Path], dict[str, float]], *, settings: dict[str, Any], as_json: bool
) -> None:  # fmt: skip
    """Prints a line with the `score` of each checkpoint of `run` until the run has ended; `name` is what is measured.

    Scores made with other `settings` (see `eval_inputs.settings_of`) under that name are a ConfigError.
    """
    if not (run / RUN_TOML).is_file():
        raise ConfigError(f"--follow --model {run}: no {RUN_TOML} in it; give the `output` of a run that has begun")
    folder, option = scores_folder(run, name), "--follow-as"
    with exclusive(folder, what="follower", instead=f"another {option}"), closing(ScoreLog(run, name)) as log:
        fixed = {key: value for key, value in settings.items() if key != "model"}  # the run's folder may move
        keep_settings(folder, fixed, has_lines=lambda: bool(log.rows), option=option)
        _Follower(run, name, score, log, protocol=settings["protocol"], as_json=as_json).run_to_end()


class _Follower:
    def __init__(
        self, run: Path, name: str, score: Callable[[Path], dict[str, float]], log: ScoreLog, *, protocol: int,
        as_json: bool,
    ) -> None:  # fmt: skip
        self.run, self.name, self.score, self.log = run, name, score, log
        self.protocol, self.as_json = protocol, as_json
        self._seen: dict[int, tuple[int, int] | None] = {}

    def run_to_end(self) -> None:
        if self.log.rows:
            say(f"{self.run}: {counted(len(self.log.rows), 'checkpoint is', 'checkpoints are')} scored already")
        waiting = False
        while True:
            end = self._end()  # before the folder is looked at: a run that has ended adds no checkpoint
            found = [(step, folder) for step, folder in self._checkpoints() if self._is_new(step, folder)]
            for step, folder in found:
                self._seen[step] = _identity_of(folder)
                self._consider(step, folder)
            if found:
                continue
            if end is not None:
                say(f"{self.run}: {end}; {counted(len(self.log.rows), 'checkpoint', 'checkpoints')} scored")
                return
            if not waiting:
                say(f"{self.run}: waiting for more checkpoints until the run has ended")
                waiting = True
            _pause()

    def _end(self) -> str | None:
        """Why the run adds no checkpoint any more; None while it may."""
        if (path := self.run / STOPPED).exists():
            return f"the run was stopped at {path.read_text(encoding='utf-8', errors='replace').strip()}"
        steps = self._config().steps
        return f"all {steps:,} steps are done" if any(step >= steps for step, _ in self._checkpoints()) else None

    def _config(self) -> RunConfig:
        return load_toml(RunConfig, self.run / RUN_TOML)

    def _checkpoints(self) -> list[tuple[int, Path]]:
        return step_folders(self.run / CHECKPOINTS)

    def _saved(self) -> dict[int, str]:
        """The content of the complete checkpoints by step."""
        contents = {}
        for step, folder in self._checkpoints():
            with suppress(MegacoderError, OSError):  # damaged, or just removed
                open_checkpoint(folder)
                contents[step] = model_content(folder)
        return contents

    def _is_new(self, step: int, folder: Path) -> bool:
        return step not in self._seen or self._seen[step] != _identity_of(folder)

    def _consider(self, step: int, folder: Path) -> None:
        """Scores a checkpoint, unless that is done, or it has been removed or is damaged."""
        try:
            open_checkpoint(folder)
            content = model_content(folder)
            if step in self.log.rows and self.log.rows[step].get("checkpoint") == content:
                return
            scores = self.score(folder)
        except (MegacoderError, OSError) as error:
            if not folder.is_dir():
                say(f"skipping {folder.name}: the run removed it before it was scored (checkpoint.keep_last)")
            elif isinstance(error, CheckpointError) or isinstance(error.__cause__, CheckpointError):
                say(f"skipping {folder.name}: {error}")
            else:
                raise
        else:
            self._note(step, content, scores)
        finally:
            _free_memory()

    def _note(self, step: int, content: str, scores: dict[str, float]) -> None:
        config = self._config()
        tokens = step * config.global_batch_size * config.data.stream.seq_length
        row = {"step": step, "tokens": tokens, "name": self.name, "scores": scores, "protocol": self.protocol}
        row["checkpoint"] = content
        line = self.log.add(row, saved=self._saved())
        shown = ", ".join(f"{score} {value:.4f}" for score, value in scores.items())
        print(line if self.as_json else f"step {step:,}, {tokens:,} tokens: {shown}", flush=True)


def _identity_of(folder: Path) -> tuple[int, int] | None:
    """Another one if a run has gone back and saved the step again; None without a manifest."""
    try:
        status = (folder / MANIFEST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _free_memory() -> None:
    """Before the next checkpoint is loaded, and while waiting, when the run may need the device's."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _pause() -> None:
    time.sleep(_LOOK_SECONDS)
