"""One video file in, short clips of one shape out. A process pool does it, since files come from strangers.

**What is done.** FFmpeg (through PyAV) decodes a video frame by frame. A frame is on show from its time stamp
to the next one. The video is sampled at an even rate, `fps`, so a variable frame rate disappears. Each frame
is turned upright. Its largest centered square is cut out and downscaled with antialiasing: a pixel is the
mean of the pixels that it covers. Transparent parts become white. The first `frames` frames make a clip, the
next ones another, up to `MAX_CLIPS`. A video that is too short for one clip stands still at its end. A folder
of pictures is a video too, with one frame for each picture.

**What is not believed.** A header may announce a billion frames, or a picture as large as a field. A playlist
may call itself a video and name other files. Decoders are large C programs with bugs. Therefore sizes are
checked before anything is decoded, only four container formats are opened, and no more is read than is used.
The processes of the pool (pebble) have limited memory, and a limited time for each file. A process that
crashes or hangs costs one bad file, and the pool replaces it. If the parent dies, idle processes end because
their pipe closes, and a process that hangs is ended by its own watchdog.

Large projects decode while they train. Here every file is decoded once, before training, and clips.py keeps
the pixels. Left out: sound, non-square pixels, HDR, detection of scene cuts (a clip may span one).
"""

import faulthandler
import multiprocessing
import os
import re
import sys
import types
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from video import is_marked

VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
OTHER_VIDEOS = (  # not read; clips.py says so
    ".ts", ".m2ts", ".mts", ".wmv", ".asf", ".mpg", ".mpeg", ".vob", ".flv", ".f4v", ".3gp", ".ogv", ".ogg",
    ".rm", ".y4m",
)  # fmt: skip
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
CONTAINERS = "mov,matroska,avi,gif"  # FFmpeg's names of the formats that files of VIDEOS may have
MAX_CLIPS = 16  # of one file; the rest of a film is not used
MAX_SIDE = 8192  # pixels
MAX_MEMORY = 4 << 30  # bytes of address space of a process
MAX_POOLS = 6  # tried for a group of files: a worker that crashes at once can take a whole pool along


# --------------------------------------------------------------------------------------------------------
# One file


def check_side(width: int, height: int):
    """Raise ValueError for a picture without pixels, or with too many."""
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise ValueError(f"{width} x {height} pixels; a side may have 1 to {MAX_SIDE}")


def read_video(path: Path):
    """A video file -> (begin, end, frame) for each frame: it is on show from `begin` to `end`, in seconds."""
    import av

    # "file:", since FFmpeg takes a name such as concat:a.mp4 for an instruction
    options = {"format_whitelist": CONTAINERS}
    with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
        if not container.streams.video:
            raise ValueError("there is no video in it")
        stream = container.streams.video[0]
        check_side(stream.width, stream.height)
        stream.codec_context.thread_count = 1  # there is a process for every core already
        stream.codec_context.options = {"max_pixels": str(MAX_SIDE**2)}  # a frame may be larger than it says
        rate = float(stream.average_rate or 0)
        usual_length = 1 / rate if 0 < rate <= 240 else 1 / 25
        first, end = None, 0.0
        for frame in decode_frames(container, stream):
            begin = end if frame.time is None else frame.time
            first = begin if first is None else first
            length = usual_length
            if frame.duration and frame.time_base:
                length = float(frame.duration * frame.time_base)
            end = begin + length
            yield begin - first, end - first, frame


def decode_frames(container, stream):
    """The frames of a stream. FFmpeg's own decoders of VP8 and VP9 leave transparency out, so that the color
    below it would be seen; those of libvpx do not."""
    decoder = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    if decoder is None or stream.metadata.get("ALPHA_MODE", stream.metadata.get("alpha_mode")) != "1":
        yield from container.decode(stream)
        return
    import av

    context = av.CodecContext.create(decoder, "r")
    context.extradata = stream.codec_context.extradata
    context.thread_count, context.options = 1, stream.codec_context.options
    for packet in container.demux(stream):
        yield from context.decode(packet)


