"""The vector folder: `task_vector.safetensors`, `task_vector_config.json`, `README.md`. No pickle, all or nothing."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from taskvec.errors import InputError, TaskvecError, VectorCorrupt
from taskvec.sites import Site
from taskvec.vector.edits import Edit, Where
from taskvec.vector.ops import OPS, Op
from taskvec.vector.origin import Origin
from taskvec.vector.task_vector import TaskVector

FORMAT_VERSION = 1
TENSORS, CONFIG, CARD = "task_vector.safetensors", "task_vector_config.json", "README.md"


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EditRecord(_Plain):
    """One edit without its tensors: they are `N.field` in the tensor file, N the edit's place."""

    site: str
    op: str
    where: str
    strength: float
    numbers: dict[str, float]
    tensors: tuple[str, ...]


class Manifest(_Plain):
    """The configuration file. `checksum` is the SHA-256 of the rest; `files` and `tensors` hold those of the
    contents."""

    format_version: int
    edits: tuple[EditRecord, ...]
    origin: Origin | None
    tensors: dict[str, str]
    files: dict[str, str]
    checksum: str = ""

    def sealed(self) -> "Manifest":
        """The same with its checksum."""
        return self.model_copy(update={"checksum": self._digest()})

    def intact(self) -> bool:
        """Does the checksum fit?"""
        return self.checksum == self._digest()

    def text(self) -> str:
        """The file's text. There is one for each manifest, so that no byte of it can change unseen."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def _digest(self) -> str:
        plain = self.model_dump(mode="json", exclude={"checksum"})
        return _sha(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode())


def save(vector: TaskVector, folder: Path, *, overwrite: bool = False, card: str | None = None) -> None:
    """Write the folder beside its final place and move it there in one step."""
    with replacing(folder, overwrite=overwrite, mark=CONFIG) as new:
        _write(vector, new, card if card is not None else _plain_card(vector))


@contextmanager
def replacing(folder: Path, *, overwrite: bool, mark: str) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when all is written: all or nothing.

    What stands there is replaced only with `overwrite`, and only if it is such a folder (it has the file `mark`).
    """
    if folder.exists() and not overwrite:
        raise InputError("a new folder", f"{folder} exists", "name another one or pass --overwrite (overwrite=True)")
    if folder.exists() and not (folder / mark).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("a vector folder to overwrite", f"{folder} is something else", "name another one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield new
        new.chmod(0o755)
        _move(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load(folder: Path) -> TaskVector:
    """Read the folder, checking every byte. Raises `VectorCorrupt`, or `InputError` where there is no folder."""
    if not (folder / CONFIG).is_file():
        raise InputError(f"a vector folder with {CONFIG}", f"none at {folder}", "check the path")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    for name in sorted({TENSORS, CONFIG, CARD} ^ names):
        raise _corrupt(folder, f"{name} is {'unknown' if name in names else 'missing'}")
    manifest = _manifest(folder)
    tensors = _tensors(folder, manifest)
    try:
        edits = tuple(_edit(i, record, tensors) for i, record in enumerate(manifest.edits))
    except (TypeError, KeyError, TaskvecError) as error:
        raise _corrupt(folder, f"an edit that cannot be: {error}") from None
    return TaskVector(edits, manifest.origin, str(folder))


def _write(vector: TaskVector, folder: Path, card: str) -> None:
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in vector.tensors().items()}
    contents = {TENSORS: save_tensors(tensors), CARD: card.encode()}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        edits=tuple(_record(edit) for edit in vector.edits),
        origin=vector.origin,
        tensors={name: _tensor_sha(t) for name, t in tensors.items()},
        files={name: _sha(content) for name, content in contents.items()},
    ).sealed()
    try:
        contents[CONFIG] = manifest.text().encode()
    except ValueError as error:
        found = f"{error} in the strengths, numbers or origin"
        raise InputError("a vector that JSON can hold", found, "make them finite") from None
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def _move(new: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(new, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    try:
        os.replace(folder, old / "was")
        os.replace(new, folder)
    except BaseException:
        if not folder.exists():
            os.replace(old / "was", folder)
        shutil.rmtree(old, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _manifest(folder: Path) -> Manifest:
    try:
        content = (folder / CONFIG).read_bytes()
        plain = json.loads(content.decode())
        version = plain.get("format_version") if isinstance(plain, dict) else None
        if version != FORMAT_VERSION:
            raise _corrupt(folder, f"{CONFIG} has format version {version!r}, this taskvec reads {FORMAT_VERSION}")
        manifest = Manifest.model_validate(plain)
        same = content == manifest.text().encode()
    except (ValueError, ValidationError, RecursionError) as error:
        raise _corrupt(folder, f"{CONFIG} is not what was saved ({' '.join(str(error).splitlines()[:3])})") from None
    if not same or not manifest.intact():
        raise _corrupt(folder, f"{CONFIG} was changed after it was saved (its checksum differs)")
    return manifest


def _tensors(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    contents = {name: (folder / name).read_bytes() for name in (TENSORS, CARD)}
    try:
        tensors = load_tensors(contents[TENSORS])
    except (SafetensorError, ValueError, KeyError) as error:
        raise _corrupt(folder, f"{TENSORS} cannot be read ({error})") from None
    for name in sorted(tensors.keys() ^ manifest.tensors.keys()):
        raise _corrupt(folder, f"tensor {name} is {'unknown' if name in tensors else 'missing'}")
    for name, tensor in tensors.items():
        if _tensor_sha(tensor) != manifest.tensors[name]:
            raise _corrupt(folder, f"tensor {name} was changed after it was saved (its SHA-256 differs)")
    for name, content in contents.items():
        if _sha(content) != manifest.files.get(name):
            raise _corrupt(folder, f"{name} was changed after it was saved (its SHA-256 differs)")
    return tensors


def _record(edit: Edit) -> EditRecord:
    name = next((name for name, op in OPS.items() if type(edit.op) is op), None)
    if name is None:
        raise InputError(f"an op that can be saved: {', '.join(OPS)}", type(edit.op).__name__, "save another vector")
    if (Site.parse(str(edit.site)), Where.parse(str(edit.where))) != (edit.site, edit.where):
        raise InputError("a site and tokens that have a name", f"{edit.site!r}, {edit.where!r}", "save another vector")
    return EditRecord(
        site=str(edit.site),
        op=name,
        where=str(edit.where),
        strength=edit.strength,
        numbers=edit.op.numbers(),
        tensors=tuple(edit.op.tensors()),
    )


def _edit(i: int, record: EditRecord, tensors: dict[str, Tensor]) -> Edit:
    parts: dict[str, Any] = {name: tensors[f"{i}.{name}"] for name in record.tensors}
    op: Op = OPS[record.op](**parts, **record.numbers)
    return Edit(Site.parse(record.site), op, Where.parse(record.where), record.strength)


def _plain_card(vector: TaskVector) -> str:
    from taskvec.vector.card import card

    return card(vector)


def _tensor_sha(tensor: Tensor) -> str:
    return _sha(save_tensors({"t": tensor}))


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _corrupt(folder: Path, found: str) -> VectorCorrupt:
    return VectorCorrupt(f"the vector saved in {folder}", found, "compile it again or fetch the original")
