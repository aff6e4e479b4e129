"""Tagging: an uploaded file -> the answer's JSON, within the limits of its length."""

# C classes, T time steps, F mels

import base64
import json
import logging
import math
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from psla_fast.audio import AudioError, Waveform, stream_waveform
from psla_fast.serve.limits import Limits, Refusal
from psla_fast.serve.uploads import Upload
from psla_fast.tagger import Label, Tagger, Tagging, Timeline

MOST_STEPS = 1000  # of an answer's timeline
MOST_COLUMNS = 1024  # of its picture
PICTURE_RANGE = 14.0  # of log power, below a picture's brightest point
FORMATS = "WAV, FLAC, MP3, OGG or AIFF"
SENTENCES = {
    "empty": "The recording holds no sound: it has no samples. Choose another one.",
    "silent": "The recording is silent: every sample is 0. Choose another one.",
    "dc_only": "The recording is silent: every sample is the same. Choose another one.",
    "non_finite": "The recording holds samples that are no numbers, or absurdly large. Export it again.",
}

log = logging.getLogger("psla_fast.serve")


class Desk:
    """A tagger behind the limits; its methods may run in several threads at a time."""

    def __init__(self, tagger: Tagger, limits: Limits) -> None:
        """Take a tagger; one whose model has no activity over time gives answers without timelines."""
        self.tagger, self.limits = tagger, limits
        try:
            tagger.scorer.check_activity()
            self.has_timeline = True
        except ValueError:
            self.has_timeline = False
        self._busy: set[int] = set()  # threads

    @property
    def is_busy(self) -> bool:
        """Tell whether a recording is being tagged."""
        return bool(self._busy)

    def warm_up(self) -> None:
        """Tag a second of noise."""
        noise = np.random.default_rng(0).standard_normal(self.tagger.sample_rate).astype(np.float32)
        self._tag(0.1 * noise)

    def answer(self, upload: Upload, with_picture: bool) -> bytes:
        """Tag an upload and close it: JSON. Raises Refusal for what can't be tagged."""
        start = time.perf_counter()
        self._busy.add(threading.get_ident())
        try:
            with upload.file:
                waveform = self._decode(upload.file)
            timeline, tagging = self._tag(waveform)
        finally:
            self._busy.discard(threading.get_ident())
        elapsed = time.perf_counter() - start
        log.info("tagged %r: %.1f s of sound in %.2f s", upload.name, tagging.seconds, elapsed)
        top = tagging.top(self.limits.top)
        content: dict[str, Any] = {
            "name": upload.name,
            "seconds": round(tagging.seconds, 3),
            "tagged_in_seconds": round(elapsed, 3),
            "top": [_plain(label) for label in top],
        }
        if tagging.thresholds is not None:
            content["labels"] = [_plain(label) for label in tagging.labels]
        if timeline is not None:
            content["timeline"] = _plain_timeline(timeline, top)
            if with_picture:
                fbank = self.tagger.card.fbank
                content["picture"] = _plain_picture(timeline) | {
                    "low_hz": fbank.low_freq,
                    "high_hz": fbank.sample_rate / 2,
                }
        return json.dumps(content, allow_nan=False).encode()

    def _tag(self, waveform: Waveform) -> tuple[Timeline | None, Tagging]:
        try:
            if self.has_timeline:
                timeline = self.tagger.timeline(waveform, self.tagger.sample_rate)
                tagging = timeline.tagging
            else:
                timeline, (tagging,) = None, self.tagger([waveform], self.tagger.sample_rate)
        except RuntimeError as error:  # torch's, for instance out of memory
            log.exception("the model failed")
            raise Refusal(500, "The model failed on this recording; the server's log says why.") from error
        if not np.isfinite(tagging.scores).all():
            log.error("the model's scores are not finite")
            raise Refusal(500, "The model gave no usable scores for this recording.")
        return timeline, tagging

    def _decode(self, file: IO[bytes]) -> Waveform:
        """Decode to a waveform (samples,) at the model's rate, and no further than max_seconds."""
        rate, parts, num_samples = self.tagger.sample_rate, [], 0
        most = math.ceil(self.limits.max_seconds * rate)
        try:
            with _as_path(file) as path:
                for block in stream_waveform(path, rate):
                    num_samples += len(block)
                    if num_samples > most:
                        raise Refusal(
                            413,
                            f"The recording is longer than {self.limits.max_seconds:g} seconds. Cut it, "
                            "or use psla-fast tag, which has no limit.",
                        )
                    parts.append(block)
        except AudioError as error:
            raise Refusal(422, _explain(error, str(path))) from error
        return np.concatenate(parts)


@contextmanager
def _as_path(file: IO[bytes]) -> Iterator[Path]:
    """Give a nameless file a path as long as it is open, with the suffix that its decoder needs."""
    opened = f"/proc/self/fd/{file.fileno()}"
    file.seek(0)
    suffix = find_av_suffix(file.read(16))
    if not suffix:
        yield Path(opened)
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"recording{suffix}"
        link.symlink_to(opened)
        yield link


def find_av_suffix(head: bytes) -> str:
    """Give the suffix of a file that PyAV decodes, by its first bytes; empty for any other."""
    if head[4:8] == b"ftyp":
        return ".m4a"
    if head.startswith(b"\x1a\x45\xdf\xa3"):  # EBML
        return ".webm"
    is_adts = len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0  # MP3's layer is never 0
    return ".aac" if is_adts else ""


def _explain(error: AudioError, path: str) -> str:
    """Say in a sentence for the sender what is wrong with a recording."""
    if error.reason in SENTENCES:
        return SENTENCES[error.reason]
    detail = str(error).removeprefix(f"{error.reason}: ").replace(f"{path}: ", "").replace(path, "it")
    detail = " ".join(detail.split()).removeprefix("Error : ").rstrip(".")[:200]
    return f"This can't be read as audio ({detail}). Choose a {FORMATS} file."


def _plain(label: Label) -> dict[str, Any]:
    return {"mid": label.mid, "name": label.name, "score": round(label.score, 5)}


def _plain_timeline(timeline: Timeline, top: list[Label]) -> dict[str, Any]:
    """Give the activity of the top classes; of a long sound, the highest of a few neighbouring steps."""
    activity = timeline.activity[[label.index for label in top]]
    factor = math.ceil(activity.shape[1] / MOST_STEPS)
    starts = np.arange(0, activity.shape[1], factor)
    coarse = np.maximum.reduceat(activity, starts, axis=1)
    return {
        "step_seconds": timeline.step_seconds * factor,
        "classes": [label.name for label in top],
        "activity": [[round(value, 3) for value in row] for row in coarse.tolist()],
    }


def _plain_picture(timeline: Timeline) -> dict[str, Any]:
    """Give the log-mels as bytes (columns, F), 255 the loudest, in base64."""
    factor = math.ceil(len(timeline.fbank) / MOST_COLUMNS)
    starts = np.arange(0, len(timeline.fbank), factor)
    counts = np.diff(np.append(starts, len(timeline.fbank)))[:, None]
    mels = np.add.reduceat(timeline.fbank, starts, axis=0) / counts
    shade = 255 * (1 - (mels.max() - mels) / PICTURE_RANGE)
    pixels = np.clip(shade, 0, 255).astype(np.uint8)
    return {
        "step_seconds": timeline.fbank_step_seconds * factor,
        "num_mels": pixels.shape[1],
        "pixels": base64.b64encode(pixels.tobytes()).decode(),
    }
