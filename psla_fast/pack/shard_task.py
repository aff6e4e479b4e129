"""ShardTask: one shard's rows -> its tar, index and statistics; the same bytes wherever it runs."""

import hashlib
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from psla_fast.audio import AudioError
from psla_fast.clip import Clip, Rejected
from psla_fast.fbank import compute_fbank
from psla_fast.pack.config import PackConfig
from psla_fast.pack.recordings import audio_bytes, read_recording
from psla_fast.pack.table import asked_for, decode_row
from psla_fast.shards.spec import Storage, make_key, shard_name
from psla_fast.shards.writer import Origin, ShardStatistics, ShardWriter, read_statistics

STAT_THREADS = 16  # network file systems answer many questions at once


@dataclass(frozen=True)
class ShardTask:
    """Pack `rows` (encoded) of a split whose audio lies under `root` into shard `number` of `folder`.

    scanned: audio that was found and is gone has vanished. again: pack it though it may be finished.
    """

    split: int
    folder: Path
    number: int
    root: Path
    rows: list[bytes]
    config: PackConfig
    scanned: bool = False
    again: bool = False

    @property
    def stem(self) -> Path:
        """The shard's path without suffix."""
        return self.folder / shard_name(self.number)

    @property
    def fingerprint(self) -> str:
        """Hash of the settings and of what is asked for."""
        digest = hashlib.sha256(json.dumps(self.config.settings()).encode())
        for row in self.rows:
            digest.update(asked_for(row))
        return digest.hexdigest()


@dataclass(frozen=True)
class ShardResult:
    """What a worker tells of a shard it has packed."""

    split: int
    number: int
    rows: int
    rejected: int
    tar_bytes: int
    seconds: float
    host: str


def find_finished(task: ShardTask) -> ShardStatistics | None:
    """Give the statistics of a shard that is whole and was packed from this task; None where it isn't."""
    json_path, tar = task.stem.with_suffix(".json"), task.stem.with_suffix(".tar")
    if not json_path.is_file() or not task.stem.with_suffix(".idx").is_file() or not tar.is_file():
        return None
    try:
        statistics = read_statistics(json_path)
    except ValueError:  # damaged: the shard is packed anew
        return None
    whole = tar.stat().st_size == statistics.tar_bytes and statistics.task == task.fingerprint
    return statistics if whole else None


def check_unchanged(task: ShardTask, statistics: ShardStatistics) -> str:
    """Raise ValueError where a recording that a finished shard holds has another size now.

    Gives one of those that aren't there any more, "" where all are.
    """
    packed = {member.name: member for member in statistics.clips}
    clips = [row for row in map(decode_row, task.rows) if isinstance(row, Clip) and row.name in packed]
    gone = ""
    for clip, size in zip(clips, _sizes(task.root, clips), strict=True):
        gone = packed[clip.name].source if size < 0 else gone
        before = packed[clip.name].audio_bytes
        if size not in (-1, before):
            raise ValueError(
                f"{task.folder} was packed from other recordings: {clip.source} had {before} bytes, has "
                f"{size}. Choose another OUT, or delete {task.stem}.json to pack that shard anew."
            )
    return gone


def count_rejected_clips(task: ShardTask, statistics: ShardStatistics) -> int:
    """Count a finished shard's clips whose audio was rejected, and is there to be tried again."""
    packed = {member.name for member in statistics.clips}
    rows = [row for row in map(decode_row, task.rows) if isinstance(row, Clip) and row.name not in packed]
    return sum(size >= 0 for size in _sizes(task.root, rows))


def pack_shard(task: ShardTask) -> ShardResult:
    """Pack one shard; where another process has just done so, its work is taken.

    Raises OSError where the disk is full or the audio vanishes meanwhile; then nothing of the shard is left.
    """
    start = perf_counter()
    num_threads = torch.get_num_threads()
    # the workers share the cores; also keeps the bytes independent of the machine's size
    torch.set_num_threads(1)
    try:
        with ShardWriter(task.folder, task.number, Storage.of(task.config.dtype), task.fingerprint) as writer:
            # by another process, meanwhile
            if not task.again and (statistics := find_finished(task)) is not None:
                writer.discard()
            else:
                _write_clips(task, writer)
                statistics = writer.close()
    except OSError as error:
        path = error.filename or f"{task.stem}.tar"
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        torch.set_num_threads(num_threads)
    return ShardResult(
        task.split,
        task.number,
        len(task.rows),
        len(statistics.rejected),
        statistics.tar_bytes,
        perf_counter() - start,
        socket.gethostname(),
    )


def _write_clips(task: ShardTask, writer: ShardWriter) -> None:
    fbank_config = task.config.fbank
    rows = [decode_row(row) for row in task.rows]
    sizes = _check_there(task, rows)
    for row, size in zip(rows, sizes, strict=True):
        key = make_key(row.name)
        if isinstance(row, Rejected):
            writer.reject(key, row.source, row.reason)
            continue
        try:
            waveform = torch.from_numpy(read_recording(task.root, row, task.config))
        except AudioError as error:
            if audio_bytes(task.root, row) != size or (size < 0 and row.found and task.scanned):
                raise FileNotFoundError(
                    2, "the recording vanished or changed while it was packed", str(task.root / row.source)
                ) from error
            writer.reject(key, row.source, str(error).replace(str(task.root / row.source), row.source))
            continue
        if len(waveform) < fbank_config.window_samples:
            writer.count_short()
        fbank = compute_fbank(waveform, fbank_config).numpy()
        writer.add(Origin(key, row.name, row.source, size), fbank, row.labels)


def _check_there(task: ShardTask, rows: list[Clip | Rejected]) -> list[int]:
    """Give each row's audio size, -1 for none; raise OSError where every recording is gone."""
    clips = [row for row in rows if isinstance(row, Clip)]
    sizes = dict(zip((clip.name for clip in clips), _sizes(task.root, clips), strict=True))
    listed = [clip for clip in clips if clip.found]
    if listed and all(sizes[clip.name] < 0 for clip in listed):
        raise FileNotFoundError(
            2,
            f"none of the {len(listed)} recordings of shard {task.number} is there; is the disk mounted?",
            str(task.root / listed[0].source),
        )
    return [sizes[row.name] if isinstance(row, Clip) else -1 for row in rows]


def _sizes(root: Path, clips: list[Clip]) -> list[int]:
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        return list(pool.map(lambda clip: audio_bytes(root, clip), clips))
