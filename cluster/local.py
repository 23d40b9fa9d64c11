"""`python -m cluster.local`: a Ray cluster of several nodes on this machine, to try what jobs do when nodes go.

The nodes are raylets of their own: they share files and processors, and nothing else. Three lines tell what a job needs
in its environment; after that the lines `kill` (SIGKILL all processes of the node that came last, as when a machine
fails) and `add` on the standard input are obeyed, each answered with the number of nodes, and its end ends all.
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
    parser.add_argument("--nodes", type=int, default=3, help="the head among them (default 3)")
    parser.add_argument("--cpus", type=int, default=2, help="logical CPUs of each; more than there are is fine")
    arguments = parser.parse_args()
    # Ray reads both when it is imported.
    os.environ["RAY_AUTH_MODE"] = "token"
    token = os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from ray.cluster_utils import Cluster

    # At this machine's own address, as every local Ray, and behind the token: Ray's clients do not look at loopback.
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
