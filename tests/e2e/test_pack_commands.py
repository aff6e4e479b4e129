"""Every source by its command: each packed clip has its own sound and its own labels."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from psla_fast.classes import format_classes
from psla_fast.cli import main
from psla_fast.shards import open_shards
from tests.makers import (
    CLASSES,
    make_tone,
    write_audio,
    write_datafile,
    write_esc50,
    write_mp3_hdf5,
    write_panns_hdf5,
    write_segments,
    write_table,
)

HERTZ = [300.0, 700.0, 1500.0, 3000.0, 5000.0]  # of clip 0, 1, …; far apart in mels
LABELS = [(0,), (0, 1), (2,), (1, 3), (0, 1, 2, 3)]
MIDS = [",".join(CLASSES.mids[i] for i in labels) for labels in LABELS]


@pytest.fixture
def classes(tmp_path: Path) -> str:
    path = tmp_path / "lists" / "classes.csv"
    path.parent.mkdir()
    path.write_text(format_classes(CLASSES))
    return str(path)


def pack(*words: str | Path) -> None:
    main(["pack", *map(str, words), "--workers", "1"])


def peak_mels(folder: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Give each clip's loudest mel bin and its labels, by name."""
    found = {}
    with open_shards(folder) as shards:
        for clip_id in range(len(shards)):
            peak = int(shards.fbank(clip_id).mean(axis=0).argmax())
            found[shards.read_origin(clip_id)[0]] = peak, tuple(shards.labels(clip_id).tolist())
    return found


def expected_peak(hertz: float) -> int:
    """The mel bin of a tone: 128 bins, equal in mel from 20 Hz to 8 kHz."""
    mel = 1127 * np.log(1 + np.array([20.0, 8000.0, hertz]) / 700)
    return round(float((mel[2] - mel[0]) / (mel[1] - mel[0]) * 129)) - 1


def check(folder: Path, names: list[str], clips: list[int]) -> None:
    """The split holds these clips, each with its own tone and labels."""
    found = peak_mels(folder)
    assert sorted(found) == sorted(names)
    for name, clip in zip(names, clips, strict=True):
        peak, labels = found[name]
        assert labels == LABELS[clip]
        assert abs(peak - expected_peak(HERTZ[clip])) <= 1, f"{name} is not the sound of clip {clip}"


def test_pack_audioset_finds_files_of_every_naming_and_tells_how_many(
    tmp_path: Path, classes: str, capsys: pytest.CaptureFixture[str]
):
    ids = ["-abcdefghij", "Yabcdefghij", "a_b-c_d-e_f", "0123456789_", "missing_one"]
    files = ["{}.wav", "Y{}.flac", "deep/er/{}_30.mp3", "x/{}_30000_40000.ogg"]
    audio = tmp_path / "audio"
    for ytid, form, hertz in zip(ids, files, HERTZ, strict=False):
        write_audio(audio / form.format(ytid), hertz=hertz)
    rows = [(ytid, 30.0, 40.0, mids) for ytid, mids in zip(ids, MIDS, strict=True)]
    first = write_segments(tmp_path / "a.csv", rows[:2])
    second = write_segments(tmp_path / "b.csv", rows[2:])
    out = tmp_path / "shards" / "balanced"
    pack("audioset", "--segments", first, "--segments", second, "--audio", audio, "--classes", classes, out)
    output = capsys.readouterr().out
    assert "balanced: 4 of 5 clips found" in output
    assert "missing_audio" in output
    check(out, ids[:4], [0, 1, 2, 3])


def test_pack_audioset_cuts_whole_videos_by_the_times(tmp_path: Path, classes: str):
    tones = np.concatenate([make_tone(2, 16000, hertz) for hertz in HERTZ[:3]])
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "abcdefghijk.flac", tones, 16000)
    segments = write_segments(tmp_path / "a.csv", [("abcdefghijk", 2.0, 4.0, MIDS[1])])
    where = ["--audio", tmp_path / "audio", "--classes", classes, "--full-length"]
    pack("audioset", "--segments", segments, *where, tmp_path / "s" / "eval")
    check(tmp_path / "s" / "eval", ["abcdefghijk"], [1])
    with open_shards(tmp_path / "s" / "eval") as shards:
        assert len(shards.fbank(0)) == 198


