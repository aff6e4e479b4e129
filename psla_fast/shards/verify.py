"""Verify: a packed split against its checksums, its index and itself, byte for byte; names shard and key."""

import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from psla_fast.classes import read_classes
from psla_fast.shards.index import build_index
from psla_fast.shards.reader import Shards, open_shards
from psla_fast.shards.spec import TAR_BLOCK, Storage, shard_name
from psla_fast.shards.sums import SUMS_NAME, format_sums, hash_file, list_files, parse_sums
from psla_fast.shards.writer import Member, ShardStatistics, read_statistics


@dataclass(frozen=True)
class Fault:
    """Something that isn't as it was packed: a file of the split, where in it, and what is wrong."""

    file: str
    what: str
    key: str = ""
    shard: int | None = None

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.file}{f', key {self.key}' if self.key else ''}: {self.what}"


@dataclass
class SplitReport:
    """What `verify_split` found; shards is the open split where its index is whole."""

    folder: Path
    num_shards: int = 0
    num_bytes: int = 0
    faults: list[Fault] = field(default_factory=list)
    shards: Shards | None = None


def verify_split(folder: Path, num_threads: int) -> SplitReport:
    """Check every file of a split; any byte that differs from what was packed is a fault.

    Tars are read once: against their sha256, and each clip against its crc32, its labels and its headers, so
    that a fault names the key. Raises OSError where a file can't be read.
    """
    report = SplitReport(folder)
    sums, faults = _read_sums(folder)
    report.num_shards = _count_shards(folder, sums)
    names = sorted({*list_files(folder, report.num_shards), *sums})
    small = [name for name in names if not name.endswith((".tar", ".idx")) or not _shard_of(name)]
    actual = {name: hash_file(folder / name) for name in small if (folder / name).is_file()}
    for name in small:
        faults += _compare_sum(name, sums, actual)
    try:
        report.shards = open_shards(folder)
    except ValueError as error:
        if not faults:
            faults.append(Fault("index.h5", str(error)))
    check = partial(_check_shard, folder, sums, report.shards, _count_classes(folder))
    rejected: list[str] = []
    with ThreadPoolExecutor(num_threads) as pool:
        for found in pool.map(check, range(report.num_shards)):
            faults += found.faults
            actual.update(found.sums)
            rejected += found.rejected
            report.num_bytes += found.num_bytes
    if not faults and report.shards is not None:
        faults += _check_whole(report.shards, report.num_shards, rejected)
        if (folder / SUMS_NAME).read_text() != format_sums(actual):
            faults.append(Fault(SUMS_NAME, "isn't as it was written"))
    report.faults = faults
    return report


def _read_sums(folder: Path) -> tuple[dict[str, str], list[Fault]]:
    """Read SHA256SUMS as far as it can be read."""
    path = folder / SUMS_NAME
    if not path.is_file():
        return {}, [Fault(SUMS_NAME, "is not there: the split isn't packed to its end, or lost it")]
    sums, damaged = parse_sums(path.read_bytes())
    return sums, [Fault(SUMS_NAME, f"line {number} is damaged") for number in damaged]


def _shard_of(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"(\d{5,})\.(?:tar|idx|json)", name)


def _count_shards(folder: Path, sums: dict[str, str]) -> int:
    """Give one more than the highest shard number that is listed or lies there."""
    names = {*sums, *(path.name for path in folder.iterdir())}
    return max((int(match[1]) + 1 for name in names if (match := _shard_of(name))), default=0)


def _count_classes(folder: Path) -> int:
    try:
        return len(read_classes(folder.parent / "classes.csv"))
    except ValueError:
        return 0  # its fault is reported by its sum


def _compare_sum(name: str, sums: dict[str, str], actual: dict[str, str]) -> Iterator[Fault]:
    match = _shard_of(name)
    shard = int(match[1]) if match else None
    if name not in actual:
        yield Fault(name, "is missing", shard=shard)
    elif name not in sums:
        yield Fault(name, f"is not listed in {SUMS_NAME}")
    elif sums[name] != actual[name]:
        yield Fault(name, f"differs from its sum in {SUMS_NAME}", shard=shard)


@dataclass
class _ShardReport:
    faults: list[Fault] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)
    rejected: list[str] = field(default_factory=list)
    num_bytes: int = 0


