"""Scheduled onboarding: the catalogue of watched models, and the looks at the Hub."""
