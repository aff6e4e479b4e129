"""PackConfig: what a pack's bytes depend on; WorkConfig: how the work is done, which changes no byte."""

import re
from dataclasses import asdict, dataclass, field
from typing import Literal

import joblib

from psla_fast.fbank import FbankConfig
from psla_fast.shards.spec import FORMAT_VERSION, DtypeName

EngineName = Literal["loky", "dask", "ray"]


@dataclass(frozen=True)
class PackConfig:
    """How clips become shards."""

    shard_mb: float = 64.0
    """Size of a shard in MB (10^6 bytes), about; small sets get at least 8 shards."""
    dtype: DtypeName = "float16"
    """How log-mels are stored; uint8 halves the size and rounds to steps of 0.11."""
    seed: int = 0
    """Shuffles the clips across the shards, so that sequential readers see mixed classes."""
    max_clip_seconds: float = 600.0
    """Longer clips are rejected as too_long; cut them by a table's start and end."""
    max_rejected_fraction: float = 0.01
    """Largest share of a split's clips that may be left out (undecodable, silent, missing …) before it is an
    error. AudioSet's missing clips don't count: its videos get deleted."""
    fbank: FbankConfig = FbankConfig()

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not self.shard_mb > 0:
            raise ValueError(f"--shard-mb is {self.shard_mb}; give a size above 0.")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; give 0 or more.")
        if not 0 < self.max_clip_seconds <= 86400:
            raise ValueError(f"--max-clip-seconds is {self.max_clip_seconds}; give up to 86400, above 0.")
        if not 0 <= self.max_rejected_fraction <= 1:
            raise ValueError(
                f"--max-rejected-fraction is {self.max_rejected_fraction}; give a number from 0 to 1."
            )

    def settings(self) -> dict[str, object]:
        """Give what decides the bytes of a shard, beside its clips."""
        return {
            "format_version": FORMAT_VERSION,
            "shard_mb": float(self.shard_mb),
            "dtype": self.dtype,
            "seed": self.seed,
            "max_clip_seconds": float(self.max_clip_seconds),
            "fbank": asdict(self.fbank),
        }


@dataclass(frozen=True)
class WorkConfig:
    """How the shards are shared out; none of it changes what is packed."""

    workers: int = field(default_factory=joblib.cpu_count)
    """Worker processes; the default is one a core. A cluster given by --address has its own."""
    engine: EngineName = "loky"
    """loky: processes of this machine; dask, ray: a cluster's, which must see the audio and OUT."""
    address: str = ""
    """Address of the dask scheduler (tcp://host:8786) or the ray cluster; none: one is started here."""
    part: str = "1/1"
    """Pack only part i of n (i/n), for Slurm arrays; `pack merge OUT` completes the set when all are done."""
    retry_rejected: bool = False
    """Try the clips again that an earlier pack of this folder rejected."""
    plots: bool = False
    """Draw histograms of class counts and clip lengths as PNG into each split's folder."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.workers < 1:
            raise ValueError(f"--workers is {self.workers}; give 1 or more.")
        match = re.fullmatch(r"(\d+)/(\d+)", self.part)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"--part is {self.part!r}; give i/n, for instance 1/8 up to 8/8.")
        if self.address and self.engine == "loky":
            raise ValueError("--address needs --engine dask or ray; loky works on this machine alone.")

    @property
    def is_part(self) -> bool:
        """Tell whether others pack the rest."""
        return self.part != "1/1"

    def takes(self, number: int) -> bool:
        """Tell whether shard `number` belongs to this part."""
        part, parts = map(int, self.part.split("/"))
        return number % parts == part - 1
