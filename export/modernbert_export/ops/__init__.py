"""All graph operators. To add one: write its file, name it here, test it in tests/test_ops.py."""

from modernbert_export.ops.global_attention import GLOBAL_ATTENTION
from modernbert_export.ops.local_attention import LOCAL_ATTENTION
from modernbert_export.ops.local_attention_with_globals import LOCAL_ATTENTION_WITH_GLOBALS
from modernbert_export.ops.op import GraphOp
from modernbert_export.ops.packed_global_attention import PACKED_GLOBAL_ATTENTION
from modernbert_export.ops.packed_local_attention import PACKED_LOCAL_ATTENTION
from modernbert_export.ops.rotary import ROTARY

OPS: tuple[GraphOp, ...] = (
    ROTARY,
    LOCAL_ATTENTION,
    LOCAL_ATTENTION_WITH_GLOBALS,
    GLOBAL_ATTENTION,
    PACKED_LOCAL_ATTENTION,
    PACKED_GLOBAL_ATTENTION,
)
