"""Decode: any audio file that libsndfile reads -> a 16 kHz mono waveform in [-1, 1], mean removed."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr


class AudioError(ValueError):
    """Audio that can't be used; `reason` is one word for statistics, for instance undecodable."""

    def __init__(self, reason: str, detail: str) -> None:
        """Keep the reason apart from the sentence."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def read_waveform(path: Path, sample_rate: int = 16000) -> npt.NDArray[np.float32]:
    """Read a file as a mono waveform (samples,) at `sample_rate`, its mean subtracted as PSLA does.

    Channels are averaged, then soxr (HQ) resamples. Raises AudioError with reason missing_audio, undecodable,
    empty, non_finite, or silent (every sample has the same value, so nothing but the log floor would be
    packed).
    """
    if not path.is_file():
        raise AudioError("missing_audio", f"{path} is not there")
    try:
        audio, source_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError("undecodable", f"{path}: {error}") from error
    if not len(audio):
        raise AudioError("empty", f"{path} holds no sample")
    waveform = audio.mean(axis=1) if audio.shape[1] > 1 else audio[:, 0]
    if not np.isfinite(waveform).all():
        raise AudioError("non_finite", f"{path} holds NaN or infinite samples")
    if waveform.min() == waveform.max():
        raise AudioError("silent", f"{path}: every sample is {waveform[0]:g}")
    if source_rate != sample_rate:
        waveform = soxr.resample(waveform, source_rate, sample_rate, quality="HQ")
        if not len(waveform):
            raise AudioError("empty", f"{path} is shorter than one sample at {sample_rate} Hz")
    centred: npt.NDArray[np.float32] = (waveform - waveform.mean(dtype=np.float64)).astype(np.float32)
    return centred


def read_duration(path: Path) -> float:
    """Return a file's length in seconds from its header; 0.0 where it can't be read."""
    try:
        return float(soundfile.info(path).duration)
    except (soundfile.LibsndfileError, RuntimeError, OSError):
        return 0.0
