"""FSD50K, ESC-50, datafiles, tables and folders: what of their lists becomes a clip, and what doesn't."""

import json
import os
from pathlib import Path

import pytest

from psla_fast.clip import Clip, Rejected
from psla_fast.sources import (
    Split,
    read_datafile,
    read_esc50,
    read_folder,
    read_fsd50k,
    read_label_rows,
    read_table,
)
from tests.makers import CLASSES, touch, write_datafile, write_esc50, write_fsd50k_lists, write_table


def clips_of(split: Split) -> list[Clip]:
    return [row for row in split.read() if isinstance(row, Clip)]


def reasons_of(split: Split) -> dict[str, str]:
    return {row.name: row.reason.split(":")[0] for row in split.read() if isinstance(row, Rejected)}


# FSD50K


def test_fsd50ks_rows_become_clips_of_their_split_in_the_lists_order(tmp_path: Path) -> None:
    dev = [("12", "/m/04rlf,/m/09x0r", "train"), ("7", "/m/09x0r", "val"), ("3", "/m/09x0r", "train")]
    root = write_fsd50k_lists(tmp_path, dev, [("3", "/t/dd1")])
    touch(root, "FSD50K.dev_audio/12.wav", "FSD50K.dev_audio/7.wav", "FSD50K.eval_audio/3.wav")
    classes, splits = read_fsd50k(root)
    assert classes == CLASSES
    assert [(split.name, split.root, split.missing_is_normal) for split in splits] == [
        (name, root, False) for name in ("train", "val", "eval")
    ]
    train, val, evaluation = (list(split.read()) for split in splits)
    assert train == [
        Clip("12", "FSD50K.dev_audio/12.wav", (0, 2)),
        Clip("3", "FSD50K.dev_audio/3.wav", (0,), found=False),
    ]
    assert val == [Clip("7", "FSD50K.dev_audio/7.wav", (0,))]
    assert evaluation == [Clip("3", "FSD50K.eval_audio/3.wav", (3,))]
    assert list(splits[0].read()) == train  # a second time too


def test_fsd50ks_bad_rows_are_rejected_by_their_reason(tmp_path: Path) -> None:
    dev = [("1", "/m/nothing", "train"), ("2", "", "train"), ("3", "/m/09x0r", "val")]
    dev += [("3", "/m/09x0r", "train"), ("", "/m/09x0r", "val"), ("x" * 2000, "/m/09x0r", "val")]
    splits = read_fsd50k(write_fsd50k_lists(tmp_path, dev, [("3", "/m/09x0r")]))[1]
    assert reasons_of(splits[0]) == {"1": "unknown_label", "2": "no_label"}
    val = {name[:3]: reason for name, reason in reasons_of(splits[1]).items()}
    assert val == {"3": "duplicate_name", "": "bad_name", "xxx": "bad_name"}
    assert not reasons_of(splits[2])


def test_an_fsd50k_that_lacks_a_part_or_has_another_table_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocabulary\.csv not found in .*FSD50K\.dev_audio"):
        read_fsd50k(tmp_path)
    root = write_fsd50k_lists(tmp_path / "fsd", [("1", "/m/09x0r", "train")], [("3", "/m/09x0r")])
    dev = root / "FSD50K.ground_truth/dev.csv"
    text = dev.read_text()
    dev.write_text(text.replace("fname,labels", "file,labels"))
    with pytest.raises(ValueError, match=r"dev\.csv: columns are 'file,labels,mids,split', expected fname"):
        read_fsd50k(root)
    dev.write_text(text.replace("train", "test"))
    with pytest.raises(ValueError, match=r"dev\.csv, line 2: split is 'test', expected train or val"):
        read_fsd50k(root)
    dev.write_bytes(text.encode() + b"\xff,a,b,c\n")
    with pytest.raises(ValueError, match=r"dev\.csv, line 3: not a CSV file in UTF-8"):
        read_fsd50k(root)
    dev.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(list(read_fsd50k(root)[1][0].read())) == 1
    (root / "FSD50K.eval_audio").rmdir()
    with pytest.raises(ValueError, match=r"FSD50K\.eval_audio not found"):
        read_fsd50k(root)


# ESC-50


def test_a_fold_of_esc50_is_val_and_the_others_are_train(tmp_path: Path) -> None:
    root = write_esc50(tmp_path)
    classes, (train, val) = read_esc50(root, fold=2)
    assert classes.mids == classes.names == ("dog", "rooster")
    assert (train.name, val.name) == ("train", "val")
    assert [clip.name for clip in clips_of(val)] == ["2-0-A-0", "2-1-A-1"]
    assert [clip.name[0] for clip in clips_of(train)] == list("11334455")
    assert clips_of(val)[1] == Clip("2-1-A-1", "audio/2-1-A-1.wav", (1,))
    assert (root / clips_of(val)[1].source).is_file()


