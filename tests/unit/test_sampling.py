import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from psla_fast.classes import read_classes
from psla_fast.sampling import (
    Draws,
    SamplingConfig,
    compute_class_counts,
    compute_draws,
    compute_sample_weights,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "label_enhancement_fsd50k"
LEAST_P = 1e-3  # the seeds are fixed: a test of these passes always or never


def golden_labels() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The golden datafile's labels in CSR form."""
    index = read_classes(GOLDEN / "fsd50k_classes.csv").index_by_mid()
    rows = json.loads((GOLDEN / "datafile.json").read_text())["data"]
    labels = [[index[mid] for mid in row["labels"].split(",")] for row in rows]
    return np.cumsum([0, *map(len, labels)]), np.concatenate(labels)


def skewed_weights(num_clips: int = 60) -> npt.NDArray[np.float64]:
    return np.geomspace(1, 100, num_clips)


def frequencies(ids: npt.NDArray[np.int64], num_clips: int) -> npt.NDArray[np.int64]:
    return np.bincount(ids, minlength=num_clips)


def same(a: Draws, b: Draws) -> bool:
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("clip_ids", "partner_ids", "lam"))


def test_sample_weights_equal_pslas_of_the_golden_label_set() -> None:
    expected = np.loadtxt(GOLDEN / "expected_sample_weights.txt")
    indptr, indices = golden_labels()
    weights = compute_sample_weights(indptr, indices, num_classes=200)
    assert weights.shape == expected.shape == (160,)
    np.testing.assert_allclose(weights, expected, rtol=1e-12, atol=0)


def test_a_weight_sums_1000_by_class_count_over_a_clips_labels() -> None:
    indptr, indices = np.array([0, 2, 3, 3, 4]), np.array([0, 2, 0, 0])  # class 0 thrice, 2 once, 1 never
    assert compute_class_counts(indices, 4).tolist() == [3, 0, 1, 0]
    weights = compute_sample_weights(indptr, indices, num_classes=4)
    assert weights == pytest.approx([1000 / 3.01 + 1000 / 1.01, 1000 / 3.01, 0, 1000 / 3.01], rel=1e-15)


@pytest.mark.parametrize("kind", ["balanced", "shuffle"])
def test_draws_are_a_function_of_seed_and_epoch(kind: str) -> None:
    config, weights = SamplingConfig(kind=kind), skewed_weights()
    drawn = {
        (seed, epoch): compute_draws(config, weights, seed, epoch) for seed in (0, 1) for epoch in (0, 1)
    }
    for (seed, epoch), draws in drawn.items():
        assert same(draws, compute_draws(config, weights, seed, epoch))
        for other in drawn:
            if other != (seed, epoch):
                assert not np.array_equal(draws.clip_ids, drawn[other].clip_ids)
                assert not np.array_equal(draws.partner_ids, drawn[other].partner_ids)
                assert not np.array_equal(draws.lam, drawn[other].lam)


def test_draws_leave_numpys_global_generator_alone() -> None:
    before = np.random.get_state()[1].copy()
    compute_draws(SamplingConfig(), skewed_weights(), seed=0, epoch=0)
    assert np.array_equal(before, np.random.get_state()[1])


def test_balanced_draws_follow_the_weights() -> None:
    weights = skewed_weights()
    draws = compute_draws(SamplingConfig(num_draws=200_000), weights, seed=0, epoch=3)
    counts = frequencies(draws.clip_ids, len(weights))
    assert stats.chisquare(counts, weights / weights.sum() * 200_000).pvalue > LEAST_P
    slightly_off = weights * np.linspace(1, 1.1, len(weights))  # the test does tell 10 % apart
    assert stats.chisquare(counts, slightly_off / slightly_off.sum() * 200_000).pvalue < LEAST_P


def test_balanced_draws_follow_the_weights_from_epoch_to_epoch_too() -> None:
    weights = skewed_weights()
    config = SamplingConfig()
    counts = sum(
        frequencies(compute_draws(config, weights, seed=7, epoch=epoch).clip_ids, len(weights))
        for epoch in range(1000)
    )
    assert stats.chisquare(counts, weights / weights.sum() * 60_000).pvalue > LEAST_P


def test_a_clip_without_weight_is_never_drawn_wherever_it_stands() -> None:
    weights = np.array([0.0, 0, 1, 0, 1e-9, 2, 0, 0])
    draws = compute_draws(SamplingConfig(num_draws=20_000), weights, seed=0, epoch=0)
    assert set(draws.clip_ids) == {2, 5}
    assert set(draws.partner_ids) == set(range(-1, 8)), "a partner is uniform over all clips"


def test_a_draw_rounded_up_to_the_sum_of_the_weights_is_still_a_clip_with_weight() -> None:
    smallest = np.array([0.0, 5e-324, 0.0])  # of which every second product is rounded up to the whole
    draws = compute_draws(SamplingConfig(num_draws=100), smallest, seed=0, epoch=0)
    assert set(draws.clip_ids) == {1}


