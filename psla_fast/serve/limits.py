"""Limits: what the server takes in, and how it says that something is too much or of no use."""

from dataclasses import dataclass

MEGABYTE = 2**20


class Refusal(ValueError):
    """An answer other than 200: its HTTP status and the sentence that tells a person what to do."""

    def __init__(self, status: int, sentence: str) -> None:
        """Keep the status apart from the sentence."""
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What one recording, and what all of them together, may take."""

    max_mb: float = 50
    """Bytes of a file, in units of 2**20."""
    max_seconds: float = 600
    """Length of a recording; a longer one is decoded to there only, and refused."""
    top: int = 10
    """Classes that an answer tells of, the highest scores first."""
    parallel: int = 2
    """Recordings decoded and scored at a time."""
    queue: int = 64
    """Recordings that wait, beside those; one more is answered with 503. Their files lie on the disk."""
    patience_seconds: float = 15
    """Time for a request's head, and for each piece of its body."""
    min_bytes_per_second: float = 32_000
    """An upload that is slower than this after its first 20 seconds is given up."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name, least in (("top", 1), ("parallel", 1), ("queue", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}; give {least} or more.")
        for name in ("max_mb", "max_seconds"):
            if not 0 < getattr(self, name) <= 1e6:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is {getattr(self, name):g}; give more than 0, up to 1000000.")

    @property
    def max_bytes(self) -> int:
        """Bytes of a file."""
        return round(self.max_mb * MEGABYTE)
