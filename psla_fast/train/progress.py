"""Progress: counts clips and waiting time between log steps, and shows how a run goes, on the first rank."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.profiler import record_function
from tqdm import tqdm

from psla_fast.distributed import World

Item = TypeVar("Item")
BAR = "{desc}  step {n_fmt}/{total_fmt}{postfix}  |{bar}|"


class Progress:
    """Measures the steps since the last report; prints on the first rank only.

    On a terminal a bar of the epoch's steps stays below what `say` prints; elsewhere each report is a line.
    """

    def __init__(self, num_epochs: int, world: World) -> None:
        """Know the run's length, for the ETA."""
        self._num_epochs, self._prints, self._device = num_epochs, world.is_first, world.device
        self._live = self._prints and sys.stdout.isatty()
        self._bar: tqdm | None = None
        self._sizes = np.zeros(0, dtype=np.int64)
        self._restart(0)

    def start_epoch(self, epoch: int, sizes: npt.NDArray[np.int64], step: int) -> None:
        """Begin an epoch of global batches of these sizes (steps,) at a step, which counts from 0."""
        self.close()
        self._sizes = sizes
        if self._live:
            title = f"epoch {epoch}/{self._num_epochs}"
            form = {"bar_format": BAR, "dynamic_ncols": True, "leave": False, "miniters": 1}
            self._bar = tqdm(desc=title, total=len(sizes), initial=step, file=sys.stdout, **form)
        self._restart(step)

    def close(self) -> None:
        """Take the live line away; nothing where there is none."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _restart(self, step: int) -> None:
        """Forget what was measured, for instance over an evaluation."""
        self._since, self._waited, self._first_step = time.perf_counter(), 0.0, step

    def timed(self, items: Iterator[Item]) -> Iterator[Item]:
        """Pass an epoch's batches on and add up the time it took to get them."""
        while True:
            start = time.perf_counter()
            with record_function("loader wait"):
                item = next(items, None)
            self._waited += time.perf_counter() - start
            if item is None:
                self.close()
                return
            if self._bar is not None:
                self._bar.update()
            yield item

    def report(self, epoch: int, step: int, loss: float, lr: float) -> dict[str, object]:
        """Show a log step (which counts from 1) and return its row for metrics.jsonl."""
        seconds = max(1e-9, time.perf_counter() - self._since)
        wait = self._waited / seconds
        num_clips = int(self._sizes[self._first_step : step].sum())
        rate = num_clips / seconds
        left = (self._num_epochs - epoch) * self._sizes.sum() + self._sizes[step:].sum()
        eta = _clock(int(left) * seconds / max(1, num_clips))
        self._restart(step)
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"ETA {eta}  loss {loss:.4f}  {rate:.0f} clips/s  loader wait {wait:.1%}  lr {lr:.2e}"
            )
        elif self._prints:
            print(
                f"epoch {epoch}/{self._num_epochs} step {step}/{len(self._sizes)}  loss {loss:.4f}  "
                f"lr {lr:.2e}  {rate:.0f} clips/s  loader wait {wait:.1%}  ETA {eta}",
                flush=True,
            )
        return {
            "epoch": epoch,
            "step": step,
            "loss": loss,
            "lr": lr,
            "clips_per_second": round(rate, 2),
            "loader_wait": round(wait, 4),
            **read_gpu(self._device),
        }

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self._live:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        elif self._prints:
            print(text, flush=True)


def read_gpu(device: torch.device) -> dict[str, float]:
    """Read a GPU's memory, 10⁹ bytes allocated at most since the last call, and its utilisation, 0 to 1.

    Nothing on CPUs; no utilisation where the driver tells none. Doesn't wait for the device.
    """
    if device.type != "cuda":
        return {}
    values = {"gpu_memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 3)}
    torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(ImportError):
        from pynvml import NVMLError

        with contextlib.suppress(NVMLError, RuntimeError, ValueError):
            values["gpu_utilisation"] = torch.cuda.utilization(device) / 100
    return values


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
