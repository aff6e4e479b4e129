"""Pack: Clips -> shards, each an independent, deterministic task, so that a killed pack can go on."""

import contextlib
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from tqdm import tqdm

from psla_fast.classes import Classes, format_classes
from psla_fast.clip import Rejected
from psla_fast.files import write_once
from psla_fast.pack.config import PackConfig, WorkConfig
from psla_fast.pack.engine import TaskId, run_tasks
from psla_fast.pack.finish import FinishConfig, check_rejected, finish_split, merge_parts, write_rejected
from psla_fast.pack.log import PackLog
from psla_fast.pack.plan import Plan, estimate_clip_bytes, make_plan
from psla_fast.pack.shard_task import ShardTask, check_unchanged, count_rejected_clips, find_finished
from psla_fast.pack.summary import SplitSummary, format_summaries
from psla_fast.pack.table import ClipTable
from psla_fast.shards.spec import make_key
from psla_fast.shards.sums import SUMS_NAME
from psla_fast.sources import Split

__all__ = [
    "FinishConfig",
    "PackConfig",
    "SplitSummary",
    "WorkConfig",
    "format_summaries",
    "merge_parts",
    "pack_splits",
]

LOG = logging.getLogger(__name__)


@dataclass
class _OpenSplit:
    """A split on its way: its list, its plan, the rows of its shards."""

    table: ClipTable
    folder: Path
    plan: Plan
    config: PackConfig

    def __post_init__(self) -> None:
        self.dealt = self.plan.deal(self.config.seed)

    def task(self, split: int, number: int) -> ShardTask:
        rows = self.table.encoded(self.dealt[number])
        return ShardTask(split, self.folder, number, self.table.split.root, rows, self.config)


def pack_splits(
    classes: Classes,
    splits: Sequence[Split],
    out: Path,
    config: PackConfig,
    work: WorkConfig | None = None,
    command: Mapping[str, object] | None = None,
) -> list[SplitSummary]:
    """Pack every split into OUT/<split> and the class list into its parent; finished shards are kept.

    `command` is kept in pack.log. Gives nothing where only a part is packed. Raises ValueError where OUT was
    packed from other input or settings, or too many clips are rejected; OSError where the disk is full, with
    what is finished kept.
    """
    work = work or WorkConfig()
    try:
        return _pack(classes, splits, out, config, work, command or {})
    except OSError as error:
        kept = "finished shards are kept; mend it, then the same command goes on"
        raise OSError(
            error.errno, f"{error.strerror or error}; {kept}", error.filename or str(out)
        ) from error


def _pack(
    classes: Classes,
    splits: Sequence[Split],
    out: Path,
    config: PackConfig,
    work: WorkConfig,
    command: Mapping[str, object],
) -> list[SplitSummary]:
    finish = FinishConfig(config.max_rejected_fraction, work.plots)
    tables = [ClipTable(split) for split in splits]
    for table in tables:
        _check_list(table, out / table.split.name, finish)
    for folder in {(out / split.name).parent for split in splits}:
        _write_classes(folder, classes)
    with contextlib.ExitStack() as stack:
        opened, logs = [], []
        for table in tables:
            folder = out / table.split.name
            log = stack.enter_context(PackLog(folder, work))
            plan = make_plan(table, folder, config)
            log.write_start(
                command, plan=plan.fingerprint, rows=plan.rows, shards=plan.num_shards, part=work.part
            )
            opened.append(_OpenSplit(table, folder, plan, config))
            logs.append(log)
        waiting = [
            (split, number)
            for split, one in enumerate(opened)
            for number in range(one.plan.num_shards)
            if work.takes(number) and not _is_finished(one.task(split, number), work)
        ]
        _check_space(out, opened, waiting)
        _run(opened, waiting, work, logs)
        if work.is_part:
            return []
        summaries = [finish_split(one.folder, classes, one.plan, finish) for one in opened]
        for log, summary in zip(logs, summaries, strict=True):
            log.write("complete", clips=summary.num_clips, rejected=summary.rejected)
        return summaries


