"""What the stages run besides `ferry`'s own commands, where they run: `python -m ferry_airflow.steps <step>`.

Nothing here knows Airflow: a step may run in a pod.
"""
