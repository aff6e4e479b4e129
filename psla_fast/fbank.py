"""Fbank: waveforms -> Kaldi-compatible log-mel filterbanks, batched, on any device.

Equal to `torchaudio.compliance.kaldi.fbank(htk_compat=True, use_energy=False, window_type="hanning",
dither=0)`, PSLA's front end, but batched, and with its window and mel banks computed once.
"""

# S samples, T frames, W samples of a window, F mels

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

LOG_FLOOR_POWER = 1.1920928955078125e-07  # float32's epsilon: Kaldi's floor, log = -15.94
PSLA_MEAN, PSLA_STD = -4.6476, 4.5699  # of AudioSet's log-mels, by which PSLA normalises


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
        if self.sample_rate < 1 or self.num_mels < 1 or self.window_samples < 2 or self.shift_samples < 1:
            raise ValueError(
                f"fbank: {self.num_mels} mels of windows of {self.window_samples} samples every "
                f"{self.shift_samples} can't be computed; give 1 mel, 2 samples, 1 sample, or more."
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


@lru_cache(maxsize=16)
def _window_and_banks(config: FbankConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hann window (W,) and mel banks (fft // 2 + 1, F) on a device."""
    from torchaudio.compliance.kaldi import get_mel_banks

    fft_size = _fft_size(config)
    window = torch.hann_window(config.window_samples, periodic=False, dtype=dtype, device=device)
    nyquist = 0.0  # Kaldi's way to say "up to Nyquist"
    banks, _ = get_mel_banks(
        config.num_mels, fft_size, float(config.sample_rate), config.low_freq, nyquist, 100.0, -500.0, 1.0
    )
    banks = torch.nn.functional.pad(banks.to(dtype), (0, 1))  # Kaldi leaves out the Nyquist bin
    return window, banks.T.contiguous().to(device)


def _fft_size(config: FbankConfig) -> int:
    return 1 << (config.window_samples - 1).bit_length()


def compute_fbank(waveform: Tensor, config: FbankConfig) -> Tensor:
    """Log-mel filterbank energies of waveforms (..., S) in [-1, 1]: (..., T, F), T = `config.num_frames(S)`.

    Natural log of the mel power, never below log(1.19e-07) = -15.94; float32 unless the waveform is float64.
    A waveform shorter than one window is padded with zeros to one. Raises ValueError for an empty or integer
    waveform. Source: Kaldi's compute-fbank-feats; per frame: mean removed, pre-emphasis, Hann window, |FFT|²,
    mel, log.
    """
    if not waveform.is_floating_point():
        raise ValueError(f"compute_fbank takes a floating-point waveform in [-1, 1], got {waveform.dtype}.")
    if waveform.shape[-1] == 0:
        raise ValueError("compute_fbank got a waveform of 0 samples. Leave empty clips out.")
    if waveform.dtype not in (torch.float32, torch.float64):
        waveform = waveform.float()
    window, banks = _window_and_banks(config, waveform.device, waveform.dtype)
    missing = config.window_samples - waveform.shape[-1]
    if missing > 0:
        waveform = torch.nn.functional.pad(waveform, (0, missing))
    frames = waveform.unfold(-1, config.window_samples, config.shift_samples)  # (..., T, W)
    frames = frames - frames.mean(dim=-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    frames = (frames - config.preemphasis * previous) * window
    spectrum = torch.fft.rfft(frames, n=_fft_size(config))
    power = spectrum.real.square() + spectrum.imag.square()
    mel: Tensor = power @ banks
    return mel.clamp_(min=LOG_FLOOR_POWER).log_()
