"""Test the paper's claims in a simulated world with known ground truth, by rules set before the runs.

    python benchmarks/claims.py 4                          # claim 4: table and figure into docs/claims.md
    python benchmarks/claims.py fill --seconds 540         # compute missing results of all claims, within the limit

Existing results (in runs/claims, by the world's fingerprint) are not computed again. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from lab.store import CLAIM_SEEDS, ResultStore

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Compute missing results, or write the sections of one or all claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="a claim's number (0: the headline aim), all, or fill")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(CLAIM_SEEDS))
    parser.add_argument("--seconds", type=float, default=540.0, help="fill: start no result after this much CPU time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/claims", help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = ResultStore(args.runs, args.seeds)
    if args.what == "fill":
        parts_left = store.compute_missing(args.seconds, lambda line: print(line, flush=True))
        print(json.dumps({"benchmark": "claims", "world": store.world_fingerprint, "parts_left": parts_left}))
        return
    from lab.policy_claims import CLAIM_FUNCTIONS
    from lab.tables import write_claim_section

    for claim in sorted(CLAIM_FUNCTIONS) if args.what == "all" else [int(args.what)]:
        numbers = write_claim_section(store, claim, ROOT / "docs", CLAIM_FUNCTIONS)
        sys.stdout.write(json.dumps({"benchmark": "claims", **numbers}) + "\n")


if __name__ == "__main__":
    main()
