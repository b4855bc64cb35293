"""From the SIGSTOP of one rank to the verdict that it hangs, and to the first new step of all ranks.

A limit is a factor times the longest stay in a section over the last 512 to 1,024 steps (about the 99.9th percentile);
the factor is 10 and the limit at least 60 s by default, because a false alarm costs more than a late one. Here both are
small, to see what the layer itself adds. Hangs that nobody caused (false alarms) are counted.

    python benchmarks/bench_hang.py
    python benchmarks/bench_hang.py --model gpt10m --ranks 4 --stops 10
"""

from __future__ import annotations

import argparse
import random
import signal

from bench_restart import kill_one, running
from stats import describe, setting


def main() -> None:
    """Stops ranks of one job in turn and prints what that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mlp", "gpt10m"), default="gpt10m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--between", type=int, default=30, help="steps from a restart to the next stop")
    parser.add_argument("--factor", type=float, default=2.0, help="hang_factor")
    parser.add_argument("--min-s", type=float, default=0.5, help="hang_min_s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.extra = [f"--hang-factor={arguments.factor}", f"--hang-min-s={arguments.min_s}"]
    arguments.store, arguments.limit_s = False, 120.0
    rng = random.Random(arguments.seed)
    print((__doc__ or "").splitlines()[0])
    print(f"setting: {setting()}; {arguments.model} on {arguments.ranks} ranks, hang_factor {arguments.factor}")
    with running("arc", arguments) as job:
        restarts = [kill_one(job, number % arguments.ranks, rng, signal.SIGSTOP) for number in range(arguments.stops)]
        hangs = job.incidents("hang")
    lost = [number for number, restart in enumerate(restarts) if restart.seconds is None]
    print(f"recovered {len(restarts) - len(lost)} of {len(restarts)}; hangs seen: {len(hangs)}")
    ratios = [hang["seen_after_s"] / (hang["limit_s"] / arguments.factor) for hang in hangs]
    beyond = [hang["seen_after_s"] - hang["limit_s"] for hang in hangs]
    print(f"seen after / longest stay (or min-s / factor): {describe(ratios, 'times', 2)}, worst {max(ratios):.2f}")
    print(f"beyond the limit: {describe(beyond, 's')}, worst {max(beyond):.3f} s")
    print(f"to the next step: {describe([r.seconds for r in restarts if r.seconds is not None], 's')}")
    if lost:
        raise SystemExit(f"not recovered from stops {lost}")


if __name__ == "__main__":
    main()
