"""The web page in a real browser: chat with two policies, give a heart, see scores, find the row in the store.

RLUF_SCREENSHOT is the PNG file for screenshots; width and style are added to its name.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import pytest
import torch
from playwright.sync_api import Page, expect, sync_playwright
from transformers import AutoModelForCausalLM

from rluf.config.settings import Settings
from rluf.models.hub import load_tokenizer, render_prompt, resolve_model
from rluf.prepare.readers.feedback_folder import list_row_files
from rluf.reward.model import RewardModel
from rluf.serve.store import FeedbackStore
from rluf.types import Message
from rluf.utils.paths import resolve_cache_folder
from tests.serve.conftest import TOKEN, LocalBackend, make_rules, run_http_server

pytestmark = pytest.mark.slow

COLOR_SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def make_policy(seed: int) -> Callable[[Sequence[Message]], str]:
    """A real policy of random weights; unprintable characters become spaces."""
    folder = resolve_model(os.environ.get("RLUF_PAGE_POLICY", "tiny"), resolve_cache_folder(Settings()))
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder).eval()

    def sample_response(messages: Sequence[Message]) -> str:
        ids = torch.tensor([render_prompt(tokenizer, messages)])
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed)
            token_ids = model.generate(ids, max_new_tokens=40, do_sample=True, temperature=0.7)
        text = str(tokenizer.decode(token_ids[0, ids.shape[1] :], skip_special_tokens=True))
        return "".join(char if char.isprintable() else " " for char in text).strip() or "..."

    return sample_response


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if BROWSER is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1100, "height": 780})
        browser.close()


def save_screenshot(page: Page, suffix: str) -> None:
    """Save a screenshot of the whole page if RLUF_SCREENSHOT is set."""
    if "RLUF_SCREENSHOT" in os.environ:
        path = Path(os.environ["RLUF_SCREENSHOT"])
        page.screenshot(path=path.with_stem(path.stem + suffix), full_page=True)


def list_tab_stops(page: Page, start: str, count: int) -> list[str]:
    """Elements that the Tab key reaches after `start`: ids, else labels, else tags."""
    page.locator(start).focus()
    tab_stops: list[str] = []
    for _ in range(count):
        page.keyboard.press("Tab")
        script = "document.activeElement.id || document.activeElement.ariaLabel || document.activeElement.tagName"
        tab_stops.append(str(page.evaluate(script)))
    return tab_stops


LAYOUT_SCRIPT = """() => {
    const shown = [...document.querySelectorAll("body *")].filter(
        (e) => e.checkVisibility() && e.getClientRects().length && !e.matches(".skip, meter, meter *, script"));
    const box = (e) => e.getBoundingClientRect();
    const name = (e) => `${e.tagName} ${e.id || e.ariaLabel || e.textContent.slice(0, 30)}`;
    const leaves = shown.filter(
        (e) => e.matches("button, input, textarea, summary") || (!e.children.length && e.textContent));
    const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
    return [
        ...shown.filter((e) => box(e).right > innerWidth + 1 || box(e).left < -1).map((e) => `outside: ${name(e)}`),
        ...leaves.filter((e) => e.scrollWidth > e.clientWidth + 1 && e.clientWidth).map((e) => `cut: ${name(e)}`),
        ...leaves.flatMap((a, i) => leaves.slice(i + 1).filter((b) => !a.contains(b) && !b.contains(a)
            && overlap(box(a), box(b))).map((b) => `overlap: ${name(a)} and ${name(b)}`)),
    ];
}"""
"""Elements outside the viewport, labels that are cut, and texts or controls that overlap."""


LONG_NAMES_SCRIPT = """() => {
    document.querySelectorAll("h2, .who").forEach((e, i) => { e.textContent = i + "-policy".repeat(12); });
    document.querySelectorAll(".score").forEach((e) => { e.firstChild.data = "a".repeat(32) + " 0.50 "; });
    document.querySelectorAll(".text").forEach((e) => { e.textContent = "w".repeat(300); });
}"""
"""The longest names that settings allow, and a response without a space."""


def check_layout(page: Page, run_axe: Callable[[Page], Any], suffix: str = "") -> None:
    """No axe finding, overlap or cut label at the width of a phone and of a desktop, light and dark."""
    for width, scheme in itertools.product((390, 1280), COLOR_SCHEMES):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 800})
        view = f"{suffix}-{width}-{scheme}"
        assert (view, page.evaluate(LAYOUT_SCRIPT)) == (view, [])
        assert (view, run_axe(page).response["violations"]) == (view, [])
        save_screenshot(page, view)


def test_a_heart_in_the_browser_becomes_a_row_of_the_log(
    page: Page, reward_models: dict[str, RewardModel], tmp_path: Path
) -> None:
    store = FeedbackStore(str(tmp_path), tmp_path / ".log", reaction_window_s=60)
    store.start()
    backend = LocalBackend(
        reward_models, store, dataclasses.replace(make_rules(token=TOKEN), allowed_hosts=None),
        policies={"base": make_policy(1), "candidate": make_policy(2)},
    )  # fmt: skip
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    score_requests: list[Any] = []
    page.on("request", lambda request: score_requests.append(request) if request.url.endswith("/v1/score") else None)
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    with run_http_server(backend) as url:
        page.goto(url)
        expect(page.get_by_role("status")).to_contain_text("Bearer")
        check_layout(page, axe.Axe().run, "-token")
        page.get_by_label("Token of the service (stored in this tab only)").fill(TOKEN)
        page.get_by_label("Token of the service (stored in this tab only)").press("Tab")
        expect(page.get_by_role("region", name="candidate")).to_be_visible()
        page.get_by_label("Your message").fill("How do I thank a friend who helped me move?")
        page.get_by_label("Your message").press("Enter")
        expect(page.get_by_role("status")).to_have_text("Done.", timeout=20_000)
        column = page.get_by_role("region", name="candidate")
        expect(column.get_by_text("P[Love]")).to_be_visible()
        assert page.locator("meter").count() == 6
        # As the row of the log has it: a reply that was cut is not scored as a complete one.
        fields = {"messages", "response", "finish_reason", "user", "conversation_id"}
        assert [set(request.post_data_json) for request in score_requests] == [fields, fields]
        heart = column.get_by_role("button", name="Love this reply of candidate")
        expect(heart).to_have_attribute("aria-pressed", "false")
        heart.focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_have_text("Your heart is stored.")
        expect(heart).to_have_attribute("aria-pressed", "true")
        buttons = [
            f"{text}{name}" for name in ("base", "candidate") for text in ("Love this reply of ", "Better reply: ")
        ]
        assert list_tab_stops(page, ".skip", 8) == ["SUMMARY", *buttons, "text", "send", "again"]
        choice = column.get_by_role("button", name="Better reply: candidate")
        choice.click()
        expect(page.get_by_role("status")).to_have_text("Your choice is stored.")
        expect(choice).to_have_attribute("aria-pressed", "true")
        check_layout(page, axe.Axe().run)
        displayed_text = column.locator(".assistant .text").inner_text()
        page.evaluate(LONG_NAMES_SCRIPT)
        check_layout(page, axe.Axe().run, "-long")
    assert len(problems) == 1, problems  # the browser's own message about the first reply, before the token was entered
    assert "401" in problems[0]
    store.flush_settled(all_rows=True)
    (parquet_file,) = list_row_files(tmp_path)
    rows = {row["model_version"]: row for row in pq.read_table(parquet_file).to_pylist()}
    assert {name: row["reaction"] for name, row in rows.items()} == {"base-1": None, "candidate-1": "love"}
    assert rows["candidate-1"]["response"].split() == displayed_text.split()
    (preference_file,) = (tmp_path / "_preferences").rglob("*.parquet")
    (preference,) = pq.read_table(preference_file).to_pylist()
    assert (preference["chosen"], preference["rejected"]) == tuple(
        rows[name]["response"] for name in ("candidate-1", "base-1")
    )
    assert "visitor" not in rows["candidate-1"]["user_id"]
