"""Augment: batches as stored -> what the model sees, in one compiled function on the device.

The order, PSLA's own parts with a star: dequantise*, gain of clip and partner, mixup*, Freq-MixStyle,
FilterAugment, pad*, SpecAugment*, normalise*, noise*, roll*. What changes sound comes before padding and
masks, so these keep their values. What is random is drawn on the host from (seed, epoch, step) for the whole
global batch, so it doesn't depend on the number of ranks (Freq-MixStyle: where each has an even number of
clips), and a resume repeats it. The noise's samples alone are torch's, seeded by step and rank.
"""

# B clips, R rows of a slab, T frames, F mels, C classes

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

LOG_FLOOR = math.log(1.1920928955078125e-07)  # what silence has in an fbank
DB = math.log(10) / 10  # 1 dB in log-mel power
MOST_MASKS = 8  # of a kind
FEWEST_BANDS, MOST_BANDS, NARROWEST_BAND = 3, 6, 6.0  # of FilterAugment; the narrowest in mels

# Columns of a clip's uniforms: PSLA's, then the others. New ones go to the end, so that no value changes.
FREQ_MASKS = (0, *range(6, 20, 2))  # a mask takes two: width, start
TIME_MASKS = (2, *range(20, 34, 2))
NOISE, ROLL, NUM_PSLA_UNIFORMS = 4, 5, 6
GAIN, PARTNER_GAIN = 34, 35
STYLE = 36  # is it mixed, and two for λ
FILTER = 39  # number of bands, their widths, the gains at their ends
NUM_UNIFORMS = FILTER + 1 + MOST_BANDS + MOST_BANDS + 1


