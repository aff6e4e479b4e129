"""What benchmarks/stream_device.py times: a stream alone, and training steps on it."""

from collections.abc import Iterator
from time import perf_counter

import torch
from step_ours import Step

from psla_fast.augment import StoredBatch, draw_uniforms
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
        tensors = batch.fbank, batch.num_frames, batch.targets, batch.partner_row, batch.lam
        step(StoredBatch(*tensors), draw_uniforms(0, 1, 0, len(batch.clip_ids)).to(device))
        num_clips += len(batch.clip_ids)
    synchronize(device)
    seconds = perf_counter() - start
    return num_clips / seconds, waited / seconds
