"""Whatever the bytes are: a finite waveform or an AudioError, in little time and memory."""

import io
import time
import tracemalloc
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from psla_fast.audio import AudioError, Waveform, read_duration, read_waveform

FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("WAV", "MS_ADPCM"),
    ("AIFF", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]
REASONS = {"undecodable", "empty", "non_finite", "silent", "dc_only", "too_long"}


@lru_cache(maxsize=64)
def whole_file(format: str, subtype: str, num_channels: int) -> bytes:
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, (6000, num_channels))
    stream = io.BytesIO()
    soundfile.write(stream, audio, 16000, format=format, subtype=subtype)
    return stream.getvalue()


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A small valid file with bytes replaced, inserted, deleted or cut off, mostly in its header."""
    content = bytearray(whole_file(*draw(st.sampled_from(FORMATS)), draw(st.sampled_from([1, 2]))))
    for _ in range(draw(st.integers(1, 6))):
        last = draw(st.sampled_from([min(len(content), 120), len(content)]))
        at = draw(st.integers(0, last))
        kind = draw(st.sampled_from(["replace", "insert", "delete", "cut"]))
        if kind == "cut":
            del content[at:]
        elif kind == "delete":
            del content[at : at + draw(st.integers(1, 100))]
        else:
            some = draw(
                st.sampled_from([b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f"]) | st.binary(max_size=20)
            )
            content[at : at + (len(some) if kind == "replace" else 0)] = some
    return bytes(content)


def read(file: bytes | Path, start_seconds: float, end_seconds: float | None) -> Waveform | str:
    """A waveform, or the reason of an AudioError; nothing else, within 64 MB and 5 s."""
    began = time.thread_time()
    tracemalloc.reset_peak()
    try:
        result: Waveform | str = read_waveform(file, start_seconds=start_seconds, end_seconds=end_seconds)
    except AudioError as error:
        result = error.reason
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    assert time.thread_time() - began < 5
    return result


def check(file: bytes | Path, start_seconds: float, end_seconds: float | None) -> None:
    result = read(file, start_seconds, end_seconds)
    if isinstance(result, str):
        assert result in REASONS
    else:
        assert result.dtype == np.float32
        assert result.ndim == 1
        assert len(result) > 0
        assert np.isfinite(result).all()


@pytest.fixture(scope="module", autouse=True)
def _traced_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


cuts = st.tuples(st.sampled_from([0.0, 0.1, 0.3, 5.0]), st.sampled_from([None, 0.35, 7.0]))


@settings(max_examples=300, deadline=None)
@given(damaged_files(), cuts)
def test_a_damaged_file_gives_a_waveform_or_an_audio_error(
    content: bytes, cut: tuple[float, float | None]
) -> None:
    check(content, *cut)


@settings(max_examples=100, deadline=None)
@given(damaged_files() | st.binary(max_size=2000), cuts)
def test_the_same_holds_for_files_on_disk_and_their_duration(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, cut: tuple[float, float | None]
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.audio"
    path.write_bytes(content)
    check(path, *cut)
    assert 0 <= read_duration(path) < float("inf")


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"RIFF", b"fLaC", b"OggS", b"ID3\x04", b"\xff\xfb", b"FORM"]),
)
def test_random_bytes_give_a_waveform_or_an_audio_error(content: bytes, magic: bytes) -> None:
    check(magic + content, 0.0, None)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(0, 6500),
    st.integers(1, 6500),
    st.sampled_from([1, 2]),
)
def test_a_cut_is_the_slice_of_the_whole(
    format: tuple[str, str], start: int, length: int, num_channels: int
) -> None:
    content = whole_file(*format, num_channels)
    whole, _ = soundfile.read(io.BytesIO(content), dtype="float64", always_2d=True)
    expected = whole.mean(axis=1)[start : start + length]
    result = read(content, start / 16000, (start + length) / 16000)
    if isinstance(result, str):
        assert result in ("empty", "dc_only", "silent")
        assert len(np.unique(expected)) <= 1
    else:
        assert result.shape == expected.shape
        assert np.abs(result - (expected - expected.mean())).max() < 1e-6
