"""Results of the study in words, tables and pictures, from their JSON files alone.

Spread is the standard deviation over seeds. Differences between two arms are taken within each seed, since
both went on from the same base with the same batches and noise. Two or three seeds make a weak test; that its
rule (`RULE`) was fixed before the runs keeps it honest.
"""

import itertools
import json
import math
import re
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from evaluate import COLUMNS, LEFT_OUT, ORIGINALS, table

RULE = (
    "A claim holds if the difference has its sign in every seed and its mean is more than twice its standard"
    " error, it is contradicted if the opposite does, and else it is open."
)
MARKS = "<!-- written by study.py -->", "<!-- end of what study.py has written -->"  # in README.md
TIMED = ("timing", "longer")  # parts of which only the loss on the way is asked

# What is said: comparisons that would all have to hold, each a better arm, a worse one and what is measured:
# the loss on "rich" or "basic" when the budget is spent, that on "basic" after equally many steps, the "last"
# loss of the curve, or a set of prompts, or two such sets, one for each arm.
CLAIMS = {
    "Where new blocks go: insert beats suffix, suffix beats prefix (LLaMA-Pro's order).": (
        ("insert", "suffix", "rich"),
        ("suffix", "prefix", "rich"),
    ),
    "Silent copies keep what was learned better than plain ones.": (
        ("insert", "insert, plain copies", "basic"),
    ),
    "Silent copies learn more than plain ones.": (("insert", "insert, plain copies", "rich"),),
    "On the new data expansion beats going on as it was, and that beats LoRA.": (
        ("insert", "continued", "rich"),
        ("continued", "lora", "rich"),
    ),
    "Expansion forgets less of the old data than going on as it was.": (
        ("insert", "continued", "basic"),
        ("insert", "continued", "basic, equal steps"),
    ),
    "LoRA forgets less than expansion.": (("lora", "insert", "basic"),),
    "Freezing the old blocks, as LLaMA-Pro does, forgets less.": (
        ("insert, old blocks frozen", "insert", "basic"),
    ),
    "The language model helps on prompts of several actors, long or short.": (
        ("insert + llm", "insert", "long"),
        ("insert + llm, short captions", "insert, short captions", "several actors"),
    ),
    "Detailed captions help, if each model is asked as it was taught, with or without the language model.": (
        ("insert", "insert, short captions", ("long", "several actors")),
        ("insert + llm", "insert + llm, short captions", ("long", "several actors")),
    ),
    "Growing a base that has learned `basic` beats the large model that spends all on `rich`.": (
        ("insert", "large from scratch", "rich"),
    ),
    "Growing a base that has learned `basic` beats growing one that has learned nothing.": (
        ("insert", "insert into an untrained base", "rich"),
    ),
    "The language model knows words that were never trained on.": tuple(
        (arm, "base encoder", "held-out words") for arm in ("llm last", "llm middle", "llm mean")
    ),
    "It costs something on words that were.": tuple(
        ("base encoder", arm, "seen") for arm in ("llm last", "llm middle", "llm mean")
    ),
    "What helps with new words is what it says, not a second branch or its parameters.": (
        ("llm mean", "minilm twice", "held-out words"),
        ("llm mean, nothing hidden", "wrong captions, nothing hidden", "held-out words"),
    ),
    "The mean over its layers says more than the last one.": (("llm mean", "llm last", "held-out words"),),
    "A refiner helps.": tuple(
        (f"{arm}, refiner", arm, "held-out words") for arm in ("llm last", "llm middle", "llm mean")
    ),
}


def attributes(scores) -> float:
    """The scores of a set of prompts -> the mean over what is asked for one by one."""
    return mean(scores[name] for name in COLUMNS if name in scores and name != "all")


def measure(result, name) -> float:
    """A number of a result: the loss on "basic" or "rich", the "last" loss of its curve, or the mean over the
    attributes of a set of prompts."""
    if name == "last":
        return losses_of(result, "val_loss")[-1][2]
    scores = result["scores"]
    losses = {"basic": "val_loss", "rich": "rich_loss"}
    return mean(scores[losses[name]]) if name in losses else attributes(scores[name])


