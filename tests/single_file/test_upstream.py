"""docs/upstream.md: its change to the earlier scripts has the gradients that its table says."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F


DOCS = Path(__file__).parents[2] / "docs" / "upstream.md"
CHANGE = re.search(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)[1]


def gradients(change: str) -> list[float]:
    """Of the earlier loss on the errors of winner and loser, each 0.05."""
    errors = [torch.tensor([0.05], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    names = {"torch": torch, "model_losses_w": errors[0], "model_losses_l": errors[1]}
    exec(change, names)
    loss = errors[0].mean() - (0.1 * F.logsigmoid(names["log_odds"])).mean()
    return [gradient.item() for gradient in torch.autograd.grad(loss, errors)]


@pytest.mark.parametrize("row, change", [("before", "log_odds = model_losses_w - model_losses_l"), ("after", CHANGE)])
def test_the_table_of_gradients(row, change):
    cells = re.search(rf"^\| {row} \|(.*)", DOCS.read_text(), flags=re.MULTILINE)[1]
    told = [float(number) for number in re.findall(r"[+-]\d\.\d\d", cells)]
    assert len(told) == 2
    assert gradients(change) == pytest.approx(told, abs=0.005)
