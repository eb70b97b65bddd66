"""What Airflow gets when the package is installed: the provider and the pools."""
