"""Pretraining, contrastive fine-tuning and their evaluation, through transformers and sentence-transformers."""
