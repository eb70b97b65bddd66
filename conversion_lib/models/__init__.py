"""What is known of models: config.json, the catalogue, what was verified."""
