"""Probing: how many time steps a network makes of frames, and whether it takes an input, before a run."""

# B clips, T frames, F mels, D feature channels, F' × T' positions of the features, C classes

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

LONG = 1344  # frames; a multiple of every usual stride: powers of 2, times 3, times 7
CHECKED = (1009, 555)
MOST = 1.5  # heads' weights are learnt and can sum to more than 1
FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, ArithmeticError, LookupError, AttributeError)


class TimeGrid(NamedTuple):
    """How many time steps a backbone makes of T frames: T' = ⌊(T + rounding) / stride⌋."""

    stride: int
    rounding: int

    def count_steps(self, num_frames: int) -> int:
        """Time steps T' of T frames."""
        return (num_frames + self.rounding) // self.stride


class _Extractor(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, picture: Tensor) -> Tensor:
        maps: Tensor = self.backbone.extract_features(picture)  # type: ignore[operator]
        return maps


class Shapes:
    """The maps of `backbone.extract_features`, (B, 1, F, T) -> (B, D, F', T'), as shapes alone.

    Nothing is computed: parameters stand in by their shapes, on torch's meta device. What a network raises
    there it may raise on data, too.
    """

    def __init__(self, backbone: nn.Module, num_mels: int) -> None:
        """Take a backbone, whose mode and parameters stay as they are, and F."""
        self._extractor, self._num_mels = _Extractor(backbone), num_mels
        tensors = (*self._extractor.named_parameters(), *self._extractor.named_buffers())
        self._stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}

    def maps(self, num_frames: int) -> Tensor:
        """Maps (1, D, F', T') of T frames, without values."""
        picture = torch.empty(1, 1, self._num_mels, num_frames, device="meta")
        with _as_in_scoring(self._extractor):
            maps: Tensor = functional_call(self._extractor, self._stand_ins, (picture,))
        return maps

    def find_unused(self, num_frames: int) -> list[nn.Parameter]:
        """Parameters of the backbone that have no part in its maps of T frames."""
        picture = torch.empty(1, 1, self._num_mels, num_frames, device="meta")
        parameters = dict(self._extractor.named_parameters())
        leaves = {name: self._stand_ins[name].requires_grad_() for name in parameters}
        with _as_in_scoring(self._extractor), torch.enable_grad():
            maps = functional_call(self._extractor, self._stand_ins, (picture,))
            gradients = torch.autograd.grad(maps.sum(), list(leaves.values()), allow_unused=True)
        return [parameters[name] for name, grad in zip(leaves, gradients, strict=True) if grad is None]


def probe_time_grid(backbone: nn.Module, num_mels: int) -> TimeGrid:
    """Find the grid of `backbone.extract_features`, (B, 1, F, T) -> (B, D, F', T'), from shapes alone.

    Raises ValueError where T' is no such formula of T, or shapes can't be had that way.
    """
    shapes = Shapes(backbone, num_mels)
    try:
        grid = _find_grid(lambda num_frames: shapes.maps(num_frames).shape[3])
    except FAILURES as error:
        reason = first_line(error)
        raise ValueError(f"the network's time steps can't be counted ({reason}).") from error
    if not grid:
        raise ValueError("the network's time steps aren't evenly spaced over a clip's frames.")
    return grid


def _find_grid(count: Callable[[int], int]) -> TimeGrid | None:
    """Find what T' = count(T) is as a formula; None where it is none."""
    steps = count(LONG)
    added = count(2 * LONG) - steps
    if added < 1 or LONG % added:
        return None
    stride = LONG // added
    low, high = 0, stride  # so many frames more give no step more, or one
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if count(LONG + middle) > steps else (middle, high)
    grid = TimeGrid(stride, (steps + 1) * stride - LONG - high)
    return grid if all(count(frames) == grid.count_steps(frames) for frames in CHECKED) else None


def check_input(model: nn.Module, num_mels: int, frames: Sequence[int], num_classes: int) -> None:
    """Raise ValueError where a model can't score clips of F mels and each of these numbers of frames.

    It scores a clip of zeros (1, T, F) each, on the device of its parameters: it must take that size and give
    (1, C) finite scores from 0 to 1, a little above for the sum of several heads. Nothing of the model
    changes, nor what torch draws next.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    with _as_in_scoring(model):
        for num_frames in frames:
            clip = f"a clip of {num_frames} frames × {num_mels} mels"
            fbank = torch.zeros(1, num_frames, num_mels, device=device)
            lengths = (torch.tensor([num_frames], device=device),)
            try:
                scores = model(fbank, *(lengths if getattr(model, "mask_padding", False) else ()))
            except FAILURES as error:
                if "memory" in str(error):  # its own line at the command line
                    raise
                raise ValueError(
                    f"the network can't score {clip} ({first_line(error)}). Set --input.clip-frames or "
                    "--stream.buckets to what it takes, or pack with another --fbank.num-mels."
                ) from error
            _check_scores(scores, num_classes, clip)


def _check_scores(scores: object, num_classes: int, clip: str) -> None:
    if not isinstance(scores, Tensor) or scores.shape != (1, num_classes):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise ValueError(
            f"the network makes {got} of {clip}; return scores (1, {num_classes}) of its clips and classes."
        )
    low, high = scores.min().item(), scores.max().item()
    if not 0 <= low <= high <= MOST:  # of NaN nothing is true
        raise ValueError(
            f"the network scores {clip} from {low:.3g} to {high:.3g}; scores go from 0 to 1. Let it end in "
            "a sigmoid."
        )


@contextlib.contextmanager
def _as_in_scoring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode and torch's generators are put back."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({t.get_device() for t in model.parameters() if t.is_cuda})
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def first_line(error: BaseException) -> str:
    """Give the start of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150].rstrip(".")
