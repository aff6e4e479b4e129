"""HDF5 of PANNs, PaSST and EfficientAT: rows become clips, and waveforms."""

import io
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile

from psla_fast.audio import AudioError
from psla_fast.classes import Classes
from psla_fast.clip import Clip, Rejected
from psla_fast.sources import hdf5, read_hdf5, read_hdf5_waveform
from tests.makers import CLASSES, make_tone, write_mp3_hdf5, write_panns_hdf5

TARGETS = np.array([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=bool)
NAMES = ["Y-bcdefghijk.wav", "123.wav", "Ybcdefghijk.mp3"]


def panns(path: Path, seconds: float = 0.25) -> Path:
    tone = np.round(32767 * make_tone(seconds, 32000)).astype(np.int16)
    return write_panns_hdf5(path, NAMES, np.stack([tone, 0 * tone, tone]), TARGETS)


def mp3_of(seconds: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, make_tone(seconds, 32000), 32000, format="MP3")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["panns", "mp3"])
@pytest.mark.parametrize("chunk_rows", [1, 2, 4096])
def test_rows_become_clips_named_by_their_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, chunk_rows: int
) -> None:
    monkeypatch.setattr(hdf5, "CHUNK_ROWS", chunk_rows)
    path = tmp_path / "eval.h5"
    if kind == "panns":
        panns(path)
    else:
        write_mp3_hdf5(path, NAMES, [b"1", b"2", b"3"], TARGETS)
    split = read_hdf5(path, CLASSES, "eval")
    assert (split.name, split.root, split.missing_is_normal) == ("eval", tmp_path, True)
    assert list(split.read()) == [
        Clip("-bcdefghijk", "eval.h5", (0, 2), row=0),
        Clip("123", "eval.h5", (3,), row=1),
        Rejected("Ybcdefghijk", "eval.h5", "no_label: the row has no target"),
    ]


def test_all_527_classes_survive_their_packing_into_bits(tmp_path: Path) -> None:
    mids = tuple(f"/m/{number}" for number in range(527))
    targets = np.random.default_rng(0).random((50, 527)) < 0.01
    targets[:, 526] = True
    path = write_mp3_hdf5(tmp_path / "a.h5", [f"{n}" for n in range(50)], [b"x"] * 50, targets)
    clips = list(read_hdf5(path, Classes(mids, mids), "train").read())
    labels = [list(clip.labels) for clip in clips if isinstance(clip, Clip)]
    assert labels == [np.flatnonzero(row).tolist() for row in targets]


def test_a_panns_row_is_its_waveform_at_the_rate_asked_for(tmp_path: Path) -> None:
    path = panns(tmp_path / "a.h5")
    waveform = read_hdf5_waveform(path, 0, 16000, 600.0)
    assert waveform.dtype == np.float32
    assert waveform.shape == (4000,)
    middle = slice(200, -200)
    np.testing.assert_allclose(waveform[middle], make_tone(0.25, 16000)[middle], atol=1e-3)


def test_a_row_that_panns_left_all_zeros_is_missing_audio(tmp_path: Path) -> None:
    path = panns(tmp_path / "a.h5")
    said = r"row 1 of .*a\.h5 is all zeros, as PANNs' packer leaves a clip it could not find"
    with pytest.raises(AudioError, match=said) as caught:
        read_hdf5_waveform(path, 1, 16000, 600.0)
    assert caught.value.reason == "missing_audio"


def test_an_mp3_row_is_decoded(tmp_path: Path) -> None:
    path = write_mp3_hdf5(tmp_path / "a.h5", NAMES, [mp3_of(1.0), b"", b"no mp3"], TARGETS)
    waveform = read_hdf5_waveform(path, 0, 16000, 600.0)
    assert 15000 < len(waveform) < 18000
    assert 0.3 < np.sqrt(np.mean(waveform[4000:12000] ** 2)) < 0.4
    for row, reason in ((1, "missing_audio"), (2, "undecodable")):
        with pytest.raises(AudioError, match=rf"row {row} of .*a\.h5") as caught:
            read_hdf5_waveform(path, row, 16000, 600.0)
        assert caught.value.reason == reason


def test_a_row_longer_than_the_most_seconds_is_not_read(tmp_path: Path) -> None:
    path = panns(tmp_path / "a.h5")
    mp3 = write_mp3_hdf5(tmp_path / "b.h5", NAMES, [mp3_of(1.0)] * 3, TARGETS)
    for file in (path, mp3):
        with pytest.raises(AudioError, match=r"row 0 of .*h5.* lasts longer") as caught:
            read_hdf5_waveform(file, 0, 16000, 0.2)
        assert caught.value.reason == "too_long"


