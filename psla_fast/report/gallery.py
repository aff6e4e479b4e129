"""Gallery: scored clips -> a few examples with their pictures and each run's highest scores."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psla_fast.report.clips import Picture, draw_clips
from psla_fast.report.examples import choose_examples, compute_margins, describe_scores
from psla_fast.report.runs import Run
from psla_fast.report.scored import Scored


@dataclass(frozen=True)
class Example:
    """A clip to show: its key and the indices of its classes."""

    key: str
    labels: list[int]


def choose_clips(scored: Scored, most: int) -> list[Example]:
    """Choose at most so many clips, right and wrong ones, by a run's scores."""
    if not most:
        return []
    chosen = choose_examples(scored.scores[scored.main], scored.targets, most)
    return [Example(scored.keys[clip], scored.targets[clip].nonzero()[0].tolist()) for clip in chosen]


def view_clips(scored: Scored | None, clips: Sequence[Example]) -> list[dict[str, Any] | None]:
    """Give a run's highest scores of each clip, and whether they are right; None where it wasn't scored."""
    rows = {key: row for row, key in enumerate(scored.keys)} if scored else {}
    return [_view(scored, rows.get(clip.key)) for clip in clips]


def build_gallery(
    clips: Sequence[Example],
    clip_views: Sequence[Sequence[dict[str, Any] | None]],
    source: tuple[Run, str] | None,
    role: str,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Draw clips, and put each run's scores of them beside.

    clip_views: by run and clip, those of runs before the first that was scored empty; source: a run and where
    its shards are. Where those can't be read no clip has a picture, and why is said.
    """
    pictures: dict[str, Picture] = {}
    notes = []
    if source and clips:
        try:
            pictures = draw_clips(*source, role, {clip.key: clip.labels for clip in clips})
        except ValueError as error:
            notes.append(f"no pictures of clips: {error}")
    gallery = []
    for number, clip in enumerate(clips):
        example: dict[str, Any] = {"key": clip.key, "labels": clip.labels}
        if picture := pictures.get(clip.key):
            example["picture"] = "data:image/png;base64," + base64.b64encode(picture.png).decode()
            example["seconds"] = round(picture.seconds, 2)
            example["heard"] = round(picture.heard_seconds, 2)
        example["runs"] = [views[number] if views else None for views in clip_views]
        gallery.append(example)
    return gallery, notes


def _view(scored: Scored | None, row: int | None) -> dict[str, Any] | None:
    """Give a run's scores of a clip, and whether it is right; None where it wasn't scored on it."""
    if scored is None or row is None:
        return None
    scores, targets = scored.scores[scored.main][row], scored.targets[row]
    margin = float(compute_margins(scores[None], targets[None])[0])
    return {"right": margin > 0, "scores": describe_scores(scores, targets)}
