"""Trainings that are killed, or whose disk is full, go on from where they were."""

import re
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training_worker import Kill, Nursery, assert_same_run, command

EACH_STEP = ("--checkpoint-minutes", "0")  # saves


@pytest.fixture(scope="module")
def whole(nursery: Nursery, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    nursery.finish(command(shards, run))
    return run


@pytest.mark.parametrize(
    "kill",
    [
        Kill("half", "config.toml.tmp"),
        Kill("update", nth=3),
        Kill("score", nth=1),
        Kill("half", "best.pt.tmp"),
        Kill("os.rename", "last.pt", 1),
        Kill("update", nth=10),
        Kill("score", nth=5),
        Kill("open", "best_single_result.csv.tmp", 3),
        Kill("shutil.copyfile", "val.h5.tmp", 1),
        Kill("os.rename", "eval.h5", 2),
        Kill("half", "/result.csv.tmp", 2),
        Kill("os.rename", "/result.csv", 2),
        Kill("os.link", "last.pt", 1),
        Kill("os.rename", "previous.pt", 1),
        Kill("half", "last.pt.tmp", 2),
        Kill("os.rename", "last.pt", 2),
        Kill("open", "checkpoints", 6),
        Kill("os.rename", "last.pt", 3),
        Kill("half", "wa.pt.tmp"),
        Kill("open", "wa_result.csv.tmp"),
    ],
    ids=lambda kill: f"{kill.event}-{kill.place}-{kill.nth}",
)
def test_a_run_killed_at_this_moment_ends_like_an_uninterrupted_one(
    nursery: Nursery, shards: Path, whole: Path, tmp_path: Path, kill: Kill
):
    flags = command(shards, tmp_path / "run")
    nursery.kill(flags, kill)
    nursery.finish(flags)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "kill",
    [
        Kill("os.rename", "previous.pt", 9),
        Kill("half", "last.pt.tmp", 11),
        Kill("os.rename", "last.pt", 12),
        Kill("update", nth=13),
    ],
    ids=lambda kill: f"{kill.event}-{kill.place}-{kill.nth}",
)
def test_a_run_killed_while_it_saves_each_step_goes_on_at_that_step(
    nursery: Nursery, shards: Path, whole: Path, tmp_path: Path, kill: Kill
):
    flags = command(shards, tmp_path / "run", *EACH_STEP)
    nursery.kill(flags, kill)
    said = nursery.finish(flags)
    assert "going on at epoch 2, step" in said
    assert "step 1/7" not in said.partition("epoch 2/3 done")[0]
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(("seed", "minutes", "calls"), [(0, "10", 14000), (1, "0", 12000)])
def test_a_run_killed_at_random_again_and_again_ends_like_an_uninterrupted_one(
    nursery: Nursery, shards: Path, whole: Path, tmp_path: Path, seed: int, minutes: str, calls: int
):
    rng, kills = np.random.default_rng(seed), 0
    flags = command(shards, tmp_path / "run", "--checkpoint-minutes", minutes)
    while (end := nursery.train(flags, Kill("call", nth=int(rng.integers(1500, calls))))[0]).status:
        assert end.status == -signal.SIGKILL, end.output
        kills += 1
        print(kills, end.output[-60:])
        assert kills < 60
    assert kills >= 10
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("kill", [Kill("os.rename", "last.pt"), Kill("half", "last.pt.tmp")])
def test_a_kill_during_the_first_save_after_a_damaged_last_checkpoint_loses_nothing(
    nursery: Nursery, shards: Path, whole: Path, tmp_path: Path, kill: Kill
):
    flags, last = command(shards, tmp_path / "run"), tmp_path / "run/checkpoints/last.pt"
    nursery.kill(flags, Kill("update", nth=15))
    last.write_bytes(last.read_bytes()[:-1000])
    nursery.kill(flags, kill)
    assert "going on at epoch 2" in nursery.finish(flags)
    assert_same_run(tmp_path / "run", whole)


