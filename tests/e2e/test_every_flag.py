"""Each setting of training is obeyed: one is changed, and what it should change differs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from psla_fast.checkpoint import load_checkpoint
from psla_fast.recipe import flat_config
from psla_fast.scores import write_scores
from psla_fast.shards import open_shards
from tests.tiny import step_rows, tiny_config, train_tiny

BASE = ["--optim.epochs", "1", "--wa.start", "1", "--wa.end", "9", "--optim.halve-after-epoch", "9"]
TWO = ["--optim.epochs", "2"]
EFFICIENTNET = ["--model.name", "efficientnet_b0", "--input.clip-frames", "64", "--sampling.num-draws", "16"]
BUCKETS = ["--input.clip-frames", "200", "--stream.buckets", "80", "200"]

# Settings that change the losses: what must be set besides for that, and the change
LOSSES: list[tuple[list[str], list[str]]] = [
    ([], ["--input.clip-frames", "90"]),
    ([], ["--input.pad-value", "mean"]),
    ([], ["--input.statistics", "shards"]),
    ([], ["--sampling.kind", "shuffle"]),
    ([], ["--sampling.num-draws", "40"]),
    ([], ["--sampling.mixup-rate", "0.2"]),
    ([], ["--sampling.mixup-alpha", "1"]),
    ([], ["--stream.kind", "webdataset"]),
    (["--stream.kind", "webdataset"], ["--stream.lanes", "2"]),
    (["--stream.kind", "webdataset"], ["--stream.shuffle-clips", "2"]),
    ([], BUCKETS),
    (BUCKETS, ["--stream.bucket-by", "clips"]),
    (BUCKETS, ["--stream.bucket-window", "2"]),
    ([], ["--augment.gain-db", "6"]),
    ([], ["--augment.mixup-domain", "linear"]),
    ([], ["--augment.freq-mask-bins", "20"]),
    ([], ["--augment.num-freq-masks", "2"]),
    ([], ["--augment.time-mask-frames", "10"]),
    ([], ["--augment.num-time-masks", "2"]),
    ([], ["--augment.time-mask-fraction", "0.1"]),
    ([], ["--augment.mask-value", "mean"]),
    ([], ["--augment.freq-mixstyle", "0.9"]),
    (["--augment.freq-mixstyle", "0.9"], ["--augment.freq-mixstyle-alpha", "2"]),
    ([], ["--augment.filter-augment-db", "6"]),
    ([], ["--augment.noise", "0.5"]),
    ([], ["--model.drop-connect", "0.5"]),
    ([], ["--optim.batch-size", "4"]),
    ([], ["--optim.accumulate", "2"]),
    ([], ["--optim.optimizer", "sgd"]),
    (["--optim.optimizer", "sgd"], ["--optim.momentum", "0.5"]),
    ([], ["--optim.lr", "0.02"]),
    ([], ["--optim.betas", "0.5", "0.9"]),
    ([], ["--optim.weight-decay", "0.1"]),
    ([], ["--optim.schedule", "cosine"]),
    (["--optim.schedule", "cosine"], ["--optim.final-lr-fraction", "0.5"]),
    ([], ["--optim.warmup-steps", "8"]),
    ([], ["--optim.warmup-every-steps", "2"]),
    (TWO, ["--optim.halve-after-epoch", "1"]),
    (["--optim.epochs", "3", "--optim.halve-after-epoch", "1"], ["--optim.halve-every-epochs", "1"]),
    ([], ["--loss.kind", "focal"]),
    (["--loss.kind", "focal"], ["--loss.focal-gamma", "1"]),
    ([], ["--loss.label-smoothing", "0.1"]),
    ([], ["--seed", "5"]),
    ([], ["--precision", "bf16"]),
    (EFFICIENTNET, ["--model.name", "efficientnet_lite0"]),
    (EFFICIENTNET, ["--model.num-heads", "1"]),
    (EFFICIENTNET, ["--model.same-padding", "asymmetric"]),
    (EFFICIENTNET, ["--model.pooling", "linear_softmax"]),
    (EFFICIENTNET, ["--model.dropout", "0.3"]),
    ([*EFFICIENTNET, "--input.clip-frames", "192"], ["--model.mask-padding"]),
    (EFFICIENTNET, ["--augment.roll-frames", "30"]),
]
# Settings whose effect is a file, a line or a refusal, and those that must not change what is learnt: where
# they are tested
OTHERS = {
    "data.shards": "every test gives it",
    "data.train": "here",
    "data.val": "here",
    "data.eval": "here",
    "data.labels": "here",
    "run": "every test gives it",
    "model.pretrained": "here",
    "model.batch_norm_momentum": "here",
    "optim.epochs": "here",
    "optim.backbone_lr_factor": "test_finetune.py",
    "optim.freeze_epochs": "test_finetune.py",
    "strict": "test_finetune.py",
    "distill.scores": "here",
    "distill.weight": "here",
    "wa.start": "here",
    "wa.end": "here",
    "wa.ema_decay": "here",
    "wa.batch_norm_clips": "here",
    "wa.upstream": "here",
    "sync_batch_norm": "test_training.py",
    "compile": "test_compiling.py",
    "channels_last": "here",
    "device": "test_training.py, test_cuda.py",
    "resume": "test_training.py",
    "keep_epochs": "here",
    "checkpoint_minutes": "test_training_kills.py",
    "on_nan": "test_survival.py",
    "log_every_steps": "here",
    "profile": "test_watching.py",
    "wandb": "test_watching.py",
    "stream.num_threads": "test_stream.py",
    "stream.read_ahead": "test_stream.py",
    "stream.check_crc": "test_stream_faults.py",
    "stream.on_error": "test_stream_training.py",
    "stream.place": "test_stream_training.py",
    "stream.cache": "test_remote_faults.py",
    "stream.dali_buffer_mb": "test_stream_dali.py",
}


def run_with(packed: Path, run: Path, *flags: str) -> Path:
    train_tiny(tiny_config(packed, run, *BASE, *flags))
    return run


@pytest.fixture(scope="module")
def losses_of(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Any]:
    """The step rows of a run with these flags; each is trained once."""
    done: dict[tuple[str, ...], Any] = {}

    def get(flags: list[str]) -> Any:
        if tuple(flags) not in done:
            done[tuple(flags)] = step_rows(run_with(packed, tmp_path_factory.mktemp("run") / "run", *flags))
        return done[tuple(flags)]

    return get


def test_each_setting_stands_in_one_of_the_lists(tmp_path: Path):
    known = set(flat_config(tiny_config(tmp_path, tmp_path)))
    changed = {
        flag.removeprefix("--").replace("-", "_")
        for _, change in LOSSES
        for flag in change
        if flag.startswith("--")
    }
    assert known == changed | set(OTHERS)


@pytest.mark.parametrize(("besides", "change"), LOSSES, ids=lambda flags: " ".join(flags))
def test_a_setting_changes_the_losses(
    losses_of: Callable[[list[str]], Any], besides: list[str], change: list[str]
):
    before, after = losses_of(besides), losses_of([*besides, *change])
    assert [row["loss"] for row in before] != [row["loss"] for row in after]
    assert np.isfinite([row["loss"] for row in after]).all()


def test_the_same_settings_give_the_same_losses(packed: Path, tmp_path: Path):
    for besides in ([], EFFICIENTNET):
        one, two = (step_rows(run_with(packed, tmp_path / f"{n}{len(besides)}", *besides)) for n in "ab")
        assert one == two


def test_splits_labels_and_epochs_are_those_that_were_named(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = [*TWO, "--data.train", "eval", "--data.val", "eval", "--data.eval", "val"]
    one = run_with(packed, tmp_path / "one", *flags)
    with open_shards(packed / "eval") as shards, h5py.File(one / "scores/eval.h5") as file:
        assert [key.decode() for key in file["key"][:]] == shards.keys
        assert f"{len(shards)} clips" in capsys.readouterr().out
    assert sorted(path.name for path in (one / "scores").iterdir()) == ["eval.h5", "val.h5"]
    assert len(np.loadtxt(one / "result.csv", delimiter=",")) == 2
    longer = run_with(packed, tmp_path / "longer", "--optim.epochs", "3")
    assert len(np.loadtxt(longer / "result.csv", delimiter=",")) == 3
    with open_shards(packed / "train") as shards:
        mids = shards.classes.mids
        lines = [f"{key},{mids[0]}\n" for key in shards.keys]
    (tmp_path / "labels.csv").write_text("key,mids\n" + "".join(lines))
    run_with(packed, tmp_path / "relabelled", "--data.labels", str(tmp_path / "labels.csv"))
    assert step_rows(tmp_path / "relabelled") != step_rows(run_with(packed, tmp_path / "plain"))


def test_a_teacher_and_its_weight_change_the_losses(packed: Path, tmp_path: Path):
    with open_shards(packed / "train") as shards:
        scores = np.random.default_rng(0).random((len(shards), len(shards.classes)), dtype=np.float32)
        write_scores(tmp_path / "teacher.h5", shards.keys, scores, scores.round())
    rows = [
        step_rows(run_with(packed, tmp_path / f"run{number}", *flags))
        for number, flags in enumerate(
            [
                [],
                ["--distill.scores", str(tmp_path / "teacher.h5")],
                ["--distill.scores", str(tmp_path / "teacher.h5"), "--distill.weight", "0.3"],
            ]
        )
    ]
    assert rows[0] != rows[1] != rows[2] != rows[0]


def test_averages_are_of_the_epochs_and_kinds_that_were_asked_for(packed: Path, tmp_path: Path):
    weights = {}
    for name, flags in {
        "both": TWO,
        "last": [*TWO, "--wa.start", "2"],
        "first": [*TWO, "--wa.end", "1"],
        "upstream": [*TWO, "--wa.upstream"],
        "ema": ["--wa.ema-decay", "0.2"],
        "slower": ["--wa.ema-decay", "0.9"],
    }.items():
        run = run_with(packed, tmp_path / name, *flags)
        file = "ema.pt" if flags[:1] == ["--wa.ema-decay"] else "wa.pt"
        weights[name] = next(iter(load_checkpoint(run / "checkpoints" / file).state.values()))
        assert (run / "checkpoints/ema.pt").exists() == (file == "ema.pt")
    assert len({tuple(value.flatten().tolist()) for value in weights.values()}) == len(weights)


def test_batch_norm_and_weights_to_start_from_are_as_asked_for(packed: Path, tmp_path: Path):
    states = {}
    for name, flags in {
        "plain": [],
        "momentum": ["--model.batch-norm-momentum", "0.5"],
        "settled": ["--wa.batch-norm-clips", "16"],
        "on": ["--model.pretrained", str(tmp_path / "plain/checkpoints/last.pt")],
        "nchw": ["--channels-last", "False"],
    }.items():
        run = run_with(packed, tmp_path / name, *EFFICIENTNET, *flags)
        states[name] = load_checkpoint(run / "checkpoints/wa.pt").state
    mean = "effnet._bn0.running_mean"
    for name in ("momentum", "settled", "on"):
        assert not states[name][mean].equal(states["plain"][mean]), name
    first = {name: step_rows(tmp_path / name)[0]["loss"] for name in ("plain", "on", "momentum", "nchw")}
    assert first["plain"] == first["momentum"] != first["on"]
    assert first["nchw"] == pytest.approx(first["plain"], rel=1e-4)


def test_checkpoints_of_epochs_and_log_rows_are_as_many_as_asked_for(packed: Path, tmp_path: Path):
    run_with(packed, tmp_path / "kept", *TWO, "--log-every-steps", "3")
    run_with(packed, tmp_path / "left", "--keep-epochs", "False")
    kept = {path.name for path in (tmp_path / "kept/checkpoints").glob("epoch_*.pt")}
    assert kept == {"epoch_01.pt", "epoch_02.pt"}
    assert not list((tmp_path / "left/checkpoints").glob("epoch_*.pt"))
    rows = [json.loads(line) for line in (tmp_path / "kept/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "step" in row] == [3, 6, 8] * 2
