"""Precisions: fp32 is the graph as it is lowered; how the others come about.

`half` makes fp16 and bf16 on the torch side, before the trace, with islands of fp32 where `audit` wants them; `int8`
rewrites the lowered fp32 graph, with scales and exceptions that `calibrate` chose by measured error. OpenVINO converts
to bf16 by itself: its graph for that is the fp32 one with `constant_tables`. Which of them a target has stands in
`modernbert_export.variants`.
"""
