"""What the TensorRT target needs beside its lowering.

`lint` finds what the parser would refuse or compute wrongly, and `build` is the one file here that talks to TensorRT;
`python -m modernbert_export.tensorrt BUNDLE` builds the plans of a bundle on the machine that is to run them. Which
profiles an engine has and what makes a plan stale stands in `modernbert_runtime.tensorrt_plan`, for the runtime needs
it too.

There is no packed form, in which a batch is one row of tokens without padding. The parser would carry it: the standard
Attention must be 4-D and takes no lengths (onnx-tensorrt, docs/operators.md of 11.1), but from 11.1 on there is an
operator of its own for global layers, `TRT_Attention` with `packed_nhd` q, k and v [tokens, heads, size] and cumulative
int32 lengths [batch + 1] (docs/TRT_custom_ops.md), and local layers could stay banded under a mask that ends at the
texts. It is left out because no proof without a GPU reaches it: the node has no ONNX schema and no kernel in ONNX
Runtime, so the file that TensorRT reads could not run unchanged, and whether a fused kernel serves it only a build can
tell. Batches of similar lengths, which the runtime forms, leave little padding meanwhile.
"""
