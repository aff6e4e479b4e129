"""Published: PSLA's figures (Gong, Chung, Glass 2021), and whether a run's may be set beside them."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from psla_fast.classes import Classes, find_classes

ENOUGH = 0.85  # of a set's evaluation clips: some of AudioSet's are always gone


@dataclass(frozen=True)
class Published:
    """mAP of EfficientNet-B2 with 4 heads on one data set, by kind of result, and of 10 models together.

    A run on the set has the classes of the packaged list, about eval_clips, and train_clips in between.
    """

    data: str
    class_list: str
    eval_clips: int
    train_clips: tuple[int, int]
    best: float
    wa: float
    ensemble: float
    models: float | None = None


PSLA = (
    Published("AudioSet-2M", "audioset", 20_371, (500_000, 3_000_000), 0.440, 0.444, 0.453, 0.474),
    Published("AudioSet-20k", "audioset", 20_371, (10_000, 30_000), 0.316, 0.319, 0.328, 0.362),
    Published("FSD50K", "fsd50k", 10_231, (30_000, 42_000), 0.559, 0.562, 0.573),
)


def compare_with_psla(
    classes: Classes | None, role: str, scored: Collection[int], trained: Collection[int]
) -> list[dict[str, Any]]:
    """Give each published row, with `reason` why it can't be compared with all runs; empty where it can.

    role says which split is shown; scored and trained are the clips that the runs were scored and trained on:
    where the latter aren't known, the classes and the former decide.
    """
    rows = []
    for figures in PSLA:
        plain = {key: value for key, value in asdict(figures).items() if key != "class_list"}
        rows.append({**plain, "reason": _reason(figures, classes, role, scored, trained)})
    return rows


def _reason(
    figures: Published, classes: Classes | None, role: str, scored: Collection[int], trained: Collection[int]
) -> str:
    if classes is None or set(classes.mids) != set(find_classes(figures.class_list).mids):
        return "other classes"
    if role != "eval":
        return "another split"
    if not scored:
        return "number of clips not known"
    for num_clips in scored:
        if not ENOUGH * figures.eval_clips <= num_clips <= figures.eval_clips:
            return f"other clips: {num_clips:,} instead of {figures.eval_clips:,}"
    least, most = figures.train_clips
    for num_clips in trained:
        if not least <= num_clips <= most:
            return f"trained on other clips: {num_clips:,}"
    return ""
