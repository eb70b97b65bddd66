"""The basics that every other package uses: boxes, dtypes, tensors, copies, processes, retries."""
