"""The executor, its buffers and its limits: the one engine behind every conversion."""
