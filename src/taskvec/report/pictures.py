"""A page of sentences, pictures and tables: what a study found, as one HTML file that works offline."""

from base64 import b64encode
from dataclasses import dataclass
from importlib.metadata import version

from taskvec.report.drawing import Drawing
from taskvec.report.page import plotly_script, rendered, view
from taskvec.report.tables import Table


@dataclass(frozen=True)
class Picture:
    """An SVG, and one sentence that says what to see. Where there are `drawings`, the page shows them in its place."""

    name: str
    title: str
    says: str
    svg: str
    drawings: tuple[Drawing, ...] = ()

    @property
    def base64(self) -> str:
        """The picture as it stands in an address: nothing of it is read as markup."""
        return b64encode(self.svg.encode()).decode()


@dataclass(frozen=True)
class Page:
    """Its title, what it is about, the verdict in words first, and what stands behind it."""

    title: str
    about: str
    lead: str
    details: tuple[str, ...]
    pictures: tuple[Picture, ...]
    tables: tuple[Table, ...]


def picture_page(page: Page) -> str:
    """The page. Raises `MissingPackage` where jinja2 (and plotly, for drawings) is not installed."""
    tables = [view(table) for table in page.tables]
    script = plotly_script() if any(picture.drawings for picture in page.pictures) else ""
    return rendered("pictures.html.j2", page=page, tables=tables, version=version("taskvec"), plotly=script)
