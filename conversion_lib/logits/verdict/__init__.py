"""What two sets of logits say: the figures, the threshold, the report."""
