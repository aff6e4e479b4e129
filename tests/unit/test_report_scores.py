import io
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from psla_fast.report.clips import MOST_COLUMNS, count_split, draw_clips, draw_fbank, encode_png
from psla_fast.report.confusion import choose_classes, compute_confusion, find_pairs
from psla_fast.report.examples import choose_examples, compute_margins, describe_scores
from psla_fast.report.runs import read_runs
from psla_fast.shards import open_shards
from tests.reports import write_run


def test_confusion_is_the_mean_score_of_what_clips_do_not_carry():
    rng = np.random.default_rng(0)
    scores, targets = rng.random((40, 4)).astype(np.float32), (rng.random((40, 4)) < 0.4).astype(np.uint8)
    confusion = compute_confusion(scores, targets)
    for a in range(4):
        for b in range(4):
            if a == b:
                assert confusion.scored[a, a] == pytest.approx(scores[targets[:, a] == 1, a].mean(), abs=1e-6)
                continue
            there = (targets[:, a] == 1) & (targets[:, b] == 0)
            elsewhere = (targets[:, a] == 0) & (targets[:, b] == 0)
            assert confusion.scored[a, b] == pytest.approx(scores[there, b].mean(), abs=1e-6)
            assert confusion.elsewhere[a, b] == pytest.approx(scores[elsewhere, b].mean(), abs=1e-6)
            assert confusion.num_clips[a, b] == there.sum()


def test_a_class_that_no_clip_has_is_confused_with_none():
    targets = np.zeros((6, 3), np.uint8)
    targets[:, 0] = 1
    confusion = compute_confusion(np.full((6, 3), 0.5, np.float32), targets)
    assert np.isnan(confusion.scored[1]).all()
    assert find_pairs(confusion, 10) == [(0, 1), (0, 2)]
    assert find_pairs(compute_confusion(np.zeros((6, 3), np.float32), targets), 10) == []
    assert choose_classes(confusion, [], 5) == []


def test_pairs_of_few_clips_come_only_where_there_are_no_others():
    targets = np.zeros((41, 12), np.uint8)
    targets[np.arange(40), np.arange(40) % 11] = 1
    targets[40, 11] = 1  # a single clip of class 11
    scores = np.full((41, 12), 0.1, np.float32)
    scores[40, 0] = 1
    scores[targets[:, 3] == 1, 5] = 0.6
    confusion = compute_confusion(scores, targets)
    pairs = find_pairs(confusion, 20)
    assert pairs[0] == (3, 5)
    assert all(a != 11 for a, _ in pairs)
    classes = choose_classes(confusion, pairs, 4)
    assert set(classes[:2]) == {3, 5}
    assert len(classes) == len(set(classes)) <= 4


def test_a_clip_is_right_where_its_labels_score_above_all_others():
    scores = np.array([[0.9, 0.8, 0.1], [0.2, 0.7, 0.1], [0.5, 0.5, 0.1], [0.5, 0.4, 0.3]], np.float32)
    targets = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]], np.uint8)
    margins = compute_margins(scores, targets)
    assert margins[:3].tolist() == pytest.approx([0.7, -0.5, 0.0])
    assert np.isnan(margins[3])
    assert choose_examples(scores, targets, 10) == [0, 1, 2]  # right ones, then the worst


def test_examples_are_half_right_half_wrong_and_of_different_labels():
    rng = np.random.default_rng(0)
    targets = np.eye(10, dtype=np.uint8)[np.arange(200) % 10]
    scores = (0.5 * targets + 0.6 * rng.random((200, 10))).astype(np.float32)
    chosen = choose_examples(scores, targets, 12)
    right = compute_margins(scores, targets)[chosen] > 0
    assert right.tolist() == [True] * 6 + [False] * 6
    assert len({int(targets[clip].argmax()) for clip in chosen[:6]}) == 6
    assert len({int(targets[clip].argmax()) for clip in chosen[6:]}) == 6
    perfect = targets.astype(np.float32)
    assert len(choose_examples(perfect, targets, 12)) == 12  # none is wrong, so all are right


def test_shown_scores_are_the_highest_and_the_labels():
    scores = np.linspace(1, 0, 9).astype(np.float32)
    targets = np.zeros(9, np.uint8)
    targets[[1, 8]] = 1
    shown = describe_scores(scores, targets)
    assert [entry["class"] for entry in shown] == [0, 1, 2, 3, 4, 8]
    assert [entry["labelled"] for entry in shown] == [False, True, False, False, False, True]


def test_a_picture_is_a_png_with_high_mels_on_top_and_time_to_the_right():
    fbank = np.full((2000, 64), -15.0, np.float32)
    fbank[1000:, :32] = 5.0  # the second half sounds, in the lower mels
    picture = matplotlib.image.imread(io.BytesIO(draw_fbank(fbank)))[..., :3].sum(axis=2)
    assert picture.shape == (64, MOST_COLUMNS)
    left, right = picture[:, : MOST_COLUMNS // 2 - 1], picture[:, MOST_COLUMNS // 2 + 1 :]
    assert right[32:].min() > 2 > left.max()
    assert right[:32].max() < 0.1
    assert matplotlib.image.imread(io.BytesIO(draw_fbank(fbank[:1]))).shape[:2] == (64, 1)
    assert len(draw_fbank(np.zeros((5, 8), np.float32))) > 0  # silence has no range


def test_the_same_levels_give_the_same_bytes():
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert encode_png(levels) == encode_png(levels.copy())


def test_counts_and_pictures_come_from_the_shards(shards: Path, tmp_path: Path):
    (run,) = read_runs([write_run(tmp_path / "a", "--input.clip-frames", "40", shards=shards, epochs=1)])
    with open_shards(shards / "train") as train:
        wanted = np.bincount(train.index.indices, minlength=5)
    counts = count_split(run, str(shards), "train")
    assert counts.num_clips == 61
    assert (counts.by_class == wanted).all()
    with open_shards(shards / "eval") as split:
        keys, lengths = split.keys, split.index.num_frames.tolist()
        labels_of = {key: split.labels(number).tolist() for number, key in enumerate(keys)}
    assert min(lengths) < 40 < max(lengths)
    labels_of[keys[0]] = [0, 1, 2, 3, 4]  # another labelling, so another clip
    pictures = draw_clips(run, str(shards), "eval", {**labels_of, "unknown": [0]})
    assert list(pictures) == keys[1:]
    assert [picture.seconds for picture in pictures.values()] == pytest.approx([n / 100 for n in lengths[1:]])
    heard = [picture.heard_seconds for picture in pictures.values()]
    assert heard == pytest.approx([min(n, 40) / 100 for n in lengths[1:]])
    labels = tmp_path / "labels.csv"
    labels.write_text("key,mids\n" + "".join(f"clip{n:04d},/m/3\n" for n in range(61)))
    (other,) = read_runs([write_run(tmp_path / "b", "--data.labels", str(labels), epochs=1)])
    assert count_split(other, str(shards), "train").by_class.tolist() == [0, 0, 0, 61, 0]
    assert count_split(other, str(shards), "val").num_clips == 13
