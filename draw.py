"""Drawing the toy world: from a scene to pixels, with nothing but formulas.

A shape is a *signed distance function*: a formula for the distance of a point to the edge of the shape,
negative inside. So the share of a pixel that the shape covers is about clamp(1/2 - distance in pixels, 0, 1).
This is antialiasing without supersampling, and it works at every size: the same cat at 32x32 to train on and
at 128x128 to look at. An actor is a short list of shapes, painted in order over their own dark outline, like
a sticker. Motion moves, rotates and scales the coordinates of the pixels, never the picture.

    pixel grid --camera--> world (x right, y down) --place, size, angle--> coordinates of the actor

At zoom 1 the picture shows [-1, 1]^2 of the world, and an actor is drawn in about [-1, 1]^2 of its own
coordinates.

**Three steps.** `sprites_of` turns one scene into numbers. `layout` turns these numbers into positions at
every frame, for all scenes at once. `render` paints backgrounds, the sea and actors, for all scenes at once
and on any device. On one core of a CPU a clip of 8 frames of 32x32 took 0.6 ms (`basic`) or 1.5 ms (`rich`),
of which layout took less than 0.05 ms.

**Determinism.** What a caption does not say (exact place, size, phase of a wave) comes from the scene's seed.
On one CPU a scene renders to the same bits each time, in any batch. Another kind of CPU, or a GPU, may
round a few pixels differently, by one of 255.

Left out: light, perspective, texture, and occlusion other than by order. Real clips have them; this world
needs none.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

# Increase this number when the same seed gives another scene, another caption (data.py) or other pixels.
# Whatever was made from the world, such as the reader in lab/, is then made again. A test knows the digests.
WORLD_VERSION = 1

RGB = {
    "red": (0.90, 0.16, 0.16), "orange": (1.00, 0.53, 0.05), "yellow": (1.00, 0.88, 0.15),
    "green": (0.16, 0.72, 0.25), "blue": (0.13, 0.38, 0.95), "purple": (0.62, 0.22, 0.80),
    "white": (1.0, 1.0, 1.0), "black": (0.08, 0.08, 0.10), "glass": (0.75, 0.92, 1.0),
    "wood": (0.55, 0.36, 0.20), "grey": (0.75, 0.75, 0.78), "flame": (1.0, 0.62, 0.10),
    "pink": (1.0, 0.55, 0.62),
}  # fmt: skip

# --------------------------------------------------------------------------------------------------------
# Scenes


@dataclass(frozen=True)
class Actor:
    """One actor, or `count` equal ones in a row. `change` is "", "grows", "shrinks" or "turns COLOUR"."""

    kind: str
    colour: str
    motion: str
    change: str = ""
    count: int = 1


@dataclass(frozen=True)
class Scene:
    """A clip before it is drawn: one to three actors. `relation` says where the first actor is as seen from
    the second ("" for a single actor), `camera` is one of CAMERA_PATHS."""

    actors: tuple[Actor, ...]
    background: str
    seed: int
    relation: str = ""
    camera: str = "still"


# --------------------------------------------------------------------------------------------------------
# Shapes. p is (x, y), two tensors of the same shape; y points down, as in pictures.


def circle(p, cx, cy, r):
    """Distance to a circle."""
    return torch.hypot(p[0] - cx, p[1] - cy) - r


def ellipse(p, cx, cy, rx, ry):
    """Distance to an ellipse. It is a first-order estimate, which is good near the edge, where it matters."""
    x, y = (p[0] - cx) / rx, (p[1] - cy) / ry
    k = torch.hypot(x, y)
    return k * (k - 1) / torch.hypot(x / rx, y / ry).clamp_min(1e-4)


def capsule(p, ax, ay, bx, by, r):
    """Distance to a line from a to b, drawn with a round pen of radius r."""
    x, y = p[0] - ax, p[1] - ay
    dx, dy = bx - ax, by - ay
    h = ((x * dx + y * dy) / (dx * dx + dy * dy)).clamp(0, 1)  # the nearest point of the line: a + h (b - a)
    return torch.hypot(x - h * dx, y - h * dy) - r


def polygon(p, *points):
    """Distance to a convex polygon, its corners in either order. Beyond a corner it is a little too small."""
    pairs = list(zip(points, points[1:] + points[:1], strict=True))
    area = sum(ax * by - ay * bx for (ax, ay), (bx, by) in pairs)  # twice the signed area
    turn = math.copysign(1, area)
    distances = []  # to the line through each side, negative on the inner side
    for (ax, ay), (bx, by) in pairs:
        scale = turn / math.hypot(bx - ax, by - ay)
        distances.append(((p[0] - ax) * (by - ay) - (p[1] - ay) * (bx - ax)) * scale)
    return torch.stack(distances).amax(0)


def box(p, cx, cy, hx, hy, r):
    """Distance to a box with half sides hx, hy and corners of radius r."""
    x = (p[0] - cx).abs() - hx + r
    y = (p[1] - cy).abs() - hy + r
    outside = torch.hypot(x.clamp_min(0), y.clamp_min(0))
    inside = torch.maximum(x, y).clamp_max(0)
    return outside + inside - r


# Each kind of actor in its own coordinates, facing right: (function, paint, its numbers), in painting order.
# Paint is a name in RGB, or "main", "dark" or "light": shades of the actor's colour.
# fmt: off
SHAPES = {
    "cat": [
        (capsule, "main", -0.45, 0.65, -0.85, 0.35, 0.11),  # tail
        (capsule, "main", -0.85, 0.35, -0.80, -0.25, 0.11),
        (ellipse, "main", -0.05, 0.52, 0.52, 0.42), (ellipse, "light", 0.00, 0.62, 0.24, 0.26),  # body
        (polygon, "main", (-0.32, -0.25), (-0.27, -1.05), (0.16, -0.58)),  # ears
        (polygon, "main", (0.14, -0.58), (0.57, -1.05), (0.62, -0.25)),
        (polygon, "pink", (-0.22, -0.40), (-0.19, -0.85), (0.06, -0.58)),
        (polygon, "pink", (0.24, -0.58), (0.49, -0.85), (0.52, -0.40)),
        (ellipse, "main", 0.15, -0.20, 0.52, 0.44), (ellipse, "light", 0.15, 0.02, 0.24, 0.16),  # head
        (ellipse, "black", -0.07, -0.26, 0.09, 0.12), (ellipse, "black", 0.37, -0.26, 0.09, 0.12),  # eyes
        (circle, "black", 0.15, -0.05, 0.07),
    ],
    "dog": [
        (capsule, "main", -0.70, 0.00, -0.98, -0.45, 0.10),  # tail
        *((capsule, "main", x, 0.30, x, 0.82, 0.11) for x in (-0.62, -0.32, 0.10, 0.38)),  # legs
        (capsule, "main", -0.48, 0.20, 0.28, 0.20, 0.29), (circle, "main", 0.45, -0.35, 0.36),  # body, head
        (capsule, "light", 0.62, -0.24, 0.88, -0.20, 0.19), (capsule, "dark", 0.22, -0.52, 0.12, -0.05, 0.15),
        (circle, "black", 0.55, -0.46, 0.09), (circle, "black", 1.00, -0.30, 0.10),  # eye, nose
    ],
    "fish": [
        (polygon, "dark", (-0.40, 0.00), (-1.05, -0.55), (-0.88, 0.00)),  # tail, two halves
        (polygon, "dark", (-0.40, 0.00), (-0.88, 0.00), (-1.05, 0.55)),
        (polygon, "dark", (-0.20, -0.35), (0.05, -0.80), (0.42, -0.30)),  # fin
        (ellipse, "main", 0.15, 0.00, 0.80, 0.46), (ellipse, "light", 0.15, 0.24, 0.55, 0.16),
        (polygon, "dark", (-0.15, -0.05), (-0.05, 0.22), (0.20, 0.05)),
        (circle, "white", 0.56, -0.12, 0.16), (circle, "black", 0.60, -0.12, 0.09),
    ],
    "bird": [
        (polygon, "dark", (-0.30, 0.25), (-1.05, 0.35), (-0.95, -0.05), (-0.40, -0.15)),  # tail
        (polygon, "flame", (0.62, -0.42), (1.05, -0.22), (0.62, -0.10)),  # beak
        (ellipse, "main", -0.05, 0.15, 0.58, 0.42), (circle, "main", 0.45, -0.28, 0.32),
        (ellipse, "light", 0.12, 0.32, 0.32, 0.20),
        (polygon, "dark", (-0.38, 0.20), (-0.70, -0.95), (0.22, 0.02)),  # wing
        (circle, "black", 0.52, -0.34, 0.09),
    ],
    "car": [
        (polygon, "main", (-0.75, 0.10), (-0.45, -0.52), (0.28, -0.52), (0.62, 0.10)),
        (polygon, "glass", (-0.55, -0.02), (-0.36, -0.38), (-0.10, -0.38), (-0.10, -0.02)),
        (polygon, "glass", (0.02, -0.02), (0.02, -0.38), (0.22, -0.38), (0.42, -0.02)),
        (box, "main", 0.00, 0.22, 1.00, 0.27, 0.14), (circle, "white", 0.90, 0.14, 0.10),
        (circle, "black", -0.52, 0.48, 0.27), (circle, "black", 0.52, 0.48, 0.27),  # wheels
        (circle, "grey", -0.52, 0.48, 0.12), (circle, "grey", 0.52, 0.48, 0.12),
    ],
    "rocket": [
        (polygon, "flame", (-0.24, 0.55), (0.24, 0.55), (0.00, 1.10)),
        (polygon, "dark", (-0.22, 0.05), (-0.22, 0.55), (-0.68, 0.78), (-0.62, 0.42)),  # fins
        (polygon, "dark", (0.22, 0.05), (0.62, 0.42), (0.68, 0.78), (0.22, 0.55)),
        (polygon, "dark", (0.00, -1.10), (0.34, -0.38), (-0.34, -0.38)),  # nose
        (box, "main", 0.00, 0.10, 0.34, 0.52, 0.12), (circle, "glass", 0.00, -0.08, 0.19),
    ],
    "boat": [
        (capsule, "wood", -0.02, 0.30, -0.02, -0.95, 0.05),  # mast
        (polygon, "white", (0.06, -0.95), (0.80, 0.15), (0.06, 0.15)),
        (polygon, "light", (-0.10, -0.72), (-0.10, 0.15), (-0.62, 0.15)),
        (polygon, "main", (-0.95, 0.28), (0.95, 0.28), (0.62, 0.80), (-0.62, 0.80)),
        (polygon, "dark", (-0.88, 0.40), (0.88, 0.40), (0.82, 0.52), (-0.82, 0.52)),
    ],
    "ball": [
        (circle, "main", 0.0, 0.0, 0.78), (box, "white", 0.0, 0.0, 0.20, 0.74, 0.12),
        (circle, "light", -0.42, -0.36, 0.13),
    ],
}
SURFBOARD = [(capsule, "white", -1.15, 0.98, 1.15, 0.98, 0.13), (capsule, "pink", -1.0, 1.0, 1.0, 1.0, 0.05)]
# fmt: on


# --------------------------------------------------------------------------------------------------------
# Layout: where everything is at every frame. Time s runs from 0 to 1, lengths are in world units.

CAMERA_PATHS = {  # the camera's x is pan * (2 s - 1), its zoom is start + change * s: pan, start, change
    "still": (0.0, 1.0, 0.0),
    "pan left": (-0.35, 1.0, 0.0),
    "pan right": (0.35, 1.0, 0.0),
    "zoom in": (0.0, 1.2, -0.45),  # a small zoom shows a small part of the world
    "zoom out": (0.0, 0.75, 0.45),
}
GROWTH = {"grows": (0.6, 0.6), "shrinks": (1.2, -0.6)}  # the size is multiplied by start + change * s


class Path(NamedTuple):
    """A motion as numbers:

    x = x0 + dx (2 s - 1),    y = y0 + dy (2 s - 1) - hop |sin 2 pi s|,    angle = spin * 2 pi s T / (T + 1)
    """

    x0: float
    y0: float
    dx: float = 0.0
    dy: float = 0.0
    hop: float = 0.0
    spin: float = 0.0


class Sprite(NamedTuple):
    """One copy of an actor as numbers: an actor of count 3 becomes three sprites."""

    scene: int  # row of the scene in its batch
    layer: int  # higher layers of a scene are painted over lower ones
    kind: str
    path: Path
    size: tuple[float, float]  # at the beginning, and its change until the end
    mirror: float  # 1 faces right, -1 left
    first_colour: tuple[float, float, float]
    last_colour: tuple[float, float, float]
    wave: tuple[float, float] | None  # of a surfer: phase and level of the sea


def sea(x, s, phase, level):
    """The surface of the sea at place x and time s, tensors that broadcast -> its y, and its slope dy/dx."""
    angle = 3.0 * x - 2 * math.pi * s + phase
    return level + 0.16 * torch.sin(angle), 0.48 * torch.cos(angle)


def centers(scene: Scene) -> list[tuple[float, float]]:
    """Where each actor of the scene has its center, on average: x, y."""
    if len(scene.actors) == 1:
        return [(0.0, 0.0)]
    if scene.relation in ("above", "below"):
        first, second, third = (-0.3, -0.45), (-0.3, 0.45), (0.55, 0.0)
    else:
        first, second, third = (-0.48, -0.25), (0.48, -0.25), (0.0, 0.5)
    if scene.relation in ("right of", "below"):
        first, second = second, first
    return [first, second, third]


def motion_path(motion: str, center, x: float, y: float, single: bool) -> Path:
    """The path of an actor that wanders about `center` and is at x, y if it stands still."""
    cx, cy = center
    reach = 0.48 if single else 0.2  # how far a motion goes from its center
    if motion in ("left", "right"):
        start = x * 0.5 if single else x
        return Path(start, y, dx=-reach if motion == "left" else reach)
    if motion in ("up", "down"):
        start = y * 0.5 + cy if single else cy
        return Path(x, start, dy=-reach if motion == "up" else reach)
    if motion == "bounce":
        return Path(x, cy + reach, hop=1.7 * reach)
    if motion == "spin":
        return Path(x, y, spin=1.0)
    if motion == "surf":  # the sea decides on y
        return Path(x * 0.5 + cx * 0.5, y, dx=0.5 * reach)
    return Path(x, y)


def make_sprite(actor: Actor, center, u, single: bool) -> Sprite:
    """A sprite of the actor, in row 0 and layer 0. u are four random numbers in [0, 1)."""
    cx, cy = center
    wander_x, wander_y = (0.2, 0.15) if single else (0.06, 0.06)
    x = cx + wander_x * (2 * u[1] - 1)
    y = cy + wander_y * (2 * u[2] - 1)
    size = 0.44 + 0.08 * u[0] if single else 0.27 + 0.04 * u[0]
    if actor.count > 1:
        size = 0.66 * size
    start, change = GROWTH.get(actor.change, (1.0, 0.0))
    turns = actor.change.startswith("turns")
    last_colour = actor.change.split()[1] if turns else actor.colour
    return Sprite(
        scene=0,
        layer=0,
        kind=actor.kind,
        path=motion_path(actor.motion, center, x, y, single),
        size=(size * start, size * change),
        mirror=-1.0 if actor.motion == "left" else 1.0,  # who does not move left faces right
        first_colour=RGB[actor.colour],
        last_colour=RGB[last_colour],
        wave=(6.28 * u[3], 0.45 + 0.5 * cy) if actor.motion == "surf" else None,
    )


def sprites_of(scene: Scene, row: int) -> list[Sprite]:
    """Scene number `row` of a batch -> its sprites, in the order in which they are painted."""
    rng = np.random.default_rng([scene.seed, 2])
    single = len(scene.actors) == 1
    distance = 0.62 if single else 0.34  # between equal actors
    sprites = []
    for actor, center in zip(scene.actors, centers(scene), strict=False):
        sprite = make_sprite(actor, center, rng.random(4).tolist(), single)
        for i in range(actor.count):
            x0 = sprite.path.x0 + (i - (actor.count - 1) / 2) * distance
            path = sprite.path._replace(x0=x0)
            sprites.append(sprite._replace(scene=row, layer=len(sprites), path=path))
    return sprites


def columns(rows: list[tuple]) -> tuple[torch.Tensor, ...]:
    """n tuples of k numbers -> k float64 tensors (n, 1)."""
    return torch.tensor(rows, dtype=torch.float64).unsqueeze(-1).unbind(1)


def tracks(sprites: list[Sprite], frames: int) -> torch.Tensor:
    """n sprites -> float64 (n, T, 8): x, y, size, angle, mirror, r, g, b at every frame."""
    s = torch.linspace(0, 1, frames, dtype=torch.float64)
    x0, y0, dx, dy, hop, spin = columns([sprite.path for sprite in sprites])
    x = x0 + dx * (2 * s - 1)
    y = y0 + dy * (2 * s - 1) - hop * torch.sin(2 * math.pi * s).abs()
    turn = 2 * math.pi * s * frames / (frames + 1)  # so the last frame is not the first
    angle = spin * turn
    start, change = columns([sprite.size for sprite in sprites])
    size = start + change * s

    surfers = [i for i, sprite in enumerate(sprites) if sprite.wave]
    if surfers:
        phase, level = columns([sprites[i].wave for i in surfers])
        surface, slope = sea(x[surfers], s, phase, level)
        y[surfers] = surface - 0.92 * size[surfers]  # the feet are on the board
        angle[surfers] = torch.arctan(slope)

    mirror = torch.tensor([sprite.mirror for sprite in sprites], dtype=torch.float64)
    blend = ((s - 0.3) / 0.4).clamp(0, 1)
    first = columns([sprite.first_colour for sprite in sprites])
    last = columns([sprite.last_colour for sprite in sprites])
    colour = [a * (1 - blend) + b * blend for a, b in zip(first, last, strict=True)]
    return torch.stack([x, y, size, angle, mirror[:, None].expand_as(x), *colour], 2)


def layout(scenes: list[Scene], frames: int):
    """Scenes -> camera (B, T, 3) float64: its x, its y and its zoom; the sprites of all scenes, a list of n;
    and their tracks (n, T, 8)."""
    s = torch.linspace(0, 1, frames, dtype=torch.float64)
    pan, start, change = columns([CAMERA_PATHS[scene.camera] for scene in scenes])
    x = pan * (2 * s - 1)
    camera = torch.stack([x, torch.zeros_like(x), start + change * s], 2)
    sprites = []
    for row, scene in enumerate(scenes):
        sprites.extend(sprites_of(scene, row))
    return camera, sprites, tracks(sprites, frames)


def places(scene: Scene, frames: int) -> dict[str, tuple[float, float]]:
    """Where each kind of actor is in the picture, on average over the clip and over equal actors: x, y in
    [-1, 1]."""
    camera, sprites, track = layout([scene], frames)
    xy = (track[:, :, :2] - camera[:, :, :2]) / camera[:, :, 2:]  # (n, T, 2)
    found = {}
    for sprite, mean in zip(sprites, xy.mean(1), strict=True):
        found.setdefault(sprite.kind, []).append(mean)
    return {kind: tuple(torch.stack(means).mean(0).tolist()) for kind, means in found.items()}


# --------------------------------------------------------------------------------------------------------
# Backgrounds. x and y are world coordinates (n, T, S, S), u four random numbers in [0, 1), each (n, 1, 1, 1).

SKIES = {  # top of the sky, sky at the horizon, ground
    "meadow": ((0.42, 0.74, 0.98), (0.80, 0.93, 1.00), (0.47, 0.78, 0.36)),
    "desert": ((0.98, 0.90, 0.72), (1.00, 0.80, 0.58), (0.87, 0.68, 0.40)),
    "night": ((0.05, 0.05, 0.17), (0.13, 0.12, 0.33), (0.09, 0.11, 0.16)),
    "snow": ((0.68, 0.73, 0.80), (0.84, 0.88, 0.92), (0.97, 0.98, 1.00)),
    "city": ((0.60, 0.42, 0.62), (0.98, 0.66, 0.62), (0.36, 0.34, 0.42)),
}


def paint(image, distance, colour, pixels_per_unit=None):
    """Blend a shape into image (n, T, 3, S, S), in place. distance is (n, T, S, S), colour broadcasts to the
    image. `pixels_per_unit` is the size of a unit of distance, by default of the world at zoom 1."""
    if pixels_per_unit is None:
        pixels_per_unit = image.shape[-1] / 2
    coverage = (0.5 - distance * pixels_per_unit).clamp_(0, 1)
    image.lerp_(colour.expand_as(image), coverage.unsqueeze(2).expand_as(image))


def rgb(colour, like):
    """A name in RGB, or three numbers -> a tensor that broadcasts to an image (n, T, 3, S, S)."""
    return like.new_tensor(RGB.get(colour, colour)).view(3, 1, 1)


def paint_dots(image, x, y, a, b, count, height, radius, colour):
    """Stars or snowflakes. Steps of the golden ratio spread them evenly, for any a and b."""
    for i in range(count):
        dot_x = (a + 0.618 * i) % 1 * 2 - 1
        dot_y = (b + 0.381 * i * i) % 1 * height - 1
        paint(image, circle((x, y), dot_x, dot_y, radius), rgb(colour, x))


def paint_towers(image, x, y, a, b):
    """Six towers with lit windows."""
    for i in range(6):
        cx = -0.95 + 0.38 * i + a * 0.1
        height = 0.25 + 0.65 * ((b + 0.618 * i) % 1)
        tower = torch.maximum((x - cx).abs() - 0.16, 0.5 - height - y)
        paint(image, tower, rgb((0.42, 0.33, 0.50), x))
        window_row = ((y * 5 + 0.2) % 1 - 0.5).abs() / 5 - 0.05
        window = torch.maximum((x - cx).abs() - 0.07, window_row)
        window = torch.maximum(window, tower + 0.06)  # not at the tower's edge
        paint(image, window, rgb((1.0, 0.86, 0.55), x))


def paint_sky(image, name, x, y, u):
    """The sky of background `name` and what stands in it, over the whole image."""
    a, b, c, _ = u
    top, horizon, _ = SKIES[name]
    height = ((y + 1) / 1.6).clamp(0, 1)
    image.copy_(torch.lerp(rgb(top, x), rgb(horizon, x), height.unsqueeze(2)))
    if name == "meadow":  # a cloud of three circles
        for dx, radius in ((0.0, 0.11), (0.22, 0.16), (0.42, 0.11)):
            part = circle((x, y), a * 1.4 - 0.9 + dx, b * 0.2 - 0.75, radius)
            paint(image, part, rgb("white", x))
    elif name == "desert":
        sun = circle((x, y), a * 1.4 - 0.7, b * 0.2 - 0.65, 0.2)
        paint(image, sun, rgb((1.0, 0.97, 0.86), x))
    elif name == "night":
        paint_dots(image, x, y, a, b, 9, 1.4, 0.035, (0.95, 0.95, 0.80))
        moon = circle((x, y), c * 1.4 - 0.7, -0.66, 0.17)
        paint(image, moon, rgb((0.98, 0.96, 0.82), x))
    elif name == "city":
        paint_towers(image, x, y, a, b)


def paint_ground(image, name, x, y, u):
    """The ground of background `name`, and the snow that falls in front of it."""
    a, b, _, d = u
    ground = SKIES[name][2]
    if name not in ("meadow", "desert", "snow"):
        paint(image, 0.5 - y, rgb(ground, x))
        return
    hill = 0.10 * torch.sin(2.2 * x + 6.28 * d)
    paint(image, 0.5 + hill - y, rgb(ground, x))
    nearer = tuple(0.88 * value for value in ground)
    paint(image, 0.72 - 0.6 * hill - y, rgb(nearer, x))
    if name == "snow":
        paint_dots(image, x, y, a, b, 10, 2, 0.05, "white")


# --------------------------------------------------------------------------------------------------------
# Rendering. video is (B, T, 3, S, S) in [0, 1]; x (B, T, 1, S) and y (B, T, S, 1) are the world coordinates
# of its pixels.


def render(scenes: list[Scene], frames: int = 8, size: int = 32, device="cpu") -> torch.Tensor:
    """Scenes -> uint8 video (B, 3, T, H, W) on `device`, for any number of frames and any size. Raises
    ValueError for less than 1 frame or 4 pixels."""
    if frames < 1 or size < 4:
        raise ValueError(
            f"cannot render {frames} frames of {size} pixels; at least 1 frame and 4 pixels are needed"
        )
    camera, sprites, track = layout(scenes, frames)
    camera, track = camera.float().to(device), track.float().to(device)
    pan_x, pan_y, zoom = camera[..., None, None].unbind(2)  # each (B, T, 1, 1)
    pixels = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    x = pixels.view(1, 1, 1, size) * zoom + pan_x
    y = pixels.view(1, 1, size, 1) * zoom + pan_y
    video = torch.empty(len(scenes), frames, 3, size, size, device=device)
    draw_backgrounds(video, scenes, x, y)
    draw_sea(video, sprites, x, y)  # behind all actors
    draw_actors(video, sprites, track, x, y, zoom)
    return (video * 255).round_().to(torch.uint8).transpose(1, 2).contiguous()


def draw_backgrounds(video, scenes, x, y):
    """Fill the video with the backgrounds of its scenes, all equal ones at once."""
    frames, size = video.shape[1], video.shape[-1]
    uniform = [np.random.default_rng([scene.seed, 3]).random(4) for scene in scenes]
    uniform = torch.tensor(np.stack(uniform), dtype=torch.float32, device=video.device)
    groups = {}
    for row, scene in enumerate(scenes):
        groups.setdefault((scene.background, scene.camera == "still"), []).append(row)
    for (name, still), rows in groups.items():
        moments = 1 if still else frames  # a camera that does not move sees one picture
        shape = (len(rows), moments, size, size)
        u = uniform[rows].view(-1, 4, 1, 1, 1).unbind(1)  # four of (n, 1, 1, 1)
        world_x = x[rows, :moments].expand(shape)
        world_y = y[rows, :moments].expand(shape)
        image = video.new_empty(len(rows), moments, 3, size, size)
        paint_sky(image, name, world_x, world_y, u)
        paint_ground(image, name, world_x, world_y, u)
        video[rows] = image.expand(-1, frames, -1, -1, -1)


def draw_sea(video, sprites, x, y):
    """Draw the sea in which somebody surfs. A scene has one sea, that of its first surfer."""
    waves = {}
    for sprite in sprites:
        if sprite.wave:
            waves.setdefault(sprite.scene, sprite.wave)
    if not waves:
        return
    rows = list(waves)
    wave = torch.tensor(list(waves.values()), dtype=torch.float32, device=x.device)
    phase, level = wave[..., None, None, None].unbind(1)  # each (n, 1, 1, 1)
    s = torch.linspace(0, 1, video.shape[1], device=x.device).view(-1, 1, 1)
    surface, _ = sea(x[rows], s, phase, level)  # (n, T, 1, S)
    depth = y[rows] - surface
    image = video[rows]
    paint(image, -depth, rgb((0.10, 0.46, 0.72), x))
    paint(image, 0.16 - depth, rgb((0.07, 0.38, 0.64), x))  # deeper water is darker
    paint(image, depth.abs() - 0.045, rgb("white", x))  # foam
    video[rows] = image


def draw_actors(video, sprites, track, x, y, zoom):
    """Draw n sprites with their tracks (n, T, 8), layer by layer, all of a layer and a kind at once. zoom is
    (B, T, 1, 1)."""
    groups = {}
    for i, sprite in enumerate(sprites):
        surfs = sprite.wave is not None
        groups.setdefault((sprite.layer, sprite.kind, surfs), []).append(i)
    for (_, kind, surfs), chosen in sorted(groups.items()):
        rows = [sprites[i].scene for i in chosen]  # all different, since a scene has one sprite in a layer
        shapes = SURFBOARD + SHAPES[kind] if surfs else SHAPES[kind]
        image = video[rows]
        draw_sprites(image, shapes, track[chosen], x[rows], y[rows], zoom[rows])
        video[rows] = image


def draw_sprites(image, shapes, track, x, y, zoom):
    """Draw sprites of one kind: number i with track (T, 8) into image i of (n, T, 3, S, S)."""
    track = track[..., None, None]  # (n, T, 8, 1, 1)
    center_x, center_y, unit, angle, mirror = track[:, :, :5].unbind(2)  # each (n, T, 1, 1)
    main = track[:, :, 5:]  # (n, T, 3, 1, 1)
    shades = {"main": main, "dark": 0.6 * main, "light": 0.45 * main + 0.55}
    dx, dy = x - center_x, y - center_y
    cos, sin = torch.cos(angle), torch.sin(angle)
    p = (dx * cos + dy * sin) / unit * mirror, (dy * cos - dx * sin) / unit  # coordinates of the actor
    pixels_per_unit = unit * (image.shape[-1] / 2) / zoom
    distances = [shape(p, *numbers) for shape, _, *numbers in shapes]
    outline = torch.stack(distances).amin(0) - 0.09
    paint(image, outline, 0.22 * main, pixels_per_unit)
    for distance, (_, name, *_) in zip(distances, shapes, strict=True):
        colour = shades[name] if name in shades else rgb(name, x)
        paint(image, distance, colour, pixels_per_unit)
