"""The toy world: videos whose captions are true by construction.

A text-to-video model is only as testable as its data. With clips from the internet it is an opinion whether a
video shows what the prompt says. Here it is a measurement, because the video and the caption are made from
one record, the `Scene`. Everything is procedural: there is nothing to download, and one scene can be rendered
at any size and with any number of frames.

**Scenes.** A scene has one to three actors (kind, colour, motion, perhaps a change and a count), a
background, a camera and a seed. The seed decides what the other fields do not say: the exact place and size,
and which words the caption uses.

**Two sets.** Scenes of `basic` have one actor, for the pre-training of a base model. Scenes of `rich` have
one to three actors, perhaps with relations, counts, changes and camera moves, for the training of grown
models: ModelGrow (arXiv 2412.18966, section on data) also continues with longer, more detailed captions than
those of its base. `both` alternates between the two, so that nothing is forgotten.

**Held-out.** Three fixed lists make generalization measurable:
- `HELD_OUT_PAIRS` of kind and motion never occur together in training. A cat never surfs.
- The held-out words of `WORDS` never occur in a training caption. Each concept has two trained words, two
  held-out ones (a *feline* that is *ascending*) and three more that enrich the vocabulary "varied".
- `HELD_OUT_FORMS` are sentences that no training caption is built like.

**Format.** Scenes and captions are functions of the seed, by the order in which random numbers are drawn. Any
change of this order is a new WORLD_VERSION (draw.py).

draw.py turns scenes into pixels; clips.py has the same interface for a folder of real clips. Left out:
negation, questions, several sentences about one actor's past, and languages other than English.
"""

import argparse
import functools
import shlex
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from draw import CAMERA_PATHS, Actor, Scene, render
from machine import run_command
from video import FPS, save_grid

# Each concept: (trained words), (held-out words), (more words, which only the vocabulary "varied" uses too).
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
CAMERAS = tuple(CAMERA_PATHS)
SETS = {"basic": ("basic",), "rich": ("rich",), "both": ("basic", "rich")}
CHANGES = ("turns", "grows", "shrinks")  # "turns" comes with a second colour: "turns blue"

# One per kind and one per motion: training shows both halves of every pair often, but never together.
HELD_OUT_PAIRS = (
    ("cat", "surf"), ("dog", "spin"), ("fish", "up"), ("bird", "down"),
    ("car", "bounce"), ("rocket", "left"), ("boat", "still"), ("ball", "right"),
)  # fmt: skip
HELD_OUT_FORMS = (  # sentences about one actor; {a} is its article, colour and kind
    "there is {a} {place}, and it is {motion}",
    "this is a video of {a}; {place} it is {motion}",
    "{motion} {place}: {a}",
    "what is {motion} {place}? it is {a}",
    "{kind}, {colour}, {motion}, {place}",
    "the {kind}, which is {colour}, is {motion} {place}",
    "look {place}, and you see how {a} is {motion}",
    "somebody filmed {a} that was {motion} while they were {place}",
)
PROMPTS = (  # train.py samples them with fixed noise; the last four have held-out pairs or held-out words
    "a red cat moving left in a meadow",
    "a blue rocket rising at night",
    "a yellow dog surfing in the desert",
    "a green fish spinning in the city",
    "an orange cat surfing in the snow",
    "a purple ball moving right in the desert",
    "a crimson feline hopping on the prairie",
    "an azure yacht descending after dark",
)


# --------------------------------------------------------------------------------------------------------
# Random scenes


def make_scene(which: str, seed: int, pairs: str = "train") -> Scene:
    """A random scene of set `which`, "basic" or "rich". `pairs` of kind and motion: "train" avoids
    HELD_OUT_PAIRS, "held_out" takes only them (one actor: basic only), "all" takes any."""
    rng = np.random.default_rng([seed, ("basic", "rich").index(which)])
    rich = which == "rich"
    number = int(rng.choice([1, 2, 3], p=[0.2, 0.5, 0.3])) if rich else 1
    actors = []
    for kind in rng.permutation(KINDS)[:number]:  # kinds differ, so that "the cat" is one actor
        several = any(actor.count > 1 for actor in actors)
        actors.append(random_actor(rng, str(kind), rich, several, pairs))
    relation = choose(rng, RELATIONS) if number > 1 else ""
    moves = rich and rng.random() < 0.4
    camera = choose(rng, CAMERAS[1:]) if moves else "still"
    return Scene(tuple(actors), choose(rng, BACKGROUNDS), seed, relation, camera)


