"""Scorer: windows -> scores and activities, a batch at a time, on the device, as evaluation computes them."""

# B windows, T frames, F mels, C classes, T' time steps

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from psla_fast.allocator import keep_freed_memory
from psla_fast.augment import LOG_FLOOR, pad_and_normalise
from psla_fast.checkpoint import Card, Checkpoint
from psla_fast.distributed import DeviceName
from psla_fast.evaluate import Precision, autocast, resolve_precision
from psla_fast.models import TimeGrid, use_channels_last
from psla_fast.tagger.folding import fold_batch_norms
from psla_fast.tagger.windows import Cut, Window

EXAMPLE_FRAMES = 128  # on which BatchNorms are found; enough for any EfficientNet


class Scored(NamedTuple):
    """A window's scores (C,) and, by choice, activity (C, T'); float32, on the CPU."""

    scores: Tensor
    activity: Tensor | None


class Scorer:
    """A checkpoint's model in eval mode on a device, ready for windows of any shapes."""

    def __init__(self, checkpoint: Checkpoint, device: DeviceName, precision: Precision) -> None:
        """Build the model; ValueError where it can't be, or there is no such device."""
        self.card: Card = checkpoint.card
        self.device = _choose_device(device)
        self.precision = resolve_precision(precision, self.device)
        # in bf16, folded weights round otherwise than evaluation's, for a gain of 9 % alone
        fold = self.precision == "fp32"
        self.model = (_build_folded(checkpoint) if fold else checkpoint.build()).to(self.device)
        use_channels_last(self.model)
        self._grid = _find_grid(self.model)

    @property
    def grid(self) -> TimeGrid:
        """Time steps of the activity; one a frame where the model has no even ones."""
        return self._grid or TimeGrid(1, 0)

    @property
    def step_frames(self) -> int:
        """Frames of a time step of the activity; 1 where the model has no even ones."""
        return self.grid.stride

    def check_activity(self) -> None:
        """Raise ValueError where the model gives no activity over time."""
        if not hasattr(self.model, "forward_with_activity") or self._grid is None:
            raise ValueError(
                f"model {self.card.model.name!r} gives no activity over time. Give it time_grid and "
                "forward_with_activity(fbank, num_frames) as TaggerNet has them, or use one of those models."
            )

    def score(self, windows: Sequence[Window], cut: Cut, with_activity: bool = False) -> list[Scored]:
        """Score windows; those padded to the same length are one batch."""
        scored: list[Scored | None] = [None] * len(windows)
        by_shape: dict[int, list[int]] = {}
        for number, window in enumerate(windows):
            by_shape.setdefault(cut.shape(len(window.fbank)), []).append(number)
        for shape, numbers in by_shape.items():
            batch = self._score_batch([windows[number].fbank for number in numbers], shape, with_activity)
            for number, result in zip(numbers, batch, strict=True):
                scored[number] = result
        return [result for result in scored if result is not None]

    def _score_batch(self, fbanks: Sequence[Tensor], shape: int, with_activity: bool) -> list[Scored]:
        padded = torch.full((len(fbanks), shape, fbanks[0].shape[1]), LOG_FLOOR)
        for row, fbank in zip(padded, fbanks, strict=True):
            row[: len(fbank)] = fbank
        counts = [len(fbank) for fbank in fbanks]
        num_frames = torch.tensor(counts, device=self.device)
        lengths = (num_frames,) if getattr(self.model, "mask_padding", False) else ()
        with torch.inference_mode(), autocast(self.precision, self.device):
            x = pad_and_normalise(padded.to(self.device), num_frames, self.card.input)
            if not with_activity:
                return [Scored(scores, None) for scores in self.model(x, *lengths).float().cpu()]
            network: Any = self.model
            scores, activity = (part.float().cpu() for part in network.forward_with_activity(x, *lengths))
        steps = [
            -(-count // self.step_frames) for count in counts
        ]  # begun; the last may be the next window's
        return [
            Scored(row, course[:, :num_steps])
            for row, course, num_steps in zip(scores, activity, steps, strict=True)
        ]


def _find_grid(model: nn.Module) -> TimeGrid | None:
    """Ask a model for its time steps; None where it tells nothing, or has none that are evenly spaced."""
    try:
        grid: Any = getattr(model, "time_grid", None)
    except ValueError:
        return None
    return None if grid is None else TimeGrid(*grid)


def _choose_device(name: DeviceName) -> torch.device:
    """Choose a device for this process alone, also where torchrun started it."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no CUDA device. Use --device cpu.")
    if name == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _build_folded(checkpoint: Checkpoint) -> nn.Module:
    """Build the model, its BatchNorms folded where that can be."""
    card = checkpoint.card
    num_frames = max(card.input.buckets or (card.input.clip_frames,))
    if card.model.name.startswith("efficientnet"):
        num_frames = EXAMPLE_FRAMES
    example = torch.zeros(1, num_frames, card.input.num_mels)
    example[:, ::3, ::5] = 1.0  # not the same everywhere
    return fold_batch_norms(checkpoint.build(), example)
