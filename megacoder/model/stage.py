"""A pipeline stage: consecutive layers with explicit forward and backward, no autograd; the whole model is one stage.

`ModelStage` is what every kind of stage is; `Stage` is the fast one, `megacoder.model.plain_stage` has the plain one,
and `megacoder.model.partition` cuts a model into either.

Legend: B sequences, S tokens that this rank has of each, T = B * S, D model dim. What enters and leaves a stage is the
residual stream (T, D) in the weights' dtype, and its gradient the other way. Gradients of weights are added straight
into `param.grad`.

In its forward the last stage computes the loss and, in the same pass over chunks of tokens, the head's gradients: full
logits are never kept, so a later backward would have nothing to start from. What it keeps is the gradient of the head's
input. Only the layers' weight gradients are therefore postponed, never those of embedding, norms and head.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from megacoder.model.config import ModelConfig
from megacoder.model.kept import Recompute
from megacoder.model.places import Places
from megacoder.model.scheduled import (
    SavedLayer,
    Shared,
    StreamGrad,
    WeightGradients,
    check_layer,
    grad_of,
    layer_backward,
    layer_forward,
)
from megacoder.model.transformer import RMSNorm, Transformer, TransformerPart
from megacoder.ops.cross_entropy import LossSum
from megacoder.ops.linear import STORED, Precision
from megacoder.ops.rms_norm import rms_norm_backward, rms_norm_forward
from megacoder.parallel.buckets import NO_EVENTS, UnitEvents
from megacoder.parallel.context import UNCUT, ContextParallel
from megacoder.parallel.cross_entropy import head_loss_sum, head_loss_with_grads
from megacoder.parallel.layers import VocabParallelEmbedding
from megacoder.parallel.tensor import start_gather

__all__ = [
    "ForwardOnly",
    "Microbatch",
    "ModelStage",
    "SavedStage",
    "Stage",
    "forward_backward",
    "forward_loss",
    "kept_head_bytes_per_row",
]


@dataclass(frozen=True)
class Microbatch:
    """What the stages of one microbatch read: tokens in the first, labels in the last, their shape in all."""

    tokens_BS: Tensor
    labels_BS: Tensor
    """already shifted, IGNORE_INDEX where not trained"""
    places: Places | None = None
    """where in their sequences the tokens are; None: the sequences are whole, and each is one document"""
    num_labels: int | None = None
    """how many labels are trained on, if they have been counted and checked against the vocabulary; None: the head
    counts them, and the host waits for the GPU to do so"""

    @classmethod
    def of(
        cls,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        *,
        cp: ContextParallel = UNCUT,
        starts_BS: Tensor | None = None,
        num_labels: int | None = None,
    ) -> Self:
        """This rank's part of whole sequences; all ranks of the context axis pass the same ones.

        With `starts_BS` (bool), True where a document begins, tokens see only their own document. ConfigError for a
        length that the ranks cannot share.
        """
        places = Places.of(tokens_BS.shape, cp, device=tokens_BS.device, starts_BS=starts_BS)
        return cls(cp.part(tokens_BS), cp.part(labels_BS), places, num_labels)

    def places_in(self, model: TransformerPart) -> Places:
        """The places of every token; ValueError for a shape that `model` cannot take."""
        batch, length = self.tokens_BS.shape
        model.tp.check_tokens(batch, length)
        if length * model.cp.size > model.config.max_position_embeddings:
            limit = model.config.max_position_embeddings
            raise ValueError(f"sequences of {length * model.cp.size} tokens; the model has {limit} positions")
        if self.places is None and model.cp.size > 1:
            raise ValueError(
                f"a microbatch without places, whose sequences cp = {model.cp.size} ranks share; use Microbatch.of"
            )
        return self.places or Places.of(self.tokens_BS.shape, device=self.tokens_BS.device)


@dataclass(frozen=True, slots=True)
class SavedHead:
    """What the final norm's backward reads."""

    grad_normed: Tensor
    """gradient of the loss sum for the head's input (T, D)"""
    summed: Tensor
    """residual stream after the last layer (T, D)"""
    rstd: Tensor


def kept_head_bytes_per_row(model: ModelConfig, *, itemsize: int) -> int:
    """What `SavedHead` takes for each row of the residual stream."""
    return 2 * itemsize * model.hidden_size + 4


@dataclass(slots=True)
class SavedStage:
    """What one microbatch's forward keeps for its backward, which consumes it."""

    microbatch: Microbatch
    layers: list[SavedLayer] = field(default_factory=list)
    head: SavedHead | None = None
    """None but in the last stage"""