def test_pack_datafile(tmp_path: Path, classes: str):
    for clip, hertz in enumerate(HERTZ):
        write_audio(tmp_path / "wavs" / f"clip {clip}.wav", hertz=hertz, sample_rate=44100)
    rows = [(str(tmp_path / "wavs" / f"clip {clip}.wav"), mids) for clip, mids in enumerate(MIDS)]
    datafile = write_datafile(tmp_path / "train.json", rows)
    pack("datafile", datafile, "--classes", classes, tmp_path / "s" / "train")
    check(tmp_path / "s" / "train", [f"clip {clip}" for clip in range(5)], list(range(5)))


def test_pack_table_cuts_excerpts_and_takes_mids_or_names(tmp_path: Path, classes: str):
    write_audio(tmp_path / "one.wav", hertz=HERTZ[1])
    tones = np.concatenate([make_tone(1, 8000, HERTZ[0]), make_tone(1, 8000, HERTZ[2])])
    soundfile.write(tmp_path / "two.wav", tones, 8000)
    rows = [
        {"path": "one.wav", "labels": "Speech;Male speech, man speaking", "key": "", "start": "", "end": ""},
        {"path": "two.wav", "labels": "/m/09x0r", "key": "begin", "start": "0", "end": "1"},
        {"path": "two.wav", "labels": "Music", "key": "", "start": "1", "end": ""},
    ]
    table = write_table(tmp_path / "clips.csv", rows)
    pack("table", table, "--classes", classes, tmp_path / "s" / "train")
    with open_shards(tmp_path / "s" / "train") as shards:
        lengths = {shards.read_origin(i)[0]: len(shards.fbank(i)) for i in range(3)}
    third = next(name for name in lengths if name not in ("one", "begin"))
    assert third.startswith("two_1")
    check(tmp_path / "s" / "train", ["one", "begin", third], [1, 0, 2])
    assert lengths == {"one": 48, "begin": 98, third: 98}


def test_pack_hdf5_of_panns_and_of_passt(tmp_path: Path, classes: str):
    names = [f"Y{'abcdefghij'}{clip}.wav" for clip in range(5)]
    targets = np.zeros((5, len(CLASSES)), dtype=bool)
    for clip, labels in enumerate(LABELS):
        targets[clip, list(labels)] = True
    waveforms = np.stack([(make_tone(1, 32000, hertz) * 32767).astype(np.int16) for hertz in HERTZ])
    waveforms[3] = 0
    panns = write_panns_hdf5(tmp_path / "panns.h5", names, waveforms, targets)
    pack("hdf5", panns, "--classes", classes, tmp_path / "s" / "panns")
    stems = [name[1:-4] for name in names]
    check(tmp_path / "s" / "panns", [stems[clip] for clip in (0, 1, 2, 4)], [0, 1, 2, 4])
    rejected = (tmp_path / "s" / "panns" / "rejected.jsonl").read_text()
    assert stems[3] in rejected
    assert "all zeros, as PANNs' packer leaves a clip" in rejected
    contents = [write_audio(tmp_path / f"{c}.mp3", hertz=h).read_bytes() for c, h in enumerate(HERTZ)]
    passt = write_mp3_hdf5(tmp_path / "passt.h5", names, contents, targets)
    pack("hdf5", passt, "--classes", classes, tmp_path / "s" / "passt")
    check(tmp_path / "s" / "passt", stems, list(range(5)))


def test_pack_esc50_holds_out_a_fold_or_each(tmp_path: Path):
    root = write_esc50(tmp_path / "esc")
    pack("esc50", root, tmp_path / "one", "--fold", "2")
    with open_shards(tmp_path / "one" / "val") as val, open_shards(tmp_path / "one" / "train") as train:
        assert sorted(key[0] for key in val.keys) == ["2", "2"]
        assert sorted(key[0] for key in train.keys) == list("11334455")
        assert train.classes.names == ("dog", "rooster")
        assert all(len(train.labels(i)) == 1 for i in range(len(train)))
    pack("esc50", root, tmp_path / "all")
    for fold in range(1, 6):
        with open_shards(tmp_path / "all" / f"fold{fold}" / "val") as val:
            assert {key[0] for key in val.keys} == {str(fold)}
    main(["verify", str(tmp_path / "all")])


