"""Fbank: waveforms -> Kaldi-compatible log-mel filterbanks, batched, on any device.

Equal to `torchaudio.compliance.kaldi.fbank(htk_compat=True, use_energy=False, window_type="hanning",
dither=0)`, PSLA's front end, but batched, and with its window and mel banks computed once.
"""

# S samples, T frames, W samples of a window, F mels

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

LOG_FLOOR_POWER = 1.1920928955078125e-07  # float32's epsilon: Kaldi's floor, log = -15.94
PSLA_MEAN, PSLA_STD = -4.6476, 4.5699  # of AudioSet's log-mels, by which PSLA normalises

# Frames computed at a time: 3 MB of temporaries, about a core's cache; enough to fill a GPU.
CHUNK_FRAMES = {"cpu": 512, "device": 1 << 15}


@dataclass(frozen=True)
class FbankConfig:
    """How a waveform becomes an fbank. The defaults are PSLA's."""

    sample_rate: int = 16000
    """Hz; audio is resampled to it."""
    num_mels: int = 128
    """Mel bins F."""
    frame_length_ms: float = 25.0
    """Window length."""
    frame_shift_ms: float = 10.0
    """Hop."""
    low_freq: float = 20.0
    """Lower edge of the first mel bin, in Hz."""
    preemphasis: float = 0.97
    """Pre-emphasis coefficient; the first sample of a frame is emphasised against itself."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.sample_rate < 1 or self.num_mels < 4 or self.window_samples < 2 or self.shift_samples < 1:
            raise ValueError(
                f"fbank: {self.num_mels} mels of windows of {self.window_samples} samples every "
                f"{self.shift_samples} can't be computed; give 4 mels, 2 samples, 1 sample, or more."
            )
        if not 0 <= self.low_freq < self.sample_rate / 2:
            raise ValueError(f"fbank.low_freq is {self.low_freq}; give 0 to below {self.sample_rate / 2} Hz.")

    @property
    def window_samples(self) -> int:
        """Samples W of one window."""
        return int(self.sample_rate * self.frame_length_ms * 0.001)

    @property
    def shift_samples(self) -> int:
        """Samples between the starts of two frames."""
        return int(self.sample_rate * self.frame_shift_ms * 0.001)

    def num_frames(self, num_samples: int) -> int:
        """Frames T of a waveform: whole windows only; a shorter waveform is zero-padded to one."""
        return 1 + max(0, num_samples - self.window_samples) // self.shift_samples


class _Bank(NamedTuple):
    """Neighbouring mel filters, and the only FFT bins that they weigh."""

    first_bin: int
    last_bin: int  # exclusive
    first_mel: int
    last_mel: int  # exclusive
    weights: Tensor  # (bins, mels)


@lru_cache(maxsize=16)
def _window_and_banks(
    config: FbankConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, tuple[_Bank, ...]]:
    """Hann window (W,) and the mel banks in groups, on a device."""
    from torchaudio.compliance.kaldi import get_mel_banks

    window = torch.hann_window(config.window_samples, periodic=False, dtype=dtype, device=device)
    nyquist = 0.0  # Kaldi's way to say "up to Nyquist"
    rate = float(config.sample_rate)
    banks, _ = get_mel_banks(  # (F, fft // 2): Kaldi leaves out the Nyquist bin
        config.num_mels, _fft_size(config), rate, config.low_freq, nyquist, 100.0, -500.0, 1.0
    )
    banks = banks.T.to(dtype)
    mels_of_a_group = 64 if device.type == "cpu" else config.num_mels
    groups = []
    for first in range(0, config.num_mels, mels_of_a_group):
        weights = banks[:, first : first + mels_of_a_group]
        bins = weights.any(dim=1).nonzero()
        low, high = (int(bins[0]), int(bins[-1]) + 1) if len(bins) else (0, 1)
        group = weights[low:high].contiguous().to(device)
        groups.append(_Bank(low, high, first, first + weights.shape[1], group))
    return window, tuple(groups)


def _fft_size(config: FbankConfig) -> int:
    return 1 << (config.window_samples - 1).bit_length()


@torch.no_grad()
def compute_fbank(waveform: Tensor, config: FbankConfig) -> Tensor:
    """Log-mel filterbank energies of waveforms (..., S) in [-1, 1]: (..., T, F), T = `config.num_frames(S)`.

    Natural log of the mel power, never below log(1.19e-07) = -15.94; float32 unless the waveform is float64.
    A waveform shorter than one window is padded with zeros to one. Besides the result, memory is bounded by
    `CHUNK_FRAMES`, however long the waveform is. No gradients. Raises ValueError for an empty or integer
    waveform. Source: Kaldi's compute-fbank-feats; per frame: mean removed, pre-emphasis, Hann window, |FFT|²,
    mel, log.
    """
    if not waveform.is_floating_point():
        raise ValueError(f"compute_fbank takes a floating-point waveform in [-1, 1], got {waveform.dtype}.")
    if waveform.shape[-1] == 0:
        raise ValueError("compute_fbank got a waveform of 0 samples. Leave empty clips out.")
    if waveform.dtype not in (torch.float32, torch.float64):
        waveform = waveform.float()
    missing = config.window_samples - waveform.shape[-1]
    if missing > 0:
        waveform = torch.nn.functional.pad(waveform, (0, missing))
    num_frames = config.num_frames(waveform.shape[-1])
    fbank = waveform.new_empty(*waveform.shape[:-1], num_frames, config.num_mels)
    clips = waveform.reshape(-1, waveform.shape[-1]).contiguous()  # a strided mean rounds differently
    frames = clips.unfold(-1, config.window_samples, config.shift_samples)  # (B, T, W)
    rows = fbank.view(len(clips), num_frames, config.num_mels)
    most = CHUNK_FRAMES["cpu" if waveform.device.type == "cpu" else "device"] // max(1, len(clips))
    chunk = min(num_frames, max(1, most))
    padded = waveform.new_zeros(len(clips), chunk, _fft_size(config))
    for start in range(0, num_frames, chunk):
        part = frames[:, start : start + chunk]
        _log_mel(part, padded[:, : part.shape[1]], config, rows[:, start : start + chunk])
    return fbank


def _log_mel(frames: Tensor, padded: Tensor, config: FbankConfig, out: Tensor) -> None:
    """Write the log-mels (B, T, F) of frames (B, T, W) to `out`.

    padded (B, T, fft), zero outside its samples 1 to W - 1, is overwritten there. The order of the operations
    is Kaldi's: where a mel's power is 1e-6 of the frame's, another rounding shifts its log by 1e-3.
    """
    window, banks = _window_and_banks(config, frames.device, frames.dtype)
    centred = frames - frames.mean(dim=-1, keepdim=True)
    inner = padded[
        ..., 1 : config.window_samples
    ]  # sample 0, emphasised against itself, meets the Hann window's 0
    torch.mul(centred[..., :-1], -config.preemphasis, out=inner)
    inner.add_(centred[..., 1:]).mul_(window[1:])
    squares = torch.view_as_real(torch.fft.rfft(padded)).square_()
    power = (squares[..., 0] + squares[..., 1]).flatten(0, 1)  # (B·T, fft // 2 + 1)
    mel = power.new_empty(len(power), config.num_mels)
    for bank in banks:
        bins = power[:, bank.first_bin : bank.last_bin]
        torch.mm(bins, bank.weights, out=mel[:, bank.first_mel : bank.last_mel])
    torch.log(mel.clamp_(min=LOG_FLOOR_POWER).view(out.shape), out=out)
