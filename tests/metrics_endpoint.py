"""Reads figures where Prometheus reads them."""

import re
import urllib.request


def scraped(ray, job: str) -> dict[tuple[str, str], float]:
    """{(name, the tag of its series): value} of one job, from every node's metrics endpoint."""
    text, found = endpoints(ray), {}
    for name, labels, value in re.findall(r"^(ray_qformer_data_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags.get("job") == job:
            found[name, tags.get("stage") or tags.get("outcome") or tags.get("le") or ""] = float(value)
    return found


def endpoints(ray) -> str:
    """What all nodes' metrics endpoints say."""
    text = ""
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        text += urllib.request.urlopen(url, timeout=10).read().decode()
    return text
