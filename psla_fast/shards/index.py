"""Index: the statistics of all shards of a split -> index.h5."""

# N clips of a split

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from psla_fast.classes import Classes
from psla_fast.fbank import FbankConfig
from psla_fast.files import replacing
from psla_fast.shards.spec import FORMAT_VERSION, Storage, shard_name
from psla_fast.shards.writer import Member, ShardStatistics

Column = npt.NDArray[np.generic]


@dataclass(frozen=True)
class SplitStatistics:
    """What a complete split holds; num_frames (N,) are its clips' lengths, class_counts (C,) their labels.

    sums are the sha256 of tars and DALI indices by their names, as their writers computed them.
    """

    num_shards: int
    tar_bytes: int
    num_short: int
    num_frames: npt.NDArray[np.int32]
    class_counts: npt.NDArray[np.int64]
    mean: float
    std: float
    rejected: dict[str, int]
    sums: dict[str, str]


def write_index(
    folder: Path,
    shards: Iterable[ShardStatistics],
    fbank: FbankConfig,
    storage: Storage,
    classes: Classes,
) -> SplitStatistics:
    """Write index.h5 over all shards of a split; `write_sums` then completes it."""
    columns, attributes, statistics = build_index(shards, fbank, storage, classes)
    _write_hdf5(folder / "index.h5", columns, attributes)
    return statistics


def build_index(
    shards: Iterable[ShardStatistics], fbank: FbankConfig, storage: Storage, classes: Classes
) -> tuple[dict[str, Column], dict[str, object], SplitStatistics]:
    """Give index.h5's columns and attributes.

    The fingerprint is a sha256 over keys, frames, checksums, labels, and format, so it changes with any
    content. The statistics are taken one shard at a time: 2M clips need no more than their columns.
    """
    columns = {name: [column] for name, column in _columns([]).items()}
    columns["shard"] = [np.empty(0, "<u4")]
    shard_bytes, known, rejected = [], {}, Counter[str]()
    num_short, log_mel_sum, square_sum = 0, 0.0, 0.0
    for number, shard in enumerate(shards):
        for name, column in _columns(shard.clips).items():
            columns[name].append(column)
        columns["shard"].append(np.full(len(shard.clips), number, dtype="<u4"))
        shard_bytes.append(shard.tar_bytes)
        known[f"{shard_name(number)}.tar"] = shard.tar_sha256
        known[f"{shard_name(number)}.idx"] = shard.idx_sha256
        rejected.update(row["reason"].split(":")[0] for row in shard.rejected)
        num_short += shard.num_short
        log_mel_sum += shard.log_mel_sum
        square_sum += shard.log_mel_square_sum
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    lengths = joined.pop("labels_each")
    joined["indptr"] = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    for name in ("name", "source"):
        joined[f"{name}_indptr"] = np.concatenate([[0], np.cumsum(joined.pop(f"{name}_each"))]).astype("<i8")
    num_values = max(1, int(joined["num_frames"].sum()) * fbank.num_mels)
    mean = log_mel_sum / num_values
    std = float(np.sqrt(max(0.0, square_sum / num_values - mean**2)))
    attributes = {
        "format_version": FORMAT_VERSION,
        "fbank": json.dumps(asdict(fbank)),
        **asdict(storage),
        "mean": mean,
        "std": std,
        "classes": classes.fingerprint,
        "fingerprint": _fingerprint(joined, fbank, storage, classes),
    }
    joined["shard_bytes"] = np.array(shard_bytes, dtype="<i8")
    class_counts = np.bincount(joined["indices"], minlength=len(classes))
    statistics = SplitStatistics(
        len(shard_bytes),
        sum(shard_bytes),
        num_short,
        joined["num_frames"].astype(np.int32),
        class_counts,
        mean,
        std,
        dict(rejected),
        known,
    )
    return joined, attributes, statistics


def _columns(clips: list[Member]) -> dict[str, Column]:
    """Turn a shard's clips into columns; labels concatenated, with how many each clip has."""
    return {
        "key": np.array([member.key.encode() for member in clips], dtype="S"),
        "offset": np.array([member.offset for member in clips], dtype="<i8"),
        "num_frames": np.array([member.num_frames for member in clips], dtype="<i4"),
        "crc32": np.array([member.crc32 for member in clips], dtype="<u4"),
        "indices": np.array([label for member in clips for label in member.labels], dtype="<i4"),
        "labels_each": np.array([len(member.labels) for member in clips], dtype="<i8"),
        **_text_columns("name", [member.name for member in clips]),
        **_text_columns("source", [member.source for member in clips]),
    }


def _text_columns(name: str, texts: list[str]) -> dict[str, Column]:
    """Give texts as their joined bytes and the length of each: a long one doesn't widen all."""
    encoded = [text.encode(errors="surrogateescape") for text in texts]
    return {
        name: np.frombuffer(b"".join(encoded), dtype="u1"),
        f"{name}_each": np.array([len(text) for text in encoded], dtype="<i4"),
    }


def _fingerprint(columns: dict[str, Column], fbank: FbankConfig, storage: Storage, classes: Classes) -> str:
    content = [FORMAT_VERSION, asdict(fbank), asdict(storage), classes.mids]
    digest = hashlib.sha256(json.dumps(content).encode())
    for name in ("key", "shard", "offset", "num_frames", "crc32", "indptr", "indices"):
        digest.update(name.encode() + np.ascontiguousarray(columns[name]).view(np.uint8).tobytes())
    return digest.hexdigest()


def _write_hdf5(path: Path, columns: dict[str, Column], attributes: dict[str, object]) -> None:
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column)
        file.attrs.update(attributes)
