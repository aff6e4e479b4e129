"""Windows: blocks of a waveform -> the stretches that a model hears, with overlap, in constant memory."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from psla_fast.audio import Waveform, centre
from psla_fast.augment import InputSpec
from psla_fast.fbank import FbankConfig, compute_fbank
from psla_fast.models import TimeGrid

ROUNDING = 1e-6  # 320 · (1 - .9) / 16 is a little below 2 in floating point
FEWEST_SAMPLES = 1 << 14  # to append at a time


@dataclass(frozen=True)
class Windowing:
    """How sounds longer than the model's clips are cut, and what their windows' scores become."""

    seconds: float | None = None
    """Length of a window; None: that of the clips which the model was trained on."""
    overlap: float = 0.5
    """Part of a window that the next one repeats, 0 to below 1; rounded up to the model's time steps."""
    over: Literal["max", "mean"] = "max"
    """A class's score is its highest over the windows (which classes occur), or their mean (which last)."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.seconds is not None and not 0.1 <= self.seconds <= 600:
            raise ValueError(f"a window of {self.seconds:g} seconds can't be cut; give 0.1 to 600.")
        if not 0 <= self.overlap <= 0.95:
            raise ValueError(f"an overlap of {self.overlap:g} can't be cut; give 0 to 0.95.")


@dataclass(frozen=True)
class Cut:
    """A Windowing in frames: windows of clip_frames every hop_frames, a multiple of step_frames.

    A window is padded to the smallest of `shapes` (frames, ascending) that holds it.
    """

    fbank: FbankConfig
    clip_frames: int
    hop_frames: int
    step_frames: int
    shapes: tuple[int, ...]

    @classmethod
    def of(cls, windowing: Windowing, spec: InputSpec, fbank: FbankConfig, grid: TimeGrid) -> "Cut":
        """Resolve a windowing for a model with such time steps; each is one of a window that has it."""
        clip_frames, shapes = spec.clip_frames, spec.buckets or (spec.clip_frames,)
        if windowing.seconds is not None:
            clip_frames = max(1, round(windowing.seconds * 1000 / fbank.frame_shift_ms))
            shapes = (clip_frames,)
        step = min(grid.stride, clip_frames)
        hop_steps = math.floor(clip_frames * (1 - windowing.overlap) / step + ROUNDING)
        hop = max(1, min(hop_steps, grid.count_steps(clip_frames))) * step
        return cls(fbank, clip_frames, hop, step, shapes)

    @property
    def clip_samples(self) -> int:
        """Samples of a whole window."""
        return self.fbank.window_samples + (self.clip_frames - 1) * self.fbank.shift_samples

    @property
    def hop_samples(self) -> int:
        """Samples between the starts of two windows."""
        return self.hop_frames * self.fbank.shift_samples

    def shape(self, num_frames: int) -> int:
        """Give the frames to which a window of num_frames is padded."""
        return next(shape for shape in self.shapes if shape >= num_frames)


@dataclass(frozen=True)
class Window:
    """A stretch of a sound: its first frame there, its log-mels (T, F), unnormalised."""

    start_frame: int
    fbank: Tensor


def make_window(start_frame: int, waveform: Waveform, fbank: FbankConfig) -> Window:
    """Centre a stretch of waveform (samples,), as a clip of its own would be, and compute its fbank."""
    return Window(start_frame, compute_fbank(torch.from_numpy(centre(waveform)), fbank))


def _join(blocks: Iterable[Waveform], num_samples: int) -> Iterator[Waveform]:
    """Join small blocks to ones of num_samples or more, as each append to a window copies all of it."""
    parts: list[Waveform] = []
    total = 0
    for block in blocks:
        parts.append(block)
        total += len(block)
        if total >= num_samples:
            yield np.concatenate(parts) if len(parts) > 1 else block
            parts, total = [], 0
    if parts:
        yield np.concatenate(parts)


def cut_windows(blocks: Iterable[Waveform], cut: Cut) -> Iterator[Window | int]:
    """Cut a waveform that comes in blocks (samples,) into windows; last comes its number of samples.

    What fits one window is one, with the fbank of a packed clip. Of a longer waveform every window's own mean
    is subtracted; the last one begins earlier than a hop after the one before, so that it is full but for
    less than a time step. At most a window and a quarter, a hop and two blocks are held.
    """
    shift = cut.fbank.shift_samples
    held = np.empty(0, np.float32)  # from the last window's start on
    held_from = num_samples = next_at = 0  # a frame; samples; the next window's start in `held`
    for block in _join(blocks, max(FEWEST_SAMPLES, cut.clip_samples // 4)):
        held, num_samples = np.concatenate([held, block]), num_samples + len(block)
        while len(held) - next_at >= cut.clip_samples + shift:  # a frame more than the window has
            held, held_from = held[next_at:], held_from + next_at // shift
            yield make_window(held_from, held[: cut.clip_samples], cut.fbank)
            next_at = cut.hop_samples
    if not next_at:
        if num_samples:
            yield make_window(0, held, cut.fbank)
    else:
        beyond = cut.fbank.num_frames(len(held)) - cut.clip_frames  # from the last window's start on
        start = math.ceil(beyond / cut.step_frames) * cut.step_frames
        yield make_window(held_from + start, held[start * shift :], cut.fbank)
    yield num_samples
