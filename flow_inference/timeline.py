"""A timeline of the flow of a video: the mean motion of each pair, scene cuts and duplicate frames, as an SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from flow_data.visualize import pixel_text
from flow_inference.video import VideoFlow

WIDTH, HEIGHT = 960, 220  # units of the drawing, which is scaled to the width of a page
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 16, 44  # margins for words and numbers
MOTION, DUPLICATE, CUT = "#2f7ed8", "#9a9a9a", "#e0245e"  # told apart by their shape, too
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # seconds or frames between labels


@dataclass(frozen=True)
class PairMotion:
    """What a timeline shows of a pair.

    Args:
        index: Of frame 1, from 0.
        mean_length: Of the flow, pixels.
        duplicate: Frame 2 is a copy of frame 1.
        cut: The scene changes between the frames.
    """

    index: int
    mean_length: float
    duplicate: bool = False
    cut: bool = False


def measure_motion(pair: VideoFlow) -> PairMotion:
    """Measure what a timeline shows of a pair. Flow that is not finite does not count."""
    lengths = torch.linalg.vector_norm(pair.flow.float(), dim=0)
    lengths = lengths[lengths.isfinite()]
    mean = float(lengths.mean()) if len(lengths) else 0.0
    return PairMotion(pair.index, mean, pair.duplicate, pair.cut)


def describe_timeline(pairs: Sequence[PairMotion], frame_rate: Fraction | float) -> str:
    """Describe a timeline as text, for those who do not see it and as a caption.

    Args:
        pairs: In the order of time.
        frame_rate: Frames per second.
    """
    if not pairs:
        return "No pair of frames."
    moving = [pair for pair in pairs if not (pair.cut or pair.duplicate)]
    sentences = [f"{len(pairs) + 1} frames, {(len(pairs) + 1) / float(frame_rate):.1f} s."]
    if moving:
        mean = sum(pair.mean_length for pair in moving) / len(moving)
        most = max(moving, key=lambda pair: pair.mean_length)
        sentences.append(
            f"Mean motion {pixel_text(mean)} px a frame, most from frame {most.index + 1} to {most.index + 2} "
            f"({pixel_text(most.mean_length)} px)."
        )
    duplicates = sum(pair.duplicate for pair in pairs)
    sentences.append(f"Duplicate frames: {duplicates or 'none'}.")
    cuts = [pair.index + 1 for pair in pairs if pair.cut]
    numbers = ", ".join(map(str, cuts[:10])) + (", ..." if len(cuts) > 10 else "")
    sentences.append(f"Scene cuts after frame {numbers}." if cuts else "Scene cuts: none.")
    return " ".join(sentences)


def draw_timeline(pairs: Sequence[PairMotion], frame_rate: Fraction | float) -> str:
    """Draw mean motion over time: a bar for each pair, a gray dot for a duplicate frame, a red line for a scene cut.

    Args:
        pairs: In the order of time.
        frame_rate: Frames per second.

    Returns:
        An `<svg>` element, whose words take the color of the text around it. A screen reader reads
        `describe_timeline`.
    """
    description = describe_timeline(pairs, frame_rate)
    longest = max((pair.mean_length for pair in pairs if not (pair.cut or pair.duplicate)), default=0.0) or 1.0
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    slot, base = width / max(len(pairs), 1), TOP + height
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = base - share * height
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
            f'stroke-opacity="0.25"/>'
            f'<text x="{LEFT - 6}" y="{y + 5:.1f}" text-anchor="end">{pixel_text(share * longest)}</text>'
        )
    for place, pair in enumerate(pairs):
        x = LEFT + place * slot
        middle = x + slot / 2
        if pair.cut:
            parts.append(
                f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{TOP}" y2="{base}" stroke="{CUT}" stroke-width="3" '
                f'stroke-dasharray="8 4"><title>scene cut after frame {pair.index + 1}</title></line>'
            )
        elif pair.duplicate:
            parts.append(
                f'<circle cx="{middle:.1f}" cy="{base - 5}" r="{min(5, max(1.5, slot / 2)):.1f}" fill="{DUPLICATE}">'
                f"<title>frame {pair.index + 2} repeats frame {pair.index + 1}</title></circle>"
            )
        else:
            tall = max(1.0, min(pair.mean_length / longest, 1.0) * height)
            parts.append(
                f'<rect x="{x + 0.1 * slot:.1f}" y="{base - tall:.1f}" width="{0.8 * slot:.1f}" height="{tall:.1f}" '
                f'fill="{MOTION}"><title>frame {pair.index + 1} to {pair.index + 2}: '
                f"{pixel_text(pair.mean_length)} px</title></rect>"
            )
    parts += _time_labels(len(pairs), float(frame_rate), slot, base)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{description}" '
        f'style="width:100%;height:auto;color:inherit" font-size="15" fill="currentColor" '
        f'font-family="sans-serif"><text x="{LEFT}" y="11" font-size="13">mean motion, px a frame</text>'
        f"{''.join(parts)}</svg>"
    )


def _time_labels(num_pairs: int, frame_rate: float, slot: float, base: float) -> list[str]:
    """Labels below the bars, at most ten: seconds, or frames where the video is short."""
    seconds = num_pairs / frame_rate
    unit, per_label = ("s", frame_rate) if seconds >= 3 else ("frame", 1.0)
    step = next((step for step in STEPS if num_pairs / (step * per_label) <= 10), STEPS[-1])
    parts, number = [], 0
    while number * step * per_label < max(num_pairs, 1):
        x = LEFT + (number * step * per_label + (0.5 if unit == "frame" else 0)) * slot
        text = f"{number * step} s" if unit == "s" else f"{number * step + 1}"
        parts.append(f'<text x="{x:.1f}" y="{base + 18}" text-anchor="middle">{text}</text>')
        number += 1
    unit_name = "time" if unit == "s" else "first frame of the pair"
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{base + 38}" text-anchor="end" font-size="13">{unit_name}</text>')
    return parts
