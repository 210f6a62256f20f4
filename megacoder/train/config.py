"""The run: one TOML file that composes the configs of the parts.

A relative path is relative to the folder that the command runs in. `output` receives `run.toml` (the resolved whole),
`metrics.jsonl`, TensorBoard events and `checkpoints/`.
"""

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megacoder.checkpoint.writer import CheckpointConfig
from megacoder.core.errors import ConfigError
from megacoder.data.conversations import ConversationConfig
from megacoder.data.megatron_stream import MegatronConfig
from megacoder.data.stream import StreamConfig
from megacoder.model.config import ModelConfig
from megacoder.model.partition import ExecutionConfig
from megacoder.ops.adamw import AdamWConfig
from megacoder.parallel.config import ParallelConfig
from megacoder.train.guard import GuardConfig
from megacoder.train.layout import Layout, LayoutRequest
from megacoder.train.schedule import ScheduleConfig, learning_rate

__all__ = ["DataConfig", "RunConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read."""

    train: tuple[Path, ...] = ()
    """prefix of the training .bin/.idx, or several whose tokens are blended"""
    weights: tuple[float, ...] = ()
    """shares of the tokens of a run, one for each of `train`, of any sum; left out, each has its size"""
    fim_rates: tuple[float, ...] = ()
    """rates of fill-in-the-middle, one for each of `train`; left out, stream.fim.rate holds for all"""
    valid: Path | None = None
    """prefix of held-out .bin/.idx, whose loss is measured every `eval_every` steps"""
    tokenizer: Path
    """tokenizer folder"""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """order, packing and fill-in-the-middle"""
    conversations: ConversationConfig = field(default_factory=ConversationConfig)
    """what `megacoder sft` trains on, and makes `train` and `valid` of"""
    compat: Literal["none", "megatron"] = "none"
    """megatron serves the samples of a Megatron run in its order, with settings of `megatron`"""
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    """what else decides Megatron's order; used with compat = "megatron" alone"""

    def __post_init__(self) -> None:
        for name in ("weights", "fim_rates"):
            values = getattr(self, name)
            if values and len(values) != len(self.train):
                raise ConfigError(
                    f"data.{name} = {list(values)}: one for each of the {len(self.train)} of train, or none"
                )
        for weight in self.weights:
            if not 0 < weight < float("inf"):
                raise ConfigError(f"data.weights = {list(self.weights)}: {weight} is not a positive number")
        for rate in self.fim_rates:
            if not 0.0 <= rate <= 1.0:
                raise ConfigError(f"data.fim_rates = {list(self.fim_rates)}: {rate} is no share from 0 to 1")
        if not self.train and not self.conversations.train:
            raise ConfigError("data.train = []: at least one dataset")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run."""

    output: Path
    """folder of the run"""
    data: DataConfig
    """training and held-out data"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """shape of the model; vocab_size is that of the tokenizer"""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """how ranks share the work; may change when a run goes on"""
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    """how layers run"""
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    """AdamW"""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """learning rate"""
    steps: int = 1000
    """updates"""
    global_batch_size: int = 64
    """sequences per update, over all ranks"""
    micro_batch_size: int = 8
    """sequences per forward and backward on one rank"""
    max_grad_norm: float = 1.0
    """the gradient's norm is clipped to it"""
    data_workers: int = 1
    """threads that make batches ahead; 0 makes each when it is asked for"""
    seed: int = 1234
    """of the initial weights (the data's order has its own)"""
    init_from: Path | None = None
    """start from these weights instead: a checkpoint, a run, or what `megacoder checkpoint import` has written. The
    optimizer, the schedule and the data begin anew; RoPE and the number of positions may be other than there"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes GPUs where there are any"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """of weights and activations; auto measures which is faster on this machine. Gradients and state are fp32"""
    checkpoint_every: int = 200
    """steps between checkpoints; one more is written at the end"""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """how checkpoints are written and kept"""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """which updates are left out, and when that ends the run"""
    stop_signals: tuple[str, ...] = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    """signals that are answered with a checkpoint and the run's end; Slurm's --signal sends one of choice, and a
    terminal that is closed SIGHUP (which nohup keeps away)"""
    eval_every: int = 100
    """steps between held-out losses; one more is measured at the end"""
    eval_batches: int = 8
    """global batches per held-out loss"""
    log_every: int = 1
    """steps between lines of metrics"""
    timeout_seconds: float = 600.0
    """a collective that takes longer ends the run"""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "micro_batch_size", "checkpoint_every",
                     "eval_every", "eval_batches", "log_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("max_grad_norm", "timeout_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be positive")
        for name in self.stop_signals:
            if not name.startswith("SIG") or not hasattr(signal, name) or name in ("SIGKILL", "SIGSTOP"):
                raise ConfigError(f"stop_signals: {name!r} is no signal that a program may answer; such as 'SIGUSR1'")
        if self.data_workers < 0:
            raise ConfigError(f"data_workers = {self.data_workers}: at least 0")
        length, limit = self.data.stream.seq_length, self.model.max_position_embeddings
        if length > limit:
            raise ConfigError(f"data.stream.seq_length = {length} exceeds model.max_position_embeddings = {limit}")
        if self.execution.cuda_graph and (self.data.stream.document_masks or self.data.conversations.train):
            raise ConfigError(
                "execution.cuda_graph = true with masked documents (data.stream.document_masks, data.conversations): "
                "every microbatch has others, and a graph always the same; leave it out"
            )

    def ends_with_checkpoint(self, step: int) -> bool:
        """Whether step `step` (1 .. steps) does."""
        return step % self.checkpoint_every == 0 or step == self.steps

    @property
    def warmup_steps(self) -> float:
        """Of the schedule, which may give it in tokens."""
        return self.schedule.warmup(self.global_batch_size * self.data.stream.seq_length)

    def learning_rate(self, step: int) -> float:
        """Of update `step` (1 .. steps)."""
        tokens = self.global_batch_size * self.data.stream.seq_length
        return learning_rate(step, self.steps, self.schedule, tokens_per_step=tokens)

    def layout(self, world_size: int) -> Layout:
        """What `world_size` ranks do; ConfigError, with the nearest layouts that work, where they cannot run this."""
        request = LayoutRequest(
            model=self.model, parallel=self.parallel, seq_length=self.data.stream.seq_length,
            global_batch_size=self.global_batch_size, micro_batch_size=self.micro_batch_size,
            execution=self.execution,
        )  # fmt: skip
        return request.layout(world_size)
