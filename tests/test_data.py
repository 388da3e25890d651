"""The toy world: draw.py turns scenes into pixels, data.py makes scenes, captions and the data set.

Shapes are compared with brute force and with known areas; pixels with what the caption says; captions with
the scene they describe; everything with known digests, so that no change of the world goes unnoticed. What
moves, and what is held out from training, is in test_all.py.
"""

import hashlib
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import draw
from data import BACKGROUNDS, KINDS, MOTIONS, WORDS, ToyDataset
from draw import Actor, Scene

# --------------------------------------------------------------------------------------------------------
# Shapes


def test_circle_covers_its_area():
    image = torch.zeros(1, 1, 3, 64, 64)
    x = (torch.arange(64) + 0.5) / 32 - 1
    p = torch.meshgrid(x, x, indexing="xy")
    draw.paint(image, draw.circle(p, 0.1, -0.2, 0.5)[None, None], torch.ones(3, 1, 1))
    assert image[0, 0, 0].sum() / 32**2 == pytest.approx(math.pi * 0.5**2, rel=1e-3)


@pytest.mark.parametrize(
    "shape, numbers, area",
    [
        (draw.capsule, (-0.5, 0.1, 0.4, -0.3, 0.2), 2 * 0.2 * math.hypot(0.9, 0.4) + math.pi * 0.2**2),
        (draw.box, (0.11, 0.02, 0.6, 0.3, 0.1), 4 * 0.6 * 0.3 - (4 - math.pi) * 0.1**2),
        (draw.circle, (-0.2, 0.3, 0.4), math.pi * 0.4**2),
    ],
)
def test_distances_agree_with_brute_force(shape, numbers, area):
    x = torch.linspace(-1.4, 1.4, 57)
    p = torch.meshgrid(x, x, indexing="xy")
    grid = torch.stack(p, -1).flatten(0, 1)
    distance = shape(p, *numbers).flatten()
    assert (distance <= 0).float().mean() * 2.85**2 == pytest.approx(area, abs=0.05)
    outside = distance > 0.1
    nearest = torch.cdist(grid[outside], grid[distance <= 0]).amin(1)
    assert (nearest - distance[outside]).abs().max() < 0.06  # the grid's spacing is 0.05


def test_ellipse_is_exact_near_its_edge():
    angle = torch.linspace(0, 6, 50)
    for factor, offset in ((0.98, -0.02), (1.0, 0.0), (1.02, 0.02)):
        p = 0.3 + factor * 0.8 * torch.cos(angle), -0.1 + factor * 0.4 * torch.sin(angle)
        distance = draw.ellipse(p, 0.3, -0.1, 0.8, 0.4)
        expected = offset * 0.8 * 0.4 / torch.hypot(0.4 * torch.cos(angle), 0.8 * torch.sin(angle))
        assert (distance - expected).abs().max() < 1e-3


def test_a_polygon_is_the_same_whichever_way_round():
    x = torch.linspace(-1.4, 1.4, 57)
    p = torch.meshgrid(x, x, indexing="xy")
    corners = ((-0.3, 0.2), (0.5, 0.6), (0.4, -0.7))
    distance = draw.polygon(p, *corners)
    assert torch.allclose(distance, draw.polygon(p, *corners[::-1]), atol=1e-6)
    assert (distance <= 0).float().mean() * 2.8**2 == pytest.approx(0.5, abs=0.05)  # its area is 0.5


# --------------------------------------------------------------------------------------------------------
# Scenes and pixels


@pytest.mark.parametrize("which", ["basic", "rich"])
def test_scenes_are_deterministic(which):
    scenes = data.make_scenes(which, 24, seed=3)
    assert scenes == data.make_scenes(which, 24, seed=3) != data.make_scenes(which, 24, seed=4)
    video = draw.render(scenes)
    assert video.shape == (24, 3, 8, 32, 32) and video.dtype == torch.uint8
    alone = torch.cat([draw.render([scene]) for scene in scenes])
    assert torch.equal(video, alone), "a clip depends on its batch"


def test_small_clips_are_large_ones_averaged():
    scenes = data.make_scenes("basic", 32, seed=5)
    small = draw.render(scenes, 4, 32).float()
    large = torch.nn.functional.avg_pool3d(draw.render(scenes, 4, 128).float(), (1, 4, 4))
    assert (small - large).abs().mean() < 4  # of 255


def actor_mass(motion, frames=8, size=64, **options):
    """Where an actor is: the difference of two clips in which only its colour differs, (T, H, W)."""
    scenes = [Scene((Actor("car", colour, motion, **options),), "meadow", 11) for colour in ("red", "blue")]
    red, blue = draw.render(scenes, frames, size).float()
    return (red - blue).abs().sum(0)


