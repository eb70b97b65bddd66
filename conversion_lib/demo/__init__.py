"""The demo: the whole DAG on a small fp8 DeepSeek-V3, with its own local Hub."""
