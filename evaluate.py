"""Does the video show what the prompt says? A measurement, not an opinion.

The toy world knows the truth of every clip it draws, so a small network can be trained to read it back: the
*reader*. It plays the part that detectors and multimodal LLMs play in VBench and T2V-CompBench, with the
difference that its error is known: before it may judge a model it must read at least 98 % of every attribute
of held-out true clips right, and fall to chance when captions are shuffled. Both are printed with every
evaluation.

**How it reads.** Frames are stacked as channels, so that motion is visible to the first convolution. For each
of the eight kinds a map says where in the picture that kind is; its softmax gathers the features there; from
those come presence, colour, motion and place. Background is read from the average of the whole picture.
Reading kind by kind keeps "a red cat and a blue dog" apart from "a blue cat and a red dog".

**What it is trained on.** True renders of both sets, spoilt as models spoil them: blurred, noisy, blended
between frames, off in colour, uneven from patch to patch. A reader that saw only clean clips would judge the
artefacts.

**What is scored.** Clips for new scenes in the words of training, for held-out pairs (a cat never surfed),
held-out words (a *feline*), held-out forms of a sentence, and for several actors, in a sentence or in long
prompts: the share of clips with the right subject, colour, motion and background, and with all right; and
the validation loss on fixed noise.
"""

import argparse
import hashlib
import inspect
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import data
import draw
from checkpoint import find_checkpoint, load_model
from data import BACKGROUNDS, COLOURS, KINDS, MOTIONS, ToyWorld, caption, make_scenes
from draw import places, render
from sample import GUIDANCE, STEPS, autocast, newest_checkpoint, pick_device, pick_precision, solve
from text_encoder import NULL_PROMPT, Prompts, cache_dir
from train import validation_loss

ATTRIBUTES = ("subject", "colour", "motion", "background")
FRAMES, SIZE = 8, 32  # what the reader sees; other clips are resampled to it
NEAR = 0.2  # a place counts as right within this distance; the picture is 2 wide and high


