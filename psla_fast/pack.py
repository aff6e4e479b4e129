"""Pack: Clips -> shards, each an independent, deterministic task, so that a killed pack can go on."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import joblib
import numpy as np
import torch
from tqdm import tqdm

from psla_fast.audio import AudioError, read_duration, read_waveform
from psla_fast.classes import Classes, format_classes
from psla_fast.clip import Clip
from psla_fast.fbank import PSLA_MEAN, PSLA_STD, FbankConfig, compute_fbank
from psla_fast.files import write_atomically
from psla_fast.shards.spec import FORMAT_VERSION, DtypeName, Storage, make_key, shard_name
from psla_fast.shards.writer import ShardStatistics, ShardWriter, read_statistics, write_index
from psla_fast.sources import Split

FEWEST_SHARDS, FEWEST_CLIPS_A_SHARD = 8, 16  # so that several workers share a small set too
MEASURED_CLIPS = 512  # whose headers are read to estimate the size of a clip


@dataclass(frozen=True)
class PackConfig:
    """How clips become shards."""

    workers: int = field(default_factory=joblib.cpu_count)
    """Worker processes; the default is one a core."""
    shard_mb: float = 64.0
    """Size of a shard in MB (10^6 bytes), about; small sets get at least 8 shards."""
    dtype: DtypeName = "float16"
    """How log-mels are stored; uint8 halves the size and rounds to steps of 0.11."""
    seed: int = 0
    """Shuffles the clips across the shards, so that sequential readers see mixed classes."""
    max_rejected_fraction: float = 0.01
    """Largest share of a split's clips that may be left out (missing, undecodable, …) before it is an
    error."""
    fbank: FbankConfig = FbankConfig()

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.workers < 1:
            raise ValueError(f"--workers is {self.workers}; give 1 or more.")
        if not self.shard_mb > 0:
            raise ValueError(f"--shard-mb is {self.shard_mb}; give a size above 0.")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; give 0 or more.")
        if not 0 <= self.max_rejected_fraction <= 1:
            raise ValueError(
                f"--max-rejected-fraction is {self.max_rejected_fraction}; give a number from 0 to 1."
            )


@dataclass(frozen=True)
class SplitSummary:
    """What a packed split holds, for the closing lines."""

    name: str
    num_clips: int
    num_frames: int
    num_short: int
    num_shards: int
    num_bytes: int
    mean: float
    std: float
    rejected: dict[str, int]

    def lines(self, frame_shift_ms: float) -> Iterable[str]:
        """Say it in two or three lines."""
        hours = self.num_frames * frame_shift_ms / 3.6e6
        yield (
            f"{self.name:<6} {self.num_clips} clips, {hours:.2f} h, {self.num_shards} shards, "
            f"{self.num_bytes / 1e6:.1f} MB, {self.num_short} shorter than one window (padded to one frame)"
        )
        if self.rejected:
            listed = ", ".join(f"{count} {reason}" for reason, count in sorted(self.rejected.items()))
            yield f"       rejected {sum(self.rejected.values())}: {listed} (rejected.jsonl)"
        measured = f"log-mel mean {self.mean:.4f}, std {self.std:.4f}"
        yield f"       {measured} (PSLA's AudioSet: {PSLA_MEAN}, {PSLA_STD})"


def pack_splits(classes: Classes, splits: list[Split], out: Path, config: PackConfig) -> list[SplitSummary]:
    """Pack every split into OUT/<split> and the class list into OUT/classes.csv; finished shards are kept.

    Raises ValueError where OUT was packed from other input or settings, or too many clips are rejected.
    """
    text = format_classes(classes).encode()
    if (out / "classes.csv").is_file() and (out / "classes.csv").read_bytes() != text:
        raise ValueError(f"{out}/classes.csv lists other classes than this source. Choose another OUT.")
    for split in splits:
        (out / split.name).mkdir(parents=True, exist_ok=True)
        _write_rejected(
            out / split.name, _rejected_rows(split), len(split.clips) + len(split.rejected), config
        )
        if not split.clips:
            raise ValueError(f"split {split.name} has no clip. Check the data set's CSV files.")
    write_atomically(out / "classes.csv", text)
    return [_pack_split(split, out / split.name, classes, config) for split in splits]


def _pack_split(split: Split, folder: Path, classes: Classes, config: PackConfig) -> SplitSummary:
    num_shards = _plan(split, folder, config)
    order = np.random.Generator(np.random.PCG64(config.seed)).permutation(len(split.clips))
    chunks = [[split.clips[i] for i in part] for part in np.array_split(order, num_shards)]
    tasks = [(folder, number, chunk, config) for number, chunk in enumerate(chunks)]
    done = [_is_done(*task) for task in tasks]
    waiting = [task for task, finished in zip(tasks, done, strict=True) if not finished]
    with tqdm(total=len(split.clips), desc=f"pack {split.name}", unit="clip", disable=None) as bar:
        bar.update(sum(len(task[2]) for task, finished in zip(tasks, done, strict=True) if finished))
        workers = joblib.Parallel(
            n_jobs=min(config.workers, max(1, len(waiting))), return_as="generator_unordered"
        )
        for num_done in workers(joblib.delayed(_pack_shard)(*task) for task in waiting):
            bar.update(num_done)
    shards = [read_statistics(folder / f"{shard_name(number)}.json") for number in range(num_shards)]
    rejected = _rejected_rows(split) + [row for shard in shards for row in shard.rejected]
    _write_rejected(folder, rejected, len(split.clips) + len(split.rejected), config)
    mean, std = write_index(folder, shards, config.fbank, Storage.of(config.dtype), classes)
    return SplitSummary(
        name=split.name,
        num_clips=sum(len(shard.clips) for shard in shards),
        num_frames=sum(shard.num_frames for shard in shards),
        num_short=sum(shard.num_short for shard in shards),
        num_shards=num_shards,
        num_bytes=sum(shard.tar_bytes for shard in shards),
        mean=mean,
        std=std,
        rejected=dict(Counter(row["reason"].split(":")[0] for row in rejected)),
    )


def _rejected_rows(split: Split) -> list[dict[str, str]]:
    return [
        {"key": make_key(clip.name), "source": clip.source, "reason": clip.reason} for clip in split.rejected
    ]


def _write_rejected(folder: Path, rows: list[dict[str, str]], num_clips: int, config: PackConfig) -> None:
    """Write rejected.jsonl; raise ValueError where it lists more than the allowed share."""
    path = folder / "rejected.jsonl"
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    if len(rows) > config.max_rejected_fraction * num_clips:
        raise ValueError(
            f"split {folder.name}: {len(rows)} of {num_clips} clips rejected, more than "
            f"--max-rejected-fraction {config.max_rejected_fraction:g}. See {path}; mend the source, "
            "or raise the fraction."
        )


def _settings(config: PackConfig) -> dict[str, object]:
    """Give what decides the bytes of a shard, beside its clips."""
    return {
        "format_version": FORMAT_VERSION,
        "shard_mb": config.shard_mb,
        "dtype": config.dtype,
        "seed": config.seed,
        "fbank": asdict(config.fbank),
    }


def _fingerprint(clips: Iterable[Clip]) -> str:
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(json.dumps([clip.name, clip.source, clip.labels]).encode())
    return digest.hexdigest()


def _plan(split: Split, folder: Path, config: PackConfig) -> int:
    """Return the number of shards: from pack.json where the folder was begun, else estimated."""
    plan: dict[str, object] = {"settings": _settings(config), "clips": _fingerprint(split.clips)}
    path = folder / "pack.json"
    if path.is_file():
        try:
            before = json.loads(path.read_bytes())
            num_shards = int(before.pop("num_shards"))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}). Choose another OUT, or delete this folder."
            ) from error
        if before != plan:
            was = before.get("settings", {})
            changed = [
                f"{k} was {was.get(k)}, is {v}" for k, v in _settings(config).items() if was.get(k) != v
            ]
            what = "; ".join(changed) or "its list of clips differs"
            raise ValueError(
                f"{folder} was packed otherwise: {what}. Choose another OUT, or delete this folder."
            )
        return num_shards
    rng = np.random.Generator(np.random.PCG64(config.seed))
    measured = rng.choice(len(split.clips), size=min(MEASURED_CLIPS, len(split.clips)), replace=False)
    seconds = np.mean([read_duration(split.clips[i].path) for i in measured])
    bytes_per_frame = config.fbank.num_mels * Storage.of(config.dtype).numpy.itemsize
    clip_bytes = 2048 + seconds * 1000 / config.fbank.frame_shift_ms * bytes_per_frame
    wanted = int(np.ceil(clip_bytes * len(split.clips) / (config.shard_mb * 1e6)))
    num_shards = max(wanted, min(FEWEST_SHARDS, -(-len(split.clips) // FEWEST_CLIPS_A_SHARD)))
    num_shards = min(num_shards, len(split.clips))
    write_atomically(path, json.dumps({**plan, "num_shards": num_shards}, indent=1).encode())
    return num_shards


def _task(clips: list[Clip], config: PackConfig) -> str:
    """Fingerprint what goes into a shard; file sizes too, so that exchanged audio is packed anew."""
    sizes = [clip.path.stat().st_size if clip.path.is_file() else -1 for clip in clips]
    return hashlib.sha256(json.dumps([_settings(config), _fingerprint(clips), sizes]).encode()).hexdigest()


def _is_done(folder: Path, number: int, clips: list[Clip], config: PackConfig) -> bool:
    """Tell whether a shard is whole: statistics and tar are there, of this task, and of equal size."""
    stem = folder / shard_name(number)
    if not stem.with_suffix(".json").is_file() or not stem.with_suffix(".idx").is_file():
        return False
    statistics: ShardStatistics = read_statistics(stem.with_suffix(".json"))
    tar = stem.with_suffix(".tar")
    whole = tar.is_file() and tar.stat().st_size == statistics.tar_bytes
    mendable = bool(statistics.rejected)  # is packed anew: the recordings may have been mended since
    return whole and not mendable and statistics.task == _task(clips, config)


def _pack_shard(folder: Path, number: int, clips: list[Clip], config: PackConfig) -> int:
    """Write one shard and return how many clips it took in, rejected ones included."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # the workers share the cores; also keeps the bytes independent of the machine's size
    try:
        with ShardWriter(folder, number, Storage.of(config.dtype), _task(clips, config)) as writer:
            for clip in clips:
                key = make_key(clip.name)
                try:
                    waveform = torch.from_numpy(read_waveform(clip.path, config.fbank.sample_rate))
                except AudioError as error:
                    writer.reject(key, clip.source, str(error).replace(str(clip.path), clip.source))
                    continue
                if len(waveform) < config.fbank.window_samples:
                    writer.count_short()
                fbank = compute_fbank(waveform, config.fbank).numpy()
                writer.add(key, clip.name, clip.source, fbank, clip.labels)
            writer.close()
    finally:
        torch.set_num_threads(num_threads)
    return len(clips)
