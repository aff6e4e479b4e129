"""Averages of a run's weights beside PSLA's: the EMA, and BatchNorm's statistics measured anew.

And upstream's average, for comparison; the command average has a file of its own.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from psla_fast.checkpoint import load_checkpoint
from psla_fast.distributed import World
from psla_fast.evaluate import evaluate_checkpoint
from psla_fast.stream import open_stream
from psla_fast.train.loop import Trainer
from psla_fast.train.signals import Stopped
from psla_fast.train.step import TrainStep
from tests.tiny import tiny_config, train_tiny, train_tiny_on_ranks

EMA = ("--wa.ema-decay", "0.8")
LITE = ("--model.name", "efficientnet_lite0", "--model.batch-norm-momentum", "0.1", "--model.num-heads", "1")
LITE += ("--optim.epochs", "2", "--wa.start", "1", "--wa.end", "2", "--input.clip-frames", "64")
LITE += ("--sampling.num-draws", "24")


def weights(path: Path) -> dict[str, Tensor]:
    return load_checkpoint(path).state


def train_and_average_by_hand(
    config_flags: tuple[str, ...], shards: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """Train with an EMA of 0.8; give the same average of the weights seen after each update."""
    take_step, seen = Trainer._step, []

    def step_and_look(self: Trainer, *place: object) -> Tensor:
        if not seen:
            seen.append({name: value.double() for name, value in self.model.state_dict().items()})
        loss = take_step(self, *place)  # type: ignore[arg-type]
        if place[-1]:
            n = len(seen)
            kept = min(0.8, (1 + n) / (10 + n))
            now = self.model.state_dict()
            seen.append({name: kept * seen[-1][name] + (1 - kept) * now[name] for name in now})
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", step_and_look)
        train_tiny(tiny_config(shards, run, *EMA, *config_flags))
    return seen[-1]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--optim.batch-size", "4", "--optim.accumulate", "3"),
        ("--precision", "fp16"),
        ("--compile", "default", "--optim.epochs", "2"),
    ],
)
def test_the_ema_of_a_run_is_that_of_its_weights_after_each_update(
    packed: Path, tmp_path: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "psla_fast.train.compiling.BACKEND", "eager"
    )  # traced, which makes the names; not built
    wanted = train_and_average_by_hand(flags, packed, tmp_path / "run", monkeypatch)
    averaged = weights(tmp_path / "run/checkpoints/ema.pt")
    assert averaged.keys() == wanted.keys()
    for name, value in averaged.items():
        assert torch.allclose(value.double(), wanted[name], atol=1e-6), name


@pytest.fixture(scope="module")
def finished(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    train_tiny(tiny_config(packed, run, *EMA))
    return run


def test_the_ema_is_scored_on_every_split_and_named_at_the_end(
    packed: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
):
    result = np.loadtxt(finished / "ema_result.csv")
    for number, split in enumerate(("val", "eval")):
        measured = evaluate_checkpoint(finished / "checkpoints/ema.pt", packed / split, 8, "fp32", "cpu")
        wanted = measured.metrics.mean_ap, measured.metrics.mean_auc
        assert result[2 * number :][:2] == pytest.approx(wanted, abs=1e-6)
    train_tiny(tiny_config(packed, finished, *EMA))
    assert f"weights' EMA           val mAP {result[0]:.4f}" in capsys.readouterr().out
    train_tiny(tiny_config(packed, tmp_path / "plain"))
    assert not (tmp_path / "plain/ema_result.csv").exists()
    assert not (tmp_path / "plain/checkpoints/ema.pt").exists()
    for name in ("result.csv", "wa_result.csv"):
        assert (tmp_path / "plain" / name).read_bytes() == (finished / name).read_bytes()


def test_a_run_stopped_and_gone_on_with_has_the_ema_of_an_uninterrupted_one(
    packed: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_config(packed, tmp_path / "run", *EMA)
    take_step = Trainer._step

    def stop_there(self: Trainer, epoch: int, step: int, *rest: object) -> Tensor:
        if (epoch, step) == (2, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, epoch, step, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", stop_there)
        with pytest.raises(Stopped):
            train_tiny(config)
    train_tiny(config)
    one, other = (weights(run / "checkpoints/ema.pt") for run in (config.run, finished))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (config.run / "ema_result.csv").read_bytes() == (finished / "ema_result.csv").read_bytes()


def test_two_ranks_have_the_ema_of_one(packed: Path, tmp_path: Path):
    flags = (*EMA, "--model.drop-connect", "0")
    train_tiny(tiny_config(packed, tmp_path / "one", *flags))
    train_tiny_on_ranks(2, packed, tmp_path / "two", *flags)
    one, two = (weights(tmp_path / name / "checkpoints/ema.pt") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_an_update_left_out_for_its_loss_leaves_the_ema_finite(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bare = TrainStep.prepare

    def prepare_nan(self: TrainStep, batch: object, epoch: int, step: int) -> object:
        inputs, targets = bare(self, batch, epoch, step)  # type: ignore[arg-type]
        return (inputs[0] * (torch.nan if step == 2 else 1),), targets

    monkeypatch.setattr(TrainStep, "prepare", prepare_nan)
    train_tiny(tiny_config(packed, tmp_path / "run", *EMA, *LITE, "--on-nan", "skip"))
    state = weights(tmp_path / "run/checkpoints/ema.pt")
    assert all(value.isfinite().all() for value in state.values())


class Inputs(nn.Module):
    """A model whose several arguments are one, as update_bn hands on just one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        scores: Tensor = self.model(*inputs)
        return scores