def test_all_folds_of_esc50_partition_it_five_times(tmp_path: Path) -> None:
    splits = {split.name: split for split in read_esc50(write_esc50(tmp_path))[1]}
    assert list(splits) == [f"fold{k}/{name}" for k in range(1, 6) for name in ("train", "val")]
    everything = {f"{k}-{target}-A-{target}" for k in range(1, 6) for target in range(2)}
    for k in range(1, 6):
        train, val = ({clip.name for clip in clips_of(splits[f"fold{k}/{n}"])} for n in ("train", "val"))
        assert train | val == everything
        assert not train & val
    assert {clip.name for k in range(1, 6) for clip in clips_of(splits[f"fold{k}/val"])} == everything


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("2-1-A-1.wav,2,1,rooster", "2-1-A-1.wav,2,1,hen", "line 5: target 1 is 'hen' here and 'rooster'"),
        ("1,rooster", "2,rooster", "targets are not 0, 1, 2"),
        (",rooster", ",dog", "mid dog stands twice"),
        ("1-0-A-0.wav,1,", "1-0-A-0.wav,one,", "line 2: got fold 'one' and target '0', expected numbers"),
        ("filename,fold", "file,fold", "columns are 'file,fold"),
    ],
)
def test_an_esc50_table_that_contradicts_itself_is_refused(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    table = write_esc50(tmp_path) / "meta/esc50.csv"
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(ValueError, match=said):
        read_esc50(tmp_path, fold=1)


def test_a_fold_that_is_not_there_and_a_clip_that_is_not_there_are_told(tmp_path: Path) -> None:
    root = write_esc50(tmp_path, folds=3)
    with pytest.raises(ValueError, match=r"has no fold 4, only 1, 2, 3\."):
        read_esc50(root, fold=4)
    (root / "audio/1-0-A-0.wav").unlink()
    assert [clip.found for clip in clips_of(read_esc50(root, fold=1)[1][1])] == [False, True]


# Datafile


def test_a_datafiles_rows_become_clips_named_by_their_wavs(tmp_path: Path) -> None:
    rows = [("/data/a/b.flac.wav", "/m/04rlf, /m/09x0r,,/m/04rlf"), ("sub/c.wav", "/t/dd1"), ("d", "/m/no")]
    rows += [("", "/t/dd1"), ("e.wav", " ,")]
    path = write_datafile(tmp_path / "train.json", rows)
    split = read_datafile(path, CLASSES, "train")
    assert (split.name, split.root, split.missing_is_normal) == ("train", tmp_path, False)
    assert clips_of(split) == [Clip("b.flac", "/data/a/b.flac.wav", (0, 2)), Clip("c", "sub/c.wav", (3,))]
    assert split.root / clips_of(split)[0].source == Path("/data/a/b.flac.wav")
    assert reasons_of(split) == {"d": "unknown_label", "": "bad_name", "e": "no_label"}
    assert list(read_label_rows(path))[:2] == [
        ("b.flac", ["/m/04rlf", "/m/09x0r", "/m/04rlf"]),
        ("c", ["/t/dd1"]),
    ]


def test_other_keys_of_a_datafile_are_passed_over_whatever_they_hold(tmp_path: Path) -> None:
    row = {"id": [1, {"wav": "no", "data": [{"labels": 3}]}], "wav": "a.wav", "labels": "/t/dd1", "n": None}
    text = json.dumps({"meta": {"data": [{"wav": 1}]}, "data": [row], "end": 1.5})
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(read_label_rows(tmp_path / "x.json")) == [("a", ["/t/dd1"])]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON .*EOF"),
        ("[]", "is not an object"),
        ("{}", "has no list 'data'"),
        ('{"data": {"item": []}}', "has more or other than one list 'data'"),
        ('{"data": [], "data": []}', "has more or other than one list 'data'"),
        ('{"data": [{"wav": "a", "labels": "b"}, 3]}', "row 2, is not an object"),
        ('{"data": [{"wav": "a"}]}', "row 1, has no 'labels'"),
        ('{"data": [{"labels": "a"}]}', "row 1, has no 'wav'"),
        ('{"data": [{"wav": null, "labels": "a"}]}', "row 1, has more or other than one text 'wav'"),
        ('{"data": [{"wav": "a", "wav": "b"}]}', "row 1, has more or other than one text 'wav'"),
        ('{"data": [{"wav": "a", "labels": "b"}', "row 1, is not JSON"),
        ('{"data": [{"wav": "a", "labels": "b"}]} {', "is not JSON"),
        ('{"data": [{"wav": "a", "labels": "b", "n": NaN}]}', "row 1, is not JSON"),
        ('{"data": [{"n": ' + "9" * 5000 + "}]}", "row 1, is not JSON"),
        ('{"data": [{"wav": "' + "x" * 2_000_000 + '"}]}', "row 1, is not JSON .*longer than"),
        ('{"data":' * 300_000, "has more or other than one list 'data'"),
        ('{"data": [{"n": ' + "[" * 2_000_000, "row 1, is not JSON .*EOF"),
    ],
)
def test_what_is_no_datafile_is_refused_with_file_row_and_reason(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"train\.json,? {said}") as caught:
        list(read_datafile(path, CLASSES, "train").read())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


