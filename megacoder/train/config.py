"""The run: one TOML file, composed of the configs of its parts.

A relative path is relative to the folder that the command runs in. `output` receives `run.toml` (all settings,
resolved), `metrics.jsonl`, TensorBoard events and `checkpoints/`.
"""

import math
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megacoder.checkpoint.writer import CheckpointConfig
from megacoder.core.config import check_at_least, check_seconds
from megacoder.core.errors import ConfigError
from megacoder.data.conversations import ConversationConfig
from megacoder.data.megatron_stream import MegatronConfig
from megacoder.data.skipping import Steps, parse_steps
from megacoder.data.stream import StreamConfig
from megacoder.model.config import ModelConfig
from megacoder.model.partition import ExecutionConfig
from megacoder.ops.adamw import AdamWConfig
from megacoder.parallel.config import ParallelConfig
from megacoder.train.guard import GuardConfig
from megacoder.train.layout import Layout, LayoutRequest
from megacoder.train.schedule import ScheduleConfig, learning_rate

__all__ = ["RUN_TOML", "DataConfig", "RunConfig"]

RUN_TOML = "run.toml"
"""In a run's folder: its settings, resolved."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads."""

    train: tuple[Path, ...] = ()
    """prefix of the training .bin/.idx, or several prefixes whose tokens are blended"""
    weights: tuple[float, ...] = ()
    """each dataset's share of the run's tokens, one per `train`, of any sum; if unset, in proportion to their sizes. 0,
    with init_data: nothing is drawn from it, and it keeps its place"""
    fim_rates: tuple[float, ...] = ()
    """each dataset's rate of fill-in-the-middle, one per `train`; if unset, stream.fim.rate for all"""
    valid: tuple[Path, ...] = ()
    """prefix of the held-out .bin/.idx, whose loss is measured every `eval_every` steps, or several prefixes: the loss
    is then their mean, and that of each is logged, too, under the last part of its prefix"""
    tokenizer: Path
    """tokenizer folder"""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """order, packing and fill-in-the-middle"""
    conversations: ConversationConfig = field(default_factory=ConversationConfig)
    """conversations for `megacoder sft`, which makes `train` and `valid` from them"""
    skip_steps: tuple[str, ...] = ()
    """"A:B" leaves out the data of steps A to B, so that step A gets what step B + 1 would have got, and so on; each of
    several counts steps as they are under those before it"""
    compat: Literal["none", "megatron"] = "none"
    """megatron: serve a Megatron-LM run's samples in that run's order, with the settings in `megatron`"""
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    """the other settings that decide Megatron's order; used only if compat is megatron"""

    def __post_init__(self) -> None:
        for name in ("weights", "fim_rates"):
            values = getattr(self, name)
            if values and self.conversations.train:
                instead = "; data.conversations.repeats weighs its files" if name == "weights" else ""
                raise ConfigError(
                    f"data.{name} = {list(values)} with data.conversations: conversations are neither weighted nor "
                    f"fill-in-the-middle examples; leave it out{instead}"
                )
            if values and len(values) != len(self.train):
                raise ConfigError(
                    f"data.{name} = {list(values)}: give one for each of the {len(self.train)} of train, or none"
                )
        for weight in self.weights:
            if not 0 <= weight < math.inf:
                raise ConfigError(f"data.weights = {list(self.weights)}: {weight} is not a positive number")
        if self.weights and not any(self.weights):
            raise ConfigError(f"data.weights = {list(self.weights)}: at least one must be a positive number")
        for rate in self.fim_rates:
            if not 0.0 <= rate <= 1.0:
                raise ConfigError(f"data.fim_rates = {list(self.fim_rates)}: {rate} is not between 0 and 1")
        if self.left_out and self.compat == "megatron":
            raise ConfigError(
                'data.skip_steps with data.compat = "megatron", whose order has as many samples as the run'
            )
        if len(set(self.valid)) < len(self.valid):
            raise ConfigError(f"data.valid = {list(map(str, self.valid))}: names a dataset twice")
        if not self.train and not self.conversations.train:
            raise ConfigError("data.train = []: name at least one dataset")

    @property
    def left_out(self) -> tuple[Steps, ...]:
        """`skip_steps`, read."""
        return tuple(parse_steps("data.skip_steps", text) for text in self.skip_steps)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run."""

    output: Path
    """folder for the run's settings, logs and checkpoints"""
    data: DataConfig
    """training and held-out data"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """shape of the model; vocab_size is the tokenizer's"""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """how ranks share the work; may change when a run resumes"""
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    """how layers run"""
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    """AdamW"""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """learning rate"""
    steps: int = 1000
    """number of training steps; each has one global batch and one update"""
    global_batch_size: int = 64
    """sequences per update, over all ranks"""
    micro_batch_size: int = 8
    """sequences per forward and backward on one rank"""
    max_grad_norm: float = 1.0
    """clip the gradient norm to this; 0: do not clip"""
    data_workers: int = 1
    """threads that prepare batches ahead; 0 prepares each batch when it is needed"""
    seed: int = 1234
    """seed of the initial weights; the data order has its own, data.stream.seed"""
    init_from: Path | None = None
    """start from these weights instead of random ones: a checkpoint, a run, or the output of `megacoder checkpoint
    import`. Schedule and data start afresh (but see below); RoPE and the number of positions may differ from that
    model's, and the vocabulary may be larger: the new rows begin as the mean of the others"""
    init_optimizer: bool = False
    """start from the optimizer's state in `init_from`, too: AdamW's moments, and the number of updates they are of"""
    init_data: bool = False
    """go on in the training data where the run in `init_from` stopped. Batch size, sequence length, weights and
    fill-in-the-middle may differ, datasets may be added at the end of data.train; one of weight 0 keeps its place"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto uses GPUs if there are any"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """dtype of weights and activations; auto measures which is faster here. Gradients and optimizer state are fp32"""
    checkpoint_every: int = 200
    """steps between checkpoints; one more is written at the end"""
    checkpoint_minutes: float | None = None
    """also write one when so many minutes have passed since the last one, unless that is still being written"""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """how checkpoints are written and kept"""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """which updates are skipped, and when that ends the run"""
    stop_signals: tuple[str, ...] = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    """signals on which the run writes a checkpoint and ends. Slurm's --signal sends one of your choice; closing the
    terminal sends SIGHUP, unless the run was started with nohup"""
    eval_every: int = 100
    """steps between held-out losses; also measured after the first and the last step"""
    eval_batches: int = 8
    """global batches per held-out loss, of each dataset in data.valid; fewer if they would read a token twice"""
    log_every: int = 1
    """steps between lines in metrics.jsonl"""
    timeout_seconds: float = 600.0
    """a collective that takes longer than this ends the run"""

    def __post_init__(self) -> None:
        check_at_least(
            self, 1, "steps", "global_batch_size", "micro_batch_size", "checkpoint_every", "eval_every", "eval_batches",
            "log_every",
        )  # fmt: skip
        check_at_least(self, 0, "data_workers")
        if not 0 <= self.max_grad_norm < math.inf:
            raise ConfigError(f"max_grad_norm = {self.max_grad_norm}: must be positive, or 0 for no clipping")
        if self.init_optimizer and self.init_from is None:
            raise ConfigError("init_optimizer = true without init_from, which names the run whose optimizer goes on")
        if self.init_data:
            self._check_init_data()
        elif not all(self.data.weights):
            raise ConfigError(
                f"data.weights = {list(self.data.weights)}: 0.0 is not a positive number; leave that dataset out (a 0 "
                "keeps a dataset's place in a run with init_data)"
            )
        milestone = self.checkpoint.keep_every
        if milestone is not None and milestone < self.checkpoint_every:
            raise ConfigError(
                f"checkpoint.keep_every = {milestone} is below checkpoint_every = {self.checkpoint_every}: each of "
                "these steps is saved and kept for good; raise it, or lower checkpoint_every"
            )
        if self.checkpoint_minutes is not None and not 0 < self.checkpoint_minutes < math.inf:
            raise ConfigError(
                f"checkpoint_minutes = {self.checkpoint_minutes}: must be positive; omit it to save by steps alone"
            )
        check_seconds("timeout_seconds", self.timeout_seconds)
        for name in self.stop_signals:
            if not name.startswith("SIG") or not hasattr(signal, name) or name in ("SIGKILL", "SIGSTOP"):
                raise ConfigError(f"stop_signals: {name!r} is not a signal that a run can handle; use e.g. 'SIGUSR1'")
        length, limit = self.data.stream.seq_length, self.model.max_position_embeddings
        if length > limit:
            raise ConfigError(
                f"data.stream.seq_length = {length} exceeds model.max_position_embeddings = {limit}"
                f"{self.model.positions_advice}"
            )
        if self.execution.cuda_graph and (self.data.stream.document_masks or self.data.conversations.train):
            raise ConfigError(
                "execution.cuda_graph = true with masked documents (data.stream.document_masks, data.conversations): "
                "every microbatch has other masks, but a graph always replays the same; leave cuda_graph out"
            )

    def _check_init_data(self) -> None:
        if self.init_from is None:
            raise ConfigError("init_data = true without init_from, which names the run in whose data this one goes on")
        if not self.may_go_on_in_data:
            kind = "data.conversations" if self.data.conversations.train else 'data.compat = "megatron"'
            raise ConfigError(f"init_data = true with {kind}, whose order depends on more than the place; leave it out")

    @property
    def may_go_on_in_data(self) -> bool:
        """Whether the order of its data is one that `init_data` can go on in."""
        return not self.data.conversations.train and self.data.compat == "none"

    @property
    def clip_norm(self) -> float:
        """The norm that gradients are clipped to, inf if they are not."""
        return self.max_grad_norm or math.inf

    def ends_with_checkpoint(self, step: int) -> bool:
        """Whether a checkpoint follows step `step` (1 .. steps), whatever the clock says."""
        milestone = self.checkpoint.keep_every
        return step == self.steps or any(step % every == 0 for every in (self.checkpoint_every, milestone) if every)

    @property
    def warmup_steps(self) -> float:
        """Warm-up in steps; the schedule may give it in tokens."""
        return self.schedule.warmup(self.global_batch_size * self.data.stream.seq_length)

    def learning_rate(self, step: int) -> float:
        """The rate of update `step` (1 .. steps)."""
        tokens = self.global_batch_size * self.data.stream.seq_length
        return learning_rate(step, self.steps, self.schedule, tokens_per_step=tokens)

    @property
    def layout_request(self) -> LayoutRequest:
        """What its layout depends on."""
        return LayoutRequest(
            model=self.model, parallel=self.parallel, seq_length=self.data.stream.seq_length,
            global_batch_size=self.global_batch_size, micro_batch_size=self.micro_batch_size,
            execution=self.execution,
        )  # fmt: skip

    def layout(self, world_size: int) -> Layout:
        """The layout of `world_size` ranks; ConfigError, with the nearest layouts that work, if this is not one."""
        return self.layout_request.layout(world_size)
