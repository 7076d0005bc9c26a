"""How fast a bundle is on this machine: latency by length, throughput by batch, memory, and how near the ceiling.

`worker` is a process per candidate, `candidates` lists them, `run` gives them turns and makes the `report`, `page`
shows it. Nothing here imports torch; whoever compares with tools that do passes their workers in.
"""

from modernbert_runtime.bench.report import Report
from modernbert_runtime.bench.run import bench

__all__ = ["Report", "bench"]