# Table


def test_a_tables_columns_may_stand_in_any_order_among_others(tmp_path: Path) -> None:
    row = {"note": "x", "labels": "Music;/m/09x0r", "end": "2.50", "path": "a/b.c.wav", "start": "1"}
    split = read_table(write_table(tmp_path / "t.csv", [row]), CLASSES, "all")
    assert split.root == tmp_path
    assert list(split.read()) == [Clip("b.c_1_2.5", "a/b.c.wav", (0, 2), None, 1.0, 2.5)]
    split = read_table(write_table(tmp_path / "t.csv", [row | {"key": "k"}]), CLASSES, "all")
    assert [clip.name for clip in clips_of(split)] == ["k"]
    row |= {"start": " ", "end": ""}
    split = read_table(write_table(tmp_path / "t.csv", [row]), CLASSES, "all")
    assert list(split.read()) == [Clip("b.c", "a/b.c.wav", (0, 2))]


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("Speech", (0,)),
        ("Male speech, man speaking", (1,)),
        ("Music,Male speech, man speaking,Speech", (0, 1, 2)),
        ("Male speech, man speaking; Music ;", (1, 2)),
        ("Dog; bark", (3,)),
        ("/t/dd1,/m/09x0r, /t/dd1", (0, 3)),
        ("/t/dd1;Speech", (0, 3)),
    ],
)
def test_labels_of_a_table_are_mids_or_names_even_with_commas(
    tmp_path: Path, cell: str, labels: tuple[int, ...]
) -> None:
    table = write_table(tmp_path / "t.csv", [{"path": "a.wav", "labels": cell}])
    assert list(read_table(table, CLASSES, "all").read()) == [Clip("a", "a.wav", labels)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"labels": "Cat"}, "unknown_label"),
        ({"labels": "Speech, Male speech"}, "unknown_label"),
        ({"labels": ""}, "no_label"),
        ({"labels": " ,; "}, "no_label"),
        ({"path": ""}, "bad_name"),
        ({"path": "a\0.wav"}, "bad_name"),
        ({"path": "d/" * 3000 + "a.wav"}, "bad_path"),
        *(
            ({"start": start, "end": end}, "bad_times")
            for start, end in [
                ("x", ""), ("-1", ""), ("nan", ""), ("inf", ""), ("", "nan"), ("0", "inf"), ("5", "4"),
                ("5", "5"), ("", "0"), ("", "-1"), ("1e300", ""), ("1e9", "2e9"), ("1e-400", "1e-400"),
            ]
        ),
    ],
)  # fmt: skip
def test_a_bad_row_of_a_table_is_rejected_by_its_reason(
    tmp_path: Path, row: dict[str, str], reason: str
) -> None:
    good = {"path": "a.wav", "labels": "Speech", "start": "", "end": ""}
    split = read_table(write_table(tmp_path / "t.csv", [good | row, good]), CLASSES, "all")
    first, second = split.read()
    assert isinstance(first, Rejected)
    assert first.reason.split(":")[0] == reason
    assert isinstance(second, Clip)


def test_a_name_that_two_classes_share_is_ambiguous_and_their_mids_are_not(tmp_path: Path) -> None:
    classes = type(CLASSES)(("a", "b", "Twin"), ("Twin", "Other", "Other"))
    rows = [{"path": f"{label}.wav", "labels": label} for label in ("Other", "a", "b", "Twin")]
    split = read_table(write_table(tmp_path / "t.csv", rows), classes, "all")
    assert reasons_of(split) == {"Other": "ambiguous_label"}
    assert [clip.labels for clip in clips_of(split)] == [(0,), (1,), (2,)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "columns are '', expected path,labels"),
        ("path,label\na,b\n", "columns are 'path,label', expected path,labels"),
        ("path,labels,path\na,b,c\n", "columns are 'path,labels,path', expected path,labels, each once"),
        ("path,labels\na.wav,Speech\nb.wav,Speech,Music\n", "line 3: got 3 cells, expected 2"),
        ("path,labels\na.wav\n", "line 2: got 1 cells, expected 2"),
        ('path,labels\na.wav,"Speech\nb.wav,Speech\n', "line 3: not a CSV file"),
        ('path,labels\na.wav,"Spe"ech\n', "line 2: not a CSV file"),
        ("path,labels\n" + "x" * 200_000 + ",Speech\n", "line 2: not a CSV file .*field limit"),
        ("path,labels\n" + '"\n",' * 600_000, "not a CSV file .*longer than"),
    ],
)
def test_what_is_no_table_is_refused_with_file_line_and_reason(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"t\.csv.* {said}"):
        list(read_table(tmp_path / "t.csv", CLASSES, "all").read())


