"""The original's logits: computed by transformers layer by layer, or read from a golden file."""
