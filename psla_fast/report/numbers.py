"""Numbers: what is measured -> plain values for JSON, and means with deviations for tables."""

import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt


def plain(value: float | None, digits: int = 5) -> float | None:
    """Round to significant digits; null for what JSON has no number for."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def plain_list(
    values: Iterable[float | None] | npt.NDArray[np.floating], digits: int = 5
) -> list[float | None]:
    """Round each of several values."""
    return [plain(None if value is None else float(value), digits) for value in values]


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Give mean and sample deviation; no deviation of a single value, or where one is infinite."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, None
    return mean, statistics.stdev(values)


def format_spread(values: Sequence[float], digits: int = 3) -> str:
    """Write `0.744`, or `0.744 ± 0.050` for several; a dash for none."""
    if not values:
        return "–"
    mean, deviation = spread(values)
    if not math.isfinite(mean):
        return "∞"
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")
