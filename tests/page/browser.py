"""A page in a headless browser, by what a reader does with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from page.kit import BROWSER, DRIVER, PICTURES, WIDTHS, until
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement


def start(profile: Path) -> Chrome:
    """Start a browser that notes each request and each message of its console."""
    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-extensions",
        "no-first-run",
        "disable-dev-shm-usage",
    ):
        options.add_argument(f"--{flag}")
    options.add_argument("--disable-background-networking")
    options.add_argument(f"--user-data-dir={profile}")
    options.add_argument("about:blank")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    return Chrome(options, Service(str(DRIVER)))


class Page:
    """The page at an address."""

    def __init__(self, driver: Chrome, url: str) -> None:
        self.driver, self.url = driver, url
        self.asked: dict[str, str] = {}  # id of each request -> its address
        self.refused: set[str] = set()  # ids of requests that the policy of the page has refused
        self.said: list[str] = []  # by the console
        self.note()
        self.forget()

    def key(self, key: str) -> None:
        """Press a key, wherever the focus is."""
        ActionChains(self.driver).send_keys(key).perform()

    def open(self, width: str = "wide", dark: bool = False, empty: bool = True, known: bool = True) -> Page:
        """Load the page; `empty` forgets what the browser has kept of it, `known` waits for the name of the model."""
        size = WIDTHS[width]
        cdp = self.driver.execute_cdp_cmd
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": width == "phone"}
        cdp("Emulation.setDeviceMetricsOverride", metrics)
        cdp("Emulation.setTouchEmulationEnabled", {"enabled": width == "phone"})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        cdp("Emulation.setEmulatedMedia", {"features": [scheme]})
        if empty:
            cdp("Storage.clearDataForOrigin", {"origin": self.url, "storageTypes": "all"})
            self.driver.get("about:blank")
        self.driver.get(self.url)
        until(lambda: not known or self.run("return document.querySelector('#model').textContent"))
        return self

    def forget(self) -> None:
        """Forget what was logged before."""
        self.asked.clear()
        self.refused.clear()
        self.said.clear()

    def find(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> WebElement:
        return until(lambda: self.find(selector))[0]

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.innerText)"
        return list(self.run(script, selector))

    def run(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def press(self, name: str) -> None:
        """Press the button of this name or text that can be pressed."""
        script = """
            return [...document.querySelectorAll("button")].filter((button) =>
                (button.getAttribute("aria-label") ?? button.textContent) === arguments[0]
                && button.checkVisibility() && !button.disabled).at(-1)
        """
        self.run("arguments[0].click()", until(lambda: self.run(script, name)))

    def send(self, text: str) -> None:
        self.one("#message").send_keys(text, Keys.ENTER)

    def say(self, text: str) -> None:
        """Send a message by the button, as one does on a phone."""
        self.one("#message").send_keys(text)
        self.press("Send")

    def rest(self) -> None:
        """Wait until nothing moves but what always does."""
        script = "return document.getAnimations().every((one) => one.effect.getTiming().iterations === Infinity)"
        until(lambda: self.run(script))

    def ask(self, text: str) -> str:
        """Send a message, and return the answer as it is seen."""
        self.send(text)
        self.finish()
        answers = self.texts(".answer .text")
        assert answers, self.text("#transcript")
        return answers[-1]

    def finish(self) -> None:
        """Wait until nothing is being answered."""
        until(
            lambda: self.run(
                "return !document.querySelector('#send').hidden && !document.querySelector('[aria-busy=true]')"
            )
        )

    def picture(self, name: str) -> None:
        """Keep what is seen as build/page/NAME.png."""
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(PICTURES / f"{name}.png"))

    def check(self, *faults: str) -> None:
        """Assert that all requests went to the server, and that the console has nothing but messages with `faults`."""
        self.note()
        sent = [url for request, url in self.asked.items() if request not in self.refused]
        outside = [url for url in sent if re.match("(http|ws|ftp)", url) and not url.startswith(f"{self.url}/")]
        assert sent and not outside, outside
        said = [message for message in self.said if not any(fault in message for fault in faults)]
        assert not said, said

    def note(self) -> None:
        """Read what the browser has logged since the last time."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            method, params = message["method"], message["params"]
            if method == "Network.requestWillBeSent":
                self.asked[params["requestId"]] = params["request"]["url"]
            elif method == "Network.loadingFailed" and params.get("blockedReason") == "csp":
                self.refused.add(params["requestId"])
        self.said += [entry["message"] for entry in self.driver.get_log("browser")]
