#!/usr/bin/env python3
"""Checks an audit log: every hash and every link, across all its files.

    tools/verify_audit.py DIRECTORY
    tools/verify_audit.py DIRECTORY --head=731:9f86d08…    # and that the log still reaches this published record

Exit code: 0 whole, 1 broken or empty, 2 not readable. docs/audit.md says what that proves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from orcd_jax.errors import ExitCode, OrcdError
    from orcd_jax.telemetry.audit_chain import AuditReport, verify_audit
    from orcd_jax.telemetry.audit_record import Head
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {missing.name} is not installed for {sys.executable}: use the Python that has orcd-jax's packages"
    )


def head(text: str) -> Head:
    """``SEQ:HASH`` as GetStatus publishes them."""
    found = re.fullmatch(r"([1-9][0-9]{0,17}):([0-9a-f]{64})", text)
    if found is None:
        raise argparse.ArgumentTypeError("must be SEQ:HASH, a record's number and its 64 hex digits")
    return Head(int(found.group(1)), found.group(2))


def sentence(report: AuditReport) -> str:
    """What a person wants to know, in one line."""
    if report.broken is not None:
        return f"broken after {report.records} records: {report.broken}"
    if not report.records:
        return "no audit records: give the folder that holds audit-*.jsonl"
    older = "" if report.first_seq == 1 else f"; records before {report.first_seq} are not here"
    return (
        f"whole: {report.records} records in {report.files} files, {report.first_seq} to {report.head.seq}, "
        f"{report.first_ts} to {report.last_ts}; the log says that {report.lost} were lost{older}; "
        f"head {report.head.seq}:{report.head.hash}"
    )


def main(arguments: list[str]) -> int:
    """Prints the report; the exit code."""
    parser = argparse.ArgumentParser(prog="verify_audit.py", description="Checks the hash chain of an audit log.")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="the folder that holds audit-*.jsonl")
    parser.add_argument("--head", type=head, metavar="SEQ:HASH", help="a published head that must be on the chain")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    chosen = parser.parse_args(arguments)
    try:
        report = verify_audit(chosen.directory, chosen.head)
    except OrcdError as error:
        print(f"verify_audit: {error.message}", file=sys.stderr)
        return ExitCode.USAGE
    shown = {**dataclasses.asdict(report), "head": report.head._asdict()}
    print(json.dumps(shown) if chosen.json else sentence(report))
    return ExitCode.OK if report.records and report.broken is None else ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
