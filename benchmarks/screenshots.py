"""Opens a run's report in headless Chromium, says what is wrong with it, and takes the pictures that the docs show.

python benchmarks/screenshots.py RUN_FOLDER [--out docs/images] [--whole FOLDER]

At phone (390 px) and desktop width (1280 px), light and dark: console errors, requests to anywhere, what axe finds, and
whether the page is wider than the screen. --out writes report.png, report-phone.png and report-phone-tradeoff.png
there; --whole a picture of the whole page for each width and style. Needs a chromium on the PATH (or --chromium) and
playwright and axe-playwright-python from the dev extra. The last line is JSON; the exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Scheme = Literal["light", "dark"]
WIDTHS = {"phone": 390, "desktop": 1280}
HEIGHTS = {"phone": 844, "desktop": 1500}
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
PHONE_SCALE = 1.5
"""Device pixels a CSS pixel in the pictures of a phone."""

logger = logging.getLogger("benchmarks.screenshots")


def chromium(named: str | None = None) -> str:
    """Path of a Chromium. Raises SystemExit where there is none."""
    found = next(filter(None, map(shutil.which, (named or "chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise SystemExit("no Chromium on the PATH (Debian: apt-get install chromium); name one with --chromium")
    return found


def opened(browser: Browser, report: Path, size: str, scheme: Scheme, wrong: list[str]) -> Page:
    """The report in a new page with every plot drawn; what its console and network say joins `wrong`."""
    where = f"{size}, {scheme}"
    page = browser.new_page(
        viewport={"width": WIDTHS[size], "height": HEIGHTS[size]},
        color_scheme=scheme,
        device_scale_factor=PHONE_SCALE if size == "phone" else 1,
        reduced_motion="reduce",
    )
    page.on("console", lambda line: wrong.append(f"{where}: console {line.type}: {line.text}"))
    page.on("pageerror", lambda error: wrong.append(f"{where}: error: {error}"))
    page.on("request", lambda asked: wrong.extend([] if own(asked.url) else [f"{where}: asks for {asked.url}"]))
    page.goto(report.resolve().as_uri())
    page.evaluate("dispatchEvent(new Event('beforeprint'))")  # draws the plots that are not in sight too
    return page


def own(url: str) -> bool:
    """Whether an address needs no network."""
    return url.startswith(("file:", "data:", "blob:"))


def complaints(page: Page, where: str) -> list[str]:
    """What axe finds with everything unfolded, plots that were not drawn, and a page wider than the screen."""
    from axe_playwright_python.sync_playwright import Axe

    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    found: list[dict[str, Any]] = Axe().run(page).response["violations"]
    wrong = [f"{where}: axe {one['id']}: {node['html'][:160]}" for one in found for node in one["nodes"]]
    missing = page.evaluate("document.querySelectorAll('[data-figure]:not(.js-plotly-plot)').length")
    wide = page.evaluate("document.documentElement.scrollWidth")
    wrong += [f"{where}: {missing} plots are not drawn"] if missing else []
    return wrong + ([f"{where}: the page is {wide} pixels wide"] if wide > WIDTHS[where.split(",")[0]] else [])


def pictures(browser: Browser, report: Path, folder: Path, wrong: list[str]) -> list[str]:
    """The pictures of the docs: the top on a desktop and a phone, and what love costs on a phone."""
    folder.mkdir(parents=True, exist_ok=True)
    shots: tuple[tuple[str, str, Scheme, str], ...] = (
        ("report", "desktop", "light", ""),
        ("report-phone", "phone", "dark", ""),
        ("report-phone-tradeoff", "phone", "dark", "tradeoff"),
    )
    made = []
    for name, size, scheme, part in shots:
        page = opened(browser, report, size, scheme, wrong)
        if part and page.locator(f"#{part}").count():
            page.evaluate(f"document.getElementById('{part}').scrollIntoView()")
            page.wait_for_timeout(300)
        page.screenshot(path=folder / f"{name}.png")
        made.append(str(folder / f"{name}.png"))
        page.close()
    return made


def look(report: Path, browser_path: str, out: Path | None, whole: Path | None) -> dict[str, Any]:
    """Open the report in each width and style; returns what is wrong and the pictures made."""
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []
    made: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for size in WIDTHS:
            for scheme in SCHEMES:
                page = opened(browser, report, size, scheme, wrong)
                if whole is not None:
                    whole.mkdir(parents=True, exist_ok=True)
                    page.screenshot(path=whole / f"{size}-{scheme}.png", full_page=True)
                    made.append(str(whole / f"{size}-{scheme}.png"))
                wrong += complaints(page, f"{size}, {scheme}")
                page.close()
        if out is not None:
            made += pictures(browser, report, out, wrong)
        version = browser.version
        browser.close()
    return {"benchmark": "screenshots", "chromium": version, "wrong": wrong, "pictures": made}


def main(arguments: list[str]) -> int:
    """Look at one report; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="screenshots.py", description=__doc__)
    parser.add_argument("folder", type=Path, help="a run folder with a report.html")
    parser.add_argument("--out", type=Path, help="folder for the pictures of the docs")
    parser.add_argument("--whole", type=Path, help="folder for pictures of the whole page")
    parser.add_argument("--chromium", help="the browser to use")
    given = parser.parse_args(arguments)
    report = given.folder / "report.html"
    if not report.is_file():
        parser.error(f"{report} is not there; python -m rluf.report {given.folder} writes it")
    found = look(report, chromium(given.chromium), given.out, given.whole)
    for line in found["wrong"]:
        logger.info("%s", line)
    sys.stdout.write(json.dumps(found) + "\n")
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
