from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from psla_fast.scores import write_scores
from psla_fast.shards import Shards, open_shards
from psla_fast.stream import StreamConfig
from psla_fast.train.config import TrainConfig
from psla_fast.train.distillation import DistillConfig, set_teacher
from psla_fast.train.losses import LossConfig, compute_loss
from tests.stream_worker import make_plan, read_batches
from tests.tiny import tiny_config

BCE, CROSS_ENTROPY = LossConfig(), LossConfig("cross_entropy")
Table = tuple[list[str], np.ndarray, list[str]]  # keys, scores, mids


def draw_scores(num_clips: int, num_classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((num_clips, num_classes), dtype=np.float32)


def write_teacher(path: Path, table: Table) -> str:
    keys, scores, mids = table
    write_scores(path, keys, scores, np.zeros(scores.shape), mids)
    return str(path)


@pytest.fixture
def train(packed: Path):
    with open_shards(packed / "train") as shards:
        yield shards


@pytest.fixture
def table(train: Shards) -> Table:
    scores = draw_scores(len(train), len(train.classes))
    return train.keys, scores, list(train.classes.mids)


def all_targets(shards: Shards) -> np.ndarray:
    return shards.targets(np.arange(len(shards)))


@pytest.mark.parametrize("weight", [0.25, 0.9, 1.0])
def test_targets_are_the_blend_of_labels_and_scores_matched_by_key(
    train: Shards, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float
):
    keys, scores, mids = table
    labels, identity, index = all_targets(train), make_plan(train, StreamConfig(), 40).identity, train.index
    order = np.random.default_rng(1).permutation(len(keys) + 3)
    more = np.concatenate([scores, np.full((3, scores.shape[1]), np.nan, np.float32)])  # clips of no interest
    names = [*keys, "nobody", "else's", "clips"]
    monkeypatch.setattr("psla_fast.scores.CLIPS_A_PIECE", 5)
    path = write_teacher(tmp_path / "t.h5", ([names[i] for i in order], more[order], mids))
    set_teacher(train, DistillConfig(path, weight), BCE)
    assert np.allclose(all_targets(train), (1 - weight) * labels + weight * scores, atol=5e-4)
    assert all_targets(train).dtype == np.float32
    assert train.index is index
    now = make_plan(train, StreamConfig(), 40).identity
    assert {name for name in now if now[name] != identity[name]} == {"shards"}  # the sample weights stay


def test_other_scores_or_another_weight_make_another_set(packed: Path, table: Table, tmp_path: Path):
    keys, scores, mids = table
    changed = scores.copy()
    changed[3, 1] /= 2
    fingerprints = []
    for number, (values, weight) in enumerate([(scores, 0.9), (changed, 0.9), (scores, 0.8), (scores, 0.9)]):
        with open_shards(packed / "train") as shards:
            path = write_teacher(tmp_path / f"{number}.h5", (keys, values, mids))
            set_teacher(shards, DistillConfig(path, weight), BCE)
            fingerprints.append(shards.fingerprint)
    assert len(set(fingerprints)) == 3
    assert fingerprints[0] == fingerprints[3]


def spoil(value: float) -> Callable[[Table], Table]:
    def change(table: Table) -> Table:
        scores = table[1].copy()
        scores[-2, 5] = value
        return table[0], scores, table[2]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: (t[0][:-2], t[1][:-2], t[2]), r"2 of 64 clips of \S+train have no scores \(\S+ is one\)"),
        (lambda t: (t[0], t[1][:, 1:], t[2][1:]), "has scores of 13 classes, not 14"),
        (lambda t: (t[0], t[1], t[2][::-1]), "has scores of other classes, or in another order"),
        (spoil(np.nan), r"the scores of \S+ aren't all in \[0, 1\]"),
        (spoil(-0.1), r"the scores of \S+ aren't all in \[0, 1\]"),
        (spoil(1.1), r"the scores of \S+ aren't all in \[0, 1\]\. Give them after the sigmoid"),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_line_and_changes_nothing(
    train: Shards, table: Table, tmp_path: Path, change: Callable[[Table], Table], message: str
):
    before = all_targets(train), train.fingerprint
    path = write_teacher(tmp_path / "t.h5", change(table))
    with pytest.raises(ValueError, match=message) as caught:
        set_teacher(train, DistillConfig(path), BCE)
    assert "\n" not in str(caught.value)
    assert np.array_equal(all_targets(train), before[0])
    assert train.fingerprint == before[1]


def test_the_line_for_a_bad_score_names_its_clip(train: Shards, table: Table, tmp_path: Path):
    path = write_teacher(tmp_path / "t.h5", spoil(2.0)(table))
    with pytest.raises(ValueError, match=f"the scores of {train.keys[-2]} aren't"):
        set_teacher(train, DistillConfig(path), BCE)


