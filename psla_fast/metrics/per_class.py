"""Per class: scores and targets -> each class's average precision, ROC-AUC and middle of its curve.

A class needs one sort of its scores, and a search of its positives' scores in that: no ranks are followed
back to clips. Classes are taken some at a time, in as many threads as torch uses: NumPy sorts without holding
Python's lock.
"""

# N clips, C classes, P positives of a class

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from psla_fast.metrics.inputs import (
    FloatArray,
    Values,
    as_array,
    as_tensor,
    check_shapes,
    is_on_device,
    refuse_scores,
    refuse_targets,
)
from psla_fast.metrics.on_device import measure_on_device
from psla_fast.metrics.threads import map_in_threads

CLASSES_A_PIECE = 16  # a cache line of float32


@dataclass(frozen=True)
class ClassFigures:
    """What is measured of each class, arrays (C,); NaN for a class that has no positives.

    The AUC is NaN for a class without negatives, too. middle_precision and middle_recall are PSLA's: at index
    L // 2 of scikit-learn's precision_recall_curve of length L.
    """

    num_positive: npt.NDArray[np.int64]
    average_precision: FloatArray
    roc_auc: FloatArray
    middle_precision: FloatArray
    middle_recall: FloatArray


def measure_classes(scores: Values, targets: Values) -> ClassFigures:
    """Measure each class of scores (N, C), finite, against targets (N, C) of 0 and 1.

    A tensor on a GPU stays there. Beside its arguments it holds some 16 classes' scores a thread. Raises
    ValueError for other shapes or values.
    """
    if is_on_device(scores):
        assert isinstance(scores, torch.Tensor)
        columns = measure_on_device(scores.detach(), as_tensor(targets, scores.device))
    else:
        columns = _measure_arrays(as_array(scores), as_array(targets))
    num_positive, *others = columns
    return ClassFigures(num_positive.astype(np.int64), *others)


def _measure_arrays(scores: npt.NDArray[Any], targets: npt.NDArray[Any]) -> FloatArray:
    check_shapes(scores.shape, targets.shape)
    starts = range(0, scores.shape[1], CLASSES_A_PIECE)

    def measure(start: int) -> list[tuple[float, ...]]:
        piece = slice(start, start + CLASSES_A_PIECE)
        return _measure_piece(scores[:, piece], targets[:, piece])

    try:
        rows = [row for found in map_in_threads(measure, starts, scores.size) for row in found]
    except _NotFinite:
        refuse_scores(scores)
    except _NotHard:
        refuse_targets(targets)
    return np.array(rows, np.float64).reshape(-1, 5).T


class _NotFinite(Exception):
    """A piece holds a score that can't be ranked."""


class _NotHard(Exception):
    """A piece holds a target other than 0 and 1."""


def _measure_piece(scores: npt.NDArray[Any], targets: npt.NDArray[Any]) -> list[tuple[float, ...]]:
    """Measure some classes: a row of figures each."""
    is_positive = targets if targets.dtype == np.bool_ else targets != 0
    if is_positive is not targets and (is_positive != targets).any():
        raise _NotHard
    by_class, positive = np.ascontiguousarray(scores.T), np.ascontiguousarray(is_positive.T)
    if by_class.dtype not in (np.float32, np.float64):
        by_class = by_class.astype(np.float32 if by_class.dtype == np.float16 else np.float64)
    rows = []
    for values, mask in zip(by_class, positive, strict=True):
        ranked = np.sort(values)  # NaN comes last
        if len(ranked) and not (np.isfinite(ranked[0]) and np.isfinite(ranked[-1])):
            raise _NotFinite
        rows.append(_measure_class(ranked, np.sort(values[mask])))
    return rows


def _measure_class(ranked: npt.NDArray[Any], positive: npt.NDArray[Any]) -> tuple[float, ...]:
    """Figures of a class from all its scores (N,) and its positives' (P,), both rising."""
    num_clips, num_positive = len(ranked), len(positive)
    if not num_positive:
        return (0.0, np.nan, np.nan, np.nan, np.nan)
    below, up_to = ranked.searchsorted(positive), ranked.searchsorted(positive, "right")
    found = num_positive - positive.searchsorted(positive)  # positives that score at least as much
    precision = float((found / (num_clips - below)).mean())
    auc = np.nan
    if (
        num_positive < num_clips
    ):  # Mann-Whitney's U from the mid-ranks, of which each is (below + up_to + 1) / 2
        wins = 0.5 * (float(below.sum()) + float(up_to.sum()) - float(num_positive) ** 2)
        auc = wins / (float(num_positive) * (num_clips - num_positive))
    return (num_positive, precision, auc, *_middle_of_curve(ranked, positive))


def _middle_of_curve(ranked: npt.NDArray[Any], positive: npt.NDArray[Any]) -> tuple[float, float]:
    """Precision and recall in the middle of the curve, which has a point a distinct score, and (1, 0)."""
    others = np.flatnonzero(ranked[1:] != ranked[:-1])  # where each but the last distinct score ends
    middle = (len(others) + 2) // 2
    if middle > len(others):
        return 1.0, 0.0
    start = int(others[middle - 1]) + 1
    found = len(positive) - int(positive.searchsorted(ranked[start]))
    return found / (len(ranked) - start), found / len(positive)
