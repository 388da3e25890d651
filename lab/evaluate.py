"""Does the video show what the prompt says? `python -m lab.evaluate runs/base` measures it.

The judge is a network that reads the attributes of a clip (lab/reader.py). Before it may judge a model, it
must read at least 98 % of every attribute of held-out true clips of one actor right, and it must fall to
chance when the captions are shuffled. It sees clips of 8 frames of 32x32, and clips of another size are
resampled, which costs it some certainty. So what it reads of *true* clips of the model's own size is the
ceiling for a model. All this is printed with every evaluation.

**What is scored.** Clips for new scenes in the words of training, for held-out pairs (no training clip shows
a surfing cat), held-out words (a *feline*), held-out sentence forms, and for several actors, in one sentence
or in a long prompt. A score is the share of clips, or of actors, with the right subject, colour, motion and
so on, and of clips with everything right. The validation loss is taken at fixed noise.

**By the names of other benchmarks.** VBench (arXiv 2311.17982) and T2V-CompBench (arXiv 2407.14505), with
which ModelGrow was measured, ask the same questions about real videos. `BENCHMARK_NAMES` in lab/tables.py
says which score here corresponds to which there, and `NOT_COVERED` in lab/report.py what does not.
`temporal_consistency` follows VBench's formulas, with the reader's features instead of DINO and CLIP, and
with the mean of two frames instead of a network that interpolates between them.

Left out: picture quality, and preferences of people.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import BACKGROUNDS, COLOURS, KINDS, MOTIONS, SETS, ToyDataset, caption, make_scenes
from draw import render
from flow import GUIDANCE, STEPS, solve, validation_loss
from lab.reader import FRAMES, get_reader, labels, render_clips
from lab.tables import BENCHMARK_NAMES, score_table
from machine import autocast, pick_device, pick_precision, run_command
from run import find_checkpoint, last_training, load_model, newest_checkpoint
from text_encoder import NULL_PROMPT, Prompts
from video import save_grid, to_uint8

ATTRIBUTES = ("subject", "colour", "motion", "background")  # of a scene of one actor
CHANCE = {
    "subject": 1 / len(KINDS),
    "colour": 1 / len(COLOURS),
    "motion": 1 / len(MOTIONS),
    "background": 1 / len(BACKGROUNDS),
}
TRUSTED = 0.98  # share of true clips that the reader must read right
PLACE_TOLERANCE = 0.2  # a place counts as right within this distance; the picture is 2 wide and high
HELD_OUT_CLIPS = {"val_loss": ("basic", "short"), "rich_loss": ("rich", "detailed")}  # loss: (set, captions)
CHUNK = 128  # clips that the reader sees at once
SHOWN = 8  # clips of a picture
RENDERED_AT_ONCE = 32  # true clips of 16 frames of 64x64 take a few hundred MB


# --------------------------------------------------------------------------------------------------------
# Scores


def chunks(videos):
    """Clips -> CHUNK of them at a time, with a progress bar if it takes long."""
    return tqdm(videos.split(CHUNK), "reading clips", leave=False, delay=1)


def predict(reader, videos):
    """Clips (B, 3, T, H, W) in [-1, 1] -> dict of tensors, as from `Reader.forward`, chunk by chunk."""
    parts = [reader(chunk.float()) for chunk in chunks(videos)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def share(right) -> float:
    """The share of a bool tensor that is True."""
    return right.float().mean().item()


@torch.no_grad()
def score(reader, videos, scenes) -> dict[str, float]:
    """The shares of clips that show what their scenes of one actor ask for. videos (B, 3, T, H, W) in [-1, 1]
    -> {"subject", "colour", "motion", "background", "all", "place"}. The subject is the kind that the reader
    is surest of. Colour, motion and place are read off that one, whether or not it is the right kind. "all"
    does not count place, which captions of one actor do not name."""
    pred = predict(reader, videos)
    target = labels(scenes, videos.device)
    rows = torch.arange(len(scenes), device=videos.device)
    kind = pred["presence"].argmax(1)  # (B,)
    wanted = target["presence"].argmax(1)  # (B,)
    colour = pred["colour"][rows, kind].argmax(-1)
    motion = pred["motion"][rows, kind].argmax(-1)
    right = {
        "subject": kind == wanted,
        "colour": colour == target["colour"][rows, wanted, 0],
        "motion": motion == target["motion"][rows, wanted],
        "background": pred["background"].argmax(-1) == target["background"],
    }
    right["all"] = torch.stack(list(right.values())).all(0)
    offset = pred["place"][rows, kind] - target["place"][rows, wanted]
    right["place"] = offset.norm(dim=-1) < PLACE_TOLERANCE
    return {name: share(value) for name, value in right.items()}


def actor_answers(reader, videos, pred, target) -> dict:
    """The questions about single actors -> {name: (of which actors it is asked, whether the reader's answer
    is right)}, each (B, kinds) bool."""
    present = target["presence"].bool()
    first, last = target["colour"].unbind(-1)
    turns = first != last
    right = {name: pred[name].argmax(-1) == target[name] for name in ("motion", "size", "count")}
    ends = torch.cat([reader.first_last_colour(chunk.float()) for chunk in chunks(videos)])
    right_turn = (ends.argmax(-1) == target["colour"]).all(-1)
    directed = target["motion"] < 4  # left, right, up, down
    return {
        "subject": (present, present),
        "colour": (present & ~turns, pred["colour"].argmax(-1) == first),
        "motion": (present, right["motion"]),
        "direction": (present & directed, right["motion"]),
        "action": (present & ~directed, right["motion"]),
        "change": (turns | (target["size"] > 0), torch.where(turns, right_turn, right["size"])),
        "count": (target["count"] > 0, right["count"]),
    }


def relations_right(place, found, scenes):
    """Whether actor 0 is on its side of actor 1 and both were found -> (B,) bool. place (B, kinds, 2); found
    (B, kinds)."""
    right = []
    for i, scene in enumerate(scenes):
        a, b = (KINDS.index(actor.kind) for actor in scene.actors[:2])
        x, y = (place[i, a] - place[i, b]).tolist()
        sides = {"left of": x < 0, "right of": x > 0, "above": y < 0, "below": y > 0}
        right.append(sides[scene.relation] and bool(found[i, a]) and bool(found[i, b]))
    return torch.tensor(right)


@torch.no_grad()
def score_several(reader, videos, scenes) -> dict[str, float]:
    """The same for scenes of several actors. The subjects are the kinds that the reader is surest of, as many
    as were asked for.

    Shares of the actors asked for: "subject", those found; and those found with the right "colour" (of actors
    whose colour stays), "motion" (also for a "direction" and another "action" alone), "change" (of actors
    that change), and "count" (of two or three equal ones). Shares of clips: "together", all found;
    "relation", actor 0 found on its side of actor 1; "background"; "all" of these at once. Attributes that
    no prompt asks for are left out."""
    pred = predict(reader, videos)
    target = labels(scenes, videos.device)
    asked = target["presence"].bool()  # (B, kinds)
    rank = pred["presence"].argsort(1, descending=True).argsort(1)  # 0: the kind the reader is surest of
    found = asked & (rank < asked.sum(1, keepdim=True))
    scores = {}
    everything = torch.ones(len(scenes), dtype=torch.bool, device=videos.device)
    for name, (whom, answer) in actor_answers(reader, videos, pred, target).items():
        right = found & answer
        everything &= (right | ~whom).all(1)
        if whom.any():
            scores[name] = share(right[whom])
    clips = {
        "together": (found | ~asked).all(1),
        "relation": relations_right(pred["place"].cpu(), found.cpu(), scenes).to(videos.device),
        "background": pred["background"].argmax(-1) == target["background"],
    }
    for name, right in clips.items():
        everything &= right
        scores[name] = share(right)
    return scores | {"all": share(everything)}


def score_set(reader, name, videos, scenes) -> dict[str, dict[str, float]]:
    """The scores of a set of prompts, {name: scores}; of "seen" with `temporal_consistency`. If the scenes
    have several actors, also those with two and those with three."""
    if name == "seen":
        return {name: score(reader, videos, scenes) | temporal_consistency(reader, videos, scenes)}
    if not scenes[0].relation:
        return {name: score(reader, videos, scenes)}
    scores = {name: score_several(reader, videos, scenes)}
    for number, word in ((2, "two"), (3, "three")):
        rows = [i for i, scene in enumerate(scenes) if len(scene.actors) == number]
        if rows:
            some = [scenes[i] for i in rows]
            scores[f"{name}: {word}"] = score_several(reader, videos[rows], some)
    return scores


def neighbour_similarity(features) -> float:
    """Features (B, T, C) -> VBench's consistency: the mean cosine to the first and to the previous frame."""
    now = features[:, 1:]
    to_first = F.cosine_similarity(now, features[:, :1], dim=-1)
    to_previous = F.cosine_similarity(now, features[:, :-1], dim=-1)
    return ((to_first + to_previous) / 2).mean().item()