def test_what_is_no_score_file_is_refused_as_by_the_other_commands(train: Shards, tmp_path: Path):
    with pytest.raises(ValueError, match="none.h5 not found"):
        set_teacher(train, DistillConfig(str(tmp_path / "none.h5")), BCE)
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["key"] = np.array([b"a"])
    with pytest.raises(ValueError, match="is not a score file"):
        set_teacher(train, DistillConfig(str(tmp_path / "t.h5")), BCE)


def test_scores_just_above_one_as_several_heads_give_them_count_as_one(
    train: Shards, table: Table, tmp_path: Path
):
    path = write_teacher(tmp_path / "t.h5", spoil(1 + 1e-6)(table))
    set_teacher(train, DistillConfig(path, 1.0), BCE)
    assert all_targets(train)[-2, 5] == 1


@pytest.mark.parametrize("loss", [BCE, LossConfig(label_smoothing=0.1), CROSS_ENTROPY])
def test_the_loss_of_the_blend_is_the_blend_of_the_losses(
    train: Shards, table: Table, tmp_path: Path, loss: LossConfig
):
    single = np.arange(len(train)) % len(train.classes)  # cross-entropy is for sets of one label a clip
    train.set_labels(np.arange(len(train) + 1), single.astype(np.int32))
    labels = torch.from_numpy(all_targets(train))
    set_teacher(train, DistillConfig(write_teacher(tmp_path / "t.h5", table), 0.7), loss)
    student = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1))
    teacher = torch.from_numpy(table[1])
    if loss.kind == "cross_entropy":
        teacher = (teacher.log() - (-teacher).log1p()).softmax(dim=1)
    parts = 0.3 * compute_loss(student, labels, loss) + 0.7 * compute_loss(student, teacher, loss)
    blended = compute_loss(student, torch.from_numpy(all_targets(train)), loss)
    assert float(blended) == pytest.approx(float(parts), rel=1e-3)


@pytest.mark.parametrize("loss", [BCE, CROSS_ENTROPY])
def test_a_student_that_scores_as_its_teacher_has_nothing_to_learn_from_it(
    train: Shards, table: Table, tmp_path: Path, loss: LossConfig
):
    scores = table[1].clip(0.02, 0.98)
    path = write_teacher(tmp_path / "t.h5", (table[0], scores, table[2]))
    set_teacher(train, DistillConfig(path, 1.0), loss)
    student, targets = torch.from_numpy(scores).requires_grad_(), torch.from_numpy(all_targets(train))
    (gradient,) = torch.autograd.grad(compute_loss(student, targets, loss), student)
    (other,) = torch.autograd.grad(compute_loss(student, targets.flip(0), loss), student)
    assert gradient.norm() < 0.02 * other.norm()


KINDS = [
    StreamConfig(),
    StreamConfig("resident"),
    StreamConfig("resident", place="host"),
    StreamConfig("webdataset"),
    StreamConfig(buckets=(50, 100)),
    StreamConfig("dali"),
]


@pytest.mark.parametrize("stream", KINDS, ids=lambda stream: f"{stream.kind}-{stream.place}-{stream.buckets}")
def test_every_kind_of_stream_gives_the_blend_of_clips_and_partners(
    train: Shards, table: Table, tmp_path: Path, stream: StreamConfig
):
    if stream.kind == "dali":
        pytest.importorskip("nvidia.dali")
    labels = all_targets(train)
    set_teacher(train, DistillConfig(write_teacher(tmp_path / "t.h5", table), 0.6), BCE)
    wanted = torch.from_numpy(0.4 * labels + 0.6 * table[1])
    plan = make_plan(train, stream, 100)
    plans = list(plan.batches(1))
    for batch, planned in zip(read_batches(train, plan, stream), plans, strict=True):
        targets: Tensor = batch.targets
        assert torch.allclose(targets[: len(batch.clip_ids)], wanted[batch.clip_ids], atol=5e-4)
        mixed = np.flatnonzero(planned.partner_ids >= 0)
        partners = targets[batch.partner_row[mixed]]
        assert torch.allclose(partners, wanted[planned.partner_ids[mixed]], atol=5e-4)


def test_a_weight_out_of_range_or_without_a_teacher_is_refused():
    for weight in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="distill.weight is .*; give a share above 0, up to 1"):
            DistillConfig("t.h5", weight)
    with pytest.raises(ValueError, match=r"distill.weight is for a teacher. Give --distill.scores"):
        DistillConfig(weight=0.5)


def test_a_loss_that_is_not_linear_in_the_targets_is_refused(tmp_path: Path):
    flags = ("--distill.scores", "t.h5", "--loss.kind", "focal")
    with pytest.raises(ValueError, match="focal isn't linear in the targets"):
        tiny_config(tmp_path, tmp_path / "run", *flags)
    assert isinstance(tiny_config(tmp_path, tmp_path / "run", *flags[:2]), TrainConfig)
