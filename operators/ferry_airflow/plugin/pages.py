"""The routes of Ferry's pages. Each checks its caller's rights; none takes a file's path."""

from __future__ import annotations

import secrets
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from conversion_lib.shown import visible
from ferry_airflow.plugin.access import may_read_dag, may_read_run
from ferry_airflow.plugin.figures import view_models, view_run
from ferry_airflow.plugin.records import read_findings, read_onboardings, read_run
from ferry_airflow.plugin.reports import NoReport, read_report

ONBOARDING, SCHEDULED = "onboard_checkpoint", "scheduled_onboarding"
HEADERS = {
    "Cache-Control": "private, no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'; sandbox"
"""The report is one file that contains its styles and pictures. It runs no script and loads nothing."""

templates = Environment(
    loader=PackageLoader("ferry_airflow.plugin"), autoescape=True, undefined=StrictUndefined, finalize=visible
)


def make_app() -> FastAPI:
    """Returns the application that Airflow mounts."""
    app = FastAPI(title="Ferry", openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/models", dependencies=[may_read_dag(ONBOARDING), may_read_dag(SCHEDULED)])
    def show_models() -> Response:
        """All models: the last commit seen, the published commit, its verdict, size and age."""
        rows = view_models(read_findings(SCHEDULED), read_onboardings(ONBOARDING), ONBOARDING)
        return _page("models.html", rows=rows)

    @app.get("/runs/{dag_id}/{run_id}", dependencies=[may_read_run()])
    def show_run(dag_id: str, run_id: str) -> Response:
        """A run's tab: its stages with their figures, and the report."""
        run = read_run(dag_id, run_id)
        if run is None:
            raise HTTPException(404, "no such run")
        missing = ""
        try:
            read_report(run)
        except NoReport as error:
            missing = str(error)
        return _page("run.html", run=run, view=view_run(run), missing=missing)

    @app.get("/runs/{dag_id}/{run_id}/report", dependencies=[may_read_run()])
    def show_report(dag_id: str, run_id: str) -> Response:
        """The report that the run published, or that its check left."""
        run = read_run(dag_id, run_id)
        if run is None:
            raise HTTPException(404, "no such run")
        try:
            content = read_report(run)
        except NoReport as error:
            raise HTTPException(404, str(error)) from error
        return HTMLResponse(content, headers={**HEADERS, "Content-Security-Policy": REPORT_POLICY})

    return app


def _page(template: str, **values: Any) -> HTMLResponse:
    """A page of this plugin. It may load its style sheet (by nonce) and its own frames, and nothing else."""
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; frame-src 'self'; frame-ancestors 'self'; base-uri 'none';"
        " form-action 'none'"
    )
    content = templates.get_template(template).render(nonce=nonce, **values)
    return HTMLResponse(content, headers={**HEADERS, "Content-Security-Policy": policy})
