from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from psla_fast.audio import AudioError, read_duration, read_waveform

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


@pytest.mark.parametrize(("extension", "subtype"), [("ogg", "VORBIS"), ("mp3", "MPEG_LAYER_III")])
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


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000])
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


def test_a_name_with_a_leading_dash_or_blanks_is_read(tmp_path: Path) -> None:
    for name in ("-abc.wav", "a b'c\".wav", "ü.wav"):
        assert len(read_waveform(write(tmp_path / name, noise(800), 16000, "PCM_16"))) == 800


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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_sample_that_is_no_number_makes_a_file_non_finite(tmp_path: Path, value: float) -> None:
    audio = noise(16000)
    audio[1234] = value
    assert reason_of(write(tmp_path / "a.wav", audio, 16000, "FLOAT")) == "non_finite"
    stereo = np.stack([noise(16000), audio], axis=1)
    assert reason_of(write(tmp_path / "b.wav", stereo, 44100, "FLOAT")) == "non_finite"


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_file_of_one_value_is_silent(tmp_path: Path, value: float, rate: int) -> None:
    assert reason_of(write(tmp_path / "a.wav", np.full(16000, value), rate, "PCM_16")) == "silent"


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
