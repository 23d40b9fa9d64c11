"""`python -m cluster.local`: a Ray cluster of several nodes on this machine, to test jobs under node failures.

Each node is a separate raylet; the nodes share files and processors only. The program prints three environment
variables for jobs, then reads commands from the standard input: `kill` (SIGKILL all processes of the last node, like a
machine failure) and `add`. It answers each with the number of nodes, and stops the cluster at the end of the input.
"""

import argparse
import os
import secrets
import sys
from typing import Any

_OBJECT_STORE_BYTES = 200 * 1024**2


def main() -> None:
    """Run the cluster until the standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description=__doc__.partition(":")[2].strip())
    parser.add_argument("--nodes", type=int, default=3, help="nodes, including the head (default 3)")
    parser.add_argument("--cpus", type=int, default=2, help="logical CPUs per node; may exceed those of the machine")
    arguments = parser.parse_args()
    # Ray reads both at its import.
    os.environ["RAY_AUTH_MODE"] = "token"
    token = os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from ray.cluster_utils import Cluster

    # Ray listens on this machine's network address, because its clients do not use loopback; the token protects it.
    node: dict[str, Any] = {"num_cpus": arguments.cpus, "object_store_memory": _OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        others = [cluster.add_node(**node) for _ in range(arguments.nodes - 1)]
        print(
            f"export RAY_ADDRESS={cluster.address}\nexport RAY_AUTH_MODE=token\nexport RAY_AUTH_TOKEN={token}",
            flush=True,
        )
        for line in sys.stdin:
            if line.strip() == "kill" and others:
                cluster.remove_node(others.pop(), allow_graceful=False)
            elif line.strip() == "add":
                others.append(cluster.add_node(**node))
            print(f"{len(others) + 1} nodes", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
