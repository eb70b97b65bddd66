"""Publishes checked checkpoints, and verifies and prunes published ones."""
