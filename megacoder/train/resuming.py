"""May this run go on? What a run's folder holds and what it is started from, compared with its settings.

A run that resumes must be the one that began: its settings are compared with those in the folder, its model with the
checkpoint's, and the steps that are done with what they would have been now. Everything is refused before a process
has made its model.
"""

from dataclasses import replace
from pathlib import Path

from megacoder.checkpoint.folders import CHECKPOINTS, step_folders
from megacoder.checkpoint.manifest import MANIFEST
from megacoder.checkpoint.reader import CheckpointReader, open_together
from megacoder.core.config import check_same, from_dict, load_toml
from megacoder.core.errors import ConfigError
from megacoder.data.skipping import data_step
from megacoder.model.conversion import model_of
from megacoder.parallel.world import World, gather_json
from megacoder.train.config import RUN_TOML, RunConfig
from megacoder.train.metrics_log import METRICS

__all__ = ["check_goes_on", "check_same_run", "open_start"]

FREE_TO_CHANGE = {
    "output", "device", "checkpoint_every", "checkpoint_minutes", "checkpoint", "eval_every", "eval_batches",
    "log_every", "execution", "micro_batch_size", "parallel", "timeout_seconds", "guard", "stop_signals",
    "data_workers", "steps", "schedule", "data.train", "data.valid", "data.tokenizer", "data.skip_steps",
}  # fmt: skip
"""Settings that may differ when a run resumes: they change nothing (any more), rounding alone (device, layout,
execution), or what becomes of a run that goes wrong. `steps`, `schedule` and `skip_steps` may differ if
`_check_same_past` agrees. Data may have moved: the checkpoint's data position says whether it is the same
(`check_order`)."""

FREE_AT_START = {
    "rope_theta", "rope_factor", "rope_scaling", "max_position_embeddings", "init_std", "vocab_multiple"
}  # fmt: skip
"""Model settings that may differ from those of the weights a run starts from: no weight's shape depends on them. The
vocabulary may also be larger: the weights get further rows (`CheckpointReader.read`)."""

GOES_ON = (
    "global_batch_size", "max_grad_norm", "optimizer", "data.weights", "data.fim_rates", "data.stream",
    *(f"model.{name}" for name in sorted(FREE_AT_START)),
)  # fmt: skip
"""Settings, or parts of them, that a new run may change which goes on from this one's state."""

_ORDER = {"seed", "num_streams", "add_bos", "packing", "train_across_documents"}
"""Of data.stream: with another, there is no place in the data to go on from."""


def check_same_run(config: RunConfig) -> RunConfig | None:
    """The settings of the run that has begun in `config.output`, None if none has; ConfigError if it is another run.

    A run that has done no step, such as one that ran out of memory, has not begun: any setting may change.
    """
    path = config.output / RUN_TOML
    if not (path.exists() and _has_begun(config.output)):
        return None
    old = load_toml(RunConfig, path)
    if config.dtype == "auto":  # resolved when the run began
        config = replace(config, dtype=old.dtype)
    _check_same_settings(old, config, where=str(path))
    return old


def check_goes_on(reader: CheckpointReader, config: RunConfig, old: RunConfig | None) -> None:
    """ConfigError if a run of `config` cannot resume from the checkpoint in its folder.

    `old` are the settings in the run's folder. If they are missing there, the checkpoint's are checked. Otherwise only
    the model is compared with the checkpoint's: an old checkpoint may have settings that no longer exist.
    """
    output, where = str(config.output), f"{reader.folder / MANIFEST}: state.config"
    if not _has_moments(reader):
        raise ConfigError(
            f"output = {output!r}: its checkpoint {reader.folder.name} holds weights alone, from which no run can "
            f"resume; choose another output, and start from these weights with init_from = {output!r}"
        )
    check_same(
        model_of(reader), config.model, where=f"{where}.model", free={"vocab_multiple"}, advice="choose another output"
    )
    if old is None:
        old = from_dict(RunConfig, reader.state["config"], where=where)
        _check_same_settings(old, config, where=where)
    _check_same_past(old, config, reader.step)