def _check_list(table: ClipTable, folder: Path, config: FinishConfig) -> None:
    """Refuse a list that holds no clip, or too many rows that are none, before anything is packed."""
    rejected = []
    if table.num_rejected + table.num_missing:
        for row in (table[number] for number in range(len(table))):
            if isinstance(row, Rejected):
                rejected.append({"key": make_key(row.name), "source": row.source, "reason": row.reason})
            elif not row.found:
                reason = f"missing_audio: {row.source} is not there"
                rejected.append({"key": make_key(row.name), "source": row.source, "reason": reason})
    counts = Counter(row["reason"].split(":")[0] for row in rejected)
    num_clips = len(table) - table.num_rejected
    found = f"{num_clips - table.num_missing:,} of {num_clips:,} clips found"
    unusable = f", {table.num_rejected:,} rows are no clips" if table.num_rejected else ""
    LOG.info("%s: %s%s", folder.name, found, unusable)
    if rejected and not (folder / "rejected.jsonl").is_file():
        write_rejected(folder, rejected)
    check_rejected(folder, counts, len(table), table.split.missing_is_normal, config)
    if len(table) == len(rejected):
        raise ValueError(
            f"split {folder.name} has no clip: its list has {len(table)} rows, {table.num_rejected} are "
            f"none, and the audio of {table.num_missing} isn't in {table.split.root}. Check the paths."
        )


def _write_classes(folder: Path, classes: Classes) -> None:
    path, text = folder / "classes.csv", format_classes(classes).encode()
    write_once(path, text)
    if path.read_bytes() != text:
        raise ValueError(f"{path} lists other classes than this source. Choose another OUT.")


def _is_finished(task: ShardTask, work: WorkConfig) -> bool:
    """Tell whether a shard need not be packed; refuse one whose recordings were exchanged."""
    statistics = find_finished(task)
    if statistics is None:
        return False
    check_unchanged(task, statistics)
    return not (work.retry_rejected and count_rejected_clips(task, statistics))


def _check_space(out: Path, opened: Sequence[_OpenSplit], waiting: Sequence[TaskId]) -> None:
    """Raise ValueError where the disk has less room than the shards will need, by the lengths sampled."""
    needed = 0.0
    for split in {split for split, _ in waiting}:
        one = opened[split]
        rows = sum(len(one.dealt[number]) for other, number in waiting if other == split)
        found = 1 - (one.table.num_rejected + one.table.num_missing) / len(one.table)
        needed += rows * found * estimate_clip_bytes(one.table, one.config)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"{out} has {free / 1e9:.2f} GB free, the shards need about {needed / 1e9:.2f} GB. Free some, "
            "choose another OUT, or halve it by --dtype uint8."
        )


def _run(
    opened: Sequence[_OpenSplit], waiting: Sequence[TaskId], work: WorkConfig, logs: Sequence[PackLog]
) -> None:
    """Pack the shards that wait, showing how far it is."""
    for split in {split for split, _ in waiting}:
        (opened[split].folder / SUMS_NAME).unlink(missing_ok=True)  # not complete any more
    total = sum(len(opened[split].dealt[number]) for split, number in waiting)
    start, num_bytes, num_rejected = perf_counter(), 0, 0
    names = "+".join(one.folder.name for one in opened)
    with tqdm(total=total, desc=f"pack {names}", unit="clip", disable=None) as bar:
        for result in run_tasks(waiting, lambda task_id: opened[task_id[0]].task(*task_id), work):
            num_bytes += result.tar_bytes
            num_rejected += result.rejected
            bar.set_postfix_str(
                f"{num_bytes / 1e6 / (perf_counter() - start):.1f} MB/s, {num_rejected} rejected",
                refresh=False,
            )
            bar.update(result.rows)
            logs[result.split].write(
                "shard",
                number=result.number,
                rows=result.rows,
                rejected=result.rejected,
                bytes=result.tar_bytes,
                seconds=round(result.seconds, 3),
                host=result.host,
            )
