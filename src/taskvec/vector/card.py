"""The card of a vector folder: a README.md that says what the vector is, where it is from and how it scored."""

from taskvec.vector.task_vector import TaskVector, VectorSource


def card(vector: TaskVector | VectorSource, scores: str = "") -> str:
    """The card's markdown. `scores` is the table it was chosen by, as text."""
    lines = ["---", "library_name: taskvec", "tags:", "- in-context-task-vector"]
    if vector.origin is not None:
        lines += [f"base_model: {vector.origin.model.id}"]
    lines += ["---", "", "# An in-context task vector", ""]
    lines += [
        f"- edit: `{e.op.__class__.__name__}` at `{e.site}`, `{e.where}`, strength {e.strength:g}"
        for e in getattr(vector, "edits", ())
    ] or [f"- a vector for every query, at {', '.join(f'`{site}`' for site in vector.sites)}"]
    if vector.origin is not None:
        o = vector.origin
        lines += [f"- method: {o.method}, seed {o.seed}, task {o.task}, works on {o.prompt} prompts"]
        lines += [
            f"- model: {o.model.id}, fingerprint `{o.model.fingerprint[:16]}`",
            f"- template: `{o.format.template!r}`",
        ]
    if scores:
        lines += ["", "## Scores", "", "```text", scores, "```"]
    usage = ["with inject(lm, methods.load(folder)):", "    lm.generate(prompt)"]
    return "\n".join([*lines, "", "## Use", "", "```python", *usage, "```", ""])