def open_start(config: RunConfig, world: World | None = None) -> CheckpointReader | None:
    """The checkpoint that a new run starts from, if any; ConfigError if it is of another model or lacks moments.

    The same on all ranks of `world`, which call it at once; without one, this process looks for itself.
    """
    if config.init_from is None:
        return None
    has_begun = bool(step_folders(config.output / CHECKPOINTS))
    if world is not None:
        has_begun = any(gather_json(has_begun, world))
    if has_begun:
        return None
    reader = CheckpointReader(config.init_from) if world is None else open_together(config.init_from, world)
    there = model_of(reader)
    enlarges = {"vocab_size"} if config.model.vocab_size > there.vocab_size else set[str]()
    check_same(
        there, config.model, where=f"init_from = {str(config.init_from)!r}", free=FREE_AT_START | enlarges,
        advice=lambda key: f"set the same{' or a larger one' if key == 'vocab_size' else ''} in this run's [model]",
    )  # fmt: skip
    theta = there.rope_theta
    if config.model.rope_theta < theta:
        raise ConfigError(
            f"model.rope_theta = {config.model.rope_theta}, below the {theta} of {reader.folder}: a longer context "
            "takes a larger base, never a smaller one; set it in this run's [model]"
        )
    if config.init_optimizer and not _has_moments(reader):
        raise ConfigError(
            f"init_optimizer = true: {reader.folder} holds weights alone, without AdamW's moments; leave it out, or "
            "name the checkpoint of a run in init_from"
        )
    if config.init_data and "data" not in reader.state:
        raise ConfigError(
            f"init_data = true: {reader.folder} holds weights alone, without a place in the data; leave it out, or "
            "name the checkpoint of a run in init_from"
        )
    return reader


def _check_same_settings(old: RunConfig, new: RunConfig, *, where: str) -> None:
    # Rows that pad the vocabulary are in no checkpoint, and another tp may need other ones.
    new = replace(new, model=replace(new.model, vocab_multiple=old.model.vocab_multiple))
    check_same(
        old, new, where=where, free=FREE_TO_CHANGE, advice=lambda key: f"set it back, or {_advice(key, old, new)}"
    )


def _advice(key: str, old: RunConfig, config: RunConfig) -> str:
    """What to do where the setting `key` is not what it was."""
    if key == "model.vocab_size" and config.model.vocab_size > old.model.vocab_size:
        return _go_on(config, with_data=False)  # a larger vocabulary is that of another tokenizer, and so are the data
    if not key.startswith(GOES_ON):
        return "choose another output"
    part, _, name = key.removeprefix("data.").partition(".")
    of_files = name.startswith(("seq_length", "fim")) or part == "fim_rates"  # what best-fit packing depends on
    has_place = name not in _ORDER and not (of_files and config.data.stream.packing == "best_fit")
    return _go_on(config, with_data=has_place)


def _go_on(config: RunConfig, *, with_data: bool = True) -> str:
    data = ", init_data = true" if with_data and config.may_go_on_in_data else ""
    return (
        f"choose another output, and go on from this run's state with init_from = {str(config.output)!r}, "
        f"init_optimizer = true{data}"
    )


def _check_same_past(old: RunConfig, config: RunConfig, step: int) -> None:
    """ConfigError if the first `step` steps of a run would not have been the same under `config` as under `old`.

    A constant rate can be extended, or made to fall, at any time; wsd until its decay begins, three stages until the
    first has ended.
    """
    advice = _go_on(config)
    if config.steps < step:
        raise ConfigError(f"steps = {config.steps}: the run in {config.output} has done {step} already; {advice}")
    if config.data.compat == "megatron" and config.data.megatron.num_samples is None and config.steps != old.steps:
        raise ConfigError(
            f"steps = {config.steps}: the run in {config.output} is one of {old.steps}, and Megatron's order of "
            f"samples depends on their number; {advice}"
        )
    for past in range(1, step + 1):
        if data_step(past, old.data.left_out) != data_step(past, config.data.left_out):
            raise ConfigError(
                f"data.skip_steps = {list(config.data.skip_steps)}: the run in {config.output} has done {step} steps, "
                f"and step {past} would have had other data; move its checkpoints from step {past} on away, or {advice}"
            )
        was, now = old.learning_rate(past), config.learning_rate(past)
        if was != now:
            changed = ["schedule"] if old.schedule != config.schedule else []
            changed += [f"steps = {config.steps} (was {old.steps})"] if old.steps != config.steps else []
            raise ConfigError(
                f"{' and '.join(changed)}: the run in {config.output} has done {step} steps, and the learning rate of "
                f"step {past} was {was!r}, not {now!r}; {advice}"
            )


def _has_begun(output: Path) -> bool:
    metrics = output / METRICS
    return bool(step_folders(output / CHECKPOINTS)) or (metrics.exists() and metrics.stat().st_size > 0)


def _has_moments(reader: CheckpointReader) -> bool:
    """Whether a run could resume from the checkpoint."""
    return {"exp_avg", "exp_avg_sq"} <= {kind for kind, _ in reader.tensors()}
