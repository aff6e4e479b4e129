"""Live: raw PCM as it comes from a microphone or a pipe -> a tagging of the last window, every hop."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from psla_fast.audio import MAX_RATE, MIN_RATE, Waveform, downmix, resample_blocks
from psla_fast.tagger.results import Tagging
from psla_fast.tagger.tagger import Tagger
from psla_fast.tagger.windows import make_window

READ_BYTES = 1 << 16  # at most, at a time
HEADERS = {b"RIFF": "WAV", b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3\x03": "MP3", b"ID3\x04": "MP3"}
MOST_CHANNELS = 64


@dataclass(frozen=True)
class Pcm:
    """How raw samples are written: little-endian, channels interleaved."""

    rate: int = 16000
    format: Literal["s16", "f32"] = "s16"
    channels: int = 1

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not MIN_RATE <= self.rate <= MAX_RATE:
            raise ValueError(f"a PCM rate of {self.rate} Hz can't be; give {MIN_RATE} to {MAX_RATE}.")
        if not 1 <= self.channels <= MOST_CHANNELS:
            raise ValueError(f"PCM of {self.channels} channels can't be; give 1 to {MOST_CHANNELS}.")

    def decode(self, frames: bytes) -> Waveform:
        """Turn whole frames into a mono waveform (samples,)."""
        dtype, scale = ("<i2", 2.0**-15) if self.format == "s16" else ("<f4", 1.0)
        samples: npt.NDArray[np.int16 | np.float32] = np.frombuffer(frames, dtype)
        return downmix(samples.reshape(-1, self.channels), scale)

    @property
    def frame_bytes(self) -> int:
        """Bytes of one sample of all channels."""
        return self.channels * (2 if self.format == "s16" else 4)


def tag_live(
    tagger: Tagger, read: Callable[[int], bytes], pcm: Pcm, source: str = "-"
) -> Generator[Tagging, None, None]:
    """Tag what `read(n)` gives, up to n bytes as soon as there are any, until it gives none.

    Every hop yields the tagging of the last window, or of what there is so far, and the end yields that of a
    last part of a hop. Raises ValueError for an audio file's bytes, and where nothing comes at all.
    """
    cut, rate = tagger.cut, tagger.sample_rate
    parts = [np.empty(0, np.float32)]  # the last window and hop, then what came since
    num_samples = tagged = 0
    for block in resample_blocks(_read_blocks(read, pcm, source), pcm.rate, rate, source):
        for start in range(0, len(block), cut.hop_samples):  # a large block holds several hops
            parts.append(block[start : start + cut.hop_samples])
            num_samples += len(parts[-1])
            if num_samples - tagged >= cut.hop_samples:
                tagged += cut.hop_samples
                held = np.concatenate(parts)
                end = len(held) - (num_samples - tagged)
                yield _tag_window(tagger, held[:end], tagged, source)
                parts = [held[-cut.clip_samples - cut.hop_samples :]]
    if not num_samples:
        raise ValueError(f"{source} holds no sample. Pipe raw PCM into it, as of arecord -t raw.")
    if num_samples > tagged:
        yield _tag_window(tagger, np.concatenate(parts), num_samples, source)


def _tag_window(tagger: Tagger, held: Waveform, num_samples: int, source: str) -> Tagging:
    """Tag the last window of a waveform that ends num_samples after the beginning."""
    window = held[-tagger.cut.clip_samples :]
    made = make_window(0, window, tagger.card.fbank)
    (scored,) = tagger.scorer.score([made], tagger.cut)
    rate = tagger.sample_rate
    return Tagging(
        source,
        len(window) / rate,
        scored.scores.numpy(),
        tagger.classes,
        tagger.thresholds,
        (num_samples - len(window)) / rate,
    )


def _read_blocks(read: Callable[[int], bytes], pcm: Pcm, source: str) -> Iterator[Waveform]:
    """Decode bytes as they come; the part of a frame that ends a piece waits for its rest."""
    rest = read(READ_BYTES)
    while 0 < len(rest) < 4 and (more := read(READ_BYTES)):
        rest += more
    if rest[:4] in HEADERS:
        kind = HEADERS[rest[:4]]
        raise ValueError(f"{source} is a {kind} file; give its name, or raw PCM (ffmpeg -i FILE -f s16le -).")
    more = rest
    while more:
        whole = len(rest) - len(rest) % pcm.frame_bytes
        if whole:
            yield pcm.decode(rest[:whole])
        more = read(READ_BYTES)
        rest = rest[whole:] + more
