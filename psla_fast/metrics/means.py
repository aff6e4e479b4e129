"""Means: scores and targets -> mAP, mean AUC and d-prime over the classes that can be measured."""

# N clips, C classes

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from psla_fast.metrics.inputs import FloatArray, Values
from psla_fast.metrics.per_class import ClassFigures, measure_classes


@dataclass(frozen=True)
class Metrics:
    """Means over classes; which classes count differs.

    AP, precision and recall: over the num_classes classes with positives, without the other num_skipped. AUC,
    and d' of it: without the num_auc_skipped classes that lack positives or negatives (0 in records of before
    it was kept).
    """

    mean_ap: float
    mean_auc: float
    mean_precision: float
    mean_recall: float
    d_prime: float
    num_classes: int
    num_skipped: int
    num_auc_skipped: int = 0

    def __str__(self) -> str:
        """Format as `mAP: 0.440298, AUC: 0.974047, d-prime: 2.749102`, PSLA's line."""
        return f"mAP: {self.mean_ap:.6f}, AUC: {self.mean_auc:.6f}, d-prime: {self.d_prime:.6f}"

    @classmethod
    def of(cls, figures: ClassFigures) -> "Metrics":
        """Average the figures of classes; raises ValueError where none has positives and negatives."""
        counted, with_auc = figures.num_positive > 0, np.isfinite(figures.roc_auc)
        if not with_auc.any():
            raise ValueError(
                "no class has both positives and negatives. Give clips of which some have labels."
            )
        mean_auc = float(figures.roc_auc[with_auc].mean())
        return cls(
            mean_ap=float(figures.average_precision[counted].mean()),
            mean_auc=mean_auc,
            mean_precision=float(figures.middle_precision[counted].mean()),
            mean_recall=float(figures.middle_recall[counted].mean()),
            d_prime=d_prime(mean_auc),
            num_classes=int(counted.sum()),
            num_skipped=int((~counted).sum()),
            num_auc_skipped=int((~with_auc).sum()),
        )


def average_precision(scores: Values, targets: Values) -> FloatArray:
    """Average precision of each class (C,): Σ (R_k - R_{k-1})·P_k over distinct scores; NaN without any.

    scores (N, C) finite; targets (N, C) of 0 and 1. Raises ValueError for other shapes or values. Equal to
    sklearn.metrics.average_precision_score.
    """
    return measure_classes(scores, targets).average_precision


def roc_auc(scores: Values, targets: Values) -> FloatArray:
    """Area under the ROC curve of each class (C,); NaN for a class that has one value only.

    scores (N, C) finite; targets (N, C) of 0 and 1. Raises ValueError for other shapes or values.
    Mann-Whitney's U with ties counted half; equal to sklearn.metrics.roc_auc_score.
    """
    return measure_classes(scores, targets).roc_auc


def d_prime(auc: float) -> float:
    """D' = √2·Φ⁻¹(AUC), as PSLA and AudioSet's authors compute it from the mean AUC; infinite for 0 and 1."""
    return float(np.sqrt(2.0) * ndtri(auc))


def compute_metrics(scores: Values, targets: Values) -> Metrics:
    """All of PSLA's figures, averaged over the classes that have positives.

    scores (N, C) finite; targets (N, C) of 0 and 1; tensors of a GPU are measured there. Raises ValueError
    where no class has positives and negatives.
    """
    return Metrics.of(measure_classes(scores, targets))