@torch.no_grad()
def temporal_consistency(reader, videos, scenes) -> dict[str, float]:
    """VBench's measures of time (arXiv 2311.17982, section 3.2) on clips of one actor (B, 3, T, H, W) in
    [-1, 1], T > 1. "subject consistency" and "background consistency": how alike the features of the subject
    and of the picture stay. "flicker": one minus the mean absolute difference of neighbouring frames, of
    clips that should stand still. "smoothness": the same for every second frame and the mean of its
    neighbours, if T > 2. The range of the pixels is 1. "dynamic": the share of clips in which something
    moves."""
    B, _, T, _, _ = videos.shape
    frames = videos.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (B T, 3, 1, H, W)
    subjects, pictures = [], []
    for chunk in chunks(frames):  # each frame is shown as a clip that stands still
        pooled, _, picture = reader.features(chunk.float().expand(-1, -1, FRAMES, -1, -1))
        subjects.append(pooled)
        pictures.append(picture)
    pred = predict(reader, videos)
    rows = torch.arange(B, device=videos.device)
    kind = pred["presence"].argmax(1)
    subjects = torch.cat(subjects).unflatten(0, (B, T))[rows, :, kind]  # (B, T, C)
    pictures = torch.cat(pictures).unflatten(0, (B, T))  # (B, T, C)
    pixels = videos.float().clamp(-1, 1) / 2
    moves = pred["motion"][rows, kind].argmax(-1) != MOTIONS.index("still")
    scores = {
        "subject consistency": neighbour_similarity(subjects),
        "background consistency": neighbour_similarity(pictures),
        "dynamic": share(moves),
    }
    if T > 2:
        between = (pixels[:, :, :-2:2] + pixels[:, :, 2::2]) / 2
        scores["smoothness"] = 1 - (pixels[:, :, 1:-1:2] - between).abs().mean().item()
    still = [i for i, scene in enumerate(scenes) if scene.actors[0].motion == "still"]
    if still:
        scores["flicker"] = 1 - pixels[still].diff(dim=2).abs().mean().item()
    return scores


