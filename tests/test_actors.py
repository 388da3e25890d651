"""lab/actors.py: curves of accuracy over FLOPs, from the weights that --keep leaves."""

import json
from dataclasses import replace

import pytest
import torch

from conftest import SMALL, random_model, run_training
from lab import actors
from lab.evaluate import prompt_sets, score_set
from lab.reader import Reader, render_clips
from lab.report import actors_section, actors_table
from run import Checkpoint, load_model, save_checkpoint


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory, encoder_name):
    """A run of four steps that has kept the weights of steps 0, 2 and 4."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    return run_training(folder, encoder_name, "--steps 4 --every 2 --keep")


def test_keep_leaves_the_weights_of_every_validation(kept_run):
    """The last ones are those of the checkpoint, and no others are equal."""
    kept = actors.kept_weights(kept_run)
    assert [directory.name for directory in kept] == ["step_000000", "step_000002", "step_000004"]
    weights = [load_model(directory)[0].state_dict() for directory in (*kept, kept_run)]
    for name, last in weights[3].items():
        assert torch.equal(weights[2][name], last)
    assert any(not torch.equal(weights[1][name], last) for name, last in weights[3].items())
    assert [load_model(directory)[1]["flops"] > 0 for directory in kept] == [False, True, True]
    assert not (kept[0] / "train_state.safetensors").exists()


def test_without_keep_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="train it with --keep"):
        actors.kept_weights(tmp_path)


def test_scores_by_number_of_actors():
    """The rows of two and of three actors are those of clips with two and three, and average to all."""
    scenes = prompt_sets(24)["several actors"][0]
    torch.manual_seed(0)
    reader = Reader().eval()
    scores = score_set(reader, "several", render_clips(scenes) / 127.5 - 1, scenes)
    two = sum(len(scene.actors) == 2 for scene in scenes)
    assert 0 < two < 24
    for name in ("together", "relation", "all", "background"):
        mean = two * scores["several: two"][name] + (24 - two) * scores["several: three"][name]
        assert mean / 24 == pytest.approx(scores["several"][name])


def test_the_ceiling_is_that_of_the_last_run(tmp_path, monkeypatch):
    """Also if points of an earlier run with other clips are scored later."""
    monkeypatch.setattr(actors, "evaluate", lambda *_, **__: {})
    monkeypatch.setattr(actors, "ceiling", lambda reader, config, count: config.frames)
    for name, frames in (("small", 4), ("large", 8)):
        model = random_model(replace(SMALL, frames=frames))
        weights = Checkpoint(model, model, {}, {"flops": frames}, {})
        save_checkpoint(tmp_path / name / "step_000001", weights)
        (tmp_path / name / "args.json").write_text(json.dumps({"out": name}))
    small, large, file = tmp_path / "small", tmp_path / "large", tmp_path / "large.json"
    for runs in ([large], [small, large]):
        result = actors.score_runs(runs, file, Reader(), 3, "cpu")
        assert len(result["points"]) == len(runs) and result["ceiling"] == 8


def test_a_curve_continues_and_is_drawn(kept_run, tmp_path, monkeypatch):
    """Points that are scored already are not scored again. A run that was trained anew with other options is
    refused. The report is the same each time."""
    reader, file = Reader().eval(), tmp_path / "actors" / "run.json"
    result = actors.score_runs([kept_run], file, reader, 3, "cpu")
    assert [point["checkpoint"] for point in result["points"]] == [f"run/step_00000{i}" for i in (0, 2, 4)]
    assert {"seen", "several actors", "long", "long: two"} <= result["points"][0]["scores"].keys()
    once = json.loads(file.read_text())
    del once["points"][1]  # as if it had been stopped
    file.write_text(json.dumps(once))
    assert actors.score_runs([kept_run], file, reader, 3, "cpu") == result
    monkeypatch.setattr(actors, "evaluate", None)
    assert actors.score_runs([kept_run], file, reader, 3, "cpu") == json.loads(file.read_text())
    with pytest.raises(ValueError, match="3 prompts per set"):
        actors.score_runs([kept_run], file, reader, 4, "cpu")
    other = json.loads(file.read_text())
    other["points"][1]["weights"] = "of a run with other --steps"
    file.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="other weights of run/step_000002: delete it"):
        actors.score_runs([kept_run], file, reader, 3, "cpu")
    options = json.loads((kept_run / "args.json").read_text())
    actors.check_trainings(file, result["arguments"], [{**options, "steps": 8}])
    with pytest.raises(ValueError, match="another training called run: delete it"):
        actors.check_trainings(file, result["arguments"], [{**options, "seed": 1}])
    texts, pictures = [], []
    for grown in ("run", "run", "run-depth"):  # the last one has a dotted line where the next run begins
        result["points"][2]["checkpoint"] = f"{grown}/step_000004"
        file.write_text(json.dumps(result))
        texts.append(actors_section(tmp_path))
        pictures.append((tmp_path / "actors-run.png").read_bytes())
    assert texts[0] == texts[1] and pictures[0] == pictures[1] != pictures[2]
    assert "true clips: several actors" in "".join(texts[0])


def test_the_table_has_the_scores_of_the_last_point():
    points = [{"scores": {"seen": {"subject": 0.1}}}, {"scores": {"seen": {"subject": 0.9}}}]
    assert "| seen | 0.900 |" in actors_table({"points": points, "ceiling": {}})
