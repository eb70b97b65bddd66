"""The check with the real MaxText as its engine, in a Python of its own."""
