"""What the TensorRT target needs beside its lowering.

`half` makes a traced graph fp16 with fp32 islands, `lint` finds what the parser would refuse or compute wrongly, and
`build` is the one file here that talks to TensorRT. Which profiles an engine has and what makes a plan stale stands in
`modernbert_runtime.tensorrt_plan`, for the runtime needs it too.
"""
