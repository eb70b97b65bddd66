"""Scheduled onboarding: the catalogue of watched models, and what a look at the Hub finds."""
