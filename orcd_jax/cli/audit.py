"""``orcd audit``: whether an audit log is whole. ``docs/audit.md`` says what that proves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from orcd_jax.cli.terminal import Output
from orcd_jax.errors import ExitCode
from orcd_jax.telemetry.audit_chain import AuditReport, verify_audit
from orcd_jax.telemetry.audit_record import Head
from orcd_jax.telemetry.narration import count


def audit(directory: Path, published: Head | None, output: Output, *, as_json: bool = False) -> ExitCode:
    """Checks every hash and every link across all files of a log; FAILED when it is broken or empty.

    Args:
      directory: the folder that holds ``audit-*.jsonl``.
      published: a head that must be on the chain, if one is known.
      output: where the result is shown.
      as_json: show one JSON object instead of a table.

    Raises:
      OrcdError: INVALID_PARAMS, when the directory cannot be read.
    """
    report = verify_audit(directory, published)
    if as_json:
        output.json({**dataclasses.asdict(report), "head": report.head._asdict()})
    else:
        output.rows(audit_rows(report, published))
    return ExitCode.OK if report.records and report.broken is None else ExitCode.FAILED


def audit_rows(report: AuditReport, published: Head | None) -> dict[str, str]:
    """The report as a person reads it."""
    rows: dict[str, str] = {}
    if report.records:
        older = "" if report.first_seq == 1 else " (older ones are not here)"
        rows["records"] = f"{count(report.records, 'record')} in {count(report.files, 'file')}"
        rows["first"] = f"{report.first_seq}, {report.first_ts}{older}"
        rows["last"] = f"{report.head.seq}, {report.last_ts}"
        rows["lost"] = f"{report.lost}, says the log itself" if report.lost else "none, says the log itself"
        rows["head"] = f"{report.head.seq}:{report.head.hash}"
    if report.broken is not None:
        return rows | {"whole": f"no: {report.broken}"}
    if not report.records:
        return rows | {"whole": "no: there are no audit records; give the folder that holds audit-*.jsonl"}
    reaches = "compared with no published head; see --head" if published is None else f"up to head {published.seq}"
    return rows | {"whole": f"yes, {reaches}"}
