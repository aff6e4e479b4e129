"""AudioSet: which file of a folder is a row's, and what a row becomes."""

import itertools
import os
from pathlib import Path

import pytest

from psla_fast.clip import Clip, Rejected
from psla_fast.sources import read_audioset
from psla_fast.sources.audio_folder import AudioFolder, scan_audio
from tests.makers import CLASSES, touch, write_segments

ID = "-_Yabc_12_3"  # 11 characters, with all that makes ids awkward


def find(paths: list[str], clip_id: str = ID, start: float = 30.0, end: float = 40.0) -> str | None:
    found = {AudioFolder(order).find(clip_id, start, end) for order in itertools.permutations(paths[:5])}
    assert len(found) == 1  # whatever the order of the disk
    return found.pop()


@pytest.mark.parametrize(
    "stem",
    [
        ID, f"Y{ID}", f"{ID}_30", f"{ID}_30_40", f"Y{ID}_30_40", f"{ID}_30.000_40.000", f"{ID}_30000",
        f"{ID}_30000_40000", f"Y{ID}_29.5", f"{ID}_30500_40500",
    ],
)  # fmt: skip
def test_a_clip_is_found_under_every_name_that_downloaders_give(stem: str) -> None:
    for path in (f"{stem}.wav", f"a/b.c/{stem}.FLAC", f"x/{stem}.m4a"):
        assert find([path, "other.wav"]) == path


@pytest.mark.parametrize(
    "stem",
    [
        f"{ID}_32", f"{ID}_28_38", f"{ID}_300000", f"{ID}_3000", f"YY{ID}", f"{ID}x", ID[:-1], ID[1:],
        f"{ID}_", f"{ID}_x", f"{ID}_30_40_50", f"{ID}__30", f"y{ID}", f"{ID}-30", ID.upper(),
        f"{ID}_-30", f"{ID}_٣٠",
    ],
)  # fmt: skip
def test_a_file_of_another_clip_or_another_cut_is_not_taken(stem: str) -> None:
    assert find([f"{stem}.wav"]) is None


def test_a_cut_at_30_seconds_is_not_one_at_30_milliseconds() -> None:
    assert find([f"{ID}_30.wav"], start=0.0, end=10.0) is None
    assert find([f"{ID}_30_40.wav"], start=0.0, end=10.0) is None
    assert find([f"{ID}_0_10000.wav"], start=0.0, end=10.0) == f"{ID}_0_10000.wav"
    assert find([f"{ID}_2000_2010.wav"], start=2.0, end=12.0) is None
    assert find([f"{ID}_2000_2010.wav"], start=2000.0, end=2010.0) == f"{ID}_2000_2010.wav"


@pytest.mark.parametrize(
    ("stem", "ids"),
    [
        ("Yabcdefghij", {"Yabcdefghij"}),
        ("Yabcdefghijk", {"abcdefghijk"}),
        ("YYbcdefghijk", {"Ybcdefghijk"}),
        ("Yabcdefghi_30", set()),
        ("Yabcdefgh_30", {"abcdefgh_30"}),
        ("Yabcdefghij_30", {"Yabcdefghij"}),
        ("Yabcdefghij__30", {"abcdefghij_"}),
        ("abcdefgh_30_30", {"abcdefgh_30"}),
        ("Y_30_30_30_3", {"_30_30_30_3"}),
    ],
)
def test_a_name_that_could_be_read_in_two_ways_belongs_to_the_id_of_11_characters(
    stem: str, ids: set[str]
) -> None:
    asked = {stem[first:last] for first in range(len(stem)) for last in range(first, len(stem) + 1)}
    folder = AudioFolder([f"{stem}.wav"])
    assert {clip_id for clip_id in asked if len(clip_id) == 11 and folder.find(clip_id, 30.0, 40.0)} == ids