def center_of_mass(mass):
    """(T, H, W) -> x and y, each (T,), in pixels."""
    axis = torch.arange(mass.shape[-1]) + 0.5
    total = mass.sum((1, 2))
    return mass.sum(1) @ axis / total, mass.sum(2) @ axis / total


def test_pixels_change_as_the_caption_says():
    area = actor_mass("still", change="grows").sum((1, 2))
    assert area[-1] / area[0] == pytest.approx(4, rel=0.2)  # twice the size
    area = actor_mass("still", change="shrinks").sum((1, 2))
    assert area[0] / area[-1] == pytest.approx(4, rel=0.2)
    one, three = (actor_mass("still", count=count, size=128).sum() for count in (1, 3))
    assert three / one == pytest.approx(3 * 0.66**2, rel=0.1)  # the outer two are cut off a little
    scenes = []
    for colour, change in (("red", ""), ("blue", ""), ("red", "turns blue")):
        scenes.append(Scene((Actor("ball", colour, "spin", change),), "snow", 5))
    red, blue, turns = draw.render(scenes)
    assert torch.equal(turns[:, 0], red[:, 0]) and torch.equal(turns[:, -1], blue[:, -1])


def test_the_camera_moves_as_the_caption_says():
    actors = (Actor("ball", "red", "still"),)
    distance = {}
    for camera in data.CAMERAS:
        (x, _), (left, _) = (
            draw.places(Scene(actors, "city", seed, "", camera), 1)["ball"] for seed in (3, 4)
        )
        distance[camera] = x - left  # in the first frame
    assert distance["still"] == pytest.approx(distance["pan left"])
    assert distance["zoom in"] < distance["still"] < distance["zoom out"]
    scenes = [Scene(actors, "city", 3, "", camera) for camera in ("still", "pan left", "pan right")]
    still, left, right = draw.render(scenes, 3, 64).float()
    assert torch.equal(still[:, 1], left[:, 1]) and torch.equal(still[:, 1], right[:, 1])
    assert torch.equal(left[:, 0], right[:, 2]) and torch.equal(left[:, 2], right[:, 0])


@pytest.mark.parametrize("motion", MOTIONS)
def test_places_are_where_the_pixels_are(motion):
    x, y = center_of_mass(actor_mass(motion))
    place = draw.places(Scene((Actor("car", "red", motion),), "meadow", 11), 8)["car"]
    assert place[0] == pytest.approx(x.mean().item() / 32 - 1, abs=0.04)
    assert place[1] == pytest.approx(y.mean().item() / 32 - 1, abs=0.08)  # a car's mass lies below its center


def test_relations_hold_in_the_picture():
    for seed in range(20):
        for relation in data.RELATIONS:
            actors = Actor("cat", "red", "still"), Actor("dog", "blue", "bounce")
            places = draw.places(Scene(actors, "snow", seed, relation), 8)
            (x1, y1), (x2, y2) = places["cat"], places["dog"]
            holds = {"left of": x1 < x2, "right of": x1 > x2, "above": y1 < y2, "below": y1 > y2}
            assert holds[relation]


def test_every_background_and_every_kind_is_seen():
    empty = [Scene((Actor("ball", "red", "still"),), name, 1) for name in BACKGROUNDS]
    pictures = draw.render(empty, 1, 32).float()
    assert torch.pdist(pictures.flatten(1)).min() > 1000
    scenes = [Scene((Actor(kind, "red", "still"),), "snow", 1) for kind in KINDS]
    pictures = draw.render(scenes, 1, 32).float()
    assert torch.pdist(pictures.flatten(1)).min() > 1000


