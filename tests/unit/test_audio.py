import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from psla_fast.audio import (
    AudioError,
    centre,
    prepare_waveform,
    read_duration,
    read_waveform,
    resample_blocks,
    stream_blocks,
    stream_waveform,
)

Waveform = npt.NDArray[np.float64]


def sine(hertz: float, seconds: float, rate: int, amplitude: float = 0.5) -> Waveform:
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def noise(num_samples: int, seed: int = 0) -> Waveform:
    return np.random.default_rng(seed).uniform(-0.9, 0.9, num_samples)


def centred(waveform: Waveform) -> Waveform:
    return waveform - waveform.mean()


def write(path: Path, audio: Waveform, rate: int, subtype: str) -> Path:
    soundfile.write(path, audio, rate, subtype=subtype)
    return path


@pytest.mark.parametrize(
    ("extension", "subtype", "tolerance"),
    [
        ("wav", "PCM_16", 2**-15),
        ("wav", "PCM_24", 2**-22),
        ("wav", "PCM_32", 2**-22),
        ("wav", "FLOAT", 1e-7),
        ("wav", "DOUBLE", 1e-7),
        ("wav", "PCM_U8", 2**-7),
        ("flac", "PCM_16", 2**-15),
        ("flac", "PCM_24", 2**-22),
    ],
)
def test_a_lossless_file_gives_its_samples_back(
    tmp_path: Path, extension: str, subtype: str, tolerance: float
) -> None:
    audio = noise(16001)
    waveform = read_waveform(write(tmp_path / f"a.{extension}", audio, 16000, subtype))
    assert waveform.dtype == np.float32
    assert waveform.shape == (16001,)
    assert np.abs(waveform - centred(audio)).max() <= tolerance


@pytest.mark.parametrize(
    ("extension", "subtype"), [("ogg", "VORBIS"), ("ogg", "OPUS"), ("mp3", "MPEG_LAYER_III")]
)
def test_a_lossy_file_sounds_the_same(tmp_path: Path, extension: str, subtype: str) -> None:
    audio = sine(440, 2, 16000) + sine(1700, 2, 16000, 0.2)
    waveform = read_waveform(write(tmp_path / f"a.{extension}", audio, 16000, subtype))
    assert abs(len(waveform) - len(audio)) <= 2400  # mp3 keeps the coder's delay
    frequency = np.fft.rfftfreq(16000, 1 / 16000)
    power = np.abs(np.fft.rfft(waveform[8000:24000])) ** 2
    assert power[(np.abs(frequency - 440) <= 5) | (np.abs(frequency - 1700) <= 5)].sum() > 0.99 * power.sum()
    assert waveform.std() == pytest.approx(audio.std(), rel=0.05)


def test_float_samples_above_1_are_kept(tmp_path: Path) -> None:
    waveform = read_waveform(write(tmp_path / "a.wav", 4 * noise(16000), 16000, "FLOAT"))
    assert waveform.max() > 3


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = noise(16000, 1), sine(300, 1, 16000)
    waveform = read_waveform(write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16000, "FLOAT"))
    assert np.abs(waveform - centred((left + right) / 2)).max() < 1e-6
    six = np.stack([noise(16000, seed) for seed in range(6)], axis=1)
    waveform = read_waveform(write(tmp_path / "b.wav", six, 16000, "FLOAT"))
    assert np.abs(waveform - centred(six.mean(axis=1))).max() < 1e-6


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000, 192000])
def test_another_rate_is_resampled_to_the_right_length_and_keeps_a_sine(tmp_path: Path, rate: int) -> None:
    waveform = read_waveform(write(tmp_path / "a.wav", sine(1000, 2.5, rate), rate, "PCM_24"))
    assert abs(len(waveform) - 40000) <= 1
    inner = waveform[4000:36000].astype(np.float64)  # away from the filter's ends
    spectrum = np.abs(np.fft.rfft(inner * np.hanning(len(inner))))
    assert spectrum.argmax() == 2000  # bins of 0.5 Hz
    assert np.abs(inner).max() == pytest.approx(0.5, rel=0.01)


def test_what_16_khz_cannot_hold_is_filtered_out_not_folded_back(tmp_path: Path) -> None:
    audio = sine(1000, 1, 44100, 0.01) + sine(12000, 1, 44100, 0.9)
    waveform = read_waveform(write(tmp_path / "a.wav", audio, 44100, "FLOAT"))
    assert np.abs(waveform[2000:14000]).max() < 0.0105


