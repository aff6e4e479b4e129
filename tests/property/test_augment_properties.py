import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from psla_fast.augment import (
    FREQ_MASKS,
    LOG_FLOOR,
    MOST_BANDS,
    MOST_MASKS,
    NUM_UNIFORMS,
    TIME_MASKS,
    AugmentConfig,
    InputSpec,
    StoredBatch,
    amplify,
    augment,
    compute_filter_db,
    draw_uniforms,
    freq_mixstyle,
    mask_spans,
    mix_targets,
    mixup_linear,
    mixup_power,
    symmetric_beta,
)

FLOOR = float(np.float32(LOG_FLOOR))
LOG_MEL = st.floats(FLOOR, 12.0, width=32)
BELOW_1 = 1 - 2**-24
# [0, 1) as float32, with its ends, denormals and the neighbours of simple fractions
UNIFORM = st.one_of(
    st.sampled_from([0.0, 1e-45, 2**-24, 0.5 - 2**-25, 0.5, BELOW_1]), st.floats(0, BELOW_1, width=32)
)
UNMASKED = AugmentConfig(freq_mask_bins=0, time_mask_frames=0)
LAMBDA = st.one_of(st.sampled_from([0.0, 1.0, 2**-24, BELOW_1]), st.floats(0, 1, width=32))


