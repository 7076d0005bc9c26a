"""ModernBERT in PyTorch: configuration, model, data and training.

Import from the module that holds what you need, for example `from modernbert.model import ModernBertForMaskedLM`.
This file stays empty so that the command line starts without torch.
"""
