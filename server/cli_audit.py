"""`prefixd audit verify`: is the audit log what was written? Runs on the main thread, beside a server or without."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from prefix_store.audit_log import AuditReport, verify
from server.config import ServeConfig
from server.errors import PrefixdError

audit_app = App(name="audit", help="Look at the audit log of a store.")


class AuditFailed(PrefixdError):
    """The log is not whole; the message says where."""


@audit_app.command(name="verify")
def verify_log(
    directory: Annotated[
        Path | None, Parameter(help="The store or its audit folder; as in serve if left out")
    ] = None,
    *,
    head: Annotated[
        str | None, Parameter(help="A head hash noted earlier, which must be in the log")
    ] = None,
) -> str:
    """Check every record from the first; print how many there are and the hash of the last."""
    place = ServeConfig().store_dir if directory is None else directory
    place = place / "audit" if (place / "audit").is_dir() else place
    if not place.is_dir():
        raise AuditFailed(f"{place}: there is no such folder")
    report = verify(place, head)
    counted = f"{report.num_records} records, head {report.head}"
    fault = _fault(report, head)
    if fault is not None:
        raise AuditFailed(f"{place}: {fault}\nwhole up to there: {counted}")
    return counted


def _fault(report: AuditReport, head: str | None) -> str | None:
    if report.fault is not None:
        return report.fault
    if report.torn_bytes:
        return (
            f"the last line is torn after {report.torn_bytes} bytes, as a crash leaves it; "
            "the server cuts it off when it starts"
        )
    if head is not None and not report.found_head:
        return f"the head {head} is not in the log: its end was cut off"
    return None
