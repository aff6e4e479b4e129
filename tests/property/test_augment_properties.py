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
    LOG_FLOOR,
    NUM_UNIFORMS,
    AugmentConfig,
    InputSpec,
    StoredBatch,
    augment,
    mask_spans,
    mix_targets,
    mixup_linear,
    mixup_power,
)

FLOOR = float(np.float32(LOG_FLOOR))
LOG_MEL = st.floats(FLOOR, 12.0, width=32)
BELOW_1 = 1 - 2**-24
# [0, 1) as float32, with its ends, denormals and the neighbours of simple fractions
UNIFORM = st.one_of(
    st.sampled_from([0.0, 1e-45, 2**-24, 0.5 - 2**-25, 0.5, BELOW_1]), st.floats(0, BELOW_1, width=32)
)
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
        mask_spans(fbank, uniforms, AugmentConfig("power", bins, frames, mask_value=-1.0)) == -1
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
    masked = mask_spans(fbank, uniforms, AugmentConfig("power", freq_limit, time_limit, mask_value=-1.0))
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


@given(st.data(), st.integers(1, 12), st.integers(1, 6), st.sampled_from(["power", "linear"]))
def test_whatever_lies_behind_the_frames_never_shows(
    data: Any, clip_frames: int, mels: int, domain: Any
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
    config = AugmentConfig(domain, freq_mask_bins=0, time_mask_frames=0)
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
