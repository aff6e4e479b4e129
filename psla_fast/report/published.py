"""Published: PSLA's figures (Gong, Chung, Glass 2021), and whether a run's may be set beside them."""

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
    classes: Classes | None, role: str, num_clips: int, num_train: int | None
) -> list[dict[str, Any]]:
    """Give each published row, with `reason` why it can't be compared with a run; empty where it can.

    role says which split is shown, num_clips its size, num_train the training clips (None: not known).
    """
    rows = []
    for figures in PSLA:
        reason = _reason(figures, classes, role, num_clips, num_train)
        plain = {key: value for key, value in asdict(figures).items() if key not in ("class_list",)}
        rows.append({**plain, "reason": reason})
    return rows


def _reason(
    figures: Published, classes: Classes | None, role: str, num_clips: int, num_train: int | None
) -> str:
    if classes is None or set(classes.mids) != set(find_classes(figures.class_list).mids):
        return "other classes"
    if role != "eval":
        return "another split"
    if not ENOUGH * figures.eval_clips <= num_clips <= figures.eval_clips:
        return f"other clips: {num_clips:,} instead of {figures.eval_clips:,}"
    least, most = figures.train_clips
    if num_train is not None and not least <= num_train <= most:
        return f"trained on other clips: {num_train:,}"
    return ""
