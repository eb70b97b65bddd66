"""Runs of a DAG in a process that stays."""

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.support.airflow.environment import airflow_environment


class Onboarding:
    """Runs `onboard_checkpoint`, or another DAG, in a process that stays: importing Airflow takes longer than a run.

    `environment` is set in it before each run; `log` is what the last run wrote.
    """

    def __init__(self, home, directory, environment):
        self.environment, self.log = {}, ""
        self._answers, self._log = directory / "answers", directory / "log"
        self._answers.touch()
        self._answers_read = 0
        self._log_file = self._log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "run_onboarding.py"), str(self._answers)],
            env={**airflow_environment(home), **environment},
            stdin=subprocess.PIPE,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, conf, *, dag="onboard_checkpoint", retry_seconds=0.1, environment=(), **request):
        log_read = self._log.stat().st_size
        request |= {"dag": dag, "conf": conf, "retry_seconds": retry_seconds}
        request["environment"] = {**self.environment, **dict(environment)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._next_answer()
        with self._log.open() as log:
            log.seek(log_read)
            self.log = log.read()
        return json.loads(line)

    def _next_answer(self):
        while True:
            ended = self._process.poll() is not None
            lines = self._answers.read_text().splitlines(keepends=True)
            if len(lines) > self._answers_read and lines[-1].endswith("\n"):
                self._answers_read += 1
                return lines[-1]
            assert not ended, self._log.read_text()[-8000:]
            time.sleep(0.05)

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._log_file.close()


def manifests(answer):
    """The manifest that each stage of a run left, by stage."""
    return {stage: task.get("xcom", {}).get("return_value") for stage, task in answer["tasks"].items()}
