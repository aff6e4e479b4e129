"""Check: an exported model against its checkpoint, on sounds made for it: how far are the scores apart?"""

# B clips, S samples, T frames, F mels, C classes

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from psla_fast.augment import InputSpec, pad_and_normalise
from psla_fast.checkpoint import Card, Checkpoint
from psla_fast.fbank import FbankConfig, compute_fbank

Run = Callable[..., Tensor]  # the inputs of a file, in their order -> scores (B, C)
BATCHES = ((1, 0.01), (3, 0.4), (2, 1.0), (1, 1.3))  # clips, and their length in clips of training


class Difference(NamedTuple):
    """Between two models' scores of all classes and clips: the largest, and the mean."""

    largest: float
    mean: float


def compare(run: Run, checkpoint: Checkpoint, with_fbank: bool) -> Difference:
    """Score clips of several lengths, also shorter than a window, by a file's model and by its checkpoint.

    With `with_fbank` the file's model is given waveforms, else log-mels as shards hold them.
    """
    model, card = checkpoint.build(), checkpoint.card
    differences = []
    for waveform in make_waveforms(card):
        fbank = compute_exactly(waveform, card.fbank)
        num_frames = torch.full((len(fbank),), fbank.shape[1])
        inputs: tuple[Tensor, ...] = (waveform,) if with_fbank else (fbank,)
        if getattr(model, "mask_padding", False) and not with_fbank:
            num_frames -= torch.arange(len(fbank)) * fbank.shape[1] // 4  # some end earlier
            inputs = (fbank, num_frames)
        differences.append((run(*inputs) - score_padded(model, fbank, num_frames, card.input)).abs())
    values = torch.cat([difference.flatten() for difference in differences])
    return Difference(values.max().item(), values.mean().item())


def compute_exactly(waveform: Tensor, config: FbankConfig) -> Tensor:
    """Compute log-mels (B, T, F) of waveforms (B, S), their mean removed, in float64; float32 comes out."""
    exact = waveform.double()
    return compute_fbank(exact - exact.mean(dim=1, keepdim=True), config).float()


@torch.inference_mode()
def score_padded(model: nn.Module, fbank: Tensor, num_frames: Tensor, spec: InputSpec) -> Tensor:
    """Score log-mels (B, T, F) as evaluation does, padded to the clip length or a bucket: (B, C).

    What is longer than a clip isn't cut, other than in evaluation.
    """
    missing = max(0, find_length(fbank.shape[1], spec) - fbank.shape[1])
    padded = functional.pad(fbank, (0, 0, 0, missing))
    lengths = (num_frames,) if getattr(model, "mask_padding", False) else ()
    scores: Tensor = model(pad_and_normalise(padded, num_frames, spec), *lengths)
    return scores.float()


def find_length(num_frames: int, spec: InputSpec) -> int:
    """Find the frames that evaluation gives a clip: the smallest bucket that holds it, else the last."""
    lengths = spec.buckets or (spec.clip_frames,)
    return next((length for length in lengths if length >= num_frames), lengths[-1])


def make_waveforms(card: Card) -> Iterator[Tensor]:
    """Make batches (B, S) of glides over a noise that swells, each clip in its own range; always the same."""
    generator = torch.Generator().manual_seed(0)
    clip_samples = _clip_samples(card.fbank, card.input.clip_frames)
    for num_clips, part in BATCHES:
        num_samples = max(1, int(part * clip_samples))
        seconds = torch.arange(num_samples) / card.fbank.sample_rate
        low, high = 10 ** (2 + 1.5 * torch.rand(2, num_clips, 1, generator=generator))  # 100 to 3,000 Hz
        turns = low * seconds + (high - low) * seconds.square() / (2 * seconds[-1].clamp(min=1e-3))
        noise = torch.randn(num_clips, num_samples, generator=generator)
        swell = 10 ** (-3 * torch.rand(num_clips, 1, generator=generator)) * seconds / clip_samples
        yield 0.3 * torch.sin(2 * torch.pi * turns) + swell * card.fbank.sample_rate * noise


def _clip_samples(config: FbankConfig, num_frames: int) -> int:
    return (num_frames - 1) * config.shift_samples + config.window_samples