# --------------------------------------------------------------------------------------------------------
# The proof, and the evaluation of a model


def prompt_sets(count) -> dict[str, tuple[list, list[str]]]:
    """The test prompts, always the same: name -> (scenes, captions), `count` of each. The scenes of each set
    are new; colour and background are always named. Two sets have two or three actors, one of whom changes or
    comes in several, before a camera that stands still (in eight frames a pan looks like motion)."""
    seen = make_scenes("basic", count, 902)
    pairs = make_scenes("basic", count, 903, "held_out")
    words = make_scenes("basic", count, 904)
    forms = make_scenes("basic", count, 905)
    several = []
    for scene in make_scenes("rich", 4 * count + 40, 906):
        special = any(actor.change or actor.count > 1 for actor in scene.actors)
        if scene.relation and scene.camera == "still" and special:
            several.append(scene)
    several = several[:count]
    return {
        "seen": (seen, [caption(s) for s in seen]),
        "held-out pairs": (pairs, [caption(s) for s in pairs]),
        "held-out words": (words, [caption(s, vocabulary="held_out") for s in words]),
        "held-out forms": (forms, [caption(s, "reworded") for s in forms]),
        "several actors": (several, [caption(s) for s in several]),
        "long": (several, [caption(s, "detailed") for s in several]),
    }


def check_proof(proof, count):
    """Raise ValueError unless the reader is right on true clips and, within five standard errors of `count`
    clips, at chance on shuffled captions."""
    for clips in ("true clips", "true clips of held-out pairs"):
        for name in (*ATTRIBUTES, "place"):
            right = proof[clips][name]
            if right < TRUSTED:
                raise ValueError(f"the reader cannot be trusted: {right:.3f} of {clips} show the {name}")
    for name, chance in CHANCE.items():
        right = proof["shuffled captions"][name]
        allowed = 5 * math.sqrt(chance * (1 - chance) / count)
        if abs(right - chance) > allowed:
            raise ValueError(
                f"the reader cannot be trusted: with shuffled captions {right:.3f} of the clips show the"
                f" {name}, and chance is {chance:.3f}"
            )


