"""Files to copy: on this machine, or behind HTTP, read from an offset on."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol

from dymoe_runtime.bundle.bundle import DAMAGED
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.storage import HEADER_START, MANIFEST, PIECE_BYTES, Directory, Member

TIMEOUT_S = 60.0
UNREACHABLE = "check the address and the connection"


class Interrupted(Exception):
    """A connection ended before all bytes came; another try from there may bring more."""


class Source(Protocol):
    """What is copied: one file that is a packed bundle, or files by name."""

    where: str
    packed: bool

    def pieces(self, name: str, offset: int) -> tuple[int, Iterator[bytes]]:
        """Return the offset that the bytes start at, which is `offset` or 0, and the bytes of a file from there on.

        Raises DymoeError if there is no such file, and Interrupted if the connection fails.
        """


class Local:
    """A bundle on this machine."""

    def __init__(self, path: Path) -> None:
        self.where, self.packed, self._path = str(path), path.is_file(), path

    def pieces(self, name: str, offset: int) -> tuple[int, Iterator[bytes]]:
        directory = Directory(self._path.parent if self.packed else self._path)
        member = directory.open(self._path.name if self.packed else name, DAMAGED)
        return offset, _rest(member, offset)


def _rest(member: Member, offset: int) -> Iterator[bytes]:
    with closing(member):
        rest = Member(member.fd, member.path, member.start + offset, max(0, member.nbytes - offset))
        yield from rest.pieces(DAMAGED)


class Remote:
    """A bundle behind HTTP or HTTPS: a packed file, or a directory of files if the address is one."""

    def __init__(self, url: str) -> None:
        """Look whether there is a packed bundle or a directory; raise DymoeError if nothing can be reached."""
        self.where = url
        self.packed = not url.endswith("/") and self._begins_packed()
        self._base = url if self.packed else url.rstrip("/") + "/"

    def pieces(self, name: str, offset: int) -> tuple[int, Iterator[bytes]]:
        url = self._base if self.packed else self._base + urllib.parse.quote(name)
        response = _get(url, offset)
        if response is None:  # nothing is left from there on
            return offset, iter(())
        begins = offset if response.status == http.client.PARTIAL_CONTENT else 0
        if begins and not re.match(rf"bytes {offset}-", response.headers.get("Content-Range", "")):
            response.close()
            raise DymoeError(f"{url}: the server sent other bytes than were asked for; use another server")
        return begins, _body(response)

    def _begins_packed(self) -> bool:
        try:
            response = _get(self.where, 0)
            if response is None:
                return False
            with closing(response):
                return response.read(len(HEADER_START)) == HEADER_START
        except (Interrupted, OSError, http.client.HTTPException) as error:
            raise DymoeError(f"{self.where}: {error}; {UNREACHABLE}") from error
        except _Missing:
            return False  # a directory that the server does not list; its manifest may be there


class _Missing(DymoeError):
    """There is nothing at an address."""


def _get(url: str, offset: int) -> http.client.HTTPResponse | None:
    """Return the response to a request for the bytes from `offset` on, or None if there are none."""
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-", "Accept-Encoding": "identity"})
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        return response
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return None
        if error.code in (http.client.NOT_FOUND, http.client.GONE):
            raise _Missing(f"{url}: not there ({error.code}); check the address") from error
        if error.code >= 500 or error.code == http.client.TOO_MANY_REQUESTS:
            raise Interrupted(f"the server answered {error.code} {error.reason}") from error
        raise DymoeError(f"{url}: the server answered {error.code} {error.reason}; {UNREACHABLE}") from error
    except urllib.error.URLError as error:
        raise Interrupted(str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(str(error) or type(error).__name__) from error
    except ValueError as error:
        raise DymoeError(f"{url}: not an address ({error}); give one such as https://host/name.dymoe") from error


def _body(response: http.client.HTTPResponse) -> Iterator[bytes]:
    with closing(response):
        while True:
            try:
                piece = response.read(PIECE_BYTES)
            except http.client.IncompleteRead as error:
                if error.partial:
                    yield error.partial
                raise Interrupted("the connection ended early") from error
            except (OSError, http.client.HTTPException) as error:
                raise Interrupted(str(error) or type(error).__name__) from error
            if not piece:
                if response.length:
                    raise Interrupted("the connection ended early")
                return
            yield piece


def source_of(text: str) -> Source:
    """Return the source that `text` names: an address of HTTP, or a path. Raises DymoeError if nothing is there."""
    scheme = text.partition("://")[0].lower() if "://" in text else ""
    if scheme in ("http", "https"):
        return Remote(text)
    if scheme:
        raise DymoeError(f"{text}: {scheme} is not supported; give an address of http or https, or a path")
    path = Path(text)
    if not path.is_file() and not (path / MANIFEST).is_file():
        raise DymoeError(f"{path}: no bundle is there; check the path")
    return Local(path)
