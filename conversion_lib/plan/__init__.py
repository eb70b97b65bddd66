"""Plans as pure data: arrays, pieces, parts, chunks, and the ops between tensor and leaf."""
