from pathlib import Path

import numpy as np
import pytest

from psla_fast.classes import Classes, compute_targets, find_classes, format_classes, read_classes

FSD50K_LIST = Path(__file__).parents[1] / "golden" / "label_enhancement_fsd50k" / "fsd50k_classes.csv"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "classes.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_fsd50ks_class_list_is_read_in_index_order() -> None:
    classes = read_classes(FSD50K_LIST)
    assert len(classes) == 200
    assert classes.mids[:2] == ("/m/07q2z82", "/m/0mkg")
    assert classes.names[:2] == ("Accelerating_and_revving_and_vroom", "Accordion")
    assert classes.index_by_mid()["/m/0mkg"] == 1
    assert all(classes.index_by_mid()[mid] == index for index, mid in enumerate(classes.mids))


def test_a_vocabulary_without_header_has_the_name_before_the_mid(tmp_path: Path) -> None:
    path = written(tmp_path, "0,Accordion,/m/0mkg\n1,Bark,/m/05tny_\n")
    assert read_classes(path, header=False) == Classes(("/m/0mkg", "/m/05tny_"), ("Accordion", "Bark"))


def test_rows_may_stand_in_any_order_with_blank_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "index,mid,display_name\n2,/c,C\n\n0,/a,A\n1, /b , B \n\n")
    assert read_classes(path) == Classes(("/a", "/b", "/c"), ("A", "B", "C"))


def test_what_is_written_is_read_back_whatever_the_names_hold(tmp_path: Path) -> None:
    names = ("Speech", "Male speech, man speaking", 'A "quoted" one', "Geräusch, 音", "it's")
    classes = Classes(("/m/1", "/m/2", "/t/3", "/m/4,5", "/m/6"), names)
    assert read_classes(written(tmp_path, format_classes(classes))) == classes
    assert read_classes(written(tmp_path, format_classes(read_classes(FSD50K_LIST)))).mids[199] == "/m/01s0vc"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "first row is not 'index,mid,display_name'"),
        ("0,/a,A\n1,/b,B\n", "first row is not 'index,mid,display_name'"),
        ("index,display_name,mid\n0,A,/a\n", "first row is not 'index,mid,display_name'"),
        ("index,mid,display_name\n", "empty"),
        ("index,mid,display_name\n0,/a,A\n0,/b,B\n", "row 3: index 0 stands twice"),
        ("index,mid,display_name\n0,/a,A\n1,/a,B\n", "mid /a stands twice"),
        ("index,mid,display_name\n0,/a,A\n2,/b,B\n", "indices are not 0…1"),
        ("index,mid,display_name\n1,/a,A\n2,/b,B\n", "indices are not 0…1"),
        ("index,mid,display_name\n0,/a,A\n1,/b\n", "row 3: got"),
        ("index,mid,display_name\n0,/a,Speech, male\n", "row 2: got"),
        ("index,mid,display_name\nzero,/a,A\n", "row 2: got"),
        ("index,mid,display_name\n-1,/a,A\n", "row 2: got"),
    ],
)
def test_a_faulty_class_list_is_refused_with_file_row_and_reason(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        read_classes(written(tmp_path, text))


def test_a_class_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.csv not found"):
        read_classes(tmp_path / "nowhere.csv")


def test_targets_are_one_hot_for_every_label_and_zero_elsewhere() -> None:
    labels = [np.array([0, 3]), np.array([], dtype=np.int32), np.array([2]), np.array([1, 1])]
    targets = compute_targets(labels, num_classes=4)
    assert targets.dtype == np.float32
    assert targets.tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]
    assert compute_targets([], num_classes=4).shape == (0, 4)


def test_the_packaged_class_lists_are_found_by_their_names() -> None:
    audioset, fsd50k = find_classes("audioset"), find_classes("fsd50k")
    assert (len(audioset), audioset.mids[0], audioset.names[1]) == (
        527,
        "/m/09x0r",
        "Male speech, man speaking",
    )
    assert fsd50k == read_classes(FSD50K_LIST) == find_classes(str(FSD50K_LIST))


def test_a_class_list_that_is_neither_packaged_nor_a_file_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"class list nowhere not found\. Pass audioset or fsd50k, or the path"
    ):
        find_classes("nowhere")


def test_a_byte_order_mark_before_the_header_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_bytes(b"\xef\xbb\xbfindex,mid,display_name\r\n0,/a,A\r\n")
    assert read_classes(tmp_path / "classes.csv") == Classes(("/a",), ("A",))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"index,mid,display_name\n" + b"9" * 5000 + b",/a,A\n", "row 2: got '9+…', expected an index"),
        (b"index,mid,display_name\n0,,A\n", "class 0 has an empty mid"),
        (b"index,mid,display_name\n0," + b"x" * 200_000 + b",A\n", "not a CSV file .*field limit"),
        (b"index,mid,display_name\n0,\xff,A\n", "not a CSV file in UTF-8"),
        (b"\0" * 2**27, "larger than 64 MB"),
    ],
)
def test_a_damaged_class_list_is_one_short_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "classes.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"classes\.csv.* {said}") as caught:
        read_classes(tmp_path / "classes.csv")
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_a_long_list_that_names_a_mid_twice_is_refused_at_once() -> None:
    mids = tuple(str(number // 2) for number in range(200_000))
    with pytest.raises(ValueError, match="mid 0 stands twice"):
        Classes(mids, mids)
