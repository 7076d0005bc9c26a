"""What the TensorRT target needs beside its lowering.

half     fp16 with fp32 islands, in a traced graph
lint     what the TensorRT parser would refuse or compute wrongly, found without TensorRT
profiles which lengths and batches an engine is built for, and which of them serves a batch
plan     where a built engine lies, and what makes it stale
build    the one file here that talks to TensorRT
"""