def test_a_run_killed_while_it_goes_on_loses_nothing(
    nursery: Nursery, shards: Path, whole: Path, tmp_path: Path
):
    flags = command(shards, tmp_path / "run")
    nursery.kill(flags, Kill("update", nth=15))
    for kill in (Kill("open", "last.pt"), Kill("half", "/result.csv.tmp"), Kill("os.rename", "/result.csv")):
        nursery.kill(flags, kill)
    with open(tmp_path / "run/metrics.jsonl", "a") as log:
        log.write('{"epoch": 3, "step": 1, "lo')  # of a row that a kill has cut
    nursery.finish(flags)
    assert_same_run(tmp_path / "run", whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize(
    ("event", "place", "nth", "then"),
    [
        ("open", "config.toml.tmp", 1, "epoch 1/3 step 1/7"),
        ("open", "metrics.jsonl", 12, "going on at epoch 2, step 1"),
        ("os.mkdir", "events/steps", 1, "epoch 1/3 step 1/7"),
        ("os.rename", "best_single_result.csv", 2, "going on at epoch 2, step 1"),
        ("shutil.copyfile", "val.h5.tmp", 1, "going on at epoch 2, step 1"),
        ("open", "/result.csv.tmp", 3, "going on at epoch 2, step 1"),
        ("os.link", "previous.pt.tmp", 1, "going on at epoch 2, step 1"),
        ("open", "ensemble_result.csv.tmp", 5, "going on at epoch 3, step 1"),
        ("os.rename", "last.pt", 3, "already trained"),
    ],
)
def test_a_full_disk_is_one_line_and_with_room_again_the_run_goes_on(
    nursery: Nursery,
    shards: Path,
    whole: Path,
    small_disk: Path,
    event: str,
    place: str,
    nth: int,
    then: str,
):
    run, filler = small_disk / "run", small_disk / "filler"
    flags = command(shards, run)
    end = nursery.train(flags, Kill(event, place, nth, fills=str(filler)))[0]
    assert end.status == 2
    assert_one_line(end.output, r"No space left on device\. Make room and run the same command again\.")
    assert not list(run.rglob("*.tmp"))
    filler.unlink()
    said = nursery.finish(flags)
    assert said.splitlines()[1].startswith(then)
    assert_same_run(run, whole)


def assert_one_line(output: str, reason: str) -> None:
    """The run ended with a line that says the reason of which file."""
    errors = [
        line for line in output.splitlines() if not line.startswith(("tiny,", "epoch ", "going on at "))
    ]
    assert len(errors) == 1, output
    assert re.fullmatch(rf"psla_fast\.train: error: \S+/run/\S+: {reason}", errors[0])


def test_a_write_that_fails_is_one_line_and_the_run_goes_on_from_the_save_before(
    nursery: Nursery, shards: Path, whole: Path, tmp_path: Path
):
    flags = command(shards, tmp_path / "run")
    nursery.kill(flags, Kill("update", nth=10))
    end = nursery.train(flags, Kill("room", nth=30_000))[0]  # bytes that last.pt is larger than
    assert end.status == 2
    assert_one_line(end.output, r"can't be written \(.*\); is the disk full\?\.")
    assert not list(tmp_path.rglob("*.tmp"))
    assert "going on at epoch 2, step 1" in nursery.finish(flags)
    assert_same_run(tmp_path / "run", whole)


def as_another_torch_writes(content: dict[str, Any]) -> None:
    """Settings of an optimiser come and go between versions of torch."""
    for group in content["extra"]["optimizer"]["param_groups"]:
        group["of_a_newer_torch"] = True
        del group["maximize"], group["differentiable"]


@pytest.fixture
def stopped(nursery: Nursery, shards: Path, tmp_path: Path) -> Path:
    """The last.pt of a run that was killed in its second epoch."""
    nursery.kill(command(shards, tmp_path / "run"), Kill("update", nth=10))
    return tmp_path / "run/checkpoints/last.pt"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_another_torch_goes_on(
    nursery: Nursery, shards: Path, whole: Path, stopped: Path, zipped: bool
):
    content = torch.load(stopped, weights_only=True)
    as_another_torch_writes(content)
    torch.save(content, stopped, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(stopped) == zipped
    assert "going on at epoch 2, step 1" in nursery.finish(command(shards, stopped.parents[1]))
    assert_same_run(stopped.parents[1], whole)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("optimizer", "parameter group that doesn't match the size of optimizer's group"),
        ("model_config", r"last\.pt was written by another version of psla_fast \(.*'of_later'\)"),
        ("extra", r"last\.pt holds a model alone, not a run\. Use another --run"),
    ],
)
def test_a_last_checkpoint_that_is_not_of_this_run_is_one_line(
    nursery: Nursery, shards: Path, stopped: Path, damage: str, reason: str
):
    content = torch.load(stopped, weights_only=True)
    if damage == "optimizer":
        content["extra"]["optimizer"]["param_groups"][0]["params"].pop()
    elif damage == "model_config":
        content["model_config"]["of_later"] = 1
    else:
        content["extra"] = {}  # as in best.pt
    torch.save(content, stopped)
    end = nursery.train(command(shards, stopped.parents[1]))[0]
    assert end.status == 2
    assert len(end.output.splitlines()) == 1
    assert re.search(reason, end.output)
