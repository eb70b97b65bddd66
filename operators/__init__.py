"""Airflow operators, one module a stage. What a stage does is here; where it runs is in `places/`."""