def test_the_sample_rate_asked_for_is_the_one_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", sine(1000, 1, 16000), 16000, "PCM_16")
    assert len(read_waveform(path, sample_rate=32000)) == 32000


@pytest.mark.parametrize("rate", [16000, 44100])
def test_the_mean_is_removed(tmp_path: Path, rate: int) -> None:
    waveform = read_waveform(write(tmp_path / "a.wav", 0.4 + 0.1 * noise(rate), rate, "FLOAT"))
    assert abs(waveform.mean(dtype=np.float64)) < 1e-6


def test_a_name_with_a_leading_dash_blanks_or_a_newline_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("-abc.wav", "-", "a b'c\".wav", "ü.wav", "a\nb.wav"):
        soundfile.write(tmp_path / name, noise(800), 16000, subtype="PCM_16", format="WAV")
        assert len(read_waveform(tmp_path / name)) == 800
    monkeypatch.chdir(tmp_path)
    assert len(read_waveform(Path("-"))) == 800


def reason_of(path: Path) -> str:
    with pytest.raises(AudioError) as caught:
        read_waveform(path)
    assert str(caught.value).startswith(f"{caught.value.reason}: ")
    assert path.name in str(caught.value)
    return caught.value.reason


def test_a_file_that_is_not_there_is_missing_audio(tmp_path: Path) -> None:
    assert reason_of(tmp_path / "a.wav") == "missing_audio"
    (tmp_path / "folder.wav").mkdir()
    assert reason_of(tmp_path / "folder.wav") == "missing_audio"


