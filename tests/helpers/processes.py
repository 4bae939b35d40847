"""Workers in several processes."""

import os
import subprocess
import sys

from helpers.paths import ROOT, TESTS


def worker_environment() -> dict[str, str]:
    """Environment in which workers find our package and the helpers."""
    paths = [str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def launch(num_processes, *arguments, worker="helpers.distributed_worker"):
    """Run the module `worker` in processes that find each other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    done = subprocess.run(
        [*command, "-m", worker, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**worker_environment(), **({} if "gpu" in arguments else {"CUDA_VISIBLE_DEVICES": ""})},
    )
    assert done.returncode == 0, done.stderr[-4000:]
