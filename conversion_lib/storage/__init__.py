"""Directories and buckets: files written whole, locations, leases."""
