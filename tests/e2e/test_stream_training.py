"""Training on streams: what a saved run may go on with, damaged shards, and ranks that share one memory."""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from psla_fast.distributed import World
from psla_fast.pack import PackConfig, WorkConfig, pack_splits
from psla_fast.shards import open_shards
from psla_fast.sources import read_fsd50k
from psla_fast.train.loop import Trainer
from psla_fast.train.signals import Stopped
from tests.stream_worker import (
    INDEXED,
    make_plan,
    random_fbanks,
    read_batches,
    samples,
    start_worker,
    write_split,
)
from tests.tiny import step_rows, tiny_config, train_tiny

SKIP = ("--stream.on-error", "skip")
TWO_EPOCHS = ("--optim.epochs", "2", "--wa.start", "1", "--wa.end", "2")


def open_run(shards: Path, run: Path, *flags: str) -> Trainer:
    """A run that goes on from its last.pt, or is refused."""
    return Trainer(tiny_config(shards, run, *flags), World(0, 1, torch.device("cpu")))


def skipped_rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "skipped" in row]


def at_step(epoch: int, step: int, do: Callable[[], None]) -> Callable[..., Tensor]:
    """A Trainer._step that does something before one step."""
    take_step = Trainer._step

    def wrapped(self: Trainer, at_epoch: int, at_step: int, *rest: object) -> Tensor:
        if (at_epoch, at_step) == (epoch, step):
            do()
        return take_step(self, at_epoch, at_step, *rest)  # type: ignore[arg-type]

    return wrapped


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise MemoryError


@pytest.fixture(scope="module")
def labels(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A label table of the training split's own labels."""
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    with open_shards(packed / "train") as shards:
        write_labels(path, {key: shards.labels(i).tolist() for i, key in enumerate(shards.keys)}, packed)
    return path


def write_labels(path: Path, labels: dict[str, list[int]], packed: Path) -> None:
    with open_shards(packed / "train") as shards:
        mids = shards.classes.mids
    rows = "".join(f'{key},"{",".join(mids[i] for i in indices)}"\n' for key, indices in labels.items())
    path.write_text(f"key,mids\n{rows}")


@pytest.fixture(scope="module")
def stopped(packed: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped in its second epoch. Read only."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "_step", at_step(2, 3, terminate))
        with pytest.raises(Stopped):
            train_tiny(tiny_config(packed, run, "--data.labels", str(labels), *TWO_EPOCHS))
    return run


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--stream.buckets", "50", "100"], r"draws \(.*stream\.buckets: \[\], now \[50, 100\]"),
        (["--stream.kind", "webdataset"], r"draws \(.*stream\.kind: any in draw order, now webdataset"),
        (["--seed", "1"], r"begun with seed = 0, now it is 1"),
        (["--optim.batch-size", "4"], r"begun with optim\.batch_size = 8, now it is 4"),
        (["--sampling.kind", "shuffle"], r"begun with sampling\.kind = 'balanced', now it is 'shuffle'"),
        (["--sampling.num-draws", "80"], r"begun with sampling\.num_draws = 0, now it is 80"),
        (["--data.labels", ""], r"begun with data\.labels = '.*labels\.csv', now it is ''"),
    ],
)
def test_a_run_does_not_go_on_with_other_draws_and_says_which_part_differs(
    packed: Path, labels: Path, stopped: Path, tmp_path: Path, flags: list[str], part: str
):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    with pytest.raises(ValueError, match=part):
        open_run(packed, run, *TWO_EPOCHS, "--data.labels", str(labels), *flags)


def test_a_run_does_not_go_on_with_another_set_or_other_labels_in_the_same_place(
    synthetic_fsd50k: Path, packed: Path, labels: Path, stopped: Path, tmp_path: Path
):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    flags = (*TWO_EPOCHS, "--data.labels", str(labels))
    before = labels.read_text()
    with open_shards(packed / "train") as shards:
        changed = {key: shards.labels(i).tolist() for i, key in enumerate(shards.keys)}
    try:
        write_labels(labels, changed | {next(iter(changed)): [0, 1]}, packed)
        both = r"draws \(sample weights: others than before; shards: others than before\)"
        with pytest.raises(ValueError, match=both):
            open_run(packed, run, *flags)
    finally:
        labels.write_text(before)
    assert open_run(packed, run, *flags).state.step == 4
    pack_splits(
        *read_fsd50k(synthetic_fsd50k), tmp_path / "shards", PackConfig(seed=1), WorkConfig(workers=1)
    )
    with pytest.raises(ValueError, match=both):
        open_run(tmp_path / "shards", run, *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--stream.num-threads", "1", "--stream.read-ahead", "1"],
        ["--stream.kind", "resident", "--stream.place", "host"],
        ["--stream.kind", "resident", "--stream.place", "shared"],
        ["--stream.check-crc", "True", *SKIP],
    ],
)
def test_a_run_goes_on_alike_with_another_executor_or_number_of_threads(
    packed: Path,
    labels: Path,
    stopped: Path,
    finished: list[dict[str, Any]],
    tmp_path: Path,
    flags: list[str],
):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    train_tiny(tiny_config(packed, run, "--data.labels", str(labels), *TWO_EPOCHS, *flags))
    assert step_rows(run) == finished


