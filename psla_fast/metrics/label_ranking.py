"""Label ranking: scores and targets -> lwlrap, how high a clip's own classes stand among all classes.

Label-weighted label-ranking average precision: Fonseca et al. 2019, "Audio tagging with noisy labels and
minimal supervision", DCASE 2019 task 2.
"""

# N clips, C classes, L labels of all clips together

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from psla_fast.metrics.inputs import FloatArray, Values, as_checked_tensors

VALUES_A_PIECE = 2**22


@dataclass(frozen=True)
class LabelRanking:
    """lwlrap: the mean precision over all labels; of each class (C,), NaN for one that labels no clip.

    The mean is the sum of class_lwlrap, each times its share of the labels num_labels (C,). num_unlabelled
    clips have no label and count for nothing.
    """

    lwlrap: float
    class_lwlrap: FloatArray
    num_labels: npt.NDArray[np.int64]
    num_unlabelled: int


def compute_lwlrap(scores: Values, targets: Values) -> LabelRanking:
    """Measure lwlrap, of scores (N, C), finite, and targets (N, C) of 0 and 1; tensors of a GPU there.

    Equal to sklearn.metrics.label_ranking_average_precision_score with each clip weighted by its number of
    labels: a class that ties with a label counts as ranked above it. Raises ValueError for other shapes or
    values, or where no clip has a label.
    """
    score, is_label = as_checked_tensors(scores, targets)
    clips, classes, precision = rank_labels(score, is_label)
    if not len(clips):
        raise ValueError("no clip has a label, so that nothing can be ranked. Give clips with labels.")
    num_labels = torch.bincount(classes, minlength=score.shape[1]).double()
    summed = torch.zeros_like(num_labels).index_add_(0, classes, precision)
    per_class, counts = torch.stack((summed / num_labels, num_labels)).cpu().numpy()
    return LabelRanking(
        lwlrap=float(precision.mean()),
        class_lwlrap=per_class,
        num_labels=counts.astype(np.int64),
        num_unlabelled=int((~is_label.any(1)).sum()),
    )


def rank_labels(scores: Tensor, is_label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give each label's clip (L,), class (L,) and precision (L,): the share of labels from its rank upwards.

    scores (N, C); is_label (N, C) boolean. Time grows with L · C: few classes label a clip.
    """
    clips, classes = is_label.nonzero(as_tuple=True)
    step = max(1, VALUES_A_PIECE // max(1, scores.shape[1]))
    found = []
    for clip, index in zip(torch.split(clips, step), torch.split(classes, step), strict=True):
        rows = scores[clip]
        at_least = rows >= rows.gather(1, index[:, None])
        labels = (at_least & is_label[clip]).sum(1)
        found.append(labels.double() / at_least.sum(1))
    return clips, classes, torch.cat(found)
