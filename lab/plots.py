"""The pictures of the study, from the results that lab/report.py reads.

The same numbers give the same bytes. A curve is a mean over seeds, and a bar or a band is the standard
deviation; `plot_actors` draws runs that continue each other, without a spread.
"""

import itertools
import math
import re
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure

from lab.tables import SCORE_COLUMNS
from lab.verdicts import gains, loss_curve, savings

PLOT_COLOURS = [f"C{i}" for i in range(10)] + ["goldenrod", "black", "navy", "lime", "tomato", "teal"]
WHEN = ("before", "at growth", "after")


def new_plot(**labels):
    """-> a figure and its axes, drawn without a screen."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.add_subplot(**labels)


def save_plot(figure, path):
    """Write a picture; the same numbers give the same bytes."""
    figure.savefig(path, dpi=100, metadata={"Software": None})


def mean_curve(by_seed):
    """The mean over seeds of the curves of a validation loss -> (FLOPs, losses), without the start."""
    curves = [loss_curve(result, "val_loss") for result in by_seed.values()]
    flops, losses = [], []
    for points in zip(*curves, strict=False):  # point i of every seed
        flops.append(mean(point[1] for point in points))
        losses.append(mean(point[2] for point in points))
    return flops[1:], losses[1:]


# --------------------------------------------------------------------------------------------------------
# Losses of the parts growth, timing and longer. found: {arm: {seed: result}}


def plot_losses(found, path: Path, dashed=()):
    """Loss on `rich` over FLOPs, means over seeds."""
    figure, axes = new_plot(xlabel="FLOPs, those of the base included", ylabel="loss on rich", yscale="log")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    for number, (arm, by_seed) in enumerate(found.items()):
        result = by_seed[min(by_seed)]
        if "rich" not in result["arguments"] or "short" in arm:  # its loss is that of other captions
            continue
        style = "--" if arm in dashed else "-"
        colour = PLOT_COLOURS[number % len(PLOT_COLOURS)]
        axes.plot(*mean_curve(by_seed), style, color=colour, label=arm)
    axes.legend(fontsize=8)
    save_plot(figure, path)


def plot_forgetting(found, starts, path: Path):
    """What was gained on `rich` against what was forgotten of `basic`."""
    base = found.get("base", {})
    figure, axes = new_plot(
        xlabel="forgotten: loss on basic, more than the base's",
        ylabel="learned: loss on rich, less than the base's",
    )
    points = []
    for number, (arm, by_seed) in enumerate(found.items()):
        if starts[arm] == "base" and base.keys() & by_seed.keys():
            forgotten = [-value for value in gains(by_seed, base, "basic")]
            learned = gains(by_seed, base, "rich")
            colour = PLOT_COLOURS[number % len(PLOT_COLOURS)]
            points.append((mean(learned), mean(forgotten), learned, forgotten, arm, colour))
    for i, (y, x, learned, forgotten, arm, colour) in enumerate(sorted(points)):
        bars = [stdev(values) if len(values) > 1 else 0 for values in (learned, forgotten)]
        axes.errorbar(x, y, *bars, "o", color=colour, capsize=2)
        offset = (5, 4) if i % 2 == 0 else (5, -11)  # neighbours have their names above and below
        axes.annotate(arm, (x, y), xytext=offset, textcoords="offset points", fontsize=8, color=colour)
    save_plot(figure, path)


def plot_timing(found, targets, path: Path):
    """How much is saved, over the share of the budget that was spent before growth."""
    figure, axes = new_plot(
        xlabel="% of the budget spent on the small model",
        ylabel="times fewer FLOPs to the loss of the large one",
    )
    axes.axhline(1, color="grey", lw=1)
    shares = range(55, 101)
    axes.plot(shares, [100 / share for share in shares], ":", color="C0", label="at the moment of growth")
    for arm, by_seed in found.items():
        factors = [factor for factor in savings(by_seed, targets) if factor]
        share = re.search(r"at (\d+) %", arm)
        if share:
            axes.plot([int(share[1])] * len(factors), factors, "sC1" if "x 4" in arm else "oC0")
        elif factors:
            axes.axhline(mean(factors), color="C2", ls="--", label=f"{arm}: the small model")
    axes.plot([], [], "o", color="C0", label="twice the blocks")
    axes.plot([], [], "s", color="C1", label="four times")
    axes.legend()
    save_plot(figure, path)


# --------------------------------------------------------------------------------------------------------
# What the blocks do (lab/blocks.py). found: {(where, when): {seed: result}}


def draw_blocks(axes, by_seed, name, when, places):
    """A number of each block at its place in the grown model, mean and standard deviation over seeds; new
    blocks are hollow. by_seed: {seed: result} of one kind of checkpoint."""
    values = np.array([result[name] for result in by_seed.values()])  # (seeds, blocks)
    middle, deviation = values.mean(0), values.std(0, ddof=len(values) > 1)
    number = WHEN.index(when)
    colour = f"C{number}"
    beside = [place + 0.2 * (number - 1) for place in places]  # the three kinds stand side by side
    axes.errorbar(beside, middle, deviation, color=colour, capsize=2, ls="", label=when)
    for place, value, new in zip(beside, middle, next(iter(by_seed.values()))["new"], strict=True):
        axes.plot(place, value, "o", ms=5, color=colour, mfc="white" if new else colour)


def draw_column(column, found, where):
    """Importance and removal cost, before growth and of the models whose new blocks went `where`, one above
    the other. The blocks of the base stand where they are after growth."""
    grown = found.get((where, "after")) or found.get((where, "at growth"))
    if not grown:
        return
    new = next(iter(grown.values()))["new"]
    old_places = [place for place, is_new in enumerate(new) if not is_new]
    places = {"before": old_places, "at growth": range(len(new)), "after": range(len(new))}
    for axes, name in zip(column, ("importance", "cost"), strict=True):
        for when in WHEN:
            by_seed = found.get(("" if when == "before" else where, when))
            if by_seed:
                draw_blocks(axes, by_seed, name, when, places[when])
    column[0].set(title=where)
    column[0].legend(fontsize=8)
    column[1].set(xlabel="block")


def plot_blocks(found, path: Path):
    """What the blocks do, for models whose blocks were inserted, and for those that got them at the end."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    for axes, label in zip(grid[:, 0], ("importance", "removal cost"), strict=True):
        axes.set_yscale("symlog", linthresh=1e-4)  # straight below that: zero is a value too
        axes.set(ylabel=label)
    for column, where in zip(grid.T, ("insert", "suffix"), strict=True):
        draw_column(column, found, where)
    save_plot(figure, path)


# --------------------------------------------------------------------------------------------------------
# Complex prompts, over the FLOPs of training (lab/actors.py)


def plot_actors(result, path: Path):
    """Accuracy over training FLOPs: each attribute of prompts of several actors, and everything at once by
    number of actors. A dotted line stands where one run ends and the next one begins."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    points = result["points"]
    flops = [point["flops"] for point in points]
    scores = [point["scores"] for point in points]
    for name in SCORE_COLUMNS[:-1]:
        left.plot(flops, [sets["several actors"].get(name, math.nan) for sets in scores], "o-", label=name)
    for name in scores[0]:
        if name not in ("several actors", "long"):  # those are the means of two and three actors
            style = "o--" if name.startswith("long") else "o-"
            right.plot(flops, [sets[name]["all"] for sets in scores], style, label=name)
    left.set(title="Several actors: each attribute", ylabel="share that is right", ylim=(0, 1.02))
    right.set(title="Everything right, by number of actors")
    for axes in (left, right):
        axes.set(xlabel="FLOPs of training")
        for before, after in itertools.pairwise(points):
            if Path(after["checkpoint"]).parent != Path(before["checkpoint"]).parent:
                axes.axvline(before["flops"], color="grey", linestyle=":")
        axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    save_plot(figure, path)