def test_what_is_no_audio_or_a_damaged_file_is_undecodable(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.flac", noise(32000), 16000, "PCM_16").read_bytes()
    damaged = {
        "nothing.wav": b"",
        "text.wav": b"<html>404 not found</html>" * 40,
        "header.wav": b"RIFF\x24\x00\x00\x00WAVE",
        "cut.flac": whole[: len(whole) // 2],
        "hole.flac": whole[:10000] + bytes(500) + whole[10500:],
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        assert reason_of(tmp_path / name) == "undecodable", name


def test_a_file_without_samples_is_empty(tmp_path: Path) -> None:
    assert reason_of(write(tmp_path / "a.wav", np.zeros(0), 16000, "PCM_16")) == "empty"


def test_a_file_shorter_than_a_sample_of_the_wanted_rate_is_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", np.array([0.1, -0.1]), 192000, "PCM_16")
    assert reason_of(path) == "empty"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_one_sample_that_is_no_number_makes_a_file_non_finite(tmp_path: Path, value: float) -> None:
    audio = noise(16000)
    audio[1234] = value
    assert reason_of(write(tmp_path / "a.wav", audio, 16000, "FLOAT")) == "non_finite"
    stereo = np.stack([noise(16000), audio], axis=1)
    assert reason_of(write(tmp_path / "b.wav", stereo, 44100, "FLOAT")) == "non_finite"


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize(("value", "reason"), [(0.0, "silent"), (0.25, "dc_only")])
def test_zeros_are_silent_and_another_constant_is_dc_only(
    tmp_path: Path, value: float, reason: str, rate: int
) -> None:
    assert reason_of(write(tmp_path / "a.wav", np.full(16000, value), rate, "PCM_16")) == reason
    assert reason_of(write(tmp_path / "b.flac", np.full((16000, 2), value), rate, "PCM_24")) == reason


def test_channels_that_cancel_out_are_silent(tmp_path: Path) -> None:
    left = noise(16000)
    assert reason_of(write(tmp_path / "a.wav", np.stack([left, -left], axis=1), 16000, "FLOAT")) == "silent"


def test_a_quiet_file_is_not_silent(tmp_path: Path) -> None:
    audio = np.zeros(16000)
    audio[8000] = 2**-15
    assert np.ptp(read_waveform(write(tmp_path / "a.wav", audio, 16000, "PCM_16"))) > 0


def test_the_duration_comes_from_the_header_and_is_0_where_there_is_none(tmp_path: Path) -> None:
    assert read_duration(write(tmp_path / "a.wav", noise(66150), 44100, "PCM_16")) == 1.5
    (tmp_path / "b.wav").write_bytes(b"no audio")
    assert read_duration(tmp_path / "b.wav") == 0.0
    assert read_duration(tmp_path / "c.wav") == 0.0


FORMATS = [
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("WAV", "IMA_ADPCM"),
    ("AIFF", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]


def encode(audio: Waveform, rate: int, format: str, subtype: str) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, audio, rate, format=format, subtype=subtype)
    return stream.getvalue()


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_bytes_are_read_as_their_file_is(tmp_path: Path, format: str, subtype: str) -> None:
    content = encode(np.stack([noise(70000, 1), noise(70000, 2)], axis=1), 48000, format, subtype)
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    assert np.array_equal(read_waveform(path), read_waveform(content))


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_a_cut_equals_the_slice_of_the_whole_file(format: str, subtype: str) -> None:
    content = encode(np.stack([noise(100000, 1), noise(100000, 2)], axis=1), 48000, format, subtype)
    whole, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    mono = whole.mean(axis=1)
    for start, end in ((0, 2), (1, 700), (12345, 50000), (77777, None), (99000, 99500), (40000, 10**7)):
        seconds = None if end is None else end / 48000
        waveform = read_waveform(content, 48000, start_seconds=start / 48000, end_seconds=seconds)
        expected = centred(mono[start:end])
        assert waveform.shape == expected.shape
        assert np.abs(waveform - expected).max() < 1e-6


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_a_cut_beyond_the_end_or_of_nothing_is_empty(format: str, subtype: str) -> None:
    content = encode(noise(16000), 16000, format, subtype)
    for start, end in ((5.0, None), (2.0, 3.0), (0.5, 0.5), (0.5, 0.2), (-1.0, 1.0), (float("nan"), None)):
        with pytest.raises(AudioError) as caught:
            read_waveform(content, start_seconds=start, end_seconds=end)
        assert caught.value.reason == "empty"


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_more_than_max_seconds_after_the_cut_is_too_long(format: str, subtype: str) -> None:
    content = encode(noise(48000), 16000, format, subtype)
    with pytest.raises(AudioError) as caught:
        read_waveform(content, max_seconds=2)
    assert caught.value.reason == "too_long"
    assert len(read_waveform(content, max_seconds=2, end_seconds=2)) == 32000
    assert len(read_waveform(content, max_seconds=2, start_seconds=1.2)) >= 28800


def test_blocks_are_joined_without_a_seam() -> None:
    audio = np.stack([noise(300_001, seed) for seed in range(3)], axis=1)
    for format, subtype in (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")):
        content = encode(audio, 16000, format, subtype)
        whole, _ = soundfile.read(io.BytesIO(content))
        assert np.abs(read_waveform(content) - centred(whole.mean(axis=1))).max() < 1e-6, subtype


def with_data_size(wav: bytes, size: int) -> bytes:
    at = wav.index(b"data") + 4
    return wav[:at] + struct.pack("<I", size) + wav[at + 4 :]


@pytest.mark.parametrize(
    ("format", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("AIFF", "PCM_16"), ("FLAC", "PCM_16")]
)
def test_a_download_cut_short_is_undecodable(format: str, subtype: str) -> None:
    content = encode(noise(64000), 16000, format, subtype)
    for fraction in (0.3, 0.5, 0.97):
        with pytest.raises(AudioError, match="cut short|lost sync") as caught:
            read_waveform(content[: round(fraction * len(content))])
        assert caught.value.reason == "undecodable"


def test_the_seconds_of_a_wav_cut_short_are_told() -> None:
    content = encode(noise(64000), 16000, "WAV", "PCM_16")
    with pytest.raises(AudioError, match="holds 1.00 of 4.00 seconds"):
        read_waveform(content[: 44 + 32000])


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFFFFF - 36, 0xFFFFFFFF - 36, 32044])
def test_a_wav_written_to_a_pipe_or_with_a_few_bytes_too_many_is_whole(size: int) -> None:
    content = encode(noise(16000), 16000, "WAV", "PCM_16")
    assert np.array_equal(read_waveform(with_data_size(content, size)), read_waveform(content))


def test_a_flac_that_does_not_tell_its_length_is_read() -> None:
    content = bytearray(encode(noise(16000), 16000, "FLAC", "PCM_16"))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    assert len(read_waveform(bytes(content))) == 16000
    assert len(read_waveform(bytes(content), start_seconds=0.25)) == 12000


@pytest.mark.parametrize("rate", [1, 999, 10**6, 2**31 - 1])
def test_a_sample_rate_that_no_recorder_has_is_undecodable(rate: int) -> None:
    content = bytearray(encode(noise(16000), 16000, "WAV", "PCM_16"))
    content[24:28] = struct.pack("<I", rate)
    with pytest.raises(AudioError, match=f"{rate} Hz"):
        read_waveform(bytes(content))


def test_a_format_of_instruments_is_undecodable() -> None:
    content = encode(noise(16000), 16000, "MAT5", "PCM_16")
    with pytest.raises(AudioError, match="GNU Octave") as caught:
        read_waveform(content)
    assert caught.value.reason == "undecodable"


def test_a_broken_parser_seek_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    content = encode(noise(6000), 16000, "OGG", "VORBIS")
    for at in range(60):
        with pytest.raises(AudioError):
            read_waveform(content[:at])
    assert capfd.readouterr().err == ""


def test_prepare_takes_channels_and_leaves_its_input_alone() -> None:
    audio = np.stack([noise(44100, 1), noise(44100, 2)], axis=1).astype(np.float32)
    before = audio.copy()
    waveform = prepare_waveform(audio, 44100, 16000, "row 3")
    assert waveform.shape == (16000,)
    assert np.array_equal(waveform, prepare_waveform(audio.mean(axis=1), 44100, 16000, "row 3"))
    prepare_waveform(audio[:, 0], 16000, 16000, "row 3")
    assert np.array_equal(audio, before)


@pytest.mark.parametrize("shape", [(0,), (0, 2), (5, 0)])
def test_prepare_refuses_no_samples(shape: tuple[int, ...]) -> None:
    with pytest.raises(AudioError, match="row 3") as caught:
        prepare_waveform(np.zeros(shape, np.float32), 16000, 16000, "row 3")
    assert caught.value.reason == "empty"


def write_av(path: Path, codec: str, audio: Waveform, rate: int) -> Path:
    """Encode audio (samples, 2) with PyAV."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format={".aac": "adts"}.get(path.suffix)) as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        for start in range(0, len(audio), 1024):
            part = np.ascontiguousarray(audio[start : start + 1024].T, dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


AV_FILES = [("a.m4a", "aac"), ("a.M4A", "alac"), ("a.mp4", "aac"), ("a.aac", "aac"), ("a.webm", "libopus")]


@pytest.mark.parametrize(("name", "codec"), AV_FILES)
def test_what_libsndfile_cannot_read_is_read_by_pyav(tmp_path: Path, name: str, codec: str) -> None:
    tone = sine(440, 2, 48000) + sine(1700, 2, 48000, 0.2)
    path = write_av(tmp_path / name, codec, np.stack([tone, tone], axis=1), 48000)
    waveform = read_waveform(path)
    assert abs(len(waveform) - 32000) <= 1100
    assert read_duration(path) == pytest.approx(2, abs=0.1)
    spectrum = np.abs(np.fft.rfft(waveform[8000:24000]))
    assert spectrum.argmax() == 440
    assert waveform[2000:30000].std() == pytest.approx(tone.std(), rel=0.05)
    native = read_waveform(path, 48000)
    cut = read_waveform(path, 48000, start_seconds=0.5, end_seconds=1.25)
    assert np.abs(cut - centred(native[24000:60000])).max() < 1e-6
    with pytest.raises(AudioError, match="too_long"):
        read_waveform(path, max_seconds=1)


def test_a_damaged_m4a_is_undecodable(tmp_path: Path) -> None:
    content = write_av(tmp_path / "a.m4a", "aac", noise(96000).reshape(-1, 2), 48000).read_bytes()
    damaged = {
        "cut.m4a": content[: len(content) // 2],
        "hole.m4a": content[:3000] + bytes(300) + content[3300:],
        "junk.m4a": b"<html>" * 100,
        "nothing.m4a": b"",
    }
    for name, bad in damaged.items():
        (tmp_path / name).write_bytes(bad)
        assert reason_of(tmp_path / name) == "undecodable", name
    assert read_duration(tmp_path / "junk.m4a") == 0.0


def test_without_pyav_an_m4a_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.m4a").write_bytes(b"any")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match=r"pip install psla-fast\[m4a\], or convert to wav or flac"):
        read_waveform(tmp_path / "a.m4a")
    assert read_duration(tmp_path / "a.m4a") == 0.0


CRAFTED = """
import resource, sys
from pathlib import Path
from psla_fast.audio import AudioError, read_waveform
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20),) * 2)
try:
    print(len(read_waveform(Path(sys.argv[1]), max_seconds=float(sys.argv[2]))))
