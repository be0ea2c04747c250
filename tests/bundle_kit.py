"""What the tests of damaged and forged bundles share: changes with the digests made right again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path, dict[str, Any]], object]


def forge(directory: Path, change: Change) -> None:
    """Change the manifest or other files of a bundle, and make all sizes and digests right again."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(directory, manifest)
    for name, entry in manifest["files"].items():
        file = directory / name
        if "/" not in name and file.is_file() and set(entry) == {"nbytes", "sha256"}:
            entry["nbytes"] = file.stat().st_size
            entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest() if entry["sha256"] else ""
    path.write_text(sealed(manifest))


def sealed(manifest: dict[str, Any]) -> str:
    """Return the text of a manifest with the digest that the program computes for it."""
    body = {name: value for name, value in manifest.items() if name != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()})
