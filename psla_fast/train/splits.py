"""Splits: the run's config -> the packed splits it trains on and scores, checked."""

from pathlib import Path

import numpy as np

from psla_fast.labels import read_labels, replace_labels
from psla_fast.shards import ShardError, Shards, exists_split, is_remote, join, open_shards
from psla_fast.train.config import TrainConfig
from psla_fast.train.distillation import set_teacher


def open_splits(config: TrainConfig) -> tuple[Shards, list[tuple[str, Shards]]]:
    """Open the training split and those to score: val, and eval where there is such a folder.

    Raises ValueError for splits that don't fit together, and ShardError for one that can't be opened.
    """
    data, cache = config.data, config.stream.cache
    if is_remote(data.shards) and config.stream.kind != "webdataset":
        raise ValueError(
            f"--data.shards is a URL, --stream.kind {config.stream.kind} reads local shards. Use webdataset."
        )
    if cache and not is_remote(data.shards):
        raise ValueError(f"--stream.cache keeps remote shards, {data.shards} is local. Leave it out.")
    train = open_shards(join(data.shards, data.train), cache)
    if data.labels:
        replace_labels(train, read_labels(Path(data.labels), train.classes))
    if config.distill.scores:
        set_teacher(train, config.distill, config.loss)
    names = [data.val]
    try:
        if data.eval != data.val and exists_split(join(data.shards, data.eval)):
            names.append(data.eval)
    except ShardError as error:
        raise ValueError(f"{error} Or score {data.val} alone: --data.eval {data.val}.") from error
    scored = [(name, open_shards(join(data.shards, name), cache)) for name in names]
    for _, shards in scored:
        clips_of_class = np.bincount(shards.index.indices, minlength=len(shards.classes))
        if not ((clips_of_class > 0) & (clips_of_class < len(shards))).any():
            raise ValueError(
                f"{shards.location}: no class has both positives and negatives; nothing to measure."
            )
        if shards.fbank_config != train.fbank_config:
            raise ValueError(f"{shards.location} holds other fbanks than {data.train}. Pack them alike.")
    return train, scored