@dataclass(frozen=True)
class AugmentConfig:
    """Device-side augmentation; the defaults are PSLA's."""

    gain_db: float = 0.0
    """Each clip is made louder or softer by up to this many dB, its partner by a gain of its own, before they
    are mixed; PaSST: 7."""
    mixup_domain: Literal["power", "linear"] = "power"
    """power: log(λ²e^a + (1-λ)²e^b), what mixing waveforms gives on average; linear: λa + (1-λ)b of
    log-mels."""
    freq_mask_bins: int = 48
    """SpecAugment: a frequency mask's width is uniform in [0, this)."""
    num_freq_masks: int = 1
    """Frequency masks a clip, 1 to 8; they may overlap."""
    time_mask_frames: int = 192
    """SpecAugment: a time mask's width is uniform in [0, this)."""
    num_time_masks: int = 1
    """Time masks a clip, 1 to 8; they may overlap."""
    time_mask_fraction: float = 1.0
    """A time mask's limit is at most this fraction of the batch's frames (SpecAugment's p); matters where
    batches are short."""
    mask_value: float | Literal["mean"] = 0.0
    """Masks are filled with this log-mel, before normalising; mean: the one that normalises to 0."""
    freq_mixstyle: float = 0.0
    """Freq-MixStyle: the probability that a clip takes on part of its neighbour's mean and deviation over
    time, mel by mel; Schmid et al. 2022: 0.4."""
    freq_mixstyle_alpha: float = 0.3
    """The clip's own part in that is drawn from Beta(this, this)."""
    filter_augment_db: float = 0.0
    """FilterAugment: mels are made louder or softer by up to this many dB, changing linearly within 3 to 6
    bands of random width; Nam et al. 2022: 6."""
    noise: float = 0.0
    """Uniform noise of an amplitude drawn from [0, this) is added after normalising; PSLA's option: 0.1."""
    roll_frames: int = 0
    """The clip is rolled in time by -this … this-1 frames; PSLA's option: 10."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        decibels, sizes = ("gain_db", "filter_augment_db"), ("freq_mask_bins", "time_mask_frames")
        for name in (*decibels, *sizes, "noise", "roll_frames"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"augment.{name} is {getattr(self, name)}; give 0 or more.")
        for name, size in zip(("num_freq_masks", "num_time_masks"), sizes, strict=True):
            if not 1 <= getattr(self, name) <= MOST_MASKS:
                raise ValueError(
                    f"augment.{name} is {getattr(self, name)}; give 1 to {MOST_MASKS}, or augment.{size} 0 "
                    "for none."
                )
        if not 0 < self.time_mask_fraction <= 1:
            raise ValueError(
                f"augment.time_mask_fraction is {self.time_mask_fraction}; give a fraction above 0, up to 1."
            )
        if not 0 <= self.freq_mixstyle <= 1:
            raise ValueError(f"augment.freq_mixstyle is {self.freq_mixstyle}; give a probability, 0 to 1.")
        if not 0 < self.freq_mixstyle_alpha < math.inf:
            raise ValueError(
                f"augment.freq_mixstyle_alpha is {self.freq_mixstyle_alpha}; give a number above 0."
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


def amplify(fbank: Tensor, gain_db: Tensor) -> Tensor:
    """Make log-mels louder by gain_db: an addition, as both are logarithms of power.

    fbank (B, T, F) log-mel power, unnormalised; gain_db broadcasts to it. As with waveforms, what lies at
    LOG_FLOOR (silence) stays there, and nothing falls below it.
    """
    return torch.where(fbank > LOG_FLOOR, (fbank + gain_db * DB).clamp(min=LOG_FLOOR), LOG_FLOOR)


def freq_mixstyle(fbank: Tensor, num_frames: Tensor, lam: Tensor) -> Tensor:
    """Freq-MixStyle: a clip's mean and deviation over time, mel by mel, become λ·own + (1-λ)·its neighbour's.

    Clips 2k and 2k+1 are neighbours: a random pair, as batches are random draws, and one that stays together
    on any number of ranks that have an even number of clips each. A last clip without a neighbour, and one
    whose neighbour has no frames, keeps its style. fbank (B, T, F) log-mel, unnormalised; frames before
    num_frames (B,) count, those behind come out meaningless; lam (B,) in [0, 1]. Returns (B, T, F), never
    below LOG_FLOOR. Kim et al. 2022; Schmid et al. 2022 (DCASE).
    """
    is_frame, count = _is_frame(num_frames, fbank.shape[1]), num_frames.clamp(min=1).view(-1, 1, 1)
    mean = torch.where(is_frame, fbank, 0.0).sum(dim=1, keepdim=True) / count
    centred = fbank - mean
    std = (torch.where(is_frame, centred.square(), 0.0).sum(dim=1, keepdim=True) / count + 1e-6).sqrt()
    clip = torch.arange(len(fbank), device=fbank.device)
    neighbour = torch.where((clip ^ 1) < len(fbank), clip ^ 1, clip)
    part = torch.where(num_frames[neighbour] > 0, 1 - lam, 0.0).view(-1, 1, 1)
    change = mean[neighbour] - mean + centred * (std[neighbour] / std - 1)
    return (fbank + part * change).clamp(min=LOG_FLOOR)


def symmetric_beta(uniforms: Tensor, alpha: float) -> Tensor:
    """Turn two uniforms (B, 2) in [0, 1) into a draw (B,) in [0, 1] from Beta(α, α), exactly, for any α > 0.

    By Bailey's Student t of 2α degrees (Devroye, "Random variate generation in one line of code", 1996).
    """
    power, cosine = uniforms[:, 0] ** (1 / alpha), torch.cos(2 * math.pi * uniforms[:, 1])
    t = cosine * (1 - power).sqrt()
    return 0.5 + 0.5 * t / (power + t.square()).clamp(min=1e-30).sqrt()


def compute_filter_db(uniforms: Tensor, num_mels: int, limit_db: float) -> Tensor:
    """Gains (B, F) in dB of FilterAugment's linear filters, one a clip: Nam et al., ICASSP 2022.

    uniforms (B, 2 + 2·MOST_BANDS) in [0, 1): the number of bands; their widths, at least NARROWEST_BAND mels
    where there are enough, the rest divided at random; the gains at the bands' ends, uniform within ±limit_db
    and linear between them.
    """
    num_bands = FEWEST_BANDS + (uniforms[:, :1] * (MOST_BANDS - FEWEST_BANDS + 1)).floor()
    is_used = torch.arange(MOST_BANDS, device=uniforms.device) < num_bands
    # shares of exponentials divide a line as sorted uniforms do
    shares = torch.where(is_used, 1e-6 - torch.log1p(-uniforms[:, 1 : 1 + MOST_BANDS]), 0.0)
    shares = shares / shares.sum(dim=1, keepdim=True)
    narrowest = min(NARROWEST_BAND, (num_mels - 1) / MOST_BANDS)
    width = narrowest + shares * (num_mels - 1 - num_bands * narrowest)
    width = torch.where(is_used, width.clamp(min=1e-6), num_mels)  # one not used begins at the last bin
    start = width.cumsum(dim=1) - width
    bins = torch.arange(num_mels, device=uniforms.device)
    passed = ((bins - start.unsqueeze(2)) / width.unsqueeze(2)).clamp(0, 1)  # (B, MOST_BANDS, F)
    gains = (2 * uniforms[:, 1 + MOST_BANDS :] - 1) * limit_db
    return gains[:, :1] + (gains.diff(dim=1).unsqueeze(2) * passed).sum(dim=1)


def mask_spans(fbank: Tensor, uniforms: Tensor, config: AugmentConfig) -> Tensor:
    """SpecAugment: frequency and time masks, drawn as torchaudio does.

    fbank (B, T, F), filled with `mask_value`, which must be a number here; uniforms (B, NUM_UNIFORMS) in
    [0, 1), of which one mask of each kind needs the first four: a width is ⌊u·limit⌋, so always below its
    limit, and its start ⌊u·(size - u·limit)⌋. A limit above the axis is cut to it, that of time to
    ⌊`time_mask_fraction`·T⌋.
    """
    _, num_frames, num_mels = fbank.shape
    most_frames = math.floor(config.time_mask_fraction * num_frames)
    for axis, size, limit, columns in (
        (2, num_mels, config.freq_mask_bins, FREQ_MASKS[: config.num_freq_masks]),
        (1, num_frames, min(config.time_mask_frames, most_frames), TIME_MASKS[: config.num_time_masks]),
    ):
        for column in columns if limit else ():
            span = uniforms[:, column] * min(limit, size)
            start = (uniforms[:, column + 1] * (size - span)).floor()
            end = start + span.floor()
            at = torch.arange(size, device=fbank.device)
            masked = (at >= start[:, None]) & (at < end[:, None])  # (B, size)
            fbank = torch.where(masked.unsqueeze(3 - axis), float(config.mask_value), fbank)
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

    uniforms (B, NUM_UNIFORMS) in [0, 1) decides all that is random here but the noise's samples. A mask_value
    of "mean" is to be replaced by spec.mean before (fill_masks). A mixed clip
    keeps its own length: a longer partner is cut, a shorter one is silent behind its end.
    """
    stored, num_frames, targets, partner_row, lam, scale, offset = batch
    batch_size = len(partner_row)
    fbank = dequantise(stored, num_frames, scale, offset)
    num_frames = num_frames[:batch_size]
    clips, partners = fbank[:batch_size], fbank[partner_row]
    if config.gain_db > 0:
        gains = ((2 * uniforms - 1) * config.gain_db)[:, :, None, None]
        clips, partners = amplify(clips, gains[:, GAIN]), amplify(partners, gains[:, PARTNER_GAIN])
    mix = mixup_power if config.mixup_domain == "power" else mixup_linear
    mixed = mix(clips, partners, lam)
    if config.freq_mixstyle > 0:
        style_lam = symmetric_beta(uniforms[:, STYLE + 1 : STYLE + 3], config.freq_mixstyle_alpha)
        style_lam = torch.where(uniforms[:, STYLE] < config.freq_mixstyle, style_lam, 1.0)
        mixed = freq_mixstyle(mixed, num_frames, style_lam)
    if config.filter_augment_db > 0:
        filter_db = compute_filter_db(uniforms[:, FILTER:], mixed.shape[2], config.filter_augment_db)
        mixed = amplify(mixed, filter_db.unsqueeze(1))
    padded = torch.where(_is_frame(num_frames, stored.shape[1]), mixed, spec.pad_value)
    x = (mask_spans(padded, uniforms, config) - spec.mean) / spec.std
    if config.noise > 0:
        x = x + torch.rand_like(x) * (uniforms[:, NOISE] * config.noise).view(-1, 1, 1)
    if config.roll_frames > 0:
        shift = (uniforms[:, ROLL] * 2 * config.roll_frames).floor().long() - config.roll_frames
        source = (torch.arange(x.shape[1], device=x.device) - shift[:, None]) % x.shape[1]
        x = x.gather(1, source.unsqueeze(2).expand_as(x))
    return x, mix_targets(targets[:batch_size], targets[partner_row], lam)


def fill_masks(config: AugmentConfig, spec: InputSpec) -> AugmentConfig:
    """Put the number in for a mask_value of "mean"."""
    return replace(config, mask_value=spec.mean) if config.mask_value == "mean" else config


def draw_uniforms(seed: int, epoch: int, step: int, global_batch: int) -> Tensor:
    """Draw the uniforms (global batch, NUM_UNIFORMS) of one step on the host, float32 in [0, 1)."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, step, 1])))
    first = rng.random((global_batch, NUM_PSLA_UNIFORMS), dtype=np.float32)
    more = rng.random((NUM_UNIFORMS - NUM_PSLA_UNIFORMS, global_batch), dtype=np.float32)
    return torch.from_numpy(np.concatenate([first, more.T], axis=1))


def _is_frame(num_frames: Tensor, clip_frames: int) -> Tensor:
    """(B, T, 1): does a frame belong to its clip."""
    return (torch.arange(clip_frames, device=num_frames.device) < num_frames[:, None]).unsqueeze(2)
