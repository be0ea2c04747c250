"""States of sequences in a directory, so that prompts begin with them after the server has been started again."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dymoe_runtime.errors import DymoeError, remedy_of

if TYPE_CHECKING:  # long chains of imports, for annotations alone
    from dymoe_runtime.engine.batch.model import BatchModel
    from dymoe_runtime.engine.batch.sequence import BatchSequence, Known
    from dymoe_runtime.serving.service.batching.slots import Slot

# Shorter sequences are computed again about as quickly as they are read.
MIN_TOKENS = 64
# Seconds for which a slot must be free before its state is saved, so that a conversation is not saved at each turn.
IDLE_S = 20.0
SUFFIX = ".state"

log = logging.getLogger(__name__)


class PromptCache:
    """The states in a directory, of this model and perhaps of others, in at most `limit_bytes`.

    The files that were used longest ago leave first. A file that is damaged or belongs to another bundle is not used.
    """

    def __init__(self, directory: Path, limit_bytes: int, model: BatchModel) -> None:
        """Look at the files there; raise DymoeError if the directory cannot be used."""
        self._directory, self._limit, self._model = directory, limit_bytes, model
        self._lock = threading.Lock()
        self._saved: dict[Path, Known] = {}
        self._saver: threading.Thread | None = None
        self._free_since: dict[int, float] = {}  # `used` of a slot -> when it was first seen free
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            paths = sorted(directory.glob(f"*{SUFFIX}"))
            if not os.access(directory, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))
        except OSError as error:
            raise DymoeError(
                f"--prompt-cache {directory}: {error.strerror}; {remedy_of(error, 'name another directory')}"
            ) from error
        for path in paths:
            with suppress(DymoeError):  # of another bundle or another point, or damaged
                self._saved[path] = model.saved_tokens(path)
        log.info("%d states in %s", len(self._saved), directory)

    def restore(self, sequence: BatchSequence, ids: Sequence[int], reused: int) -> bool:
        """Read the state that has most of a prompt, if that is more than the `reused` tokens of a slot.

        Returns whether the sequence now begins with tokens of the prompt that can be reused.
        """
        best, most = None, reused
        with self._lock:
            saved = list(self._saved.items())
        for path, known in saved:
            if (count := self._reusable(known, ids)) > most:
                best, most = path, count
        if best is None:
            return False
        try:
            self._model.load_state(sequence, best)
            best.touch()
        except (DymoeError, OSError) as error:
            log.warning("a saved state cannot be used, so its prompt is computed again: %s", error)
            with self._lock:
                self._saved.pop(best, None)
            return False
        return True

    def save_idle(self, slots: Sequence[Slot]) -> None:
        """Begin to save one slot that has been free for a while, in a thread of its own, unless one is being saved."""
        now = time.monotonic()
        free = [slot for slot in slots if slot.job is None and slot.used]
        self._free_since = {slot.used: self._free_since.get(slot.used, now) for slot in free}
        if self._saver is not None and self._saver.is_alive():
            return
        for slot in free:
            if now - self._free_since[slot.used] >= IDLE_S and self._lacks(slot.sequence.tokens):
                slot.saving = True
                self._saver = threading.Thread(target=self._save, args=(slot,), name="prompt cache")
                self._saver.start()
                return

    def save_all(self, slots: Sequence[Slot]) -> None:
        """Save all slots, because the service ends."""
        if self._saver is not None:
            self._saver.join()
        for slot in slots:
            if self._lacks(slot.sequence.tokens):
                self._save(slot)

    def _lacks(self, ids: Sequence[int]) -> bool:
        """Return whether no file has a sequence that is worth saving."""
        if len(ids) < MIN_TOKENS:
            return False
        with self._lock:
            return not any(known.ids[: len(ids)] == list(ids) for known in self._saved.values())

    def _save(self, slot: Slot) -> None:
        sequence = slot.sequence
        try:
            known = sequence.known
            ids = known.ids
            path = self._directory / (hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()[:32] + SUFFIX)
            self._model.save_state(sequence, path)
            with self._lock:
                shorter = [(path, one.ids) for path, one in self._saved.items() if len(one.ids) < len(ids)]
                for older, its_ids in shorter:
                    if ids[: len(its_ids)] == its_ids:  # the same conversation some turns ago
                        self._remove(older)
                self._saved[path] = known
            self._keep_limit(path)
        except (DymoeError, OSError) as error:
            log.warning("a state was not saved: %s", error)
        finally:
            slot.saving = False

    def _keep_limit(self, newest: Path) -> None:
        """Remove the files that were used longest ago, until the others fit the limit."""
        found = sorted(((path.stat().st_mtime, path) for path in self._directory.glob(f"*{SUFFIX}")), reverse=True)
        total = 0
        for _, path in found:
            total += path.stat().st_size
            if total > self._limit:
                with self._lock:
                    self._remove(path)
                if path == newest:
                    log.warning("a state is larger than --prompt-cache-size, so it was not kept")

    def _remove(self, path: Path) -> None:
        self._saved.pop(path, None)
        with suppress(OSError):
            path.unlink()

    def _reusable(self, known: Known, ids: Sequence[int]) -> int:
        """Return how many tokens of a prompt need not be computed if it begins with a saved state."""
        shared = known.shared(ids, self._model.chunk_tokens)
        return shared if shared == len(known.ids) or not self._model.is_recurrent else 0
