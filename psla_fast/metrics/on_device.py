"""On the device: scores and targets that lie on a GPU -> each class's figures; only those leave it."""

# N clips, C classes, K classes of a piece

import torch
from torch import Tensor
from torch.nn import functional

from psla_fast.metrics.inputs import FloatArray, as_checked_tensors, check_shapes

VALUES_A_PIECE = 2**24


def measure_on_device(scores: Tensor, targets: Tensor) -> FloatArray:
    """Give (5, C): number of positives, AP, AUC, precision and recall at the middle of the curve.

    scores (N, C), targets (N, C) on one device; counts are integers and sums float64, so that the figures
    equal those of arrays to 1e-9. Holds about 60 bytes a value of 16.8 M values at once. Raises ValueError as
    measure_classes does.
    """
    check_shapes(scores.shape, targets.shape)
    score, is_positive = as_checked_tensors(scores, targets)
    num_clips, num_classes = score.shape
    if not num_clips or not num_classes:
        empty = torch.full((5, num_classes), torch.nan, dtype=torch.float64)
        empty[0] = 0
        return empty.numpy()
    step = max(1, VALUES_A_PIECE // num_clips)
    pieces = [
        _measure_piece(score[:, start : start + step].T, is_positive[:, start : start + step].T)
        for start in range(0, num_classes, step)
    ]
    return torch.cat(pieces, dim=1).cpu().numpy()


def _measure_piece(scores: Tensor, is_positive: Tensor) -> Tensor:
    """Measure scores (K, N) against is_positive (K, N): (5, K) float64."""
    ranked, order = torch.sort(scores.contiguous(), dim=1)
    hit = is_positive.gather(1, order)
    below = torch.searchsorted(ranked, ranked)  # clips that score less, of each rank
    up_to = torch.searchsorted(ranked, ranked, right=True)
    num_clips, num_positive = ranked.shape[1], hit.sum(1)
    found = num_positive[:, None] - functional.pad(hit.cumsum(1), (1, 0))  # positives from each rank on
    at_least = found.gather(1, below)
    precision = torch.where(hit, at_least.double() / (num_clips - below), 0.0).sum(1) / num_positive
    mid_ranks = torch.where(hit, below + up_to, 0).sum(1).double()
    positives = num_positive.double()
    auc = 0.5 * (mid_ranks - positives**2) / (positives * (num_clips - positives))
    middle_precision, middle_recall = _middle_of_curve(below, found)
    with_positives = num_positive > 0
    nan = torch.full_like(precision, torch.nan)
    figures = [precision, auc, middle_precision, middle_recall]
    return torch.stack([positives, *(torch.where(with_positives, figure, nan) for figure in figures)])


def _middle_of_curve(below: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall (K,) in the middle of each curve; below (K, N), found (K, N + 1)."""
    num_clips = below.shape[1]
    starts = below == torch.arange(num_clips, device=below.device)  # of each distinct score
    count = starts.cumsum(1)
    middle = (count[:, -1] + 1) // 2
    closing = middle == count[:, -1]  # the curve's last point, (1, 0), which is no score's
    start = torch.searchsorted(count, (middle + 1)[:, None]).clamp(max=num_clips - 1)
    hits = found.gather(1, start)[:, 0].double()
    precision = torch.where(closing, 1.0, hits / (num_clips - start[:, 0]))
    return precision, torch.where(closing, 0.0, hits / found[:, 0])
