"""Averaging: running means of weights and of scores, so that old checkpoints need not stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from psla_fast.checkpoint import Card, load_checkpoint


@dataclass(frozen=True)
class AverageConfig:
    """Which epochs' weights are averaged, both included."""

    start: int = 41
    """First epoch whose weights are averaged."""
    end: int = 60
    """Last one."""

    def __post_init__(self) -> None:
        """Refuse an empty range."""
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


def average_checkpoints(paths: Sequence[Path]) -> tuple[Card, dict[str, Tensor], int]:
    """Average checkpoints of one model: its card, the mean weights and the last epoch among them.

    Raises ValueError where they are of different models. One is in memory at a time.
    """
    if not paths:
        raise ValueError("no checkpoint given. Pass two or more.")
    mean = RunningMean()
    first: Card | None = None
    epoch = 0
    for path in paths:
        checkpoint = load_checkpoint(path)
        if first is None:
            first = checkpoint.card
        elif _alike(checkpoint.card) != _alike(first):
            raise ValueError(
                f"{path} has other classes, input or layers than {paths[0]}; can't average them."
            )
        try:
            mean.add(checkpoint.state)
        except ValueError as error:
            raise ValueError(f"{path} is another model than {paths[0]}: {error}") from error
        epoch = max(epoch, checkpoint.epoch)
    assert first is not None
    return first, mean.mean(), epoch


def _alike(card: Card) -> tuple[object, ...]:
    """What the models to average must share."""
    model = card.model
    return card.classes, card.input, card.fbank, model.name, model.num_heads, model.same_padding