@dataclass(frozen=True, kw_only=True)
class ModelStage(ABC):
    """Layers of `model`, as a stage that `megacoder.parallel.pipeline` executes; a subclass says how they run."""

    model: TransformerPart
    """holds the parameters; their gradient buffers must be attached (see `megacoder.parallel.flat`)"""
    layers: range
    """by their index in the whole model"""
    is_first: bool
    """begins with the embedding"""
    is_last: bool
    """ends with the final norm, the head and the loss"""
    recompute: Recompute = "none"
    """what the layers recompute in their backward"""
    precision: Precision = STORED
    """what their matrices are multiplied in"""
    events: UnitEvents = NO_EVENTS
    """is told which of embedding, layers, norm and head are entered and finished"""

    @classmethod
    def whole(cls, model: Transformer, *, recompute: Recompute = "none", precision: Precision = STORED) -> Self:
        """The one stage of a pipeline of one rank."""
        layers = range(model.config.num_hidden_layers)
        return cls(model=model, layers=layers, is_first=True, is_last=True, recompute=recompute, precision=precision)

    def new_boundary(self, microbatch: Microbatch) -> Tensor:
        """Uninitialized memory for what enters this stage, or its gradient (T, D)."""
        weight, tp = next(self.model.parameters()), self.model.tp
        rows = microbatch.tokens_BS.numel() // (tp.size if tp.sequence_parallel else 1)
        return weight.new_empty(rows, self.model.config.hidden_size)

    @abstractmethod
    def forward(self, x_TD: Tensor | None, microbatch: Microbatch) -> tuple[Tensor | LossSum, Any]:
        """The stage's output, in the last stage the loss, and what `backward` needs; x is None in the first stage."""

    @abstractmethod
    def evaluate(self, x_TD: Tensor | None, microbatch: Microbatch) -> Tensor | LossSum:
        """The stage's output, in the last stage the loss; nothing is kept."""

    @abstractmethod
    def backward(self, grad_TD: Tensor | None, saved: Any) -> Tensor | None:
        """Gradient of the output (None in the last stage) -> that of the input (None in the first)."""

    @abstractmethod
    def backward_input(self, grad_TD: Tensor | None, saved: Any) -> tuple[Tensor | None, Callable[[], None]]:
        """As `backward`, but may leave weight gradients to the returned function, which is called once."""

    def _enter_head(self) -> tuple[RMSNorm, VocabParallelEmbedding]:
        norm, head = self.model.norm, self.model.lm_head
        self.events.entering(norm)
        self.events.entering(head)
        return norm, head

    def _finished_head(self) -> None:
        self.events.finished(self.model.norm)
        if not self.model.config.tie_word_embeddings:  # a tied head is finished with the embedding, which comes later
            self.events.finished(self.model.lm_head)


