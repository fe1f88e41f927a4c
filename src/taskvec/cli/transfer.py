"""transfer: what the command does."""

from dataclasses import dataclass
from typing import Any

from taskvec.cli import show
from taskvec.cli.work import ModelOptions, PromptOptions, read_task, with_chat
from taskvec.errors import InputError
from taskvec.progress import shown
from taskvec.results import Results


@dataclass(frozen=True)
class TransferOptions:
    """Which ways, with what."""

    ways: list[str] | None
    seeds: tuple[int, ...]
    fields: dict[str, Any]


def transfer_task(
    data: str,
    prompts: PromptOptions,
    models: tuple[ModelOptions, ModelOptions],
    options: TransferOptions,
    *,
    as_json: bool,
) -> None:
    """Fit every way, score on the target."""
    from taskvec.transfer import WAYS, TransferTaskVector, transfer

    for way in options.ways or ():
        TransferTaskVector(way, **options.fields).check()
    task = read_task(data, prompts)
    total, theirs, left_out = Results(()), Results(()), dict[str, str]()
    with shown():
        source, target = (where.load() for where in models)
        if prompts.format == "chat" and source.tokenizer_hash != target.tokenizer_hash:
            found = f"{source.id} and {target.id}"
            raise InputError("models of one tokenizer, for --format chat", found, "use qa, arrow or a template")
        task = with_chat(task, prompts, target)
        for seed in options.seeds:
            done = transfer(source, target, task, options.ways or tuple(WAYS), seed=seed, **options.fields)
            total, theirs, left_out = total + done.results, theirs + done.source, left_out | done.left_out
    if as_json:
        rows, source_rows = total.to_dict()["rows"], theirs.to_dict()["rows"]
        show.emit({"rows": rows, "source_rows": source_rows, "left_out": left_out})
        return
    show.say(f"{target.id}:")
    show.results(total)
    show.say(f"\n{source.id} itself:")
    show.results(theirs)
    for way, why in left_out.items():
        show.note(f"left out: {way}: {why}")
