"""The logit check: a converted checkpoint's logits against those of the original weights."""