@pytest.mark.parametrize("frames, size", [(0, 32), (8, 3)])
def test_no_clip_without_frames_or_pixels(frames, size):
    with pytest.raises(ValueError, match="at least 1 frame and 4 pixels"):
        draw.render(data.make_scenes("basic", 1), frames, size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_up_to_rounding():
    scenes = data.make_scenes("both", 64)
    cpu = draw.render(scenes).int()
    gpu = draw.render(scenes, device="cuda")
    assert gpu.device.type == "cuda"
    assert (cpu - gpu.cpu().int()).abs().max() <= 1


# --------------------------------------------------------------------------------------------------------
# The version


def digest(lines):
    """The first digits of a hash of lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


WORLD = {  # by WORLD_VERSION: digests of scenes and captions, and sums of pixels with random weights
    1: {
        "scenes": "ab27aef430991584",
        "captions": "485b0063e8f542c2",
        "pixels": [24379, -390063, 31380, 551012, 344976, 370739, -542486, 408233],
    }
}


def test_the_version_changes_with_scenes():
    lines = []
    for which, pairs in (("basic", "train"), ("rich", "train"), ("basic", "held_out"), ("both", "all")):
        lines.extend(json.dumps(asdict(scene)) for scene in data.make_scenes(which, 300, 7, pairs))
    assert digest(lines) == WORLD[draw.WORLD_VERSION]["scenes"], "increase WORLD_VERSION"


def test_the_version_changes_with_captions():
    lines = []
    for which, styles in (("basic", ("short", "detailed", "reworded")), ("rich", ("short", "detailed"))):
        scenes = data.make_scenes(which, 300, 7, "all")
        for style in styles:
            for vocabulary in ("train", "held_out", "varied"):
                for drop_attribute in (0.0, 0.1):
                    lines.extend(data.captions_of(scenes, style, vocabulary, drop_attribute))
    assert digest(lines) == WORLD[draw.WORLD_VERSION]["captions"], "increase WORLD_VERSION"


def test_the_version_changes_with_pixels():
    """There is no hash, because some CPUs round a few pixels differently. Sums with random weights change by
    thousands if anything moves, but by less than 200 if a hundred pixels change by 1 of 255."""
    videos = draw.render(data.make_scenes("both", 64, 7, "all")).int()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-8, 9, videos.shape, generator=generator)
    sums = (videos * weights).view(8, -1).sum(1).tolist()
    assert sums == pytest.approx(WORLD[draw.WORLD_VERSION]["pixels"], abs=200), "increase WORLD_VERSION"


# --------------------------------------------------------------------------------------------------------
# Captions


@pytest.mark.parametrize("vocabulary, column", [("train", 0), ("held_out", 1)])
@pytest.mark.parametrize("style", ["short", "detailed", "reworded"])
def test_captions_name_everything(style, vocabulary, column):
    for scene in data.make_scenes("basic", 200):
        actor = scene.actors[0]
        text = data.caption(scene, style, vocabulary)
        names = {"kind": actor.kind, "colour": actor.colour, "motion": actor.motion}
        names["background"] = scene.background
        for concept, name in names.items():
            phrases = WORDS[concept][name][column]
            assert any(phrase.lower() in text.lower() for phrase in phrases), text
        assert text == data.caption(scene, style, vocabulary)


def test_length_of_detailed_captions():
    lengths = []
    for which in ("basic", "rich"):
        captions = data.captions_of(data.make_scenes(which, 4000), "detailed")
        lengths.extend(len(text.split()) for text in captions)
    assert (min(lengths), max(lengths)) == (27, 82)  # as the docstring of detailed_caption says


def test_sentences_of_known_scenes():
    actors = Actor("cat", "orange", "surf", "turns blue"), Actor("fish", "red", "up", "grows", 2)
    scene = Scene(actors, "night", 1, "above", "zoom in")
    assert data.caption(scene) == (
        "a bright orange kitty riding a wave that turns bright blue above"
        " two bright red goldfish moving up that grow at night"
    )
    assert data.caption(scene, "detailed") == (
        "A bright orange kitty with pointed ears and a long tail is surfing above the fish."
        " It slowly turns bright blue. Two bright red goldfish with a fan-shaped tail are moving up."
        " Each slowly grows. The scene is at night: stars and a moon shine in a dark sky."
        " The camera zooms in."
    )
    assert data.caption(scene, "detailed", drop_attribute=1.0) == (
        "A cat with pointed ears and a long tail is riding a wave above the fish."
        " It slowly turns bright blue. Two fish with a fan-shaped tail are moving up."
        " Each slowly grows. Stars and a moon shine in a dark sky. The camera zooms in."
    )


@pytest.mark.parametrize("concept", ["colour", "background"])
def test_dropped_attributes(concept):
    scenes = data.make_scenes("basic", 400)

    def missing(drop_attribute):
        number = 0
        for scene in scenes:
            name = scene.actors[0].colour if concept == "colour" else scene.background
            text = data.caption(scene, drop_attribute=drop_attribute)
            number += not any(phrase in text for phrase in WORDS[concept][name][0])
        return number

    assert missing(0.0) == 0 and missing(1.0) == 400
    assert 20 < missing(0.1) < 65


def test_held_out_forms_are_no_training_captions():
    """With its words taken out, no training caption has the form of a reworded one, and nothing else is
    new."""
    phrases = [
        phrase for concept in WORDS.values() for trained, _, _ in concept.values() for phrase in trained
    ]
    longest_first = sorted(map(re.escape, phrases), key=len, reverse=True)
    pattern = re.compile("|".join(longest_first))

    def form(text):
        return re.sub(r"\ban? ", "a ", pattern.sub("*", text))

    scenes = data.make_scenes("basic", 1000)
    trained = {form(data.caption(scene, style)) for scene in scenes for style in ("short", "detailed")}
    reworded = [form(data.caption(scene, "reworded")) for scene in scenes]
    assert len(set(reworded)) == len(data.HELD_OUT_FORMS) and not trained & set(reworded)
    assert all(text.count("*") == 4 for text in reworded)  # kind, colour, motion and background are named
    several = Scene((Actor("cat", "red", "up"), Actor("dog", "red", "up")), "snow", 1, "above")
    with pytest.raises(ValueError):
        data.caption(several, "reworded")


# --------------------------------------------------------------------------------------------------------
# The data set


def test_both_sets_and_both_styles_in_all_combinations():
    dataset = ToyDataset("both", 8, caption_style="both", drop_attribute=0)
    assert len({scene.seed for scene in dataset.scenes}) == 8
    basic, rich = data.make_scenes("basic", 8), data.make_scenes("rich", 8)
    assert dataset.scenes[0::2] == basic[0::2] and dataset.scenes[1::2] == rich[1::2]
    detailed = ["camera" in text for text in dataset.captions]
    assert detailed == [False, False, True, True, False, False, True, True]


def test_batches_of_the_data_set():
    dataset = ToyDataset("rich", 130, seed=2, frames=4, size=16)
    assert len(dataset) == len(dataset.scenes) == len(dataset.captions) == len(dataset.names) == 130
    assert dataset.videos.shape == (130, 3, 4, 16, 16) and dataset.videos.dtype == torch.uint8
    assert torch.equal(dataset.videos, draw.render(dataset.scenes, 4, 16))
    assert dataset.problems == []
    x = dataset.batch([3, 1, 129])
    assert x.dtype == torch.float32 and -1 <= x.min() < -0.8 and 0.8 < x.max() <= 1
    assert torch.equal(((x + 1) * 127.5).round().byte(), dataset.videos[[3, 1, 129]])
    assert torch.equal(x, dataset.batch(torch.tensor([3, 1, 129])))
    assert torch.equal(x[:1], dataset.batch(range(3, 4)))


def test_clips_are_rendered_in_parts_and_kept(monkeypatch):
    data.rendered.cache_clear()
    calls = []

    def spy(scenes, *args):
        calls.append(len(scenes))
        return draw.render(scenes, *args)

    monkeypatch.setattr(data, "render", spy)
    first = ToyDataset("basic", 300, frames=8, size=32)
    assert calls == [128, 128, 44]
    again = ToyDataset("basic", 300, frames=8, size=32, caption_style="detailed", device=torch.device("cpu"))
    assert len(calls) == 3 and again.videos is first.videos
    assert again.captions != first.captions
    ToyDataset("basic", 300, seed=1, frames=8, size=32)
    assert len(calls) == 6


def test_training_and_validation_differ():
    train, validation = (ToyDataset("basic", 16, seed=seed, frames=1, size=8) for seed in (0, 1))
    assert not {scene.seed for scene in train.scenes} & {scene.seed for scene in validation.scenes}
    assert not torch.equal(train.videos, validation.videos)


def test_unknown_set():
    with pytest.raises(ValueError, match="basic, rich, both"):
        ToyDataset("easy", 4)


# --------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("which", ["basic", "rich"])
def test_preview(which, tmp_path, capsys):
    with pytest.raises(ValueError, match="--fps is 0"):
        data.main(f"--fps 0 --out {tmp_path}".split())
    data.main(f"--data {which} --captions detailed --size 16 --frames 2 --fps 25 --out {tmp_path}".split())
    paths = [tmp_path / f"preview-{which}.{end}" for end in ("png", "gif")]
    assert capsys.readouterr().out.split() == list(map(str, paths))
    assert Image.open(paths[0]).size == Image.open(paths[1]).size
    gif = Image.open(paths[1])
    durations = []
    for frame in range(gif.n_frames):
        gif.seek(frame)
        durations.append(gif.info["duration"])
    assert durations == [40, 40]  # milliseconds at 25 frames a second


def test_a_preview_has_every_kind_with_every_motion():
    scenes = data.preview_scenes("basic", 0)
    assert {(s.actors[0].kind, s.actors[0].motion) for s in scenes} == {
        (k, m) for k in data.KINDS for m in data.MOTIONS
    }


def test_check_gets_all_options(tmp_path, monkeypatch, capsys):
    """And says how training goes on with them, at the size of training if none is given."""
    import clips

    calls = []
    monkeypatch.setattr(clips, "check", lambda *args: calls.append(args))
    data.main(f"--check videos --size 16 --frames 5 --fps 24 --out {tmp_path}".split())
    data.main(["--check", "my videos", "--captions", "short"])
    assert calls == [
        ("videos", tmp_path, 5, 16, 24.0, "detailed"),
        ("my videos", Path("samples"), 8, 32, 8, "short"),
    ]
    assert capsys.readouterr().out.splitlines() == [
        "next: python train.py --data videos --frames 5 --size 16 --fps 24.0",
        "next: python train.py --data 'my videos' --captions short",
    ]
