"""Plan: the rows of a split -> which go into which shard; kept in pack.json, so that a pack can go on."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from psla_fast.clip import Clip
from psla_fast.files import write_once
from psla_fast.pack.config import PackConfig
from psla_fast.pack.recordings import audio_bytes, estimate_seconds
from psla_fast.pack.table import ClipTable
from psla_fast.shards.spec import Storage, shard_name
from psla_fast.shards.writer import read_statistics

FEWEST_SHARDS, FEWEST_CLIPS_A_SHARD = 8, 16  # so that several workers share a small set too
MEASURED_CLIPS = 512  # whose headers are read to estimate the size of a clip
MEMBER_BYTES = 2048  # headers and padding of a clip's two members


@dataclass(frozen=True)
class Plan:
    """What pack.json holds: settings, what was asked for, and the number of shards it was dealt to."""

    settings: dict[str, object]
    rows: int
    fingerprint: str
    missing_is_normal: bool
    num_shards: int

    def deal(self, seed: int) -> list[npt.NDArray[np.int64]]:
        """Give the row numbers of each shard, shuffled by the seed."""
        order = np.random.Generator(np.random.PCG64(seed)).permutation(self.rows)
        return np.array_split(order, self.num_shards)


def read_plan(folder: Path) -> Plan:
    """Read pack.json; raises ValueError where it is damaged."""
    path = folder / "pack.json"
    try:
        plan = Plan(**json.loads(path.read_bytes()))
        if not (isinstance(plan.settings, dict) and 0 < plan.num_shards <= plan.rows):
            raise ValueError("it holds no plan")
        return plan
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). Run verify_shards.py --repair.") from error


def make_plan(table: ClipTable, folder: Path, config: PackConfig) -> Plan:
    """Take the plan from pack.json where the folder was begun, else estimate and write one.

    Raises ValueError that says what differs where the folder was begun with other settings or another list.
    """
    path = folder / "pack.json"
    if not path.is_file():
        write_once(path, json.dumps(asdict(_estimate(table, config)), indent=1).encode())
    plan = read_plan(folder)
    changed = [
        f"{name} was {plan.settings.get(name)}, is {value}"
        for name, value in config.settings().items()
        if plan.settings.get(name) != value
    ]
    if plan.settings.keys() - config.settings().keys():
        changed.append("it has settings this version doesn't know")
    if not changed and plan.fingerprint != table.fingerprint:
        changed = [_compare_lists(table, folder, plan)]
    if changed:
        raise ValueError(
            f"{folder} was packed otherwise: {'; '.join(changed)}. Choose another OUT, or delete this folder."
        )
    return plan


def estimate_clip_bytes(table: ClipTable, config: PackConfig) -> float:
    """Estimate the bytes of a packed clip from the headers of a sample; missing ones count as the others.

    Raises ValueError where not one of the sample is there.
    """
    rng = np.random.Generator(np.random.PCG64(config.seed))
    measured = rng.choice(len(table), size=min(MEASURED_CLIPS, len(table)), replace=False)
    rows = (table[int(i)] for i in measured)
    clips = [row for row in rows if isinstance(row, Clip) and row.found]
    root = table.split.root
    if clips and all(audio_bytes(root, clip) < 0 for clip in clips):
        raise ValueError(
            f"split {table.split.name}: none of {len(clips)} recordings looked for is there, for instance "
            f"{root / clips[0].source}. Check the paths, and that the disk is mounted."
        )
    seconds = [estimate_seconds(root, clip, config) for clip in clips] or [0.0]
    bytes_per_frame = config.fbank.num_mels * Storage.of(config.dtype).numpy.itemsize
    return MEMBER_BYTES + float(np.mean(seconds)) * 1000 / config.fbank.frame_shift_ms * bytes_per_frame


def _estimate(table: ClipTable, config: PackConfig) -> Plan:
    wanted = int(np.ceil(estimate_clip_bytes(table, config) * len(table) / (config.shard_mb * 1e6)))
    num_shards = max(wanted, min(FEWEST_SHARDS, -(-len(table) // FEWEST_CLIPS_A_SHARD)))
    return Plan(
        settings=config.settings(),
        rows=len(table),
        fingerprint=table.fingerprint,
        missing_is_normal=table.split.missing_is_normal,
        num_shards=min(num_shards, len(table)),
    )


def _compare_lists(table: ClipTable, folder: Path, plan: Plan) -> str:
    """Say how a list of clips differs from the one that the folder's finished shards were packed from."""
    if plan.rows != len(table):
        count = f"its list had {plan.rows} rows, has {len(table)}"
    else:
        count = "its list of clips differs (names, labels, cuts or their order)"
    packed = {name: labels for name, labels in _packed_labels(folder, plan)}
    if packed:
        for number in range(len(table)):
            row = table[number]
            if isinstance(row, Clip) and packed.pop(row.name, row.labels) != row.labels:
                return f"{count}; for instance {row.name} has other labels"
        if packed:
            return f"{count}; for instance {next(iter(packed))} is packed, but not in the list any more"
    return count


def _packed_labels(folder: Path, plan: Plan) -> Iterator[tuple[str, tuple[int, ...]]]:
    for number in range(plan.num_shards):
        path = folder / f"{shard_name(number)}.json"
        if path.is_file():
            for member in read_statistics(path).clips:
                yield member.name, tuple(member.labels)
