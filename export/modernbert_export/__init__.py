"""From a ModernBERT checkpoint to a bundle that runs without torch, with proven parity.

The way through: `trace` (one graph with named operators) -> `lower` (a body per operator and target) -> `verify`
(parity with PyTorch) -> `bundle` (the directory on disk). `export` drives them.
"""
