"""A network that reads videos back: which actors, in which colour, doing what, where.

The toy world knows the truth of every clip it draws, so a small network can be trained to tell it again: the
*reader*. It plays the part that detectors, trackers and multimodal LLMs play in VBench (arXiv 2311.17982) and
T2V-CompBench (arXiv 2407.14505), with the difference that its error is known: evaluate.py lets it judge only
after it has read nearly every attribute of true clips right that it never saw.

**How it reads.** Frames are stacked as channels, so that motion is visible to the first convolution. For each
of the eight kinds a map says where in the picture that kind is; its softmax gathers the features there; from
those come presence, colour, motion, change of size, count and place. Background is read from the average of
the whole picture. Reading kind by kind keeps "a red cat and a blue dog" apart from "a blue cat and a red
dog". Whether a colour changes is read from the first and the last frame, each as a clip of its own.

**What it is trained on.** True renders of both sets, with all pairs of kind and motion: those that models
never see are to be judged too, and a reader that had not seen them either took half of them for others. They
are spoilt as models spoil them: blurred, noisy, blended between frames, off in colour, uneven from patch to
patch. A reader that saw only clean clips would judge the artefacts.

**One judge for all.** Training it takes minutes, and two machines do not get the same weights to the bit. So
pretrained/ has one that judges for everybody; its name says which code made it. Where that code, or the
world, was changed, a reader is trained anew and kept in the cache; `python reader.py` puts one in the other's
place.
"""

import hashlib
import inspect
import json
import os
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
from data import BACKGROUNDS, COLOURS, KINDS, MOTIONS, ToyWorld
from draw import places
from sample import autocast, pick_precision
from text_encoder import cache_dir

FRAMES, SIZE = 8, 32  # what the reader sees; other clips are resampled to it
SIZES = ("", "grows", "shrinks")  # changes of size
MOST = 3  # equal actors


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
        self.sizes = (1, len(COLOURS), len(MOTIONS), len(SIZES), MOST, 2)
        self.what = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, sum(self.sizes))
        )

    def features(self, video):
        """video (B, 3, T, H, W) in [-1, 1] -> what is found at each of the 8 kinds (B, 8, C), its place
        (B, 8, 2) as x, y in [-1, 1], and the average of the picture (B, C)."""
        if video.shape[2:] != (FRAMES, SIZE, SIZE):
            video = F.interpolate(video, (FRAMES, SIZE, SIZE), mode="trilinear")
        h = self.trunk(video.flatten(1, 2)).flatten(2)  # (B, C, 64)
        weights = self.where(h.unflatten(2, (8, 8))).flatten(2).softmax(-1)  # (B, kinds, 64)
        axis = torch.linspace(-0.875, 0.875, 8, device=h.device)
        centres = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)  # (64, 2): x, y
        return weights @ h.transpose(1, 2), weights @ centres.to(h), h.mean(2)

    def forward(self, video):
        """video (B, 3, T, H, W) in [-1, 1] -> dict of logits for each of the 8 kinds: presence (B, 8), colour
        (B, 8, 6), motion (B, 8, 8), change of size (B, 8, 3), count (B, 8, 3) from one; its place (B, 8, 2)
        as x, y in [-1, 1]; and background (B, 5) logits."""
        found, place, whole = self.features(video)
        parts = self.what(found + self.kind).split(self.sizes, -1)
        presence, colour, motion, size, count, offset = parts
        return {
            "presence": presence.squeeze(-1),
            "colour": colour,
            "motion": motion,
            "size": size,
            "count": count,
            "place": place + offset,
            "background": self.background(whole),
        }

    def ends(self, video):
        """-> colour logits (B, 8, 2, 6) of each kind in the first and in the last frame, each shown as a clip
        in which nothing moves."""
        still = (video[:, :, i].unsqueeze(2).expand(-1, -1, FRAMES, -1, -1) for i in (0, -1))
        return torch.stack([self(clip)["colour"] for clip in still], 2)


