"""Progress: counts clips and waiting time between log steps, and prints the line that says how a run goes."""

import sys
import time
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Progress:
    """Measures the steps since the last report; prints on the first rank only."""

    def __init__(self, num_epochs: int, num_steps: int, global_batch: int, prints: bool) -> None:
        """Know the run's size, for the ETA."""
        self._num_epochs, self._num_steps, self._global_batch, self._prints = (
            num_epochs,
            num_steps,
            global_batch,
            prints,
        )
        self._live = prints and sys.stdout.isatty()
        self._seconds_per_step = 0.0
        self.restart()

    def restart(self) -> None:
        """Forget what was measured, for instance over an evaluation."""
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def timed(self, items: Iterator[Item]) -> Iterator[Item]:
        """Pass items on and add up the time it took to get them."""
        while True:
            start = time.perf_counter()
            item = next(items, None)
            self._waited += time.perf_counter() - start
            if item is None:
                return
            self._steps += 1
            yield item

    def report(self, epoch: int, step: int, loss: float, lr: float) -> dict[str, object]:
        """Print the line of a log step (step counts from 1) and return its row for metrics.jsonl."""
        seconds = max(1e-9, time.perf_counter() - self._since)
        wait = self._waited / seconds
        rate = self._steps * self._global_batch / seconds
        self._seconds_per_step = seconds / max(1, self._steps)
        left = ((self._num_epochs - epoch + 1) * self._num_steps - step) * self._seconds_per_step
        self.restart()
        if self._prints:
            line = (
                f"epoch {epoch}/{self._num_epochs} step {step}/{self._num_steps}  loss {loss:.4f}  "
                f"lr {lr:.2e}  {rate:.0f} clips/s  loader wait {wait:.1%}  ETA {_clock(left)}"
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