# Folder


def test_a_folder_for_each_class_gives_classes_and_clips_sorted_by_name(tmp_path: Path) -> None:
    root = touch(tmp_path, "dog/b.wav", "dog/x/a.FLAC", "cat/1.mp3", "dog/readme.txt", "dog/._b.wav")
    touch(root, "empty/no.txt", ".hidden/a.wav", "stray.ogg")
    classes, (train,) = read_folder(root, 0.0)
    assert classes.mids == classes.names == ("cat", "dog")
    assert clips_of(train) == [
        Clip("cat/1", "cat/1.mp3", (0,)),
        Clip("dog/b", "dog/b.wav", (1,)),
        Clip("dog/x/a", "dog/x/a.FLAC", (1,)),
    ]
    assert reasons_of(train) == {"stray": "no_label"}


def test_val_is_a_stable_share_of_each_class(tmp_path: Path) -> None:
    root = touch(tmp_path, *(f"{mid}/{number}.wav" for mid in ("a", "b") for number in range(400)))
    train, val = (
        {clip.name for clip in clips_of(split)} for split in read_folder(root, val_fraction=0.25)[1]
    )
    assert not train & val
    assert len(train | val) == 800
    for mid in ("a", "b"):
        assert 70 < sum(name.startswith(mid) for name in val) < 130
    touch(root, *(f"a/more{number}.wav" for number in range(100)))
    later = [{clip.name for clip in clips_of(split)} for split in read_folder(root, val_fraction=0.25)[1]]
    assert train <= later[0]
    assert val <= later[1]


def test_every_class_keeps_a_clip_in_train(tmp_path: Path) -> None:
    root = touch(tmp_path, *(f"c{number}/only.wav" for number in range(20)), "d/1.wav", "d/2.wav", "d/3.wav")
    classes, (train, val) = read_folder(root, val_fraction=0.999)
    assert {label for clip in clips_of(train) for label in clip.labels} == set(range(len(classes)))
    assert len(clips_of(train)) == 21
    assert len(clips_of(val)) == 2


def test_folders_named_train_and_val_are_splits_with_the_union_of_their_classes(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/dog/1.wav", "train/cat/2.wav", "val/dog/3.wav", "val/cow/4.wav")
    classes, splits = read_folder(root, val_fraction=0.5)
    assert classes.mids == ("cat", "cow", "dog")
    assert {split.name: clips_of(split) for split in splits} == {
        "train": [Clip("train/cat/2", "train/cat/2.wav", (0,)), Clip("train/dog/1", "train/dog/1.wav", (2,))],
        "val": [Clip("val/cow/4", "val/cow/4.wav", (1,)), Clip("val/dog/3", "val/dog/3.wav", (2,))],
    }
    touch(root, "whistle/5.wav")  # now train is a class
    assert read_folder(root, 0.0)[0].mids == ("train", "val", "whistle")


def test_links_in_a_folder_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    root = touch(tmp_path / "data", "dog/1.wav")
    touch(tmp_path / "elsewhere", "2.wav")
    (root / "dog/loop").symlink_to(root)
    (root / "dog/more").symlink_to(tmp_path / "elsewhere")
    names = [clip.name for clip in clips_of(read_folder(root, 0.0)[1][0])]
    assert "dog/1" in names
    assert "dog/more/2" in names
    assert len(names) < 6


def test_a_folder_without_classes_or_with_a_fraction_out_of_range_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no folder with audio files"):
        read_folder(touch(tmp_path, "a.wav", "b/c.txt"), 0.0)
    with pytest.raises(ValueError, match="nowhere not found"):
        read_folder(tmp_path / "nowhere", 0.0)
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="give a number from 0 to below 1"):
            read_folder(touch(tmp_path, "b/a.wav"), fraction)


def test_a_file_name_that_is_not_utf8_is_rejected_not_fatal(tmp_path: Path) -> None:
    root = touch(tmp_path, "dog/1.wav")
    Path(os.fsdecode(os.fsencode(root) + b"/dog/\xff.wav")).touch()
    split = read_folder(root, 0.0)[1][0]
    assert [clip.name for clip in clips_of(split)] == ["dog/1"]
    assert list(reasons_of(split).values()) == ["bad_name"]
    assert all(row.name.isprintable() and row.source.isprintable() for row in split.read())
