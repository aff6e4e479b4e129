"""Recordings: a Clip -> its waveform, its length, the size of the file it lies in."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from psla_fast.audio import AudioError, read_duration, read_waveform
from psla_fast.clip import Clip
from psla_fast.pack.config import PackConfig
from psla_fast.sources import read_hdf5_waveform


def read_recording(root: Path, clip: Clip, config: PackConfig) -> npt.NDArray[np.float32]:
    """Read a clip's waveform (samples,) at the fbank's sample rate; raises AudioError with its reason."""
    if not clip.found:
        raise AudioError("missing_audio", f"{clip.source} is not there")
    path, rate = root / clip.source, config.fbank.sample_rate
    if clip.row is not None:
        return read_hdf5_waveform(path, clip.row, rate, config.max_clip_seconds)
    return read_waveform(path, rate, clip.start_seconds, clip.end_seconds, config.max_clip_seconds)


def estimate_seconds(root: Path, clip: Clip, config: PackConfig) -> float:
    """Give a clip's length from its file's header; 0.0 where it can't be read."""
    if clip.row is not None:
        try:
            return len(read_recording(root, clip, config)) / config.fbank.sample_rate
        except AudioError:
            return 0.0
    seconds = read_duration(root / clip.source) - clip.start_seconds
    if clip.end_seconds is not None:
        seconds = min(seconds, clip.end_seconds - clip.start_seconds)
    return float(np.clip(seconds, 0.0, config.max_clip_seconds))


def audio_bytes(root: Path, clip: Clip) -> int:
    """Give the size of the file that holds a clip; -1 where there is none."""
    if not clip.found:
        return -1
    try:
        return (root / clip.source).stat().st_size
    except OSError:
        return -1
