"""The tour: tour.ipynb runs from top to bottom, what it says is true, and its pictures lie in the file.

After a change: `TQDM_DISABLE=1 jupyter nbconvert --to notebook --execute --inplace tour.ipynb`.
"""

import json
from pathlib import Path

import pytest

TOUR = Path(__file__).resolve().parents[1] / "tour.ipynb"
CELLS = [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_outputs_in_the_file():
    """All cells were executed, once and in order, without an error or a warning, and the pictures were
    saved."""
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
    assert TOUR.stat().st_size < 1_500_000


@pytest.mark.slow
def test_what_the_tour_says(monkeypatch):
    """With the real text encoders and the included model."""
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    names = {}
    for cell in CELLS:
        exec("".join(cell["source"]), names)
    early, late = names["losses"][:10], names["losses"][-10:]
    assert sum(late) < 0.7 * sum(early)
    assert names["difference"] == 0
    assert names["plain_difference"] > 0.01 * names["largest"]
    assert names["same"]
    after_growth, after_one_step, _ = names["openings"]
    assert set(after_growth[1::2]) == {0}
    assert min(after_one_step[1::2]) > 0
    assert names["rests"][0] == 0 < names["rests"][1]