def prove(reader, count=1024) -> dict[str, dict[str, float]]:
    """What the reader is worth: its scores on true clips of its own size that it never saw, of seen and of
    held-out pairs; on the same clips with shuffled captions; and on true clips of the long prompts, which are
    harder. Raises ValueError if it must not judge others (`check_proof`)."""
    device = next(reader.parameters()).device

    def clips(scenes):
        return render_clips(scenes, device) / 127.5 - 1

    scenes = make_scenes("basic", count, 901)
    videos = clips(scenes)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    shuffled = [scenes[i] for i in order.tolist()]
    sets = prompt_sets(count)
    pairs, several = sets["held-out pairs"][0], sets["long"][0]
    proof = {
        "true clips": score(reader, videos, scenes),
        "true clips of held-out pairs": score(reader, clips(pairs), pairs),
        "shuffled captions": score(reader, videos, shuffled),
        "true clips of several actors": score_several(reader, clips(several), several),
    }
    check_proof(proof, count)
    return proof


def ceiling(reader, config, count) -> dict[str, dict[str, float]]:
    """The scores of true clips of a model's size, by prompt set: no model can expect more."""
    device = next(reader.parameters()).device
    scores = {}
    for name in ("seen", "held-out pairs", "several actors"):
        scenes = prompt_sets(count)[name][0]
        parts = [scenes[i : i + RENDERED_AT_ONCE] for i in range(0, len(scenes), RENDERED_AT_ONCE)]
        videos = torch.cat([render(part, config.frames, config.size, device) for part in parts]) / 127.5 - 1
        scores |= score_set(reader, name, videos, scenes)
    return scores


def sample_clips(
    model, prompts, captions, steps=STEPS, guidance=GUIDANCE, seed=0, precision=None, title=None
):  # fmt: skip
    """A clip for each caption -> (B, 3, T, H, W), about in [-1, 1], on the model's device. The noise comes
    from the CPU, so that it agrees on all machines. `title` names a progress bar."""
    device = next(model.parameters()).device
    config = model.config
    shape = (len(captions), 3, config.frames, config.size, config.size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed % 2**63))
    null = prompts.batch([NULL_PROMPT])
    clips = []
    for start in tqdm(range(0, len(captions), 50), title, disable=title is None):
        prompt = prompts.batch(captions[start : start + 50])
        with autocast(device, precision):
            part = solve(model, noise[start : start + 50].to(device), prompt, null, steps, guidance)
        clips.append(part)
    return torch.cat(clips)


def evaluate(
    checkpoint, reader, count=200, steps=STEPS, guidance=GUIDANCE, device="auto", seed=0,
    prompts_class=Prompts, only=(),
) -> dict:  # fmt: skip
    """Sample `count` clips of each prompt set and read them -> {set: scores}, and under "val_loss" and
    "rich_loss" the loss by timestep on `basic` with short captions and on `rich` with detailed ones. `only`
    names the sets to sample, if not all, and then no losses are computed."""
    device = pick_device(device)
    precision = pick_precision("auto", device)
    reader = reader.to(device)
    model, metadata = load_model(checkpoint)
    model.to(device)
    config = model.config
    sets = {name: pair for name, pair in prompt_sets(count).items() if not only or name in only}
    held_out = {}
    for name, (which, style) in HELD_OUT_CLIPS.items() if not only else ():
        clips = min(256, 8 * count)
        held_out[name] = ToyDataset(which, clips, 1, config.frames, config.size, style, device=device)
    texts = []
    for _, captions in sets.values():
        texts += captions
    for dataset in held_out.values():
        texts += dataset.captions
    prompts = prompts_class(texts, metadata, config.llm_dim, device)
    scores = {}
    for name, (scenes, captions) in sets.items():
        title = f"sampling {name}"
        clips = sample_clips(model, prompts, captions, steps, guidance, seed, precision, title)
        scores |= score_set(reader, name, clips, scenes)
    for name, dataset in held_out.items():
        scores[name] = validation_loss(model, dataset, prompts, precision).tolist()
    return scores


# --------------------------------------------------------------------------------------------------------
# The command


