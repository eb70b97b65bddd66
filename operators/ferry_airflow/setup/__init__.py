"""What Airflow is given when the package is installed: provider, pools."""
