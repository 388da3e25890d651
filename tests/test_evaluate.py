"""lab/reader.py and lab/evaluate.py: labels against scenes, scores against a reader that is always right,
measures of time against their formulas, and the shipped reader against known numbers."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import SMALL, random_model
from data import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_PAIRS,
    KINDS,
    MOTIONS,
    captions_of,
    make_scenes,
)
from draw import Actor, Scene
from lab import evaluate, reader
from run import PRETRAINED, Checkpoint, history_tree, load_model, save_checkpoint

CAT_AND_DOG = Scene(
    (Actor("cat", "red", "still", "turns blue"), Actor("dog", "green", "left", "grows", count=2)),
    "night",
    5,
    "above",
)

# What the shipped reader answers for four scenes, and what its training data are like.
KNOWN_STATISTICS = [-0.03568, 0.66781, -0.79193]  # mean, deviation and a pixel of corrupted clips
KNOWN_PRESENCE = [6.146, 5.779, 11.581, 8.553, -1.682, 9.163, 13.322]
KNOWN_ANSWERS = {
    "colour": [4, 2, 2, 2, 5, 3, 2],
    "motion": [7, 7, 6, 3, 5, 2, 5],
    "count": [2, 2, 0, 0, 0, 0, 0],
}


class Oracle:
    """A reader that answers what is true of some scenes."""

    def __init__(self, scenes):
        self.target = reader.labels(scenes)

    def logits(self, name, classes):
        return F.one_hot(self.target[name].clamp_min(0), classes).float()

    def __call__(self, video):
        sizes = {"motion": 8, "size": 3, "count": 3, "background": 5}
        pred = {name: self.logits(name, classes) for name, classes in sizes.items()}
        pred["colour"] = self.logits("colour", 6).sum(2)
        pred["presence"] = self.target["presence"] * 2 - 1
        pred["place"] = self.target["place"]
        return pred

    def first_last_colour(self, video):
        return self.logits("colour", 6)


# --------------------------------------------------------------------------------------------------------
# The reader


def test_labels_of_a_rich_scene():
    target = reader.labels([CAT_AND_DOG])
    cat, dog = KINDS.index("cat"), KINDS.index("dog")
    red, green, blue = (COLOURS.index(name) for name in ("red", "green", "blue"))
    assert target["presence"][0].nonzero().flatten().tolist() == [cat, dog]
    assert target["colour"][0, [cat, dog]].tolist() == [[red, blue], [green, green]]
    assert target["size"][0, [cat, dog]].tolist() == [0, 1]
    assert target["count"][0, [cat, dog]].tolist() == [0, 1]
    assert target["motion"][0, dog] == MOTIONS.index("left")
    assert target["background"][0] == BACKGROUNDS.index("night")
    absent = [k for k in range(len(KINDS)) if k not in (cat, dog)]
    for name in ("colour", "motion", "size", "count"):
        assert (target[name][0, absent] == reader.IGNORED).all()
    assert target["place"][0, cat, 1] < target["place"][0, dog, 1]  # above, and y points down


def test_absent_actors_and_changing_colours_do_not_count_in_the_loss():
    target = reader.labels([CAT_AND_DOG])
    pred = reader.Reader().eval()(torch.zeros(1, 3, 8, 32, 32))
    pred = {name: value.detach() for name, value in pred.items()}
    loss = reader.reader_loss(pred, target)
    assert loss > 0
    for name in ("colour", "motion", "size", "count", "place"):
        changed = pred[name].clone()
        changed[0, KINDS.index("boat")] += torch.arange(changed.shape[-1])  # there is no boat
        assert reader.reader_loss(pred | {name: changed}, target) == loss
    for kind, counts in (("cat", False), ("dog", True)):  # the cat's colour changes
        changed = pred["colour"].clone()
        changed[0, KINDS.index(kind)] += torch.arange(6)
        assert (reader.reader_loss(pred | {"colour": changed}, target) != loss) == counts


def test_a_new_reader_needs_a_new_version():
    """The training data and the answers of READER_VERSION. If this fails, the reader or the world has
    changed: count READER_VERSION up, run `python -m lab.reader`, and put the new numbers here."""
    assert reader.READER_VERSION == 1
    scenes = make_scenes("rich", 4, seed=77, pairs="all")
    clips = reader.render_clips(scenes) / 127.5 - 1
    corrupted = reader.corrupt(clips, torch.Generator().manual_seed(0))
    statistics = [corrupted.mean().item(), corrupted.std().item(), corrupted[2, 1, 3, 5, 7].item()]
    target = reader.labels(scenes)
    pred = reader.get_reader()(clips)
    present = target["presence"].bool()
    answers = {name: pred[name].argmax(-1)[present].tolist() for name in ("colour", "motion", "count")}
    assert statistics == pytest.approx(KNOWN_STATISTICS, abs=1e-4)
    assert pred["presence"][present].tolist() == pytest.approx(KNOWN_PRESENCE, abs=0.02)
    assert answers == KNOWN_ANSWERS


def test_a_reader_that_is_missing_or_damaged_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m lab\.reader"):
        reader.get_reader(tmp_path / "reader-9.safetensors")
    (tmp_path / "cut").write_bytes(reader.SHIPPED.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"is not a reader: .*python -m lab\.reader"):
        reader.get_reader(tmp_path / "cut")


@pytest.mark.slow
def test_the_command_trains_a_reader_that_learns(tmp_path):
    path = tmp_path / "reader.safetensors"
    reader.main(["--steps", "150", "--clips", "2048", "--device", "cpu", "--out", str(path)])
    scenes = make_scenes("basic", 256, seed=901)
    videos = reader.render_clips(scenes) / 127.5 - 1
    scores = evaluate.score(reader.get_reader(path), videos, scenes)
    assert all(scores[name] > 1.5 * evaluate.CHANCE[name] for name in ("colour", "motion", "background")), (
        scores
    )
    assert scores["background"] > 0.9 and scores["place"] > 0.7, scores


# --------------------------------------------------------------------------------------------------------
# Scores


def test_scores_of_several_actors():
    cat, dog = Actor("cat", "red", "left"), Actor("dog", "blue", "up", "turns green")
    two, small = Actor("fish", "red", "spin", count=2), Actor("car", "green", "still", "shrinks")
    scenes = [Scene((cat, dog), "night", seed, "left of") for seed in range(4)]
    scenes += [Scene((two, small), "snow", seed, "above") for seed in range(4)]
    videos = torch.zeros(8, 3, 8, 32, 32)
    assert set(evaluate.score_several(Oracle(scenes), videos, scenes).values()) == {1.0}
    shown = [
        scenes[0],
        replace(scenes[1], relation="right of"),
        replace(scenes[2], actors=(replace(cat, motion="spin"), replace(dog, change="turns yellow"))),
        replace(scenes[3], actors=(cat, Actor("ball", "blue", "up", "turns green"))),
        scenes[4],
        replace(scenes[5], actors=(replace(two, count=3), replace(small, change="grows"))),
        replace(scenes[6], actors=(replace(two, count=1, colour="blue"), replace(small, motion="surf"))),
        scenes[7],
    ]
    assert evaluate.score_several(Oracle(shown), videos, scenes) == pytest.approx({
        "subject": 15 / 16,  # one dog is missing, and with it its motion and its change
        "colour": 11 / 12,  # without the dogs, whose colour changes
        "motion": 13 / 16, "direction": 6 / 8, "action": 7 / 8,
        "change": 5 / 8, "count": 2 / 4,
        "together": 7 / 8, "relation": 6 / 8, "background": 1, "all": 3 / 8,
    })  # fmt: skip


def test_temporal_consistency_against_its_formulas(monkeypatch):
    """A clip that stands still is perfectly consistent; for others flicker, smoothness and consistency follow
    VBench's loops. Clip i shows kind i, and the first clip stands still."""
    scenes = [Scene((Actor("cat", "red", motion),), "night", 5) for motion in ("still", "left", "still")]
    judge = reader.Reader().eval()
    torch.nn.init.normal_(judge.where.weight, std=1000)  # else a subject has those of the picture
    still = torch.rand(3, 3, 1, 32, 32).expand(-1, -1, 8, -1, -1)
    scores = evaluate.temporal_consistency(judge, still, scenes)
    del scores["dynamic"]
    assert list(scores.values()) == pytest.approx([1] * 4, abs=1e-6)
    short = evaluate.temporal_consistency(judge, still[:, :, :2], scenes)
    assert "smoothness" not in short and all(map(math.isfinite, short.values()))
    videos = torch.rand(3, 3, 7, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    motion = torch.zeros(3, 8, 8)
    motion[0, :, MOTIONS.index("still")] = motion[1:, :, MOTIONS.index("left")] = 1
    monkeypatch.setattr(evaluate, "predict", lambda *_: {"presence": torch.eye(8)[:3], "motion": motion})
    scores = evaluate.temporal_consistency(judge, videos, scenes)
    assert scores["dynamic"] == pytest.approx(2 / 3)
    grey = ((videos + 1) * 127.5).double()
    changes, middles = [], []
    for t in range(1, 7):
        changes += [
            (grey[i, :, t] - grey[i, :, t - 1]).abs().mean() for i in (0, 2)
        ]  # those that stand still
    for t in (1, 3, 5):
        mean_of_neighbours = (grey[:, :, t - 1] + grey[:, :, t + 1]) / 2
        middles.append((grey[:, :, t] - mean_of_neighbours).abs().mean())
    assert scores["flicker"] == pytest.approx((255 - sum(changes) / 12).item() / 255, abs=1e-6)
    assert scores["smoothness"] == pytest.approx((255 - sum(middles) / 3).item() / 255, abs=1e-6)
    with torch.no_grad():
        frames = [judge.features(videos[:, :, t : t + 1].repeat(1, 1, 8, 1, 1)) for t in range(7)]
    pictures = [picture for _, _, picture in frames]
    subjects = [pooled[range(3), range(3)] for pooled, _, _ in frames]
    for name, features in (("background consistency", pictures), ("subject consistency", subjects)):
        similar = []
        for t in range(1, 7):
            for other in (0, t - 1):
                similar.append(F.cosine_similarity(features[other], features[t]).mean())
        assert scores[name] == pytest.approx(torch.stack(similar).mean().item(), abs=1e-5)


def test_prompt_sets_hold_what_they_say():
    sets = evaluate.prompt_sets(50)
    assert all(len(scenes) == len(captions) == 50 for scenes, captions in sets.values())
    for scene in sets["held-out pairs"][0]:
        assert (scene.actors[0].kind, scene.actors[0].motion) in HELD_OUT_PAIRS
    training = set(captions_of(make_scenes("basic", 2000), "short", "train", 0.1))
    assert not training & set(sets["held-out words"][1] + sets["held-out forms"][1])
    assert training & set(captions_of(sets["seen"][0]))  # so the test above can find one
    assert sets["long"][0] == sets["several actors"][0]
    for scene in sets["long"][0]:
        assert len(scene.actors) > 1
        assert any(actor.change or actor.count > 1 for actor in scene.actors)
    scenes, videos = sets["long"][0], torch.zeros(50, 3, 8, 32, 32)
    assert set(evaluate.score_several(Oracle(scenes), videos, scenes).values()) == {1.0}


# --------------------------------------------------------------------------------------------------------
# The proof and the command


def proof_with(**changed):
    """The proof of a perfect reader, with other numbers for (clips, name)."""
    right = dict.fromkeys((*evaluate.ATTRIBUTES, "place"), 1.0)
    proof = {
        "true clips": dict(right),
        "true clips of held-out pairs": dict(right),
        "shuffled captions": dict(evaluate.CHANCE),
    }
    for clips, scores in changed.items():
        proof[clips.replace("_", " ")] |= scores
    return proof


def test_a_reader_that_fails_its_proof_must_not_judge():
    evaluate.check_proof(proof_with(), 1024)
    for clips in ("true_clips", "true_clips_of_held-out_pairs"):
        with pytest.raises(ValueError, match=r"cannot be trusted: 0\.970 of true clips.* show the motion"):
            evaluate.check_proof(proof_with(**{clips: {"motion": 0.97}}), 1024)
    leaky = proof_with(shuffled_captions={"colour": 0.3})  # it knows the caption
    with pytest.raises(ValueError, match=r"with shuffled captions 0\.300 of the clips show the colour"):
        evaluate.check_proof(leaky, 1024)
    evaluate.check_proof(leaky, 100)  # which so few clips do not show


@pytest.mark.slow
def test_the_shipped_reader_proves_itself():
    proof = evaluate.prove(reader.get_reader())
    assert proof["true clips of several actors"]["all"] > 0.85
    with pytest.raises(ValueError, match="cannot be trusted"):
        evaluate.prove(reader.Reader().eval(), count=64)


def test_true_clips_are_the_ceiling():
    """At the size of the reader it is what the reader proves; at twice the size little is lost."""
    judge = reader.get_reader()
    for frames, size, least in ((8, 32, 0.98), (16, 64, 0.9)):
        scores = evaluate.ceiling(judge, replace(SMALL, frames=frames, size=size), 30)
        assert scores["seen"]["subject"] >= least and scores["several actors"]["subject"] >= least
        assert {"several actors: two", "several actors: three"} <= scores.keys()
        assert "smoothness" in scores["seen"]


def test_an_evaluation_says_which_checkpoint_and_writes_beside_runs_only(
    tmp_path, monkeypatch, capsys, encoder_name
):
    """Scores of a checkpoint outside of a run go to runs/, not beside it (READING B4)."""
    monkeypatch.chdir(tmp_path)
    config = replace(SMALL, text_dim=16)
    event = {"train": "/my clips", "steps": 1, "captions": "detailed", "tune": "all", "seed": 0}
    metadata = {"text_encoder": encoder_name, "history": [event]}
    model = random_model(config)
    save_checkpoint(tmp_path / "weights", Checkpoint(model, model, {}, metadata, {}))
    monkeypatch.setattr(evaluate, "prove", lambda judge: {})
    evaluate.main(["weights", "--count", "4", "--steps", "1", "--device", "cpu"])
    printed = capsys.readouterr().out
    note = "note: weights was trained on /my clips, and the judge knows only the toy world\n"
    assert printed.startswith(f"{note}the judge is tested on true clips")
    assert "weights (4 prompts per set" in printed
    assert "written to runs/evaluation-weights.json and runs/evaluation-weights.gif\n" in printed
    with Image.open("runs/evaluation-weights.gif") as picture:
        assert picture.n_frames == config.frames
    true_clips = [f"true clips: {name}" for name in ("seen", "held-out pairs", "several actors")]
    rows = [*evaluate.prompt_sets(4), *true_clips]
    assert all(f"\n| {name} |" in printed for name in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "weights"]
    assert [file.name for file in (tmp_path / "weights").iterdir()] == ["model.safetensors"]
    written = json.loads((tmp_path / "runs" / "evaluation-weights.json").read_text())
    true = written["ceiling"]["seen"]
    numbers = f"{written['scores']['seen']['smoothness']:.3f} ({true['smoothness']:.3f})"
    assert f"VBench motion smoothness {numbers}" in re.sub(" +", " ", printed)
    assert written["arguments"]["count"] == 4 and set(written["scores"]["seen"]) >= set(evaluate.ATTRIBUTES)
    in_a_run = tmp_path / "runs" / "base"
    assert evaluate.output_path(in_a_run / "checkpoint") == in_a_run / "evaluation.json"
    assert evaluate.output_path(in_a_run / "step_001500") == in_a_run / "evaluation-step_001500.json"


def test_an_evaluation_is_repeatable_and_covers_all_sets(tmp_path, encoder_name):
    model = random_model(replace(SMALL, text_dim=16))
    save_checkpoint(tmp_path, Checkpoint(model, model, {}, {"text_encoder": encoder_name, "history": []}, {}))
    judge = reader.Reader().eval()
    once, again = (evaluate.evaluate(tmp_path, judge, 4, 2, device="cpu") for _ in range(2))
    assert once == again
    by_number = {f"{name}: {number}" for name in ("several actors", "long") for number in ("two", "three")}
    assert set(once) == {*evaluate.prompt_sets(4), *by_number, "val_loss", "rich_loss"}
    assert all(len(once[name]) == 8 for name in ("val_loss", "rich_loss"))
    assert {"all", "smoothness", "subject consistency"} <= set(once["seen"])
    only = evaluate.evaluate(tmp_path, judge, 4, 2, device="cpu", only=("long",))
    long = {name: once[name] for name in ("long", "long: two", "long: three")}
    assert only == long  # the noise does not depend on the other sets
    other = evaluate.evaluate(tmp_path, judge, 4, 2, device="cpu", seed=1, only=("seen",))
    assert other["seen"].keys() == once["seen"].keys()
    assert other["seen"]["smoothness"] != once["seen"]["smoothness"]


def test_options_reach_the_sampler(tmp_path, encoder_name, monkeypatch):
    model = random_model(replace(SMALL, text_dim=16))
    save_checkpoint(tmp_path, Checkpoint(model, model, {}, {"text_encoder": encoder_name, "history": []}, {}))
    seen = []

    def sample_clips(model, prompts, captions, *how):
        seen.append(how[:3])
        return torch.zeros(4, 3, 8, 32, 32)

    monkeypatch.setattr(evaluate, "sample_clips", sample_clips)
    evaluate.evaluate(tmp_path, evaluate.get_reader(), 4, 2, 1.5, "cpu", 7, only=("long",))
    assert seen == [(2, 1.5, 7)]


@pytest.mark.slow
def test_the_model_that_comes_along_draws_what_it_is_told():
    """With the real LLM: seen prompts, held-out pairs, and a good part of words that no training had (0.15 of
    all four by its base)."""
    assert (PRETRAINED / "model.safetensors").stat().st_size < 20e6
    assert "llm: llm_dim 0 -> 576" in history_tree(load_model(PRETRAINED)[1]["history"])
    sets = "seen", "held-out pairs", "held-out words"
    scores = evaluate.evaluate(PRETRAINED, reader.get_reader(), 100, 6, only=sets)
    right = [scores[name]["all"] for name in sets]
    assert right[0] > 0.9 and right[1] > 0.75 and right[2] > 0.2, right