def test_pack_folder_takes_the_folders_names_for_classes(tmp_path: Path):
    for name, hertz in (("bird", HERTZ[3]), ("dog bark", HERTZ[0])):
        for clip in range(4):
            write_audio(tmp_path / "data" / name / f"{clip}.wav", hertz=hertz)
    pack("folder", tmp_path / "data", tmp_path / "s", "--val-fraction", "0.25")
    found = peak_mels(tmp_path / "s" / "train") | peak_mels(tmp_path / "s" / "val")
    assert len(found) == 8
    for name, (peak, labels) in found.items():
        hertz, label = (HERTZ[3], (0,)) if name.startswith("bird/") else (HERTZ[0], (1,))
        assert labels == label
        assert abs(peak - expected_peak(hertz)) <= 1


def test_the_packed_bytes_of_one_sound_do_not_depend_on_the_source(tmp_path: Path, classes: str):
    wav = write_audio(tmp_path / "w" / "abcdefghijk.wav", hertz=HERTZ[1], sample_rate=44100)
    datafile = write_datafile(tmp_path / "d.json", [(str(wav), MIDS[1])])
    table = write_table(tmp_path / "t.csv", [{"path": str(wav), "labels": MIDS[1]}])
    segments = write_segments(tmp_path / "a.csv", [("abcdefghijk", 0.0, 10.0, MIDS[1])])
    pack("datafile", datafile, "--classes", classes, tmp_path / "s" / "a")
    pack("table", table, "--classes", classes, tmp_path / "s" / "b")
    pack(
        "audioset", "--segments", segments, "--audio", wav.parent, "--classes", classes, tmp_path / "s" / "c"
    )
    tars = {(tmp_path / "s" / name / "00000.tar").read_bytes() for name in "abc"}
    assert len(tars) == 1


def test_inspect_prints_a_clip_and_draws_its_fbank(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(["pack", "inspect", str(packed)])
    assert capsys.readouterr().out.count("of 14 classes") == 3
    with open_shards(packed / "val") as shards:
        key, labels = shards.keys[2], [shards.classes.names[i] for i in shards.labels(2)]
    main(["pack", "inspect", str(packed), key, "--out", str(tmp_path / "f.png")])
    output = capsys.readouterr().out
    assert all(label in output for label in labels)
    assert (tmp_path / "f.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(SystemExit):
        main(["pack", "inspect", str(packed), "nobody"])
    assert "no clip has the key 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize("num_classes", [1, 14, 527])
def test_plots_are_drawn_for_any_number_of_classes(tmp_path: Path, num_classes: int):
    from psla_fast.classes import Classes
    from psla_fast.plots import plot_split
    from psla_fast.shards.index import SplitStatistics

    names = tuple(f"class $_{{{i}" for i in range(num_classes))  # no mathematics for matplotlib
    rng = np.random.default_rng(0)
    lengths, counts = rng.integers(1, 3000, 50).astype(np.int32), rng.integers(0, 9, num_classes)
    statistics = SplitStatistics(1, 10, 0, lengths, counts, 0.0, 1.0, {}, {})
    for _ in range(2):
        plot_split(tmp_path, statistics, Classes(names, names), 10.0)
    assert (tmp_path / "class_counts.png").stat().st_size > 5000
    assert (tmp_path / "clip_lengths.png").stat().st_size > 5000


def test_a_closing_table_lists_what_was_packed(
    synthetic_fsd50k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pack("fsd50k", synthetic_fsd50k, tmp_path / "s", "--plots")
    lines = {line[:16].strip(): line[16:].split() for line in capsys.readouterr().out.splitlines()}
    assert lines["clips"] == ["64", "16", "16"]
    assert lines["classes of 14"] == ["14", "14", "14"]
    assert lines["rejected"] == ["0", "0", "0"]
    assert (tmp_path / "s/train/class_counts.png").is_file()
