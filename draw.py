"""Drawing the toy world: from a scene to pixels, with nothing but formulas.

A shape is a *signed-distance function*: a formula for how far a point lies outside of it, negative inside.
The part of a pixel that a shape covers is then clamp(1/2 - distance in pixels, 0, 1), which is anti-aliasing
for free and at every size: the same cat at 32x32 to train on and at 128x128 to look at. An actor is a short
list of shapes, painted in order over its own dark outline, a sticker. Motion moves, turns and scales the
coordinates of the pixels, never the picture.

    pixel grid --camera--> world (x right, y down, the picture is [-1, 1]^2) --place, size, angle--> actor
    ([-1, 1]^2)

Everything is batched: all actors of one kind and layer in a batch of scenes are one call, and a 32x32x8 clip
takes a third of a millisecond on two cores. What a caption does not say (exact place, size, phase of a wave)
comes from the scene's seed, so a scene renders to the same bits each time, whatever else is in the batch.

Left out: light, perspective, occlusion by anything but order, and texture; real clips have them, this world
needs none.
"""

import math
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

FPS = 8  # frames per second: a clip of 8 frames lasts a second
RGB = {
    "red": (0.90, 0.16, 0.16), "orange": (1.00, 0.53, 0.05), "yellow": (1.00, 0.88, 0.15),
    "green": (0.16, 0.72, 0.25), "blue": (0.13, 0.38, 0.95), "purple": (0.62, 0.22, 0.80),
    "white": (1.0, 1.0, 1.0), "black": (0.08, 0.08, 0.10), "glass": (0.75, 0.92, 1.0),
    "wood": (0.55, 0.36, 0.20), "grey": (0.75, 0.75, 0.78), "flame": (1.0, 0.62, 0.10),
    "pink": (1.0, 0.55, 0.62),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------
# Shapes. p is (x, y), two tensors of one shape; y points down, as in pictures.


def circle(p, cx, cy, r):
    """Distance to a circle."""
    return torch.hypot(p[0] - cx, p[1] - cy) - r


def ellipse(p, cx, cy, rx, ry):
    """Distance to an ellipse; a first-order estimate, exact enough near the edge, which is all that is
    drawn."""
    x, y = (p[0] - cx) / rx, (p[1] - cy) / ry
    k = torch.hypot(x, y)
    return k * (k - 1) / torch.hypot(x / rx, y / ry).clamp_min(1e-4)


def capsule(p, ax, ay, bx, by, r):
    """Distance to a line from a to b drawn with a round pen of radius r."""
    x, y, dx, dy = p[0] - ax, p[1] - ay, bx - ax, by - ay
    h = ((x * dx + y * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return torch.hypot(x - h * dx, y - h * dy) - r


def polygon(p, *points):
    """Distance to a convex polygon, whichever way round; behind a corner a little less than the true one."""
    pairs = list(zip(points, points[1:] + points[:1], strict=True))
    turn = math.copysign(1, sum(ax * by - ay * bx for (ax, ay), (bx, by) in pairs))
    edges = []
    for (ax, ay), (bx, by) in pairs:
        scale = turn / math.hypot(bx - ax, by - ay)
        edges.append(((p[0] - ax) * (by - ay) - (p[1] - ay) * (bx - ax)) * scale)
    return torch.stack(edges).amax(0)


def box(p, cx, cy, hx, hy, r):
    """Distance to a box with half sides hx, hy and rounded corners."""
    x, y = (p[0] - cx).abs() - hx + r, (p[1] - cy).abs() - hy + r
    return torch.hypot(x.clamp_min(0), y.clamp_min(0)) + torch.maximum(x, y).clamp_max(0) - r


# An actor in its own coordinates, facing right: (function, paint, its numbers), painted in this order. Paint
# is a name in RGB, or "main", "dark" or "light": shades of the actor's colour.
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
# Rendering


# background: (top of the sky, sky at the horizon, ground)
SKIES = {
    "meadow": ((0.42, 0.74, 0.98), (0.80, 0.93, 1.00), (0.47, 0.78, 0.36)),
    "desert": ((0.98, 0.90, 0.72), (1.00, 0.80, 0.58), (0.87, 0.68, 0.40)),
    "night": ((0.05, 0.05, 0.17), (0.13, 0.12, 0.33), (0.09, 0.11, 0.16)),
    "snow": ((0.68, 0.73, 0.80), (0.84, 0.88, 0.92), (0.97, 0.98, 1.00)),
    "city": ((0.60, 0.42, 0.62), (0.98, 0.66, 0.62), (0.36, 0.34, 0.42)),
}


def paint(image, distance, colour, pixels_per_unit):
    """Blend a shape into image (n, T, 3, S, S), in place. distance is (n, T', S, S), colour broadcasts to the
    image."""
    coverage = (0.5 - distance * pixels_per_unit).clamp_(0, 1)
    image.lerp_(colour.expand_as(image), coverage.unsqueeze(2).expand_as(image))


def rgb(name, like):
    """The colour called `name` as a tensor that broadcasts to an image (n, T, 3, S, S)."""
    return torch.tensor(RGB.get(name, name), dtype=like.dtype).view(3, 1, 1)


def draw_background(image, name, x, y, u, scale):
    """Fill image (n, T, 3, S, S); x, y are world coordinates (n, T, S, S), u (n, 4) random numbers in [0,
    1)."""
    a, b, c, d = (u[:, i].view(-1, 1, 1, 1) for i in range(4))
    top, bottom, ground = SKIES[name]
    image.copy_(torch.lerp(rgb(top, x), rgb(bottom, x), ((y + 1) / 1.6).clamp(0, 1).unsqueeze(2)))
    if name == "meadow":
        for dx in (0.0, 0.22, 0.42):
            radius = 0.16 if dx == 0.22 else 0.11
            paint(image, circle((x, y), a * 1.4 - 0.9 + dx, b * 0.2 - 0.75, radius), rgb("white", x), scale)
    elif name == "desert":
        paint(image, circle((x, y), a * 1.4 - 0.7, b * 0.2 - 0.65, 0.2), rgb((1.0, 0.97, 0.86), x), scale)
    elif name == "night":
        for i in range(9):  # the golden ratio spreads the stars evenly for any offset
            sx, sy = (a + 0.618 * i) % 1 * 2 - 1, (b + 0.381 * i * i) % 1 * 1.4 - 1
            paint(image, circle((x, y), sx, sy, 0.035), rgb((0.95, 0.95, 0.80), x), scale)
        paint(image, circle((x, y), c * 1.4 - 0.7, -0.66, 0.17), rgb((0.98, 0.96, 0.82), x), scale)
    elif name == "city":
        for i in range(6):
            cx, height = -0.95 + 0.38 * i + a * 0.1, 0.25 + 0.65 * ((b + 0.618 * i) % 1)
            tower = torch.maximum((x - cx).abs() - 0.16, 0.5 - height - y)
            paint(image, tower, rgb((0.42, 0.33, 0.50), x), scale)
            lit = torch.maximum((x - cx).abs() - 0.07, ((y * 5 + 0.2) % 1 - 0.5).abs() / 5 - 0.05)
            paint(image, torch.maximum(lit, tower + 0.06), rgb((1.0, 0.86, 0.55), x), scale)
    hill = 0.10 * torch.sin(2.2 * x + 6.28 * d) if name in ("meadow", "desert", "snow") else 0 * x
    paint(image, 0.5 + hill - y, rgb(ground, x), scale)
    if name in ("meadow", "desert", "snow"):  # a second, nearer hill
        paint(image, 0.72 - 0.6 * hill - y, rgb(tuple(0.88 * v for v in ground), x), scale)
    if name == "snow":
        for i in range(10):
            sx, sy = (a + 0.618 * i) % 1 * 2 - 1, (b + 0.381 * i * i) % 1 * 2 - 1
            paint(image, circle((x, y), sx, sy, 0.05), rgb("white", x), scale)


def layout(scene, frames):
    """Where everything is at every frame. -> (camera, instances): camera is (T, 3) pan x, pan y, zoom; an
    instance is a dict of the kind, whether it surfs, the wave's phase, and tracks (T, 8): x, y, size, angle,
    mirror, r, g, b."""
    rng = np.random.default_rng([scene.seed, 2])
    s = np.linspace(0, 1, frames)  # time in clip lengths
    single = len(scene.actors) == 1
    slots = [(0, 0)] if single else [(-0.48, -0.25), (0.48, -0.25), (0.0, 0.5)]
    if scene.relation in ("above", "below"):
        slots = [(-0.3, -0.45), (-0.3, 0.45), (0.55, 0.0)]
    if scene.relation in ("right of", "below"):
        slots[:2] = slots[1::-1]
    instances = []
    for (cx, cy), actor in zip(slots, scene.actors, strict=False):
        u = rng.random(4)
        size = (0.44 + 0.08 * u[0]) if single else 0.27 + 0.04 * u[0]
        reach = 0.48 if single else 0.2  # how far a motion goes from its centre
        wander = (0.2, 0.15) if single else (0.06, 0.06)
        x = np.full(frames, cx + wander[0] * (2 * u[1] - 1))
        y = np.full(frames, cy + wander[1] * (2 * u[2] - 1))
        angle = np.zeros(frames)
        mirror = -1.0 if actor.motion == "left" else 1.0  # whoever does not move left faces right
        wave = 6.28 * u[3]
        if actor.motion in ("left", "right"):
            x = x * (0.5 if single else 1) + mirror * reach * (2 * s - 1)
        elif actor.motion in ("up", "down"):
            y = y * 0.5 * single + cy + (1 if actor.motion == "down" else -1) * reach * (2 * s - 1)
        elif actor.motion == "bounce":
            y = cy + reach - 1.7 * reach * np.abs(np.sin(2 * np.pi * s))
        elif actor.motion == "spin":
            angle = 2 * np.pi * s * frames / (frames + 1)
        elif actor.motion == "surf":
            x = x * 0.5 + cx * 0.5 + 0.5 * reach * (2 * s - 1)
            surface, slope = sea(x, s, wave, cy)
            angle = np.arctan(slope)
            y = surface - 0.92 * size
        colour = np.tile(RGB[actor.colour], (frames, 1))
        if actor.change.startswith("turns"):
            blend = np.clip((s - 0.3) / 0.4, 0, 1)[:, None]
            colour = colour * (1 - blend) + np.array(RGB[actor.change.split()[1]]) * blend
        sizes = size * {"grows": 0.6 + 0.6 * s, "shrinks": 1.2 - 0.6 * s}.get(actor.change, np.ones(frames))
        for i in range(actor.count):
            offset = (i - (actor.count - 1) / 2) * (0.62 if single else 0.34)
            n = 1.0 if actor.count == 1 else 0.66
            yi = y
            if actor.motion == "surf":
                surface, slope = sea(x + offset, s, wave, cy)
                yi, angle = surface - 0.92 * sizes * n, np.arctan(slope)
            track = np.stack([x + offset, yi, sizes * n, angle, np.full(frames, mirror)], 1)
            surf = (wave, cy) if actor.motion == "surf" else None
            instances.append({"kind": actor.kind, "surf": surf, "track": np.concatenate([track, colour], 1)})
    pan = {"pan left": -0.35, "pan right": 0.35}.get(scene.camera, 0.0) * (2 * s - 1)
    zoom = {"zoom in": 1.2 - 0.45 * s, "zoom out": 0.75 + 0.45 * s}.get(scene.camera, np.ones(frames))
    return np.stack([pan, 0 * pan, zoom], 1), instances


def sea(x, s, phase, cy):
    """The water's surface at place x and time s (in clip lengths): height and slope."""
    k = 3.0
    angle = k * x - 2 * np.pi * s + phase
    return 0.45 + 0.5 * cy + 0.16 * np.sin(angle), 0.16 * k * np.cos(angle)


def render(scenes: list, frames: int = 8, size: int = 32) -> torch.Tensor:
    """Scenes -> uint8 video (B, 3, T, H, W). Any number of frames, any size; the same scene gives the same
    bits."""
    if frames < 1 or size < 4:
        raise ValueError(
            f"cannot render {frames} frames of {size} pixels; at least 1 frame and 4 pixels are needed"
        )
    pixels = (torch.arange(size) + 0.5) / size * 2 - 1
    video = torch.empty(len(scenes), frames, 3, size, size)
    layouts = [layout(scene, frames) for scene in scenes]
    camera = torch.tensor(np.stack([c for c, _ in layouts]), dtype=torch.float32)[
        ..., None, None
    ]  # (B, T, 3, 1, 1)
    scale = size / 2

    # World coordinates of every pixel; one frame is enough for a camera that does not move.
    x = pixels.view(1, 1, 1, size) * camera[:, :, 2] + camera[:, :, 0]  # (B, T, 1, S)
    y = pixels.view(1, 1, size, 1) * camera[:, :, 2] + camera[:, :, 1]  # (B, T, S, 1)
    u = torch.tensor(
        np.stack([np.random.default_rng([s.seed, 3]).random(4) for s in scenes]), dtype=torch.float32
    )
    for moving in (False, True):
        for name in SKIES:
            rows = [
                i for i, s in enumerate(scenes) if s.background == name and (s.camera != "still") == moving
            ]
            if rows:
                t = slice(None) if moving else slice(0, 1)
                shape = (len(rows), frames if moving else 1, size, size)
                image = torch.empty(shape[0], shape[1], 3, size, size)
                draw_background(
                    image, name, x[rows, t].expand(shape), y[rows, t].expand(shape), u[rows], scale
                )
                video[rows] = image.expand(-1, frames, -1, -1, -1)

    # The sea lies behind all actors.
    time = torch.linspace(0, 1, frames).view(-1, 1, 1)
    for i, (_, instances) in enumerate(layouts):
        surf = next((a["surf"] for a in instances if a["surf"]), None)
        if surf:
            phase, cy = surf
            surface = 0.45 + 0.5 * cy + 0.16 * torch.sin(3.0 * x[i] - 2 * math.pi * time + phase)  # (T, 1, S)
            depth = (y[i] - surface)[None]  # (1, T, S, S)
            paint(video[i : i + 1], -depth, rgb((0.10, 0.46, 0.72), x), scale)
            paint(video[i : i + 1], 0.16 - depth, rgb((0.07, 0.38, 0.64), x), scale)
            paint(video[i : i + 1], depth.abs() - 0.045, rgb("white", x), scale)

    # Actors, layer by layer; all actors of a layer and a kind at once.
    for layer in range(max(len(instances) for _, instances in layouts)):
        for kind in SHAPES:
            chosen = [(i, inst[layer]) for i, (_, inst) in enumerate(layouts) if layer < len(inst)]
            chosen = [(i, instance) for i, instance in chosen if instance["kind"] == kind]
            if not chosen:
                continue
            rows = [i for i, _ in chosen]
            track = torch.tensor(np.stack([a["track"] for _, a in chosen]), dtype=torch.float32)[
                ..., None, None
            ]
            ax, ay, unit, angle, mirror = track[:, :, :5].unbind(2)  # each (n, T, 1, 1)
            main = track[:, :, 5:]  # (n, T, 3, 1, 1)
            dx, dy = x[rows] - ax, y[rows] - ay
            cos, sin = torch.cos(angle), torch.sin(angle)
            p = ((dx * cos + dy * sin) / unit * mirror, (dy * cos - dx * sin) / unit)
            shapes = [(shape(p, *numbers), name) for shape, name, *numbers in SHAPES[kind]]
            if any(a["surf"] for _, a in chosen):
                away = torch.tensor([0.0 if a["surf"] else 9.0 for _, a in chosen]).view(-1, 1, 1, 1)
                board = [(shape(p, *numbers) + away, name) for shape, name, *numbers in SURFBOARD]
                shapes = board + shapes
            colours = {"main": main, "dark": 0.6 * main, "light": 0.45 * main + 0.55}
            image = video[rows]
            outline = torch.stack([d for d, _ in shapes]).amin(0) - 0.09
            per_unit = unit * scale / camera[rows, :, 2]
            paint(image, outline, 0.22 * main, per_unit)
            for distance, name in shapes:
                paint(image, distance, colours[name] if name in colours else rgb(name, x), per_unit)
            video[rows] = image
    return (video * 255).round_().to(torch.uint8).transpose(1, 2).contiguous()


def places(scene, frames: int) -> dict[str, tuple[float, float]]:
    """Where each kind of actor is in the picture, on average over the clip and over equal actors: x, y in
    [-1, 1]."""
    camera, instances = layout(scene, frames)
    found = {}
    for instance in instances:
        xy = (instance["track"][:, :2] - camera[:, :2]) / camera[:, 2:]
        found.setdefault(instance["kind"], []).append(xy.mean(0))
    return {kind: tuple(np.mean(xys, axis=0).tolist()) for kind, xys in found.items()}


# --------------------------------------------------------------------------------------------------------
# Pictures


def save_grid(path: Path | str, videos, labels, columns: int = 8, tile: int = 160):
    """Labelled clips side by side. videos (B, T, H, W, 3) uint8, B labels; a path that ends in .gif moves,
    any other format shows the middle frame. Small clips are enlarged by a whole factor, so that pixels stay
    pixels."""
    count, frames, size = videos.shape[:3]
    factor = max(1, tile // size)
    tile, gap = factor * size, 6
    lines = [textwrap.wrap(label, max(8, tile // 6)) for label in labels]
    text_height = 13 * max(map(len, lines)) + 6
    rows = math.ceil(count / columns)
    pages = []
    for t in range(frames) if str(path).endswith(".gif") else [frames // 2]:
        page = Image.new(
            "RGB", (columns * (tile + gap) + gap, rows * (tile + text_height + gap) + gap), "white"
        )
        draw = ImageDraw.Draw(page)
        for i, (video, label) in enumerate(zip(videos, lines, strict=True)):
            x, y = gap + i % columns * (tile + gap), gap + i // columns * (tile + text_height + gap)
            page.paste(Image.fromarray(np.asarray(video[t])).resize((tile, tile), Image.NEAREST), (x, y))
            draw.multiline_text(
                (x + 2, y + tile + 2), "\n".join(label), fill="black", font_size=11, spacing=1
            )
        pages.append(page)
    pages[0].save(path, save_all=len(pages) > 1, append_images=pages[1:], duration=1000 / FPS, loop=0)