def test_partners_are_uniform_whatever_the_weights() -> None:
    weights = skewed_weights()
    draws = compute_draws(SamplingConfig(num_draws=200_000), weights, seed=0, epoch=0)
    partners = draws.partner_ids[draws.partner_ids >= 0]
    assert stats.chisquare(frequencies(partners, len(weights))).pvalue > LEAST_P
    shuffled = compute_draws(SamplingConfig("shuffle", num_draws=200_000), weights, seed=0, epoch=0)
    partners = shuffled.partner_ids[shuffled.partner_ids >= 0]
    assert stats.chisquare(frequencies(partners, len(weights))).pvalue > LEAST_P


def test_partners_do_not_depend_on_their_clip() -> None:
    draws = compute_draws(SamplingConfig(num_draws=200_000), np.ones(12), seed=0, epoch=0)
    mixed = draws.partner_ids >= 0
    table = np.zeros((12, 12), dtype=np.int64)
    np.add.at(table, (draws.clip_ids[mixed], draws.partner_ids[mixed]), 1)
    assert stats.chi2_contingency(table).pvalue > LEAST_P


def test_half_of_the_clips_are_mixed_and_the_others_have_lambda_1_and_no_partner() -> None:
    draws = compute_draws(SamplingConfig(num_draws=100_000), skewed_weights(), seed=0, epoch=0)
    mixed = draws.partner_ids >= 0
    assert stats.binomtest(int(mixed.sum()), 100_000, 0.5).pvalue > LEAST_P
    assert (draws.partner_ids[~mixed] == -1).all()
    assert (draws.lam[~mixed] == 1).all()
    assert ((draws.lam[mixed] > 0) & (draws.lam[mixed] < 1)).all()


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_the_mixup_rate_is_kept(rate: float) -> None:
    draws = compute_draws(SamplingConfig(num_draws=50_000, mixup_rate=rate), np.ones(9), seed=0, epoch=0)
    num_mixed = int((draws.partner_ids >= 0).sum())
    assert stats.binomtest(num_mixed, 50_000, rate).pvalue > LEAST_P
    assert num_mixed == {0.0: 0, 1.0: 50_000}.get(rate, num_mixed)


@pytest.mark.parametrize("alpha", [0.5, 10.0])
def test_lambda_is_beta_distributed(alpha: float) -> None:
    config = SamplingConfig(num_draws=20_000, mixup_rate=1, mixup_alpha=alpha)
    draws = compute_draws(config, np.ones(9), seed=0, epoch=0)
    assert stats.kstest(draws.lam, stats.beta(alpha, alpha).cdf).pvalue > LEAST_P


def test_a_shuffle_is_a_permutation_whatever_the_weights() -> None:
    weights = np.concatenate([np.zeros(30), skewed_weights(70)])
    draws = compute_draws(SamplingConfig("shuffle"), weights, seed=0, epoch=0)
    assert sorted(draws.clip_ids) == list(range(100))
    assert list(draws.clip_ids) != list(range(100))


@pytest.mark.parametrize(("num_draws", "least", "most"), [(40, 0, 1), (100, 1, 1), (250, 2, 3), (300, 3, 3)])
def test_a_shuffle_of_other_length_draws_every_clip_about_alike(
    num_draws: int, least: int, most: int
) -> None:
    draws = compute_draws(SamplingConfig("shuffle", num_draws=num_draws), np.ones(100), seed=0, epoch=0)
    counts = frequencies(draws.clip_ids, 100)
    assert (len(draws.clip_ids), counts.min(), counts.max()) == (num_draws, least, most)
    if num_draws == 300:  # each pass in another order
        assert not np.array_equal(draws.clip_ids[:100], draws.clip_ids[100:200])


@pytest.mark.parametrize("kind", ["balanced", "shuffle"])
def test_draws_have_the_length_and_types_promised(kind: str) -> None:
    for num_draws, expected in ((0, 60), (17, 17), (500, 500)):
        draws = compute_draws(SamplingConfig(kind=kind, num_draws=num_draws), skewed_weights(), 0, 0)
        assert len(draws.clip_ids) == len(draws.partner_ids) == len(draws.lam) == expected
        dtypes = (draws.clip_ids.dtype, draws.partner_ids.dtype, draws.lam.dtype)
        assert dtypes == (np.int64, np.int64, np.float32)
        assert draws.clip_ids.min() >= 0
        assert max(draws.clip_ids.max(), draws.partner_ids.max()) < 60


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mixup_rate", -0.1),
        ("mixup_rate", 1.5),
        ("mixup_alpha", 0.0),
        ("mixup_alpha", -1.0),
        ("num_draws", -1),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_flag(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"sampling.{field} is {value}"):
        SamplingConfig(**{field: value})


def test_a_balanced_draw_without_labels_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="--sampling.kind shuffle"):
        compute_draws(SamplingConfig(), np.zeros(5), seed=0, epoch=0)


@pytest.mark.parametrize("num_draws", [0, 10])
@pytest.mark.parametrize("kind", ["balanced", "shuffle"])
def test_a_draw_from_no_clips_is_refused(kind: str, num_draws: int) -> None:
    with pytest.raises(ValueError, match="clip"):
        compute_draws(SamplingConfig(kind=kind, num_draws=num_draws), np.zeros(0), seed=0, epoch=0)
