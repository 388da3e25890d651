"""Tables in Markdown, and the names of scores: what every file of the lab prints with.

Left out: alignment of columns; Markdown needs none.
"""

from statistics import mean, stdev

SCORE_COLUMNS = (  # of a table of scores; a set of prompts has some of them
    "subject", "colour", "motion", "background", "change", "count", "relation", "all",
)  # fmt: skip
BENCHMARK_NAMES = {  # a benchmark and its name for a score: (our set of prompts, our name)
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


def markdown_table(titles, rows) -> str:
    """A table in Markdown, from the titles of its columns and rows of strings."""
    lines = []
    for cells in (titles, ["---"] * len(titles), *rows):
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def score_table(scores: dict[str, dict[str, float]]) -> str:
    """{set of prompts: {name: share}} -> a table with a row for each set."""
    rows = []
    for name, shares in scores.items():
        cells = [f"{shares[column]:.3f}" if column in shares else "" for column in SCORE_COLUMNS]
        rows.append([name, *cells])
    return markdown_table(["", *SCORE_COLUMNS], rows)


def spread(values, digits=3) -> str:
    """Mean and standard deviation over seeds, "0.512 ± 0.011". Values that are None do not count; without
    any the text is empty."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return text


def provenance(found) -> str:
    """The commits and machines that the numbers of a section are from. found: {arm: {seed: result}}."""
    sources = set()
    for by_seed in found.values():
        for result in by_seed.values():
            revision = result["revision"]
            changed = "+" if revision.endswith("+") else ""
            sources.add(f"{revision[:10]}{changed} on {result['machine']}")
    return f"Measured at {'; '.join(sorted(sources))}."
