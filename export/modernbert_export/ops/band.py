"""`ModernBertBand`: which keys each block of queries meets in a sliding window. A part of the local operators' bodies.

The sequence is cut into blocks of one radius; a block of queries meets the keys of its own block and of its two
neighbours, so time and memory grow with S * radius. What is made here depends on mask and length alone: it is the same
in all layers, and merged there.

Shapes: B batch, S sequence, N blocks, W queries of a block, L keys that it meets.
"""

from onnxscript import opset20 as op
from onnxscript import script

from modernbert_export.ops.op import HIDDEN_KEY, OPSET


@script(OPSET)
def ModernBertBand(key_bias, radius: int):
    """Positions of queries [N, W] and of keys [N, L], and what is added to their scores [B, 1, N, W, L]."""
    tokens = op.Squeeze(op.Shape(key_bias, start=1))
    # Up to three radii, one block of everything is less work than blocks with neighbours.
    short = op.Cast(tokens <= radius * 3, to=7)
    width = short * tokens + (1 - short) * radius
    beside = (1 - short) * radius
    blocks = (tokens + width - 1) / width
    # Where a block's keys stand, from its left neighbour on. Beyond the ends the nearest token is taken, and hidden;
    # so is every query beyond the end, until it is cut off.
    start_N1 = op.Unsqueeze(op.Range(0, blocks, 1) * width, [1])
    offset_L = op.Range(op.Neg(beside), width + beside, 1)
    offset_W = op.Range(0, width, 1)
    key_NL = start_N1 + offset_L
    nearest_NL = op.Min(op.Max(key_NL, 0), tokens - 1)  # TensorRT's parser takes no Clip of integers
    query_NW = op.Min(start_N1 + offset_W, tokens - 1)
    beyond_NL = op.Cast(op.Not(op.Equal(key_NL, nearest_NL)), to=1)
    far_WL = op.Cast(op.Abs(offset_L - op.Unsqueeze(offset_W, [1])) > radius, to=1)
    hidden_NWL = op.CastLike((op.Unsqueeze(beyond_NL, [1]) + far_WL) * HIDDEN_KEY, key_bias)
    bias_B1NWL = op.Unsqueeze(op.Gather(key_bias, nearest_NL, axis=1), [1, 3]) + hidden_NWL
    return query_NW, nearest_NL, bias_B1NWL