except AudioError as error:
    print(error.reason)
"""


def read_in_150_mb(path: Path, max_seconds: float) -> str:
    command = [sys.executable, "-c", CRAFTED, str(path), str(max_seconds)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc")
def test_memory_follows_what_is_kept_not_the_header_nor_the_channels(tmp_path: Path) -> None:
    flac = bytearray(encode(noise(16000), 16000, "FLAC", "PCM_16"))
    flac[21] |= 0x0F
    flac[22:26] = b"\xff" * 4  # 2**36 samples
    (tmp_path / "a.flac").write_bytes(flac)
    assert read_in_150_mb(tmp_path / "a.flac", 600) == "undecodable"
    with soundfile.SoundFile(tmp_path / "b.wav", "w", 96000, 16, "PCM_16") as file:  # 1 GB as float32
        second = np.random.default_rng(0).uniform(-0.5, 0.5, (96000, 16))
        for _ in range(60):
            file.write(second)
    assert read_in_150_mb(tmp_path / "b.wav", 60) == "960000"
    assert read_in_150_mb(tmp_path / "b.wav", 5) == "too_long"


def test_a_flac_cut_at_any_byte_is_undecodable() -> None:
    content = encode(noise(6000) * 2**-12, 16000, "FLAC", "PCM_16")
    for length in range(100, len(content) - 1):  # between two frames libsndfile sees nothing wrong
        with pytest.raises(AudioError, match="cut short|lost sync"):
            read_waveform(content[:length])


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
@pytest.mark.parametrize("rate", [8000, 16000, 48000])
def test_streamed_blocks_are_the_waveform_but_for_its_mean(format: str, subtype: str, rate: int) -> None:
    content = encode(np.stack([noise(600_001, 1), noise(600_001, 2)], axis=1), rate, format, subtype)
    blocks = list(stream_waveform(content))
    assert len(blocks) > 2
    assert np.array_equal(centre(np.concatenate(blocks)), read_waveform(content))


@pytest.mark.parametrize("size", [1, 100, 44100])
def test_resampling_in_blocks_is_resampling(size: int) -> None:
    audio = noise(3000 if size == 1 else 100_000).astype(np.float32)
    blocks = (audio[start : start + size] for start in range(0, len(audio), size))
    whole = np.concatenate(list(resample_blocks(blocks, 44100, 16000, "x")))
    assert np.abs(centre(whole) - prepare_waveform(audio, 44100, 16000, "x")).max() < 1e-6


def test_streaming_starts_before_a_file_is_read_whole(tmp_path: Path) -> None:
    content = encode(noise(2_000_000), 16000, "WAV", "FLOAT")
    (tmp_path / "a.wav").write_bytes(content[:-3_000_000] + b"\xff" * 3_000_000)  # NaNs
    stream = stream_waveform(tmp_path / "a.wav")
    assert len(next(stream)) == 1 << 19
    with pytest.raises(AudioError, match="non_finite"):
        list(stream)


@pytest.mark.parametrize(
    ("value", "reason"), [(0.0, "silent"), (0.25, "dc_only"), (np.nan, "non_finite"), (1e30, "non_finite")]
)
@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_stream_of_one_value_fails_at_its_end(value: float, reason: str, rate: int) -> None:
    with pytest.raises(AudioError) as caught:
        list(stream_blocks([np.full(1000, value, np.float32)] * 3, rate, 16000, "x"))
    assert caught.value.reason == reason


@pytest.mark.parametrize("blocks", [[], [np.empty(0, np.float32)], [np.ones(2, np.float32) * (-1, 1)]])
def test_a_stream_without_a_sample_is_empty(blocks: list[Waveform]) -> None:
    with pytest.raises(AudioError, match="empty: x"):
        list(stream_blocks([block.astype(np.float32) for block in blocks], 192000, 16000, "x"))


def test_a_file_that_is_not_there_fails_when_it_is_streamed(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="missing_audio"):
        next(stream_waveform(tmp_path / "a.wav"))


def test_pyav_streams_what_it_reads(tmp_path: Path) -> None:
    path = write_av(tmp_path / "a.m4a", "aac", np.stack([sine(440, 2, 48000)] * 2, axis=1), 48000)
    assert np.array_equal(centre(np.concatenate(list(stream_waveform(path)))), read_waveform(path))
