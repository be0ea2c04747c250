"""The files of the page: what they may name, their weight, and the headers that they come with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from serving.kit import Scripted, app_of, ask
from text_kit import make_tokenizer

from dymoe_runtime.serving.http.answers.settings import Settings
from dymoe_runtime.serving.http.page import FOLDER, HEADERS, PREFIX, TYPES, page_routes

MAX_BYTES = 300_000
FILES = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in TYPES]
OURS = [path for path in FILES if path.parent.name != "vendor"]


def names_in(path: Path) -> list[str]:
    """The files that a file of the page asks for, as paths from its folder."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r'(?:from|import) "(\.[^"]*)"|(?:href|src)="(page/[^"]*)"|src: "(page/[^"]*)"', text)
    return ["".join(names) for names in found]


def test_the_page_is_light_and_whole() -> None:
    assert sum(path.stat().st_size for path in FILES) < MAX_BYTES
    asked = {"index.html"}
    for path in FILES:
        for name in names_in(path):
            file = FOLDER / name.removeprefix("page/") if name.startswith("page/") else path.parent / name
            assert file.resolve() in FILES, (path.name, name)
            asked.add(file.resolve().relative_to(FOLDER).as_posix())
    assert asked == {path.relative_to(FOLDER).as_posix() for path in FILES}


def test_the_page_names_no_other_host() -> None:
    for path in OURS:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"^\s*//.*$| // .*$", "", text, flags=re.MULTILINE), path


def test_kept_libraries_are_those_that_are_told_and_have_their_licences() -> None:
    vendor = FOLDER / "vendor"
    told = re.findall(
        r"^(\w+\.js) +(\w+) +([\d.]+) .*\((licenses/\w+\.txt)", (vendor / "versions.txt").read_text(), re.M
    )
    assert {file for file, *_ in told} == {path.name for path in vendor.glob("*.js")}
    for file, package, version, licence in told:
        head = (vendor / file).read_text(encoding="utf-8")[:300].lower()
        assert f"{package} v{version}" in head or f"{package} {version}" in head, file
        assert len((vendor / licence).read_text(encoding="utf-8")) > 1000
    assert {path.name for path in (vendor / "licenses").iterdir()} == {Path(licence).name for *_, licence in told}


@pytest.mark.parametrize("url", [route.path for route in page_routes()])
def test_each_file_comes_with_its_type_and_the_policy_without_a_key(url: str) -> None:
    app = app_of(Scripted(make_tokenizer()), Settings(keys=("first-key",)))
    answer = ask(app, "GET", url)
    assert answer.status_code == 200 and answer.headers["content-type"] == TYPES[Path(url).suffix or ".html"]
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    again = ask(app, "GET", url, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"") and again.headers["etag"] == answer.headers["etag"]
    assert ask(app, "HEAD", url).status_code == 200
    assert ask(app, "GET", "/props").status_code == 401


def test_the_policy_lets_in_nothing_but_files_of_the_server() -> None:
    policy = dict(part.split(" ", 1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == policy["script-src"] == policy["style-src"] == "'self'"
    assert "unsafe" not in str(policy) and "*" not in str(policy)


@pytest.mark.parametrize(
    "path", ["", "vendor/versions.txt", "..%2f..%2fcli%2frun.py", "../http/page.py", "app/", "app/none.js"]
)
def test_nothing_else_is_served_from_the_folder(path: str) -> None:
    assert ask(app_of(Scripted(make_tokenizer())), "GET", PREFIX + path).status_code == 404


def test_the_page_is_not_shown_under_another_name() -> None:
    assert ask(app_of(Scripted(make_tokenizer())), "GET", "/", headers={"Host": "evil.example"}).status_code == 403
