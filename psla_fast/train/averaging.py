"""Averaging: running means of weights and scores, so that old checkpoints need not stay; the weights' EMA."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from psla_fast.checkpoint import Card, load_checkpoint


@dataclass(frozen=True)
class AverageConfig:
    """Which weights are averaged; PSLA's average is that of some epochs."""

    start: int = 41
    """First epoch whose weights are averaged."""
    end: int = 60
    """Last one."""
    ema_decay: float = 0.0
    """Beside it: decay of an exponential moving average over all updates, such as 0.999; 0: none."""
    batch_norm_clips: int = 0
    """Training clips, of draws beyond the last epoch's, over which BatchNorm's statistics of averaged weights
    are measured anew. 0: they are averaged like the weights, which is PSLA's."""
    upstream: bool = False
    """Count the first epoch of the average twice, as upstream's code does in training; to compare with it
    only."""

    def __post_init__(self) -> None:
        """Refuse an empty range and values out of range."""
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"wa.ema_decay is {self.ema_decay}; give 0 (none) or more, below 1.")
        if self.batch_norm_clips < 0:
            raise ValueError(f"wa.batch_norm_clips is {self.batch_norm_clips}; give 0 (none) or more.")
        if not 1 <= self.start <= self.end:
            raise ValueError(f"wa.start is {self.start}, wa.end {self.end}; give 1 ≤ start ≤ end.")


class RunningMean:
    """Running mean of named tensors: floating ones are averaged in float64, integers are those last added."""

    def __init__(self) -> None:
        """Start empty."""
        self.count = 0
        self._mean: dict[str, Tensor] = {}
        self._dtype: dict[str, torch.dtype] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in one more set of the same names and shapes; raises ValueError otherwise."""
        if self.count and tensors.keys() != self._mean.keys():
            different = sorted(tensors.keys() ^ self._mean.keys())
            raise ValueError(
                f"{len(different)} names differ between the sets to average, {different[0]} among them."
            )
        for name, tensor in tensors.items():
            value = tensor.detach().cpu()
            if self.count and value.shape != self._mean[name].shape:
                got, want = tuple(value.shape), tuple(self._mean[name].shape)
                raise ValueError(
                    f"{name} has shape {got} in one set and {want} in another; can't average them."
                )
            self._dtype[name] = value.dtype
            if not value.is_floating_point():
                self._mean[name] = value.clone()
            elif not self.count:
                self._mean[name] = value.to(torch.float64, copy=True)
            else:
                self._mean[name] += (value.double() - self._mean[name]) / (self.count + 1)
        self.count += 1

    def copy(self) -> "RunningMean":
        """Give a mean that goes on apart from this one."""
        other = RunningMean()
        other.count, other._dtype = self.count, dict(self._dtype)
        other._mean = {name: value.clone() for name, value in self._mean.items()}
        return other

    def mean(self) -> dict[str, Tensor]:
        """Give the mean in the tensors' own types; raises ValueError where nothing was added."""
        if not self.count:
            raise ValueError("nothing was averaged yet.")
        return {name: value.to(self._dtype[name]) for name, value in self._mean.items()}

    def state_dict(self) -> dict[str, object]:
        """Give what `load_state_dict` takes."""
        dtypes = {name: str(dtype).removeprefix("torch.") for name, dtype in self._dtype.items()}
        return {"count": self.count, "mean": dict(self._mean), "dtype": dtypes}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from a saved state."""
        self.count = int(state["count"])  # type: ignore[call-overload]
        self._mean = dict(state["mean"])  # type: ignore[call-overload]
        self._dtype = {name: getattr(torch, dtype) for name, dtype in state["dtype"].items()}  # type: ignore[attr-defined]


class Ema:
    """Exponential moving average of a model's state dict, updated on its device without waiting for it.

    Parameters and BatchNorm's statistics are averaged from the model's first state on; integers are copied.
    An update that was left out counts like one that changed nothing.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Take the model's state as it is; its tensors must keep their memory from now on."""
        self._decay = decay
        self._live = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self._mean = {name: tensor.clone() for name, tensor in self._live.items()}
        floating = [name for name, tensor in self._live.items() if tensor.is_floating_point()]
        others = sorted(self._live.keys() - set(floating))
        self._floats = [self._mean[name] for name in floating], [self._live[name] for name in floating]
        self._integers = [self._mean[name] for name in others], [self._live[name] for name in others]

    def update(self, number: int) -> None:
        """Take in the weights after the run's n-th update, from 1: mean = d·mean + (1-d)·weights.

        d = min(decay, (1 + n) / (10 + n)), so that the beginning is soon forgotten; as TensorFlow's
        ExponentialMovingAverage with num_updates.
        """
        decay = min(self._decay, (1 + number) / (10 + number))
        torch._foreach_lerp_(*self._floats, weight=1 - decay)
        if self._integers[0]:
            torch._foreach_copy_(*self._integers)

    def state_dict(self) -> dict[str, Tensor]:
        """Give the averages by the model's names."""
        return dict(self._mean)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved averages."""
        for name, tensor in self._mean.items():
            tensor.copy_(state[name])


def average_checkpoints(paths: Sequence[Path]) -> tuple[Card, dict[str, Tensor], int]:
    """Average checkpoints of one model: its card, the mean weights and the last epoch among them.

    Raises ValueError where they are of different models. One is in memory at a time.
    """
    if not paths:
        raise ValueError("no checkpoint given. Pass one or more.")
    mean, first, epoch = RunningMean(), load_checkpoint(paths[0]).card, 0
    for path in paths:
        epoch = max(epoch, add_checkpoint(mean, path, first, paths[0]))
    return first, mean.mean(), epoch


def add_checkpoint(mean: RunningMean, path: Path, card: Card, source: Path) -> int:
    """Add a checkpoint's weights to a mean of `source`'s model and its like; returns its epoch.

    Raises ValueError where it is of another model.
    """
    checkpoint = load_checkpoint(path)
    if _alike(checkpoint.card) != _alike(card):
        raise ValueError(f"{path} has other classes, input or layers than {source}; can't average them.")
    try:
        mean.add(checkpoint.state)
    except ValueError as error:
        raise ValueError(f"{path} is another model than {source}: {error}") from error
    return checkpoint.epoch


def _alike(card: Card) -> tuple[object, ...]:
    """What the models to average must share."""
    model = card.model
    layers = model.name, model.num_heads, model.same_padding, model.pooling, model.mask_padding
    return card.classes, card.input, card.fbank, layers
