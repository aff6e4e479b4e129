"""Memory: how much of the host's this process may take."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

GROUPS = Path("/sys/fs/cgroup")


class _Version(NamedTuple):
    """Where a version of Linux's control groups says what."""

    controller: str
    root: Path
    limit: str
    used: str
    cached: str


VERSIONS = (
    _Version("", GROUPS, "memory.max", "memory.current", "file"),
    _Version("memory", GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
)


def available_memory() -> int:
    """Bytes that this process may take: the machine's, or less where its control groups leave less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for version, group in _control_groups():
        limit = (group / version.limit).read_text().strip()
        if limit != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            in_use = int((group / version.used).read_text()) - int(stat.get(version.cached, 0))
            available = min(available, int(limit) - in_use)  # cached files give way
    return max(0, available)


def _control_groups() -> Iterator[tuple[_Version, Path]]:
    """Yield the control group of this process, and those around it, that may limit its memory."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for version in VERSIONS:
            if version.controller in controllers.split(","):
                group = version.root / path.lstrip("/")
                for folder in (group, *group.parents):
                    if folder.is_relative_to(version.root) and (folder / version.limit).is_file():
                        yield version, folder
