"""Contestants of benchmarks/pack.py: upstream's way, ours, decoding alone, whole packs by workers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

from benchmarks.stream_upstream import compute_psla_fbank
from psla_fast.classes import Classes
from psla_fast.clip import Clip
from psla_fast.pack import PackConfig, WorkConfig, pack_splits
from psla_fast.pack.shard_task import ShardTask, pack_shard
from psla_fast.pack.table import ClipTable
from psla_fast.sources import Split

SAMPLE_RATE, SECONDS = 44100, 10
FORMATS = ("wav", "flac", "mp3")
CLASSES = Classes(("/m/a",), ("A",))


def write_clips(folder: Path, num_clips: int) -> dict[str, list[Path]]:
    """Write clips of chirps over noise, each in every format."""
    paths: dict[str, list[Path]] = {ending: [] for ending in FORMATS}
    time = np.arange(SECONDS * SAMPLE_RATE) / SAMPLE_RATE
    for number in range(num_clips):
        rng = np.random.default_rng(number)
        low, high = rng.uniform(100, 400), rng.uniform(2000, 8000)
        chirp = np.sin(2 * np.pi * (low * time + (high - low) * time**2 / (2 * SECONDS)))
        noise = np.cumsum(rng.standard_normal(len(time))) * 2e-3
        waveform = 0.3 * chirp + 0.1 * (noise - noise.mean()) / np.abs(noise).max()
        for ending in FORMATS:
            path = folder / f"{number}.{ending}"
            soundfile.write(path, waveform, SAMPLE_RATE)
            paths[ending].append(path)
    return paths


def as_split(name: str, paths: list[Path], copies: int = 1) -> Split:
    """Give files as a split; `copies` names each several times."""
    clips = [Clip(f"{p.stem}x{n}", p.name, (0,)) for n in range(copies) for p in paths]
    return Split(name, paths[0].parent, lambda: iter(clips))


def upstream(paths: list[Path], keep_kernel: bool) -> Callable[[], int]:
    """Decode, resample and compute the fbank as PSLA's loader would; keep_kernel: the resampler's is kept."""
    resample = partial(torchaudio.functional.resample, orig_freq=SAMPLE_RATE, new_freq=16000)
    if keep_kernel:
        resample = torchaudio.transforms.Resample(SAMPLE_RATE, 16000)

    def run() -> int:
        for path in paths:
            samples, _ = soundfile.read(path, dtype="float32")
            waveform = resample(torch.from_numpy(samples))
            compute_psla_fbank(waveform - waveform.mean())
        return len(paths)

    return run


def ours(paths: list[Path], out: Path) -> Callable[[], int]:
    """Pack one shard of the clips."""
    out.mkdir()
    table = ClipTable(as_split(out.name, paths))
    rows = table.encoded(range(len(table)))
    task = ShardTask(0, out, 0, paths[0].parent, rows, PackConfig(), again=True)
    return lambda: pack_shard(task).rows


def decode(paths: list[Path]) -> Callable[[], int]:
    """Decode alone, the ceiling."""
    return lambda: sum(len(soundfile.read(path, dtype="int16")[0]) > 0 for path in paths)


def pack_all(paths: list[Path], copies: int, workers: int, folder: Path) -> Callable[[], int]:
    """Pack a whole split by some worker processes, started before."""
    count = iter(range(10**6))

    def run() -> int:
        split = as_split(f"{workers}_{next(count)}", paths, copies)
        summary = pack_splits(CLASSES, [split], folder, PackConfig(shard_mb=16), WorkConfig(workers=workers))
        return summary[0].num_clips

    return run


def worker_megabytes() -> float:
    """Give the highest peak of resident memory among the worker processes."""
    peaks = []
    for thread in Path("/proc/self/task").iterdir():
        for process in (thread / "children").read_text().split():
            status = Path(f"/proc/{process}/status").read_text()
            if "VmHWM:" in status:  # not one that just ended
                peaks.append(int(status.split("VmHWM:")[1].split()[0]) / 1024)
    return max(peaks)
