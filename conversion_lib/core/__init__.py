"""What everything stands on: boxes, dtypes, tensors, copies, the process, retries."""
