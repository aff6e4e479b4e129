"""Measure: a checkpoint's and an exported model's mAP on a packed split, and clips a second."""

# B clips, T frames, F mels, C classes

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from psla_fast.augment import LOG_FLOOR, InputSpec
from psla_fast.checkpoint import Card, Checkpoint
from psla_fast.evaluate import autocast, resolve_precision
from psla_fast.export.check import Run, find_length, score_padded
from psla_fast.metrics import Metrics, compute_metrics
from psla_fast.models import use_channels_last
from psla_fast.shards import Shards

ROUNDS = 5
TIMED_CLIPS = 32


@dataclass(frozen=True)
class Measured:
    """A model's metrics on a split, and clips a second by batch size: the median of rounds by turns."""

    metrics: Metrics
    clips_per_second: dict[int, float] = field(default_factory=dict)


def checkpoint_runs(checkpoint: Checkpoint) -> dict[str, Run]:
    """Name the ways to score with a checkpoint's model: torch in float32, in bf16 where CPUs compute so."""
    model, cpu = checkpoint.build(), torch.device("cpu")
    use_channels_last(model)

    def run(fbank: Tensor, num_frames: Tensor) -> Tensor:
        return score_padded(model, fbank, num_frames, checkpoint.card.input)

    def run_bf16(fbank: Tensor, num_frames: Tensor) -> Tensor:
        with autocast("bf16", cpu):
            return run(fbank, num_frames)

    runs: dict[str, Run] = {"torch float32": run}
    if resolve_precision("auto", cpu) == "bf16":
        runs["torch bf16"] = run_bf16
    return runs


def with_lengths(run: Run, card: Card) -> Run:
    """Let what was exported of a card be called with num_frames (B,) whether or not it takes them."""
    return run if card.model.mask_padding else lambda fbank, _: run(fbank)


@torch.inference_mode()
def measure(runs: Mapping[str, Run], shards: Shards, spec: InputSpec, batch_size: int) -> dict[str, Measured]:
    """Score a split's clips by each, as evaluation pads and cuts them; then time them on the first clips.

    A run takes log-mels (B, T, F), padded, and num_frames (B,).
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}; give 1 or more.")
    scores: dict[str, list[Tensor]] = {name: [] for name in runs}
    order: list[int] = []
    bar = tqdm(total=len(shards), desc=f"score {shards.folder.name}", leave=False, disable=None)
    for clip_ids, fbank, num_frames in _read_batches(shards, spec, batch_size):
        order += clip_ids
        for name, run in runs.items():
            scores[name].append(run(fbank, num_frames))
        bar.update(len(clip_ids))
    bar.close()
    targets = shards.targets(np.array(order))
    metrics = {name: compute_metrics(torch.cat(found).numpy(), targets) for name, found in scores.items()}
    speeds = {size: _time(runs, shards, spec, size) for size in sorted({1, batch_size})}
    return {
        name: Measured(metrics[name], {size: found[name] for size, found in speeds.items()}) for name in runs
    }


def _time(runs: Mapping[str, Run], shards: Shards, spec: InputSpec, batch_size: int) -> dict[str, float]:
    """Clips a second of each, of clips as long as the longest are cut to; the median of rounds."""
    length = find_length(10**9, spec)
    clips = torch.stack(
        [_read(shards, index % len(shards), length, spec) for index in range(max(TIMED_CLIPS, batch_size))]
    )
    batches = [batch for batch in torch.split(clips, batch_size) if len(batch) == batch_size]
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(ROUNDS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            for batch in batches:
                run(batch, torch.full((batch_size,), length))
            rate = batch_size * len(batches) / (time.perf_counter() - start)
            if round_number:  # the first warms up
                rates[name].append(rate)
    return {name: median(found) for name, found in rates.items()}


def _read_batches(
    shards: Shards, spec: InputSpec, batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield clip ids, their log-mels (B, T, F), padded to one length, and num_frames (B,)."""
    frames = shards.index.num_frames
    lengths = np.array([find_length(int(count), spec) for count in frames])
    for length in np.unique(lengths):
        clip_ids = np.flatnonzero(lengths == length)
        for start in range(0, len(clip_ids), batch_size):
            chosen = [int(clip_id) for clip_id in clip_ids[start : start + batch_size]]
            fbank = torch.stack([_read(shards, clip_id, int(length), spec) for clip_id in chosen])
            yield chosen, fbank, torch.from_numpy(np.minimum(frames[chosen], length).astype(np.int64))


def _read(shards: Shards, clip_id: int, length: int, spec: InputSpec) -> Tensor:
    fbank = np.full((length, spec.num_mels), spec.pad_value, dtype=np.float32)
    stored = np.maximum(shards.fbank(clip_id)[:length], LOG_FLOOR)  # float16 rounds silence to below it
    fbank[: len(stored)] = stored
    return torch.from_numpy(fbank)