@pytest.fixture(scope="module")
def finished(packed: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The loss curve of the run that `stopped` would have been."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    train_tiny(tiny_config(packed, run, "--data.labels", str(labels), *TWO_EPOCHS))
    return step_rows(run)


@pytest.fixture(scope="module")
def damaged(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """Shards whose training split has lost a tar; the clips of epochs 1 and 2 that can't be read."""
    shards = Path(shutil.copytree(packed, tmp_path_factory.mktemp("damaged") / "shards"))
    (shards / "train/00003.tar").unlink()
    with open_shards(shards / "train") as train:
        gone = np.flatnonzero(train.index.shard == 3)
        plan = make_plan(train, INDEXED, 100)
        rows = [np.concatenate([step.row_ids for step in plan.batches(epoch)]) for epoch in (1, 2)]
    return shards, [int(np.isin(ids, gone).sum()) for ids in rows]


@pytest.fixture(scope="module")
def skipping(damaged: tuple[Path, list[int]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on damaged shards, and what it printed. Read only."""
    run = tmp_path_factory.mktemp("runs") / "skipping"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        train_tiny(tiny_config(damaged[0], run, *SKIP, *TWO_EPOCHS))
    return run, output.getvalue()


def test_a_training_on_damaged_shards_ends_and_says_once_an_epoch_what_it_skipped(
    damaged: tuple[Path, list[int]], skipping: tuple[Path, str]
):
    _, counts = damaged
    run, output = skipping
    assert min(counts) > 1
    counted = list(enumerate(counts, start=1))
    assert skipped_rows(run) == [{"epoch": epoch, "skipped": count} for epoch, count in counted]
    line = r"^epoch (\d): (\d+) clips couldn't be read, other draws stood in$"
    assert [(int(epoch), int(count)) for epoch, count in re.findall(line, output, re.M)] == counted
    assert len(re.findall(r"^rank 0 skipped: .*00003\.tar: No such file", output, re.M)) == 2
    assert (run / "result.csv").is_file()


def test_a_training_that_may_not_skip_stops_at_damaged_shards(
    damaged: tuple[Path, list[int]], tmp_path: Path
):
    with pytest.raises(ValueError, match=r"00003\.tar: No such file.*key \w+, offset \d+"):
        train_tiny(tiny_config(damaged[0], tmp_path / "run"))


@pytest.mark.parametrize("how", [terminate, crash])
def test_a_skipping_run_resumed_in_an_epoch_has_the_same_loss_curve_and_counts(
    damaged: tuple[Path, list[int]],
    skipping: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: Callable[[], None],
):
    config = tiny_config(damaged[0], tmp_path / "run", *SKIP, *TWO_EPOCHS, "--checkpoint-minutes", "0")
    for epoch, step in ((1, 4), (2, 6)):
        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "_step", at_step(epoch, step, how))
            with pytest.raises((Stopped, MemoryError)):
                train_tiny(config)
    train_tiny(config)
    assert step_rows(config.run) == step_rows(skipping[0])
    assert skipped_rows(config.run) == skipped_rows(skipping[0])


def start_ranks(world_size: int, *words: object) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start_worker(*words, RANK=str(r), LOCAL_RANK=str(r), **world) for r in range(world_size)]


def end_ranks(ranks: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    try:
        return [rank.communicate(timeout=100) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_two_ranks_that_skip_count_all_clips_also_over_a_stop(
    damaged: tuple[Path, list[int]], tmp_path: Path
):
    shards, counts = damaged
    ranks = start_ranks(2, "train_stop_and_go_on", shards, tmp_path / "run")
    outputs = end_ranks(ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert [row["skipped"] for row in skipped_rows(tmp_path / "run")] == counts[:1]


def shared_files() -> set[str]:
    """What lies in /dev/shm, but for what other tests' packs (joblib) and DALI put there."""
    others = ("joblib_", "sem.loky", "psla_fast_dali_")
    return {name for name in os.listdir("/dev/shm") if not name.startswith(others)}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 random clips in 6 shards. Read only."""
    return write_split(tmp_path_factory.mktemp("shared") / "train", random_fbanks([33] * 60), 10)


def test_two_ranks_share_one_memory_that_one_of_them_loads(split: Path, tmp_path: Path):
    before = shared_files()
    ranks = start_ranks(2, "share_on_ranks", split, tmp_path)
    outputs = end_ranks(ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    results = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2)]
    assert [result["reads"] for result in results] == [60, 0]
    assert len(results[0]["inodes"]) == len(results[1]["inodes"]) == 1
    assert results[0]["inodes"] == results[1]["inodes"]
    with open_shards(split) as shards:
        for rank, result in enumerate(results):
            plan = make_plan(shards, INDEXED, 40, rank=rank, world_size=2)
            wanted = [samples(batch) for batch in read_batches(shards, plan, INDEXED)]
            assert result["batches"] == wanted
            assert len(wanted) == 7
    assert [result["after"] for result in results] == [0, 0]  # nothing stays mapped
    assert shared_files() <= before
    line = rf"^{split} takes 0\.00 GB as it is stored, the machine has 0\.00 GB free\. Use --stream\.kind ind"
    for result in results:
        assert re.search(line, result["refusal"]), result["refusal"]
        assert "\n" not in result["refusal"]


def test_nothing_is_left_of_shared_memory_when_the_rank_that_loaded_it_is_killed(split: Path):
    before = shared_files()
    ranks = start_ranks(2, "share_and_wait", split)
    try:
        for rank in ranks:
            assert rank.stdout
            assert rank.stdout.readline() == "shared\n", rank.communicate()
        ranks[0].kill()
        other = ranks[1].stdout
        assert other
        lines = [int(other.readline()) for _ in range(10)]
        assert lines == sorted(lines)  # reads on: its mapping holds the memory
        assert shared_files() <= before
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert shared_files() <= before
