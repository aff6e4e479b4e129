"""Write shards: fbanks and labels -> a tar with DALI index and statistics; those of all -> index.h5."""

# N clips of a split, K clips of a shard

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import h5py
import numpy as np
import numpy.typing as npt

from psla_fast.classes import Classes
from psla_fast.fbank import FbankConfig
from psla_fast.files import write_atomically
from psla_fast.shards.spec import FORMAT_VERSION, TAR_BLOCK, Storage, shard_name


@dataclass(frozen=True)
class Member:
    """One packed clip, as its shard's statistics list it; offset is where its fbank begins in the tar."""

    key: str
    name: str
    source: str
    offset: int
    num_frames: int
    crc32: int
    labels: list[int]


@dataclass
class ShardStatistics:
    """What NNNNN.json holds: the clips, the rejected, and sums of the stored log-mels for mean and std."""

    format_version: int = FORMAT_VERSION
    task: str = ""
    tar_bytes: int = 0
    num_frames: int = 0
    num_short: int = 0
    log_mel_sum: float = 0.0
    log_mel_square_sum: float = 0.0
    clips: list[Member] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)


class ShardWriter:
    """Writes one shard; no file has its final name before `close`, and the statistics get theirs last."""

    def __init__(self, folder: Path, number: int, storage: Storage, task: str) -> None:
        """Open NNNNN.tar.tmp in `folder`; `task`, the fingerprint of what goes in, is kept."""
        self._stem = folder / shard_name(number)
        self._storage = storage
        self._statistics = ShardStatistics(task=task)
        self._index_lines: list[str] = []
        self._temporary = self._stem.with_suffix(".tar.tmp")
        self._tar: BinaryIO = open(self._temporary, "wb")  # noqa: SIM115 - closed by close or __exit__

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Close the file; after an error the half-written shard is removed."""
        self._tar.close()
        if kind is not None:
            self._temporary.unlink(missing_ok=True)

    def add(
        self, key: str, name: str, source: str, fbank: npt.NDArray[np.float32], labels: Sequence[int]
    ) -> None:
        """Append a clip: its log-mels (T, F), unpadded, and its class indices."""
        stored = np.ascontiguousarray(self._storage.encode(fbank))
        payload = stored.tobytes()
        offset = self._append(f"{key}.fbank", payload)
        label_bytes = np.asarray(labels, dtype="<i4").tobytes()
        label_offset = self._append(f"{key}.labels", label_bytes)
        self._index_lines.append(
            f"fbank {offset} {len(payload)} {key}.fbank labels {label_offset} {len(label_bytes)} {key}.labels"
        )
        seen = self._storage.decode(stored).astype(np.float64)
        statistics = self._statistics
        statistics.log_mel_sum += float(seen.sum())
        statistics.log_mel_square_sum += float(np.square(seen).sum())
        statistics.num_frames += len(fbank)
        statistics.clips.append(
            Member(
                key, name, source, offset, len(fbank), zlib.crc32(payload), [int(label) for label in labels]
            )
        )

    def count_short(self) -> None:
        """Count a clip that was shorter than one window and was padded to one frame."""
        self._statistics.num_short += 1

    def reject(self, key: str, source: str, reason: str) -> None:
        """Note a clip that was left out."""
        self._statistics.rejected.append({"key": key, "source": source, "reason": reason})

    def close(self) -> ShardStatistics:
        """Finish the tar, then give tar, index and statistics their names, in this order."""
        self._tar.write(bytes(2 * TAR_BLOCK))
        self._tar.write(bytes(-self._tar.tell() % tarfile.RECORDSIZE))
        self._statistics.tar_bytes = self._tar.tell()
        self._tar.flush()
        os.fsync(self._tar.fileno())
        self._tar.close()
        os.replace(self._temporary, self._stem.with_suffix(".tar"))
        index = "\n".join([f"v1.2 {len(self._index_lines)}", *self._index_lines]) + "\n"
        write_atomically(self._stem.with_suffix(".idx"), index.encode())
        write_atomically(
            self._stem.with_suffix(".json"), json.dumps(asdict(self._statistics), indent=0).encode()
        )
        return self._statistics

    def _append(self, name: str, payload: bytes) -> int:
        """Write a member and return the offset of its payload."""
        info = tarfile.TarInfo(name)
        info.size = len(payload)
        self._tar.write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._tar.tell()
        self._tar.write(payload)
        self._tar.write(bytes(-len(payload) % TAR_BLOCK))
        return offset


def read_statistics(path: Path) -> ShardStatistics:
    """Read a shard's NNNNN.json; raises ValueError that names the file where it is damaged."""
    try:
        fields = json.loads(path.read_bytes())
        fields["clips"] = [Member(**member) for member in fields["clips"]]
        return ShardStatistics(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Delete it and pack again: only this shard is redone."
        ) from error


def write_index(
    folder: Path, shards: Sequence[ShardStatistics], fbank: FbankConfig, storage: Storage, classes: Classes
) -> tuple[float, float]:
    """Write index.h5 over all shards of a split and return its mean and std of the stored log-mels.

    The fingerprint is a sha256 over keys, frames, checksums, labels, and format, so it changes with any
    content.
    """
    clips = [member for shard in shards for member in shard.clips]
    indptr = np.concatenate([[0], np.cumsum([len(member.labels) for member in clips])]).astype(np.int64)
    columns: dict[str, npt.NDArray[np.generic]] = {
        "key": np.array([member.key.encode() for member in clips], dtype="S"),
        "shard": np.repeat(np.arange(len(shards)), [len(shard.clips) for shard in shards]).astype("<u4"),
        "offset": np.array([member.offset for member in clips], dtype="<i8"),
        "num_frames": np.array([member.num_frames for member in clips], dtype="<i4"),
        "crc32": np.array([member.crc32 for member in clips], dtype="<u4"),
        "indptr": indptr,
        "indices": np.array([label for member in clips for label in member.labels], dtype="<i4"),
    }
    digest = hashlib.sha256(
        json.dumps([FORMAT_VERSION, asdict(fbank), asdict(storage), classes.mids]).encode()
    )
    for name, column in columns.items():
        digest.update(name.encode() + column.tobytes())
    num_values = sum(shard.num_frames for shard in shards) * fbank.num_mels
    mean = sum(shard.log_mel_sum for shard in shards) / max(1, num_values)
    variance = sum(shard.log_mel_square_sum for shard in shards) / max(1, num_values) - mean**2
    std = float(np.sqrt(max(0.0, variance)))
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column)
        for name in ("name", "source"):
            text = [getattr(member, name).encode() for member in clips]
            file.create_dataset(name, data=np.array(text, dtype="S"))
        file.create_dataset("shard_bytes", data=np.array([shard.tar_bytes for shard in shards], dtype="<i8"))
        file.attrs.update(
            format_version=FORMAT_VERSION,
            fbank=json.dumps(asdict(fbank)),
            dtype=storage.dtype,
            scale=storage.scale,
            offset=storage.offset,
            mean=mean,
            std=std,
            classes=classes.fingerprint,
            fingerprint=digest.hexdigest(),
        )
    write_atomically(folder / "index.h5", buffer.getvalue())
    return mean, std