def output_path(checkpoint: Path) -> Path:
    """Where the scores of a checkpoint directory go: evaluation.json of its run, or evaluation-step_N.json of
    weights that it has kept; for a checkpoint outside of a run runs/evaluation-NAME.json, so that nothing is
    written beside it."""
    if checkpoint.name.startswith("checkpoint"):
        return checkpoint.parent / "evaluation.json"
    if checkpoint.name.startswith("step_"):
        return checkpoint.parent / f"evaluation-{checkpoint.name}.json"
    return Path("runs") / f"evaluation-{checkpoint.resolve().name}.json"


def print_scores(scores, true):
    """Everything that was measured, as text. true: the scores of true clips."""
    rows = {name: row for name, row in scores.items() if isinstance(row, dict)}
    print(score_table(rows | {f"true clips: {name}": row for name, row in true.items()}))
    for name, (which, _) in HELD_OUT_CLIPS.items():
        losses = scores[name]
        by_t = " ".join(f"{loss:.3f}" for loss in losses)
        print(f"validation loss on {which} {sum(losses) / len(losses):.4f}; by timestep: {by_t}")
    print("\nBy the names of other benchmarks (true clips in brackets):")
    for benchmark, (name, column) in BENCHMARK_NAMES.items():
        if column in scores[name]:
            print(f"{benchmark:45} {scores[name][column]:.3f} ({true[name][column]:.3f})")


def write_picture(path: Path, model, metadata, args):
    """A GIF for people: the clips of the first prompts of several actors."""
    captions = prompt_sets(SHOWN)["several actors"][1]
    device = pick_device(args.device)
    precision = pick_precision("auto", device)
    prompts = Prompts(captions, metadata, model.config.llm_dim, device)
    clips = sample_clips(model.to(device), prompts, captions, args.steps, args.guidance, args.seed, precision)
    save_grid(path, to_uint8(clips), captions, columns=4, fps=metadata["fps"])


def say_what_the_judge_knows(checkpoint: Path, metadata):
    """Print a note about a model that was trained on a folder of clips."""
    training = last_training(metadata["history"])
    if training and training["train"] not in SETS:
        what = f"{checkpoint} was trained on {training['train']}"
        print(f"note: {what}, and the judge knows only the toy world")


def main(argv=None):
    """Score a checkpoint: `python -m lab.evaluate runs/base`."""
    parser = argparse.ArgumentParser(
        description="Sample clips, read them, and say how often they show what was asked for."
    )
    parser.add_argument("checkpoint", nargs="?", help="run or checkpoint; the newest run, else pretrained/")
    parser.add_argument("--count", type=int, default=200, help="prompts per set (200)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of the solver ({STEPS})")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help=f"1 is none ({GUIDANCE:g})")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    parser.add_argument(
        "--out",
        help="JSON file for the scores, with a GIF beside it (evaluation.json in the run; else"
        " runs/evaluation-NAME.json)",
    )
    args = parser.parse_args(argv)
    if args.count < 1 or args.steps < 1:
        raise ValueError("--count and --steps must be at least 1")
    if not 0 <= args.guidance < math.inf:
        raise ValueError(f"--guidance is {args.guidance}; it must be a number from 0 on")
    if args.out and args.out.endswith(".gif"):
        raise ValueError(f"--out {args.out} is for the scores, as JSON; the GIF lies beside it")
    checkpoint = find_checkpoint(args.checkpoint) if args.checkpoint else newest_checkpoint()
    out = Path(args.out) if args.out else output_path(checkpoint)
    reader = get_reader(device=pick_device(args.device))
    model, metadata = load_model(checkpoint)
    say_what_the_judge_knows(checkpoint, metadata)
    print("the judge is tested on true clips, which takes a minute on two CPU cores", flush=True)
    proof = prove(reader)
    print("The reader itself:\n" + score_table(proof))
    true = ceiling(reader, model.config, args.count)
    print(f"scoring {checkpoint}", flush=True)
    scores = evaluate(checkpoint, reader, args.count, args.steps, args.guidance, args.device, args.seed)
    print(f"\n{checkpoint} ({args.count} prompts per set, guidance {args.guidance:g}, {args.steps} steps):")
    print_scores(scores, true)
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {"arguments": vars(args), "reader": proof, "ceiling": true, "scores": scores}
    out.write_text(json.dumps(result, indent=1))
    picture = out.with_suffix(".gif")
    write_picture(picture, model, metadata, args)
    print(f"written to {out} and {picture}")


if __name__ == "__main__":
    run_command(main, "lower --count")