def tensors(*shape: int, elements: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    return hnp.arrays(np.float32, shape, elements=elements).map(torch.from_numpy)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Two batches of log-mels of one shape, and a λ a clip."""
    num_clips, *size = draw(st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5)))
    a, b = (draw(tensors(num_clips, *size, elements=LOG_MEL)) for _ in range(2))
    return a, b, draw(tensors(num_clips, elements=LAMBDA))


@given(pairs())
def test_lambda_1_mixes_nothing_and_lambda_0_leaves_nothing(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, lam = pair
    for mix in (mixup_power, mixup_linear):
        assert torch.equal(mix(a, b, torch.ones_like(lam)), a)
        assert torch.equal(mix(a, b, torch.zeros_like(lam)), b)


@given(pairs())
def test_a_mixture_lies_between_its_louder_part_and_3_db_above(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, lam = pair
    mixed, weight = mixup_power(a, b, lam).double(), lam.double().view(-1, 1, 1)
    louder = torch.maximum(a.double() + 2 * weight.log(), b.double() + 2 * torch.log1p(-weight))
    assert (mixed >= FLOOR).all()
    assert (mixed >= louder - 1e-4).all()
    assert (mixed <= (louder + math.log(2)).clamp(min=FLOOR) + 1e-4).all()


@given(pairs(), st.integers(1, 2**24))
def test_mixing_is_symmetric(pair: tuple[Tensor, Tensor, Tensor], numerator: int) -> None:
    a, b, _ = pair
    lam = torch.full((len(a),), numerator / 2**24)  # 1 - λ is exact
    assert torch.allclose(mixup_power(a, b, lam), mixup_power(b, a, 1 - lam), atol=1e-4)


@given(st.data(), st.integers(1, 5), st.integers(1, 6))
def test_mixed_targets_stay_targets_and_shared_classes_stay_1(data: Any, clips: int, classes: int) -> None:
    hot = st.sampled_from([0.0, 1.0])
    first, second = (data.draw(tensors(clips, classes, elements=hot)) for _ in range(2))
    lam = data.draw(tensors(clips, elements=LAMBDA))
    mixed = mix_targets(first, second, lam)
    assert (mixed >= 0).all()
    assert (mixed <= 1).all()
    assert ((mixed - 1).abs()[(first == 1) & (second == 1)] < 1e-6).all()
    assert (mixed[(first == 0) & (second == 0)] == 0).all()
    only_first = (first == 1) & (second == 0)
    assert torch.equal(mixed[only_first], lam.view(-1, 1).expand_as(mixed)[only_first])
    assert torch.equal(mix_targets(first, second, torch.ones(clips)), first)


def masks(freq_limit: int, time_limit: int, count: int = 1) -> AugmentConfig:
    return AugmentConfig(
        freq_mask_bins=freq_limit,
        num_freq_masks=count,
        time_mask_frames=time_limit,
        num_time_masks=count,
        mask_value=-1.0,
    )


def length_of_span(masked: Tensor) -> int:
    """Return how many places of a one-dimensional mask are masked, after checking that they are one span."""
    places = torch.nonzero(masked).flatten().tolist()
    assert not places or places == list(range(places[0], places[-1] + 1))
    return len(places)


@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(0, 250),
    st.integers(0, 250),
    tensors(3, NUM_UNIFORMS, elements=UNIFORM),
)
def test_masks_are_one_span_an_axis_within_it_and_below_their_widths(
    num_frames: int, num_mels: int, freq_limit: int, time_limit: int, uniforms: Tensor
) -> None:
    fbank = torch.arange(3.0 * num_frames * num_mels).view(3, num_frames, num_mels)
    in_mel, in_time, in_both = (
        mask_spans(fbank, uniforms, masks(bins, frames)) == -1
        for bins, frames in ((freq_limit, 0), (0, time_limit), (freq_limit, time_limit))
    )
    assert torch.equal(in_both, in_mel | in_time)
    for hidden, size, limit, width in (
        (in_mel.mT, num_mels, freq_limit, uniforms[:, 0]),
        (in_time, num_frames, time_limit, uniforms[:, 2]),
    ):
        assert torch.equal(hidden, hidden[:, :, :1].expand_as(hidden)), "a mask spans the whole other axis"
        for clip in range(3):
            length = length_of_span(hidden[clip, :, 0])
            assert length == math.floor(np.float32(width[clip].item()) * np.float32(min(limit, size)))
            assert length < limit or limit == 0
    masked = mask_spans(fbank, uniforms, masks(freq_limit, time_limit))
    assert torch.equal(masked[~in_both], fbank[~in_both])


@given(
    st.integers(1, 200),
    st.integers(0, 250),
    st.floats(0, 1, exclude_min=True),
    tensors(3, NUM_UNIFORMS, elements=UNIFORM),
)
def test_a_time_mask_stays_below_its_fraction_of_the_batch(
    num_frames: int, limit: int, fraction: float, uniforms: Tensor
) -> None:
    fbank = torch.arange(3.0 * num_frames).view(3, num_frames, 1)
    config = AugmentConfig(freq_mask_bins=0, time_mask_frames=limit, time_mask_fraction=fraction)
    hidden = mask_spans(fbank, uniforms, replace(config, mask_value=-1.0)) == -1
    for clip in range(3):
        length = length_of_span(hidden[clip, :, 0])
        assert length == 0 or (length < limit and length < fraction * num_frames)
    cut = replace(config, time_mask_frames=min(limit, math.floor(fraction * num_frames)), mask_value=-1.0)
    masked = mask_spans(fbank, uniforms, replace(cut, time_mask_fraction=1.0))
    assert torch.equal(hidden, masked == -1)


@given(st.data(), st.integers(1, 12), st.integers(1, 6), st.sampled_from(["power", "linear"]), st.booleans())
def test_whatever_lies_behind_the_frames_never_shows(
    data: Any, clip_frames: int, mels: int, domain: Any, changes_sound: bool
) -> None:
    num_clips = data.draw(st.integers(1, 3))
    rows = 2 * num_clips
    stored = data.draw(tensors(rows, clip_frames, mels, elements=LOG_MEL))
    num_frames = torch.tensor(data.draw(st.lists(st.integers(0, clip_frames), min_size=rows, max_size=rows)))
    partner_row = torch.tensor(
        [data.draw(st.sampled_from([clip, num_clips + clip])) for clip in range(num_clips)]
    )
    lam = data.draw(tensors(num_clips, elements=LAMBDA))
    lam = torch.where(partner_row == torch.arange(num_clips), 1.0, lam)
    uniforms = data.draw(tensors(num_clips, NUM_UNIFORMS, elements=UNIFORM))
    sounds = dict(gain_db=7.0, freq_mixstyle=1.0, filter_augment_db=6.0) if changes_sound else {}
    config = replace(UNMASKED, mixup_domain=domain, **sounds)
    spec = InputSpec(clip_frames, mels, pad_value=-2.0, mean=-4.6476, std=4.5699)
    behind = torch.arange(clip_frames) >= num_frames[:, None]
    results = []
    for garbage in (0.0, math.nan, math.inf, -math.inf, 3e38):
        slab = torch.where(behind.unsqueeze(2), garbage, stored)
        x, _ = augment(
            StoredBatch(slab, num_frames, torch.zeros(rows, 2), partner_row, lam), uniforms, config, spec
        )
        results.append(x)
    assert torch.isfinite(results[0]).all()
    assert all(torch.equal(results[0], other) for other in results[1:])
    pad = torch.tensor((spec.pad_value - spec.mean) / spec.std)
    assert torch.allclose(results[0][behind[:num_clips]], pad)


@given(tensors(4, NUM_UNIFORMS, elements=UNIFORM), st.integers(1, 30), st.integers(1, 60))
def test_a_roll_moves_frames_by_less_than_its_limit_and_loses_none(
    uniforms: Tensor, clip_frames: int, limit: int
) -> None:
    stored = torch.arange(4.0 * clip_frames).view(4, clip_frames, 1)
    rows, num_frames = torch.arange(4), torch.full((4,), clip_frames)
    config = AugmentConfig(freq_mask_bins=0, time_mask_frames=0, roll_frames=limit)
    spec = InputSpec(clip_frames, 1, pad_value=0.0, mean=0.0, std=1.0)
    x, _ = augment(
        StoredBatch(stored, num_frames, torch.zeros(4, 2), rows, torch.ones(4)), uniforms, config, spec
    )
    for clip in range(4):
        shifts = [s for s in range(-limit, limit) if torch.equal(x[clip], stored[clip].roll(s, dims=0))]
        assert shifts


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(0, 70),
    st.integers(0, 70),
    st.integers(1, MOST_MASKS),
    tensors(3, NUM_UNIFORMS, elements=UNIFORM),
)
def test_several_masks_are_the_union_of_single_ones(
    num_frames: int, num_mels: int, freq_limit: int, time_limit: int, count: int, uniforms: Tensor
) -> None:
    fbank = torch.arange(3.0 * num_frames * num_mels).view(3, num_frames, num_mels)
    hidden = mask_spans(fbank, uniforms, masks(freq_limit, time_limit, count)) == -1
    union = torch.zeros_like(hidden)
    for freq, time in zip(FREQ_MASKS[:count], TIME_MASKS[:count], strict=True):
        alone = torch.cat([uniforms[:, freq : freq + 2], uniforms[:, time : time + 2]], dim=1)
        union |= mask_spans(fbank, alone, masks(freq_limit, time_limit)) == -1
    assert torch.equal(hidden, union)
    in_mel = mask_spans(fbank, uniforms, masks(freq_limit, 0, count))[:, 0] == -1
    begins = in_mel.int().diff(dim=1, prepend=torch.zeros(3, 1)) == 1
    assert (begins.sum(dim=1) <= count).all(), "at most as many spans as masks"
    assert (in_mel.sum(dim=1) <= count * max(freq_limit - 1, 0)).all()


@given(st.data(), st.floats(-80, 80, width=32))
def test_a_gain_adds_its_decibels_but_leaves_silence_and_the_floor(data: Any, gain_db: float) -> None:
    fbank = data.draw(tensors(2, 3, 4, elements=LOG_MEL))
    louder = amplify(fbank, torch.tensor(gain_db))
    expected = (fbank.double() + gain_db * math.log(10) / 10).clamp(min=FLOOR)
    silent = fbank == FLOOR
    assert (louder[silent] == FLOOR).all()
    assert ((louder - expected).abs()[~silent] < 1e-5).all()
    assert (louder >= FLOOR).all()


@given(tensors(5, 2 + 2 * MOST_BANDS, elements=UNIFORM), st.integers(1, 160), st.floats(0, 30, width=32))
def test_a_filter_is_linear_in_3_to_6_bands_and_stays_within_its_decibels(
    uniforms: Tensor, num_mels: int, limit_db: float
) -> None:
    drawn = compute_filter_db(uniforms, num_mels, limit_db)
    assert drawn.shape == (5, num_mels)
    assert (drawn.abs() <= limit_db * (1 + 1e-5)).all()
    for clip in range(5):
        row = uniforms[clip].double().numpy()
        num_bands = 3 + int(row[0] * 4)
        spacings = 1e-6 - np.log1p(-row[1 : 1 + num_bands])
        narrowest = min(6, (num_mels - 1) / 6)
        widths = narrowest + spacings / spacings.sum() * (num_mels - 1 - num_bands * narrowest)
        ends = np.concatenate([[0], widths.cumsum()])
        assert (widths >= narrowest - 1e-9).all()
        assert math.isclose(ends[-1], num_mels - 1, abs_tol=1e-6)
        gains = (2 * row[7 : 8 + num_bands] - 1) * limit_db
        expected = np.interp(np.arange(num_mels), ends, gains)
        steepest = 2 * limit_db / max(widths.min(), 1e-3)
        assert np.abs(drawn[clip].numpy() - expected).max() <= 1e-4 * (1 + steepest)


@st.composite
def clips(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Log-mels (B, T, F) and their valid frames."""
    num_clips, num_frames, mels = draw(st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(1, 4)))
    lengths = draw(st.lists(st.integers(0, num_frames), min_size=num_clips, max_size=num_clips))
    return draw(tensors(num_clips, num_frames, mels, elements=LOG_MEL)), torch.tensor(lengths)


