"""Progress: counts clips and waiting time between log steps, and prints the line that says how a run goes."""

import sys
import time
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from psla_fast.distributed import World

Item = TypeVar("Item")


class Progress:
    """Measures the steps since the last report; prints on the first rank only."""

    def __init__(self, num_epochs: int, world: World) -> None:
        """Know the run's length, for the ETA."""
        self._num_epochs, self._prints = num_epochs, world.is_first
        self._live = self._prints and sys.stdout.isatty()
        self._sizes = np.zeros(0, dtype=np.int64)
        self._restart(0)

    def start_epoch(self, sizes: npt.NDArray[np.int64], step: int) -> None:
        """Begin an epoch of global batches of these sizes (steps,) at a step, which counts from 0."""
        self._sizes = sizes
        self._restart(step)

    def _restart(self, step: int) -> None:
        """Forget what was measured, for instance over an evaluation."""
        self._since, self._waited, self._first_step = time.perf_counter(), 0.0, step

    def timed(self, items: Iterator[Item]) -> Iterator[Item]:
        """Pass items on and add up the time it took to get them."""
        while True:
            start = time.perf_counter()
            item = next(items, None)
            self._waited += time.perf_counter() - start
            if item is None:
                return
            yield item

    def report(self, epoch: int, step: int, loss: float, lr: float) -> dict[str, object]:
        """Print the line of a log step (step counts from 1) and return its row for metrics.jsonl."""
        seconds = max(1e-9, time.perf_counter() - self._since)
        wait = self._waited / seconds
        num_clips = int(self._sizes[self._first_step : step].sum())
        rate = num_clips / seconds
        left = (self._num_epochs - epoch) * self._sizes.sum() + self._sizes[step:].sum()
        eta = int(left) * seconds / max(1, num_clips)
        self._restart(step)
        if self._prints:
            line = (
                f"epoch {epoch}/{self._num_epochs} step {step}/{len(self._sizes)}  loss {loss:.4f}  "
                f"lr {lr:.2e}  {rate:.0f} clips/s  loader wait {wait:.1%}  ETA {_clock(eta)}"
            )
            print(f"\r\x1b[K{line}" if self._live else line, end="" if self._live else "\n", flush=True)
        return {
            "epoch": epoch,
            "step": step,
            "loss": loss,
            "lr": lr,
            "clips_per_second": round(rate, 2),
            "loader_wait": round(wait, 4),
        }

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self._prints:
            print(f"\r\x1b[K{text}" if self._live else text, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
