"""Ensemble: checkpoints or score files on one split -> each one's metrics and those of their mean."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from psla_fast.distributed import DeviceName
from psla_fast.evaluate import Precision, evaluate_checkpoint
from psla_fast.metrics import Metrics, compute_metrics
from psla_fast.scores import read_scores
from psla_fast.shards import open_shards


def ensemble_members(
    members: Sequence[Path],
    data: str | Path,
    batch_size: int,
    precision: Precision = "auto",
    device: DeviceName = "auto",
) -> Iterator[tuple[str, Metrics]]:
    """Yield (path, metrics) of each member in order, then ("", metrics) of the mean of their scores.

    A member is a checkpoint or a score file (HDF5), told apart by content; scores are matched by key. One
    member's scores are in memory at a time. Raises ValueError where a member has other clips or classes than
    `data`.
    """
    if not members:
        raise ValueError("no model given. Pass checkpoints or score files.")
    with open_shards(data) as shards:
        keys, targets = shards.keys, shards.targets(np.arange(len(shards)))
    mean = np.zeros(targets.shape, dtype=np.float64)
    for path in members:
        if not path.exists():
            raise ValueError(f"{path} not found. Pass a checkpoint or a score file.")
        if path.is_file() and h5py.is_hdf5(path):
            scores = read_scores(path).ordered(keys, str(path))
            if scores.shape != targets.shape:
                raise ValueError(f"{path} has {scores.shape[1]} classes, {data} has {targets.shape[1]}.")
        else:
            scores = evaluate_checkpoint(path, data, batch_size, precision, device).scores
        mean += scores / len(members)
        yield str(path), compute_metrics(scores, targets)
    yield "", compute_metrics(mean, targets)
