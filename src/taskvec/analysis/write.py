"""A run of analyses: pictures, frames beside them, and one page."""

from collections.abc import Sequence
from pathlib import Path

from taskvec.analysis.finding import Finding
from taskvec.files import replaced
from taskvec.report.pictures import Page, picture_page


def write_findings(findings: Sequence[Finding], title: str, out: Path) -> list[Path]:
    """Write each finding's files and `report.html`; returns them. Raises `MissingPackage` without jinja2, when the
    others are there."""
    written = [path for finding in findings for path in finding.save(out)]
    lead, *others = (finding.picture.says for finding in findings)
    about = "What a task vector does inside the model. The numbers of every picture stand beside it as CSV."
    page = picture_page(Page(title, about, lead, tuple(others), tuple(finding.picture for finding in findings), ()))
    with replaced(out / "report.html") as new:
        new.write_text(page, "utf-8")
    return [*written, out / "report.html"]
