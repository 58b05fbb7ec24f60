"""Draws the frames of this folder: a cartoon of a car, a balloon and a bird before hills, seen by a moving camera.

    python examples/frames/draw_frames.py

They are this project's own work, under its license, and serve as a small example for `predict_flow.py` and
`make quickstart`.
"""

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

HEIGHT, WIDTH = 256, 384  # pixels of a frame
SCALE = 4  # drawn larger and reduced, so that edges are smooth and move by fractions of a pixel
NUM_FRAMES = 8
OUTLINE = (46, 40, 62)

Color = tuple[int, int, int]
Point = tuple[float, float]


class Canvas:
    """Draws in pixels of the frame; y is downward."""

    def __init__(self, top: Color, bottom: Color) -> None:
        column = Image.new("RGB", (1, HEIGHT * SCALE))
        for y in range(column.height):
            share = y / column.height
            column.putpixel((0, y), tuple(round(a + share * (b - a)) for a, b in zip(top, bottom, strict=True)))
        self.image = column.resize((WIDTH * SCALE, HEIGHT * SCALE))
        self._draw = ImageDraw.Draw(self.image)

    def polygon(self, points: list[Point], fill: Color, outline: float = 1.2) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.polygon(scaled, fill=fill)
        if outline:
            self._draw.line([*scaled, scaled[0]], fill=OUTLINE, width=round(outline * SCALE), joint="curve")

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Color, outline: float = 1.2) -> None:
        turns = [2 * math.pi * i / 72 for i in range(72)]
        self.polygon([(x + rx * math.cos(t), y + ry * math.sin(t)) for t in turns], fill, outline)

    def line(self, points: list[Point], width: float = 1.2, fill: Color = OUTLINE) -> None:
        self._draw.line([(x * SCALE, y * SCALE) for x, y in points], fill=fill, width=round(width * SCALE))

    def reduced(self) -> Image.Image:
        return self.image.resize((WIDTH, HEIGHT), Image.Resampling.BOX)


def draw_frame(time: float) -> Image.Image:
    """The scene at a time, in frames."""
    canvas = Canvas(top=(120, 190, 236), bottom=(250, 226, 190))
    pan = 4.0 * time  # of the camera, in pixels of the nearest layer
    canvas.ellipse(318 - 0.05 * pan, 46, 22, 22, (255, 236, 150), outline=0)
    draw_clouds(canvas, shift=-0.12 * pan)
    draw_hills(
        canvas, -0.25 * pan, base=150, height=58, period=150, fill=(128, 142, 190), seed=1, dots=(150, 164, 208)
    )
    draw_hills(canvas, -0.5 * pan, base=178, height=34, period=110, fill=(112, 168, 120), seed=2, dots=(88, 142, 100))
    draw_balloon(canvas, x=120 - 1.5 * time, y=74 - 2.2 * time)
    draw_bird(canvas, x=226 - 7.0 * time, y=62 + 1.5 * time, wing=math.sin(1.1 * time))
    draw_road(canvas, shift=-pan)
    draw_trees(canvas, shift=-0.8 * pan, sway=1.5 * math.sin(0.5 * time))
    draw_car(canvas, x=96 + 5.5 * time, y=216, turn=0.42 * time)
    draw_flowers(canvas, shift=-1.5 * pan)
    return canvas.reduced()


def draw_clouds(canvas: Canvas, shift: float) -> None:
    for x, y, size in ((40, 40, 1.0), (190, 26, 0.7), (280, 84, 0.9), (420, 50, 1.1)):
        for dx, dy, radius in ((-18, 4, 10), (-6, -3, 14), (10, -1, 12), (22, 5, 8)):
            canvas.ellipse(
                x + shift + dx * size, y + dy * size, radius * size, 0.8 * radius * size, (255, 252, 246), 0
            )


def draw_hills(
    canvas: Canvas, shift: float, base: float, height: float, period: float, fill: Color, seed: int, dots: Color
) -> None:
    """A ridge with specks, so that its motion shows within it."""
    rng = random.Random(seed)
    phase = rng.uniform(0, 6)

    def ridge(x: float) -> float:
        turn = 2 * math.pi * x / period
        return base - height * (0.5 + 0.35 * math.sin(turn + phase) + 0.15 * math.sin(2.7 * turn))

    xs = range(-8, WIDTH + 9, 4)
    canvas.polygon([(x, ridge(x - shift)) for x in xs] + [(WIDTH + 8, HEIGHT), (-8, HEIGHT)], fill)
    for _ in range(150):
        x, depth, size = rng.uniform(-20, WIDTH + 60), rng.uniform(6, 70), rng.uniform(1.0, 3.4)
        canvas.ellipse(x + shift, ridge(x) + depth, 1.6 * size, size, dots, outline=0)


