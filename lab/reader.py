"""The judge: a network that reads from a clip which actors are in it, in which colour, doing what, and where.

The labels of every clip of the toy world are known, so a small network can be trained to recover them: the
*reader*. It takes the place of the detectors, trackers and multimodal LLMs of VBench (arXiv 2311.17982) and
T2V-CompBench (arXiv 2407.14505). Unlike theirs, its error is known: lab/evaluate.py requires 98 % for each
attribute of held-out true clips of one actor, and reports what it reads of several actors.

**Network.** The frames are stacked as channels, so the first convolution already sees motion. For each of the
eight kinds of actor a map says where in the picture that kind is, and its softmax pools the features there.
From them come presence, colour, motion, change of size, count and place. The background is read from the
average over the picture. Reading kind by kind separates "a red cat and a blue dog" from "a blue cat and a red
dog". A change of colour is read from the first and the last frame, each shown as a clip that stands still.

**Training data.** True clips of both sets, with all pairs of kind and motion, also those that are held out
from the models: an earlier reader that had never seen them recognized only 54 % of true clips of these pairs
(docs/scores.md). The clips are corrupted as models corrupt them: blurred, noisy, blended between frames, off
in colour, uneven from patch to patch. A reader that saw only clean clips would judge the artifacts.

**One judge for all.** Training takes minutes, and two machines do not get the same weights to the bit. So one
reader is shipped, pretrained/reader-VERSION.safetensors. If you change the network, its training or the
pixels of the world, raise READER_VERSION and run `python -m lab.reader`, which trains that version.

Left out: other resolutions (clips are resampled to 8 frames of 32x32), two kinds with the same name in one
clip, and confidence: the reader always answers.
"""

import argparse
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from data import BACKGROUNDS, COLOURS, KINDS, MOTIONS, make_scenes
from draw import places, render
from machine import autocast, pick_device, pick_precision, run_command, save_tensors

READER_VERSION = 1
SHIPPED = Path(__file__).resolve().parents[1] / "pretrained" / f"reader-{READER_VERSION}.safetensors"

FRAMES, SIZE = 8, 32  # what the reader sees; other clips are resampled
GRID = 8  # side of the feature map
SIZES = ("", "grows", "shrinks")  # changes of size
MAX_COUNT = 3  # equal actors
IGNORED = -100  # the label that cross entropy leaves out


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
        self.sizes = (1, len(COLOURS), len(MOTIONS), len(SIZES), MAX_COUNT, 2)
        self.what = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, sum(self.sizes))
        )

    def features(self, video):
        """video (B, 3, T, H, W) in [-1, 1] -> the features pooled for each of the 8 kinds (B, 8, C), its
        place (B, 8, 2) as x, y in [-1, 1], and the average over the picture (B, C)."""
        if video.shape[2:] != (FRAMES, SIZE, SIZE):
            video = F.interpolate(video, (FRAMES, SIZE, SIZE), mode="trilinear")
        h = self.trunk(video.flatten(1, 2))  # (B, C, 8, 8)
        weights = self.where(h).flatten(2).softmax(-1)  # (B, kinds, 64)
        h = h.flatten(2)  # (B, C, 64)
        axis = torch.linspace(-1 + 1 / GRID, 1 - 1 / GRID, GRID, device=h.device)
        x, y = torch.meshgrid(axis, axis, indexing="xy")
        centers = torch.stack([x, y], -1).flatten(0, 1).to(h)  # (64, 2)
        return weights @ h.transpose(1, 2), weights @ centers, h.mean(2)

    def forward(self, video):
        """video (B, 3, T, H, W) in [-1, 1] -> dict of logits for each of the 8 kinds: presence (B, 8), colour
        (B, 8, 6), motion (B, 8, 8), change of size (B, 8, 3), count from one (B, 8, 3); its place (B, 8, 2)
        as x, y in [-1, 1]; and logits of the background (B, 5)."""
        pooled, place, picture = self.features(video)
        parts = self.what(pooled + self.kind).split(self.sizes, -1)
        presence, colour, motion, size, count, offset = parts
        return {
            "presence": presence.squeeze(-1),
            "colour": colour,
            "motion": motion,
            "size": size,
            "count": count,
            "place": place + offset,
            "background": self.background(picture),
        }

    def first_last_colour(self, video):
        """-> logits (B, 8, 2, 6) of the colour of each kind in the first and in the last frame, each shown as
        a clip that stands still."""
        logits = []
        for frame in (video[:, :, :1], video[:, :, -1:]):
            logits.append(self(frame.expand(-1, -1, FRAMES, -1, -1))["colour"])
        return torch.stack(logits, 2)