@given(clips(), st.data())
def test_freq_mixstyle_keeps_the_shape_and_is_nothing_at_lambda_1(
    drawn: tuple[Tensor, Tensor], data: Any
) -> None:
    fbank, num_frames = drawn
    mixed = freq_mixstyle(fbank, num_frames, data.draw(tensors(len(fbank), elements=LAMBDA)))
    assert mixed.shape == fbank.shape
    assert torch.isfinite(mixed).all()
    assert (mixed >= FLOOR).all()
    assert torch.equal(freq_mixstyle(fbank, num_frames, torch.ones(len(fbank))), fbank)


@given(st.data(), st.integers(1, 3), st.integers(2, 12), st.integers(1, 4))
def test_freq_mixstyle_gives_a_clip_the_mix_of_two_clips_statistics(
    data: Any, num_pairs: int, clip_frames: int, mels: int
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    size = (2 * num_pairs, clip_frames, mels)
    fbank = torch.randn(size, generator=generator).clamp(-4, 4) * 0.5 + 5  # no result comes near the floor
    lengths = st.lists(st.integers(1, clip_frames), min_size=2 * num_pairs, max_size=2 * num_pairs)
    num_frames, lam = torch.tensor(data.draw(lengths)), data.draw(tensors(2 * num_pairs, elements=LAMBDA))
    mixed = freq_mixstyle(fbank, num_frames, lam)

    def statistics(of: Tensor) -> tuple[Tensor, Tensor]:
        valid = [clip[:count].double() for clip, count in zip(of, num_frames, strict=True)]
        mean = torch.stack([clip.mean(dim=0) for clip in valid])
        std = torch.stack([clip.std(dim=0, correction=0) for clip in valid])
        return mean, std

    (mean, std), (found_mean, found_std) = statistics(fbank), statistics(mixed)
    pairs_of = torch.arange(2 * num_pairs).view(-1, 2).flip(1).flatten()
    weight = lam.double().view(-1, 1)
    assert torch.allclose(found_mean, weight * mean + (1 - weight) * mean[pairs_of], atol=1e-4)
    floored = (std.square() + 1e-6).sqrt()
    expected = std / floored * (weight * floored + (1 - weight) * floored[pairs_of])
    assert torch.allclose(found_std, expected, atol=1e-4)


@given(tensors(20, 2, elements=UNIFORM), st.floats(1e-3, 1e3))
def test_a_symmetric_beta_is_a_fraction_for_any_alpha(uniforms: Tensor, alpha: float) -> None:
    lam = symmetric_beta(uniforms, alpha)
    assert (lam >= 0).all()
    assert (lam <= 1).all()


@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(["power", "linear"]),
    st.booleans(),
)
def test_a_clip_is_augmented_alike_on_any_number_of_ranks(
    seed: int, num_ranks: int, domain: Any, with_style: bool
) -> None:
    with_style = with_style and num_ranks < 8  # neighbours lie within a rank's share where it is even
    config = AugmentConfig(
        gain_db=7,
        mixup_domain=domain,
        freq_mask_bins=4,
        num_freq_masks=2,
        time_mask_frames=6,
        num_time_masks=3,
        freq_mixstyle=0.7 if with_style else 0.0,
        filter_augment_db=6,
        roll_frames=5,
    )
    spec = InputSpec(20, 9, pad_value=-2.0, mean=-4.6476, std=4.5699)
    generator = torch.Generator().manual_seed(seed)
    stored = torch.rand(2, 8, 20, 9, generator=generator) * 25 - 14
    num_frames = torch.randint(1, 21, (2, 8), generator=generator)
    targets, lam = torch.rand(2, 8, 3, generator=generator), torch.rand(8, generator=generator)
    uniforms, share = draw_uniforms(seed, 1, 2, 8), 8 // num_ranks

    def run_ranks(share: int) -> tuple[Tensor, Tensor]:
        results = []
        for first in range(0, 8, share):
            mine = slice(first, first + share)
            rows = [part[:, mine].flatten(0, 1) for part in (stored, num_frames, targets)]
            batch = StoredBatch(*rows, torch.arange(share, 2 * share), lam[mine])
            results.append(augment(batch, uniforms[mine], config, spec))
        x, y = zip(*results, strict=True)
        return torch.cat(x), torch.cat(y)

    for one, many in zip(run_ranks(8), run_ranks(share), strict=True):
        assert torch.equal(one, many)
