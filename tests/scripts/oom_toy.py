"""A toy under supervisors whose last rank runs out of memory; writes what came of it for each rank.

argv: a JSON object with `toy`, `shortage`, `out` and `settings`.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from oom_jobs import Shortage, short_of_memory
from toy import Toy

config = json.loads(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
job, memory = short_of_memory(Toy(**config["toy"]), Shortage(**config["shortage"]), rank, **config["settings"])
numbers = [step.number for step in job.steps]
result = {"digest": job.digest(), "parts": job.arc._engine.guard.division.parts, "numbers": numbers}
Path(config["out"], f"result-{rank}.json").write_text(json.dumps(result))
dist.destroy_process_group()
