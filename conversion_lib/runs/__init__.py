"""What a run keeps so that a retry can resume it: workspace, journal and locks, in a directory or a bucket."""