def draw_road(canvas: Canvas, shift: float) -> None:
    canvas.polygon([(-5, 196), (WIDTH + 5, 196), (WIDTH + 5, HEIGHT + 5), (-5, HEIGHT + 5)], (120, 116, 128))
    canvas.polygon([(-5, 238), (WIDTH + 5, 238), (WIDTH + 5, HEIGHT + 5), (-5, HEIGHT + 5)], (142, 190, 92))
    for i in range(12):
        x = 44 * i + shift
        canvas.polygon([(x, 215), (x + 22, 215), (x + 20, 219), (x - 2, 219)], (246, 240, 210), outline=0)


def draw_trees(canvas: Canvas, shift: float, sway: float) -> None:
    rng = random.Random(5)
    for x in (20, 170, 262, 338, 430):
        height = rng.uniform(42, 64)
        x += shift
        canvas.polygon(
            [(x - 4, 200), (x + 4, 200), (x + 3, 200 - 0.5 * height), (x - 3, 200 - 0.5 * height)], (132, 92, 66)
        )
        for dx, dy, radius in ((0, 0.95, 17), (-11, 0.66, 14), (12, 0.7, 13)):
            canvas.ellipse(x + dx + sway * dy, 200 - dy * height, radius, 0.9 * radius, (70, 140, 84))
        for _ in range(7):
            dx, dy = rng.uniform(-14, 14), rng.uniform(0.6, 1.05)
            canvas.ellipse(x + dx + sway * dy, 200 - dy * height, 2.2, 2.2, (226, 92, 74), outline=0)


def draw_balloon(canvas: Canvas, x: float, y: float) -> None:
    stripes = ((220, 74, 70), (250, 214, 96), (84, 120, 200), (250, 214, 96), (220, 74, 70))
    canvas.line([(x - 14, y + 26), (x - 5, y + 48)])
    canvas.line([(x + 14, y + 26), (x + 5, y + 48)])
    for index, fill in enumerate(stripes):
        canvas.ellipse(x, y, 32 * (1 - 0.22 * index), 34, fill, outline=1.0)
    canvas.polygon([(x - 7, y + 46), (x + 7, y + 46), (x + 6, y + 57), (x - 6, y + 57)], (158, 110, 70))


def draw_bird(canvas: Canvas, x: float, y: float, wing: float) -> None:
    canvas.polygon([(x - 2, y), (x + 6, y - 14 * wing), (x + 9, y + 1)], (70, 70, 92))
    canvas.ellipse(x, y, 11, 4.5, (92, 92, 120))
    canvas.ellipse(x - 11, y - 3, 4.5, 4, (92, 92, 120))
    canvas.polygon([(x - 15, y - 4), (x - 20, y - 2), (x - 14, y - 1)], (250, 180, 70), outline=0.8)


def draw_car(canvas: Canvas, x: float, y: float, turn: float) -> None:
    canvas.polygon([(x - 40, y), (x - 40, y - 16), (x - 26, y - 18), (x - 16, y - 34), (x + 14, y - 34),
                    (x + 26, y - 18), (x + 42, y - 15), (x + 43, y)], (206, 62, 66))  # fmt: skip
    canvas.polygon([(x - 20, y - 19), (x - 13, y - 30), (x - 2, y - 30), (x - 2, y - 19)], (190, 226, 240))
    canvas.polygon([(x + 2, y - 19), (x + 2, y - 30), (x + 12, y - 30), (x + 20, y - 19)], (190, 226, 240))
    canvas.polygon([(x - 38, y - 11), (x + 42, y - 11), (x + 42, y - 7), (x - 38, y - 7)], (250, 226, 170), outline=0)
    for center in (x - 23, x + 25):
        canvas.ellipse(center, y, 11, 11, (60, 56, 70))
        canvas.ellipse(center, y, 6.5, 6.5, (210, 210, 216))
        for spoke in range(3):
            angle = turn + spoke * math.pi / 3
            dx, dy = 6.5 * math.cos(angle), 6.5 * math.sin(angle)
            canvas.line([(center - dx, y - dy), (center + dx, y + dy)])


def draw_flowers(canvas: Canvas, shift: float) -> None:
    rng = random.Random(9)
    for _ in range(46):
        x, y = rng.uniform(-10, WIDTH + 80) + shift, rng.uniform(242, 256)
        fill = rng.choice([(250, 240, 120), (244, 130, 160), (255, 255, 255)])
        canvas.line([(x, y), (x, y + 9)], width=1.4, fill=(80, 136, 60))
        canvas.ellipse(x, y, 3.2, 3.2, fill, outline=0.8)


if __name__ == "__main__":
    for index in range(NUM_FRAMES):
        draw_frame(index).save(Path(__file__).parent / f"frame_{index + 1:04d}.png", optimize=True)
