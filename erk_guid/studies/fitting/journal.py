"""What a search has measured, on disk: an interrupted search goes on from there.

A search is deterministic. Called again, it asks for the same numbers in the same order, and those
that are in the journal are not measured again.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erk_guid.common.errors import ErkGuidError
from erk_guid.common.files import write_bytes
from erk_guid.common.npz import read_npz
from erk_guid.studies.fitting.sweep import ANSWERS_AGREE

TRIALS = "trials.jsonl"
"""File of the numbers."""
FORMAT = "erk_guid_fit"
ANSWERS = "answers"


@dataclass
class Journal:
    """Numbers by what they are of, and the evaluations that they cost.

    Attributes:
        folder: where they are kept; None keeps them in memory.
        of: digest of what the search depends on.
        known: numbers by key.
        spent: evaluations of the network, those of remembered numbers included.
        measured: evaluations that this process made itself.
        report: called with `spent` after each call of the network, and after what is remembered.
    """

    folder: Path | None = None
    of: str = ""
    known: dict[str, tuple[list[float], int]] = field(default_factory=dict)
    spent: int = 0
    measured: int = 0
    report: Callable[[int], None] | None = None

    @classmethod
    def open(cls, folder: str | Path | None, of: Sequence[object]) -> Journal:
        """Return the journal of a search, with what an earlier run of it has left.

        Args:
            folder: its folder, made if it is not there; None for none.
            of: what the search depends on; tensors by their values.

        Raises:
            ErkGuidError: it belongs to another search, or cannot be read or written.
        """
        if folder is None:
            return cls()
        folder = Path(folder)
        path = folder / TRIALS
        digest = _digest(of)
        head = json.dumps({FORMAT: 1, "of": digest})
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_bytes(path, (head + "\n").encode())
                return cls(folder, digest)
            lines = path.read_text(errors="replace").splitlines()
        except OSError as error:
            raise ErkGuidError(f"cannot use {folder}: {error.strerror}") from error
        if not lines or lines[0] != head:
            raise ErkGuidError(
                f"{path} is of another search, or damaged; name another folder, or delete {folder}"
            )
        known = dict(entry for line in lines[1:] if (entry := _entry(line)) is not None)
        # A line that was cut off must not run into the next one.
        whole = [head, *(_line(k, *v) for k, v in known.items())]
        write_bytes(path, "".join(f"{line}\n" for line in whole).encode())
        return cls(folder, digest, known)

    def check_same_answers(self, ask: Callable[[], list[list[float]]]) -> None:
        """Refuse a journal of another model, by what it answers to the same questions.

        Raises:
            ErkGuidError: it answered one of them otherwise.
        """
        if self.folder is None:
            return
        # What is beside an empty journal was there before it; journals once held no answers.
        stale = not self.known and any(self.folder.glob("*.npz"))
        for number, now in enumerate(ask()):
            if not all(map(math.isfinite, now)):
                continue  # the search says what is wrong
            known = [] if stale else now
            before = self.numbers((ANSWERS, number), functools.partial(list, known))
            off = math.inf if len(now) != len(before) else math.dist(now, before)
            if not off <= ANSWERS_AGREE * math.hypot(*now):
                raise ErkGuidError(
                    f"what is in {self.folder} was measured with another model: on the same "
                    f"question the two differ; name another folder, or delete {self.folder}"
                )

    def counting(self, denoiser: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the denoiser with its rows counted."""

        def counted(x: Tensor, *rest: Tensor) -> Tensor:
            found = denoiser(x, *rest)
            self._spend(len(x))
            self.measured += len(x)
            return found

        return counted

    def numbers(self, key: tuple[object, ...], measure: Callable[[], list[float]]) -> list[float]:
        """Return the numbers of that key; measure them where they are not known."""
        name = json.dumps(key)
        if name in self.known:
            found, spent = self.known[name]
            self._spend(spent)
            return found
        before = self.spent
        found = measure()
        self.known[name] = (found, self.spent - before)
        if self.folder is not None:
            try:
                with open(self.folder / TRIALS, "a") as file:
                    file.write(_line(name, *self.known[name]) + "\n")
            except OSError as error:
                raise ErkGuidError(f"cannot write to {self.folder}: {error.strerror}") from error
        return found

    def tensor(self, name: str, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Return a tensor shaped like another one; make it where no file holds it."""
        path = None if self.folder is None else self.folder / f"{name}.npz"
        if path is not None and path.exists():
            found = read_npz(path, {"values": "f", "spent": "iu", "of": "u"}.get)
            values, cost, of = found.get("values"), found.get("spent"), found.get("of")
            if of is None or of.tobytes() != bytes.fromhex(self.of):
                raise ErkGuidError(
                    f"{path} is of another search; name another folder, or delete {path.parent}"
                )
            if (
                values is None
                or cost is None
                or cost.shape != ()
                or list(values.shape) != list(like.shape)
            ):
                raise ErkGuidError(f"{path} is damaged; delete it")
            self._spend(int(cost))
            return torch.from_numpy(np.ascontiguousarray(values)).to(like)
        before = self.spent
        made = make()
        if path is not None:
            data = io.BytesIO()
            values = made.cpu().to(torch.promote_types(made.dtype, torch.float32)).numpy()
            of = np.array(list(bytes.fromhex(self.of)), np.uint8)
            np.savez(data, values=values, spent=np.array(self.spent - before), of=of)
            write_bytes(path, data.getvalue())
        return made

    def _spend(self, rows: int) -> None:
        self.spent += rows
        if self.report is not None:
            self.report(self.spent)


def _entry(line: str) -> tuple[str, tuple[list[float], int]] | None:
    """Read a line of the journal: key, numbers, evaluations; None if it is not a whole entry."""
    try:
        match json.loads(line):
            case {"key": str(key), "numbers": list(numbers), "spent": spent}:
                return key, ([float(v) for v in numbers], int(spent))
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass  # the last line of a process that was stopped, or a damaged one
    return None


def _line(key: str, numbers: Sequence[float], spent: int) -> str:
    return json.dumps({"key": key, "numbers": list(numbers), "spent": spent})


def _digest(of: Sequence[object]) -> str:
    sha = hashlib.sha256()
    for part in of:
        shown: Any = part
        if isinstance(part, Tensor):
            sha.update(part.detach().cpu().double().contiguous().numpy().tobytes())
            shown = (str(part.dtype), list(part.shape))
        sha.update(repr(shown).encode())
    return sha.hexdigest()
