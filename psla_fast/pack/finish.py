"""Finish: the statistics of a split's shards -> rejected.jsonl, index.h5, plots, SHA256SUMS."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from psla_fast.classes import Classes, read_classes
from psla_fast.fbank import FbankConfig
from psla_fast.files import replacing
from psla_fast.pack.config import WorkConfig
from psla_fast.pack.log import PackLog, lock_split
from psla_fast.pack.plan import Plan, read_plan
from psla_fast.pack.summary import SplitSummary
from psla_fast.shards.index import write_index
from psla_fast.shards.spec import Storage, find_splits, shard_name
from psla_fast.shards.sums import PLOTS, SUMS_NAME, hash_file, write_sums
from psla_fast.shards.writer import ShardStatistics, read_statistics


@dataclass(frozen=True)
class FinishConfig:
    """How a split is completed."""

    max_rejected_fraction: float = 0.01
    """Largest share of a split's clips that may be left out before it is an error."""
    plots: bool = False
    """Draw histograms of class counts and clip lengths as PNG into each split's folder."""


def merge_parts(out: Path, config: FinishConfig) -> tuple[Classes, list[SplitSummary]]:
    """Complete the splits that parts have packed: OUT is a split's folder, or the folder of several.

    Raises ValueError that says which shards are missing.
    """
    folders = find_splits(out, ["pack.json"])
    if not folders:
        raise ValueError(f"no pack.json in {out}. Pass the folder that the parts were packed to.")
    plans = {folder: read_plan(folder) for folder in folders}
    for folder, plan in plans.items():
        missing = [n for n in range(plan.num_shards) if not (folder / f"{shard_name(n)}.json").is_file()]
        if missing:
            raise ValueError(
                f"{folder}: {len(missing)} of {plan.num_shards} shards aren't packed yet, for instance "
                f"{shard_name(missing[0])}. Run the parts that are missing, then merge again."
            )
    classes = read_classes(folders[0].parent / "classes.csv")
    summaries = []
    for folder, plan in plans.items():
        with PackLog(folder, WorkConfig()) as log, lock_split(folder, shared=False):
            summaries.append(finish_split(folder, classes, plan, config))
            log.write_complete(summaries[-1].num_clips, hash_file(folder / SUMS_NAME))
    return classes, summaries


def finish_split(folder: Path, classes: Classes, plan: Plan, config: FinishConfig) -> SplitSummary:
    """Complete a split whose shards are all there; SHA256SUMS, written last, says that it is complete.

    Raises ValueError where no clip, or too few of its list, could be packed.
    """
    fbank = FbankConfig(**plan.settings["fbank"])  # type: ignore[arg-type]
    storage = Storage.of(plan.settings["dtype"])  # type: ignore[arg-type]
    with replacing(folder / "rejected.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as file:
        shards = _read_shards(folder, plan, file)
        statistics = write_index(folder, shards, fbank, storage, classes)
    check_rejected(folder, statistics.rejected, plan.rows, plan.missing_is_normal, config)
    if not len(statistics.num_frames):
        raise ValueError(f"{folder}: none of {plan.rows} clips could be packed. See rejected.jsonl there.")
    summary = SplitSummary.of(folder.name, plan.rows, fbank.frame_shift_ms, statistics)
    if config.plots or any((folder / name).is_file() for name in PLOTS):
        from psla_fast.plots import plot_split

        plot_split(folder, statistics, classes, fbank.frame_shift_ms)
    write_sums(folder, plan.num_shards, statistics.sums)
    return summary


def _read_shards(folder: Path, plan: Plan, rejected: TextIO) -> Iterator[ShardStatistics]:
    """Read the shards' statistics one by one, and write their rejected clips on the way."""
    for number in range(plan.num_shards):
        statistics = read_statistics(folder / f"{shard_name(number)}.json")
        write_rejected(rejected, statistics.rejected)
        yield statistics
    rejected.flush()


def write_rejected(file: TextIO, rows: Iterable[dict[str, str]]) -> None:
    """Write rows of rejected.jsonl: key, source and reason of each clip left out."""
    file.writelines(json.dumps(row) + "\n" for row in rows)


def check_rejected(
    folder: Path, counts: dict[str, int], num_rows: int, missing_is_normal: bool, config: FinishConfig
) -> None:
    """Raise ValueError where more clips are rejected than allowed."""
    counted = {
        reason: n for reason, n in counts.items() if reason != "missing_audio" or not missing_is_normal
    }
    if sum(counted.values()) > config.max_rejected_fraction * num_rows:
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(counted.items()))
        raise ValueError(
            f"split {folder.name}: {sum(counted.values())} of {num_rows} clips rejected ({listed}), more "
            f"than --max-rejected-fraction {config.max_rejected_fraction:g}. See {folder}/rejected.jsonl; "
            "mend the source and add --retry-rejected, or raise the fraction."
        )