@dataclass(frozen=True, kw_only=True)
class Stage(ModelStage):
    """Layers whose backward is written by hand."""

    def __post_init__(self) -> None:
        layers = self.model.decoder_layers()
        for index in self.layers:
            check_layer(layers[index])

    @torch.no_grad()
    def forward(self, x_TD: Tensor | None, microbatch: Microbatch) -> tuple[Tensor | LossSum, SavedStage]:
        """See `ModelStage`."""
        saved = SavedStage(microbatch)
        stream_TD, residual_TD = self._run_layers(x_TD, microbatch, keep=saved.layers.append)
        if not self.is_last:
            return (stream_TD if residual_TD is None else stream_TD.add_(residual_TD)), saved
        norm, head = self._enter_head()
        normed_TD, summed_TD, rstd_T = rms_norm_forward(
            stream_TD, norm.weight.detach(), norm.eps, residual_TD=residual_TD
        )
        labels_T = microbatch.labels_BS.flatten()
        loss, grad_TD = head_loss_with_grads(
            normed_TD, head, labels_T, grad_weight_WD=grad_of(head.weight), num_tokens=microbatch.num_labels
        )
        saved.head = SavedHead(grad_TD, summed_TD, rstd_T)
        return loss, saved

    @torch.no_grad()
    def evaluate(self, x_TD: Tensor | None, microbatch: Microbatch) -> Tensor | LossSum:
        """See `ModelStage`; runs the same halves."""
        stream_TD, residual_TD = self._run_layers(x_TD, microbatch, keep=lambda _: None)
        if not self.is_last:
            return stream_TD if residual_TD is None else stream_TD.add_(residual_TD)
        norm, head = self._enter_head()
        normed_TD, _, _ = rms_norm_forward(stream_TD, norm.weight.detach(), norm.eps, residual_TD=residual_TD)
        return head_loss_sum(normed_TD, head, microbatch.labels_BS.flatten(), num_tokens=microbatch.num_labels)

    def backward(self, grad_TD: Tensor | None, saved: SavedStage) -> Tensor | None:
        """See `ModelStage`."""
        return self._backward(grad_TD, saved, WeightGradients())

    def backward_input(self, grad_TD: Tensor | None, saved: SavedStage) -> tuple[Tensor | None, Callable[[], None]]:
        """See `ModelStage`; what waits is the weight gradients of the layers."""
        weight_grads = WeightGradients(postponed=True)
        return self._backward(grad_TD, saved, weight_grads), weight_grads.run

    def _run_layers(
        self, x_TD: Tensor | None, microbatch: Microbatch, *, keep: Callable[[SavedLayer], None]
    ) -> tuple[Tensor, Tensor | None]:
        """(stream, residual), whose sum is the output."""
        shared = self._shared(microbatch)
        if self.is_first:
            self.events.entering(self.model.embed_tokens)
            x_TD = self.model.embed_tokens(microbatch.tokens_BS.flatten())
        assert x_TD is not None
        stream_TD, residual_TD = x_TD, None
        layers = self.model.decoder_layers()
        for index in self.layers:
            self.events.entering(layers[index])
            stream_TD, residual_TD, kept = layer_forward(
                layers[index], stream_TD, residual_TD, shared, recompute=self.recompute
            )
            keep(kept)
        return stream_TD, residual_TD

    @torch.no_grad()
    def _backward(self, grad_TD: Tensor | None, saved: SavedStage, weight_grads: WeightGradients) -> Tensor | None:
        if saved.head is not None:
            grad_TD, saved.head = self._norm_backward(saved.head), None
            self._finished_head()
        assert grad_TD is not None
        grad, shared, layers = StreamGrad(grad_TD), self._shared(saved.microbatch), self.model.decoder_layers()
        del grad_TD  # else the first gradient would live as long as this backward
        for index in reversed(self.layers):
            grad = layer_backward(layers[index], grad, saved.layers.pop(), shared, weight_grads)
            weight_grads.then(partial(self.events.finished, layers[index]))
        if not self.is_first:
            return grad.values_ND
        embedding, whole_TD = self.model.embed_tokens, start_gather(grad.values_ND, self.model.tp).wait()
        embedding.accumulate_grad(grad_of(embedding.weight), saved.microbatch.tokens_BS.flatten(), whole_TD)
        self.events.finished(embedding)
        return None

    def _shared(self, microbatch: Microbatch) -> Shared:
        rope = self.model.rope(microbatch.tokens_BS.device)
        return Shared(self.model.tp, rope, microbatch.places_in(self.model), self.precision)

    def _norm_backward(self, saved: SavedHead) -> Tensor:
        weight = self.model.norm.weight
        return rms_norm_backward(
            saved.grad_normed, saved.summed, weight.detach(), saved.rstd, grad_weight_D=grad_of(weight)
        )


@dataclass(frozen=True)
class ForwardOnly:
    """A stage for evaluation, which runs a program of forwards only."""

    stage: ModelStage

    def new_boundary(self, microbatch: Microbatch) -> Tensor:
        return self.stage.new_boundary(microbatch)

    def forward(self, x_TD: Tensor | None, microbatch: Microbatch) -> tuple[Tensor | LossSum, None]:
        return self.stage.evaluate(x_TD, microbatch), None

    def backward(self, grad: Tensor | None, saved: None) -> NoReturn:
        raise RuntimeError("evaluation has no backward")

    def backward_input(self, grad: Tensor | None, saved: None) -> NoReturn:
        raise RuntimeError("evaluation has no backward")


def forward_backward(
    model: Transformer, tokens_BS: Tensor, labels_BS: Tensor, *, starts_BS: Tensor | None = None
) -> LossSum:
    """Forward and backward of this rank's part (see `Microbatch.of`) of one microbatch of whole sequences.

    Returns the part's loss sum and adds the gradients of that sum into every `param.grad`.
    """
    stage = Stage.whole(model)
    loss, saved = stage.forward(None, Microbatch.of(tokens_BS, labels_BS, cp=model.cp, starts_BS=starts_BS))
    stage.backward(None, saved)
    assert isinstance(loss, LossSum)
    return loss


def forward_loss(
    model: Transformer, tokens_BS: Tensor, labels_BS: Tensor, *, starts_BS: Tensor | None = None
) -> LossSum:
    """The same loss sum, for evaluation."""
    loss = Stage.whole(model).evaluate(None, Microbatch.of(tokens_BS, labels_BS, cp=model.cp, starts_BS=starts_BS))
    assert isinstance(loss, LossSum)
    return loss
