"""The report in headless Chromium: opened from the disk, without a network."""

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from psla_fast.report import ReportOptions, build_report, render_page
from tests.reports import HOSTILE, make_classes, read_data, write_run
from tests.tiny import tiny_config, train_tiny

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@cache
def render(runs: tuple[Path, ...], title: str) -> str:
    return render_page(build_report(runs, ReportOptions(title=title)))


class Opener:
    """Opens pages of runs, and keeps what they say on the console or ask of others."""

    def __init__(self, browser: "Browser", folder: Path) -> None:
        self.browser, self.path = browser, folder / "report.html"
        self.said: list[str] = []
        self.written = ""

    def __call__(self, *runs: Path, width: int = 1280, scheme: str = "light", title: str = "") -> "Page":
        self.written = render(runs, title)
        self.path.write_text(self.written)
        context = self.browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("console", lambda entry: self.said.append(entry.text))
        page.on(
            "request",
            lambda asked: (
                self.said.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None
            ),
        )
        page.goto(self.path.as_uri())
        page.wait_for_selector("#curve-charts > *")
        return page


@pytest.fixture
def opened(browser: "Browser", tmp_path: Path) -> "Iterator[Opener]":
    """Opens pages, which must stay without errors and ask for nothing."""
    opener = Opener(browser, tmp_path)
    yield opener
    for context in browser.contexts:
        context.close()
    assert opener.said == []


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two trained seeds, and a run that differs and is unfinished."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train_tiny(tiny_config(shards, folder / f"base_{seed}", "--seed", str(seed)))
    other = write_run(folder / "other", "--optim.lr", "0.02", shards=shards, epochs=2)
    return [folder / "base_0", folder / "base_1", other]


def column(page: "Page", table: str, number: int) -> list[str]:
    cells: list[str] = page.evaluate(
        "([id, n]) => [...document.querySelectorAll(`#${id} tbody tr`)].filter((row) => !row.hidden)"
        ".map((row) => row.cells[n].textContent)",
        [table, number],
    )
    return cells


def head(page: "Page", table: str) -> list[str]:
    return page.locator(f"#{table} thead th").all_inner_texts()


