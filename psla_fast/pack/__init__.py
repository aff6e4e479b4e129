"""Pack: Clips -> shards, each an independent, deterministic task, so that a killed pack can go on."""

import contextlib
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

from tqdm import tqdm

from psla_fast.classes import Classes, format_classes, read_classes
from psla_fast.files import replacing, write_once
from psla_fast.pack.config import PackConfig, WorkConfig
from psla_fast.pack.engine import TaskId, run_tasks
from psla_fast.pack.finish import FinishConfig, check_rejected, finish_split, merge_parts, write_rejected
from psla_fast.pack.log import PackLog, lock_split
from psla_fast.pack.plan import estimate_clip_bytes, make_plan
from psla_fast.pack.shard_task import ShardTask, check_unchanged, count_rejected_clips, find_finished
from psla_fast.pack.summary import SplitSummary, format_summaries
from psla_fast.pack.table import ClipTable
from psla_fast.shards.sums import SUMS_NAME, hash_file
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


class _OpenSplit:
    """A split on its way: its list, its plan, the rows of its shards."""

    def __init__(self, table: ClipTable, out: Path, config: PackConfig, again: bool) -> None:
        self.table, self.config, self.again = table, config, again
        self.folder = out / table.split.name
        self.plan = make_plan(table, self.folder, config)
        self.dealt = self.plan.deal(config.seed)

    def task(self, split: int, number: int) -> ShardTask:
        rows, source = self.table.encoded(self.dealt[number]), self.table.split
        return ShardTask(
            split, self.folder, number, source.root, rows, self.config, source.scanned, again=self.again
        )


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
    in_the_way = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    if in_the_way is not None:
        raise ValueError(f"{in_the_way} is a file, no folder for shards. Choose another OUT.")
    with contextlib.ExitStack() as stack:
        tables = [_read_list(split, out / split.name, finish, keep=not work.is_part) for split in splits]
        for folder in {(out / split.name).parent for split in splits}:
            _write_classes(folder, classes)
        logs = [stack.enter_context(PackLog(out / split.name, work)) for split in splits]
        opened = []
        while tables:
            opened.append(_OpenSplit(tables.pop(0), out, config, again=work.retry_rejected))
            stack.enter_context(lock_split(opened[-1].folder, shared=work.is_part))
            logs[len(opened) - 1].write_start(command, opened[-1].plan, work.part)
        waiting = [task_id for split, one in enumerate(opened) for task_id in _find_waiting(split, one, work)]
        _check_space(out, opened, waiting)
        _run(opened, waiting, work, logs)
        if work.is_part:
            return []
        plans = [(one.folder, one.plan) for one in opened]
        opened.clear()  # the lists of 2M clips, before as many are indexed
        summaries = []
        for (folder, plan), log in zip(plans, logs, strict=True):
            summaries.append(finish_split(folder, classes, plan, finish))
            log.write_complete(summaries[-1].num_clips, hash_file(folder / SUMS_NAME))
        return summaries


def _read_list(split: Split, folder: Path, config: FinishConfig, keep: bool) -> ClipTable:
    """Read a split's list; refuse one without a clip or with too many rows that are none.

    keep: write those rows to rejected.jsonl then.
    """
    table = ClipTable(split)
    if not len(table):
        raise ValueError(f"the list of split {folder.name} is empty. Give one that names clips.")
    num_clips = len(table) - table.num_rejected
    found = f"{num_clips - table.num_missing:,} of {num_clips:,} clips found"
    unusable = f", {table.num_rejected:,} rows are no clips" if table.num_rejected else ""
    LOG.info("%s: %s%s", folder.name, found, unusable)
    counts = table.rejected + Counter(missing_audio=table.num_missing)
    try:
        check_rejected(folder, counts, len(table), table.split.missing_is_normal, config)
        if num_clips == table.num_missing:
            raise ValueError(
                f"split {folder.name} has no clip: {table.num_rejected} of its list's {len(table)} rows are "
                f"none, and the audio of {table.num_missing} isn't in {table.split.root}. Check the paths."
            )
    except ValueError:
        if keep and not (folder / SUMS_NAME).is_file():
            with replacing(folder / "rejected.jsonl") as path, open(path, "w", encoding="utf-8") as file:
                write_rejected(file, table.rejected_rows())
        raise
    return table


def _write_classes(folder: Path, classes: Classes) -> None:
    path, text = folder / "classes.csv", format_classes(classes).encode()
    write_once(path, text)
    if path.read_bytes() != text:
        raise ValueError(f"{path} lists other classes than this source. Choose another OUT.")
    if read_classes(path) != classes:
        path.unlink()
        raise ValueError("a class's name begins or ends with a blank. Rename it.")


def _find_waiting(split: int, one: _OpenSplit, work: WorkConfig) -> list[TaskId]:
    """List the shards that are to be packed; refuse to go on where recordings were exchanged or are gone."""
    waiting, gone = [], ""
    for number in filter(work.takes, range(one.plan.num_shards)):
        task = one.task(split, number)
        statistics = find_finished(task)
        if statistics is not None:
            gone = check_unchanged(task, statistics) or gone
        if statistics is None or (work.retry_rejected and count_rejected_clips(task, statistics)):
            waiting.append((split, number))
    if gone and waiting and one.plan.missing_is_normal:  # elsewhere they count as rejected
        raise ValueError(
            f"{one.folder}: recordings that were packed before are gone, for instance {gone}. Is all of "
            f"{one.table.split.root} mounted? Restore them to go on."
        )
    return waiting


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
