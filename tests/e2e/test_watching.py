"""Watching a run: the live line of a terminal, the curves, what each rank prints, Weights & Biases."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.stream_worker import ROOT
from tests.training_worker import Kill, Nursery, command, environment

WIDTH = 80  # too narrow for the bar itself in places


def on_terminal(words: list[str]) -> tuple[int, str]:
    """Run a command on a terminal of WIDTH columns; returns its status and all that came out of it."""
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    with subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdin=inside, stdout=inside, stderr=inside
    ) as run:
        os.close(inside)
        output, deadline = b"", time.monotonic() + 300
        ready = select.poll()  # select takes no descriptor above 1,023
        ready.register(terminal)
        while True:
            if not ready.poll(max(0, 1000 * (deadline - time.monotonic()))):
                run.kill()
                raise AssertionError(f"no end in sight: {output.decode()}")
            try:
                got = os.read(terminal, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not got:
                break
            output += got
    os.close(terminal)
    return run.returncode, output.decode()


def screen(output: str) -> list[str]:
    """The lines that a terminal shows in the end, without those that wrap."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*[A-Za-z]|\r|\n|[^\r\n\x1b]+", output):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[A":
            row -= 1
        elif part.startswith("\x1b"):
            raise AssertionError(f"{part!r} isn't expected")
        else:
            lines[row] = f"{lines[row]:<{column}}"[:column] + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def test_a_terminal_shows_a_live_line_which_leaves_nothing_behind(
    shards: Path, nursery: Nursery, tmp_path: Path
):
    flags = command(shards, tmp_path / "run")
    status, output = on_terminal([sys.executable, "-m", "tests.training_worker", *flags])
    assert status == 0, output
    lines = [line for line in re.split(r"[\r\n]+", output) if "  step " in line]
    assert all(len(line) < WIDTH for line in lines)
    for epoch in (1, 2, 3):
        shown = (
            rf"epoch {epoch}/3  step \d/7, ETA \d:\d\d  loss 0\.\d{{4}}  \d+ clips/s  loader wait \d+\.\d%"
        )
        assert any(re.match(shown, line) for line in lines), output
    plain = nursery.finish(command(shards, tmp_path / "plain")).replace("/plain", "/run")
    kept = [line for line in plain.splitlines() if " step " not in line or "parameters" in line]
    assert screen(output) == [*kept, ""]


def test_a_stop_leaves_the_terminal_clean(shards: Path, tmp_path: Path):
    flags = command(shards, tmp_path / "run")
    stopped = "import os, signal, sys\n"
    stopped += "from torch.optim.optimizer import register_optimizer_step_pre_hook as hook\n"
    stopped += "from tests import training_worker as worker\n"
    stopped += "hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))\nworker.main(sys.argv[1:])"
    status, output = on_terminal([sys.executable, "-c", stopped, *flags])
    assert status == 3, output
    assert "epoch 1/3  step 1/7" in output
    said = f"stopped by SIGTERM; the same command goes on from {tmp_path}/run/checkpoints/last.pt"
    assert screen(output)[1:] == ["", said, ""]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(point.step, point.value) for point in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def rows_of(run: Path, has: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if has in row]


@pytest.mark.parametrize(
    ("kill", "flags"),
    [
        (None, ()),
        (Kill("update", nth=5), ()),  # before the first checkpoint
        (Kill("update", nth=12), ()),
        (Kill("update", nth=12), ("--checkpoint-minutes", "0")),
        (Kill("os.rename", "last.pt", 2), ()),  # behind the row of epoch 2
        (Kill("os.rename", "last.pt", 3), ()),
        (Kill("update", nth=5), ("--optim.accumulate", "3")),
        (Kill("update", nth=5), ("--optim.accumulate", "3", "--checkpoint-minutes", "0")),
    ],
    ids=str,
)
def test_tensorboard_shows_each_row_of_metrics_jsonl_once_also_after_a_kill(
    nursery: Nursery, shards: Path, tmp_path: Path, kill: Kill | None, flags: tuple[str, ...]
):
    run = tmp_path / "run"
    flags = (*command(shards, run), *flags)
    if kill:
        nursery.kill(flags, kill)
    nursery.finish(flags)
    steps, epochs = curves(run / "events/steps"), curves(run / "events")
    rows = rows_of(run, "step")
    assert len(rows) == 21
    updates = list(range(1, 22))
    if "--optim.accumulate" in flags:  # by three: 3, 3 and 1 of each epoch's steps
        updates = [3 * epoch + part for epoch in range(3) for part in (1, 1, 1, 2, 2, 2, 3)]
    assert set(steps) == {f"step/{key}" for key in ("loss", "lr", "clips_per_second", "loader_wait")}
    for tag, points in steps.items():
        assert [at for at, _ in points] == updates, tag
        assert [value for _, value in points] == pytest.approx([row[tag[5:]] for row in rows], rel=1e-6), tag
    rows = rows_of(run, "val/mean_ap")
    assert {"train_loss", "val_loss", "val/mean_ap", "eval/mean_ap", "val_ensemble/mean_auc"} <= set(epochs)
    for tag, points in epochs.items():
        assert [at for at, _ in points] == [1, 2, 3], tag
        assert [value for _, value in points] == pytest.approx([row[tag] for row in rows], rel=1e-6), tag


def test_a_finished_run_started_again_draws_nothing(nursery: Nursery, shards: Path, tmp_path: Path):
    flags = command(shards, tmp_path / "run", "--optim.epochs", "1")
    nursery.finish(flags)
    files = sorted((tmp_path / "run/events").rglob("*"))
    nursery.finish(flags)
    assert sorted((tmp_path / "run/events").rglob("*")) == files


def test_of_two_ranks_the_first_alone_prints_and_profiles(nursery: Nursery, shards: Path, tmp_path: Path):
    alone = nursery.finish(command(shards, tmp_path / "one")).splitlines()
    ends = nursery.train(command(shards, tmp_path / "two", "--profile", "True"), ranks=2)
    assert [end.status for end in ends] == [0, 0]
    assert ends[1].output == ""
    lines = ends[0].output.splitlines()
    assert len(set(lines)) == len(lines)
    assert sum("profiled some steps" in line for line in lines) == 1
    assert len(lines) == len(alone) + 1
    assert (tmp_path / "two/profile/kernels.txt").read_text().startswith("profiled steps: ")


def test_weights_and_biases_offline_gets_the_curves(shards: Path, tmp_path: Path):
    run = tmp_path / "bird songs"
    flags = command(shards, run, "--optim.epochs", "1", "--wandb", "tagging")
    settings = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "HOME": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.training_worker", *flags],
        cwd=ROOT,
        env=environment(**settings),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    number = (run / "wandb_id").read_text().strip()
    (kept,) = run.glob(f"wandb/offline-run-*-{number}/run-{number}.wandb")
    content = kept.read_bytes()
    for word in (b"step/loss", b"step/clips_per_second", b"val/mean_ap", b"bird songs", b"tagging"):
        assert word in content
    assert not (ROOT / "wandb").exists()