class Reader(nn.Module):
    """Reads the attributes of every kind of actor, and the background, from a clip."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3 * FRAMES
        for out, stride in ((48, 1), (96, 2), (128, 1), (192, 2), (192, 1)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.trunk = nn.Sequential(*layers)  # 32x32 -> 8x8
        self.where = nn.Conv2d(channels, len(KINDS), 1)
        self.background = nn.Linear(channels, len(BACKGROUNDS))
        self.kind = nn.Parameter(torch.randn(len(KINDS), channels) * 0.02)
        self.sizes = (1, len(COLOURS), len(MOTIONS), 2)
        self.what = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, sum(self.sizes))
        )

    def forward(self, video):
        """video (B, 3, T, H, W) in [-1, 1] -> dict of presence (B, 8), colour (B, 8, 6) and motion (B, 8, 8)
        logits, place (B, 8, 2) as x, y in [-1, 1], each for the 8 kinds, and background (B, 5) logits."""
        if video.shape[2:] != (FRAMES, SIZE, SIZE):
            video = F.interpolate(video, (FRAMES, SIZE, SIZE), mode="trilinear")
        h = self.trunk(video.flatten(1, 2))  # (B, C, 8, 8)
        weights = self.where(h).flatten(2).softmax(-1)  # (B, kinds, 64)
        found = weights @ h.flatten(2).transpose(1, 2) + self.kind  # (B, kinds, C)
        presence, colour, motion, offset = self.what(found).split(self.sizes, -1)
        axis = torch.linspace(-0.875, 0.875, h.shape[-1])
        centres = (
            torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1).to(h)
        )  # (64, 2): x, y
        return {
            "presence": presence.squeeze(-1),
            "colour": colour,
            "motion": motion,
            "place": weights @ centres + offset,
            "background": self.background(h.mean((2, 3))),
        }


def truth(scenes):
    """Scenes -> what the reader should say: presence (B, 8) float, colour and motion (B, 8) class numbers
    with -100 where there is none (or, for a colour, where it changes), place (B, 8, 2), the mean over the
    clip, and background (B,)."""
    B, K = len(scenes), len(KINDS)
    presence, place = torch.zeros(B, K), torch.zeros(B, K, 2)
    colour, motion = torch.full((B, K), -100), torch.full((B, K), -100)
    for i, scene in enumerate(scenes):
        for actor in scene.actors:
            k = KINDS.index(actor.kind)
            presence[i, k] = 1
            motion[i, k] = MOTIONS.index(actor.motion)
            if not actor.change.startswith("turns"):
                colour[i, k] = COLOURS.index(actor.colour)
        for kind, (x, y) in places(scene, FRAMES).items():
            place[i, KINDS.index(kind)] = torch.tensor([x, y])
    background = torch.tensor([BACKGROUNDS.index(s.background) for s in scenes])
    return {
        "presence": presence,
        "colour": colour,
        "motion": motion,
        "place": place,
        "background": background,
    }


def spoil(video, generator):
    """Clean clips (B, 3, T, H, W) in [-1, 1] -> the same with the faults of generated ones, each to a random
    degree."""
    B, _, T, H, W = video.shape

    def strength(most):  # mostly mild
        return torch.rand(B, 1, 1, 1, 1, generator=generator) ** 2 * most

    def noise(*shape):
        return torch.randn(B, *shape, generator=generator)

    small = F.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    video = torch.lerp(video, small, strength(1.0))  # blur
    video = torch.lerp(video, video.roll(1, 2), strength(0.4))  # ghosts of the frame before
    video = video + strength(0.15) * noise(3, 1, 1, 1)  # colour
    patches = F.interpolate(noise(3, T // 2, H // 4, W // 4), (T, H, W))  # each patch off by its own colour
    video = video + strength(0.3) * patches
    return video + strength(0.4) * noise(3, T, H, W)


def reader_loss(said, true):
    """Sum of the losses of all attributes; those of absent actors do not count."""
    there = true["presence"].bool()
    return (
        F.binary_cross_entropy_with_logits(said["presence"], true["presence"]) * 10
        + F.cross_entropy(said["colour"].transpose(1, 2), true["colour"])
        + F.cross_entropy(said["motion"].transpose(1, 2), true["motion"])
        + F.cross_entropy(said["background"], true["background"])
        + (said["place"] - true["place"])[there].abs().mean() * 4
    )


def train_reader(steps=2000, batch=64, clips=16384, seed=0):
    """Train a reader on `clips` clips, half of them basic -> Reader in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = Reader().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    worlds = [ToyWorld(which, clips // 2, seed=900) for which in ("basic", "rich")]
    truths = [truth(world.scenes) for world in worlds]
    optimiser = torch.optim.AdamW(reader.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps, pct_start=0.2)
    for _ in tqdm(range(steps), "training the reader"):
        videos, labels = [], []
        for world, true in zip(worlds, truths, strict=True):
            rows = torch.randint(len(world), (batch * len(world) // clips,), generator=generator)
            videos.append(world.batch(rows)[0])
            labels.append({k: v[rows] for k, v in true.items()})
        video = spoil(torch.cat(videos), generator)
        true = {k: torch.cat([label[k] for label in labels]) for k in labels[0]}
        with autocast(video.device, pick_precision("auto", video.device)):
            said = reader(video)
        loss = reader_loss({k: v.float() for k, v in said.items()}, true)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return reader.eval()


READER_CODE = [  # a reader is as good as the code that made it
    inspect.getsource(thing) for thing in (draw, data, Reader, truth, spoil, reader_loss, train_reader)
]


def get_reader(**training) -> Reader:
    """The reader of this version of the world, trained once and then taken from the cache. Raises ValueError
    if it does not read true clips well enough to judge others (see `prove`)."""
    key = hashlib.sha256(json.dumps([READER_CODE, training]).encode()).hexdigest()[:32]
    path = cache_dir() / f"reader-{key}.safetensors"
    reader = Reader().eval()
    try:
        reader.load_state_dict(load_file(path))
        return reader
    except (OSError, SafetensorError, RuntimeError):  # not there yet, or cut off
        reader = train_reader(**training)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        pass
    save_file({k: v.contiguous() for k, v in reader.state_dict().items()}, file.name)
    os.replace(file.name, path)
    return reader


# --------------------------------------------------------------------------------------------------------
# Scores


@torch.no_grad()
def score(reader, videos, scenes) -> dict[str, float]:
    """The shares of clips that show what their scenes of one actor ask for. videos (B, 3, T, H, W) in [-1, 1]
    -> {"subject", "colour", "motion", "background", "all", "place"}. The subject is the kind that the reader
    is surest of; colour, motion and place are what it reads off that one, whether or not it is the right
    kind. "all" does not count place, which captions of one actor do not tell."""
    said = {k: torch.cat(v) for k, v in _read(reader, videos).items()}
    true = truth(scenes)
    rows = torch.arange(len(scenes))
    kind = said["presence"].argmax(1)  # (B,)
    wanted = true["presence"].argmax(1)
    right = {
        "subject": kind == wanted,
        "colour": said["colour"][rows, kind].argmax(-1) == true["colour"][rows, wanted],
        "motion": said["motion"][rows, kind].argmax(-1) == true["motion"][rows, wanted],
        "background": said["background"].argmax(-1) == true["background"],
    }
    right["all"] = torch.stack([right[name] for name in ATTRIBUTES]).all(0)
    right["place"] = (said["place"][rows, kind] - true["place"][rows, wanted]).norm(dim=-1) < NEAR
    return {name: value.float().mean().item() for name, value in right.items()}


@torch.no_grad()
def score_several(reader, videos, scenes) -> dict[str, float]:
    """The same for scenes of several actors. The subjects are the kinds that the reader is surest of, as many
    as were asked for. "subject", "colour" and "motion" are shares of the actors asked for: those found, and
    those found in the right colour (if theirs does not change) or motion; counts and changes are not read;
    "relation" and "background" are shares of clips, of actor 0 found on its side of actor 1; "all" asks for
    all of these at once. These are what T2V-CompBench (arXiv 2407.14505) calls attribute binding, motion
    binding and spatial relationships."""
    said, true = {k: torch.cat(v) for k, v in _read(reader, videos).items()}, truth(scenes)
    asked = true["presence"].bool()  # (B, kinds)
    place_in_order = said["presence"].argsort(1, descending=True).argsort(1)
    found = asked & (place_in_order < asked.sum(1, keepdim=True))
    right = {"subject": found}
    right |= {k: found & (said[k].argmax(-1) == true[k]) for k in ("colour", "motion")}
    counts = {"subject": asked, "colour": true["colour"] >= 0, "motion": asked}
    relation = []
    for i, scene in enumerate(scenes):
        a, b = (KINDS.index(actor.kind) for actor in scene.actors[:2])
        x, y = (said["place"][i, a] - said["place"][i, b]).tolist()
        side = {"left of": x < 0, "right of": x > 0, "above": y < 0, "below": y > 0}[scene.relation]
        relation.append(side and bool(found[i, a] and found[i, b]))
    whole = {
        "relation": torch.tensor(relation),
        "background": said["background"].argmax(-1) == true["background"],
    }
    everything = [*whole.values(), *((right[k] | ~counts[k]).all(1) for k in right)]
    scores = {k: right[k][counts[k]].float().mean().item() for k in right}
    scores |= {k: v.float().mean().item() for k, v in whole.items()}
    return scores | {"all": torch.stack(everything).all(0).float().mean().item()}


def _read(reader, videos):
    """The reader over chunks of clips -> dict of lists of tensors."""
    parts = [reader(chunk.float()) for chunk in videos.split(128)]
    return {key: [part[key] for part in parts] for key in parts[0]}


def prove(reader, count=1024) -> dict[str, dict[str, float]]:
    """What the reader is worth: its scores on true renders it never saw, and on the same with the scenes
    shuffled, where an honest reader is at chance; and on true clips of the long prompts, which are harder.
    Raises ValueError below 0.98 in any attribute of one actor: it must not judge others."""
    world = ToyWorld("basic", count, seed=901)
    videos = world.batch(range(count))[0]
    generator = torch.Generator().manual_seed(0)
    shuffled = [world.scenes[i] for i in torch.randperm(count, generator=generator)]
    scenes, _ = prompt_sets(count)["long"]
    several = torch.cat([render(scenes[i : i + 128], FRAMES, SIZE) for i in range(0, count, 128)])
    proof = {
        "true clips": score(reader, videos, world.scenes),
        "shuffled captions": score(reader, videos, shuffled),
        "true clips of several actors": score_several(reader, several / 127.5 - 1, scenes),
    }
    worst = min((*ATTRIBUTES, "place"), key=proof["true clips"].get)
    if (share := proof["true clips"][worst]) < 0.98:
        raise ValueError(f"the reader cannot be trusted: {worst} is right on {share:.3f} of true clips only")
    return proof


def prompt_sets(count) -> dict[str, tuple[list, list[str]]]:
    """The test prompts, always the same: name -> (scenes, captions). Scenes are new in each, colour and
    background are always named. Two sets are of two or three actors, one of whom changes or comes in
    several, before a camera that is still (in eight frames a pan looks like motion): in one sentence, and in
    long prompts, detailed captions."""
    seen, pairs, words, forms = (make_scenes("basic", count, seed, seed == 903) for seed in range(902, 906))
    several = [s for s in make_scenes("rich", 4 * count + 40, 906) if s.relation and s.camera == "still"]
    several = [s for s in several if any(a.change or a.count > 1 for a in s.actors)][:count]
    return {
        "seen": (seen, [caption(s) for s in seen]),
        "held-out pairs": (pairs, [caption(s) for s in pairs]),
        "held-out words": (words, [caption(s, words="held_out") for s in words]),
        "held-out forms": (forms, [caption(s, "reworded") for s in forms]),
        "several actors": (several, [caption(s) for s in several]),
        "long": (several, [caption(s, "detailed") for s in several]),
    }


def evaluate(
    checkpoint, reader, count=200, steps=STEPS, guidance=GUIDANCE, device="auto", seed=0, read=Prompts
) -> dict:
    """Sample `count` clips of each prompt set and read them -> {set: scores}, and under "val_loss" the loss
    by t. `read` is how prompts become features."""
    device = pick_device(device)
    precision = pick_precision("auto", device)
    model, header = load_model(checkpoint)
    model.to(device)
    sets = prompt_sets(count)
    held_out = ToyWorld("basic", 256, 1, model.config.frames, model.config.size)
    prompts = read(
        [*held_out.captions, *(c for _, captions in sets.values() for c in captions)],
        header,
        model.config.llm_dim,
    )
    scores = {}
    for name, (scenes, captions) in sets.items():
        shape = (count, 3, model.config.frames, model.config.size, model.config.size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        clips = []
        for rows in tqdm(torch.arange(count).split(50), f"sampling {name}"):
            prompt = prompts.batch([captions[i] for i in rows])
            prompt, null = ([v.to(device) for v in p] for p in (prompt, prompts.batch([NULL_PROMPT])))
            with autocast(device, precision):
                clips.append(solve(model, noise[rows].to(device), prompt, null, steps, guidance).cpu())
        scores[name] = (score_several if scenes[0].relation else score)(reader, torch.cat(clips), scenes)
    scores["val_loss"] = validation_loss(model, held_out, prompts, precision).tolist()
    return scores


def table(rows: dict[str, dict[str, float]]) -> str:
    """{row: {column: share}} -> a table in Markdown."""
    columns = [*ATTRIBUTES, "relation", "all"]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{row[c]:.3f}" if c in row else "" for c in columns) + " |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def main(argv=None):
    """Score a checkpoint: `python evaluate.py runs/base`."""
    parser = argparse.ArgumentParser(
        description="Read generated clips and say how often they show what was asked for."
    )
    parser.add_argument("checkpoint", nargs="?", help="run or checkpoint; the newest run, else pretrained/")
    parser.add_argument("--count", type=int, default=200, help="prompts per set (200)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of the solver ({STEPS})")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help=f"1 is none ({GUIDANCE:g})")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    parser.add_argument(
        "--out", help="file for the scores as JSON; evaluation.json beside the checkpoint directory"
    )
    args = parser.parse_args(argv)
    if args.count < 1 or args.steps < 1:
        raise ValueError("--count and --steps must be at least 1")
    checkpoint = find_checkpoint(args.checkpoint) if args.checkpoint else newest_checkpoint()
    reader = get_reader()
    proof = prove(reader)
    print("The reader itself:\n" + table(proof))
    scores = evaluate(checkpoint, reader, args.count, args.steps, args.guidance, args.device, args.seed)
    val_loss = scores["val_loss"]
    print(f"\n{checkpoint} ({args.count} prompts per set, guidance {args.guidance:g}, {args.steps} steps):")
    print(table({name: s for name, s in scores.items() if name != "val_loss"}))
    print(
        f"validation loss {sum(val_loss) / len(val_loss):.4f}; by t: {' '.join(f'{v:.3f}' for v in val_loss)}"
    )
    out = Path(args.out) if args.out else checkpoint.parent / "evaluation.json"
    out.write_text(json.dumps({"arguments": vars(args), "reader": proof, "scores": scores}, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # whatever a user can mend
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
