"""Score an archive on a cluster of two machines, one of which is killed when the first tables are there."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from ray.cluster_utils import Cluster

command, archive, out = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
cluster.wait_for_nodes()
scoring = subprocess.Popen([command, "score", archive, "--out", out, "--address", cluster.address])
while scoring.poll() is None and len(list(Path(out).glob("rows/*.parquet"))) < 1:
    time.sleep(0.05)
is_at_work = scoring.poll() is None
cluster.remove_node(nodes[0], allow_graceful=False)
code = scoring.wait()
cluster.shutdown()
sys.exit(code if is_at_work else "it had ended before the machine was lost")
