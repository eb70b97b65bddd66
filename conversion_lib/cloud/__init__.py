"""Cloud Storage: its client, a place in a bucket, and a run that writes there."""
