"""docs/supported_models.md says how each family is trained: packed, one sample per row, or refused with the reason."""

from __future__ import annotations

import pytest
import torch

from benchmarks.families import FAMILIES, PAGE, describe_family

FAST_FAMILIES = ("Mixtral", "Gemma 2")


@pytest.mark.parametrize(
    "family", [name if name in FAST_FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_each_row_of_the_page_holds(family: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    row = describe_family(family)
    torch.set_num_threads(threads)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    written_cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith(f"| {family} |")
    ]
    # The size of an error depends on the machine.
    assert [written[:2] for written in written_cells] == [cells[:2]]
    if cells[1] != "refused":
        assert cells[2] == "below 1e-5"
        assert float(cells[3]) >= 0.999
