"""Text, tokenizers and masking: everything between files and the batches that training reads."""