def test_ids_of_other_lengths_are_found_by_their_whole_name() -> None:
    for clip_id in ("a", "clip_30_40", "Yabcdefghijk", "abcdefghijk_30000", "ä" * 20):
        assert find([f"{clip_id}.wav"], clip_id) == f"{clip_id}.wav"
        assert find([f"Y{clip_id}.wav"], clip_id) == f"Y{clip_id}.wav"
    assert find([f"{ID}.wav"], "b" * 11) is None
    assert AudioFolder([]).find(ID, 0.0, 10.0) is None


def test_of_several_files_the_nearest_cut_then_the_suffix_then_the_path_decides() -> None:
    paths = [f"{ID}_30_40.m4a", f"{ID}_31_41.wav", f"{ID}.wav", f"{ID}_30_35.wav"]
    assert find(paths) == paths[0]
    assert find(paths[1:3], start=31.0, end=41.0) == paths[1]
    ordered = [
        f"{folder}/{ID}.{suffix}"
        for suffix in ("wav", "flac", "ogg", "opus", "mp3", "m4a")
        for folder in "ab"
    ]
    while ordered:
        assert AudioFolder(reversed(ordered)).find(ID, 0.0, 10.0) == ordered[0]
        ordered.pop(0)


def test_names_that_share_a_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psla_fast.sources.audio_folder.hash", lambda text: 7, raising=False)
    folder = AudioFolder([f"{n:011}.wav" for n in range(50)])
    assert [folder.find(f"{n:011}", 0.0, 10.0) for n in (0, 31, 49)] == [f"{n:011}.wav" for n in (0, 31, 49)]
    assert folder.find(f"{50:011}", 0.0, 10.0) is None


