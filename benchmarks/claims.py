"""The paper's claims, one command each, in a simulated world whose truth is known and whose rules were set before.

    python benchmarks/claims.py 4                          # claim 4: table and figure into docs/claims.md
    python benchmarks/claims.py fill --seconds 540         # make what is missing, for all claims, and stop in time

Parts that exist (in runs/claims, by the world's fingerprint) are not made again. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from lab.store import SEEDS, Store

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Fill, or tell one claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="a claim's number (0: the headline aim), all, or fill")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--seconds", type=float, default=540.0, help="fill: begin no part after so many of CPU")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/claims", help="where results are kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(given.runs, given.seeds)
    if given.what == "fill":
        left = store.fill(given.seconds, lambda line: print(line, flush=True))
        print(json.dumps({"benchmark": "claims", "world": store.world, "parts_left": left}))
        return
    from lab.policy_claims import CLAIMS
    from lab.tables import tell

    for claim in sorted(CLAIMS) if given.what == "all" else [int(given.what)]:
        found = tell(store, claim, ROOT / "docs", CLAIMS)
        sys.stdout.write(json.dumps({"benchmark": "claims", **found}) + "\n")


if __name__ == "__main__":
    main()
