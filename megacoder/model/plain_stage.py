"""A pipeline stage of plain layers under autograd, for those who change the block's code: no backward to write.

Legend: B sequences, S tokens, T = B * S, N = T or a rank's share of them under sequence parallelism, D model dim.

A forward keeps its autograd graph, from the stage's input (a leaf) to its output; a backward walks it, and autograd
adds the weights' gradients into the same fp32 `param.grad` views that `megacoder.model.stage` fills by hand. What
crosses stages is the same as there, and so is the head, which computes its gradients in the forward: full logits are in
no graph.

The costs compared with the hand-scheduled stage are time, memory (autograd keeps what each op saves for itself), and
the benefit of zero-bubble schedules: see `PlainStage.backward_input`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megacoder.model.places import Places
from megacoder.model.scheduled import grad_of
from megacoder.model.stage import Microbatch, ModelStage
from megacoder.model.transformer import DecoderLayer, RopeTables
from megacoder.ops.cross_entropy import LossSum
from megacoder.parallel.cross_entropy import head_loss_sum, head_loss_with_grads

__all__ = ["PlainStage", "SavedGraph"]


@dataclass(frozen=True, slots=True)
class SavedGraph:
    """What one microbatch's forward keeps: the two ends of its graph, which the backward frees."""

    entered: Tensor | None
    """leaf that collects the input's gradient (N, D); None in the first stage"""
    left: Tensor
    """the output, in the last stage the head's input (N, D)"""
    grad: Tensor | None
    """in the last stage, the gradient of `left`"""


@dataclass(frozen=True, kw_only=True)
class PlainStage(ModelStage):
    """Layers run by their own `forward`.

    `recompute` is torch's activation checkpointing: "selective" of `DecoderLayer.feed_forward`, "full" of the layer.
    """

    def forward(self, x_TD: Tensor | None, microbatch: Microbatch) -> tuple[Tensor | LossSum, SavedGraph]:
        """See `ModelStage`."""
        entered = None if x_TD is None else x_TD.detach().requires_grad_()
        left_ND = self._run_layers(entered, microbatch)
        if not self.is_last:
            return left_ND.detach(), SavedGraph(entered, left_ND, None)
        head, labels_T = self.model.lm_head, microbatch.labels_BS.flatten()
        with torch.no_grad():
            loss, grad_ND = head_loss_with_grads(
                left_ND, head, labels_T, grad_weight_WD=grad_of(head.weight), num_tokens=microbatch.num_labels
            )
        return loss, SavedGraph(entered, left_ND, grad_ND)

    @torch.no_grad()
    def evaluate(self, x_TD: Tensor | None, microbatch: Microbatch) -> Tensor | LossSum:
        """See `ModelStage`."""
        left_ND = self._run_layers(x_TD, microbatch)
        if not self.is_last:
            return left_ND
        labels_T = microbatch.labels_BS.flatten()
        return head_loss_sum(left_ND, self.model.lm_head, labels_T, num_tokens=microbatch.num_labels)

    def backward(self, grad_TD: Tensor | None, saved: SavedGraph) -> Tensor | None:
        """See `ModelStage`."""
        torch.autograd.backward(saved.left, saved.grad if self.is_last else grad_TD)
        self._finished_all()
        return None if saved.entered is None else saved.entered.grad

    def backward_input(self, grad_TD: Tensor | None, saved: SavedGraph) -> tuple[Tensor | None, Callable[[], None]]:
        """The whole backward at once; the returned function does nothing.

        That is right in any schedule: nothing reads a weight's gradient before the step ends, so W may come early. It
        costs what zero-bubble schedules gain: I takes as long as B, and there is no W left to fill a bubble with.
        """
        return self.backward(grad_TD, saved), lambda: None

    def _run_layers(self, x_ND: Tensor | None, microbatch: Microbatch) -> Tensor:
        """The stage's output, in the last stage the head's input (N, D)."""
        tokens_BS = microbatch.tokens_BS
        places = microbatch.places_in(self.model)
        if self.is_first:
            self.events.entering(self.model.embed_tokens)
            stream = self.model.embed_tokens(tokens_BS)
        else:
            assert x_ND is not None
            all_here = len(x_ND) == tokens_BS.numel()
            stream = x_ND.view(*tokens_BS.shape, -1) if all_here else x_ND
        rope, layers = self.model.rope(tokens_BS.device), self.model.decoder_layers()
        for index in self.layers:
            self.events.entering(layers[index])
            stream = self._run_layer(layers[index], stream, rope, places)
        if self.is_last:
            norm, _ = self._enter_head()
            stream = norm(stream)
        return stream.flatten(0, -2)

    def _run_layer(self, layer: DecoderLayer, stream: Tensor, rope: RopeTables, places: Places) -> Tensor:
        if self.recompute == "full":
            return checkpoint(layer, stream, rope, places, use_reentrant=False)
        if self.recompute == "selective":
            return checkpoint(layer.feed_forward, layer.attend(stream, rope, places), use_reentrant=False)
        return layer(stream, rope, places)

    def _finished_all(self) -> None:
        """Only here is it certain that autograd has added up every gradient of the microbatch."""
        if self.is_last:
            self._finished_head()
        layers = self.model.decoder_layers()
        for index in reversed(self.layers):
            self.events.finished(layers[index])
        if self.is_first:
            self.events.finished(self.model.embed_tokens)