BUCKETS = ("--model.mask-padding", "True", "--stream.buckets", "32", "64", "--stream.bucket-by", "clips")


@pytest.mark.parametrize(
    ("flags", "num_clips", "wanted_steps"),
    [((), 33, [(3, 3), (4, 2)]), (BUCKETS, 16, [(3, 2)])],  # epochs of 3 steps, 8 clips each
)
def test_batch_norm_of_an_average_is_measured_on_training_batches_beyond_the_run(
    packed: Path, tmp_path: Path, flags: tuple[str, ...], num_clips: int, wanted_steps: list[tuple[int, int]]
):
    config = tiny_config(
        packed, tmp_path / "run", *LITE, *EMA, *flags, "--wa.batch-norm-clips", str(num_clips)
    )
    train_tiny(config)
    trainer = Trainer(config, World(0, 1, torch.device("cpu")))
    assert trainer.ema
    epochs = [weights(config.run / f"checkpoints/epoch_0{number}.pt") for number in (1, 2)]
    mean = {name: (value.double() + epochs[1][name]) / 2 for name, value in epochs[0].items()}
    stream = open_stream(trainer.train, config.stream, trainer.plan.shapes, torch.device("cpu"))

    def inputs() -> Iterator[list[tuple[Tensor, ...]]]:  # each is made, and torch seeded, when it is wanted
        for epoch, num_steps in wanted_steps:
            batches = zip(range(num_steps), stream.batches(trainer.plan.batches(epoch)), strict=False)
            for step, batch in batches:
                yield [trainer.step.prepare(batch, epoch, step)[0]]

    for which, average in {"wa": mean, "ema": trainer.ema.state_dict()}.items():
        trainer.model.load_state_dict(average)
        update_bn(inputs(), Inputs(trainer.model))
        got = weights(config.run / f"checkpoints/{which}.pt")
        for name, value in trainer.model.state_dict().items():
            assert torch.allclose(got[name], value, rtol=1e-3, atol=1e-4), (which, name)
        statistics = [name for name in got if name.endswith(("running_mean", "running_var"))]
        assert not any(torch.allclose(got[name], average[name].float(), rtol=1e-3) for name in statistics)
    stream.close()


def test_a_model_without_batch_norm_says_that_there_is_nothing_to_measure(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for run, flags in (("one", ()), ("other", ("--wa.batch-norm-clips", "30"))):
        train_tiny(tiny_config(packed, tmp_path / run, *flags))
    assert capsys.readouterr().out.count("tiny has no BatchNorm: wa.batch_norm_clips does nothing") == 1
    one, other = (weights(tmp_path / run / "checkpoints/wa.pt") for run in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_upstream_s_average_counts_its_first_epoch_twice_after_a_resume_too(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_config(packed, tmp_path / "run", "--optim.epochs", "4", "--wa.end", "4", "--wa.upstream")
    take_step = Trainer._step

    def stop_there(self: Trainer, epoch: int, step: int, *rest: object) -> Tensor:
        if (epoch, step) == (3, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, epoch, step, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", stop_there)
        with pytest.raises(Stopped):
            train_tiny(config)
    train_tiny(config)
    epochs = [weights(config.run / f"checkpoints/epoch_0{number}.pt") for number in (2, 3, 4)]
    for name, value in weights(config.run / "checkpoints/wa.pt").items():
        first, *others = (epoch[name].double() for epoch in epochs)
        assert torch.allclose(value.double(), (2 * first + sum(others)) / 4, atol=1e-7), name
        assert not torch.allclose(value.double(), (first + sum(others)) / 3, atol=1e-7), name
