"""The commands of stages that `ferry` does not have: `python -m ferry_airflow.steps <step>`.

Nothing here imports Airflow: a step may run in a pod.
"""
