"""docs/supported_models.md says how each family is trained: packed, one sample per row, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from benchmarks import families
from benchmarks.families import COMMON, FAMILIES, PAGE, describe_family
from rluf.backends.weight_transfer import base
from rluf.config.settings import Settings
from rluf.errors import ModelError
from rluf.train.startup_check import check_weight_names

FAST_FAMILIES = ("Mixtral", "Gemma 2", "GPT-2", "MPT")


@pytest.mark.slow
def test_the_installed_vllm_answers() -> None:
    """Asked once for all families: the rows of the page read the same answer."""
    problems = families._find_engine_problems()
    assert (problems["MptForCausalLM"], problems["FalconForCausalLM"]) == ("missing", "")


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


def test_a_tied_head_without_a_known_source_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with code of the model's own, which may not say what its head is tied to."""
    config = transformers.GPT2Config(**COMMON)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    monkeypatch.setattr(base, "find_tied_sources", lambda folder, names: {})
    message = r"output head lm_head\.weight is tied to a weight that its code does not name.*tie_word_embeddings=False"
    with pytest.raises(ModelError, match=message):
        check_weight_names(Settings(), tmp_path)
