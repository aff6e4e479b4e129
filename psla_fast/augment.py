"""Augment: batches as stored -> what the model sees, in one compiled function on the device.

PSLA's order: dequantise, mixup, pad, SpecAugment, normalise, noise, roll. What is random is drawn on the host
from (seed, epoch, step) for the whole global batch, so it doesn't depend on the number of ranks, and a resume
repeats it.
"""

# B clips, R rows of a slab, T frames, F mels, C classes

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

LOG_FLOOR = math.log(1.1920928955078125e-07)  # what silence has in an fbank
NUM_UNIFORMS = 6  # a clip: widths and starts of the two masks, amplitude of the noise, shift


@dataclass(frozen=True)
class AugmentConfig:
    """Device-side augmentation; the defaults are PSLA's."""

    mixup_domain: Literal["power", "linear"] = "power"
    """power: log(λ²e^a + (1-λ)²e^b), what mixing waveforms gives on average; linear: λa + (1-λ)b of
    log-mels."""
    freq_mask_bins: int = 48
    """SpecAugment: the frequency mask's width is uniform in [0, this)."""
    time_mask_frames: int = 192
    """SpecAugment: the time mask's width is uniform in [0, this)."""
    time_mask_fraction: float = 1.0
    """The time mask's limit is at most this fraction of the batch's frames (SpecAugment's p); matters where
    batches are short."""
    mask_value: float = 0.0
    """Masks are filled with this log-mel, before normalising."""
    noise: float = 0.0
    """Uniform noise of an amplitude drawn from [0, this) is added after normalising; PSLA's option: 0.1."""
    roll_frames: int = 0
    """The clip is rolled in time by -this … this-1 frames; PSLA's option: 10."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("freq_mask_bins", "time_mask_frames", "noise", "roll_frames"):
            if getattr(self, name) < 0:
                raise ValueError(f"augment.{name} is {getattr(self, name)}; give 0 or more.")
        if not 0 < self.time_mask_fraction <= 1:
            raise ValueError(
                f"augment.time_mask_fraction is {self.time_mask_fraction}; give a fraction above 0, up to 1."
            )


class StoredBatch(NamedTuple):
    """B clips as a stream gives them: rows 0…B-1 are the clips, rows after them partners, R rows in all.

    fbank (R, T, F) stored values, log-mel = value·scale + offset, valid up to each row's num_frames (R,);
    targets (R, C); partner_row (B,) the row a clip is mixed with, its own where it isn't; lam (B,) in [0, 1].
    """

    fbank: Tensor
    num_frames: Tensor
    targets: Tensor
    partner_row: Tensor
    lam: Tensor
    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class InputSpec:
    """What a model's input looks like; stored with every checkpoint.

    A clip is padded to clip_frames, or to the smallest of the buckets (frames, the last is clip_frames) that
    holds it.
    """

    clip_frames: int
    num_mels: int
    pad_value: float
    mean: float
    std: float
    buckets: tuple[int, ...] = ()


def mixup_power(fbank: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    """Log-mel of λ·x + (1-λ)·y for waveforms of unrelated phases: powers add, cross terms vanish on average.

    fbank, partner (B, T, F) log-mel power, unnormalised; lam (B,) in [0, 1]. Returns (B, T, F), never below
    LOG_FLOOR.
    """
    gain = 2 * lam.log().view(-1, 1, 1)
    partner_gain = 2 * torch.log1p(-lam).view(-1, 1, 1)
    return torch.logaddexp(fbank + gain, partner + partner_gain).clamp(min=LOG_FLOOR)


def mixup_linear(fbank: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    """λ·a + (1-λ)·b of two log-mels (B, T, F), lam (B,) in [0, 1]: a blend of pictures, not of sounds."""
    lam = lam.view(-1, 1, 1)
    return lam * fbank + (1 - lam) * partner


def mix_targets(targets: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    """λ·y1 + (1-λ)·y2 of targets (B, C), so that a class both clips carry gets 1."""
    lam = lam.view(-1, 1)
    return (lam * targets + (1 - lam) * partner).clamp(0, 1)


def mask_spans(fbank: Tensor, uniforms: Tensor, config: AugmentConfig) -> Tensor:
    """SpecAugment: one frequency and one time mask a clip, drawn as torchaudio does.

    fbank (B, T, F), filled with `mask_value`; uniforms (B, ≥4) in [0, 1): a width is
    ⌊u·limit⌋, so always below its limit, and its start ⌊u·(size - u·limit)⌋.
    A limit above the axis is cut to it, that of time to ⌊`time_mask_fraction`·T⌋.
    """
    _, num_frames, num_mels = fbank.shape
    most_frames = math.floor(config.time_mask_fraction * num_frames)
    for axis, size, limit, column in (
        (2, num_mels, config.freq_mask_bins, 0),
        (1, num_frames, min(config.time_mask_frames, most_frames), 2),
    ):
        if limit == 0:
            continue
        span = uniforms[:, column] * min(limit, size)
        start = (uniforms[:, column + 1] * (size - span)).floor()
        end = start + span.floor()
        at = torch.arange(size, device=fbank.device)
        masked = (at >= start[:, None]) & (at < end[:, None])  # (B, size)
        fbank = torch.where(masked.unsqueeze(3 - axis), config.mask_value, fbank)
    return fbank


def dequantise(stored: Tensor, num_frames: Tensor, scale: float, offset: float) -> Tensor:
    """Turn stored rows (R, T, F) into float32 log-mels; frames from num_frames (R,) on become silence."""
    fbank = (stored.float() * scale + offset).clamp(min=LOG_FLOOR)  # float16 rounds silence to below it
    return torch.where(_is_frame(num_frames, stored.shape[1]), fbank, LOG_FLOOR)


def pad_and_normalise(fbank: Tensor, num_frames: Tensor, spec: InputSpec) -> Tensor:
    """What evaluation and tagging do: pad with `pad_value` from num_frames (B,) on, then (x - mean) / std."""
    padded = torch.where(_is_frame(num_frames, fbank.shape[1]), fbank, spec.pad_value)
    return (padded - spec.mean) / spec.std


def augment(
    batch: StoredBatch, uniforms: Tensor, config: AugmentConfig, spec: InputSpec
) -> tuple[Tensor, Tensor]:
    """Turn a training batch as stored into model input (B, T, F) and soft targets (B, C).

    uniforms (B, NUM_UNIFORMS) in [0, 1) decides all that is random here but the noise's samples. A mixed clip
    keeps its own length: a longer partner is cut, a shorter one is silent behind its end.
    """
    stored, num_frames, targets, partner_row, lam, scale, offset = batch
    batch_size = len(partner_row)
    fbank = dequantise(stored, num_frames, scale, offset)
    num_frames = num_frames[:batch_size]
    mix = mixup_power if config.mixup_domain == "power" else mixup_linear
    mixed = mix(fbank[:batch_size], fbank[partner_row], lam)
    padded = torch.where(_is_frame(num_frames, stored.shape[1]), mixed, spec.pad_value)
    x = (mask_spans(padded, uniforms, config) - spec.mean) / spec.std
    if config.noise > 0:
        x = x + torch.rand_like(x) * (uniforms[:, 4] * config.noise).view(-1, 1, 1)
    if config.roll_frames > 0:
        shift = (uniforms[:, 5] * 2 * config.roll_frames).floor().long() - config.roll_frames
        source = (torch.arange(x.shape[1], device=x.device) - shift[:, None]) % x.shape[1]
        x = x.gather(1, source.unsqueeze(2).expand_as(x))
    return x, mix_targets(targets[:batch_size], targets[partner_row], lam)


def draw_uniforms(seed: int, epoch: int, step: int, global_batch: int) -> Tensor:
    """Draw the uniforms (global batch, NUM_UNIFORMS) of one step on the host, float32 in [0, 1)."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, step, 1])))
    return torch.from_numpy(rng.random((global_batch, NUM_UNIFORMS), dtype=np.float32))


def _is_frame(num_frames: Tensor, clip_frames: int) -> Tensor:
    """(B, T, 1): does a frame belong to its clip."""
    return (torch.arange(clip_frames, device=num_frames.device) < num_frames[:, None]).unsqueeze(2)
