"""Scorers: a model and what stands before it, so that a file takes log-mels or waveforms as they are."""

# B clips, S samples, T frames, W samples of a window, K bins of the FFT, F mels, C classes

import math

import torch
from torch import Tensor, nn

from psla_fast.augment import InputSpec
from psla_fast.checkpoint import Checkpoint
from psla_fast.fbank import LOG_FLOOR_POWER, FbankConfig


class FbankScorer(nn.Module):
    """Log-mels (B, T, F) as shards hold them -> scores (B, C): padded, normalised and scored."""

    def __init__(self, model: nn.Module, spec: InputSpec) -> None:
        """Take a model in eval mode and what its input looks like."""
        super().__init__()
        self.model, self.spec = model, spec
        self.masks_padding: bool = getattr(model, "mask_padding", False)

    def forward(self, fbank: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Score log-mels (B, T, F), unnormalised: (B, C).

        Where T is below the clip length of training, or that of the smallest bucket that holds T, `pad_value`
        fills it up; longer clips are scored whole. num_frames (B,), which models with `mask_padding` need,
        says where each clip's own padding begins.
        """
        return self.score(fbank, fbank.shape[1], num_frames)

    def score(self, fbank: Tensor, num_valid: int, num_frames: Tensor | None) -> Tensor:
        """Score as `forward` does the first num_valid frames of all clips."""
        length = _padded_frames(num_valid, self.spec)
        padded = _pad(fbank, num_valid, length, self.spec.pad_value)
        lengths: tuple[Tensor, ...] = ()
        if self.masks_padding:
            assert num_frames is not None
            is_frame = torch.arange(length, device=fbank.device) < num_frames[:, None]
            padded, lengths = torch.where(is_frame[:, :, None], padded, self.spec.pad_value), (num_frames,)
        scores: Tensor = self.model((padded - self.spec.mean) / self.spec.std, *lengths)
        return scores


class WaveformScorer(nn.Module):
    """Waveforms (B, S) of any length -> scores (B, C): `compute_fbank`, of what every format has.

    The Fourier transform is a product with its matrix. Frames are transformed in float64: float32's rounding,
    `compute_fbank`'s as well, shifts the log of mels far below their frame's power by up to .006 on real
    recordings, and scores by up to 4e-4; this way by 1e-6.
    """

    window: Tensor
    fourier: Tensor
    banks: Tensor

    def __init__(self, scorer: FbankScorer, config: FbankConfig) -> None:
        """Take a scorer of log-mels and how these are computed."""
        super().__init__()
        self.scorer, self.config = scorer, config
        window, fourier, banks = _front_end(config)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("fourier", fourier, persistent=False)
        self.register_buffer("banks", banks, persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Score waveforms (B, S) in [-1, 1] at the config's sample rate, S of 1 or more: (B, C)."""
        config, length = self.config, self.config.window_samples
        num_frames = 1 + (_larger(waveform.shape[1], length) - length) // config.shift_samples
        fbank = self._compute_fbank(waveform, _larger(num_frames, 2))
        lengths = torch.arange(1, device=waveform.device).expand(waveform.shape[0]) + num_frames
        return self.scorer.score(fbank, num_frames, lengths)

    def _compute_fbank(self, waveform: Tensor, num_frames: int) -> Tensor:
        """Log-mels (B, T, F) of waveforms (B, S) with zeros behind; T of 2 or more, else export fixes it."""
        length, shift = self.config.window_samples, self.config.shift_samples
        num_samples = _larger(waveform.shape[1], length + (num_frames - 1) * shift)
        centred = waveform.double() - waveform.double().mean(dim=1, keepdim=True)
        padded = _pad(centred, waveform.shape[1], num_samples, 0.0)
        starts = torch.arange(num_frames, device=waveform.device) * shift
        within = torch.arange(length, device=waveform.device)
        frames = padded[:, starts[:, None] + within]  # (B, T, W)
        frames = frames - frames.mean(dim=2, keepdim=True)
        before = torch.cat([frames[:, :, :1], frames[:, :, :-1]], dim=2)
        emphasised = (frames - self.config.preemphasis * before) * self.window
        real, imaginary = (emphasised @ self.fourier).chunk(2, dim=2)  # (B, T, K) each
        power = real.square() + imaginary.square()
        return (power.float() @ self.banks).clamp(min=LOG_FLOOR_POWER).log()


def build_scorer(checkpoint: Checkpoint, with_fbank: bool) -> FbankScorer | WaveformScorer:
    """Build a checkpoint's model with what stands before it; float32, in eval mode."""
    scorer = FbankScorer(checkpoint.build(), checkpoint.card.input)
    return (WaveformScorer(scorer, checkpoint.card.fbank) if with_fbank else scorer).eval()


def _pad(values: Tensor, num_valid: int, length: int, fill: float) -> Tensor:
    """Keep the first num_valid along dimension 1 and fill it up to a length not below that.

    By index: padding by a difference of sizes would tie torch.export to what it was for the example.
    """
    last = values.new_full((values.shape[0], 1, *values.shape[2:]), fill)
    at = torch.arange(length, device=values.device)
    return torch.cat([values, last], dim=1)[:, torch.where(at < num_valid, at, values.shape[1])]


def _padded_frames(num_frames: int, spec: InputSpec) -> int:
    """Count the frames evaluation pads to: the smallest bucket that holds them; more stay as they are."""
    if not spec.buckets:
        return _larger(num_frames, spec.clip_frames)
    limits = torch.tensor(spec.buckets)
    bucket = torch.where(limits >= num_frames, limits, max(spec.buckets)).min()
    length = torch.maximum(bucket, torch.scalar_tensor(num_frames, dtype=torch.int64)).item()
    # a number of its own: with a formula of num_frames, sympy takes minutes
    torch._check(length >= spec.buckets[0])  # type: ignore[no-untyped-call]
    return int(length)


def _larger(a: int, b: int) -> int:
    """Take the larger of two sizes, which export may not know."""
    return torch.sym_max(a, b)  # type: ignore[no-any-return,no-untyped-call]


def _front_end(config: FbankConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Window (W,), cosines and negative sines of the FFT's bins (W, 2·K), float64, and mel banks (K, F)."""
    from torchaudio.compliance.kaldi import get_mel_banks

    length = config.window_samples
    fft_size = 1 << (length - 1).bit_length()
    nyquist = 0.0  # Kaldi's way to say "up to Nyquist"
    banks, _ = get_mel_banks(
        config.num_mels, fft_size, float(config.sample_rate), config.low_freq, nyquist, 100.0, -500.0, 1.0
    )
    turns = torch.outer(torch.arange(length), torch.arange(fft_size // 2)) % fft_size
    angles = turns.double() * (2 * math.pi / fft_size)
    fourier = torch.cat([angles.cos(), -angles.sin()], dim=1)
    window = torch.hann_window(length, periodic=False, dtype=torch.float64)
    return window, fourier, banks.T.contiguous()
