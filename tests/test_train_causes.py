"""What a run says of an update that it skipped: windows of high loss, weights of large gradients, faults that pass."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from command_line import refusal, run_command
from train_cases import ALONE, make_case, run_to

from megacoder.model.transformer import Transformer
from megacoder.parallel.config import ParallelConfig
from megacoder.train.guard import GuardConfig, UpdateLimits
from megacoder.train.loop import Trainer
from megacoder.train.setup import load_tokenizer, open_stream


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("causes"))


def said_at(world, config, step, spoil=lambda trainer: None):
    """(lines about `step`, whether weights and gradients are as before, updates) where its update is skipped."""
    trainer, lines = Trainer(config, world), []
    trainer._tell = lambda number, line: lines.append(line)
    while trainer.step < step - 1:
        trainer.update()
    trainer.engine.optimizer.traffic.wait_all()
    weights, updates = trainer.engine.flat.weight.clone(), trainer.engine.optimizer.num_updates
    trainer.guard.note(loss=1.0, grad_norm=1.0, skipped=False, num_tokens=1)
    trainer.guard.limits = lambda: UpdateLimits(loss=-1.0)
    spoil(trainer)
    assert trainer.update().skipped
    engine = trainer.engine
    engine.optimizer.traffic.wait_all()
    untouched = torch.equal(engine.flat.weight, weights) and not engine.flat.grad.any()
    trainer.batches.close()
    trainer.folder.finish()
    return lines, untouched, engine.optimizer.num_updates - updates


def numbers(line):
    return [float(number) for number in re.findall(r"(?<![\w.])\d+\.?\d*(?:e-?\d+)?", line)]


@pytest.fixture(scope="module")
def alone(case):
    [line, reason], untouched, updates = said_at(ALONE, case.config("alone"), 3)
    assert (untouched, updates) == (True, 0)
    assert reason.startswith("update skipped: ")
    return line


def test_windows_and_weights_are_those_of_the_plain_model(case, alone):
    config = case.config("plain")
    trainer = Trainer(config, ALONE)
    trainer.update(), trainer.update()
    model = Transformer(config.model)
    model.load_state_dict(trainer.engine.model.state_dict())
    batch = trainer.batches.next_batch()
    trainer.batches.close()
    losses = {}
    for number, (tokens, labels) in enumerate(zip(batch.tokens, batch.labels, strict=True), start=1):
        loss = model.loss(tokens[None], labels[None])
        loss.backward()
        losses[number] = loss.item() / int((labels >= 0).sum())
    counts = int((batch.labels >= 0).sum())
    norms = {name: param.grad.norm().item() / counts for name, param in model.named_parameters()}
    loss = sum(losses[number] * int((batch.labels[number - 1] >= 0).sum()) for number in losses) / counts
    top = sorted(losses, key=losses.get, reverse=True)[:3]
    heavy = sorted(norms, key=norms.get, reverse=True)[:3]
    norm = math.hypot(*norms.values())
    windows = " ".join(map(str, top))
    expected = (
        f"computed again, loss {loss:.4g} and gradient norm {norm:.4g}; of 8 windows the loss is highest in "
        f"{', '.join(f'{one} ({losses[one]:.4g})' for one in top)} "
        f"(megacoder data show {case.folder / 'alone' / 'run.toml'} --step 3 --windows {windows}); the gradient is "
        f"largest of {', '.join(f'{one} ({norms[one]:.4g})' for one in heavy)}"
    )
    assert re.sub(r"[\d.]+", "#", alone) == re.sub(r"[\d.]+", "#", expected)
    assert numbers(alone) == pytest.approx(numbers(expected), rel=2e-3)


LAYOUTS = {
    "dp": ParallelConfig(),
    "tp": ParallelConfig(tp=2),
    "cp": ParallelConfig(cp=2),
    "pp": ParallelConfig(pp=2, schedule="zbv"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_the_same(ranks, case, alone, layout):
    config = case.config(layout, parallel=LAYOUTS[layout])
    for lines, untouched, updates in ranks.run(2, said_at, config, 3):
        assert (untouched, updates) == (True, 0)
        line = lines[0].replace(f"/{layout}/run.toml", "/alone/run.toml")
        assert re.sub(r"[\d.]+", "#", line) == re.sub(r"[\d.]+", "#", alone)
        assert numbers(line) == pytest.approx(numbers(alone), rel=2e-3)


def test_windows_have_their_numbers_after_data_of_another_batch_size(ranks, case):
    """Three windows were served before, which two ranks do not share evenly."""
    run_to(ALONE, case.config("three", global_batch_size=3, micro_batch_size=1), 1)
    more = {"init_from": case.folder / "three", "init_optimizer": True, "init_data": True}
    [alone, _], *_ = said_at(ALONE, case.config("after-one", **more), 1)
    for [line, *_], *_ in ranks.run(2, said_at, case.config("after-two", **more), 1):
        assert numbers(line.split(";")[1]) == pytest.approx(numbers(alone.split(";")[1]), rel=2e-3)


def fail_once(trainer):
    """One rank's gradient is wrong the first time that it is computed."""
    forward_backward, times = trainer.engine.forward_backward, []

    def failing(microbatches):
        times.append(1)
        if len(times) == 1 and trainer.world.rank == trainer.world.size - 1:
            trainer.engine.flat.grad[3] = math.inf  # before backwards add to it, as if the first had made it
        return forward_backward(microbatches)

    trainer.guard.limits = UpdateLimits
    trainer.engine.forward_backward = failing


