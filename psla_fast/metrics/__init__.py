"""Metrics: scores and targets -> average precision, ROC-AUC, d-prime, lwlrap, F1, confidence intervals.

Pure functions of (N, C) arrays or tensors; tensors of a GPU are measured there. Equal to scikit-learn to
1e-9, ties included.
"""

from psla_fast.metrics.bootstrap import Bootstrap, Interval, Resampled, bootstrap_metrics, measure_resamples
from psla_fast.metrics.decisions import Decisions, measure_decisions
from psla_fast.metrics.label_ranking import LabelRanking, compute_lwlrap
from psla_fast.metrics.means import Metrics, average_precision, compute_metrics, d_prime, roc_auc
from psla_fast.metrics.per_class import ClassFigures, measure_classes
from psla_fast.metrics.thresholds import compute_thresholds

__all__ = [
    "Bootstrap",
    "ClassFigures",
    "Decisions",
    "Interval",
    "LabelRanking",
    "Metrics",
    "Resampled",
    "average_precision",
    "bootstrap_metrics",
    "compute_lwlrap",
    "compute_metrics",
    "compute_thresholds",
    "d_prime",
    "measure_classes",
    "measure_decisions",
    "measure_resamples",
    "roc_auc",
]
