"""Clips as files that people can watch: MP4, GIF, and a labelled grid of many clips.

A model's clip is a tensor (3, T, H, W) in [-1, 1]; image libraries want bytes (T, H, W, 3). Small clips are
enlarged by a whole factor, so that pixels stay pixels. MP4 and GIF files are written under another name and
then renamed, so that they are whole or absent. Every file has MARK in a comment, by which clips.py knows it:
a model must not learn from its own samples by accident.

The files that training reads are the business of clips.py. Left out: sound, captions inside the video.
"""

import math
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

FPS = 8  # frames per second unless a data set says otherwise: a clip of 8 frames lasts a second
GAP = 6  # pixels between the clips of a grid
MARK = "made by ModelGrow"  # a comment in every file
MARK_WITHIN = 4096  # bytes of the beginning or the end of a file, where the comment stands


def to_uint8(clips):
    """Clips (..., 3, T, H, W) in [-1, 1], a tensor on any device -> uint8 array (..., T, H, W, 3)."""
    pixels = ((clips.float().clamp(-1, 1) + 1) * 127.5).round()
    return pixels.byte().movedim(-4, -1).cpu().numpy()


def frame_times(count: int, fps: float) -> list[int]:
    """How long each of `count` frames is shown, in milliseconds. GIF counts in hundredths of a second, so the
    rounding error is carried on to the next frame and the whole lasts count / fps seconds. Browsers slow
    down anything below 20 ms."""
    ends = [round(100 * (i + 1) / fps) for i in range(count)]
    times = np.diff([0, *ends])
    return [max(20, 10 * int(time)) for time in times]


def is_marked(path: Path) -> bool:
    """Whether a file was written by this module."""
    try:
        with path.open("rb") as file:
            content = file.read(MARK_WITHIN)
            size = file.seek(0, 2)
            file.seek(max(0, size - MARK_WITHIN))
            return MARK.encode() in content + file.read(MARK_WITHIN)
    except OSError:
        return False


def write_gif(path: Path, frames, fps: float = FPS):
    """Frames, a list of pictures or uint8 (T, H, W, 3) -> an endless GIF."""
    pictures = [frame if isinstance(frame, Image.Image) else Image.fromarray(frame) for frame in frames]
    times = frame_times(len(pictures), fps)
    new = path.with_name(f".{path.name}.new")
    options = {"duration": times, "loop": 0, "comment": MARK}
    pictures[0].save(new, "GIF", save_all=True, append_images=pictures[1:], **options)
    new.replace(path)


def write_video(path: Path, frames, fps: float = FPS):
    """Frames uint8 (T, H, W, 3) -> `path`.mp4 and `path`.gif, enlarged to at least 256 pixels. Without PyAV
    there is only the GIF. -> the files that were written."""
    factor = max(1, math.ceil(256 / frames.shape[1]))
    frames = frames.repeat(factor, 1).repeat(factor, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    gif, mp4 = path.with_name(path.name + ".gif"), path.with_name(path.name + ".mp4")
    write_gif(gif, frames, fps)
    try:
        import av  # noqa: F401  a machine that only trains may lack it
        import imageio.v3 as iio
    except ImportError:
        return [gif]
    new = path.with_name(f".{path.name}.mp4")
    loop = np.tile(frames, (4, 1, 1, 1))  # four times, since many players stop at the end of a file
    with iio.imopen(new, "w", plugin="pyav") as file:
        file.container_metadata["comment"] = MARK
        file.write(loop, codec="libx264", fps=fps, out_pixel_format="yuv420p")
    new.replace(mp4)
    return [mp4, gif]


def save_grid(path: Path | str, videos, labels: list[str], columns: int = 8, tile: int = 160, fps=FPS):
    """Labelled clips side by side. videos uint8 (B, T, H, W, 3), B labels, `tile` pixels per clip at least.
    A path that ends in .gif moves, any other format shows the middle frame."""
    path = Path(path)
    size = videos.shape[2]
    tile = size * max(1, tile // size)
    lines = [textwrap.wrap(label, max(8, tile // 6)) for label in labels]
    if path.suffix == ".gif":
        pages = [grid_page(videos[:, t], lines, columns, tile) for t in range(videos.shape[1])]
        write_gif(path, pages, fps)
    else:
        info = PngImagePlugin.PngInfo()
        info.add_text("Comment", MARK)
        grid_page(videos[:, videos.shape[1] // 2], lines, columns, tile).save(path, pnginfo=info)


def grid_page(frames, lines: list[list[str]], columns: int, tile: int) -> Image.Image:
    """One picture of a grid: frames (B, H, W, 3), each enlarged to `tile` pixels, with B labels below."""
    text_height = 13 * max(map(len, lines)) + 6
    rows = math.ceil(len(frames) / columns)
    size = columns * (tile + GAP) + GAP, rows * (tile + text_height + GAP) + GAP
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for i, (frame, label) in enumerate(zip(frames, lines, strict=True)):
        x = GAP + i % columns * (tile + GAP)
        y = GAP + i // columns * (tile + text_height + GAP)
        picture = Image.fromarray(np.asarray(frame)).resize((tile, tile), Image.Resampling.NEAREST)
        page.paste(picture, (x, y))
        draw.multiline_text((x + 2, y + tile + 2), "\n".join(label), fill="black", font_size=11, spacing=1)
    return page
