"""The toy world: videos whose captions are true by construction.

A text-to-video model is only as testable as its data. With clips from the internet "does the video show what
the prompt says" is an opinion; here it is a measurement, because we drew the video and wrote the caption from
one record, the `Scene`. Everything is procedural, so there is nothing to download, and any size and any
number of frames can be rendered from the same scene: 32x32 to train on a laptop, 128x128 to look at.

**Scenes.** A scene has one to three actors (kind, colour, motion, perhaps a change and a count), a
background, a camera and a seed. The seed decides what the caption does not say: where exactly, how large,
which of several words. Scenes turn into JSON and back, and render to the same bits each time.

**Two sets.** `basic` has one actor and short captions; the base model is pre-trained on it. `rich` has
several actors, relations, counts, changes and camera moves, with long captions; grown models are trained on
it, as ModelGrow (arXiv 2412.18966, section on data) continues with longer, more detailed captions than its
base had. `both` alternates between the two, so that nothing is forgotten.

**What is kept from training.** Three fixed lists make generalisation measurable: `HELD_OUT_PAIRS`, (kind,
motion) pairs that never occur together (a cat never surfs); the second column of `WORDS`, words that
never occur in a training caption (a *feline* that is *ascending*; the third column enriches captions); and
`HELD_OUT_FORMS`, sentences built as no training caption is.

How a scene becomes pixels is another file, draw.py; real clips from a folder are a third, clips.py.
"""

import argparse
import functools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from clips import Folder, check
from draw import FPS, render, save_grid

# Each concept: (words of all training captions), (words of none), (more words, of varied captions only).
# fmt: off
WORDS = {
    "kind": {
        "cat": (("cat", "kitty"), ("feline", "kitten"),
                ("tomcat", "tabby", "pussycat")),
        "dog": (("dog", "puppy"), ("hound", "canine"),
                ("terrier", "poodle", "doggy")),
        "fish": (("fish", "goldfish"), ("trout", "salmon"),
                ("carp", "tuna", "sea fish")),
        "bird": (("bird", "songbird"), ("sparrow", "robin"),
                ("finch", "swallow", "blackbird")),
        "car": (("car", "automobile"), ("sedan", "taxi"),
                ("vehicle", "motorcar", "hatchback")),
        "rocket": (("rocket", "space rocket"), ("spaceship", "missile"),
                ("spacecraft", "space shuttle", "moon rocket")),
        "boat": (("boat", "sailboat"), ("yacht", "ship"),
                ("sailing boat", "schooner", "vessel")),
        "ball": (("ball", "beach ball"), ("sphere", "globe"),
                ("round ball", "football", "bouncy ball")),
    },
    "colour": {
        "red": (("red", "bright red"), ("crimson", "scarlet"),
                ("ruby", "cherry red", "blood-red")),
        "orange": (("orange", "bright orange"), ("tangerine", "apricot"),
                ("pumpkin orange", "amber", "carrot-coloured")),
        "yellow": (("yellow", "bright yellow"), ("golden", "lemon"),
                ("sunny yellow", "canary yellow", "mustard")),
        "green": (("green", "bright green"), ("emerald", "lime"),
                ("grass green", "jade", "olive")),
        "blue": (("blue", "bright blue"), ("azure", "navy"),
                ("sky blue", "cobalt", "sapphire")),
        "purple": (("purple", "bright purple"), ("violet", "lavender"),
                ("plum", "mauve", "amethyst")),
    },
    "motion": {
        "left": (("moving left", "going to the left"), ("heading leftward", "sliding west"),
                ("drifting left", "travelling leftwards", "on its way to the left")),
        "right": (("moving right", "going to the right"), ("heading rightward", "sliding east"),
                ("drifting right", "travelling rightwards", "on its way to the right")),
        "up": (("moving up", "rising"), ("ascending", "climbing"),
                ("going upward", "soaring", "floating up")),
        "down": (("moving down", "falling"), ("descending", "dropping"),
                ("going downward", "sinking", "plunging")),
        "bounce": (("bouncing", "bouncing up and down"), ("hopping", "jumping"),
                ("leaping", "springing up and down", "bobbing")),
        "spin": (("spinning", "turning around"), ("rotating", "twirling"),
                ("whirling", "revolving", "going round and round")),
        "surf": (("surfing", "riding a wave"), ("on a surfboard", "wakeboarding"),
                ("catching a wave", "on top of the waves", "gliding over the waves")),
        "still": (("standing still", "not moving"), ("motionless", "at rest"),
                ("staying in place", "standing there", "resting")),
    },
    "background": {
        "meadow": (("in a meadow", "on a green field"), ("on the prairie", "on a lawn"),
                ("on a grassy hill", "in the countryside", "on the grass")),
        "desert": (("in the desert", "among sand dunes"), ("in the Sahara", "in arid badlands"),
                ("in a sandy waste", "on hot sand", "in a dry land")),
        "night": (("at night", "under the stars"), ("after dark", "at midnight"),
                ("in the moonlight", "under a dark sky", "in the night")),
        "snow": (("in the snow", "on a winter day"), ("in the Arctic", "during a blizzard"),
                ("on a snowy plain", "in winter", "on the ice")),
        "city": (("in the city", "in front of tall houses"), ("downtown", "in a metropolis"),
                ("in town", "among skyscrapers", "on a city street")),
    },
}
# fmt: on
KINDS, COLOURS, MOTIONS, BACKGROUNDS = (tuple(WORDS[c]) for c in ("kind", "colour", "motion", "background"))
RELATIONS = ("left of", "right of", "above", "below")
CAMERAS = ("still", "pan left", "pan right", "zoom in", "zoom out")
SETS = {"basic": ("basic",), "rich": ("rich",), "both": ("basic", "rich")}
CHANGES = ("turns", "grows", "shrinks")  # "turns" comes with a second colour: "turns blue"