def spread(values, digits=3) -> str:
    """Mean and standard deviation over seeds, "0.512 ± 0.011"; nothing of nothing."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def markdown(titles, rows) -> str:
    """A table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def differences(better, worse, name) -> list[float]:
    """By how much one arm is better in what `name` says (see `CLAIMS`), within each seed that both have; both
    are {seed: result}."""
    pairs = [(better[seed], worse[seed]) for seed in sorted(better.keys() & worse.keys())]
    if name == "basic, equal steps":
        curves = [[losses_of(result, "old_val_loss") for result in pair] for pair in pairs]
        steps = [min(curve[-1][0] for curve in pair) for pair in curves]
        return [at(b, step) - at(a, step) for (a, b), step in zip(curves, steps, strict=True)]
    if name in ("basic", "rich", "last"):  # less is better
        return [measure(b, name) - measure(a, name) for a, b in pairs]
    mine, other = name if isinstance(name, tuple) else (name, name)
    return [measure(a, mine) - measure(b, other) for a, b in pairs]


def verdict(values) -> str:
    """Differences by seed -> "holds", "contradicted" or "open"."""
    if len(values) < 2:
        return "open"
    clear = abs(mean(values)) > 2 * stdev(values) / math.sqrt(len(values))
    same = all(value > 0 for value in values) or all(value < 0 for value in values)
    return "open" if not (clear and same) else "holds" if values[0] > 0 else "contradicted"


def losses_of(result, key):
    """The curve of a loss -> [(steps, FLOPs so far, loss)]."""
    return [(r["step"], r["flops"], r[key]) for r in result["curve"] if key in r]


def at(curve, step) -> float:
    """The loss at a step of a curve from `losses_of`, on the straight line between its points."""
    return float(np.interp(step, [point[0] for point in curve], [point[2] for point in curve]))