def seconds_of_sorting(page: "Page") -> float:
    """Processor time of sorting by each column once, by column: others compute on the machine, too."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def taken() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return float(next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration"))

    before = taken()
    page.evaluate(
        "document.querySelectorAll('#class-table th button')"
        ".forEach((button) => { button.click(); document.body.offsetHeight; })"
    )
    return (taken() - before) / len(head(page, "class-table"))


def test_all_classes_are_sorted_by_click_and_by_keyboard(opened: Opener, tmp_path: Path):
    page = opened(write_run(tmp_path / "a", classes=make_classes(527), clips=530))
    names = column(page, "class-table", 0)
    assert len(names) == 527
    data = read_data(opened.written)
    ap = data["runs"][0]["ap"]["ensemble"]
    last = len(head(page, "class-table")) - 1
    assert column(page, "class-table", last)[-1] == "–"  # the class without clips
    shown = [float(text) for text in column(page, "class-table", last)[:-1]]
    wanted = sorted((value for value in ap if value is not None), reverse=True)
    assert shown == pytest.approx(wanted, abs=6e-4)
    sort = page.locator("#class-table thead th").first.locator("button")
    sort.click()
    assert column(page, "class-table", 0) == [f"Class {n}" for n in range(527)]  # 2 before 10
    page.keyboard.press("Enter")
    assert column(page, "class-table", 0) == [f"Class {n}" for n in range(526, -1, -1)]
    assert page.locator("#class-table thead th").first.get_attribute("aria-sort") == "descending"
    by_count = page.locator("#class-table thead th", has_text="eval").locator("button")
    by_count.focus()
    page.keyboard.press("Space")
    counts = [int(text) for text in column(page, "class-table", 2)]
    assert counts == sorted(data["positives"]["eval"], reverse=True)
    assert 0 < seconds_of_sorting(page) < 0.3


def test_classes_are_searched_by_name_and_mid(opened: Opener, tmp_path: Path):
    page = opened(write_run(tmp_path / "a", classes=make_classes(20), clips=40))
    page.fill("#class-search", "cLaSs 1")
    assert sorted(column(page, "class-table", 0)) == sorted(f"Class {n}" for n in (1, *range(10, 20)))
    assert page.inner_text("#class-count") == "11 of 20 classes"
    page.locator("#class-table thead button").first.click()
    assert len(column(page, "class-table", 0)) == 11  # sorting keeps the search
    page.fill("#class-search", "/m/7")
    assert column(page, "class-table", 0) == ["Class 7"]
    page.fill("#class-search", "")
    assert page.inner_text("#class-count") == "20 classes"


def test_hostile_names_run_nothing_and_are_shown_as_they_are(opened: Opener, tmp_path: Path):
    run = write_run(tmp_path / "<img src=x onerror=window.hit=4>", classes=HOSTILE)
    other = write_run(tmp_path / "<b>bold<script>window.hit=5<", "--optim.lr", "0.5", classes=HOSTILE)
    page = opened(run, other, title="</title><script>window.hit=6</script>")
    assert page.title() == "</title><script>window.hit=6</script> – psla_fast report"
    assert set(column(page, "class-table", 0)) == set(HOSTILE.names)
    for place in ("#bars .bar", "#scatter .spot", "#heat .cell", "#curve-charts svg"):
        page.locator(place).first.scroll_into_view_if_needed()
        page.wait_for_timeout(200)  # scrolling hides the tip
        page.locator(place).first.hover(force=True)  # other points may lie above it
        assert page.is_visible("#tip")
    page.locator(".run-pick").first.select_option(index=1)
    assert page.inner_text(".run-pick option:nth-child(2)") == "<b>bold<script>window.hit=5<"
    assert page.evaluate("window.hit") is None
    assert page.locator("main b b, img:not([src^=data]), main script").count() == 0


def test_the_pages_own_policy_stops_a_script_that_got_in(opened: Opener, tmp_path: Path):
    page = opened(write_run(tmp_path / "a", epochs=1))
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.hit=1>')")
    page.wait_for_timeout(200)
    assert page.evaluate("window.hit") is None
    assert any("Content Security Policy" in text for text in opened.said)
    opened.said.clear()


def test_the_chosen_run_and_kind_of_scores_change_what_is_shown(opened: Opener, runs: list[Path]):
    page = opened(*runs)
    data = read_data(opened.written)
    assert head(page, "class-table")[-3:] == ["base", "other", "difference"]
    worst = page.locator("#worst-classes .figure").all_inner_texts()
    page.locator(".run-pick").last.select_option("2")
    assert {pick.input_value() for pick in page.locator(".run-pick").all()} == {"2"}
    changed = page.locator("#worst-classes .figure").all_inner_texts()
    assert changed != worst
    assert float(changed[0]) == pytest.approx(min(filter(None, data["runs"][2]["ap"]["ensemble"])), abs=6e-4)
    page.select_option("#kind-pick", "best")
    mean = sum(data["runs"][n]["ap"]["best"][3] for n in (0, 1)) / 2
    row = page.locator("#class-table tbody tr", has_text="Class 3")
    base = head(page, "class-table").index("base")
    assert float(row.locator("td, th").nth(base).inner_text()) == pytest.approx(mean, abs=6e-4)
    assert page.locator(".example").count() == len(data["examples"]) > 0
    assert page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")


def test_a_chart_tells_its_values_by_keyboard_and_hides_groups(opened: Opener, runs: list[Path]):
    page = opened(*runs)
    data = read_data(opened.written)
    chart = page.locator("#curve-charts svg").first
    chart.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    told = page.inner_text("#tip")
    assert told.startswith("epoch 2")
    assert f"{data['runs'][2]['epochs']['map'][1]:.4f}" in told
    lines = chart.locator("path.line").count()
    page.locator("#legend button", has_text="other").click()
    assert page.locator("#curve-charts svg").first.locator("path.line").count() == lines - 2
    page.keyboard.press("Enter")
    assert page.locator("#curve-charts svg").first.locator("path.line").count() == lines


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_fits_its_width_and_follows_the_colour_scheme(
    opened: Opener, runs: list[Path], width: int, scheme: str
):
    page = opened(*runs, width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wide = page.evaluate(
        "[...document.querySelectorAll('main svg')].filter((svg) => !svg.closest('.scroll') &&"
        "svg.getBoundingClientRect().right > svg.closest('.card').getBoundingClientRect().right).length"
    )
    assert wide == 0
    back, text = page.evaluate(
        "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name].match(/\\d+/g)"
        ".reduce((sum, part) => sum + Number(part), 0))"
    )
    assert (back > text) == (scheme == "light")


def test_a_run_without_an_epoch_opens(opened: Opener, tmp_path: Path):
    run = write_run(tmp_path / "a", epochs=0)
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"epoch": 1, "step": 20, "loss": 0.5, "lr": 0.01}\n')
    page = opened(run)
    assert "No epoch is finished yet" in page.inner_text("#results")
    assert page.locator("#curve-charts .card").count() == 2  # loss and learning rate, a point each