def read_pictures(path: Path, fps: float):
    """A folder of pictures, in the order of the numbers in their names -> like `read_video`, with 1 / fps
    seconds for each. Hidden files and pictures that this project has made are left out. Raises ValueError for
    a link that leads out of the folder."""
    files = []
    for file in path.iterdir():
        if file.suffix.lower() not in PICTURES or file.name.startswith("."):
            continue
        if not file.is_file() or file.resolve().parent != path.resolve():
            raise ValueError(f"{file.name} is no file of this folder")
        if not is_marked(file):
            numbers = [int(digits) for digits in re.findall(r"\d{1,18}", file.stem)]
            files.append((numbers, file.name, file))
    for i, (_, _, file) in enumerate(sorted(files)):
        with Image.open(file, formats=("PNG", "JPEG", "BMP", "WEBP")) as picture:
            check_side(*picture.size)
            yield i / fps, (i + 1) / fps, ImageOps.exif_transpose(picture)


def resample(timed, fps: float):
    """(begin, end, frame) in order, in seconds -> the frames on show at 0, 1/fps, 2/fps, ..., at least one.
    Where time stands still or goes back, a frame is not shown. Where it jumps, the last one stays."""
    count, shown, end = 0, None, 0.0
    for begin, until, frame in timed:
        while shown is not None and count / fps < begin - 1e-6:
            yield shown
            count += 1
        shown, end = frame, until
    while shown is not None and (count == 0 or count / fps < end - 1e-6):
        yield shown
        count += 1


