"""Publishing a checked checkpoint, and what is asked of one that is published."""
