"""A Ray cluster of several nodes on this machine, to try what a job does when nodes come and go.

The nodes are raylets of their own: they share files and processors, and nothing else. Killing one takes its processes
with it, as a machine that fails does.
"""

from types import TracebackType
from typing import Any

from ray.cluster_utils import Cluster

_OBJECT_STORE_BYTES = 200 * 1024**2


class LocalCluster:
    """Starts a head and other nodes; ends all of them when the `with` block ends.

    Args:
        nodes: Their number, the head among them.
        cpus_per_node: Logical CPUs of each; they may be more than there are.

    Attributes:
        address: For `ray.address` of a job, or RAY_ADDRESS.
    """

    def __init__(self, nodes: int, *, cpus_per_node: int) -> None:
        self._node_arguments: dict[str, Any] = {"num_cpus": cpus_per_node, "object_store_memory": _OBJECT_STORE_BYTES}
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={**self._node_arguments, "include_dashboard": False, "node_ip_address": "127.0.0.1"},
        )
        self.address: str = self._cluster.address
        self._others: list[Any] = []
        for _ in range(nodes - 1):
            self.add_node()

    def add_node(self) -> None:
        """Start another node and wait until the cluster knows it."""
        self._others.append(self._cluster.add_node(**self._node_arguments, node_ip_address="127.0.0.1"))

    def kill_node(self) -> None:
        """SIGKILL all processes of the node that came last.

        Raises:
            IndexError: If there is none but the head.
        """
        self._cluster.remove_node(self._others.pop(), allow_graceful=False)

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cluster.shutdown()
