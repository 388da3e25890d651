"""lab/bench.py and lab/bench_gpu.py: sides in turn, ratios of neighbours, and each part on tiny sizes."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from conftest import SMALL, random_inputs, random_model
from lab import bench, bench_gpu
from run import Checkpoint, save_checkpoint

ROWS = {"attention": 4, "train": 2, "data": 3}  # of the tables of tiny sizes, without peers
HERE = bench.Bench(torch.device("cpu"), None, repeats=1, quick=True)


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


@pytest.mark.parametrize("option", ["--repeats", "--count"])
def test_nothing_to_measure_is_refused(option):
    with pytest.raises(ValueError, match="must be at least 1"):
        bench.main(["data", option, "0", "--out", "nowhere/numbers.json"])


def test_rows_become_a_table():
    rows = [{"model": "a", "ms": 1234.5678}, {"model": "b", "GiB": 2}]
    assert bench.table(rows).splitlines()[2:] == ["| a | 1235 |  |", "| b |  | 2 |"]


def test_a_step_trains():
    """It is a step: weights move, gradients are gone."""
    model = random_model(SMALL)
    before = [parameter.clone() for parameter in model.parameters()]
    bench.training_step(model, SMALL, 2, HERE)()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2 and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("peer", [bench.WanLike, bench.LatteLike])
def test_peers_are_like_us(peer):
    """Wan's and Latte's transformer take the same clips, and have about as many parameters."""
    pytest.importorskip("diffusers")
    config = replace(SMALL, width=64, text_dim=32)
    ours = sum(parameter.numel() for parameter in random_model(config).parameters())
    model, inputs = peer(config), random_inputs(config)
    assert model(*inputs).shape == inputs[0].shape
    assert ours / 3 < sum(parameter.numel() for parameter in model.parameters()) < 3 * ours


def test_prompts_of_all_lengths_are_measured():
    q, k, _, mask = bench.attention_inputs((4, 2, 6, 5, 8), HERE)
    assert q.shape == (4, 2, 6, 8) and k.shape == (4, 2, 5, 8) and q.requires_grad
    assert mask.sum(1).tolist() == [1, 3, 4, 5]
    assert bench.attention_inputs((4, 2, 6, 6, 8), HERE)[3] is None


@pytest.mark.parametrize("part", ["attention", "train", "data"])
def test_parts_measure_and_write(tmp_path, capsys, part):
    """A part prints its table, and writes it, and its rows with positive numbers."""
    out = tmp_path / "new" / "numbers.json"
    bench.main([part, "--quick", "--device", "cpu", "--out", str(out)])
    text = out.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["arguments"]["part"] == part and "torch" in written["machine"]
    rows = written["result"][part]
    assert bench.table(rows) in text and len(rows) >= ROWS[part]
    for row in rows:
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert numbers and min(numbers) > 0
        assert all("(" in value for title, value in row.items() if "over" in title)  # the quartiles


def test_part_sample_scores_a_checkpoint(tmp_path, encoder_name):
    model = random_model(replace(SMALL, text_dim=16))
    metadata = {"text_encoder": encoder_name, "history": []}
    save_checkpoint(tmp_path / "weights", Checkpoint(model, model, {}, metadata, {}))
    rows = bench.bench_sample(replace(HERE, checkpoint=tmp_path / "weights", count=2))
    assert [row["steps"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 <= row["all right"] <= row["mean of the attributes"] <= 1 and row["s per clip"] > 0


# --------------------------------------------------------------------------------------------------------
# One GPU


def test_a_section_that_fails_does_not_stop_the_others():
    def works(bench):
        return [{"number": 1}]

    def fails(bench):
        raise RuntimeError("no such kernel")

    results = dict(bench_gpu.run_sections({"first": fails, "second": works}, HERE))
    assert results == {"first": [{"failed": "RuntimeError: no such kernel"}], "second": [{"number": 1}]}


def test_a_section_that_failed_is_an_exit_status(tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench_gpu, "SECTIONS", {"values": partial(bench_gpu.run_train, options="--no-option")}
    )
    out = tmp_path / "gpu.json"
    with pytest.raises(SystemExit, match="1"):
        bench.main(["gpu", "--quick", "--device", "cpu", "--out", str(out)])
    assert "RuntimeError" in json.loads(out.read_text())["result"]["values"][0]["failed"]


def test_models_are_skipped_when_the_time_is_over():
    rows = bench.bench_train(replace(HERE, minutes=0))
    assert rows[0]["step"] == "skipped, because the time is over" and rows[1]["TFLOP/s"] > 0


def test_sections_end_when_the_time_is_over(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench_gpu, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    left = []

    def slow(bench):
        left.append(bench.minutes)
        now[0] += 100
        return []

    sections = {"one": slow, "two": slow, "three": slow}
    results = dict(bench_gpu.run_sections(sections, replace(HERE, minutes=3)))
    assert left == pytest.approx([3, 3 - 100 / 60]) and results["two"] == []
    assert "skipped, because 3 minutes are over" in results["three"][0]["failed"]


def test_values_are_compared_with_float64(monkeypatch):
    """Errors of float32 are small. A wrong scale is found."""
    rows = bench_gpu.kernel_values(HERE)
    assert len(rows) == 2 * len(bench.QUICK_SHAPES)
    assert all(0 < row[f"error of {what}"] < 1e-5 for row in rows for what in ("values", "gradients"))

    def wrong(q, k, v, mask, backend):
        return bench.attention(q if backend == "eager" else 1.2 * q, k, v, mask, backend)

    monkeypatch.setattr(bench_gpu, "attention", wrong)
    with pytest.raises(ArithmeticError, match="sdpa, self: relative errors"):
        bench_gpu.kernel_values(HERE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_graphs_are_measured_on_a_gpu():
    """Attention as graphs, and a step as train.py captures it: all of them do what they did before."""
    gpu = replace(HERE, device=torch.device("cuda", 0))
    assert len(bench.bench_attention(gpu)) == 4
    assert [row["step"] for row in bench.bench_train(gpu)[:2]] == ["eager", "captured"]
    weight = torch.zeros(4, device="cuda")
    replay = bench.as_graph(lambda: weight.add_(1))
    before = weight.clone()
    replay()
    assert torch.equal(weight, before + 1)
    losses = bench.captured(lambda: weight.add_(1).sum())
    assert losses() == weight.sum() == 4 * weight[0]


def test_a_train_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="no growth is called 'nothing'"):
        bench_gpu.run_train(HERE, "--quick --grow nothing")


@pytest.mark.slow
def test_part_gpu(tmp_path):
    """All sections on a CPU, with a real training."""
    out = tmp_path / "gpu.json"
    bench.main(["gpu", "--quick", "--device", "cpu", "--out", str(out)])
    sections = json.loads(out.read_text())["result"]
    assert list(sections) == list(bench_gpu.SECTIONS)
    assert not any("failed" in row for rows in sections.values() for row in rows), sections
    (train,) = sections["train.py"]
    assert train["steps"] == 10 and 0 < train["seconds to the first step, after imports"] < train["seconds"]
    assert train["share of it"] == pytest.approx(train["TFLOP/s"] / train["TFLOP/s of the bare step"])
    assert 0 < train["validation loss"] < 2
