"""decode.py and clips.py: files are read as they look, strangers' files do no harm, nothing is decoded twice.

Decoded clips are compared with the frames that were written; metadata, names and cache files are broken on
purpose; the processes of the pool crash, hang, lose their parent and are interrupted.
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from fractions import Fraction
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pebble
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import clips
import decode
import machine
from clips import FolderDataset, scan
from machine import write_cache
from video import save_grid

HERE = Path(__file__).parent.parent
CODECS = {".mp4": "libx264", ".mov": "libx264", ".webm": "libvpx-vp9", ".avi": "ffv1"}
ENDINGS = [*CODECS, ".gif", ""]  # "": a folder of pictures


def moving_square(seed=0, frames=24, size=64):
    """A square that leaves a plain background, uint8 (T, H, W, 3). The seed chooses colors and height."""
    rng = np.random.default_rng(seed)
    background = rng.integers(20, 80, 3, dtype=np.uint8)
    color = rng.integers(160, 240, 3, dtype=np.uint8)
    top = int(rng.integers(size // 2))
    video = np.empty((frames, size, size, 3), np.uint8)
    video[:] = background
    for t in range(frames):
        left = t * size // frames
        video[t, top : top + size // 2, left : left + size // 2] = color
    return video


def write_clip(path, frames, fps=24):
    """uint8 frames (T, H, W, 3) -> a video file, or a folder of pictures, as the ending of `path` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix not in (*CODECS, ".gif"):
        path.mkdir()
        for i, frame in enumerate(frames):
            iio.imwrite(path / f"{i}.png", frame)  # not padded: 10 comes after 9
    elif path.suffix == ".gif":
        iio.imwrite(path, frames, plugin="pillow", duration=1000 / fps, loop=0)
    else:
        how = {"out_pixel_format": "yuv444p"} if path.suffix == ".avi" else {}
        iio.imwrite(path, frames, plugin="pyav", codec=CODECS[path.suffix], fps=fps, **how)
    return path


def lay_out(root, *names, seconds=1):
    """Good clips of 32 pixels, each of another square, with the name of their folder as caption -> the
    folder."""
    for i, name in enumerate(names):
        path = write_clip(root / name, moving_square(i, 8 * seconds, 32), 8)
        clips.text_beside(path).write_text(path.parent.name)
    return root


def halved(frames):
    """Frames (T, H, W, 3) -> (T, H/2, W/2, 3), each pixel the mean of 2 x 2."""
    t, height, width, _ = frames.shape
    return frames.reshape(t, height // 2, 2, width // 2, 2, 3).mean((2, 4))


def read_first(path, size=32, frames=8):
    """The first clip of a file at 8 frames a second, float (T, H, W, 3), and the notes."""
    found, about = decode.decode(path, frames, size, 8)
    return found[0].transpose(1, 2, 3, 0).astype(float), about["notes"]


# --------------------------------------------------------------------------------------------------------
# One file


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_is_read(tmp_path, ending):
    """Read at 8 frames a second, every third frame is taken; at half the size, the mean of 2 x 2 pixels."""
    frames = moving_square(5, 48)
    fps = 25 if ending == ".gif" else 24  # a GIF counts in hundredths of a second
    found, about = decode.decode(write_clip(tmp_path / f"clip{ending}", frames, fps), 8, 32, 8)
    count = 2 if ending else 6
    assert found.dtype == np.uint8 and found.shape == (count, 3, 8, 32, 32)
    assert about == {"notes": [], "width": 64, "height": 64, "seconds": count}
    step = fps / 8 if ending else 1  # pictures are read one by one
    shown = (np.arange(count * 8) * step).astype(int)
    found = found.transpose(0, 2, 3, 4, 1).reshape(-1, 32, 32, 3)
    errors = []
    for shift in (0, 1, 2):
        truth = halved(frames[np.minimum(shown + shift, 47)])
        errors.append(np.abs(found - truth).mean())
    assert errors[0] < (5 if ending in CODECS else 0.8)
    assert errors[0] < errors[1] < errors[2]


def test_pictures_of_16_bits_keep_their_greys(tmp_path):
    """Each 16-bit value becomes its upper 8 bits; Pillow alone would make all above 255 white."""
    greys = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    (tmp_path / "walk").mkdir()
    Image.fromarray(greys).save(tmp_path / "walk" / "0.png")
    found, about = decode.decode(tmp_path / "walk", 1, 32, 8)
    assert (found[0, :, 0] == greys >> 8).all() and about["notes"] == []


def test_files_that_are_no_frames_are_left_out(tmp_path):
    """Of a folder of pictures: hidden files, such as those of macOS, and what this project has made."""
    walk = lay_out(tmp_path, "walk") / "walk"
    whole, _ = decode.decode(walk, 8, 32, 8)
    (walk / "._0.png").write_bytes(b"no picture")
    save_grid(walk / "cover.png", moving_square()[None], ["a preview"])
    assert scan(tmp_path).problems == []
    assert np.array_equal(decode.decode(walk, 8, 32, 8)[0], whole)


def test_the_version_names_the_pixels(tmp_path):
    """Other pixels of the same files need another CLIPS_VERSION, or old caches are taken for new ones."""
    frames = moving_square(3, 20, 48)
    write_clip(tmp_path / "pictures", frames[:, :, :40])
    palette = frames[:1].reshape(-1, 3)[:1].tolist()[0] + [255, 0, 0, 10, 200, 60, 0, 0, 0]
    pages = []
    for i in range(20):
        page = Image.new("P", (48, 40), 0)
        page.putpalette(palette)
        page.paste(1 + i % 2, (i, 4, i + 16, 30))
        pages.append(page)
    pages[0].save(tmp_path / "clip.gif", save_all=True, append_images=pages[1:], duration=40, loop=0)
    digest = hashlib.sha256()
    for name, size, fps in (
        ("pictures", 16, 8),
        ("pictures", 64, 4),
        ("clip.gif", 16, 8),
        ("clip.gif", 20, 30),
    ):
        digest.update(decode.decode(tmp_path / name, 8, size, fps)[0].tobytes())
    assert (clips.CLIPS_VERSION, digest.hexdigest()[:16]) == (3, "d4ea9b9b464d290b")


@given(
    st.lists(st.floats(0, 0.7), min_size=1, max_size=12), st.floats(0.01, 2), st.sampled_from([1, 7.5, 8, 30])
)
def test_resampling_agrees_with_brute_force(lengths, last, fps):
    """At every time the frame that began last is on show."""
    begins = [0.0, *itertools.accumulate(lengths)]
    ends = [*begins[1:], begins[-1] + last]
    timed = [(begin, end, i) for i, (begin, end) in enumerate(zip(begins, ends, strict=True))]
    found = list(decode.resample(timed, fps))
    times = [k / fps for k in range(len(found))]
    assert found == [max(i for i, begin in enumerate(begins) if begin - 1e-6 <= t) for t in times]
    assert times[-1] < ends[-1] or len(found) == 1
    assert len(found) / fps >= ends[-1] - 1e-5


def test_a_variable_frame_rate_becomes_even(tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for value, milliseconds in ((0, 0), (80, 100), (160, 900), (240, 1000)):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), value, np.uint8), format="rgb24")
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames, _ = read_first(tmp_path / "clip.mp4")
    shown = [round(frame.mean() / 80) for frame in frames]
    assert shown == [0, 1, 1, 1, 1, 1, 1, 1]  # at 0, 125, ..., 875 ms


