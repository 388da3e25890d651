"""One video file in, short clips of one shape out, whatever the file holds or says it holds.

**What is done.** A video is decoded by FFmpeg (PyAV), frame by frame. Its frames are on show from their time
stamp to the next one, at whatever rate; read at `fps` times a second they are even, and a variable frame rate
is gone. Each is turned upright, its largest square is cut out of the middle and shrunk with antialiasing (a
pixel is the mean of what it covers), and what is transparent becomes white. As many frames as a clip has make
a clip, the next ones another, up to `MOST_CLIPS`; a video that is too short for one clip stands still at its
end. A folder of pictures is a video too, one frame each.

**What is never believed.** Files come from strangers. A header may announce a billion frames or a picture as
large as a field, a playlist may call itself a video and name other files, and decoders are large programs in
C. So sizes are checked before anything is decoded, only four container formats are opened, no more is read
than is used, and all of it happens in a child process with limited memory, which may crash or hang without
harm: `Decoder` is that child as its parent sees it, and says what became of it.

The child reads one line of JSON per file and answers with one, behind which come the pixels. When it is up,
and then between frames once a second, it sends an empty line; one that is silent for `PATIENCE` seconds is
killed, and should its parent be dead by then, it ends by its own alarm.

Left out: sound, pixels that are not square, HDR, scene cuts (a clip may span one).
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMATS = "mov,matroska,avi,gif"  # of FFmpeg, what files of VIDEOS may be inside
MOST_CLIPS = 16  # of one file; the rest of a film is not used
MOST_SIDE = 8192  # pixels
MOST_RATE = 240  # decoded frames per second of clip, on average; more is no video
MEMORY = 4 << 30  # bytes of address space of a child
PATIENCE = 8  # seconds


def check_side(width, height):
    """Raise ValueError for a picture without pixels, or with too many."""
    if not (0 < width <= MOST_SIDE and 0 < height <= MOST_SIDE):
        raise ValueError(f"{width} x {height} pixels; a side may have 1 to {MOST_SIDE}")


def read_video(path):
    """A video file -> (the time from which on it is shown, that at which it ends, picture) of each frame, in
    seconds. Raises ValueError or an error of FFmpeg."""
    # "file:", since a name such as concat:a.mp4 would be taken for instructions
    with av.open(
        f"file:{path}", options={"format_whitelist": FORMATS}, metadata_errors="replace"
    ) as container:
        if not container.streams.video:
            raise ValueError("there is no video in it")
        stream = container.streams.video[0]
        check_side(stream.width, stream.height)
        stream.codec_context.thread_count = 1  # there is a process for every core already
        stream.codec_context.options = {"max_pixels": str(MOST_SIDE**2)}  # a frame may be larger than it says
        rate = float(stream.average_rate or 0)
        length = 1 / rate if 0 < rate <= MOST_RATE else 1 / 25
        first, end = None, 0.0
        for frame in container.decode(stream):
            begin = end if frame.time is None else frame.time
            first = begin if first is None else first
            end = begin + (
                float(frame.duration * frame.time_base) if frame.duration and frame.time_base else length
            )
            yield begin - first, end - first, frame


def read_folder(path, fps):
    """A folder of pictures, in the order of the numbers in their names -> as `read_video`, one frame each.
    Raises ValueError for a picture that is a link out of the folder."""
    names = [file for file in path.iterdir() if file.suffix.lower() in PICTURES]
    by_number = [([int(n) for n in re.findall(r"\d{1,18}", f.stem)], f.name, f) for f in names]
    for i, (_, _, file) in enumerate(sorted(by_number)):
        if not file.is_file() or file.resolve().parent != path.resolve():
            raise ValueError(f"{file.name} is no file of this folder")
        with Image.open(file, formats=("PNG", "JPEG", "BMP", "WEBP")) as picture:
            check_side(*picture.size)
            yield i / fps, (i + 1) / fps, ImageOps.exif_transpose(picture)


def resample(timed, fps):
    """(begin, end, frame) in order, in seconds -> the frames on show at 0, 1/fps, 2/fps, ..., at least one.
    Where time stands still or goes back a frame is not shown; where it jumps the last one stays."""
    count, shown, end = 0, None, 0.0
    for begin, until, frame in timed:
        while shown is not None and count / fps < begin - 1e-6:
            yield shown
            count += 1
        shown, end = frame, until
    while shown is not None and (count == 0 or count / fps < end - 1e-6):
        yield shown
        count += 1


def shrink(frame, size):
    """A frame of FFmpeg or a picture -> uint8 (size, size, 3), and whether a part of it was transparent."""
    turn = 0
    if isinstance(frame, av.VideoFrame):
        check_side(frame.width, frame.height)
        clear = any(component.is_alpha for component in frame.format.components)
        turn = frame.rotation
        frame = Image.fromarray(frame.to_ndarray(format="rgba" if clear else "rgb24", threads=1))
    else:
        frame = frame.convert("RGBA" if frame.has_transparency_data else "RGB")
    left, top = ((side - min(frame.size)) / 2 for side in frame.size)
    box = (left, top, left + min(frame.size), top + min(frame.size))
    frame = frame.resize((size, size), Image.Resampling.BOX if min(frame.size) >= size else None, box)
    clear = frame.mode == "RGBA" and frame.getextrema()[3][0] < 255
    if clear:
        frame = Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame)
    return np.rot90(np.asarray(frame.convert("RGB")), turn // 90), clear


def decode(path, frames, size, fps, alive=lambda: None):
    """A video file or a folder of pictures -> clips, uint8 (n, 3, frames, size, size) with 1 <= n <=
    MOST_CLIPS, and what there is to know: {"seconds" used, "width", "height" of the first frame, "notes"}.
    `alive` is called after every frame. Raises ValueError, or whatever the decoder raises."""
    path, about = Path(path), {"notes": []}
    most = MOST_CLIPS * frames
    limit = int(most / fps * MOST_RATE) + MOST_RATE

    def bounded(timed):
        for count, entry in enumerate(timed):
            if count == limit:
                raise ValueError(f"{limit} frames last less than {most / fps:g} seconds")
            about.setdefault("width", entry[2].width)
            about.setdefault("height", entry[2].height)
            alive()
            yield entry

    timed = bounded(read_folder(path, fps) if path.is_dir() else read_video(path))
    seen, last, transparent = [], None, False
    for frame in islice(resample(timed, fps), most + 1):
        if frame is not last:
            small, clear = shrink(frame, size)
            last, transparent = frame, transparent or clear
        seen.append(small)
    timed.close()
    if not seen:
        raise ValueError("there is no frame in it")
    if len(seen) > most:
        about["notes"].append(f"only the first {most / fps:g} s are used")
        seen.pop()
    elif len(seen) > frames and len(seen) % frames:
        about["notes"].append("its end, which is less than a clip, is not used")
    about["seconds"] = (len(seen) // frames * frames or len(seen)) / fps
    if len(seen) < frames:
        told = "one frame" if len(seen) == 1 else f"{len(seen)} frames"
        about["notes"].append(f"{told} at {fps:g} a second; the last one is repeated to make {frames}")
        seen += [seen[-1]] * (frames - len(seen))
    if transparent:
        about["notes"].append("what is transparent is shown white")
    if min(about["width"], about["height"]) < size:
        about["notes"].append(f"enlarged to {size} pixels")
    clips = np.stack(seen[: len(seen) // frames * frames])
    return clips.reshape(-1, frames, size, size, 3).transpose(0, 4, 1, 2, 3), about


class Decoder:
    """A child process that decodes one file after the other; made at the first one, and again after a
    crash."""

    def __init__(self):
        self.child = None

    def __call__(self, path, frames, size, fps):
        """-> as `decode`. Raises ValueError, in one line, for a bad file, and RuntimeError if the child broke
        down or was silent for too long, which may be the file's fault or not."""
        if self.child is None:
            pipe = subprocess.PIPE
            self.child = subprocess.Popen(  # a session of its own: Ctrl-C is for the parent
                [sys.executable, __file__], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL,
                start_new_session=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
        child, job = self.child, {"path": str(path), "frames": frames, "size": size, "fps": fps}
        answer = b"\n"
        try:
            child.stdin.write(json.dumps(job).encode() + b"\n")
            child.stdin.flush()
            while answer == b"\n":
                timer = threading.Timer(PATIENCE, child.kill)
                timer.start()
                answer = child.stdout.readline()
                timer.cancel()
            about = json.loads(answer)
            pixels = child.stdout.read(size_of := about.pop("bytes", 0))
            if len(pixels) < size_of:
                raise ValueError("it broke off")
        except (OSError, ValueError):
            self.close()
            raise RuntimeError(f"the decoder broke down, or was silent for {PATIENCE} s") from None
        if "bad" in about:
            raise ValueError(about["bad"])
        return np.frombuffer(pixels, np.uint8).reshape(-1, 3, frames, size, size), about

    def close(self):
        """End the child."""
        if self.child:
            self.child.kill()
            self.child.communicate()
            self.child = None


def main():
    """The child: jobs from standard input until it ends, answers to standard output."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # not on this system: the limits in the code remain
        pass
    av.logging.set_level(av.logging.PANIC)
    out, told = sys.stdout.buffer, 0.0

    def alarm(seconds):  # ends the process, in the middle of a decoder too
        if hasattr(signal, "alarm"):
            signal.alarm(seconds)

    def alive():
        nonlocal told
        if time.monotonic() - told > 1:
            out.write(b"\n")
            out.flush()
            told = time.monotonic()
            alarm(2 * PATIENCE)

    alive()
    for line in sys.stdin:
        alarm(2 * PATIENCE)
        try:
            clips, about = decode(**json.loads(line), alive=alive)
            pixels = clips.tobytes()
            about["bytes"] = len(pixels)
        except Exception as error:  # a stranger's file may make anything of a decoder raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            pixels, about = b"", {"bad": reason[:200]}
        alarm(0)
        out.write(json.dumps(about).encode() + b"\n")
        out.write(pixels)
        out.flush()


if __name__ == "__main__":
    main()