# One per kind and one per motion, so that both halves of every pair are well known apart from the other.
HELD_OUT_PAIRS = (
    ("cat", "surf"), ("dog", "spin"), ("fish", "up"), ("bird", "down"),
    ("car", "bounce"), ("rocket", "left"), ("boat", "still"), ("ball", "right"),
)  # fmt: skip
HELD_OUT_FORMS = (  # of one actor: {a} is its article, colour and kind
    "there is {a} {place}, and it is {motion}",
    "this is a video of {a}; {place} it is {motion}",
    "{motion} {place}: {a}",
    "what is {motion} {place}? it is {a}",
    "{kind}, {colour}, {motion}, {place}",
    "the {kind}, which is {colour}, is {motion} {place}",
    "look {place}, and you see how {a} is {motion}",
    "somebody filmed {a} that was {motion} while they were {place}",
)
PROMPTS = (  # drawn at intervals with fixed noise; the last four hold pairs or words not in training
    "a red cat moving left in a meadow",
    "a blue rocket rising at night",
    "a yellow dog surfing in the desert",
    "a green fish spinning in the city",
    "an orange cat surfing in the snow",
    "a purple ball moving right in the desert",
    "a crimson feline hopping on the prairie",
    "an azure yacht descending after dark",
)


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
    """A clip before it is drawn. `relation` tells where actor 0 is as seen from actor 1 ("" for a single
    actor)."""

    actors: tuple[Actor, ...]
    background: str
    seed: int
    relation: str = ""
    camera: str = "still"

    def to_json(self) -> str:
        """-> one line of JSON that `from_json` turns back into an equal scene."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(line: str) -> "Scene":
        """One line of `to_json` -> the scene."""
        fields = json.loads(line)
        return Scene(**{**fields, "actors": tuple(Actor(**a) for a in fields["actors"])})


# --------------------------------------------------------------------------------------------------------
# Drawing scenes at random


def make_scene(which: str, seed: int, pairs: str = "train") -> Scene:
    """A random scene of set `which`, "basic" or "rich". `pairs` of kind and motion: "train" avoids those of
    `HELD_OUT_PAIRS`, "held_out" takes no others (basic only), "all" takes any."""
    rng = np.random.default_rng([seed, ("basic", "rich").index(which)])
    pick = lambda options: options[rng.integers(len(options))]  # noqa: E731
    number = 1 if which == "basic" else int(rng.choice([1, 2, 3], p=[0.2, 0.5, 0.3]))
    actors = []
    for kind in rng.permutation(KINDS)[:number]:  # kinds differ, so that "the cat" is one actor
        kind = str(kind)
        kept = dict(HELD_OUT_PAIRS)[kind]  # from training
        motion = kept if pairs == "held_out" else pick([m for m in MOTIONS if pairs == "all" or m != kept])
        colour = pick(COLOURS)
        change, count = "", 1
        if which == "rich" and rng.random() < 0.35:
            change = pick(CHANGES)
            if change == "turns":
                change += " " + pick([c for c in COLOURS if c != colour])
        elif which == "rich" and rng.random() < 0.35 and not any(a.count > 1 for a in actors):
            count = int(rng.integers(2, 4))
        actors.append(Actor(kind, colour, motion, change, count))
    relation = pick(RELATIONS) if number > 1 else ""
    camera = pick(CAMERAS[1:]) if which == "rich" and rng.random() < 0.4 else "still"
    return Scene(tuple(actors), pick(BACKGROUNDS), seed, relation, camera)


def make_scenes(which: str, count: int, seed: int = 0, pairs: str = "train") -> list[Scene]:
    """`count` scenes of set `which`, or of "both" in turn; the same arguments give the same scenes, and other
    seeds give other ones."""
    if which not in SETS:
        raise ValueError(f"no set of scenes is called {which!r}; there are {', '.join(SETS)}")
    names = SETS[which]
    return [make_scene(names[i % len(names)], seed * 10_000_000 + i, pairs) for i in range(count)]


# --------------------------------------------------------------------------------------------------------
# Captions

LOOKS = {
    "cat": "with pointed ears and a long tail", "dog": "with a floppy ear and four legs",
    "fish": "with a fan-shaped tail", "bird": "with a small beak and a raised wing",
    "car": "with two black wheels", "rocket": "with fins and a flame below",
    "boat": "with two sails", "ball": "with a white stripe",
}  # fmt: skip
SETTINGS = {
    "meadow": "green hills lie below a blue sky with a white cloud",
    "desert": "yellow dunes lie below a pale sky with a large sun",
    "night": "stars and a moon shine in a dark sky",
    "snow": "white ground lies below a grey sky, and snowflakes hang in the air",
    "city": "dark towers with lit windows stand before a pink sky",
}
SHOTS = {
    "still": "The camera does not move.", "pan left": "The camera pans to the left.",
    "pan right": "The camera pans to the right.", "zoom in": "The camera zooms in.",
    "zoom out": "The camera zooms out.",
}  # fmt: skip


def caption(scene: Scene, detail: str = "short", words: str = "train", omit: float = 0.0) -> str:
    """What the scene shows, in words chosen by its seed, always the same ones.

    `detail` is "short" (one sentence), "detailed" (30 to 100 words: looks, setting, camera) or "reworded" (of
    one actor, short, in one of `HELD_OUT_FORMS`). `words` is "train", "held_out" or "varied", which
    is "train" and more. `omit` is the chance of leaving out colour, and that of leaving out background, each:
    a training set with a few such captions teaches the model to choose for itself when a prompt is silent.
    """
    rng = np.random.default_rng([scene.seed, 1])

    def word(concept, name):
        trained, held_out, more = WORDS[concept][name]
        options = {"train": trained, "held_out": held_out, "varied": trained + more}[words]
        return options[rng.integers(len(options))]

    def noun_phrase(actor):
        noun = word("kind", actor.kind)
        colour = "" if rng.random() < omit else word("colour", actor.colour) + " "
        if actor.count == 1:
            article = "an" if (colour or noun)[0] in "aeiou" else "a"
            return f"{article} {colour}{noun}"
        plural = {"kitty": "kitties", "puppy": "puppies", "tabby": "tabbies", "doggy": "doggies"}
        plural |= {"finch": "finches"} | {n: n for n in ("trout", "salmon", "carp", "tuna")}
        plural = noun if noun.endswith("fish") else plural.get(noun, noun + "s")
        return f"{('two', 'three')[actor.count - 2]} {colour}{plural}"

    def change_phrase(actor, verb_s):
        if not actor.change:
            return ""
        verb, *colour = actor.change.split()
        verb = verb if verb_s else verb[:-1]
        return f" {verb} {word('colour', colour[0])}" if colour else f" {verb}"

    if detail == "reworded":
        (actor,) = scene.actors
        kind, colour = word("kind", actor.kind), word("colour", actor.colour)
        return HELD_OUT_FORMS[rng.integers(len(HELD_OUT_FORMS))].format(
            a=f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {kind}", kind=kind, colour=colour,
            motion=word("motion", actor.motion), place=word("background", scene.background),
        )  # fmt: skip
    place = "" if rng.random() < omit else word("background", scene.background)
    others = scene.actors[1:]
    if detail == "detailed":
        sentences = []
        for i, actor in enumerate(scene.actors):
            where = f" {scene.relation} the {scene.actors[1].kind}" if i == 0 and others else ""
            one = actor.count == 1
            look = LOOKS[actor.kind]
            sentences.append(
                f"{noun_phrase(actor)} {look} {'is' if one else 'are'} {word('motion', actor.motion)}{where}"
            )
            if actor.change:
                sentences.append(f"{'it' if one else 'each'} slowly{change_phrase(actor, True)}")
        sentences.append(
            f"the scene is {place}: {SETTINGS[scene.background]}" if place else SETTINGS[scene.background]
        )
        return " ".join(s[0].upper() + s[1:] + "." for s in sentences) + " " + SHOTS[scene.camera]
    phrases = []
    for actor in scene.actors:
        change = change_phrase(actor, actor.count == 1)
        phrases.append(
            f"{noun_phrase(actor)} {word('motion', actor.motion)}" + (f" that{change}" if change else "")
        )
    if others:
        phrases[0] = f"{phrases[0]} {scene.relation} {phrases.pop(1)}"
    text = " and ".join(phrases)
    if not place:
        return text
    return f"{text} {place}" if rng.random() < 0.7 else f"{place}, {text}"


# --------------------------------------------------------------------------------------------------------
# Data sets


@functools.lru_cache(maxsize=6)
def rendered(which, count, seed, pairs, frames, size):
    """The clips of `make_scenes(which, count, seed, pairs)`, uint8 (count, 3, frames, size, size). The runs
    of a study are of one process and draw the same ones, so the last few sets are kept."""
    scenes = make_scenes(which, count, seed, pairs)
    chunks = [scenes[i : i + 128] for i in range(0, count, 128)]
    bar = tqdm(chunks, "rendering clips", unit_scale=128, disable=count < 500)
    return torch.cat([render(chunk, frames, size) for chunk in bar])


class ToyWorld:
    """`count` clips of set `which` with captions, the same for the same seed. Captions are of one `detail`,
    or of "both", short and detailed in turn.

    Clips are kept as uint8 in memory (`cache`, 25 kB for 8 frames of 32x32), or rendered each time they are
    asked for.
    """

    def __init__(
        self, which="basic", count=16384, seed=0, frames=8, size=32, detail="short", words="train", omit=0.1,
        cache=True, pairs="train",
    ):  # fmt: skip
        self.scenes = make_scenes(which, count, seed, pairs)
        self.names, self.problems = [f"{which} {scene.seed}" for scene in self.scenes], []
        details = ("short", "detailed") if detail == "both" else (detail,)
        self.captions = [  # i // 2, since sets alternate too
            caption(scene, details[i // 2 % len(details)], words, omit) for i, scene in enumerate(self.scenes)
        ]
        self.frames, self.size = frames, size
        self.videos = rendered(which, count, seed, pairs, frames, size) if cache else None

    def __len__(self):
        return len(self.scenes)

    def batch(self, rows):
        """Row numbers -> clips (B, 3, T, H, W) float in [-1, 1], and their captions."""
        rows = [int(i) for i in rows]
        if self.videos is None:
            videos = render([self.scenes[i] for i in rows], self.frames, self.size)
        else:
            videos = self.videos[rows]
        return videos.float() / 127.5 - 1, [self.captions[i] for i in rows]


def open_clips(data, part="train", count=16384, frames=8, size=32, detail="short", words="train", **folder):
    """The clips that `--data` names, for the "train" or the "validation" `part`: `count` of the toy world, or
    of a folder at most as many, for which `folder` are more arguments. Raises ValueError or OSError in one
    line."""
    if data in SETS:
        return ToyWorld(data, count, ("train", "validation").index(part), frames, size, detail, words)
    return Folder(data, part, frames, size, detail, count=count, **folder)


def main(argv=None):
    """Write a preview of the toy world: `python data.py`; or of real clips: `python data.py --check DIR`."""
    parser = argparse.ArgumentParser(
        description="Draw a labelled preview of the toy world, as PNG and as GIF, or of a folder of clips."
    )
    parser.add_argument("--check", metavar="DIR", help="say what is in a folder of clips, and what is wrong")
    parser.add_argument("--fps", type=float, default=FPS, help=f"of --check: frames per second ({FPS})")
    parser.add_argument("--data", default="basic", choices=("basic", "rich"), help="set of scenes (basic)")
    parser.add_argument(
        "--captions", default="short", choices=("short", "detailed"), help="kind of caption (short)"
    )
    parser.add_argument("--size", type=int, default=128, help="pixels per side of a clip (128)")
    parser.add_argument("--frames", type=int, default=8, help="frames per clip (8)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (0)")
    parser.add_argument("--out", default="samples", help="folder to write into (samples)")
    args = parser.parse_args(argv)
    if args.check:
        return check(args.check, Path(args.out), args.frames, args.size, args.fps)
    if args.data == "basic":  # every kind with every motion once, held-out pairs too
        rng = np.random.default_rng(args.seed)
        scenes = []
        for motion in MOTIONS:
            for kind in KINDS:
                colour, background = rng.choice(COLOURS), rng.choice(BACKGROUNDS)
                actor = Actor(kind, str(colour), motion)
                scenes.append(Scene((actor,), str(background), args.seed * 10_000_000 + len(scenes)))
    else:
        scenes = make_scenes("rich", 32, args.seed)
    videos = render(scenes, args.frames, args.size).permute(0, 2, 3, 4, 1).numpy()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    labels = [caption(scene, args.captions) for scene in scenes]
    for end in ("png", "gif"):
        path = Path(args.out) / f"preview-{args.data}.{end}"
        save_grid(path, videos, labels)
        print(path)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:  # whatever a user can mend
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