def labels(scenes, device="cpu"):
    """Scenes -> what the reader should answer: presence (B, 8) float; colour in the first and the last frame
    (B, 8, 2), motion, change of size and count less one (B, 8), as class numbers, IGNORED where there is no
    such actor; place (B, 8, 2), the mean over the clip; and background (B,)."""
    B, K = len(scenes), len(KINDS)
    target = {"presence": torch.zeros(B, K), "colour": torch.full((B, K, 2), IGNORED)}
    for name in ("motion", "size", "count"):
        target[name] = torch.full((B, K), IGNORED)
    target["place"] = torch.zeros(B, K, 2)
    target["background"] = torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
    for i, scene in enumerate(scenes):
        for actor in scene.actors:
            k = KINDS.index(actor.kind)
            turns = actor.change.startswith("turns")
            last_colour = actor.change.split()[1] if turns else actor.colour
            target["presence"][i, k] = 1
            target["colour"][i, k, 0] = COLOURS.index(actor.colour)
            target["colour"][i, k, 1] = COLOURS.index(last_colour)
            target["motion"][i, k] = MOTIONS.index(actor.motion)
            target["size"][i, k] = SIZES.index("" if turns else actor.change)
            target["count"][i, k] = actor.count - 1
        for kind, place in places(scene, FRAMES).items():
            target["place"][i, KINDS.index(kind)] = torch.tensor(place)
    return {name: value.to(device) for name, value in target.items()}


def render_clips(scenes, device="cpu"):
    """Scenes -> clips uint8 (B, 3, 8, 32, 32), drawn chunk by chunk."""
    starts = range(0, len(scenes), 128)
    return torch.cat([render(scenes[i : i + 128], FRAMES, SIZE, device) for i in starts])


def corrupt(video, generator):
    """Clean clips (B, 3, T, H, W) in [-1, 1] -> the same with the faults of generated ones, each to a random
    degree, most of them mild. The generator is on the device of the clips."""
    B, _, T, H, W = video.shape
    device = video.device

    def strength(most):
        return torch.rand(B, 1, 1, 1, 1, generator=generator, device=device) ** 2 * most

    def noise(*shape):
        return torch.randn(B, *shape, generator=generator, device=device)

    blurred = F.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    video = torch.lerp(video, blurred, strength(1.0))
    video = torch.lerp(video, video.roll(1, 2), strength(0.4))  # ghosts of the frame before
    video = video + strength(0.15) * noise(3, 1, 1, 1)  # colour
    patches = F.interpolate(noise(3, T // 2, H // 4, W // 4), (T, H, W))  # each patch off by its own colour
    video = video + strength(0.3) * patches
    return video + strength(0.4) * noise(3, T, H, W)


def reader_loss(pred, target):
    """The sum of the losses of all attributes. pred: as from `Reader.forward`; target: as from `labels`.
    Absent actors and colours that change do not count. Few actors grow or shrink: without a weight nearly all
    of them are read as neither."""
    present = target["presence"].bool()
    loss = 10 * F.binary_cross_entropy_with_logits(pred["presence"], target["presence"])
    loss = loss + 4 * (pred["place"] - target["place"])[present].abs().mean()
    first, last = target["colour"].unbind(-1)
    target = target | {"colour": torch.where(first == last, first, IGNORED)}
    for name in ("colour", "motion", "size", "count", "background"):
        weight = pred[name].new_tensor([1.0, 4.0, 4.0]) if name == "size" else None
        loss = loss + F.cross_entropy(pred[name].flatten(0, -2), target[name].flatten(), weight)
    return loss


def train_reader(steps=3000, batch=64, clips=16384, seed=0, device="cpu"):
    """Train a reader on `clips` clips, half of them basic -> Reader in eval mode, on the device."""
    device = torch.device(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = Reader().to(device, memory_format=torch.channels_last)
    generator = torch.Generator(device).manual_seed(seed)
    sets = []
    for which in ("basic", "rich"):
        scenes = make_scenes(which, clips // 2, seed=900, pairs="all")
        sets.append((render_clips(scenes, device), labels(scenes, device)))
    optimizer = torch.optim.AdamW(reader.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.2)
    for _ in tqdm(range(steps), "training the reader"):
        videos, targets = [], []
        for clean, target in sets:
            rows = torch.randint(len(clean), (batch // 2,), generator=generator, device=device)
            videos.append(clean[rows] / 127.5 - 1)
            targets.append({name: value[rows] for name, value in target.items()})
        target = {name: torch.cat([part[name] for part in targets]) for name in targets[0]}
        video = corrupt(torch.cat(videos), generator)
        with autocast(device, pick_precision("auto", device)):
            pred = reader(video)
        loss = reader_loss({name: value.float() for name, value in pred.items()}, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return reader.eval()


def get_reader(path: Path = SHIPPED, device="cpu") -> Reader:
    """The reader in a file, by default the shipped one, in eval mode. Raises FileNotFoundError if this
    version has not been trained, ValueError if the file does not fit."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: `python -m lab.reader` trains this version of the reader"
        )
    reader = Reader()
    try:
        reader.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a reader: {reason}; `python -m lab.reader` trains one") from None
    return reader.eval().to(device)


def main(argv=None):
    """Train the reader of READER_VERSION and write it to pretrained/."""
    parser = argparse.ArgumentParser(description="Train the judge of this version of the toy world.")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps (3000)")
    parser.add_argument("--clips", type=int, default=16384, help="training clips (16384)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    parser.add_argument("--out", type=Path, default=SHIPPED, help=f"file (pretrained/{SHIPPED.name})")
    args = parser.parse_args(argv)
    reader = train_reader(args.steps, clips=args.clips, device=pick_device(args.device))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    new = args.out.with_name(f".{args.out.name}.new")
    save_tensors(new, {name: value.cpu() for name, value in reader.state_dict().items()})
    new.replace(args.out)
    print(f"written to {args.out}")


if __name__ == "__main__":
    run_command(main)
