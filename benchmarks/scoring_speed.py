"""Time of scoring all messages of ConvAI2 conversations, and that of an earlier commit on the same messages.

git worktree add ../earlier 8e8c912
python benchmarks/scoring_speed.py --config configs/reward/love-human.yaml --earlier ../earlier [--dialogues 20]

Builds a reward model with the members of the config's love section and heads of zeros: the time does not depend on the
weights of the heads. The messages of the sampled dialogues are scored in one call, by a process of its own for each
checkout. Prints seconds and CPU seconds of both; their ratio is that of CPU seconds, which other processes of a busy
machine hardly affect.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from human import read_raw_rows

from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.reward.backbone import get_linear_head, load_classifier
from rluf.reward.metrics import round_for_json
from rluf.reward.model import get_member_folder
from rluf.utils.paths import resolve_cache_folder

SCORE_SCRIPT = """
import json, sys, time, torch
from pathlib import Path

try:
    from rluf.reward.backbone import enable_fast_cpu_matmul
    from rluf.reward.model import RewardModel
    from rluf.types import ScoringItem
except ModuleNotFoundError:  # names of commit 8e8c912
    from rluf.objectives.backbone import quick_cpu_matmul as enable_fast_cpu_matmul
    from rluf.objectives.scorer import RewardModel
    from rluf.objectives.text import Item as ScoringItem
torch.set_num_threads(int(sys.argv[3]))
enable_fast_cpu_matmul()
model = RewardModel.load(Path(sys.argv[1]), batch_tokens=4096)
items = [ScoringItem(messages, response) for messages, response in json.loads(Path(sys.argv[2]).read_text("utf-8"))]
model.score(items[:2], "love")
wall, cpu = time.monotonic(), time.process_time()
model.score(items, "love")
print(json.dumps({"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}))
"""


def save_model(settings: Settings, folder: Path) -> None:
    """Write the members with heads of zeros, and a calibration that both code versions can read."""
    section = settings.reward.love
    for index, member in enumerate(section.member_specs):
        source = resolve_model(member.backbone, resolve_cache_folder(settings))
        model = load_classifier(source, require_all_weights=False, layer_count=member.layers)
        for parameter in get_linear_head(model).parameters():
            parameter.data.zero_()
        model.save_pretrained(str(get_member_folder(folder, index)))
        load_tokenizer(source).save_pretrained(str(get_member_folder(folder, index)))
    # The keys of calibration.json at commit 8e8c912; Calibration.load reads them too.
    calibration = {
        "objective": "love", "members": len(section.member_specs), "max_tokens": section.max_tokens,
        "fused": section.ensemble.shared_head, "next_turn": section.read_at_next_turn,
        "response_alone": [index for index, member in enumerate(section.member_specs) if member.response_only],
    }  # fmt: skip
    (folder / "calibration.json").write_text(json.dumps(calibration), encoding="utf-8")


def time_scoring(checkout: Path, model_folder: Path, items_path: Path) -> dict[str, Any]:
    """Seconds and CPU seconds of scoring the items with the code of `checkout`."""
    result = subprocess.run(
        [sys.executable, "-c", SCORE_SCRIPT, str(model_folder), str(items_path), str(os.cpu_count() or 1)],
        cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    times: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return times


def main() -> None:
    """Build the model, time both checkouts, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--earlier", type=Path)
    parser.add_argument("--dialogues", type=int, default=20)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    settings = load_settings(args.config, args.overrides).settings
    rows_by_dialogue: dict[str, list[dict[str, Any]]] = {}
    for row in read_raw_rows(settings, "love"):
        rows_by_dialogue.setdefault(str(row["conversation_id"]), []).append(row)
    sampled = random.Random(settings.seed).sample(sorted(rows_by_dialogue), args.dialogues)
    items = [(row["messages"], row["response"]) for name in sampled for row in rows_by_dialogue[name]]
    report: dict[str, Any] = {"benchmark": "scoring_speed", "dialogues": args.dialogues, "messages": len(items)}
    with tempfile.TemporaryDirectory() as folder:
        items_path = Path(folder) / "items.json"
        items_path.write_text(json.dumps(items), encoding="utf-8")
        save_model(settings, Path(folder) / "love")
        report["now"] = time_scoring(Path(__file__).resolve().parents[1], Path(folder) / "love", items_path)
        if args.earlier:
            report["earlier"] = time_scoring(args.earlier.resolve(), Path(folder) / "love", items_path)
            report["cpu_ratio"] = report["earlier"]["cpu_seconds"] / report["now"]["cpu_seconds"]
    sys.stdout.write(json.dumps(round_for_json(report)) + "\n")


if __name__ == "__main__":
    main()
