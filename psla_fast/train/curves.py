"""Curves: the rows of a run -> TensorBoard's event files and, by choice, Weights & Biases."""

import importlib.util
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from psla_fast.files import naming, write_atomically
from psla_fast.recipe import resolved
from psla_fast.train.config import TrainConfig


def check_wandb(project: str) -> None:
    """Raise ValueError where a project is named and Weights & Biases isn't installed."""
    if project:
        spec = importlib.util.find_spec("wandb")
        if spec is None or spec.origin is None:  # wandb's own folder of runs looks like a package
            raise ValueError(
                f"--wandb {project} needs the package wandb. Install it (pip install wandb), or leave "
                "--wandb out; TensorBoard's files and metrics.jsonl are written anyway."
            )


class EventFile:
    """A file of TensorBoard's in a folder, made by its first row; each row is written at once.

    (torch's SummaryWriter writes from a thread, whose traceback a full disk would print.)
    """

    def __init__(self, folder: Path, first: int) -> None:
        """Replace the rows at `first` and later of the files that are there."""
        self._folder, self._first, self._path = folder, first, Path()

    def write(self, row: Mapping[str, Any], at: int) -> None:
        """Append a row of numbers."""
        now = time.time()
        if self._path == Path():
            # files are read by the order of their names: TensorBoard's own, with the second's fraction
            name = f"events.out.tfevents.{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
            self._folder.mkdir(parents=True, exist_ok=True)
            self._path = self._folder / name
            self._append(Event(wall_time=now, file_version="brain.Event:2"))
            start = SessionLog(status=SessionLog.START)
            self._append(Event(wall_time=now, step=self._first, session_log=start))
        values = [Summary.Value(tag=key, simple_value=value) for key, value in row.items()]
        self._append(Event(wall_time=now, step=at, summary=Summary(value=values)))

    def _append(self, event: Any) -> None:
        with naming(self._path), open(self._path, "ab") as file:
            RecordWriter(file).write(event.SerializeToString())


class Curves:
    """Draws a run's rows: those of steps over the updates of the run so far, those of epochs over epochs.

    A batch belongs to the update that it is a part of, which counts from 1. Rows that a run repeats, because
    it goes on from a checkpoint behind them, replace those drawn before.
    """

    def __init__(self, run: Path, epoch: int = 1, updates: int = 0, wandb: Any = None) -> None:
        """Go on at an epoch, which counts from 1, with `updates` done; files are made by the first row."""
        self._epochs = EventFile(run / "events", epoch)
        self._steps = EventFile(run / "events/steps", updates + 1)
        self._update, self._wandb = updates, wandb
        # W&B can't take rows back: what it has already isn't sent again
        self._next_wandb = int(wandb.step) if wandb else 0
        if wandb:
            wandb.define_metric("update")
            wandb.define_metric("step/*", step_metric="update")

    def add_step(self, row: Mapping[str, Any], update: int) -> None:
        """Draw a log step's row; `update` is the one that its batch is a part of."""
        values = {f"step/{key}": value for key, value in row.items() if key not in ("epoch", "step")}
        self._steps.write(values, update)
        self._update = update
        # an epoch's row takes a place of its own behind the epoch's steps
        self._send({**values, "update": update}, update + row["epoch"] - 1)

    def add_epoch(self, row: Mapping[str, Any], epoch: int) -> None:
        """Draw an epoch's row."""
        self._epochs.write(row, epoch)
        if self._wandb:
            for key in row:
                self._wandb.define_metric(key, step_metric="epoch")
        self._send({**row, "epoch": epoch}, self._update + epoch)

    def _send(self, values: Mapping[str, Any], place: int) -> None:
        if self._wandb and place >= self._next_wandb:
            self._wandb.log(values, step=place)

    def close(self) -> None:
        """End W&B's run; where an exception is on its way it is noted as failed."""
        if self._wandb:
            self._wandb.finish(exit_code=int(sys.exception() is not None))
            self._wandb = None


def open_curves(config: TrainConfig, epoch: int, updates: int) -> Curves:
    """Open a run's curves at an epoch with `updates` done, and its W&B run where --wandb names a project.

    RUN/wandb_id holds that run's id; a run that begins anew gets another. Raises ValueError where W&B can't
    start.
    """
    if not config.wandb:
        return Curves(config.run, epoch, updates)
    import wandb

    known = config.run / "wandb_id"
    goes_on = known.is_file() and (epoch > 1 or updates)
    try:
        run = wandb.init(
            project=config.wandb,
            name=config.run.resolve().name,
            id=known.read_text().strip() if goes_on else None,
            resume="allow",
            dir=str(config.run),
            config=resolved(config),
            allow_val_change=True,
        )
    except wandb.errors.Error as error:
        raise ValueError(
            f"--wandb {config.wandb}: {error} Or set WANDB_MODE=offline, or leave --wandb out."
        ) from error
    write_atomically(known, f"{run.id}\n".encode())
    return Curves(config.run, epoch, updates, run)
