"""A run of analyses: pictures, frames beside them, and one page."""

import json
from collections.abc import Sequence
from pathlib import Path

from taskvec.analysis.finding import Finding
from taskvec.files import replaced
from taskvec.report.pictures import Page, picture_page


def write_findings(findings: Sequence[Finding], title: str, out: Path) -> list[Path]:
    """Write each finding's files, `says.json` with their sentences, and `report.html`; returns them. Raises
    `MissingPackage` without jinja2 or plotly, when the others are there."""
    written = [path for finding in findings for path in finding.save(out)]
    says = {finding.name: finding.says for finding in findings}
    written.append(out / "says.json")
    with replaced(written[-1]) as new:
        new.write_text(json.dumps(says, ensure_ascii=False, indent=1) + "\n", "utf-8")
    lead, *others = (finding.picture.says for finding in findings)
    about = "What a task vector does inside the model. The numbers of every picture stand beside it as CSV."
    page = picture_page(Page(title, about, lead, tuple(others), tuple(finding.picture for finding in findings), ()))
    with replaced(out / "report.html") as new:
        new.write_text(page, "utf-8")
    return [*written, out / "report.html"]