def random_actor(rng, kind: str, rich: bool, several: bool, pairs: str) -> Actor:
    """An actor of `kind`. In a rich scene it may change, or there may be two or three of it, unless there are
    already `several` of another actor."""
    held_out = dict(HELD_OUT_PAIRS)[kind]
    if pairs == "held_out":
        motion = held_out
    else:
        motion = choose(rng, [m for m in MOTIONS if pairs == "all" or m != held_out])
    colour = choose(rng, COLOURS)
    change, count = "", 1
    if rich and rng.random() < 0.35:
        change = choose(rng, CHANGES)
        if change == "turns":
            change += " " + choose(rng, [c for c in COLOURS if c != colour])
    elif rich and rng.random() < 0.35 and not several:
        count = int(rng.integers(2, 4))
    return Actor(kind, colour, motion, change, count)


def choose(rng, options):
    """One of `options`, each with the same chance."""
    return options[rng.integers(len(options))]


def make_scenes(which: str, count: int, seed: int = 0, pairs: str = "train") -> list[Scene]:
    """`count` scenes of set `which`, one of SETS. The same arguments give the same scenes; another seed gives
    others, up to 10 million scenes. Raises ValueError for an unknown set."""
    if which not in SETS:
        raise ValueError(f"no set of scenes is called {which!r}; there are {', '.join(SETS)}")
    names = SETS[which]
    first = seed * 10_000_000
    return [make_scene(names[i % len(names)], first + i, pairs) for i in range(count)]


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


IRREGULAR_PLURALS = {
    "kitty": "kitties", "puppy": "puppies", "tabby": "tabbies", "doggy": "doggies", "finch": "finches",
    "trout": "trout", "salmon": "salmon", "carp": "carp", "tuna": "tuna",
}  # fmt: skip


