"""Our training step, the trainer's own, and synthetic batches for it that lie on the device."""

# B clips of a batch, T frames

import tempfile
import time
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from roofline import NUM_CLASSES
from torch.profiler import ProfilerActivity, profile, record_function

from psla_fast.allocator import keep_freed_memory
from psla_fast.augment import InputSpec
from psla_fast.distributed import World
from psla_fast.fbank import PSLA_MEAN, PSLA_STD
from psla_fast.models import ModelConfig, build_model, use_channels_last
from psla_fast.shards import Storage
from psla_fast.stream import Batch, StreamConfig
from psla_fast.train.config import DataConfig, InputConfig, TrainConfig
from psla_fast.train.profiling import count_syncs, measure_phases, read_events
from psla_fast.train.step import StepPlace, TrainStep

Step = Callable[[Batch], None]


def build_our_step(
    config: ModelConfig, device: torch.device, precision: str, mode: str, shapes: tuple[int, ...]
) -> Step:
    """Return a call that takes one of the trainer's steps on a batch, of one of `shapes` frames."""
    if device.type == "cpu":  # as training does
        keep_freed_memory()
    else:
        torch.backends.cudnn.benchmark = True
    train = TrainConfig(
        DataConfig(""),
        Path(),
        InputConfig(clip_frames=shapes[-1]),
        stream=StreamConfig(buckets=shapes if len(shapes) > 1 else ()),
        model=config,
        precision=precision,  # type: ignore[arg-type]
        compile=mode,  # type: ignore[arg-type]
    )
    model = build_model(config, NUM_CLASSES).to(device).train()
    use_channels_last(model)
    spec = InputSpec(shapes[-1], 128, 0.0, PSLA_MEAN, PSLA_STD, train.stream.buckets)
    take = TrainStep(train, model, spec, Storage.of("float16"), World(0, 1, device))
    steps = count()
    return lambda batch: void(take(batch, StepPlace(1, next(steps), 1e-4)))


def void(_: object) -> None:
    """Forget a step's loss without a look at it."""


def on_synthetic(step: Step, device: torch.device) -> Callable[[int, int], None]:
    """Turn a step into a call (B, T) on random batches, one for each shape."""
    make_batch = lru_cache(partial(build_batch, device))
    return lambda batch, frames: step(make_batch(batch, frames))


def build_batch(device: torch.device, batch: int, frames: int) -> Batch:
    """Random stored clips on the device, each with a partner."""
    stored = (torch.randn(2 * batch, frames, 128) * 4 - 5).half().to(device)
    targets = (torch.rand(2 * batch, NUM_CLASSES) < 0.005).float().to(device)
    lengths = torch.full((2 * batch,), min(frames, 998), device=device)
    partners = torch.arange(batch, 2 * batch, device=device)
    lam = torch.full((batch,), 0.5, device=device)
    return Batch(np.arange(batch), stored, lengths, targets, partners, lam)


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a step; on a GPU the mean of 10."""
    if device.type == "cuda":
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(10):
            step()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 10_000
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure_step(step: Callable[[], None], device: torch.device) -> tuple[dict[str, float], dict[str, int]]:
    """Milliseconds of each phase of a step (on a GPU of its kernels), and what made the host wait in it."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        with record_function("ProfilerStep#0"):
            step()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = read_events(trace)
    phases = {name: round(times[cuda], 3) for name, times in measure_phases(events).items() if any(times)}
    return phases, {name: number for name, number in count_syncs(events).items() if number}


def measure_activations(step: Callable[[], None], device: torch.device) -> int:
    """Bytes that a step's forward pass keeps for its backward pass; on a GPU all it takes at its peak."""
    if device.type == "cuda":
        step()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return int(torch.cuda.max_memory_allocated(device) - before)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values())
