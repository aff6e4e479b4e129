from collections.abc import Callable

import numpy as np
import pytest

from psla_fast.tagger import Tagger, Tagging
from psla_fast.tagger.live import Pcm, tag_live
from psla_fast.tagger.windows import make_window
from tests.taggers import make_noise, save_model


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Tagger:
    """Windows of 96 frames (15,600 samples), hops of 48."""
    path = save_model(tmp_path_factory.mktemp("net") / "tiny.pt")
    return Tagger.from_checkpoint(path, "cpu", "fp32", batch_size=1)


def pieces(content: bytes, size: int) -> Callable[[int], bytes]:
    """Reads of at most so many bytes, as of a pipe."""
    parts = [content[start : start + size] for start in range(0, len(content), size)]
    return lambda limit: parts.pop(0) if parts else b""


def listen(tagger: Tagger, content: bytes, size: int = 4096, pcm: Pcm = Pcm()) -> list[Tagging]:  # noqa: B008
    return list(tag_live(tagger, pieces(content, size), pcm))


def as_s16(sound: np.ndarray) -> bytes:
    return (sound * 32767).astype("<i2").tobytes()


@pytest.mark.parametrize("size", [1, 3, 1000, 60_000])
def test_every_hop_tags_the_last_window(tagger: Tagger, size: int):
    sound = make_noise(1.0 if size == 1 else 3.0)
    taggings = listen(tagger, as_s16(sound), size)
    heard = np.frombuffer(as_s16(sound), "<i2").astype(np.float32) / 32768
    hop, window = tagger.cut.hop_samples, tagger.cut.clip_samples
    ends = [*range(hop, len(heard), hop), len(heard)]
    assert len(taggings) == len(ends)
    for tagging, end in zip(taggings, ends, strict=True):
        part = heard[max(0, end - window) : end]
        (expected,) = tagger.scorer.score([make_window(0, part, tagger.card.fbank)], tagger.cut)
        assert np.abs(tagging.scores - expected.scores.numpy()).max() < 1e-6
        assert tagging.start_seconds * 16000 == pytest.approx(max(0, end - window))
        assert tagging.seconds * 16000 == pytest.approx(len(part))


def test_a_tagging_comes_before_the_next_hop_is_there(tagger: Tagger):
    asked = 0

    def read(limit: int) -> bytes:
        nonlocal asked
        asked += 1
        return as_s16(make_noise(0.1))

    stream = tag_live(tagger, read, Pcm())
    next(stream)
    assert asked == -(-tagger.cut.hop_samples // 1600)
    stream.close()


def test_stereo_floats_at_another_rate_sound_like_their_mono_file(tagger: Tagger):
    sound = make_noise(2.0, 44100)
    stereo = np.stack([sound, sound], axis=1).astype("<f4").tobytes()
    live = listen(tagger, stereo, 10_007, Pcm(44100, "f32", 2))
    first = tagger(sound[: round(0.48 * 44100)], 44100)
    assert isinstance(first, Tagging)
    assert np.abs(live[0].scores - first.scores).max() < 0.02  # its end is cut before the resampling
    assert live[-1].start_seconds + live[-1].seconds == pytest.approx(2.0, abs=1e-3)


def test_silence_is_tagged_as_it_comes(tagger: Tagger):
    assert len(listen(tagger, bytes(32000))) == 3


def test_an_odd_last_byte_is_left_out(tagger: Tagger):
    assert listen(tagger, as_s16(make_noise(0.2)) + b"\x01")[-1].seconds == pytest.approx(0.2)


@pytest.mark.parametrize("content", [b"", b"\x01"])
def test_a_pipe_without_a_sample_says_so(tagger: Tagger, content: bytes):
    with pytest.raises(ValueError, match="- holds no sample. Pipe raw PCM"):
        listen(tagger, content)


@pytest.mark.parametrize(("header", "kind"), [(b"RIFF", "WAV"), (b"fLaC", "FLAC"), (b"OggS", "Ogg")])
@pytest.mark.parametrize("size", [2, 100])
def test_a_file_in_the_pipe_is_refused_by_its_header(tagger: Tagger, header: bytes, kind: str, size: int):
    with pytest.raises(ValueError, match=f"- is a {kind} file; give its name, or raw PCM"):
        listen(tagger, header + bytes(200), size)


def test_floats_that_are_no_numbers_end_it(tagger: Tagger):
    with pytest.raises(ValueError, match="non_finite: - holds NaN"):
        listen(tagger, np.full(100, np.nan, "<f4").tobytes(), pcm=Pcm(format="f32"))


@pytest.mark.parametrize(("rate", "channels"), [(0, 1), (10**7, 1), (16000, 0), (16000, 999)])
def test_pcm_of_no_recorder_is_refused(rate: int, channels: int):
    with pytest.raises(ValueError, match="can't be; give"):
        Pcm(rate, "s16", channels)
