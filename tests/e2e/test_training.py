import os
import re
import shutil
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from psla_fast.checkpoint import load_checkpoint
from psla_fast.distributed import World
from psla_fast.evaluate import evaluate_checkpoint
from psla_fast.metrics import compute_metrics
from psla_fast.pack import PackConfig, WorkConfig, pack_splits
from psla_fast.shards import open_shards
from psla_fast.sources import read_fsd50k
from psla_fast.train.compiling import count_graphs
from psla_fast.train.loop import Trainer
from psla_fast.train.signals import Stopped
from tests.tiny import TinyNet, step_rows, tiny_config, train_tiny, train_tiny_on_ranks


@pytest.fixture(scope="module")
def finished(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    train_tiny(tiny_config(packed, run))
    return run


def numbers(path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=",", ndmin=2)


def weights(path: Path) -> dict[str, Tensor]:
    return load_checkpoint(path).state


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_loss_falls_and_every_file_of_psla_is_there(finished: Path):
    result = numbers(finished / "result.csv")
    assert result.shape == (3, 10)
    assert result[2, 5] < result[0, 5]
    for name in ("best_single_result.csv", "wa_result.csv", "ensemble_result.csv"):
        assert numbers(finished / name).shape == (4, 1)
    names = {path.name for path in (finished / "checkpoints").iterdir()}
    assert names == {
        "last.pt",
        "previous.pt",
        "best.pt",
        "wa.pt",
        "epoch_01.pt",
        "epoch_02.pt",
        "epoch_03.pt",
    }
    assert list((finished / "events").glob("events.out.tfevents.*"))
    assert not list(finished.rglob("*.tmp"))


def test_result_rows_agree_with_the_scores_that_were_kept(finished: Path, packed: Path):
    result = numbers(finished / "result.csv")
    with open_shards(packed / "val") as shards, h5py.File(finished / "scores/val.h5") as file:
        targets = shards.targets(np.arange(len(shards)))
        assert [key.decode() for key in file["key"][:]] == shards.keys
        assert np.array_equal(file["targets"][:], targets)
        epochs = np.stack([file[f"epochs/{n:02d}"][:] for n in (1, 2, 3)])
        for row, scores in zip(result, epochs, strict=True):
            measured = compute_metrics(scores, targets)
            assert row[:5] == pytest.approx(
                [
                    measured.mean_ap,
                    measured.mean_auc,
                    measured.mean_precision,
                    measured.mean_recall,
                    measured.d_prime,
                ]
            )
        assert np.allclose(file["scores"][:], epochs.mean(axis=0), atol=1e-6)
        assert result[2, 7] == pytest.approx(compute_metrics(epochs.mean(axis=0), targets).mean_ap)
        assert numbers(finished / "ensemble_result.csv")[0, 0] == pytest.approx(result[2, 7], abs=1e-6)


def test_the_weight_average_is_the_plain_mean_of_its_epochs(finished: Path):
    averaged = weights(finished / "checkpoints/wa.pt")
    second, third = (weights(finished / f"checkpoints/epoch_0{n}.pt") for n in (2, 3))
    for name, value in averaged.items():
        assert torch.allclose(value, (second[name].double() + third[name]).float() / 2, atol=1e-7), name


def test_best_is_the_epoch_of_highest_validation_map(finished: Path):
    best = int(np.argmax(numbers(finished / "result.csv")[:, 0])) + 1
    assert same_weights(finished / "checkpoints/best.pt", finished / f"checkpoints/epoch_0{best}.pt")
    assert numbers(finished / "best_single_result.csv")[0, 0] == numbers(finished / "result.csv")[best - 1, 0]


@pytest.mark.parametrize("at_call", [2, 7])
def test_a_signal_stops_the_scoring_too_and_the_run_goes_on_with_it(
    packed: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_call: int
):
    config = tiny_config(packed, tmp_path / "run")
    forward, calls = TinyNet.forward, iter(range(1, 1000))

    def forward_and_signal(self: TinyNet, *inputs: Tensor) -> Tensor:
        if not self.training and next(calls) == at_call:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *inputs)

    with monkeypatch.context() as patched:
        patched.setattr(TinyNet, "forward", forward_and_signal)
        with pytest.raises(Stopped, match="SIGTERM"):
            train_tiny(config)
        assert next(calls) == at_call + 1  # not one batch more
    trainer = Trainer(config, World(0, 1, torch.device("cpu")))
    assert trainer.state.step == trainer.plan.num_steps(trainer.state.epoch)
    train_tiny(config)
    assert step_rows(config.run) == step_rows(finished)
    for name in ("result.csv", "best_single_result.csv", "wa_result.csv", "ensemble_result.csv"):
        assert (config.run / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.parametrize(("epoch", "step"), [(1, 2), (2, 1), (3, 6)])
def test_a_run_stopped_at_any_step_ends_like_an_uninterrupted_one(
    packed: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, step: int
):
    config = tiny_config(packed, tmp_path / "run")
    take_step = Trainer._step

    def stop_there(self: Trainer, at_epoch: int, at_step: int, *rest: object) -> Tensor:
        if (at_epoch, at_step) == (epoch, step):
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, at_epoch, at_step, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", stop_there)
        with pytest.raises(Stopped, match="SIGTERM"):
            train_tiny(config)
    train_tiny(config)
    assert step_rows(config.run) == step_rows(finished)
    for name in ("result.csv", "best_single_result.csv", "wa_result.csv", "ensemble_result.csv"):
        assert (config.run / name).read_bytes() == (finished / name).read_bytes(), name
    for name in ("last.pt", "best.pt", "wa.pt"):
        assert same_weights(config.run / "checkpoints" / name, finished / "checkpoints" / name), name
    with h5py.File(config.run / "scores/eval.h5") as one, h5py.File(finished / "scores/eval.h5") as other:
        assert np.array_equal(one["scores"][:], other["scores"][:])


def test_a_finished_run_started_again_changes_nothing(
    packed: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    train_tiny(tiny_config(packed, run))
    assert "already trained" in capsys.readouterr().out
    assert (run / "result.csv").read_bytes() == (finished / "result.csv").read_bytes()
    assert same_weights(run / "checkpoints/wa.pt", finished / "checkpoints/wa.pt")


def test_the_same_seed_repeats_a_run_and_another_does_not(packed: Path, finished: Path, tmp_path: Path):
    train_tiny(tiny_config(packed, tmp_path / "again"))
    train_tiny(tiny_config(packed, tmp_path / "other", "--seed", "1"))
    assert step_rows(tmp_path / "again") == step_rows(finished)
    assert step_rows(tmp_path / "other") != step_rows(finished)


def test_going_on_with_other_settings_or_data_is_refused(packed: Path, finished: Path, tmp_path: Path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"was begun with optim\.lr = 0\.01, now it is 0\.02"):
        train_tiny(tiny_config(packed, run, "--optim.lr", "0.02"))
    with pytest.raises(ValueError, match="holds a run already"):
        train_tiny(tiny_config(packed, run, "--resume", "never"))
    moved = tmp_path / "shards"
    shutil.copytree(packed / "val", moved / "train")
    shutil.copytree(packed / "val", moved / "val")
    shutil.copy(packed / "classes.csv", moved)
    with pytest.raises(ValueError, match="trained on other draws"):
        train_tiny(tiny_config(moved, run))
    shutil.rmtree(moved)
    shutil.copytree(packed, moved)
    shutil.rmtree(moved / "val")
    shutil.copytree(packed / "eval", moved / "val")
    with pytest.raises(ValueError, match="was scored on other splits"):
        train_tiny(tiny_config(moved, run))


def test_a_set_without_eval_reports_two_numbers(packed: Path, tmp_path: Path):
    shards = Path(shutil.copytree(packed, tmp_path / "shards"))
    shutil.rmtree(shards / "eval")
    train_tiny(tiny_config(shards, tmp_path / "run", "--optim.epochs", "2"))
    for name in ("best_single_result.csv", "wa_result.csv", "ensemble_result.csv"):
        assert numbers(tmp_path / "run" / name).shape == (2, 1)


def test_without_an_epoch_to_average_the_run_says_so(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train_tiny(tiny_config(packed, tmp_path / "run", "--optim.epochs", "1"))
    assert "no weight average was made" in capsys.readouterr().out
    assert not (tmp_path / "run/wa_result.csv").exists()


def test_a_nan_loss_stops_the_run_and_keeps_the_last_good_state(packed: Path, tmp_path: Path):
    config = tiny_config(packed, tmp_path / "run", "--input.pad-value", "nan")
    with pytest.raises(ValueError, match="the loss isn't finite at epoch 1, step 1; its clips are"):
        train_tiny(config)
    assert not config.run.joinpath("checkpoints/last.pt").exists()


def test_two_gloo_ranks_give_the_loss_curve_of_one(packed: Path, tmp_path: Path):
    train_tiny(tiny_config(packed, tmp_path / "one", "--model.drop-connect", "0"))
    train_tiny_on_ranks(2, packed, tmp_path / "two", "--model.drop-connect", "0")
    one, two = numbers(tmp_path / "one/result.csv"), numbers(tmp_path / "two/result.csv")
    assert np.allclose(one[:, [5, 6]], two[:, [5, 6]], rtol=1e-5)
    first, second = weights(tmp_path / "one/checkpoints/wa.pt"), weights(tmp_path / "two/checkpoints/wa.pt")
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


LITE0 = ["--model.name", "efficientnet_lite0", "--model.batch-norm-momentum", "0.1", "--optim.epochs", "1"]


def test_the_scores_of_two_ranks_are_those_of_the_saved_weights(packed: Path, tmp_path: Path):
    train_tiny_on_ranks(2, packed, tmp_path / "run", *LITE0)
    saved = evaluate_checkpoint(tmp_path / "run/checkpoints/epoch_01.pt", packed / "val", 4, "fp32", "cpu")
    with h5py.File(tmp_path / "run/scores/val.h5") as file:
        assert np.allclose(file["epochs/01"][:], saved.scores, atol=1e-5)


def test_with_synchronised_batch_norm_two_ranks_give_the_loss_curve_of_one(packed: Path, tmp_path: Path):
    flags = [*LITE0, "--model.drop-connect", "0", "--input.clip-frames", "64", "--sampling.num-draws", "32"]
    flags += ["--optim.optimizer", "sgd", "--optim.lr", "0.001", "--channels-last", "False"]
    train_tiny(tiny_config(packed, tmp_path / "one", *flags, "--sync-batch-norm", "True"))
    train_tiny_on_ranks(2, packed, tmp_path / "two", *flags, "--sync-batch-norm", "True")
    train_tiny_on_ranks(2, packed, tmp_path / "apart", *flags)
    one, two, apart = (numbers(tmp_path / name / "result.csv")[0, [5, 6]] for name in ("one", "two", "apart"))
    assert np.allclose(one, two, rtol=1e-4)
    first, *others = (step_rows(tmp_path / name)[0]["loss"] for name in ("one", "two", "apart"))
    assert others[0] == pytest.approx(first, rel=1e-4)
    assert others[1] != pytest.approx(first, rel=2e-3)
    saved = evaluate_checkpoint(tmp_path / "two/checkpoints/epoch_01.pt", packed / "val", 4, "fp32", "cpu")
    with h5py.File(tmp_path / "two/scores/val.h5") as file:
        assert np.allclose(file["epochs/01"][:], saved.scores, atol=1e-5)


def test_the_progress_line_tells_speed_wait_rate_loss_and_eta(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train_tiny(tiny_config(packed, tmp_path / "run", "--optim.epochs", "1"))
    line = r"epoch 1/1 step \d+/\d+  loss 0\.\d{4}  lr \d\.\d\de[-+]\d\d  "
    line += r"\d+ clips/s  loader wait \d+\.\d%  ETA \d:\d\d"
    assert re.search(line, capsys.readouterr().out)


@pytest.mark.parametrize(
    "flags", [["--compile", "default"], ["--precision", "bf16"], ["--precision", "fp16"]]
)
def test_compiled_and_half_precision_runs_follow_the_eager_fp32_loss(
    packed: Path, tmp_path: Path, flags: list[str]
):
    torch.compiler.reset()
    before = count_graphs()
    train_tiny(tiny_config(packed, tmp_path / "run", "--model.drop-connect", "0", *flags))
    assert (count_graphs() > before) == ("--compile" in flags)
    train_tiny(tiny_config(packed, tmp_path / "eager", "--model.drop-connect", "0"))
    followed, wanted = (numbers(tmp_path / name / "result.csv")[:, 5] for name in ("run", "eager"))
    assert np.allclose(followed, wanted, rtol=1e-4 if "--compile" in flags else 0.02)


def test_50_steps_of_efficientnet_in_bf16_channels_last_have_the_loss_curve_of_eager_fp32(
    packed: Path, tmp_path: Path
):
    flags = ["--model.name", "efficientnet_b0", "--model.drop-connect", "0", "--optim.lr", "1e-4"]
    flags += ["--input.clip-frames", "64", "--sampling.num-draws", "200", "--optim.batch-size", "4"]
    flags += ["--optim.epochs", "1", "--wa.start", "1"]
    train_tiny(tiny_config(packed, tmp_path / "plain", *flags, "--channels-last", "False"))
    train_tiny(tiny_config(packed, tmp_path / "ours", *flags, "--precision", "bf16"))
    plain, ours = (np.array([row["loss"] for row in step_rows(tmp_path / n)]) for n in ("plain", "ours"))
    assert len(plain) == 50
    assert plain[-5:].mean() < 0.9 * plain[:5].mean()
    assert (ours != plain).any()
    assert np.abs(ours / plain - 1).max() < 0.03


def test_uint8_shards_train_nearly_alike(synthetic_fsd50k: Path, finished: Path, tmp_path: Path):
    pack_splits(
        *read_fsd50k(synthetic_fsd50k), tmp_path / "shards", PackConfig(dtype="uint8"), WorkConfig(workers=1)
    )
    train_tiny(tiny_config(tmp_path / "shards", tmp_path / "run"))
    assert np.allclose(
        numbers(tmp_path / "run/result.csv")[:, 5], numbers(finished / "result.csv")[:, 5], rtol=0.02
    )


PLAIN = ("--model.drop-connect", "0", "--augment.freq-mask-bins", "0", "--augment.time-mask-frames", "0")


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_batches_added_up_are_one_of_twice_the_size(packed: Path, tmp_path: Path, ranks: int):
    flags = (*PLAIN, "--optim.batch-size", "4", "--optim.accumulate", "2")
    train_tiny(tiny_config(packed, tmp_path / "whole", *PLAIN))
    if ranks == 1:
        train_tiny(tiny_config(packed, tmp_path / "parts", *flags))
    else:
        train_tiny_on_ranks(2, packed, tmp_path / "parts", *flags)
    whole, parts = numbers(tmp_path / "whole/result.csv"), numbers(tmp_path / "parts/result.csv")
    assert np.allclose(whole[:, [5, 6, 9]], parts[:, [5, 6, 9]], rtol=1e-5)  # losses, rate
    assert len(step_rows(tmp_path / "parts")) == 2 * len(step_rows(tmp_path / "whole"))


def test_added_up_batches_survive_a_stop_between_them(packed: Path, tmp_path: Path):
    flags = ("--optim.batch-size", "4", "--optim.accumulate", "3", "--checkpoint-minutes", "0")
    train_tiny(tiny_config(packed, tmp_path / "whole", *flags))
    config = tiny_config(packed, tmp_path / "stopped", *flags)
    trainer = Trainer(config, World(0, 1, torch.device("cpu")))
    trainer.signals.noted = signal.SIGTERM
    with pytest.raises(Stopped):
        trainer.run()
    assert trainer.state.step == 3
    train_tiny(config)
    assert step_rows(config.run) == step_rows(tmp_path / "whole")


@pytest.mark.parametrize(
    "flags",
    [
        ("--optim.optimizer", "adamw", "--optim.weight-decay", "0.1"),
        ("--optim.optimizer", "sgd"),
        ("--optim.optimizer", "sgd", "--optim.momentum", "0.5"),
        ("--optim.schedule", "cosine"),
        ("--optim.schedule", "cosine", "--optim.final-lr-fraction", "0.5"),
        ("--optim.schedule", "one_cycle"),
        ("--loss.kind", "focal"),
        ("--loss.kind", "focal", "--loss.focal-gamma", "1"),
        ("--loss.kind", "cross_entropy"),
        ("--loss.label-smoothing", "0.1"),
        ("--augment.time-mask-fraction", "0.1"),
        ("--augment.num-time-masks", "2"),
        ("--augment.gain-db", "6"),
        ("--augment.freq-mixstyle", "0.8"),
        ("--augment.filter-augment-db", "6"),
    ],
)
def test_each_option_of_the_recipe_has_its_effect(
    packed: Path, tmp_path: Path, flags: tuple[str, ...], plain_rows: list[dict[str, object]]
):
    train_tiny(tiny_config(packed, tmp_path / "run", *flags))
    rows = step_rows(tmp_path / "run")
    assert len(rows) == len(plain_rows)
    assert rows != plain_rows
    assert all(np.isfinite(row["loss"]) for row in rows)


@pytest.fixture(scope="module")
def plain_rows(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    config = tiny_config(packed, tmp_path_factory.mktemp("plain") / "run")
    train_tiny(config)
    return step_rows(config.run)


def test_a_warm_up_longer_than_the_run_is_refused_where_the_rate_would_never_fall(
    packed: Path, tmp_path: Path
):
    flags = ("--optim.schedule", "cosine", "--optim.warmup-steps", "1000")
    with pytest.raises(ValueError, match="optim.warmup_steps is 1000, the run has 24 updates"):
        train_tiny(tiny_config(packed, tmp_path / "run", *flags))
