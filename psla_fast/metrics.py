"""Metrics: scores and targets -> average precision, ROC-AUC, d-prime; pure functions of (N, C) arrays.

One sort per class serves every metric; ties are handled as scikit-learn does (equal to it to 1e-9).
"""

# N clips, C classes

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metrics:
    """Means over the num_classes classes with positives (AUC: and negatives); num_skipped are left out."""

    mean_ap: float
    mean_auc: float
    mean_precision: float
    mean_recall: float
    d_prime: float
    num_classes: int
    num_skipped: int

    def __str__(self) -> str:
        """Format as `mAP: 0.440298, AUC: 0.974047, d-prime: 2.749102`, PSLA's line."""
        return f"mAP: {self.mean_ap:.6f}, AUC: {self.mean_auc:.6f}, d-prime: {self.d_prime:.6f}"


@dataclass(frozen=True)
class _Ranking:
    """Each class's clips by falling score; class-major (C, N) so that a class is contiguous."""

    positive: npt.NDArray[np.bool_]  # is the clip at this rank a positive
    tie_end: npt.NDArray[np.int64]  # rank of the last clip with the same score
    num_positive: npt.NDArray[np.int64]  # (C,)


def _check(
    scores: npt.ArrayLike, targets: npt.ArrayLike
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.bool_]]:
    """Return scores (N, C) and boolean targets (N, C), or raise ValueError that says which is wrong."""
    score_array, target_array = np.asarray(scores), np.asarray(targets)
    if score_array.ndim != 2 or score_array.shape != target_array.shape:
        raise ValueError(f"scores {score_array.shape} and targets {target_array.shape} must both be (N, C).")
    if not np.issubdtype(score_array.dtype, np.floating):
        score_array = score_array.astype(np.float64)
    if not np.isfinite(score_array).all():
        clip, class_index = np.argwhere(~np.isfinite(score_array))[0]
        raise ValueError(
            f"the score of clip {clip}, class {class_index} is {score_array[clip, class_index]}."
        )
    positive = target_array != 0
    if not (positive == target_array).all():
        raise ValueError("targets hold values other than 0 and 1; metrics need hard labels.")
    return score_array, positive


def _rank(scores: npt.NDArray[np.floating], positive: npt.NDArray[np.bool_]) -> _Ranking:
    by_class = np.ascontiguousarray(scores.T)
    order = np.argsort(-by_class, axis=1)
    by_score = np.take_along_axis(by_class, order, axis=1)
    num_clips = by_class.shape[1]
    ranks = np.arange(num_clips)
    last = np.ones(by_class.shape, dtype=bool)
    last[:, :-1] = by_score[:, 1:] != by_score[:, :-1]
    tie_end = np.minimum.accumulate(np.where(last, ranks, num_clips)[:, ::-1], axis=1)[:, ::-1]
    ranked = np.take_along_axis(np.ascontiguousarray(positive.T), order, axis=1)
    return _Ranking(ranked, tie_end, positive.sum(axis=0, dtype=np.int64))


def _average_precision(ranking: _Ranking) -> FloatArray:
    true_positives = np.cumsum(ranking.positive, axis=1)
    classes, ranks = np.nonzero(ranking.positive)
    ends = ranking.tie_end[classes, ranks]
    precision = true_positives[classes, ends] / (ends + 1.0)
    summed = np.bincount(classes, weights=precision, minlength=len(ranking.num_positive))
    with np.errstate(invalid="ignore"):
        return np.asarray(summed / ranking.num_positive, dtype=np.float64)


def _roc_auc(ranking: _Ranking) -> FloatArray:
    num_clips = ranking.positive.shape[1]
    tie_start = np.zeros_like(ranking.tie_end)
    starts = ranking.tie_end[:, :-1] + 1  # of the group after each rank's
    tie_start[:, 1:] = np.where(ranking.tie_end[:, 1:] != ranking.tie_end[:, :-1], starts, 0)
    tie_start = np.maximum.accumulate(tie_start, axis=1)
    classes, ranks = np.nonzero(ranking.positive)
    # clips ranked below a positive, ties counted half: (N - 1) minus its mid-rank
    below = num_clips - 1 - 0.5 * (tie_start[classes, ranks] + ranking.tie_end[classes, ranks])
    summed = np.bincount(classes, weights=below, minlength=len(ranking.num_positive))
    positives = ranking.num_positive.astype(np.float64)
    pairs = positives * (num_clips - positives)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((summed - positives * (positives - 1) / 2) / pairs, dtype=np.float64)


def _middle_of_curve(ranking: _Ranking) -> tuple[FloatArray, FloatArray]:
    """Precision and recall (C,) at index L // 2 of scikit-learn's precision_recall_curve of length L."""
    num_classes = len(ranking.num_positive)
    precision, recall = np.full(num_classes, np.nan), np.full(num_classes, np.nan)
    for c in np.flatnonzero(ranking.num_positive):
        ends = np.unique(
            ranking.tie_end[c]
        )  # one a threshold, from the highest; the curve runs from the lowest
        middle = (len(ends) + 1) // 2
        if middle == len(ends):
            precision[c], recall[c] = 1.0, 0.0  # the curve's closing point
            continue
        end = ends[len(ends) - 1 - middle]
        true_positives = np.count_nonzero(ranking.positive[c, : end + 1])
        precision[c], recall[c] = true_positives / (end + 1), true_positives / ranking.num_positive[c]
    return precision, recall


def average_precision(scores: npt.ArrayLike, targets: npt.ArrayLike) -> FloatArray:
    """Average precision of each class (C,): Σ (R_k - R_{k-1})·P_k over distinct scores; NaN without any.

    scores (N, C) finite; targets (N, C) of 0 and 1. Raises ValueError for other shapes or values. Equal to
    sklearn.metrics.average_precision_score.
    """
    return _average_precision(_rank(*_check(scores, targets)))


def roc_auc(scores: npt.ArrayLike, targets: npt.ArrayLike) -> FloatArray:
    """Area under the ROC curve of each class (C,); NaN for a class that has one value only.

    scores (N, C) finite; targets (N, C) of 0 and 1. Raises ValueError for other shapes or values.
    Mann-Whitney's U with ties counted half; equal to sklearn.metrics.roc_auc_score.
    """
    return _roc_auc(_rank(*_check(scores, targets)))


def d_prime(auc: float) -> float:
    """D' = √2·Φ⁻¹(AUC), as PSLA and AudioSet's authors compute it from the mean AUC; infinite for 0 and 1."""
    return float(np.sqrt(2.0) * ndtri(auc))


def compute_metrics(scores: npt.ArrayLike, targets: npt.ArrayLike) -> Metrics:
    """All of PSLA's figures, averaged over the classes that have positives.

    scores (N, C) finite; targets (N, C) of 0 and 1. Raises ValueError where no class has positives and
    negatives.
    """
    ranking = _rank(*_check(scores, targets))
    counted = ranking.num_positive > 0
    auc = _roc_auc(ranking)
    if not np.isfinite(auc).any():
        raise ValueError(f"no class has both positives and negatives among {len(np.asarray(scores))} clips.")
    precision, recall = _middle_of_curve(ranking)
    mean_auc = float(np.nanmean(auc))
    return Metrics(
        mean_ap=float(_average_precision(ranking)[counted].mean()),
        mean_auc=mean_auc,
        mean_precision=float(precision[counted].mean()),
        mean_recall=float(recall[counted].mean()),
        d_prime=d_prime(mean_auc),
        num_classes=int(counted.sum()),
        num_skipped=int((~counted).sum()),
    )