def reached(points, value) -> float | None:
    """Where the line through [(x, loss)] is down at `value` for the first time, None if it never is."""
    if points[0][1] <= value:
        return points[0][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 <= value:
            return x0 + (x1 - x0) * (y0 - value) / (y0 - y1)
    return None


def gaps(result, beside) -> list[tuple[int, float]]:
    """How much higher the training loss is than that of another arm -> [(step, difference)]. Both have seen
    the same clips at the same times and noise, so most of the noise cancels."""
    mine, other = ({r["step"]: r["loss"] for r in each["curve"] if "loss" in r} for each in (result, beside))
    return [(step, mine[step] - other[step]) for step in sorted(mine.keys() & other.keys())]


def spike(result, beside, steps=50) -> float | None:
    """The mean gap to another arm over the first steps; None if none was written down."""
    first = [gap for step, gap in gaps(result, beside) if step <= steps]
    return mean(first) if first else None


def steps_to_mix(result, beside, window=10) -> int | None:
    """The first step from which on the mean gap to another arm, over `window` entries of the curve, is
    negative; None if there is none."""
    found = gaps(result, beside)
    for i in range(len(found) - window + 1):
        if mean(gap for _, gap in found[i : i + window]) < 0:
            return found[i][0]
    return None


def score_tables(found, first) -> list[str]:
    """The tables of scores of a part: means by set of prompts, gains over the arm `first`, and all of it by
    attribute. found: {arm: {seed: result}}."""
    any_scores = next(iter(next(iter(found.values())).values()))["scores"]
    sets = [name for name, scores in any_scores.items() if isinstance(scores, dict)]

    def row(arm, name):
        return spread([measure(result, name) for result in found[arm].values()])

    text = [
        "Mean over the attributes of each set of prompts:",
        markdown(["arm", *sets], [[arm, *(row(arm, name) for name in sets)] for arm in found]),
    ]
    if first in found:
        gains = [
            [arm, *(spread(differences(found[arm], found[first], name)) for name in sets)]
            for arm in found
            if arm not in ("base", first)
        ]
        text += [f"Gain over *{first}*, within each seed:", markdown(["arm", *sets], gains)]
    for name in sets:
        columns = [column for column in COLUMNS if column in any_scores[name]]
        rows = [
            [arm, *(spread([r["scores"][name][c] for r in found[arm].values()]) for c in columns)]
            for arm in found
        ]
        text += [f"{name.capitalize()}, by attribute:", markdown(["arm", *columns], rows)]
    return text


def growth_section(found, starts) -> list[str]:
    """The tables of part growth: what was learned and forgotten, by t, by the names of others, and scores.
    starts: {arm: what it goes on from}."""
    going_on = [arm for arm in found if starts[arm] == "base"]
    final = {arm: {seed: r["curve"][-1]["step"] for seed, r in found[arm].items()} for arm in found}
    equal = min((min(final[arm].values()) for arm in going_on), default=0)
    rows = []
    for arm, by_seed in found.items():
        others = found.get("continued", {})
        pairs = [(r, others[seed]) for seed, r in by_seed.items() if seed in others]
        other = "short" in arm or arm == "base"  # its loss on the way is that on other clips or captions
        same = arm in going_on and not other and "llm" not in arm  # reads all captions that *continued* does
        cells = [spread([measure(r, name) for r in by_seed.values()], 4) for name in ("rich", "basic")]
        for key in ("val_loss", "old_val_loss"):
            curves = [losses_of(r, key) for r in by_seed.values() if key == "old_val_loss" or not other]
            cells.append(spread([at(curve, equal) for curve in curves if curve], 4))
        if same and arm != "continued":
            mixed = [steps_to_mix(*pair) for pair in pairs]
            cells += [spread([spike(*pair) for pair in pairs], 4)]
            cells += [", ".join("never" if step is None else str(step) for step in mixed)]
        rows.append([arm, str(round(mean(final[arm].values()))), *cells, *[""] * (6 - len(cells))])
    titles = ["arm", "steps", "rich", "basic", f"rich, step {equal}", f"basic, step {equal}"]
    text = [
        "Loss on held-out clips, `rich` with detailed and `basic` with short captions, when the budget is"
        " spent, and after equally many steps since the base (or the start). The spike is the training loss"
        " over the first 50 steps less that of *continued* on the same clips, captions and noise; an arm has"
        " mixed at the step from which on it is below *continued* for 100 steps (for each seed).",
        markdown([*titles, "spike", "steps to mix"], rows),
    ]
    for name, key in (("rich", "rich_loss"), ("basic", "val_loss")):
        rows = [
            [arm, *(spread([r["scores"][key][b] for r in by_seed.values()], 4) for b in range(8))]
            for arm, by_seed in found.items()
        ]
        text += [f"Loss on `{name}` by t, from noise to clip, in eight equally likely slices:"]
        text += [markdown(["arm", *map(str, range(1, 9))], rows)]
    arms = [arm for arm in ("base", "lora", "insert", "insert + llm", "large from scratch") if arm in found]
    rows = []
    for theirs, (name, column) in ORIGINALS.items():
        values = [[r["scores"][name].get(column) for r in found[arm].values()] for arm in arms]
        rows.append([theirs, *map(spread, values)])
    text += [f"By others' names; without counterpart: {LEFT_OUT}.", markdown(["benchmark", *arms], rows)]
    return text + score_tables(found, "continued")


def savings(by_seed, targets) -> list:
    """For each seed that both have: by what factor fewer FLOPs an arm needed for the final loss of the large
    model from scratch, None if it did not get there."""
    factors = []
    for seed in sorted(by_seed.keys() & targets.keys()):
        *_, (_, budget, target) = losses_of(targets[seed], "val_loss")
        spent = reached([(flops, loss) for _, flops, loss in losses_of(by_seed[seed], "val_loss")], target)
        factors.append(spent and budget / spent)
    return factors


def since_growth(arm, seed, by_arm, starts):
    """A result whose curve begins with those of what the arm went on from, back to the last growth: the whole
    life of that model. by_arm: {arm: {seed: result}}; starts: {arm: what it goes on from}."""
    result, curve = by_arm[arm][seed], []
    while True:
        curve = by_arm[arm][seed]["curve"] + curve
        if "--grow" in by_arm[arm][seed]["arguments"] or seed not in by_arm.get(starts[arm], {}):
            return result | {"curve": curve}
        arm = starts[arm]


TIMING = (
    "**Growing needs fewer FLOPs than training the large model from scratch (Stacking Your Transformers: 1.5"
    " times fewer).** Loss on `rich` when the budget is spent, and how many times fewer FLOPs, those of the"
    " small model included, were enough for the final loss of *large from scratch*. A grown model counts from"
    " its growth on; *never grown* is the small model, for the whole budget:"
)
LONGER = "**Nearer to its limit it is better to grow a small model than to go on.** Four times that budget:"


def timing_table(found, goal) -> str:
    """The table of a part of losses alone; `goal` is the arm whose last one is to be reached with less."""
    rows, targets, small = [], found.get(goal, {}), found.get("never grown", {})
    for arm, by_seed in found.items():
        factors = savings(by_seed, targets) if by_seed is not targets else []
        saved = spread(factors, 2) if all(factors) else ""
        told = ", ".join(f"{f:.2f}" if f else "never" for f in factors)
        lower = differences(by_seed, small, "last") if by_seed is not small else []
        last = [measure(r, "last") for r in by_seed.values()]
        rows.append([arm, spread(last, 4), saved, told, spread(lower, 4), verdict(lower) if lower else ""])
    titles = ["arm", "final loss", f"times fewer FLOPs than *{goal}*", "by seed"]
    return markdown([*titles, "lower than *never grown* by", "in every seed"], rows)


def claims(found) -> list[str]:
    """A paragraph for each claim of whose arms some are there: the verdict, and the differences it rests on.
    A comparison that is missing is open; one that is contradicted decides."""
    text = []
    for claim, comparisons in CLAIMS.items():
        told, verdicts = [], []
        for better, worse, name in comparisons:
            values = differences(found.get(better, {}), found.get(worse, {}), name)
            verdicts.append(verdict(values))
            if values:
                what = " against ".join(name) if isinstance(name, tuple) else name
                told.append(f"*{better}* over *{worse}*, {what}: {spread(values, 4)} ({verdicts[-1]})")
        if told:
            order = ("contradicted", "open", "holds")
            text.append(f"**{claim}** {min(verdicts, key=order.index).capitalize()}. {'; '.join(told)}.")
    return text


COLOURS = [f"C{i}" for i in range(10)] + ["goldenrod", "black", "navy", "lime", "tomato", "teal"]


def new_plot(**labels):
    """-> a figure and its axes, drawn without a screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.add_subplot(**labels)


def save_plot(figure, path):
    """The same bytes for the same numbers."""
    figure.savefig(path, dpi=100, metadata={"Software": None})


def plot_losses(found, path, dashed=()):
    """Loss on `rich` over FLOPs, means over seeds."""
    figure, axes = new_plot(xlabel="FLOPs, those of the base included", ylabel="loss on rich", yscale="log")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    for number, (arm, by_seed) in enumerate(found.items()):
        if "rich" not in by_seed[min(by_seed)]["arguments"] or "short" in arm:  # the latter's loss is another
            continue
        curves = [losses_of(result, "val_loss") for result in by_seed.values()]
        points = [[mean(v) for v in zip(*point, strict=True)] for point in zip(*curves, strict=False)]
        flops, losses = [p[1] for p in points[1:]], [p[2] for p in points[1:]]
        axes.plot(
            flops, losses, "--" if arm in dashed else "-", color=COLOURS[number % len(COLOURS)], label=arm
        )
    axes.legend(fontsize=8)
    save_plot(figure, path)


def plot_forgetting(found, starts, path):
    """What was gained on `rich` against what was forgotten of `basic`."""
    base = found.get("base", {})
    figure, axes = new_plot(
        xlabel="forgotten: loss on basic, more than the base's",
        ylabel="learned: loss on rich, less than the base's",
    )
    points = []
    for number, (arm, by_seed) in enumerate(found.items()):
        if starts[arm] == "base" and base.keys() & by_seed.keys():
            x, y = ([-d for d in differences(by_seed, base, "basic")], differences(by_seed, base, "rich"))
            points.append((mean(y), mean(x), y, x, arm, COLOURS[number % len(COLOURS)]))
    for i, (height, place, y, x, arm, colour) in enumerate(sorted(points)):
        bars = [stdev(v) if len(v) > 1 else 0 for v in (y, x)]
        axes.errorbar(place, height, *bars, "o", color=colour, capsize=2)
        away = (5, (4, -11)[i % 2])  # neighbours have their names above and below
        axes.annotate(arm, (place, height), xytext=away, textcoords="offset points", fontsize=8, color=colour)
    save_plot(figure, path)


def plot_timing(found, targets, results: Path):
    """How much is saved, over the share of the budget that was spent before growth."""
    figure, axes = new_plot(
        xlabel="% of the budget spent on the small model",
        ylabel="times fewer FLOPs to the loss of the large one",
    )
    axes.axhline(1, color="grey", lw=1)
    shares = range(55, 101)
    axes.plot(shares, [100 / share for share in shares], ":", color="C0", label="at the moment of growth")
    for arm, by_seed in found.items():
        factors = [f for f in savings(by_seed, targets) if f]
        if share := re.search(r"at (\d+) %", arm):
            axes.plot([int(share[1])] * len(factors), factors, "sC1" if "x 4" in arm else "oC0")
        elif factors:
            axes.axhline(mean(factors), color="C2", ls="--", label=f"{arm}: the small model")
    axes.plot([], [], "o", color="C0", label="twice the blocks")
    axes.plot([], [], "s", color="C1", label="four times")
    axes.legend()
    save_plot(figure, results / "timing.png")


def write_report(results: Path, parts, readme: Path | None = None) -> str:
    """Tables, plots and verdicts of what is in `results`/PART/*.json -> the text, which is also written to
    results/README.md, and the first tables of it into `readme`, between `MARKS`. parts: {part: {arm: (what it
    goes on from, arguments)}}. Raises FileNotFoundError if there is nothing."""
    found = {}
    for part, arms in parts.items():
        every = [json.loads(file.read_text()) for file in sorted((results / part).glob("*.json"))]
        by_arm = {arm: {r["seed"]: r for r in every if r["arm"] == arm} for arm in arms}
        if part in TIMED:
            before = {arm: start for arm, (start, _) in arms.items()}
            by_arm = {
                arm: {seed: since_growth(arm, seed, by_arm, before) for seed in by_seed}
                for arm, by_seed in by_arm.items()
            }
        found[part] = {
            arm: dict(sorted(by_seed.items())) for arm, by_seed in by_arm.items() if by_seed and arm[0] != "_"
        }
    if not any(found.values()):
        raise FileNotFoundError(f"there are no results in {results}: run `python study.py` first")
    every = [r for by_arm in found.values() for by_seed in by_arm.values() for r in by_seed.values()]
    starts = {arm: start for arm, (start, _) in parts["growth"].items()}
    targets = found["growth"].get("large from scratch", {})
    seeds = ", ".join(map(str, sorted({r["seed"] for r in every})))
    short, details = [f"Mean ± standard deviation over seeds {seeds}."], []
    wanted = 3 * sum(arm[0] != "_" for arms in parts.values() for arm in arms)
    if len(every) < wanted:
        short[0] += f" Under way: {len(every)} of {wanted} runs are in."
    if (file := results / "reader.json").is_file():
        details += ["## The reader", "What it reads of true clips:", table(json.loads(file.read_text()))]
    if found["growth"]:
        dashed = [arm for arm, start in starts.items() if start != "base"]
        plot_losses(found["growth"], results / "loss.png", dashed)
        plot_forgetting(found["growth"], starts, results / "forgetting.png")
        first, losses, *rest = growth_section(found["growth"], starts)
        short += [RULE, *claims(found["growth"]), first, losses]
        short += ["![Loss over FLOPs](loss.png)", "![Learned and forgotten](forgetting.png)"]
        if (results / "gallery.gif").is_file():
            short += ["![Base, LoRA, expansion, expansion with an LLM](gallery.gif)"]
        details += ["## Growth", *rest]
    if found["timing"] and targets:
        plot_timing(found["timing"], targets, results)
        with_large = found["timing"] | {"large from scratch": targets}
        short += [TIMING, timing_table(with_large, "large from scratch"), "![When to grow](timing.png)"]
    if found["longer"]:
        plot_losses(found["longer"], results / "longer.png")
        short += [LONGER, timing_table(found["longer"], "never grown"), "![Longer](longer.png)"]
    if found["language"]:
        scores = score_tables(found["language"], "base encoder")
        short += [*claims(found["language"]), "**The language model.** " + scores[0], *scores[1:4]]
        details += ["## Language", *scores[4:]]
    revisions = sorted(
        {f"{r['revision'][:10]}{'+' * r['revision'].endswith('+')} on {r['machine']}" for r in every}
    )
    short.append(f"Measured at {'; '.join(revisions)}.")
    text = "\n\n".join(["# Results", "Made by `python study.py --report`.", *short, *details]) + "\n"
    (results / "README.md").write_text(text)
    if readme and all(mark in (page := readme.read_text()) for mark in MARKS):
        before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
        inside = "\n\n".join(short).replace("](", f"]({results.name}/")
        readme.write_text(f"{before}{MARKS[0]}\n\n{inside}\n\n{MARKS[1]}{after}")
    return text
