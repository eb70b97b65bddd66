"""The verdict on two sets of logits: figures, threshold, report."""
