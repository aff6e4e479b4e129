"""Upstream's way to read training batches: what PSLA's loader does, clip by clip, in two worker processes."""

# T frames, F mels, C classes

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from psla_fast.fbank import PSLA_MEAN, PSLA_STD

NUM_WORKERS = 2


def compute_psla_fbank(waveform: Tensor) -> Tensor:
    """Compute the fbank (T, 128) of a 16 kHz waveform (S,) by PSLA's own call."""
    from torchaudio.compliance.kaldi import fbank

    return fbank(
        waveform[None],
        htk_compat=True,
        sample_frequency=16000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )


class WaveformDataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Upstream's way: decode, mix, compute the fbank, mask and normalise, clip by clip in loader workers."""

    def __init__(self, wavs: list[Path], num_clips: int, num_frames: int, num_classes: int = 527) -> None:
        """Take num_clips clips, whose wavs repeat; labels are lists of mids, as in PSLA's datafile."""
        from torchaudio.transforms import FrequencyMasking, TimeMasking

        self._wavs, self._num_clips, self._num_frames = wavs, num_clips, num_frames
        self._labels = [
            ",".join(f"/m/{(7 * i + j) % num_classes}" for j in range(3)) for i in range(len(wavs))
        ]
        self._index_by_mid = {f"/m/{i}": i for i in range(num_classes)}
        self._masks = FrequencyMasking(48), TimeMasking(192)

    def __len__(self) -> int:
        """Clips of an epoch."""
        return self._num_clips

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Give a normalised fbank (T, F) and its target (C,)."""
        waveform, target = self._read(index % len(self._wavs))
        if random.random() < 0.5:
            partner, partner_target = self._read(random.randrange(len(self._wavs)))
            lam = float(np.random.beta(10, 10))
            waveform = lam * waveform + (1 - lam) * partner
            waveform = waveform - waveform.mean()
            target = lam * target + (1 - lam) * partner_target
        x = compute_psla_fbank(waveform)
        x = torch.nn.functional.pad(x, (0, 0, 0, self._num_frames - len(x))).T[None]
        for mask in self._masks:
            x = mask(x)
        return (x[0].T - PSLA_MEAN) / PSLA_STD, target

    def _read(self, number: int) -> tuple[Tensor, Tensor]:
        samples, _ = soundfile.read(self._wavs[number], dtype="float32")
        target = torch.zeros(len(self._index_by_mid))
        for mid in self._labels[number].split(","):
            target[self._index_by_mid[mid]] = 1
        waveform = torch.from_numpy(samples)
        return waveform - waveform.mean(), target


def upstream(wavs: list[Path], num_clips: int, batch_size: int, num_frames: int) -> Callable[[], int]:
    """A DataLoader over WaveformDataset; its workers live on from one pass to the next."""
    loader = torch.utils.data.DataLoader(
        WaveformDataset(wavs, num_clips, num_frames),
        batch_size=batch_size,
        shuffle=True,
        num_workers=NUM_WORKERS,
        persistent_workers=True,
    )
    return lambda: sum(len(fbank) for fbank, _ in loader)
