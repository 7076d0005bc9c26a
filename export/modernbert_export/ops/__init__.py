"""All graph operators. To add one: write its file, name it here, test it in tests/test_ops.py."""

from modernbert_export.ops.global_attention import GLOBAL_ATTENTION
from modernbert_export.ops.local_attention import LOCAL_ATTENTION
from modernbert_export.ops.op import GraphOp
from modernbert_export.ops.rotary import ROTARY

OPS: tuple[GraphOp, ...] = (ROTARY, LOCAL_ATTENTION, GLOBAL_ATTENTION)
