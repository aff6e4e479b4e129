"""Summary: what the packed splits hold, as a table for people."""

from collections.abc import Sequence
from dataclasses import dataclass

from psla_fast.fbank import PSLA_MEAN, PSLA_STD
from psla_fast.shards.index import SplitStatistics


@dataclass(frozen=True)
class SplitSummary:
    """One split of the closing table; rejected counts clips by the first word of their reason."""

    name: str
    num_clips: int
    num_rows: int
    hours: float
    num_classes: int
    labels_per_clip: float
    num_short: int
    num_shards: int
    num_bytes: int
    mean: float
    std: float
    rejected: dict[str, int]

    @classmethod
    def of(
        cls, name: str, num_rows: int, frame_shift_ms: float, statistics: SplitStatistics
    ) -> "SplitSummary":
        """Sum up a split."""
        num_clips = len(statistics.num_frames)
        return cls(
            name=name,
            num_clips=num_clips,
            num_rows=num_rows,
            hours=int(statistics.num_frames.sum(dtype="i8")) * frame_shift_ms / 3.6e6,
            num_classes=int((statistics.class_counts > 0).sum()),
            labels_per_clip=int(statistics.class_counts.sum()) / max(1, num_clips),
            num_short=statistics.num_short,
            num_shards=statistics.num_shards,
            num_bytes=statistics.tar_bytes,
            mean=statistics.mean,
            std=statistics.std,
            rejected=statistics.rejected,
        )


def format_summaries(summaries: Sequence[SplitSummary], num_classes: int) -> str:
    """Give the closing table, a column a split."""
    rows = [
        ("", [s.name for s in summaries]),
        ("clips", [f"{s.num_clips:,}" for s in summaries]),
        ("of the list", [f"{s.num_clips / max(1, s.num_rows):.1%}" for s in summaries]),
        ("hours", [f"{s.hours:,.2f}" for s in summaries]),
        (f"classes of {num_classes}", [str(s.num_classes) for s in summaries]),
        ("labels a clip", [f"{s.labels_per_clip:.2f}" for s in summaries]),
        ("shards", [f"{s.num_shards:,}" for s in summaries]),
        ("MB", [f"{s.num_bytes / 1e6:,.1f}" for s in summaries]),
        ("log-mel mean", [f"{s.mean:.4f}" for s in summaries]),
        ("log-mel std", [f"{s.std:.4f}" for s in summaries]),
        ("under one window", [str(s.num_short) for s in summaries]),
        ("rejected", [f"{sum(s.rejected.values()):,}" for s in summaries]),
    ]
    reasons = sorted({reason for s in summaries for reason in s.rejected})
    rows += [(f"  {reason}", [f"{s.rejected.get(reason, 0):,}" for s in summaries]) for reason in reasons]
    notes = {
        "log-mel mean": f"   PSLA's AudioSet: {PSLA_MEAN}",
        "log-mel std": f"   PSLA's AudioSet: {PSLA_STD}",
        "under one window": "   padded to one frame",
        "rejected": "   listed in rejected.jsonl" if reasons else "",
    }
    head = max(len(name) for name, _ in rows)
    width = [max(len(cells[column]) for _, cells in rows) for column in range(len(summaries))]
    lines = [
        f"{name:<{head}}  "
        + "  ".join(f"{c:>{w}}" for c, w in zip(cells, width, strict=True))
        + notes.get(name, "")
        for name, cells in rows
    ]
    return "\n".join(lines)