def _check_shard(
    folder: Path, sums: dict[str, str], shards: Shards | None, num_classes: int, number: int
) -> _ShardReport:
    """Check one shard's tar and index against its sums, its statistics and the split's index."""
    report, stem = _ShardReport(), shard_name(number)
    held = {name: _read_if_there(folder / name) for name in (f"{stem}.tar", f"{stem}.idx")}
    tar, idx = held.values()
    report.num_bytes = len(tar)
    report.sums = {
        name: hashlib.sha256(content).hexdigest()
        for name, content in held.items()
        if (folder / name).is_file()
    }
    try:
        statistics = read_statistics(folder / f"{stem}.json")
    except (ValueError, OSError):  # its own fault is reported by its sum
        for name in held:
            report.faults += _compare_sum(name, sums, report.sums)
        return report
    report.rejected = [json.dumps(row) for row in statistics.rejected]
    report.faults = _check_tar(number, tar, statistics) + _check_idx(number, idx, statistics)
    if not report.faults:
        for name in held:
            report.faults += _compare_sum(name, sums, report.sums)
    report.faults += _check_labels(number, statistics, num_classes)
    if shards is not None and not report.faults:
        report.faults += _compare_index(shards, number, statistics)
    return report


def _read_if_there(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _check_tar(number: int, content: bytes, statistics: ShardStatistics) -> list[Fault]:
    name = f"{shard_name(number)}.tar"
    if not content:
        return [Fault(name, "is missing or empty", shard=number)]
    if len(content) != statistics.tar_bytes:
        what = f"has {len(content)} bytes, was packed with {statistics.tar_bytes}"
        return [Fault(name, what, _first_lost(statistics, len(content)), number)]
    faults = _locate(name, number, content, statistics)
    if not faults and hashlib.sha256(content).hexdigest() != statistics.tar_sha256:
        faults = [Fault(name, "differs from the sha256 in its statistics", shard=number)]
    return faults


def _first_lost(statistics: ShardStatistics, size: int) -> str:
    """Give the first clip that doesn't fit into a tar cut to `size`."""
    return next((m.key for m in statistics.clips if m.offset + m.num_bytes > size), "")


def _locate(name: str, shard: int, content: bytes, statistics: ShardStatistics) -> list[Fault]:
    """Find the clips whose bytes in the tar aren't those that the statistics tell; empty where all are."""
    faults, position = [], 0
    for member in statistics.clips:
        labels = np.asarray(member.labels, dtype="<i4").tobytes()
        head = _header(f"{member.key}.fbank", member.num_bytes)
        middle = bytes(-member.num_bytes % TAR_BLOCK) + _header(f"{member.key}.labels", len(labels))
        tail = labels + bytes(-len(labels) % TAR_BLOCK)
        end = member.offset + member.num_bytes
        if zlib.crc32(content[member.offset : end]) != member.crc32:
            what = f"fbank at offset {member.offset} differs from its crc32"
            faults.append(Fault(name, what, member.key, shard))
        elif content[position : member.offset] != head or content[end : end + len(middle)] != middle:
            what = f"tar header at offset {position} or {end} isn't as it was written"
            faults.append(Fault(name, what, member.key, shard))
        elif content[end + len(middle) : end + len(middle) + len(tail)] != tail:
            what = f"labels at offset {end + len(middle)} aren't {member.labels}"
            faults.append(Fault(name, what, member.key, shard))
        position = end + len(middle) + len(tail)
    if content[position:].strip(b"\0"):
        faults.append(Fault(name, f"holds something behind its last clip, at offset {position}", shard=shard))
    return faults


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _format_idx(statistics: ShardStatistics) -> str:
    """Rebuild the DALI index that belongs to a shard's clips."""
    rows = [_idx_row(member) for member in statistics.clips]
    return "\n".join([f"v1.2 {len(rows)}", *rows]) + "\n"


def _idx_row(member: Member) -> str:
    size, count = member.num_bytes, 4 * len(member.labels)
    labels = member.offset + size + -size % TAR_BLOCK + TAR_BLOCK
    return f"fbank {member.offset} {size} {member.key}.fbank labels {labels} {count} {member.key}.labels"


def _check_idx(number: int, content: bytes, statistics: ShardStatistics) -> list[Fault]:
    name, expected = f"{shard_name(number)}.idx", _format_idx(statistics)
    if content == expected.encode():
        return []
    if not content:
        return [Fault(name, "is missing or empty", shard=number)]
    lines, wanted = content.decode(errors="replace").split("\n"), expected.split("\n")
    differing = (n for n, line in enumerate(wanted) if n >= len(lines) or lines[n] != line)
    line = next(differing, len(wanted))
    words = wanted[line].split(" ") if line < len(wanted) else []
    key = words[3].removesuffix(".fbank") if len(words) > 3 else ""
    return [Fault(name, f"line {line + 1} isn't as it was written", key, number)]


def _check_labels(number: int, statistics: ShardStatistics, num_classes: int) -> Iterator[Fault]:
    for member in statistics.clips:
        labels = member.labels
        if num_classes and (labels != sorted(set(labels)) or not all(0 <= i < num_classes for i in labels)):
            what = f"labels {labels} aren't ascending class indices below {num_classes}"
            yield Fault(f"{shard_name(number)}.json", what, member.key, number)


def _compare_index(shards: Shards, number: int, statistics: ShardStatistics) -> Iterator[Fault]:
    """Compare a shard's clips with their rows of index.h5."""
    index = shards.index
    first, end = np.searchsorted(index.shard, [number, number + 1])
    if end - first != len(statistics.clips) or index.shard_bytes[number] != statistics.tar_bytes:
        yield Fault(
            "index.h5", f"lists {end - first} clips of shard {number}, it has {len(statistics.clips)}"
        )
        return
    for clip_id, member in zip(range(int(first), int(end)), statistics.clips, strict=True):
        listed = (index.offset[clip_id], index.num_frames[clip_id], index.crc32[clip_id])
        same = listed == (member.offset, member.num_frames, member.crc32)
        if index.key[clip_id] != member.key.encode() or not same:
            yield Fault("index.h5", f"row {clip_id} isn't the clip of shard {number}", member.key)
        elif shards.labels(clip_id).tolist() != member.labels:
            yield Fault("index.h5", f"row {clip_id} has other labels than shard {number}", member.key)


def _check_whole(shards: Shards, num_shards: int, rejected: list[str]) -> Iterator[Fault]:
    """Check what only all shards together show: keys that stand twice, the index as a whole, the rejected."""
    folder = shards.folder
    keys, counts = np.unique(shards.index.key, return_counts=True)
    for key in keys[counts > 1]:
        yield Fault("index.h5", "the key stands more than once", key.decode())
    statistics = (read_statistics(folder / f"{shard_name(number)}.json") for number in range(num_shards))
    storage = Storage.of(shards.storage.dtype)
    columns, attributes, _ = build_index(statistics, shards.fbank_config, storage, shards.classes)
    with h5py.File(folder / "index.h5", "r") as file:
        for name in sorted({*columns, *file}):
            if name not in columns or name not in file or not np.array_equal(columns[name], file[name][:]):
                yield Fault("index.h5", f"{name} isn't what the shards' statistics give")
        for name, value in attributes.items():
            if file.attrs.get(name) != value:
                yield Fault("index.h5", f"its attribute {name} is {file.attrs.get(name)}, not {value}")
    path = folder / "rejected.jsonl"
    if path.is_file() and path.read_text().splitlines() != rejected:
        yield Fault("rejected.jsonl", "doesn't list what the shards' statistics list")


def find_same_sounds(splits: list[Shards]) -> list[tuple[str, str]]:
    """Find clips that hold the same log-mels, within a split and across; gives pairs of SPLIT/KEY.

    Candidates have the same length and crc32; their bytes are then compared.
    """
    lengths = np.concatenate([shards.index.num_frames for shards in splits]).astype(np.uint64)
    sums = np.concatenate([shards.index.crc32 for shards in splits]).astype(np.uint64)
    split = np.repeat(np.arange(len(splits)), [len(shards) for shards in splits])
    clip = np.concatenate([np.arange(len(shards)) for shards in splits])
    content = lengths << np.uint64(32) | sums
    order = np.argsort(content, kind="stable")
    pairs = []
    for before, after in zip(order[:-1], order[1:], strict=True):
        if content[before] == content[after]:
            ends = [(splits[split[i]], int(clip[i])) for i in (before, after)]
            first, second = (shards.fbank(clip_id) for shards, clip_id in ends)
            if np.array_equal(first, second):
                names = [f"{shards.folder.name}/{shards.keys[clip_id]}" for shards, clip_id in ends]
                pairs.append((names[0], names[1]))
    return pairs
