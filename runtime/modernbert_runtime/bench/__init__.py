"""How fast a bundle is on this machine: latency by length, throughput by batch, memory, and how near the ceiling.

`run.bench` is the whole of it: `candidates` lists who takes part, `worker` is the process of each, `run` gives them
turns and makes the `report`, `page` shows it. Nothing here imports torch; whoever compares with tools that do passes
their workers in. Nothing is imported here: workers measure how soon they start.
"""
