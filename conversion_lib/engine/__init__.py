"""The engine behind every conversion: the executor, its buffers and its limits."""
