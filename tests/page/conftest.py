"""One browser and one server of chosen answers for all files of a worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from page.kit import BROWSER, DRIVER, Playback, chat_tokenizer, served

needs_browser = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs Chromium (Debian: apt install chromium chromium-driver)"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "driver" in getattr(item, "fixturenames", ()):
            item.add_marker(needs_browser)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from page.browser import start

    started = start(tmp_path_factory.mktemp("profile"))
    yield started
    started.quit()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Playback:
    return Playback(chat_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def address(service: Playback) -> Iterator[str]:
    with served(service) as url:
        yield url


@pytest.fixture
def page(driver: Any, address: str) -> Iterator[Any]:
    """The page, empty; at the end nothing may have been asked of others, and nothing have failed."""
    from page.browser import Page

    opened = Page(driver, address).open()
    yield opened
    opened.check()
