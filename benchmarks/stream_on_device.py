"""What stream_device.py and end_to_end.py time: a stream alone, training steps on it, and no stream."""

from collections.abc import Iterator
from time import perf_counter

import torch
from step_ours import Step

from psla_fast.stream import Batch, BatchPlan, Stream


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_all(stream: Stream, plans: list[BatchPlan], device: torch.device) -> float:
    """GB/s of the rows that plans name, each batch touched on the device."""
    start = perf_counter()
    for batch in stream.batches(iter(plans)):
        batch.fbank[:, 0, 0].float().sum()
    synchronize(device)
    num_rows, row_bytes = sum(len(plan.row_ids) for plan in plans), batch.fbank[0].nbytes
    return num_rows * row_bytes / (perf_counter() - start) / 1e9


def train(step: Step, batches: Iterator[Batch], device: torch.device) -> tuple[float, float]:
    """Clips a second of steps on a stream, and the share of the time that the host waits for batches."""
    num_clips, waited, start = 0, 0.0, perf_counter()
    while True:
        asked = perf_counter()
        batch = next(batches, None)
        waited += perf_counter() - asked
        if batch is None:
            break
        step(batch)
        num_clips += len(batch.clip_ids)
    synchronize(device)
    seconds = perf_counter() - start
    return num_clips / seconds, waited / seconds


class SyntheticStream:
    """Gives the same batch for each plan."""

    def __init__(self, batch: Batch) -> None:
        """Take the batch, on the device."""
        self._batch = batch

    def batches(self, plans: Iterator[BatchPlan]) -> Iterator[Batch]:
        """Yield it as often as there are plans."""
        for _ in plans:
            yield self._batch

    def close(self) -> None:
        """Let the batch go."""
        del self._batch
