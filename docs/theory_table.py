"""docs/theory.md: the table of `taskvec.theory`, computed anew, in digits that no machine changes."""

from tables import markdown

from taskvec.theory import Theorem, theorems

SIGNS = {"equal": "", "at most": "≤ ", "at least": "≥ "}


def theory() -> str:
    """Every statement under seed 0."""
    header = ["statement", "in words", "predicted", "measured", "holds"]
    body = [
        [row.name, row.says.replace("|", r"\|"), predicted(row), measured(row), "yes" if row.holds else "**no**"]
        for row in theorems()
    ]
    return "\n" + markdown(header, body) + "\n"


def predicted(row: Theorem) -> str:
    """The value or bound, with its tolerance where that is a spread and no rounding."""
    value = f"{SIGNS[row.relation]}{row.predicted:.3g}"
    wide = row.relation == "equal" and row.predicted != 0 and row.tolerance > 1e-6
    return f"{value} ± {row.tolerance:.1g}" if wide else value


def measured(row: Theorem) -> str:
    """Three digits; where nought is predicted and found, the tolerance it lies below."""
    nought = row.relation == "equal" and row.predicted == 0 and row.holds
    return f"< {row.tolerance:.0e}" if nought else f"{row.measured:.3g}"