def test_a_folder_is_scanned_with_links_and_without_circles_and_hidden_files(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", "a.wav", "x/y/b.OPUS", "x/c.txt", ".hidden/d.wav", "._e.wav", "x/wav")
    touch(tmp_path / "far", "f.mp3")
    (root / "x/back").symlink_to(root)
    (root / "x/far").symlink_to(tmp_path / "far")
    (root / "zfar").symlink_to(tmp_path / "far")
    (root / "broken").symlink_to(tmp_path / "nowhere")
    (root / "g.wav").symlink_to(tmp_path / "far/f.mp3")
    assert sorted(scan_audio(root)) == ["a.wav", "g.wav", "x/far/f.mp3", "x/y/b.OPUS"]
    assert sorted(scan_audio(root, nested=False)) == ["a.wav", "g.wav"]


def test_rows_become_clips_of_whole_files_or_cut_out_of_whole_videos(tmp_path: Path) -> None:
    rows = [("-bcdefghijk", 30.0, 40.0, "/m/04rlf,/m/09x0r"), ("Ybcdefghij_", 0.0, 10.0, "/t/dd1")]
    lists = [write_segments(tmp_path / "1.csv", rows[:1]), write_segments(tmp_path / "2.csv", rows[1:])]
    audio = touch(tmp_path / "audio", "-bcdefghijk.wav", "p/Y-bcdefghijk_30_40.flac", "x.wav")
    split = read_audioset(lists, audio, CLASSES, "train")
    assert (split.name, split.root, split.missing_is_normal) == ("train", audio, True)
    missing = Clip("Ybcdefghij_", "Ybcdefghij_.wav", (3,), found=False)
    assert list(split.read()) == [Clip("-bcdefghijk", "p/Y-bcdefghijk_30_40.flac", (0, 2)), missing]
    first, second = read_audioset(lists, audio, CLASSES, "train", full_length=True).read()
    assert first == Clip("-bcdefghijk", "-bcdefghijk.wav", (0, 2), None, 30.0, 40.0)
    assert isinstance(second, Clip)
    assert not second.found


def test_an_id_that_comes_again_with_another_start_is_named_with_it(tmp_path: Path) -> None:
    rows = [(ID, 30.0, 40.0, "/t/dd1"), (ID, 0.5, 10.5, "/t/dd1"), (ID, 30.0, 40.0, "/m/04rlf")]
    path = write_segments(tmp_path / "1.csv", rows)
    audio = touch(tmp_path / "audio", f"{ID}.wav")
    clips = list(read_audioset([path], audio, CLASSES, "train").read())
    assert [clip.name for clip in clips] == [ID, f"{ID}_0.5", ID]
    assert [clip.found for clip in clips if isinstance(clip, Clip)] == [True, False, True]
    touch(audio, f"{ID}_500_10500.wav")
    clips = list(read_audioset([path], audio, CLASSES, "train").read())
    assert [clip.source for clip in clips] == [f"{ID}.wav", f"{ID}_500_10500.wav", f"{ID}.wav"]
    clips = list(read_audioset([path], audio, CLASSES, "train", full_length=True).read())
    assert [clip.source for clip in clips] == [f"{ID}.wav"] * 3


@pytest.mark.parametrize("first", ["/m/unknown", ""])
def test_a_file_named_by_the_id_alone_is_the_first_row_s_though_that_is_rejected(
    tmp_path: Path, first: str
) -> None:
    path = write_segments(tmp_path / "1.csv", [(ID, 30.0, 40.0, first), (ID, 100.0, 110.0, "/m/04rlf")])
    audio = touch(tmp_path / "audio", f"{ID}.wav")
    rejected, second = read_audioset([path], audio, CLASSES, "train").read()
    assert isinstance(rejected, Rejected)
    assert isinstance(second, Clip)
    assert (second.name, second.found) == (f"{ID}_100", False)


def test_bad_rows_are_rejected_by_their_reason_and_the_others_stay(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [
        ("a", 0.0, 10.0, "/m/no"),
        ("b", 0.0, 10.0, ""),
        ("c", 10.0, 10.0, "/t/dd1"),
        ("d", nan, 1.0, "/t/dd1"),
    ]
    rows += [("e", 0.0, inf, "/t/dd1"), ("f", -1.0, 1.0, "/t/dd1"), ("", 0.0, 1.0, "/t/dd1")]
    rows += [("good", 0.0, 10.0, "/t/dd1")]
    audio = touch(tmp_path / "audio", "good.wav")
    *bad, good = read_audioset([write_segments(tmp_path / "1.csv", rows)], audio, CLASSES, "x").read()
    reasons = {row.name: row.reason.split(":")[0] for row in bad if isinstance(row, Rejected)}
    assert reasons == {"a": "unknown_label", "b": "no_label", "": "bad_name"} | dict.fromkeys(
        "cdef", "bad_times"
    )
    assert good == Clip("good", "good.wav", (3,))


def test_a_list_or_folder_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    path = write_segments(tmp_path / "1.csv", [("a", 0.0, 10.0, "/t/dd1")])
    with pytest.raises(ValueError, match="no segment list"):
        read_audioset([], tmp_path, CLASSES, "x")
    with pytest.raises(ValueError, match=r"2\.csv not found"):
        read_audioset([path, tmp_path / "2.csv"], tmp_path, CLASSES, "x")
    with pytest.raises(ValueError, match="holds no audio file"):
        read_audioset([path], tmp_path, CLASSES, "x")
    with pytest.raises(ValueError, match=r"nowhere not found\. Pass the folder"):
        read_audioset([path], tmp_path / "nowhere", CLASSES, "x")
    path.write_text("# x\na, 0, 10, /m/1, /m/2\n")
    with pytest.raises(ValueError, match=r"1\.csv, line 2: got 'a, 0, 10, /m/1, /m/2', expected YTID"):
        read_audioset([path], touch(tmp_path, "a.wav"), CLASSES, "x")


def test_a_path_that_is_not_utf8_is_rejected_not_fatal(tmp_path: Path) -> None:
    path = write_segments(tmp_path / "1.csv", [(ID, 0.0, 10.0, "/t/dd1")])
    folder = tmp_path / "audio" / os.fsdecode(b"\xff")
    touch(folder, f"{ID}.wav")
    (row,) = read_audioset([path], tmp_path / "audio", CLASSES, "x").read()
    assert isinstance(row, Rejected)
    assert row.reason.startswith("bad_path: ")
