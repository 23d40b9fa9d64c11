"""Metrics of the training for Prometheus, which reads them at every node's port as `ray_qformer_train_*`."""

from collections.abc import Mapping

from ray.util.metrics import Gauge


class TrainMetrics:
    """Gauges of the last logged step; used by the first rank alone.

    Args:
        run: Run label, which distinguishes runs of one cluster.
    """

    def __init__(self, run: str) -> None:
        self._run = {"run": run}
        self._gauges: dict[str, Gauge] = {}

    def set(self, values: Mapping[str, float]) -> None:
        """Set the gauges of a logged step; "loss/itc" becomes qformer_train_loss_itc."""
        for name, value in values.items():
            if name not in self._gauges:
                title = f"qformer_train_{name.replace('/', '_')}"
                self._gauges[name] = Gauge(title, f"{name} of the last logged step", tuple(self._run))
                self._gauges[name].set_default_tags(self._run)
            self._gauges[name].set(value)