def test_the_middle_is_cut_out(tmp_path):
    frames = moving_square(1, 8)
    write_clip(tmp_path / "wide", np.pad(frames, ((0, 0), (0, 0), (17, 17), (0, 0))))
    write_clip(tmp_path / "high", np.pad(frames, ((0, 0), (17, 17), (0, 0), (0, 0))))
    for name in ("wide", "high"):
        center, notes = read_first(tmp_path / name)
        assert np.abs(center - halved(frames)).max() <= 1 and not notes
    write_clip(tmp_path / "odd.avi", moving_square(1, 8, 67)[:, :45, :38], 8)
    assert read_first(tmp_path / "odd.avi", 16)[0].shape == (8, 16, 16, 3)


def test_gray_and_transparent_pictures(tmp_path):
    frames = moving_square(1, 8)
    transparent = np.concatenate([frames, np.zeros((8, 64, 64, 1), np.uint8)], -1)
    write_clip(tmp_path / "gray", frames[..., 0])
    write_clip(tmp_path / "clear", transparent)
    gray, notes = read_first(tmp_path / "gray")
    assert np.ptp(gray, -1).max() == 0 and gray.std() > 1 and not notes
    white, notes = read_first(tmp_path / "clear")
    assert (white == 255).all() and notes == ["what is transparent is shown white"]


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_a_transparent_webm_is_white(tmp_path, codec):
    """The left half is red and the right half is transparent, above black."""
    with av.open(str(tmp_path / "clip.webm"), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"auto-alt-ref": "0"})
        stream.width = stream.height = 32
        stream.pix_fmt, stream.metadata["alpha_mode"] = "yuva420p", "1"
        pixels = np.zeros((32, 32, 4), np.uint8)
        pixels[:, :16] = 200, 30, 30, 255
        for i in range(16):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format="yuva420p")
            frame.pts, frame.time_base = i, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames, notes = read_first(tmp_path / "clip.webm")
    assert notes == ["what is transparent is shown white"]
    assert frames[:, :, 20:].min() > 250
    assert np.abs(frames[:, :, :12] - (200, 30, 30)).max() < 12
    assert len(decode.decode(tmp_path / "clip.webm", 8, 32, 8)[0]) == 2


def test_short_and_long_videos(tmp_path):
    frames = moving_square(1, 8)
    one, notes = read_first(write_clip(tmp_path / "one.gif", frames[:1]))
    assert (one == one[:1]).all() and notes == ["one frame at 8 a second; the last one is repeated to make 8"]
    short, notes = read_first(write_clip(tmp_path / "short.mp4", frames[:5], 8))
    assert (short[4:] == short[4]).all() and notes[0].startswith("5 frames at 8 a second")
    uneven, about = decode.decode(
        write_clip(tmp_path / "uneven.avi", np.tile(frames, (2, 1, 1, 1)), 8), 5, 32, 8
    )
    assert len(uneven) == 3 and about["seconds"] == 15 / 8
    assert about["notes"] == ["its end, which is less than a clip, is not used"]
    long = write_clip(tmp_path / "long.gif", np.tile(frames, (20, 1, 1, 1)), 8)
    found, about = decode.decode(long, 8, 32, 8)
    assert len(found) == decode.MAX_CLIPS and about["seconds"] == 16
    assert about["notes"] == ["only the first 16 s are used"]
    assert read_first(long, 128)[1][-1] == "enlarged to 128 pixels"