def shrink(frame, size: int) -> tuple[np.ndarray, bool]:
    """A frame of FFmpeg, or a picture -> uint8 (size, size, 3), and whether a part of it was transparent."""
    turn = 0
    if isinstance(frame, Image.Image):
        if frame.mode.startswith("I"):  # 16 bits of grey, of which `convert` would make white
            frame = Image.fromarray((np.asarray(frame) >> 8).astype(np.uint8))
        picture = frame.convert("RGBA" if frame.has_transparency_data else "RGB")
    else:
        check_side(frame.width, frame.height)
        has_alpha = any(component.is_alpha for component in frame.format.components)
        picture = Image.fromarray(frame.to_ndarray(format="rgba" if has_alpha else "rgb24", threads=1))
        turn = frame.rotation
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    method = Image.Resampling.BOX if side >= size else None  # the mean; None: Pillow's default, to enlarge
    picture = picture.resize((size, size), method, (left, top, left + side, top + side))
    transparent = picture.mode == "RGBA" and picture.getextrema()[3][0] < 255
    if transparent:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.rot90(np.asarray(picture.convert("RGB")), turn // 90), transparent


def decode(path: Path, frames: int, size: int, fps: float) -> tuple[np.ndarray, dict]:
    """A video file or a folder of pictures -> clips, uint8 (n, 3, frames, size, size) with n from 1 to
    MAX_CLIPS; and {"seconds" that are used, "width" and "height" of the first frame, "notes"}. Raises
    ValueError, or any exception of the decoder."""
    timed = read_pictures(path, fps) if path.is_dir() else read_video(path)
    most = MAX_CLIPS * frames
    seen, notes, last, any_transparent = [], [], None, False
    for frame in islice(resample(timed, fps), most + 1):
        if last is None:
            width, height = frame.width, frame.height
        if frame is not last:  # else it stays on show
            small, transparent = shrink(frame, size)
            any_transparent = any_transparent or transparent
            last = frame
        seen.append(small)
    timed.close()
    if not seen:
        raise ValueError("there is no frame in it")
    used = min(len(seen) // frames * frames, most) or len(seen)
    if len(seen) > most:
        notes.append(f"only the first {most / fps:g} s are used")
    elif len(seen) > used:
        notes.append("its end, which is less than a clip, is not used")
    elif used < frames:
        count = "one frame" if used == 1 else f"{used} frames"
        notes.append(f"{count} at {fps:g} a second; the last one is repeated to make {frames}")
        seen += [seen[-1]] * (frames - used)
    if any_transparent:
        notes.append("what is transparent is shown white")
    if min(width, height) < size:
        notes.append(f"enlarged to {size} pixels")
    clips = np.stack(seen[: max(frames, used)]).reshape(-1, frames, size, size, 3).transpose(0, 4, 1, 2, 3)
    return clips, {"seconds": used / fps, "width": width, "height": height, "notes": notes}


# --------------------------------------------------------------------------------------------------------
# The process pool


def time_limit(frames: int, fps: float) -> float:
    """How many seconds one file may take: half a minute, and 15 s for each second of video that is decoded.

    A file gives at most MAX_CLIPS clips, so its work is bounded. The limit ends a hang, which is rare, and
    must not call a large file on a busy machine a bad one. A second of 4K video with 60 frames took 2.0 s
    (H.264) to 7.3 s (VP9) on one busy core."""
    return 30 + 15 * MAX_CLIPS * frames / fps


def start_worker():
    """A process of the pool begins: limit its memory, and silence what C libraries print."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    except (ImportError, ValueError, OSError):  # not on this system: the limits in the code remain
        pass


def decode_file(path: str, frames: int, size: int, fps: float, limit: float):
    """What a process of the pool does with one file -> as `decode`, and ""; or None, {} and the reason why
    the file is bad, in one line."""
    faulthandler.dump_traceback_later(limit + 10, exit=True, file=2)  # a watchdog: ends C code too
    try:
        return *decode(Path(path), frames, size, fps), ""
    except Exception as error:  # with a stranger's file a decoder may raise anything
        words = getattr(error, "strerror", None) or str(error)  # without FFmpeg's number
        reason = " ".join(words.split()) or type(error).__name__
        return None, {}, reason[:200]
    finally:
        faulthandler.cancel_dump_traceback_later()


class DecodingPool:
    """`workers` processes that decode files to one shape; a context manager."""

    def __init__(self, workers: int, frames: int, size: int, fps: float):
        self.workers = workers
        self.shape = frames, size, fps
        self.limit = time_limit(frames, fps)

    def start(self):
        import pebble  # a machine that never decodes may lack it

        spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads and memory
        self.pool = pebble.ProcessPool(self.workers, initializer=start_worker, context=spawn)

    def stop(self):
        """End all processes now, busy or not."""
        self.pool.stop()
        self.pool.join()

    def __enter__(self):
        self.start()
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for numpy there: threads take address space
        # A spawned process imports its parent's main module: train.py, and with it torch, which takes seconds
        # and much of MAX_MEMORY. An empty main module avoids that.
        self.main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        return self

    def __exit__(self, *_):
        try:
            self.stop()
        finally:
            sys.modules["__main__"] = self.main

    def decode(self, paths: list[Path], progress=lambda: None) -> list[tuple]:
        """Decode files -> for each what `decode_file` returns, in order. `progress` is called after each.
        Raises OSError if no process can run here."""
        for _ in range(MAX_POOLS):
            try:
                futures = [self.schedule(path) for path in paths]
                return [self.result(future, progress) for future in futures]
            except RuntimeError:  # the pool as a whole broke, which is not the fault of a known file
                self.stop()
                self.start()
        raise OSError("the processes that decode videos end as soon as they start")

    def schedule(self, path: Path) -> Future:
        return self.pool.schedule(decode_file, (str(path), *self.shape, self.limit), timeout=self.limit)

    def result(self, future: Future, progress) -> tuple:
        """Wait for one file. Raises RuntimeError if the pool is broken."""
        from pebble import ProcessExpired

        while not wait([future], timeout=1).done:
            if not self.pool.active:
                raise BrokenProcessPool("the pool ended")
        progress()
        try:
            return future.result()
        except TimeoutError:
            return None, {}, f"decoding took longer than {self.limit:g} s"
        except ProcessExpired as error:
            return None, {}, f"the decoder crashed (exit code {error.exitcode})"
