"""A run survives damage: of its own checkpoints, and of the clips it hears."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from psla_fast.shards import open_shards
from psla_fast.train.config import TrainConfig
from psla_fast.train.finite import NEVER, FiniteGuard
from psla_fast.train.loop import Trainer
from psla_fast.train.signals import Stopped
from tests.tiny import step_rows, tiny_config, train_tiny


@pytest.fixture(scope="module")
def finished(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A whole run of three epochs."""
    config = tiny_config(packed, tmp_path_factory.mktemp("finished") / "run")
    train_tiny(config)
    return config


def stop_run(config: TrainConfig, after_epochs: int) -> None:
    """Train, and stop right behind an epoch's last.pt."""
    from psla_fast.distributed import World

    trainer = Trainer(config, World(0, 1, torch.device("cpu")))
    finish = trainer._finish_epoch

    def finish_and_stop(epoch: int, *others: object) -> None:
        finish(epoch, *others)  # type: ignore[arg-type]
        if epoch == after_epochs:
            raise Stopped("test")

    trainer._finish_epoch = finish_and_stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        trainer.run()


def flip_byte(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 255
    path.write_bytes(content)


def rows_of(run: Path) -> list[list[float]]:
    return np.loadtxt(run / "result.csv", delimiter=",").tolist()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing"])
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(
    finished: TrainConfig, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
):
    config = tiny_config(packed, tmp_path / "run")
    stop_run(config, after_epochs=2)
    last = config.run / "checkpoints/last.pt"
    if damage == "flipped":
        flip_byte(last, 0.5)
    elif damage == "missing":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2 if damage == "cut" else 0])
    capsys.readouterr()
    train_tiny(config)
    printed = capsys.readouterr().out
    assert "going on at epoch 2, step 1" in printed
    assert ("warning:" in printed) == (damage != "missing")
    assert rows_of(config.run) == rows_of(finished.run)
    assert step_rows(config.run) == step_rows(finished.run)


def test_when_both_checkpoints_are_damaged_one_line_says_so(packed: Path, tmp_path: Path):
    config = tiny_config(packed, tmp_path / "run")
    stop_run(config, after_epochs=2)
    for name in ("last.pt", "previous.pt"):
        flip_byte(config.run / "checkpoints" / name, 0.5)
    with pytest.raises(ValueError, match=r"last\.pt is not a whole torch file of tensors") as caught:
        train_tiny(config)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def poisoned(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Shards in which bits of one training clip were flipped such that it holds NaN, and its key."""
    shards = Path(shutil.copytree(packed, tmp_path_factory.mktemp("poisoned") / "shards"))
    with open_shards(shards / "train") as train:
        clip_id = 5
        key = train.keys[clip_id]
        tar, offset = train.shard_path(int(train.index.shard[clip_id])), int(train.index.offset[clip_id])
    with open(tar, "r+b") as file:
        file.seek(offset)
        file.write(np.full(128, np.nan, dtype="<f2").tobytes())
    return shards, key


def test_a_clip_that_makes_the_loss_nan_is_named_and_stops_the_run(
    poisoned: tuple[Path, str], tmp_path: Path
):
    shards, key = poisoned
    config = tiny_config(shards, tmp_path / "run", "--log-every-steps", "3", "--sampling.kind", "shuffle")
    with pytest.raises(ValueError, match=f"damaged or not finite in the shards: {key}\\. "):
        train_tiny(config)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_nan_loss_is_left_out_by_choice_and_the_run_ends_well(
    poisoned: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
):
    shards, key = poisoned
    flags = ("--sampling.kind", "shuffle", "--sampling.mixup-rate", "0", "--on-nan", "skip")
    config = tiny_config(shards, tmp_path / "run", *flags, "--precision", precision)
    trainer = train_tiny(config)
    # a bad loss isn't an overflow: the scale must not fall, or many would end in gradients of 0
    assert trainer.step.scaler.get_scale() == (2.0**16 if precision == "fp16" else 1.0)
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    lines = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    noted = [line for line in lines if "not_finite" in line]
    assert [line["epoch"] for line in noted] == [1, 2, 3]  # a shuffled epoch has each clip once
    assert all(line["not_finite"] == 1 and line["clips"].endswith(key) for line in noted)
    assert capsys.readouterr().out.count("such losses are left out") == 3
    assert np.isfinite(rows_of(config.run)).all()


def test_a_run_that_a_nan_stopped_goes_on_by_leaving_such_steps_out(
    poisoned: tuple[Path, str], tmp_path: Path
):
    flags = ("--sampling.kind", "shuffle", "--sampling.mixup-rate", "0")
    config = tiny_config(poisoned[0], tmp_path / "run", *flags)
    with pytest.raises(ValueError, match="the loss isn't finite"):
        train_tiny(config)
    train_tiny(tiny_config(poisoned[0], tmp_path / "run", *flags, "--on-nan", "skip"))
    assert len(rows_of(config.run)) == 3


def test_leaving_out_changes_nothing_where_all_is_finite(finished: TrainConfig, packed: Path, tmp_path: Path):
    config = tiny_config(packed, tmp_path / "run", "--on-nan", "skip")
    train_tiny(config)
    assert step_rows(config.run) == step_rows(finished.run)
    assert rows_of(config.run) == rows_of(finished.run)


def test_a_step_that_is_left_out_leaves_batch_norm_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    guard = FiniteGuard(model, skips=True, device=torch.device("cpu"))
    for step, poison in enumerate([0.0, float("nan"), float("inf"), 0.0]):
        before = model[1].running_mean.clone()  # type: ignore[union-attr, operator]
        guard.before_step()
        loss = guard.after_step(step, model(torch.randn(8, 4) + poison).square().mean().detach())
        assert torch.equal(before, model[1].running_mean) == (poison != 0)  # type: ignore[arg-type]
        assert (loss == 0) == (poison != 0)
    assert guard.take() == (1, 2)
    assert guard.take() == (NEVER, 0)