def truth(scenes):
    """Scenes -> what the reader should say: presence (B, 8) float; colour at the beginning and at the end (B,
    8, 2), motion, change of size and count less one (B, 8), class numbers with -100 where there is no such
    actor; place (B, 8, 2), the mean over the clip; and background (B,)."""
    B, K = len(scenes), len(KINDS)
    presence, place = torch.zeros(B, K), torch.zeros(B, K, 2)
    colour = torch.full((B, K, 2), -100)
    motion, size, count = (torch.full((B, K), -100) for _ in range(3))
    for i, scene in enumerate(scenes):
        for actor in scene.actors:
            k = KINDS.index(actor.kind)
            turns = actor.change.startswith("turns")
            last = actor.change.split()[1] if turns else actor.colour
            presence[i, k] = 1
            colour[i, k] = torch.tensor([COLOURS.index(actor.colour), COLOURS.index(last)])
            motion[i, k] = MOTIONS.index(actor.motion)
            size[i, k] = SIZES.index("" if turns else actor.change)
            count[i, k] = actor.count - 1
        for kind, (x, y) in places(scene, FRAMES).items():
            place[i, KINDS.index(kind)] = torch.tensor([x, y])
    background = torch.tensor([BACKGROUNDS.index(s.background) for s in scenes])
    return {
        "presence": presence,
        "colour": colour,
        "motion": motion,
        "size": size,
        "count": count,
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
    """Sum of the losses of all attributes; those of absent actors, and colours that change, do not count.
    Few actors grow or shrink: without a weight nearly all are read as neither."""
    there = true["presence"].bool()
    loss = F.binary_cross_entropy_with_logits(said["presence"], true["presence"]) * 10
    loss = loss + (said["place"] - true["place"])[there].abs().mean() * 4
    first, last = true["colour"].unbind(-1)
    true = true | {"colour": torch.where(first == last, first, -100)}
    for name in ("colour", "motion", "size", "count", "background"):
        weight = torch.tensor([1.0, 4.0, 4.0]) if name == "size" else None
        loss = loss + F.cross_entropy(said[name].flatten(0, -2), true[name].flatten(), weight)
    return loss


def train_reader(steps=3000, batch=64, clips=16384, seed=0):
    """Train a reader on `clips` clips, half of them basic -> Reader in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = Reader().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    worlds = [ToyWorld(which, clips // 2, seed=900, pairs="all") for which in ("basic", "rich")]
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


SHIPPED = Path(__file__).with_name("pretrained")
READER_CODE = [  # a reader is as good as the code that made it
    inspect.getsource(thing) for thing in (draw, data, Reader, truth, spoil, reader_loss, train_reader)
]


def get_reader(folder=None, **training) -> Reader:
    """The reader of this version of the world: the one that came with it, or one that is trained once, put in
    `folder`, by default the cache, and then taken from there. `training` goes to `train_reader`."""
    folder = folder or cache_dir()
    key = hashlib.sha256(json.dumps([READER_CODE, training]).encode()).hexdigest()[:32]
    name, reader = f"reader-{key}.safetensors", Reader().eval()
    for place in (SHIPPED, folder):
        try:
            reader.load_state_dict(load_file(place / name))
            return reader
        except (OSError, SafetensorError, RuntimeError):  # not there, or cut off
            pass
    reader = train_reader(**training)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
        pass
    save_file({k: v.contiguous() for k, v in reader.state_dict().items()}, file.name)
    os.replace(file.name, folder / name)
    return reader


if __name__ == "__main__":  # where the world was changed: train another one to take the old one's place
    SHIPPED.mkdir(exist_ok=True)
    there = set(SHIPPED.glob("reader-*"))
    get_reader(SHIPPED)
    if set(SHIPPED.glob("reader-*")) != there:
        for old in there:
            old.unlink()
