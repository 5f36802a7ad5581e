"""The Prefect flow of the report: what `e4s report` writes, and the same as artifacts that the server shows and keeps by version."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Cancelled

from evaluation.compare import comparison_markdown, comparison_rows
from evaluation.report import markdown, table_rows
from flows.report import evaluate_and_report, told, write_comparison
from flows.step import run_as_prefect_task, tracked
from flows.tracking import give_up, is_lost
from storage.run import RunBusy, RunFolder, lock_folder, make_folder, unlock


@flow(name="report", persist_result=False, validate_parameters=False, log_prints=True)
def report(run: str, protocols: Sequence[str] = ("open",), device: str = "auto", compare: str = "") -> dict[str, int] | State[Any]:
    """Measure a run, write its report and publish it; with `compare`, compare the run with that one, too.

    Returns the features computed anew by network. Leaves a table artifact `NAME-metrics` and a markdown artifact `NAME-report`, and
    `NAME-against-OTHER-metrics` and `-report` for a comparison, NAME being the run folder's name in lower case. Parameters as
    `e4s report --help` explains them.
    """
    folder = RunFolder(run)
    folder.read_settings()  # what is no run gets no folder for a report
    make_folder(folder.path / "report", "run")
    try:
        lock = lock_folder(folder.path / "report", "run")
    except RunBusy as busy:  # the report that is at work is left to end
        return Cancelled(message=str(busy))
    try:
        with tracked():
            return _report(folder, protocols, device, compare)
    finally:
        unlock(lock)


def _report(folder: RunFolder, protocols: Sequence[str], device: str, compare: str) -> dict[str, int]:
    found = evaluate_and_report(folder, protocols, device, hook=run_as_prefect_task)
    for line in told(folder, found):
        print(line)
    name = artifact_name(folder)
    _publish(name, str(folder.path), table_rows(found), markdown(found))
    if compare:
        other = RunFolder(compare)
        compared = write_comparison(other, folder, protocols, device, hook=run_as_prefect_task)
        print(f"comparison: {compared.page}")
        both = f"{name}-against-{artifact_name(other)}"
        _publish(both, f"{folder.path} against {compare}", comparison_rows(compared.comparison), comparison_markdown(compared.comparison))
    return dict(found.evaluation.computed) if found.evaluation else {}


def artifact_name(folder: RunFolder) -> str:
    """A run folder's name as Prefect allows it in a key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", folder.path.resolve().name.lower()).strip("-") or "run"


def _publish(name: str, what: str, rows: list[dict[str, str]], text: str) -> None:
    if is_lost():
        return
    try:
        create_table_artifact(key=f"{name}-metrics", table=rows, description=f"Metrics of {what}; each row names its protocol and network.")
        create_markdown_artifact(key=f"{name}-report", markdown=text, description=f"Report of {what}")
    except Exception as error:  # the files are there: what the UI shows is no reason to fail
        give_up(f"{type(error).__name__}: {error}")
