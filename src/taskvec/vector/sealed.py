"""A folder of files under one JSON that holds their SHA-256 and its own: for what is no plain vector."""

import hashlib
import json
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from taskvec.errors import InputError, VectorCorrupt

Record = TypeVar("Record", bound="Sealed")


class Sealed(BaseModel):
    """The JSON. `files` are the files beside it, by name; `entries` folders, each with the hash of its own JSON. There
    is one text for each record, so that no byte of it can change unseen."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mark: ClassVar[str]
    what: ClassVar[str]

    format_version: Literal[1] = 1
    files: dict[str, str]
    entries: dict[str, str] = {}
    checksum: str = ""

    def write(self, folder: Path) -> None:
        """Write the JSON with its checksum."""
        (folder / self.mark).write_text(self.model_copy(update={"checksum": self._digest()})._text(), "utf-8")

    @classmethod
    def read(cls: type[Record], folder: Path) -> Record:
        """The record in a folder, and that its files are what was saved. Raises `VectorCorrupt`, or `InputError` where
        there is none."""
        if not (folder / cls.mark).is_file():
            raise InputError(f"a {cls.what} with {cls.mark}", f"none at {folder}", "check the path")
        try:
            content = (folder / cls.mark).read_bytes()
            record = cls.model_validate_json(content)
        except (ValidationError, ValueError) as error:
            raise cls.corrupt(folder, " ".join(str(error).splitlines()[:3])) from None
        if record.checksum != record._digest() or content != record._text().encode():
            raise cls.corrupt(folder, f"{cls.mark} was changed after it was saved")
        record._check_files(folder)
        return record

    def _check_files(self, folder: Path) -> None:
        """Everything beside the JSON is what was saved, and there is nothing else."""
        there = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        for name in sorted(there ^ {*self.entries, *self.files, self.mark}):
            raise self.corrupt(folder, f"{name} is {'unknown' if name in there else 'missing'}")
        for name, digest in self.files.items():
            if not (folder / name).is_file() or sha((folder / name).read_bytes()) != digest:
                raise self.corrupt(folder, f"{name} was changed after it was saved")

    @classmethod
    def corrupt(cls, folder: Path, found: str) -> VectorCorrupt:
        """The error for a folder that is not what was saved."""
        return VectorCorrupt(f"the {cls.what} saved in {folder}", found, "fit it again or fetch the original")

    def _text(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    def _digest(self) -> str:
        return sha(json.dumps(self.model_dump(mode="json", exclude={"checksum"}), sort_keys=True).encode())


def sha(content: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()
