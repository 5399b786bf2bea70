"""What each task of test_cluster.py's srun runs: join the job, sum the ranks, say where it was."""

from __future__ import annotations

import json
import os

import torch
from torch import distributed

from minitron_nemo.parallel import launch

launch.join_job()
total = torch.tensor(float(launch.rank() + 1))
distributed.all_reduce(total)
report = {
    "host": os.uname().nodename,
    "rank": launch.rank(),
    "world_size": launch.world_size(),
    "local_rank": int(os.environ["SLURM_LOCALID"]),
    "total": total.item(),
}
print(json.dumps(report), flush=True)
launch.shutdown()
