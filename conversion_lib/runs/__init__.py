"""What a run keeps so that a retry goes on: its workspace, journal and locks, in a directory or a bucket."""
