"""lab/bench.py and lab/bench_gpu.py: sides in turn, ratios of neighbours, and each part on tiny sizes."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from conftest import SMALL, random_model
from lab import bench, bench_gpu
from run import Checkpoint, save_checkpoint

HERE = bench.Bench(torch.device("cpu"), None, repeats=1, quick=True)


def rows_of(text):
    """The rows of all tables of a text, without titles -> lists of cells."""
    lines = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rules = [i for i, cells in enumerate(lines) if set(cells) == {"---"}]
    titles = [i - 1 for i in rules]
    return [cells for i, cells in enumerate(lines) if i not in rules and i not in titles]


def test_sides_run_in_turn(monkeypatch):
    """The first turn does not count; on a GPU a turn is several calls."""
    now, order = [0], []
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def side(name, seconds):
        order.append(name)
        now[0] += seconds

    sides = {"a": partial(side, "a", 2), "b": partial(side, "b", 4)}
    assert bench.alternate(sides, 2) == {"a": [2, 2], "b": [4, 4]}
    assert order == ["a", "b"] * 3
    order.clear()
    assert bench.alternate(sides, 1, calls=2) == {"a": [2], "b": [4]}
    assert order == ["a", "a", "b", "b"] * 2


def test_ratios_are_of_neighbours():
    assert bench.ratio({"a": [1, 2, 9], "b": [1, 1, 3]}, "a", "b") == "2.00 (1.50 to 2.50)"


def test_a_step_trains():
    """It is a step: weights move, gradients are gone."""
    model = random_model(SMALL)
    before = [parameter.clone() for parameter in model.parameters()]
    clips, prompt = bench.random_batch(SMALL, 2, torch.device("cpu"))
    bench.training_step(model, model, clips, prompt, None)()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2 and all(parameter.grad is None for parameter in model.parameters())


def test_peers_are_like_us():
    """Wan's and Latte's transformer take the same clips, and have about as many parameters."""
    pytest.importorskip("diffusers")
    config = replace(SMALL, width=64, text_dim=32)
    clips, prompt = bench.random_batch(config, 2, torch.device("cpu"))
    ours = sum(parameter.numel() for parameter in random_model(config).parameters())
    for make in (bench.wan_like, bench.latte_like):
        model, forward = make(config)
        assert forward(clips, torch.rand(2), *prompt).shape == clips.shape
        assert ours / 3 < sum(parameter.numel() for parameter in model.parameters()) < 3 * ours


def test_prompts_of_all_lengths_are_measured():
    q, k, _, mask = bench.attention_inputs((4, 2, 6, 5, 8), "cpu", torch.float32)
    assert q.shape == (4, 2, 6, 8) and k.shape == (4, 2, 5, 8) and q.requires_grad
    assert mask.sum(1).tolist() == [1, 3, 4, 5]
    assert bench.attention_inputs((4, 2, 6, 6, 8), "cpu", torch.float32)[3] is None


@pytest.mark.parametrize("part", ["attention", "train", "data"])
def test_parts_measure_and_write(tmp_path, capsys, part):
    """A part prints its table, and writes it and positive numbers for every row of it."""
    out = tmp_path / "new" / "numbers.json"
    bench.main([part, "--quick", "--device", "cpu", "--out", str(out)])
    text = out.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["arguments"]["part"] == part and "torch" in written["machine"]
    result = written["result"]
    if part == "train":
        assert result.pop("peak") > 0
        (result,) = (entry["seconds"] for entry in result.values())
        result = {"": result}
    times = result if part == "data" else {k: s for sides in result.values() for k, s in sides.items()}
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in times.values())
    assert len(rows_of(text)) == (4 if part == "attention" else len(times))


def test_part_sample_scores_a_checkpoint(tmp_path, encoder_name):
    model = random_model(replace(SMALL, text_dim=16))
    metadata = {"text_encoder": encoder_name, "history": []}
    save_checkpoint(tmp_path / "weights", Checkpoint(model, model, {}, metadata, {}))
    text, result = bench.bench_sample(replace(HERE, checkpoint=tmp_path / "weights", count=2))
    assert list(result) == [1, 2]
    for (steps, mean, right, _), entry in zip(rows_of(text), result.values(), strict=True):
        assert int(steps) in result and float(right) == entry["scores"]["all"]
        assert 0 <= float(mean) <= 1 and entry["seconds per clip"] > 0


# --------------------------------------------------------------------------------------------------------
# One GPU


def test_wrong_values_of_a_kernel_are_seen(monkeypatch):
    """The table is small for a right kernel and large for one that forgets the mask."""
    _, right = bench_gpu.kernel_values(HERE)
    assert max(error for name, errors in right.items() if "float32" in name for error in errors) < 1e-5
    assert max(error for errors in right.values() for error in errors) < 0.05
    assert len(right) == 3 * 3 * 2 * 2  # types, head sizes, lengths, backends
    real = bench_gpu.attention

    def forgetful(q, k, v, mask, backend):
        return real(q, k, v, None if backend == "sdpa" else mask, backend)

    monkeypatch.setattr(bench_gpu, "attention", forgetful)
    _, wrong = bench_gpu.kernel_values(HERE)
    masked = [errors for name, errors in wrong.items() if "7 x 5" in name and "sdpa" in name]
    assert masked and all(min(errors) > 0.05 for errors in masked)


def test_a_section_that_fails_does_not_stop_the_others():
    def works(bench):
        return "| table |", {"number": 1}

    def fails(bench):
        raise RuntimeError("no such kernel")

    text, results = bench_gpu.run_sections({"first": fails, "second": works}, HERE)
    assert results["first"]["error"] == "RuntimeError: no such kernel" and "result" not in results["first"]
    assert results["second"]["result"] == {"number": 1} and "error" not in results["second"]
    assert "failed: RuntimeError: no such kernel" in text and "| table |" in text


def test_sections_end_when_the_time_is_over(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench_gpu, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    left = []

    def slow(bench):
        left.append(bench.minutes)
        now[0] += 100
        return "", {}

    sections = {"one": slow, "two": slow, "three": slow}
    _, results = bench_gpu.run_sections(sections, replace(HERE, minutes=3))
    assert left == pytest.approx([3, 3 - 100 / 60])
    assert results["two"]["seconds"] == 100 and "result" in results["two"]
    assert "skipped, because 3 minutes are over" in results["three"]["error"]


def test_a_train_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="no growth is called 'nothing'"):
        bench_gpu.run_train(HERE, "--quick --grow nothing")


@pytest.mark.slow
def test_part_gpu(tmp_path):
    """All sections on a CPU, with two real trainings."""
    out = tmp_path / "gpu.json"
    bench.main(["gpu", "--quick", "--device", "cpu", "--out", str(out)])
    sections = json.loads(out.read_text())["result"]
    assert list(sections) == list(bench_gpu.SECTIONS)
    assert not any("error" in section for section in sections.values()), sections
    train = sections["train.py"]["result"]
    assert train["steps"] == 10 and 0 < train["seconds to the first step"] < train["seconds"]
    assert train["share of it"] == pytest.approx(train["clips/s"] / train["clips/s of the bare step"])
    assert 0 < sections["whole run"]["result"]["validation loss"] < 2
