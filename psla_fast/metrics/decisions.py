"""Decisions: scores, targets and thresholds -> precision, recall and F1, of each class and over all."""

# N clips, C classes

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from psla_fast.metrics.inputs import FloatArray, Values, as_checked_tensors


@dataclass(frozen=True)
class Decisions:
    """Precision, recall and F1 where a class is there if its score is above its threshold.

    Of each class (C,): NaN where it is 0/0, that is the precision of a class that is never found, the recall
    of one that has no positives, the F1 of one that is neither. macro_…: means over the classes with
    positives (num_skipped others are left out); num_never_found of them have no precision, and count there
    with the zero_division that was given. micro_…: over the decisions of all classes together.
    """

    precision: FloatArray
    recall: FloatArray
    f1: FloatArray
    num_found: npt.NDArray[np.int64]
    macro_precision: float
    macro_recall: float
    macro_f1: float
    micro_precision: float
    micro_recall: float
    micro_f1: float
    num_skipped: int
    num_never_found: int


def measure_decisions(
    scores: Values, targets: Values, thresholds: float | Values, zero_division: float = 0.0
) -> Decisions:
    """Measure the decisions `scores > thresholds`, thresholds being one number or one a class (C,).

    scores (N, C) finite; targets (N, C) of 0 and 1; tensors of a GPU are measured there. Raises ValueError
    for other shapes or values, or where no class has positives.
    """
    score, is_positive = as_checked_tensors(scores, targets)
    threshold = torch.as_tensor(thresholds, dtype=score.dtype, device=score.device)
    if threshold.shape not in ((), (score.shape[1],)) or not threshold.isfinite().all():
        raise ValueError(
            f"thresholds are {tuple(threshold.shape)}; give one finite number, or {score.shape[1]}, "
            "one a class."
        )
    found = score > threshold
    counts = torch.stack([(found & is_positive).sum(0), found.sum(0), is_positive.sum(0)])
    hits, num_found, num_positive = counts.cpu().numpy().astype(np.int64)
    known = num_positive > 0
    if not known.any():
        raise ValueError("no class has positives, so that no recall can be told. Give clips with labels.")
    precision, recall = _ratio(hits, num_found), _ratio(hits, num_positive)
    f1 = _ratio(2 * hits, num_found + num_positive)
    never_found = known & (num_found == 0)
    all_hits, all_found, all_positive = int(hits.sum()), int(num_found.sum()), int(num_positive.sum())
    return Decisions(
        precision=precision,
        recall=recall,
        f1=f1,
        num_found=num_found,
        macro_precision=float(np.where(never_found, zero_division, precision)[known].mean()),
        macro_recall=float(recall[known].mean()),
        macro_f1=float(f1[known].mean()),
        micro_precision=all_hits / all_found if all_found else zero_division,
        micro_recall=all_hits / all_positive,
        micro_f1=2 * all_hits / (all_found + all_positive),
        num_skipped=int((~known).sum()),
        num_never_found=int(never_found.sum()),
    )


def _ratio(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> FloatArray:
    """Divide; NaN for 0/0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)