def article(phrase: str) -> str:
    """ "an apricot cat" or "a red cat"."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def plural(noun: str) -> str:
    """The plural of a noun of WORDS."""
    if noun.endswith("fish"):
        return noun
    return IRREGULAR_PLURALS.get(noun, noun + "s")


class Words:
    """Chooses the words for a scene at random, by the scene's seed. Each call draws random numbers, so their
    order decides on the words: it is part of the format."""

    def __init__(self, scene: Scene, vocabulary: str, drop_attribute: float):
        self.rng = np.random.default_rng([scene.seed, 1])
        self.vocabulary = vocabulary
        self.drop_attribute = drop_attribute

    def word(self, concept: str, name: str) -> str:
        """A word or phrase for one of the names of WORDS[concept]."""
        trained, held_out, more = WORDS[concept][name]
        options = {"train": trained, "held_out": held_out, "varied": trained + more}
        return choose(self.rng, options[self.vocabulary])

    def word_or_nothing(self, concept: str, name: str) -> str:
        """A word, or "" with probability `drop_attribute`."""
        return "" if self.rng.random() < self.drop_attribute else self.word(concept, name)

    def noun_phrase(self, actor: Actor) -> str:
        """ "a red cat", "two red cats"; without the colour with probability `drop_attribute`."""
        noun = self.word("kind", actor.kind)
        colour = self.word_or_nothing("colour", actor.colour)
        if actor.count > 1:
            noun = plural(noun)
        phrase = f"{colour} {noun}" if colour else noun
        return article(phrase) if actor.count == 1 else f"{('two', 'three')[actor.count - 2]} {phrase}"

    def change_phrase(self, actor: Actor, singular: bool) -> str:
        """ "grows", "turns bright red"; "grow" unless it is `singular`; "" for no change."""
        if not actor.change:
            return ""
        verb, *colour = actor.change.split()
        verb = verb if singular else verb.removesuffix("s")
        return f"{verb} {self.word('colour', colour[0])}" if colour else verb


def short_caption(scene: Scene, words: Words) -> str:
    """One phrase: "a red cat moving left above two green fish spinning that grow in a meadow"."""
    place = words.word_or_nothing("background", scene.background)
    phrases = []
    for actor in scene.actors:
        change = words.change_phrase(actor, actor.count == 1)
        phrase = f"{words.noun_phrase(actor)} {words.word('motion', actor.motion)}"
        phrases.append(f"{phrase} that {change}" if change else phrase)
    if len(phrases) > 1:
        first, second, *others = phrases
        phrases = [f"{first} {scene.relation} {second}", *others]
    text = " and ".join(phrases)
    if not place:
        return text
    return f"{text} {place}" if words.rng.random() < 0.7 else f"{place}, {text}"


def detailed_caption(scene: Scene, words: Words) -> str:
    """Several sentences: motion and looks of each actor, setting, camera. 4,000 scenes of each set had 27 to
    82 words, with nothing left out."""
    place = words.word_or_nothing("background", scene.background)
    sentences = []
    for i, actor in enumerate(scene.actors):
        who = f"{words.noun_phrase(actor)} {LOOKS[actor.kind]}"
        verb = "is" if actor.count == 1 else "are"
        sentence = f"{who} {verb} {words.word('motion', actor.motion)}"
        if i == 0 and len(scene.actors) > 1:
            sentence += f" {scene.relation} the {scene.actors[1].kind}"
        sentences.append(sentence)
        if actor.change:
            pronoun = "it" if actor.count == 1 else "each"
            sentences.append(f"{pronoun} slowly {words.change_phrase(actor, True)}")
    setting = SETTINGS[scene.background]
    sentences.append(f"the scene is {place}: {setting}" if place else setting)
    capitalized = [sentence[0].upper() + sentence[1:] + "." for sentence in sentences]
    return " ".join([*capitalized, SHOTS[scene.camera]])


def reworded_caption(scene: Scene, words: Words) -> str:
    """One of HELD_OUT_FORMS. It leaves nothing out. Raises ValueError for a scene of several actors."""
    (actor,) = scene.actors
    kind = words.word("kind", actor.kind)
    colour = words.word("colour", actor.colour)
    form = choose(words.rng, HELD_OUT_FORMS)
    motion = words.word("motion", actor.motion)
    place = words.word("background", scene.background)
    return form.format(a=article(f"{colour} {kind}"), kind=kind, colour=colour, motion=motion, place=place)


CAPTION_STYLES = {"short": short_caption, "detailed": detailed_caption, "reworded": reworded_caption}


def caption(scene: Scene, style="short", vocabulary="train", drop_attribute: float = 0.0) -> str:
    """What the scene shows, in words chosen by its seed: the same arguments give the same caption.

    `style` is one of CAPTION_STYLES; "reworded" is for scenes of one actor. `vocabulary` is "train",
    "held_out" or "varied", which is "train" and three more words per concept. `drop_attribute` is the
    probability of leaving out the colour of an actor, and also that of leaving out the background. From a few
    such captions a model learns to choose for itself when a prompt does not say.
    """
    return CAPTION_STYLES[style](scene, Words(scene, vocabulary, drop_attribute))


def captions_of(scenes, style="short", vocabulary="train", drop_attribute: float = 0.0) -> list[str]:
    """The caption of each scene. Style "both" alternates between short and detailed."""
    styles = ("short", "detailed") if style == "both" else (style,)
    captions = []
    for i, scene in enumerate(scenes):
        turn = i // 2 % len(styles)  # // 2, because scenes of the set "both" alternate too
        captions.append(caption(scene, styles[turn], vocabulary, drop_attribute))
    return captions


# --------------------------------------------------------------------------------------------------------
# The data set


@functools.lru_cache(maxsize=6)
def rendered(which, count, seed, frames, size, device):
    """The scenes of `make_scenes(which, count, seed)`, and their clips as uint8 (count, 3, T, H, W) on
    `device`, a name. The runs of a study are in one process and use the same ones, so the last few sets are
    kept. They are shared, so they must not be changed."""
    scenes = make_scenes(which, count, seed)
    # 128 clips of 8 frames of 32x32 at once fit a CPU's caches. A GPU takes more, since it has large kernels.
    pixels = 2**20 if device == "cpu" else 2**24
    step = max(1, pixels // (frames * size * size))
    videos = torch.empty(count, 3, frames, size, size, dtype=torch.uint8, device=device)
    with tqdm(total=count, desc="rendering clips", disable=count < 500) as bar:
        for start in range(0, count, step):
            chunk = scenes[start : start + step]
            videos[start : start + step] = render(chunk, frames, size, device)
            bar.update(len(chunk))
    return scenes, videos


class ToyDataset:
    """`count` clips of set `which` with captions, the same for the same seed. Seed 0 is for training, seed 1
    for validation.

    caption_style, vocabulary, drop_attribute: as for `captions_of`.

    scenes    list of N scenes
    videos    uint8 (N, 3, T, H, W) on `device`, 25 kB a clip of 8 frames of 32x32
    captions  list of N texts
    names     list of N names of clips, for messages
    problems  what could not be read, and why: nothing
    notes     what a user may not have meant: nothing
    """

    def __init__(
        self, which="basic", count=16384, seed=0, frames=8, size=32, caption_style="short",
        vocabulary="train", drop_attribute=0.1, device="cpu",
    ):  # fmt: skip
        device = str(torch.device(device))
        self.scenes, self.videos = rendered(which, count, seed, frames, size, device)
        self.captions = captions_of(self.scenes, caption_style, vocabulary, drop_attribute)
        self.names = [f"{which} {scene.seed}" for scene in self.scenes]
        self.problems, self.notes = [], []

    def __len__(self):
        return len(self.captions)

    def batch(self, rows) -> torch.Tensor:
        """Row numbers, a list or a LongTensor -> clips (B, 3, T, H, W), float32 in [-1, 1] on `device`."""
        return self.videos[torch.as_tensor(rows, device=self.videos.device)].float() / 127.5 - 1


# --------------------------------------------------------------------------------------------------------
# The command


def preview_scenes(which: str, seed: int) -> list[Scene]:
    """Scenes for a preview: of "basic" every kind with every motion, held-out pairs too; else 32 scenes."""
    if which != "basic":
        return make_scenes(which, 32, seed)
    rng = np.random.default_rng(seed)
    scenes = []
    for motion in MOTIONS:
        for kind in KINDS:
            actor = Actor(kind, str(rng.choice(COLOURS)), motion)
            background = str(rng.choice(BACKGROUNDS))
            scenes.append(Scene((actor,), background, seed * 10_000_000 + len(scenes)))
    return scenes


def options_of_training(args, parser) -> list[str]:
    """What a user has told --check and must tell train.py too."""
    options = []
    for name in ("captions", "frames", "size", "fps"):
        if getattr(args, name) != parser.get_default(name):
            options.append(f"--{name} {getattr(args, name)}")
    return options


def main(argv=None):
    """Write a preview of the toy world: `python data.py`; or of real clips: `python data.py --check DIR`."""
    parser = argparse.ArgumentParser(
        description="Draw a labelled preview of the toy world, as PNG and as GIF, or of a folder of clips."
    )
    add = parser.add_argument
    add("--check", metavar="DIR", help="say what is in a folder of clips, and what is wrong")
    add("--fps", type=float, default=FPS, help=f"frames per second ({FPS}); a folder's clips are resampled")
    add("--data", default="basic", choices=("basic", "rich"), help="set of scenes (basic)")
    add("--captions", choices=("short", "detailed"), help="style of the captions (short; --check: detailed)")
    add("--size", type=int, help="pixels per side of a clip (128; --check: 32, as in training)")
    add("--frames", type=int, default=8, help="frames per clip (8)")
    add("--seed", type=int, default=0, help="another seed draws other scenes (0)")
    add("--out", default="samples", help="folder to write into (samples)")
    args = parser.parse_args(argv)
    if not 0.01 <= args.fps <= 1000:
        raise ValueError(f"--fps is {args.fps}; it must be from 0.01 to 1000")
    size = args.size
    if size is None:
        size = 32 if args.check else 128
    if args.check:
        from clips import check

        check(args.check, Path(args.out), args.frames, size, args.fps, args.captions or "detailed")
        print(f"next: python train.py --data {shlex.quote(args.check)}", *options_of_training(args, parser))
        return
    scenes = preview_scenes(args.data, args.seed)
    videos = render(scenes, args.frames, size).permute(0, 2, 3, 4, 1).numpy()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    labels = captions_of(scenes, args.captions or "short")
    for end in ("png", "gif"):
        path = Path(args.out) / f"preview-{args.data}.{end}"
        save_grid(path, videos, labels, fps=args.fps)
        print(path)


if __name__ == "__main__":
    run_command(main)
