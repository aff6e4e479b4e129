"""Inputs: scores and targets of any kind -> arrays or tensors (N, C), checked."""

# N clips, C classes

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Values = npt.ArrayLike | Tensor
FloatArray = npt.NDArray[np.float64]


def is_on_device(scores: Values) -> bool:
    """Say whether scores are a tensor of a device other than the CPU."""
    return isinstance(scores, Tensor) and scores.device.type != "cpu"


def as_array(values: Values) -> npt.NDArray[Any]:
    """Give values as an array, without a copy where that can be; bfloat16 becomes float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)


def as_tensor(values: Values, device: torch.device) -> Tensor:
    """Give values as a tensor on a device, without a copy where that can be."""
    if isinstance(values, Tensor):
        return values.detach().to(device)
    array = np.ascontiguousarray(values)
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def as_checked_tensors(scores: Values, targets: Values) -> tuple[Tensor, Tensor]:
    """Give scores (N, C) of float32 or float64 and boolean targets (N, C) on the scores' device.

    Raises ValueError for other shapes, scores that aren't finite, targets other than 0 and 1.
    """
    device = scores.device if isinstance(scores, Tensor) else torch.device("cpu")
    score, target = as_tensor(scores, device), as_tensor(targets, device)
    check_shapes(score.shape, target.shape)
    if score.dtype not in (torch.float32, torch.float64):
        score = score.float() if score.is_floating_point() else score.double()
    finite, hard = torch.stack((score.isfinite().all(), ((target == 0) | (target == 1)).all())).tolist()
    if not finite:
        refuse_scores(as_array(score))
    if not hard:
        refuse_targets(as_array(target))
    return score, target != 0


def check_shapes(scores: tuple[int, ...], targets: tuple[int, ...]) -> None:
    """Raise ValueError unless both shapes are the same (N, C)."""
    if len(scores) != 2 or scores != targets:
        raise ValueError(f"scores {tuple(scores)} and targets {tuple(targets)} must both be (N, C).")


def refuse_scores(scores: npt.NDArray[Any]) -> None:
    """Raise ValueError that names the first score that isn't finite."""
    clip, index = _first(scores, lambda column: ~np.isfinite(column))
    raise ValueError(
        f"the score of clip {clip}, class {index} is {scores[clip, index]}; give finite scores, so that they "
        "can be ranked."
    )


def refuse_targets(targets: npt.NDArray[Any]) -> None:
    """Raise ValueError that names the first target other than 0 and 1."""
    clip, index = _first(targets, lambda column: (column != 0) & (column != 1))
    raise ValueError(
        f"the target of clip {clip}, class {index} is {targets[clip, index]}; metrics need hard labels: "
        "give 0 or 1."
    )


def _first(
    values: npt.NDArray[Any], is_wrong: Callable[[npt.NDArray[Any]], npt.NDArray[np.bool_]]
) -> tuple[int, int]:
    """Clip and class of the first wrong value, class by class."""
    for index in range(values.shape[1]):
        wrong = is_wrong(values[:, index])
        if wrong.any():
            return int(wrong.argmax()), index
    raise AssertionError("nothing is wrong")