def test_a_fault_that_passes_is_told_from_the_data(ranks, case):
    for [line, reason], untouched, _ in ranks.run(2, said_at, case.config("once"), 3, fail_once):
        assert untouched
        assert "within the limits: for a moment a device, its memory or a link has failed" in line
        assert reason == "update skipped: the gradient is not finite"


def poison(trainer):
    """As if something in layer 0 made its gradients and those before it no number."""
    forward_backward = trainer.engine.forward_backward

    def poisoned(microbatches):
        part = forward_backward(microbatches)
        for name, param in trainer.engine.model.named_parameters():
            if name.startswith(("embed_tokens", "layers.0.")):
                param.grad[0] = math.nan
        return part

    trainer.guard.limits = UpdateLimits
    trainer.engine.forward_backward = poisoned


def test_gradients_that_are_not_finite_are_placed_in_the_model(case):
    [line, _], *_ = said_at(ALONE, case.config("poisoned"), 3, poison)
    assert re.search(r"gradients of 7 of 15 weights are not finite, from layers\.0\.\S+ back$", line), line


def test_windows_without_a_finite_loss_come_first(case):
    def spoil(trainer):
        trainer.engine.losses, losses = (
            lambda microbatches: [
                replace(loss, total=loss.total * math.nan) if number == 1 else loss
                for number, loss in enumerate(losses(microbatches))
            ],
            trainer.engine.losses,
        )

    [line, _], *_ = said_at(ALONE, case.config("nan"), 3, spoil)
    assert "; 2 of 8 windows have no finite loss, such as 3 (nan), 4 (nan), " in line


def test_only_the_first_of_several_in_a_row_is_examined(case):
    trainer, lines = Trainer(case.config("row", guard=GuardConfig(max_skipped=9)), ALONE), []
    trainer._tell = lambda number, line: lines.append((number, line.startswith("computed again")))
    trainer.guard.note(loss=1.0, grad_norm=1.0, skipped=False, num_tokens=1)
    trainer.guard.limits = lambda: UpdateLimits(loss=-1.0 if trainer.step != 3 else 1e9)
    for _ in range(5):
        trainer.update()
    assert lines == [(1, True), (1, False), (2, False), (3, False), (5, True), (5, False)]


def test_the_windows_named_can_be_shown(case, capsys):
    config = case.config("shown")
    run_to(ALONE, config, 3)
    [line, _], *_ = said_at(ALONE, config, 5)
    command = re.search(r"\(megacoder (data show .*?)\);", line).group(1)
    assert command.endswith(f"--checkpoint {config.output / 'checkpoints/step-00000003'}"), "later steps take long"
    code, out, _ = run_command(capsys, *command.split())
    assert (code, out.count("=== step 5, window ")) == (0, 3)


def test_windows_are_shown_by_their_numbers_in_the_step(case, capsys):
    path, config = case.toml("numbers"), case.config("numbers")
    _, out, _ = run_command(capsys, "data", "show", path, "--step", "3", "--windows", "7", "2", "--json")
    windows = json.loads(out)["windows"]
    assert [window["window"] for window in windows] == [7, 2]
    tokenizer = load_tokenizer(config)
    stream = open_stream(config, tokenizer, dp_rank=0, dp_size=1)
    batch = [stream.next_batch() for _ in range(3)][-1]
    for window, row in zip(windows, (6, 1), strict=True):
        text = "".join(document["text"] for document in window["documents"])
        assert text == tokenizer.decode(batch.tokens[row].tolist())
    said = refusal(capsys, "data", "show", path, "--step", "3", "--windows", "9", code=2)
    assert "--windows 9: a step has windows 1 to 8" in said