def test_a_video_of_a_telephone_is_turned(tmp_path):
    """The file says that its pictures are to be turned by 90 degrees, clockwise."""
    upright = write_clip(tmp_path / "upright.mp4", moving_square(1, 8), 8)
    content = bytearray(upright.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # x' = -y, y' = x: what was on the right is now below
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(content)
    expected = np.rot90(read_first(upright)[0], -1, (1, 2))
    assert np.abs(read_first(tmp_path / "turned.mp4")[0] - expected).max() <= 1


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("field.gif", b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0;", "0 x 0 pixels"),
        ("list.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.gif\n", "Invalid data"),
        ("concat.mp4", b"ffconcat version 1.0\nfile secret.gif\n", "Invalid argument"),
        ("sound.mp4", b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0" + bytes(20), "Invalid argument"),
        ("empty.webm", b"", "Invalid data"),
        ("text.avi", b"hello" * 100, "Invalid data"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_what_is_no_video_is_refused(tmp_path, name, content, reason):
    write_clip(tmp_path / "secret.gif", moving_square())  # the lists name it
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=reason):
        decode.decode(tmp_path / name, 8, 32, 8)
    _, _, told = decode.decode_file(str(tmp_path / name), 8, 32, 8, 100)
    assert reason in told and "Errno" not in told


def png_header(width, height):
    """The beginning of a PNG file of this size, with a few of its pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">II", width, height) + b"\x08\x02\0\0\0"
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000))):
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return content


def test_sizes_in_headers_are_checked(tmp_path, monkeypatch):
    picture = tmp_path / "pictures" / "0.png"
    picture.parent.mkdir()
    picture.write_bytes(png_header(100_000, 100_000))
    with pytest.raises(Image.DecompressionBombError, match="10000000000 pixels"):
        decode.decode(picture.parent, 8, 32, 8)
    Image.new("1", (1, 9000)).save(picture)
    with pytest.raises(ValueError, match="1 x 9000 pixels"):
        decode.decode(picture.parent, 8, 32, 8)
    large = bytearray(write_clip(tmp_path / "large.avi", moving_square()).read_bytes())
    sides = large.index(b"strf") + 12
    # FFmpeg has a limit too, and then tells of no pixels.
    for width, height, told in ((100_000, 100_000, "0 x 0"), (20_000, 64, "20000 x 64")):
        large[sides : sides + 8] = struct.pack("<ii", width, height)
        (tmp_path / "large.avi").write_bytes(large)
        with pytest.raises(ValueError, match=f"{told} pixels; a side may have 1 to 8192"):
            decode.decode(tmp_path / "large.avi", 8, 32, 8)
    good = write_clip(tmp_path / "good.mp4", moving_square())
    monkeypatch.setattr(decode, "MAX_SIDE", 32)
    with pytest.raises(ValueError, match="64 x 64 pixels; a side may"):
        decode.decode(good, 8, 32, 8)


def test_a_billion_frames_are_not_believed(tmp_path):
    """In the table of times they are ignored, since the file has 24; in that of sizes there is no frame."""
    good = write_clip(tmp_path / "good.mp4", moving_square())
    content = good.read_bytes()
    times = bytearray(content)
    start = content.index(b"stts") + 12
    times[start : start + 4] = struct.pack(">I", 10**9)
    (tmp_path / "times.mp4").write_bytes(times)
    assert np.array_equal(read_first(tmp_path / "times.mp4")[0], read_first(good)[0])
    sizes = bytearray(content)
    start = content.index(b"stsz") + 8
    sizes[start : start + 8] = struct.pack(">II", 100, 10**9)
    (tmp_path / "sizes.mp4").write_bytes(sizes)
    with pytest.raises(ValueError, match="there is no frame in it"):
        decode.decode(tmp_path / "sizes.mp4", 8, 32, 8)


# --------------------------------------------------------------------------------------------------------
# The process pool

FAULTY = '''
import os, re, time
from pathlib import Path
import decode

def decode_file(path, *how):
    """The real function, but for files whose name says what goes wrong."""
    kind = Path(path).name.split(".")[0]
    Path(path + ".pid").write_text(str(os.getpid()))
    if kind in ("crash", "exit"):
        time.sleep(0.5)  # pebble forgets a file whose process dies before it has noted that it began
    if kind == "crash":
        os.kill(os.getpid(), 11)
    if kind == "exit":
        os._exit(3)
    if kind == "sleep":
        time.sleep(1000)
    if kind == "hang":
        re.match("(a+)+$", "a" * 60 + "b")  # C code that neither ends nor lets signals through
    decode.decode = allocate_much if kind == "greedy" else REAL  # the process goes on to other files
    return decode.decode_file(path, *how)

def allocate_much(*how):
    bytearray(5 << 30)

REAL = decode.decode
'''


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Processes of the pool fail as the names of files say; a file called "hang" may take a second."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    import faulty

    def schedule(self, path):
        limit = 1 if path.name.startswith("hang") else 100
        return self.pool.schedule(faulty.decode_file, (str(path), *self.shape, 100), timeout=limit)

    monkeypatch.setattr(decode.DecodingPool, "schedule", schedule)
    yield
    del sys.modules["faulty"]


def test_faults_of_processes_are_faults_of_files(tmp_path, faulty):
    bad = ["crash.gif", "exit.gif", "greedy.gif", "hang.gif", "none.gif"]
    root = lay_out(tmp_path / "my", "a.gif", "b.gif", *bad[:-1], "z.gif")
    with decode.DecodingPool(2, 8, 32, 8) as pool:
        pool.limit = 1
        order = ["a.gif", *bad, "b.gif", "z.gif"]
        results = pool.decode([root / name for name in order])
    reasons = {name: reason for name, (_, _, reason) in zip(order, results, strict=True) if reason}
    assert list(reasons) == bad
    assert reasons["crash.gif"] == "the decoder crashed (exit code -11)"
    assert reasons["exit.gif"] == "the decoder crashed (exit code 3)"
    assert reasons["greedy.gif"] == "MemoryError"
    assert reasons["hang.gif"] == "decoding took longer than 1 s"
    assert reasons["none.gif"] == "No such file or directory"
    for name in ("a.gif", "b.gif", "z.gif"):
        found, about, _ = results[order.index(name)]
        truth, expected = decode.decode(root / name, 8, 32, 8)
        assert np.array_equal(found, truth) and about == expected


def test_what_failed_is_tried_again_at_the_next_start(tmp_path, faulty):
    root = lay_out(tmp_path / "my", "a.gif", "exit.gif", "crash.gif")
    assert [name for name, _ in scan(root).problems] == ["crash.gif", "exit.gif"]
    for file in root.glob("*.pid"):
        file.unlink()
    for ending in ("gif", "txt"):
        (root / f"exit.{ending}").rename(root / f"good.{ending}")
    scanned = scan(root)
    assert [name for name, _ in scanned.problems] == ["crash.gif"] and list(scanned.entries) == [
        "a.gif",
        "good.gif",
    ]
    assert sorted(file.name for file in root.glob("*.pid")) == ["crash.gif.pid", "good.gif.pid"]


def test_a_broken_pool_is_replaced(tmp_path, monkeypatch):
    """Processes that die while they wait are no fault of a file; if they always die, one line says so."""
    root = lay_out(tmp_path / "my", "a.gif")
    starts = []

    def start(self):
        starts.append(1)
        real_start(self)
        if len(starts) <= broken:
            spawn = multiprocessing.get_context("spawn")
            self.pool = pebble.ProcessPool(1, initializer=os._exit, initargs=(7,), context=spawn)

    real_start = decode.DecodingPool.start
    monkeypatch.setattr(decode.DecodingPool, "start", start)
    for broken in (1, 2):
        starts.clear()
        with decode.DecodingPool(1, 8, 32, 8) as pool:
            assert pool.decode([root / "a.gif"])[0][2] == ""
        assert len(starts) == broken + 1
    broken = 9
    with decode.DecodingPool(1, 8, 32, 8) as pool, pytest.raises(OSError, match="end as soon as they start"):
        pool.decode([root / "a.gif"])


def test_the_time_limit_grows_with_what_is_decoded():
    assert decode.time_limit(8, 8) == 30 + 15 * 16
    assert decode.time_limit(16, 4) > decode.time_limit(16, 8) > decode.time_limit(8, 8)


PARENT = """
import os, sys
if __name__ == "__mp_main__":
    os._exit(9)  # a process of the pool must not import this module
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
import decode, faulty, signal
decode.decode_file = faulty.decode_file
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
if __name__ == "__main__":
    folder = Path(sys.argv[3])
    with decode.DecodingPool(2, 8, 32, 8) as pool:
        results = pool.decode([folder / "a.gif", folder / "b.gif"])
        assert not any(reason for _, _, reason in results)
        print("ready", flush=True)
        pool.decode([folder / "sleep.gif", folder / "c.gif"])
        sys.stdin.read()
"""


def is_running(pid):
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition):
    """Wait for something that happens for sure; a minute is for a machine that is very busy."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_parent(tmp_path, faulty, number):
    """Ctrl-C reaches all processes at once, and is the parent's business. A busy process ends with Ctrl-C;
    when the parent is killed outright, it ends with its file or by its watchdog, and idle ones at once."""
    folder = lay_out(tmp_path / "my", "a.gif", "b.gif", "c.gif", "sleep.gif")
    (tmp_path / "parent.py").write_text(PARENT)
    argv = [sys.executable, tmp_path / "parent.py", HERE, tmp_path / "modules", folder]
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parent = subprocess.Popen(argv, start_new_session=True, **how)
    try:
        assert parent.stdout.readline() == "ready\n", parent.stderr.read()
        wait_until((folder / "c.gif.pid").exists)
        wait_until(lambda: (folder / "sleep.gif.pid").exists() and (folder / "sleep.gif.pid").read_text())
        busy = int((folder / "sleep.gif.pid").read_text())
        pids = {int(file.read_text()) for file in folder.glob("*.pid")}
        assert len(pids) == 2 and all(is_running(pid) for pid in pids)
        if number == signal.SIGINT:
            os.killpg(parent.pid, number)
        else:
            parent.send_signal(number)
            os.kill(busy, signal.SIGKILL)  # instead of the watchdog
        assert parent.wait(60) != 0
        for pid in pids:
            wait_until(lambda pid=pid: not is_running(pid))
        assert "KeyboardInterrupt" not in parent.stderr.read() or number == signal.SIGINT
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()


def test_a_hang_ends_by_its_watchdog():
    """In C code that lets no signal through, when no parent is there to end it."""
    code = "import decode, re; decode.decode = lambda *_: re.match('(a+)+$', 'a' * 60 + 'b');"
    argv = [sys.executable, "-c", code + "decode.decode_file('x', 8, 32, 8, limit=-9)"]
    done = subprocess.run(argv, cwd=HERE, capture_output=True, timeout=100, check=False)
    assert done.returncode == 1 and b"Timeout" in done.stderr


def test_decoding_needs_no_torch():
    code = "import decode, sys; print({'torch', 'av', 'pebble', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --------------------------------------------------------------------------------------------------------
# Captions and names


class DirectPool:
    """Decodes in this process, where a test is not about processes."""

    def __init__(self, workers, *shape):
        self.shape = shape

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def decode(self, paths, progress):
        return [decode.decode_file(str(path), *self.shape, 100) for path in paths]


@pytest.fixture
def direct(monkeypatch):
    monkeypatch.setattr(clips, "DecodingPool", DirectPool)


@pytest.fixture
def all_in_training(monkeypatch):
    monkeypatch.setattr(clips, "in_validation", lambda *_: False)


ROWS = [
    ({"file_name": "a.gif", "text": "a long caption", "text_short": "a caption"}, None),
    ({"file_name": "./d", "caption": "pictures"}, None),
    ({"file_name": "a.gif", "text": "again"}, "has a caption already"),
    ({"file_name": "/e.gif", "text": "absolute"}, "no clip in this folder"),
    ({"file_name": "../outside.gif", "text": "upward"}, "no clip"),
    ({"file_name": "link.gif", "text": "a link"}, "no clip"),
    ({"file_name": "lost.gif", "text": "missing"}, "no clip"),
    ({"file_name": "e.gif", "text": 5}, '"text"'),
    ({"file_name": ["e.gif"], "text": "a list"}, '"file_name"'),
    ({"file_name": "e.gif", "text": " "}, "is empty"),
    ({"text": "no name"}, '"file_name"'),
    (7, "not a JSON object"),
    (b"", None),
    (b"{'no': json}", "not a JSON object"),
    (b'{"file_name": "e.gif", "text": "caf\xe9"}', "not UTF-8"),
    (b"[" * 100_000, "not a JSON object"),
    (b'{"file_name": "e.gif", "text": "' + b"x" * 10_000_000 + b'"}', "longer than 1048576"),
    (b'{"file_name": "g.gif", "text": "half a \\ud83d character"}', None),
    ({"file_name": "e.gif", "text": "the last line"}, None),
]


def test_metadata_is_read_row_by_row(tmp_path):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row, _ in ROWS]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    rows = ["", "file_name,text", "a.gif,twice", 'f.gif,"two\nlines"', "h.gif," + "x" * 200_000, "h.gif,last"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    captions, problems = clips.read_metadata(tmp_path, ["a.gif", "d", "e.gif", "f.gif", "g.gif", "h.gif"])
    assert captions == {
        "a.gif": ("a long caption", "a caption"),
        "d": ("pictures", "pictures"),
        "e.gif": ("the last line", "the last line"),
        "f.gif": ("two lines", "two lines"),
        "h.gif": ("last", "last"),
        "g.gif": ("half a ? character", "half a ? character"),
    }
    reasons = dict(problems)
    assert "has a caption already" in reasons.pop("metadata.csv, line 3")
    assert "field larger than field limit" in reasons.pop("metadata.csv, line 6")
    for number, (_, reason) in enumerate(ROWS, 1):
        if reason:
            assert reason in reasons.pop(f"metadata.jsonl, line {number}"), number
    assert not reasons


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["metadata.jsonl", "metadata.csv"]))
def test_no_metadata_can_do_harm(tmp_path, content, name):
    for other in tmp_path.iterdir():
        other.unlink()
    (tmp_path / name).write_bytes(content.replace(b"?", b'{"file_name": "a.gif", "text": "x'))
    captions, problems = clips.read_metadata(tmp_path, ["a.gif"])
    assert set(captions) <= {"a.gif"}
    assert all(isinstance(part, str) for problem in problems for part in problem)


def test_what_is_a_clip_and_how_it_is_called(tmp_path, all_in_training, direct):
    names = "a.gif dogs-run/b.gif dogs-run/c.gif dogs-run/e.gif d walk.1 f/below/g.gif"
    root = lay_out(tmp_path / "my", *names.split())
    for name in ("a", "d", "dogs-run/b", "dogs-run/e", "f/below/g"):
        (root / f"{name}.txt").unlink()
    lay_out(root / ".hidden", "h.gif")
    lay_out(tmp_path, "outside.gif")
    iio.imwrite(root / "f" / "cover.png", moving_square()[0])  # beside a folder, so it is no video
    (root / "link.gif").symlink_to(tmp_path / "outside.gif")
    (root / "gone.gif").symlink_to(root / "nothing.gif")
    (root / "dogs-run" / "c.txt").write_text("  a dog\nruns ")
    (root / "walk.1.txt").write_text("the first walk")
    (tmp_path / "secret.txt").write_text("secret")
    for name in ("a", "dogs-run/e"):  # their captions are not what a link out of the folder says
        (root / f"{name}.txt").symlink_to(tmp_path / "secret.txt")
    scanned = scan(root)
    assert dict(scanned.problems) == {
        "link.gif": "it is a link out of the folder",
        "gone.gif": "it is not a file",
        "a.gif": "its caption, a.txt: it is a link",
        "dogs-run/e.gif": "its caption, e.txt: it is a link",
        "d": "it has no caption: write one into d.txt or metadata.jsonl",
    }
    assert "2 files have the name of their folder as caption: dogs-run/b.gif, f/below/g.gif" in scanned.notes
    dataset = FolderDataset(scanned, max_bad=0.6)
    captions = dict(zip(dataset.names, dataset.captions, strict=True))
    assert captions == {
        "walk.1, clip 1": "the first walk",
        "dogs-run/b.gif, clip 1": "dogs run",
        "dogs-run/c.gif, clip 1": "a dog runs",
        "f/below/g.gif, clip 1": "below",
    }


def test_the_top_folder_is_no_caption(tmp_path, direct):
    """Files that could be meant as captions are named. The name of the folder is not taken instead."""
    root = lay_out(tmp_path / "my", "a.gif", "b.gif", "c.gif", "walks/d.gif")
    for name in ("a", "b", "walks/d"):
        (root / f"{name}.txt").unlink()
    (root / "c.txt").write_text(" \n")
    rows = json.dumps({"file_name": "d.gif", "text": "a dog"})
    for name in ("captions.json", "a.json", "walks/metadata.jsonl"):
        (root / name).write_text(rows)
    scanned = scan(root)
    assert list(scanned.entries) == ["walks/d.gif"] and scanned.captions["walks/d.gif"][0] == "walks"
    assert dict(scanned.problems)["c.gif"] == "its caption, c.txt: it is empty"
    which = "text files other than metadata.jsonl or .csv at the top and NAME.txt beside a clip"
    assert f"3 {which} are passed over: a.json, captions.json, walks/metadata.jsonl" in scanned.notes
    with pytest.raises(
        ValueError, match=r"a\.gif, b\.gif, c\.gif; the first: it has no caption: write .* a\.txt"
    ):
        FolderDataset(scanned)


def test_a_typo_in_metadata_is_recognized(tmp_path):
    """Of a clip that has no caption. A clip that has one is not meant."""
    root = lay_out(tmp_path / "my", "surfer.gif", "walks/dog.gif")
    (root / "surfer.txt").unlink()
    names = ("surfre.gif", "dog.gif", "elephant.mp4")
    rows = [json.dumps({"file_name": name, "text": "a caption"}) for name in names]
    (root / "metadata.jsonl").write_text("\n".join(rows))
    problems = clips.read_metadata(root, ["surfer.gif", "walks/dog.gif"])[1]
    assert problems == [
        (
            "metadata.jsonl, line 1",
            "no clip in this folder is called 'surfre.gif': a typo for 'surfer.gif', which has no caption?",
        ),
        ("metadata.jsonl, line 2", "no clip in this folder is called 'dog.gif'"),
        ("metadata.jsonl, line 3", "no clip in this folder is called 'elephant.mp4'"),
    ]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators_of_a_csv_are_recognized(tmp_path, separator):
    (tmp_path / "metadata.csv").write_text(f"file_name{separator}text\na.gif{separator}a cat\n")
    captions, problems = clips.read_metadata(tmp_path, ["a.gif"])
    assert not captions
    assert problems == [("metadata.csv, line 1", "its columns must be separated by commas")]


def test_nothing_leads_out_of_a_folder(tmp_path, monkeypatch, all_in_training):
    """Names that FFmpeg would take for instructions, links in folders of pictures, loops, pipes, bytes."""
    monkeypatch.setattr(decode, "time_limit", lambda *_: 20)  # a pipe would be waited for
    monkeypatch.setattr(clips, "name_of_folder", lambda name: "my")
    root = lay_out(tmp_path / "my", "a.gif", "12:30.gif")
    (tmp_path / "secret.csv").write_text("file_name,text\na.gif,secret\n")
    for way in ("concat:", "subfile,,start,0,end,0,,:"):
        (root / f"{way}a.gif").write_bytes(b"no clip")
    (root / "loop.gif").symlink_to(root / "loop.gif")
    (root / "leak").mkdir()
    iio.imwrite(tmp_path / "secret.png", moving_square()[0])
    (root / "leak" / "0.png").symlink_to(tmp_path / "secret.png")
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe" / "0.png")
    (root / "metadata.csv").symlink_to(tmp_path / "secret.csv")
    (root / os.fsdecode(b"\xfe\n.mp4")).write_bytes(b"no clip")
    monkeypatch.chdir(root)
    dataset = FolderDataset(scan("."), max_bad=0.9)
    assert dataset.names == ["12:30.gif, clip 1", "a.gif, clip 1"] and dataset.captions == ["my", "my"]
    problems = dict(dataset.problems)
    bad = ["concat:a.gif", "subfile", "loop.gif", "leak", "pipe", "metadata.csv", "\\xfe\\n.mp4"]
    assert sorted(name.split(",")[0] for name in problems) == sorted(bad)
    assert problems["leak"] == problems["pipe"] == "0.png is no file of this folder"
    assert problems["metadata.csv"] == "it is a link" and problems["loop.gif"] == "it is not a file"


def test_captions_of_two_styles(tmp_path, direct):
    root = lay_out(tmp_path / "my", *(f"{i}.gif" for i in range(6)), seconds=2)
    rows = [{"file_name": f"{i}.gif", "text": f"long {i}", "text_short": f"short {i}"} for i in range(6)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scanned = scan(root)
    for style, words in (("detailed", ["long"] * 2), ("short", ["short"] * 2), ("both", ["short", "long"])):
        for count in (None, 4):
            dataset = FolderDataset(scanned, caption_style=style, count=count)
            assert [caption.split()[0] for caption in dataset.captions] == words * (len(dataset) // 2)
            for name, caption in zip(dataset.names, dataset.captions, strict=True):
                assert name[0] == caption[-1]


def test_long_captions_are_cut(tmp_path, direct):
    root = lay_out(tmp_path / "my", "a.gif")
    (root / "a.txt").write_text("x" * 3000)
    assert scan(root).captions["a.gif"] == ("x" * 2000,) * 2


# --------------------------------------------------------------------------------------------------------
# The cache and the data set


@pytest.fixture
def decoded(direct, monkeypatch, tmp_path):
    """The files that were decoded since it was emptied. The cache is empty at first."""
    monkeypatch.setenv("MODELGROW_CACHE", str(tmp_path / "cache"))
    names = []
    real = DirectPool.decode

    def spy(self, paths, progress):
        names.extend(path.name for path in paths)
        return real(self, paths, progress)

    monkeypatch.setattr(DirectPool, "decode", spy)
    return names


def is_whole(root):
    """Whether the data set holds just what its files show."""
    dataset = FolderDataset(scan(root), max_bad=0.5)
    names, _, _ = clips.find_clips(root)
    truth = np.concatenate([decode.decode(root / name, 8, 32, 8)[0] for name in names])
    return np.array_equal(dataset.videos[torch.arange(len(dataset))].numpy(), truth)


def test_a_data_set_is_what_the_files_show(tmp_path, all_in_training):
    root = lay_out(tmp_path / "my", "a.gif", "b.gif", "c.gif", seconds=2)
    dataset = FolderDataset(scan(root))
    truth = np.concatenate([decode.decode(root / f"{name}.gif", 8, 32, 8)[0] for name in "abc"])
    videos = dataset.videos[torch.arange(6)]
    assert len(dataset) == len(dataset.videos) == 6 and videos.dtype == torch.uint8
    assert np.array_equal(videos.numpy(), truth) and dataset.videos.nbytes == truth.nbytes
    expected = torch.from_numpy(truth[[4, 0]]).float() / 127.5 - 1
    for rows in ([4, 0], torch.tensor([4, 0]), np.array([4, 0])):
        assert torch.equal(dataset.batch(rows), expected)
    assert [name[0] for name in FolderDataset(scan(root), count=3).names] == ["a", "b", "c"]


def test_batches_of_chosen_clips(tmp_path, direct, all_in_training):
    root = lay_out(tmp_path / "my", "a.gif", "b.gif", "c.gif", seconds=2)
    whole, some = FolderDataset(scan(root)), FolderDataset(scan(root), count=3)
    assert torch.equal(some.batch([1, 2]), whole.batch([2, 4]))


def test_a_file_is_decoded_once(tmp_path, decoded, all_in_training):
    """Also a bad one, though both parts of the data set are made of the folder."""
    root = lay_out(tmp_path / "my", "a.gif", "b.gif")
    (root / "bad.gif").write_bytes(b"GIF89a")
    (root / "bad.txt").write_text("a caption")
    scanned = scan(root)
    for part in ("train", "validation"):
        assert len(FolderDataset(scanned, part, max_bad=0.5)) == 2
    assert sorted(decoded) == ["a.gif", "b.gif", "bad.gif"]
    decoded.clear()
    (root / "bad.gif").unlink()
    assert is_whole(lay_out(root, "more/d.gif").joinpath("more")) and decoded == ["d.gif"]
    decoded.clear()
    assert is_whole(root) and not decoded  # the same file in a larger folder
    write_clip(root / "b.gif", moving_square(9, 16, 32), 8)
    (root / "a.gif").unlink()
    assert is_whole(root) and decoded == ["b.gif"]
    assert len(FolderDataset(scan(root))) == 3


def test_other_clips_of_a_file_have_another_place(tmp_path, monkeypatch):
    file = tmp_path / "a.gif"
    file.write_bytes(b"GIF")
    shapes = ((8, 32, 8), (8, 32, 16), (4, 32, 8), (8, 16, 8))
    places = {clips.cache_place(file, *shape) for shape in shapes}
    longer, elsewhere = tmp_path / "b.gif", tmp_path / "folder" / "a.gif"
    elsewhere.parent.mkdir()
    longer.write_bytes(b"GIF8")
    elsewhere.write_bytes(b"GIF")
    for other in (longer, elsewhere):
        os.utime(other, ns=(1, file.stat().st_mtime_ns))
    longer.replace(file)
    places |= {clips.cache_place(file, 8, 32, 8), clips.cache_place(elsewhere, 8, 32, 8)}
    monkeypatch.setattr(clips, "CLIPS_VERSION", 99)
    places.add(clips.cache_place(file, 8, 32, 8))
    assert len(places) == 7


def test_a_file_with_another_time_is_decoded_again(tmp_path, decoded, all_in_training):
    root = lay_out(tmp_path / "my", "a.gif", "b.gif")
    scan(root)
    decoded.clear()
    os.utime(root / "b.gif", ns=(1, 1))
    scan(root)
    assert decoded == ["b.gif"]


def test_a_damaged_cache_is_made_anew(tmp_path, decoded, all_in_training):
    root = lay_out(tmp_path / "my", "a.gif", "b.gif", "c.gif", seconds=2)
    places = {name: clips.cache_place(root / name, 8, 32, 8) for name in ("a.gif", "b.gif", "c.gif")}
    scan(root)
    content = places["b.gif"].read_bytes()
    for damaged in (b"", content[:30], content[:-1], content + b"more"):
        decoded.clear()
        places["a.gif"].unlink()
        places["b.gif"].write_bytes(damaged)
        assert is_whole(root) and decoded == ["a.gif", "b.gif"]
        assert places["b.gif"].read_bytes() == content


@pytest.mark.parametrize("fit", [True, False])
def test_clips_of_the_cache_for_another_device(tmp_path, decoded, all_in_training, monkeypatch, fit):
    """Those that fit are moved there, a few at a time. Of others a batch is read."""
    dataset = FolderDataset(scan(lay_out(tmp_path / "my", "a.gif", "b.gif", "c.gif", seconds=2)))
    monkeypatch.setattr(machine, "fits", lambda size, device: fit and size == 6 * 3 * 8 * 32**2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # which needs a GPU
    monkeypatch.setattr(machine, "READ_AT_ONCE", 4)
    read, read_some = [], clips.CachedClips.__getitem__
    record = lambda self, rows: read.append(rows.tolist()) or read_some(self, rows)  # noqa: E731
    monkeypatch.setattr(clips.CachedClips, "__getitem__", record)
    store = machine.RowStore(dataset.videos, torch.device("meta"))
    assert read == ([[0, 1, 2, 3], [4, 5]] if fit else [])
    rows = torch.tensor([4, 0])
    assert store.take(rows, rows).shape == (2, 3, 8, 32, 32)
    if fit:
        assert store.tensor.device.type == "meta" and len(store.tensor) == 6
    else:
        assert torch.equal(store.pinned(rows).float() / 127.5 - 1, dataset.batch(rows))
        store.pool.shutdown()


def test_two_starts_at_once(tmp_path, decoded, all_in_training):
    """Each of them may decode a file, and neither leaves half of one."""
    root = lay_out(tmp_path / "my", "a.gif", "b.gif")
    threads = [threading.Thread(target=scan, args=(root,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    decoded.clear()
    assert is_whole(root) and not decoded
    places = {clips.cache_place(root / name, 8, 32, 8) for name in ("a.gif", "b.gif")}
    assert set(clips.cache_dir().iterdir()) == places


def test_a_kill_loses_one_group(tmp_path, decoded, all_in_training, monkeypatch):
    root = lay_out(tmp_path / "my", *(f"{i}.gif" for i in range(9)))
    monkeypatch.setattr(clips, "GROUP", 2)

    def interrupted(place, *content):
        if len(list(clips.cache_dir().iterdir())) == 5:
            raise KeyboardInterrupt
        write_cache(place, *content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clips, "write_cache", interrupted)
        scan(root)
    assert decoded == [f"{i}.gif" for i in range(6)]
    decoded.clear()
    assert is_whole(root) and decoded == [f"{i}.gif" for i in range(5, 9)]


def test_a_disk_that_fills_up(tmp_path, decoded, all_in_training):
    """It is said, and what was written before is of use."""
    root = lay_out(tmp_path / "my", *(f"{i}.gif" for i in range(3)))
    write_clip(root / "3.gif", moving_square(3, 64, 32), 8).with_suffix(".txt").write_text("a caption")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError, match=f"cannot write into {clips.cache_dir()}: .*too large"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            scan(root)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(list(clips.cache_dir().iterdir())) == 3
    decoded.clear()
    assert is_whole(root) and decoded == ["3.gif"]


def test_too_many_bad_files(tmp_path, all_in_training, direct):
    root = lay_out(tmp_path / "my", "a.gif", "b.gif", "c.gif")
    (root / "bad.gif").write_bytes(b"GIF89a")
    scanned = scan(root)
    (root / "bad.txt").write_text("a caption")
    message = (
        r"1 of 4 files and lines .* are bad, more than --max-bad 0.1: bad\.gif; the first: it has no cap"
    )
    with pytest.raises(ValueError, match=message):
        FolderDataset(scanned)
    assert [what for what, _ in FolderDataset(scanned, max_bad=0.25).problems] == ["bad.gif"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there are no clips in .*empty: no video \(\.mp4"):
        FolderDataset(scan(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        scan(tmp_path / "nowhere")
    for frames, size, fps in ((0, 16, 8), (8, 0, 8), (8, 16, 0), (8, 16, float("nan")), (8, 16, 1e9)):
        with pytest.raises(ValueError, match="there are no clips of"):
            scan(root, frames, size, fps)


def test_the_held_out_files_stay_the_same(tmp_path, direct):
    names = [f"clip {i}.gif" for i in range(2000)]
    held_out = [name for name in names if clips.in_validation(name)]
    assert 160 < len(held_out) < 240
    kept = [name for name in names if not clips.in_validation(name)]
    root = lay_out(tmp_path / "my", held_out[0], *kept[:2])
    before = {part: set(FolderDataset(scan(root), part).names) for part in ("train", "validation")}
    assert before == {
        "train": {f"{name}, clip 1" for name in kept[:2]},
        "validation": {f"{held_out[0]}, clip 1"},
    }
    lay_out(root, held_out[1], kept[2])
    for part, names in before.items():
        assert names < set(FolderDataset(scan(root), part).names)


def test_check_tells_and_draws(tmp_path, capsys, monkeypatch, direct):
    root = lay_out(tmp_path / "my", "a.gif", "b.gif", "walk", seconds=2)
    (root / "bad.gif").write_bytes(b"GIF89a")
    (root / "bad.txt").write_text("a caption")
    monkeypatch.chdir(root)
    with pytest.raises(ValueError, match=r"^train\.py would refuse: 1 of 4 .*: bad\.gif; the first: [^;]*$"):
        clips.check(".", tmp_path / "samples", 8, 64, 16)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "3 files, 8 clips of 8 frames of 64 x 64 pixels",
        "4.0 s are used, 1.00 to 1.50 s of a file",
        "sizes: 32x32 (3)",
        "captions: 1 different, of 1 words (median)",
    ]
    assert "note: enlarged to 64 pixels: a.gif, b.gif, walk" in lines
    assert any(line.startswith("skipped: bad.gif: ") for line in lines)
    preview = Image.open(tmp_path / "samples" / "preview-my.gif")
    assert preview.n_frames == 8 and lines[-1].endswith("preview-my.gif")
    shown = 0
    for i in range(8):
        preview.seek(i)
        shown += preview.info["duration"]
    assert shown == 500  # 8 frames at 16 a second
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"train\.py would refuse: there are no clips in"):
        clips.check(tmp_path / "empty", tmp_path / "samples", 8, 16, 8)
    assert capsys.readouterr().out == "0 files, 0 clips of 8 frames of 16 x 16 pixels\n"


def test_a_preview_has_names_and_captions_as_asked_for(tmp_path, capsys, monkeypatch, direct):
    root = tmp_path / "my"
    rows = []
    for i in range(10):
        write_clip(root / f"{i}.gif", moving_square(i, 8, 32 + i), 8)
        rows.append(
            json.dumps({"file_name": f"{i}.gif", "text": f"a long text {i}", "text_short": f"text {i}"})
        )
    (root / "metadata.jsonl").write_text("\n".join(rows))
    drawn = []
    monkeypatch.setattr(clips, "save_grid", lambda path, videos, labels, **how: drawn.append(labels))
    for style, text in (("detailed", "a long text"), ("short", "text")):
        clips.check(root, tmp_path, 8, 16, 8, style)
        assert drawn.pop() == drawn.pop() == [f"{i}.gif: {text} {i}" for i in range(10)]
        assert f"of {len(text.split()) + 1} words (median)" in capsys.readouterr().out


def test_names_that_are_left_out_are_counted():
    assert clips.name_some(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert clips.name_some(list("abcde")) == "a, b, c, d, e"


def test_sizes_that_are_left_out_are_counted(capsys):
    entry = {"seconds": 1, "height": 9, "notes": []}
    entries = {f"{i}.gif": {**entry, "width": i} for i in range(10)}
    clips.print_summary(clips.Scan(Path(), entries, {}, [], []), dict.fromkeys(entries, "a cat"))
    assert "7x9 (1) and 2 more\n" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------
# Files from strangers


def mutate(rng, content: bytes, most: int | None = None) -> bytes:
    """A file with a fault, in its first `most` bytes if that is given."""
    size = min(len(content), most or len(content))
    a = int(rng.integers(size))
    b = min(size, a + int(rng.integers(1, 65)))
    wrong = bytearray(content)
    match rng.integers(8):
        case 0 | 1:
            for where in rng.integers(size, size=rng.integers(1, 9)):
                wrong[where] ^= 1 << rng.integers(8)
        case 2:
            wrong = wrong[:a]
        case 3:
            wrong[a:b] = rng.bytes(b - a)
        case 4:
            wrong[a:b] = bytes([rng.choice([0, 255])]) * (b - a)
        case 5:
            del wrong[a:b]
        case 6:
            wrong[a:b] = wrong[a:b] * int(rng.integers(2, 50))
        case 7:  # a number in the text
            digits = list(re.finditer(rb"\d+", content[:size]))
            if digits:
                found = digits[rng.integers(len(digits))]
                wrong[slice(*found.span())] = str(rng.choice([0, -1, 10**9, 10**18, 2**63])).encode()
    return bytes(wrong)


def files_below(path):
    return {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_broken_clips(tmp_path):
    """Each of 110 is decoded or refused in a line, and nothing is written but the cache."""
    rng = np.random.default_rng(0)
    good = [
        write_clip(tmp_path / f"clip{end}", moving_square(i, 24, 32)) for i, end in enumerate(ENDINGS[:-1])
    ]
    good.append(write_clip(tmp_path / "pictures", moving_square(5, 3, 32)) / "1.png")
    root = tmp_path / "my"
    for trial in range(110):
        file = good[rng.integers(len(good))]
        target = root / "walks" / f"{trial}{file.suffix}"
        if file.suffix == ".png":
            target = root / "walks" / str(trial) / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(mutate(rng, file.read_bytes(), [None, 600][rng.integers(2)]))
    before = files_below(tmp_path)
    dataset = FolderDataset(scan(root, size=16), max_bad=0.99)
    assert dataset.batch(range(len(dataset))).isfinite().all()
    assert 20 < len(dataset.problems) < 110
    assert len({name.split(",")[0] for name in dataset.names}) <= 110 - len(dataset.problems)
    for _, why in dataset.problems:
        assert len(why.splitlines()) == 1 and "crashed" not in why and "longer than" not in why
    assert files_below(tmp_path) == before


def test_broken_metadata(tmp_path, direct):
    """Each of 110 is read or refused in a line, and nothing is written but the cache."""
    rng, refused = np.random.default_rng(1), 0
    root = tmp_path / "my"
    write_clip(root / "my/pictures", moving_square(5, 3, 32))
    row = {"file_name": "my/pictures", "text": "a long caption", "text_short": "caf\u00e9"}
    texts = {"jsonl": json.dumps(row), "csv": 'file_name,text,text_short\nmy/pictures,"a, b",c\n'}
    for trial in range(110):
        ending = ("jsonl", "csv")[trial % 2]
        path = root / f"metadata.{ending}"
        path.write_bytes(mutate(rng, texts[ending].encode()))
        before = files_below(tmp_path)
        dataset = FolderDataset(scan(root, size=16), max_bad=0.99)
        assert len(dataset) == 1 and len(dataset.captions[0].splitlines()) == 1
        assert all(len(why.splitlines()) == 1 for _, why in dataset.problems)
        assert files_below(tmp_path) == before
        refused += bool(dataset.problems)
        path.unlink()
    assert 20 < refused < 110
