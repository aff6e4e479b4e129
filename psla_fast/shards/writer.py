"""Write one shard: fbanks and labels -> a tar, its DALI index, and its statistics."""

import contextlib
import fcntl
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from psla_fast.files import write_atomically
from psla_fast.shards.spec import FORMAT_VERSION, TAR_BLOCK, Storage, shard_name


@dataclass(frozen=True)
class Origin:
    """Where a packed clip comes from: its key, its original name, its audio and the size of that file."""

    key: str
    name: str
    source: str
    audio_bytes: int = 0


@dataclass(frozen=True)
class Member:
    """One packed clip, as its shard's statistics list it.

    offset is where its fbank begins in the tar; audio_bytes the size of the file it was read from.
    """

    key: str
    name: str
    source: str
    audio_bytes: int
    offset: int
    num_bytes: int
    num_frames: int
    crc32: int
    labels: list[int]


@dataclass
class ShardStatistics:
    """What NNNNN.json holds: the clips, the rejected, and sums of the stored log-mels for mean and std."""

    format_version: int = FORMAT_VERSION
    task: str = ""
    tar_bytes: int = 0
    tar_sha256: str = ""
    idx_sha256: str = ""
    num_frames: int = 0
    num_short: int = 0
    log_mel_sum: float = 0.0
    log_mel_square_sum: float = 0.0
    clips: list[Member] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)


class ShardWriter:
    """Writes one shard; no file has its final name before `close`, and the statistics get theirs last.

    While it writes it holds a lock on NNNNN.tar.tmp, so that a worker that outlives a killed pack and one of
    the next pack never write the same shard at once.
    """

    def __init__(self, folder: Path, number: int, storage: Storage, task: str) -> None:
        """Open NNNNN.tar.tmp in `folder`; `task`, the fingerprint of what goes in, is kept."""
        self._stem = folder / shard_name(number)
        self._storage = storage
        self._statistics = ShardStatistics(task=task)
        self._index_lines: list[str] = []
        self._digest = hashlib.sha256()
        self._temporary = self._stem.with_suffix(".tar.tmp")
        self._tar = _open_locked(self._temporary)
        self._lock = os.dup(self._tar.fileno())  # a lock lasts as long as one of its descriptors

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Close the file; after an error the half-written shard is removed."""
        try:
            if kind is not None:
                self.discard()
            self._tar.close()
        except OSError:
            if kind is None:
                raise  # else the full disk that was the error just says it again
        finally:
            os.close(self._lock)

    def discard(self) -> None:
        """Remove what was written so far."""
        self._temporary.unlink(missing_ok=True)

    def add(self, origin: Origin, fbank: npt.NDArray[np.float32], labels: Sequence[int]) -> None:
        """Append a clip: where it comes from, its log-mels (T, F), unpadded, and its class indices."""
        stored = np.ascontiguousarray(self._storage.encode(fbank))
        payload, key = stored.tobytes(), origin.key
        offset = self._append(f"{key}.fbank", payload)
        label_bytes = np.asarray(labels, dtype="<i4").tobytes()
        label_offset = self._append(f"{key}.labels", label_bytes)
        self._index_lines.append(
            f"fbank {offset} {len(payload)} {key}.fbank labels {label_offset} {len(label_bytes)} {key}.labels"
        )
        seen = self._storage.decode(stored).astype(np.float64).ravel()
        statistics = self._statistics
        statistics.log_mel_sum += float(seen.sum())
        statistics.log_mel_square_sum += float(np.square(seen, out=seen).sum())
        statistics.num_frames += len(fbank)
        statistics.clips.append(
            Member(
                **asdict(origin),
                offset=offset,
                num_bytes=len(payload),
                num_frames=len(fbank),
                crc32=zlib.crc32(payload),
                labels=[int(label) for label in labels],
            )
        )

    def count_short(self) -> None:
        """Count a clip that was shorter than one window and was padded to one frame."""
        self._statistics.num_short += 1

    def reject(self, key: str, source: str, reason: str) -> None:
        """Note a clip that was left out."""
        self._statistics.rejected.append({"key": key, "source": source, "reason": reason})

    def close(self) -> ShardStatistics:
        """Finish the tar, then give tar, index and statistics their names, in this order.

        The statistics of an earlier shard of this number are removed first: they wouldn't fit the new tar.
        """
        self._write(bytes(2 * TAR_BLOCK))
        self._write(bytes(-self._tar.tell() % tarfile.RECORDSIZE))
        self._statistics.tar_bytes = self._tar.tell()
        self._statistics.tar_sha256 = self._digest.hexdigest()
        self._tar.flush()
        os.fsync(self._tar.fileno())
        self._tar.close()
        self._stem.with_suffix(".json").unlink(missing_ok=True)
        os.replace(self._temporary, self._stem.with_suffix(".tar"))
        index = ("\n".join([f"v1.2 {len(self._index_lines)}", *self._index_lines]) + "\n").encode()
        self._statistics.idx_sha256 = hashlib.sha256(index).hexdigest()
        write_atomically(self._stem.with_suffix(".idx"), index)
        write_atomically(self._stem.with_suffix(".json"), _format_statistics(asdict(self._statistics)))
        return self._statistics

    def _append(self, name: str, payload: bytes) -> int:
        """Write a member and return the offset of its payload."""
        info = tarfile.TarInfo(name)
        info.size = len(payload)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._tar.tell()
        self._write(payload)
        self._write(bytes(-len(payload) % TAR_BLOCK))
        return offset

    def _write(self, content: bytes) -> None:
        self._digest.update(content)
        self._tar.write(content)


def _open_locked(path: Path) -> BinaryIO:
    """Open a file empty and locked for this process; waits for another one that has it."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):  # the other one gave it its final name, or removed it
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                return file
        file.close()


def _format_statistics(fields: dict[str, Any]) -> bytes:
    """Give the JSON of a shard's statistics, with a checksum of itself."""
    text = json.dumps(fields, indent=0)
    return json.dumps({**fields, "checksum": hashlib.sha256(text.encode()).hexdigest()}, indent=0).encode()


def read_statistics(path: Path) -> ShardStatistics:
    """Read a shard's NNNNN.json; raises ValueError that names the file where it is damaged."""
    try:
        content = path.read_bytes()
        fields = json.loads(content)
        fields.pop("checksum")
        if _format_statistics(fields) != content:
            raise ValueError("its checksum differs")
        fields["clips"] = [Member(**member) for member in fields["clips"]]
        return ShardStatistics(**fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Delete it and pack again: only this shard is redone."
        ) from error
