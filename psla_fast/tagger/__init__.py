"""Inference: audio files, arrays and streams of any length -> class scores and their course over time."""

from psla_fast.metrics import compute_thresholds
from psla_fast.tagger.results import Failure, Label, Tagging, Timeline
from psla_fast.tagger.tagger import Tagger
from psla_fast.tagger.windows import Windowing

__all__ = ["Failure", "Label", "Tagger", "Tagging", "Timeline", "Windowing", "compute_thresholds"]
