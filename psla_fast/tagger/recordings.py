"""Recordings: what a Tagger is given (paths, folders, arrays, bytes) -> sounds that can be decoded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from psla_fast.audio import BLOCK_SAMPLES, Waveform, downmix, stream_blocks, stream_waveform

Sound: TypeAlias = str | Path | bytes | npt.NDArray[Any] | Tensor


@dataclass(frozen=True)
class Recording:
    """A sound by its name: a file, a file's bytes, or an array (samples, channels) of a rate in Hz."""

    name: str
    audio: Path | bytes | npt.NDArray[Any]
    rate: int = 0

    def blocks(self, sample_rate: int) -> Iterator[Waveform]:
        """Decode to mono blocks (samples,) at a rate; raises AudioError."""
        if not isinstance(self.audio, np.ndarray):
            return stream_waveform(self.audio, sample_rate)
        step = max(1, BLOCK_SAMPLES // self.audio.shape[1])
        scale = 2.0**-15 if self.audio.dtype == np.int16 else 1.0
        parts = (self.audio[start : start + step] for start in range(0, len(self.audio), step))
        return stream_blocks((downmix(part, scale) for part in parts), self.rate, sample_rate, self.name)


def find_recordings(sounds: Sound | Sequence[Sound], sample_rate: int) -> list[Recording]:
    """Name all sounds; a folder stands for the audio files in it and its folders, sorted.

    sample_rate is that of arrays (samples,) or (samples, channels): floats in [-1, 1], or int16. Raises
    ValueError for a folder without audio files, an array of another kind, and without a sample rate.
    """
    listed = sounds if isinstance(sounds, Sequence) and not isinstance(sounds, str | bytes) else [sounds]
    found: list[Recording] = []
    for number, sound in enumerate(listed):
        if isinstance(sound, str | Path):
            path = Path(sound)
            found += [Recording(str(p), p) for p in (_list_folder(path) if path.is_dir() else [path])]
        elif isinstance(sound, bytes):
            found.append(Recording(f"bytes {number}" if len(listed) > 1 else "bytes", sound))
        else:
            name = f"array {number}" if len(listed) > 1 else "array"
            found.append(Recording(name, _check_array(sound, sample_rate, name), sample_rate))
    return found


def _list_folder(folder: Path) -> list[Path]:
    from psla_fast.sources.audio_folder import SUFFIXES, scan_audio

    paths = sorted(scan_audio(folder))
    if not paths:
        raise ValueError(f"{folder} holds no audio file ({', '.join(SUFFIXES)}). Name a file, or its folder.")
    return [folder / path for path in paths]


def _check_array(sound: npt.NDArray[Any] | Tensor, sample_rate: int, name: str) -> npt.NDArray[Any]:
    """Give an array or a tensor as (samples, channels) of float32 or int16."""
    array = sound.detach().cpu().numpy() if isinstance(sound, Tensor) else np.asarray(sound)
    if sample_rate < 1:
        raise ValueError(f"{name} has no sample rate. Give sample_rate=, in Hz.")
    if array.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {array.shape}; give (samples,) or (samples, channels).")
    if array.ndim == 2 and array.shape[1] > max(array.shape[0], 1):
        raise ValueError(f"{name} has shape {array.shape}; give (samples, channels): transpose it.")
    if array.dtype != np.int16 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} holds {array.dtype}; give floats in [-1, 1], or int16.")
    columns = array.reshape(len(array), -1) if array.size else np.empty((0, 1), np.float32)
    return columns if columns.dtype == np.int16 else columns.astype(np.float32, copy=False)