def test_a_file_is_opened_once_and_anew_where_it_was_written_since(tmp_path: Path) -> None:
    path = panns(tmp_path / "a.h5")
    assert len(read_hdf5_waveform(path, 0, 16000, 600.0)) == 4000
    misses = hdf5._open_cached.cache_info().misses
    assert len(read_hdf5_waveform(path, 2, 16000, 600.0)) == 4000
    assert hdf5._open_cached.cache_info().misses == misses
    panns(tmp_path / "new.h5", seconds=0.5).replace(path)
    assert len(read_hdf5_waveform(path, 0, 16000, 600.0)) == 8000


def test_a_row_or_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    path = panns(tmp_path / "a.h5")
    for row in (-1, 3):
        with pytest.raises(ValueError, match=rf"row {row} of .*a\.h5 is none of its 3"):
            read_hdf5_waveform(path, row, 16000, 600.0)
    for reads in (lambda p: read_hdf5(p, CLASSES, "x"), lambda p: read_hdf5_waveform(p, 0, 16000, 600.0)):
        with pytest.raises(ValueError, match=r"b\.h5 not found"):
            reads(tmp_path / "b.h5")


def replace(file: h5py.File, key: str, value: object) -> None:
    del file[key]
    if value is not None:
        file[key] = value


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("audio_name", None, "has no data set audio_name"),
        ("waveform", None, "has no data set waveform or mp3"),
        ("target", None, "has no data set target"),
        ("audio_name", np.arange(3), "has audio_name of int64"),
        ("audio_name", np.array([["a"] * 3], dtype="S20"), "has audio_name of"),
        ("audio_name", np.array(["a"] * 3, dtype="S2000"), "has audio_name of"),
        ("audio_name", np.array(["a"] * 2, dtype="S20"), "has 2 names, 3 targets and 3 rows of audio"),
        ("waveform", np.ones((3, 5), np.float32), "has waveform of float32"),
        ("waveform", np.ones(3, np.int16), "has waveform of int16 "),
        ("target", np.ones((3, 4), np.uint8), "has target of uint8"),
        ("target", np.ones((3, 5), bool), "target has 5 classes, but the class list has 4"),
    ],
)
def test_a_file_of_other_content_is_one_clear_line(
    tmp_path: Path, key: str, value: object, said: str
) -> None:
    with h5py.File(panns(tmp_path / "a.h5"), "r+") as file:
        replace(file, key, value)
    with pytest.raises(ValueError, match=rf"a\.h5:? {said}"):
        read_hdf5(tmp_path / "a.h5", CLASSES, "x")


def test_a_sample_rate_that_is_none_is_refused(tmp_path: Path) -> None:
    for rate in (0, -1, float("nan"), 10**9, [1, 2], "x"):
        with h5py.File(panns(tmp_path / "a.h5"), "r+") as file:
            file.attrs["sample_rate"] = rate
        with pytest.raises(ValueError, match=r"a\.h5 .*(sample_rate|damaged)"):
            read_hdf5(tmp_path / "a.h5", CLASSES, "x")


def test_packed_targets_of_another_class_count_are_refused(tmp_path: Path) -> None:
    path = write_mp3_hdf5(tmp_path / "a.h5", NAMES, [b"x"] * 3, np.hstack([TARGETS, TARGETS, TARGETS]))
    with pytest.raises(ValueError, match="2 bytes a row, for 9 to 16 classes, but the class list has 4"):
        read_hdf5(path, CLASSES, "x")
    path = write_mp3_hdf5(tmp_path / "b.h5", NAMES, [b"x"] * 3, np.hstack([TARGETS, TARGETS]))
    with pytest.raises(ValueError, match=r"b\.h5: target has classes above 4"):
        list(read_hdf5(path, CLASSES, "x").read())


def test_variable_length_names_are_read_and_those_not_in_utf8_rejected(tmp_path: Path) -> None:
    path = panns(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        replace(file, "audio_name", ["grün.wav", "Y" * 12 + ".wav", "c"])
    assert [row.name for row in read_hdf5(path, CLASSES, "x").read()] == ["grün", "Y" * 11, "c"]
    with h5py.File(path, "r+") as file:
        replace(file, "audio_name", np.array([b"\xff.wav", b"", b"c"], dtype="S20"))
    reasons = [row.reason for row in read_hdf5(path, CLASSES, "x").read() if isinstance(row, Rejected)]
    assert [reason.split(":")[0] for reason in reasons] == ["bad_name", "bad_name", "no_label"]


def test_what_is_no_hdf5_file_is_one_clear_line(tmp_path: Path) -> None:
    path = panns(tmp_path / "a.h5")
    content = path.read_bytes()
    for broken in (b"", b"RIFF", content[: len(content) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a\.h5 is no HDF5 file, or damaged") as caught:
            read_hdf5(path, CLASSES, "x")
        assert "\n" not in str(caught.value)
