"""Facts about models: config.json, the catalogue, and what was verified."""
