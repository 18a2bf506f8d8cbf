"""The site is whole, needs no network, and reads well in a browser."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.xdist_group("site")
ROOT = Path(__file__).parents[1]
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--window-size=1400,1000",
]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    for needed in ("sphinx", "myst_nb", "furo", "latex2mathml"):
        pytest.importorskip(needed, reason=f"no {needed}: pip install -e .[docs]")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, ROOT / "docs" / "build.py", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Page(HTMLParser):
    """The anchors of a page, what it links to and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {found.get("id") or ""}
        self.links += [found["href"] or ""] if tag == "a" and "href" in found else []
        self.loads += [found["href"] or ""] if tag == "link" else []
        self.loads += [found[key] or "" for key in ("src", "data") if key in found]


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_internal_link_resolves(pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and anchor not in pages[target].ids):
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert not [url for url in page.loads if re.match(r"(https?:)?//", url)], path
        assert not re.search(r"(?:import|from)\s*\(?['\"]https?:", path.read_text()), path
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", path.read_text()), path


def test_every_notebook_has_a_page_and_every_export_an_entry(pages: dict[Path, Page]) -> None:
    site = next(path.parent for path in pages if path.name == "genindex.html")
    for notebook in (ROOT / "nbs").rglob("*.ipynb"):
        page = notebook.relative_to(ROOT / "nbs").with_suffix(".html")
        assert site / page in pages or re.search(r"(^|/)[._]", str(page))
    for path in (ROOT / "pruning_bias").glob("[!_]*.py"):
        if match := re.search(r"^__all__ = (\[.*?\])", path.read_text(), re.M | re.S):
            ids = pages[site / "api" / f"{path.stem}.html"].ids
            names = ast.literal_eval(match[1])
            missing = {f"pruning_bias.{path.stem}.{name}" for name in names} - ids
            assert not missing


def test_no_markup_of_notebooks_is_left(pages: dict[Path, Page]) -> None:
    for path in pages:
        if "_modules" not in path.parts:
            text = re.sub(r"<[^>]+>", "", path.read_text())
            assert not re.search(r"^(#\| |:::|\{py:obj\})|\{\.callout", text, re.M), path


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium")
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in found:
        pytest.skip("no chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(found[1]))
    yield driver
    driver.quit()


def looks_whole(browser: Any) -> None:
    """No picture is missing and nothing broke."""
    missing = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert browser.execute_script(missing) == 0
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def test_a_reader_walks_through_it(site: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def follow(pattern: str) -> None:
        link = browser.find_element(By.CSS_SELECTOR, f".sidebar-tree a[href*='{pattern}']")
        center = "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})"
        browser.execute_script(center, link)
        link.click()
        looks_whole(browser)

    browser.get((site / "index.html").as_uri())
    looks_whole(browser)

    follow("api/gates.html")
    entry = browser.find_element(By.ID, "pruning_bias.gates.openness")
    told = entry.find_element(By.XPATH, "..")
    assert entry.is_displayed() and "norm: Literal['l1', 'l0'] = 'l1'" in entry.text
    assert re.search(r"scores\W+any shape", told.text) and "scalar in [0, 1]" in told.text

    follow("02_gates.html")
    assert browser.find_element(By.TAG_NAME, "math").size["height"] > 5
    follow("experiments/")
    box = browser.find_element(By.CSS_SELECTOR, "div.admonition .highlight")
    assert box.is_displayed() and "seed" in box.text
    if list((ROOT / "nbs" / "reports").glob("*.ipynb")):
        follow("reports/")
        assert browser.find_elements(By.CSS_SELECTOR, ".cell_output img, .cell_output table")
        follow("experiments/")

    query = browser.find_element(By.CSS_SELECTOR, ".sidebar-search")
    query.send_keys("effect size")
    query.submit()
    hits = WebDriverWait(browser, 30).until(
        lambda _: browser.find_elements(By.CSS_SELECTOR, "#search-results ul.search li a")
    )
    hits[0].click()
    looks_whole(browser)
    assert re.search(r"effect[ _]size", browser.find_element(By.TAG_NAME, "article").text, re.I)
