"""What the TensorRT target needs beside its lowering.

`lint` finds what the parser would refuse or compute wrongly, and `build` is the one file here that talks to TensorRT;
`python -m modernbert_export.tensorrt BUNDLE` builds the plans of a bundle on the machine that is to run them. Which
profiles an engine has and what makes a plan stale stands in `modernbert_runtime.tensorrt_plan`, for the runtime needs
it too.
"""
