"""Test the paper's claims in a simulated world with known ground truth, by rules set before the runs.

    python benchmarks/claims.py fill --seconds 540         # compute missing results of all seeds, within the limit
    python benchmarks/claims.py write                      # verdicts and tables into docs/claims.md

Existing results (in runs/claims, by the world's fingerprint) are not computed again. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from lab.claim_results import CLAIM_FUNCTIONS
from lab.page import write_page
from lab.store import CLAIM_SEEDS, ResultStore

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Compute missing results, or write the results of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fill", "write"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(CLAIM_SEEDS))
    parser.add_argument("--seconds", type=float, default=540.0, help="fill: start no result after this much CPU time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/claims", help="folder of the results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/claims.md", help="write: the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = ResultStore(args.runs, args.seeds)
    if args.what == "fill":
        numbers = {"parts_left": store.compute_missing(args.seconds, lambda line: print(line, flush=True))}
    else:
        numbers = write_page(args.page, store, CLAIM_FUNCTIONS)
    print(json.dumps({"benchmark": "claims", "world": store.world_fingerprint, **numbers}))


if __name__ == "__main__":
    main()
