"""Does the video show what the prompt says? A measurement, not an opinion.

The judge is a network that reads the attributes of a clip back (reader.py). Before it may judge a model it
must read at least 98 % of every attribute of held-out true clips of one actor right, and fall to chance when
captions are shuffled; what it reads of several actors is told. All this is printed with every evaluation.

**What is scored.** Clips for new scenes in the words of training, for held-out pairs (a cat never surfed),
held-out words (a *feline*), held-out forms of a sentence, and for several actors, in a sentence or in long
prompts: the share of clips, or of actors, with the right subject, colour, motion and so on, and of clips with
all right; and the validation loss on fixed noise.

**By the names of others.** VBench (arXiv 2311.17982) and T2V-CompBench (arXiv 2407.14505), with which
ModelGrow was measured, ask the same of real videos. `ORIGINALS` says which number here is the counterpart of
which there. The measures of time (`steadiness`) follow VBench's formulas, with the reader's features in the
place of DINO and CLIP, and the mean of two frames in that of the network that interpolates between them.
What has no counterpart here is named in `LEFT_OUT`.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import find_checkpoint, load_model
from data import KINDS, MOTIONS, ToyWorld, caption, make_scenes
from draw import render
from flow import validation_loss
from reader import FRAMES, SIZE, get_reader, truth
from sample import GUIDANCE, STEPS, autocast, newest_checkpoint, pick_device, pick_precision, solve
from text_encoder import NULL_PROMPT, Prompts

ATTRIBUTES = ("subject", "colour", "motion", "background")
COLUMNS = (*ATTRIBUTES, "change", "count", "relation", "all")  # of a table
NEAR = 0.2  # a place counts as right within this distance; the picture is 2 wide and high


# --------------------------------------------------------------------------------------------------------
# Scores


@torch.no_grad()
def score(reader, videos, scenes) -> dict[str, float]:
    """The shares of clips that show what their scenes of one actor ask for. videos (B, 3, T, H, W) in [-1, 1]
    -> {"subject", "colour", "motion", "background", "all", "place"}. The subject is the kind that the reader
    is surest of; colour, motion and place are what it reads off that one, whether or not it is the right
    kind. "all" does not count place, which captions of one actor do not tell."""
    said, true = read(reader, videos), truth(scenes)
    rows = torch.arange(len(scenes))
    kind = said["presence"].argmax(1)  # (B,)
    wanted = true["presence"].argmax(1)
    right = {
        "subject": kind == wanted,
        "colour": said["colour"][rows, kind].argmax(-1) == true["colour"][rows, wanted, 0],
        "motion": said["motion"][rows, kind].argmax(-1) == true["motion"][rows, wanted],
        "background": said["background"].argmax(-1) == true["background"],
    }
    right["all"] = torch.stack([right[name] for name in ATTRIBUTES]).all(0)
    right["place"] = (said["place"][rows, kind] - true["place"][rows, wanted]).norm(dim=-1) < NEAR
    return {name: value.float().mean().item() for name, value in right.items()}


@torch.no_grad()
def score_several(reader, videos, scenes) -> dict[str, float]:
    """The same for scenes of several actors. The subjects are the kinds that the reader is surest of, as many
    as were asked for. -> shares of the actors asked for: "subject", those found; and those found, of ones
    whose colour stays, in the right "colour"; in the right "motion", also by itself for a "direction" (left,
    right, up, down) and another "action"; of ones that change, with the right "change"; of two or three equal
    ones, with the right "count". And shares of clips: "together", all found; "relation", actor 0 found on its
    side of actor 1; "background"; "all" of these at once. What nobody was asked for is left out."""
    said, true = read(reader, videos), truth(scenes)
    asked = true["presence"].bool()  # (B, kinds)
    place_in_order = said["presence"].argsort(1, descending=True).argsort(1)
    found = asked & (place_in_order < asked.sum(1, keepdim=True))
    best = {name: said[name].argmax(-1) == true[name] for name in ("motion", "size", "count")}
    first, last = true["colour"].unbind(-1)
    turns, ends = first != last, torch.cat([reader.ends(chunk.float()) for chunk in videos.split(128)])
    directed = true["motion"] < 4
    questions = {  # name: whom it is asked of, and whether the answer is right
        "subject": (asked, found),
        "colour": (asked & ~turns, said["colour"].argmax(-1) == first),
        "motion": (asked, best["motion"]),
        "direction": (asked & directed, best["motion"]),
        "action": (asked & ~directed, best["motion"]),
        "change": (
            turns | (true["size"] > 0),
            torch.where(turns, (ends.argmax(-1) == true["colour"]).all(-1), best["size"]),
        ),
        "count": (true["count"] > 0, best["count"]),
    }
    right = {name: (whom, found & answer) for name, (whom, answer) in questions.items()}
    relation = []
    for i, scene in enumerate(scenes):
        a, b = (KINDS.index(actor.kind) for actor in scene.actors[:2])
        x, y = (said["place"][i, a] - said["place"][i, b]).tolist()
        side = {"left of": x < 0, "right of": x > 0, "above": y < 0, "below": y > 0}[scene.relation]
        relation.append(side and bool(found[i, a] and found[i, b]))
    whole = {
        "together": (found | ~asked).all(1),
        "relation": torch.tensor(relation),
        "background": said["background"].argmax(-1) == true["background"],
    }
    everything = [*whole.values(), *((yes | ~whom).all(1) for whom, yes in right.values())]
    whole["all"] = torch.stack(everything).all(0)
    scores = {name: yes[whom].float().mean().item() for name, (whom, yes) in right.items() if whom.any()}
    return scores | {name: yes.float().mean().item() for name, yes in whole.items()}


@torch.no_grad()
def steadiness(reader, videos, scenes) -> dict[str, float]:
    """VBench's measures of time (arXiv 2311.17982, section 3.2) on clips of one actor (B, 3, T, H, W) in
    [-1, 1], T > 2: how alike the subject, and the picture as a whole, stay to the first frame and to the one
    before (cosine of the reader's features); one minus the mean absolute difference of neighbouring frames,
    of clips that should stand still, and of every second frame from the mean of its neighbours, where 1 is
    the range of the pixels; and the share of clips in which something moves."""
    B, _, T, _, _ = videos.shape
    frames = videos.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (B T, 3, 1, H, W), each shown as a clip
    chunks = [reader.features(c.float().expand(-1, -1, FRAMES, -1, -1)) for c in frames.split(128)]
    found, _, whole = (torch.cat(parts).unflatten(0, (B, T)) for parts in zip(*chunks, strict=True))
    said = read(reader, videos)
    rows, kind = torch.arange(B), said["presence"].argmax(1)

    def consistency(f):  # (B, T, C)
        first, before = (F.cosine_similarity(f[:, 1:], other, dim=-1) for other in (f[:, :1], f[:, :-1]))
        return ((first + before) / 2).mean().item()

    v = videos.float().clamp(-1, 1) / 2
    still = torch.tensor([scene.actors[0].motion == "still" for scene in scenes])
    between = (v[:, :, :-2:2] + v[:, :, 2::2]) / 2
    scores = {
        "subject consistency": consistency(found[rows, :, kind]),
        "background consistency": consistency(whole),
        "smoothness": 1 - (v[:, :, 1:-1:2] - between).abs().mean().item(),
        "dynamic": (said["motion"][rows, kind].argmax(-1) != MOTIONS.index("still")).float().mean().item(),
    }
    return scores | ({"flicker": 1 - v[still].diff(dim=2).abs().mean().item()} if still.any() else {})


ORIGINALS = {  # benchmark and its name for it: (our set of prompts, our name)
    "T2V-CompBench consistent attribute binding": ("several actors", "colour"),
    "T2V-CompBench dynamic attribute binding": ("several actors", "change"),
    "T2V-CompBench spatial relationships": ("several actors", "relation"),
    "T2V-CompBench motion binding": ("several actors", "direction"),
    "T2V-CompBench action binding": ("several actors", "action"),
    "T2V-CompBench generative numeracy": ("several actors", "count"),
    "VBench subject consistency": ("seen", "subject consistency"),
    "VBench background consistency": ("seen", "background consistency"),
    "VBench temporal flickering": ("seen", "flicker"),
    "VBench motion smoothness": ("seen", "smoothness"),
    "VBench dynamic degree": ("seen", "dynamic"),
    "VBench object class": ("seen", "subject"),
    "VBench multiple objects": ("several actors", "together"),
    "VBench color": ("seen", "colour"),
    "VBench spatial relationship": ("several actors", "relation"),
    "VBench scene": ("seen", "background"),
}
LEFT_OUT = (
    "VBench's aesthetic and imaging quality, styles, human action and overall consistency, and"
    " T2V-CompBench's object interactions"
)


def read(reader, videos):
    """What the reader says of clips (B, 3, T, H, W), chunk by chunk -> dict of tensors."""
    parts = [reader(chunk.float()) for chunk in videos.split(128)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def prove(reader, count=1024) -> dict[str, dict[str, float]]:
    """What the reader is worth: its scores on true renders it never saw, of seen and of held-out pairs, and
    on the same with the scenes shuffled, where an honest reader is at chance; and on true clips of the long
    prompts, which are harder. Raises ValueError below 0.98 in any attribute of one actor: it must not judge
    others."""

    def shown(scenes):
        chunks = [render(scenes[i : i + 128], FRAMES, SIZE) for i in range(0, len(scenes), 128)]
        return torch.cat(chunks) / 127.5 - 1

    scenes = make_scenes("basic", count, 901)
    videos = shown(scenes)
    generator = torch.Generator().manual_seed(0)
    shuffled = [scenes[i] for i in torch.randperm(count, generator=generator)]
    sets = prompt_sets(count)
    pairs, several = (sets[name][0] for name in ("held-out pairs", "long"))
    proof = {
        "true clips": score(reader, videos, scenes) | steadiness(reader, videos, scenes),
        "true clips of held-out pairs": score(reader, shown(pairs), pairs),
        "shuffled captions": score(reader, videos, shuffled),
        "true clips of several actors": score_several(reader, shown(several), several),
    }
    for clips in ("true clips", "true clips of held-out pairs"):
        worst = min((*ATTRIBUTES, "place"), key=proof[clips].get)
        if (share := proof[clips][worst]) < 0.98:
            raise ValueError(f"the reader cannot be trusted: {share:.3f} of {clips} show the {worst}")
    return proof


def prompt_sets(count) -> dict[str, tuple[list, list[str]]]:
    """The test prompts, always the same: name -> (scenes, captions). Scenes are new in each, colour and
    background are always named. Two sets are of two or three actors, one of whom changes or comes in
    several, before a camera that is still (in eight frames a pan looks like motion): in one sentence, and in
    long prompts, detailed captions."""
    seen, words, forms = (make_scenes("basic", count, seed) for seed in (902, 904, 905))
    pairs = make_scenes("basic", count, 903, "held_out")
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
    checkpoint, reader, count=200, steps=STEPS, guidance=GUIDANCE, device="auto", seed=0,
    read=Prompts, only=(),
) -> dict:  # fmt: skip
    """Sample `count` clips of each prompt set and read them -> {set: scores}, and under "val_loss" and
    "rich_loss" the loss by t on `basic` with short captions and on `rich` with detailed ones. `read` is how
    prompts become features; `only` names the sets to sample, if not all, without losses."""
    device = pick_device(device)
    precision = pick_precision("auto", device)
    model, header = load_model(checkpoint)
    model.to(device)
    sets = {name: prompts for name, prompts in prompt_sets(count).items() if not only or name in only}
    few, clip = min(256, 8 * count), (model.config.frames, model.config.size)
    kinds = {} if only else {"val_loss": ("basic", "short"), "rich_loss": ("rich", "detailed")}
    held_out = {name: ToyWorld(kind, few, 1, *clip, captions) for name, (kind, captions) in kinds.items()}
    texts = [c for world in held_out.values() for c in world.captions]
    texts += [c for _, captions in sets.values() for c in captions]
    prompts = read(texts, header, model.config.llm_dim)
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
        clips = torch.cat(clips)
        scores[name] = (score_several if scenes[0].relation else score)(reader, clips, scenes)
        if name == "seen":
            scores[name] |= steadiness(reader, clips, scenes)
    losses = {n: validation_loss(model, w, prompts, precision).tolist() for n, w in held_out.items()}
    return scores | losses


def table(rows: dict[str, dict[str, float]]) -> str:
    """{row: {column: share}} -> a table in Markdown."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{row[c]:.3f}" if c in row else "" for c in COLUMNS) + " |"
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
    print(f"\n{checkpoint} ({args.count} prompts per set, guidance {args.guidance:g}, {args.steps} steps):")
    print(table({name: row for name, row in scores.items() if isinstance(row, dict)}))
    for name, losses in (("basic", scores["val_loss"]), ("rich", scores["rich_loss"])):
        by_t = " ".join(f"{v:.3f}" for v in losses)
        print(f"validation loss on {name} {sum(losses) / len(losses):.4f}; by t: {by_t}")
    print("\nBy the names of others (of true clips in brackets):")
    true = {"seen": proof["true clips"], "several actors": proof["true clips of several actors"]}
    for theirs, (name, column) in ORIGINALS.items():
        if column in scores[name]:
            print(f"{theirs:45} {scores[name][column]:.3f} ({true[name][column]:.3f})")
    out = Path(args.out) if args.out else checkpoint.parent / "evaluation.json"
    out.write_text(json.dumps({"arguments": vars(args), "reader": proof, "scores": scores}, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # whatever a user can mend
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
