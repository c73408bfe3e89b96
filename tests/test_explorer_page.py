"""Proves that the explorer's page works in a real browser: headless Chromium opens it from the
disk, clicks, types and reads what is shown. Routing is made up, so that what must be shown is
known."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.explorer_pages import made_documents, made_page, made_view, open_browser

HOSTILE = (
    "<img src=x onerror='window.__pwned=1'>",
    "</script><script>window.__pwned=2</script>",
    "<!--<script>window.__pwned=3",
    "]]>\u2028\u2029<svg onload=window.__pwned=4>",
    '"><iframe srcdoc="<script>top.__pwned=5</script>">{{ script }}',
    "javascript:window.__pwned=6",
)
FOREIGN = "naïve 日本語, Привет! 🙂 ﷺ"
WORDS = ("anchor tide sail", "bread salt oven", "seed soil rain")
COUNT = 320


def texts() -> list[str]:
    rng = np.random.default_rng(0)
    made = [f"{WORDS[i % 3]} number {i} " + "x" * int(rng.integers(0, 60)) for i in range(COUNT)]
    made[5] = FOREIGN
    made[6:12] = HOSTILE
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The documents, the two models' views, and the address of their page."""
    names = ["harbour", "kitchen", HOSTILE[0]]
    documents = made_documents(texts(), [names[i % 3] for i in range(COUNT)])
    views = [
        made_view(documents, "emo", seed=1),
        made_view(documents, HOSTILE[1], 300, lambda c: f"{HOSTILE[c % 6]} {c}", seed=2),
    ]
    path = tmp_path_factory.mktemp("explorer") / "page.html"
    path.write_bytes(made_page(documents, views))
    return documents, views, path.as_uri()


@pytest.fixture(scope="module")
def tab():
    """One page of one browser. It remembers what it was told and what it asked for."""
    with open_browser() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        tab.set_default_timeout(10_000)
        tab.told, tab.asked = [], []
        tab.on("console", lambda message: tab.told.append(message.text))
        tab.on("pageerror", lambda error: tab.told.append(str(error)))
        tab.on("request", lambda request: tab.asked.append(request.url))
        yield tab


@pytest.fixture
def page(tab, made):
    """The page as it opens. In the end it must have told nothing, asked the network for nothing,
    and run nothing of its data."""
    if made[2] not in tab.url:
        open_anew(tab, made)
    tab.told.clear()
    show(tab, "")
    yield tab
    assert tab.told == []
    assert all(url.startswith(("file:", "data:", "about:")) for url in tab.asked)
    assert tab.evaluate("window.__pwned") is None


def open_anew(tab, made, fragment: str = "") -> None:
    """Open the page from the disk at a fragment, and wait until it answers and can search."""
    tab.goto("about:blank")
    tab.goto(f"{made[2]}#{fragment}")
    until(tab, "performance.getEntriesByName('searchable').length")


def show(tab, fragment: str) -> None:
    """Go to another fragment of the open page."""
    tab.evaluate(
        """(fragment) => new Promise((resolve) => {
          if (location.hash === fragment) { resolve(); return; }
          addEventListener("hashchange", () => setTimeout(resolve), {once: true});
          location.hash = fragment;
        })""",
        fragment and f"#{fragment}",
    )


def until(tab, condition: str) -> None:
    """Wait for a condition in the page. (Its policy forbids what `wait_for_function` does.)"""
    for _ in range(300):
        if tab.evaluate(condition):
            return
        tab.wait_for_timeout(20)
    pytest.fail(f"still not so: {condition}")


def until_title(tab, start: str) -> None:
    until(tab, f"document.querySelector('#panel h2').textContent.startsWith({start!r})")


def settle(tab) -> None:
    """Wait until what was pressed is shown: the address changes first, and then the page."""
    tab.evaluate(
        "new Promise((shown) => setTimeout(() => requestAnimationFrame(() => setTimeout(shown))))"
    )


def address(tab) -> str:
    settle(tab)
    return tab.evaluate("location.hash")


def counts(tab, section: int) -> list[int]:
    """The numbers of a histogram: 0 domains, 1 clusters, 2 experts."""
    settle(tab)
    found = tab.locator("#filters details").nth(section).locator(".number").all_inner_texts()
    return [int(number.replace(",", "")) for number in found]


def title(tab) -> str:
    settle(tab)
    return tab.locator("#panel h2").inner_text()


def place_of(tab, view, m: int, document: int) -> tuple[float, float]:
    """Where a document is on the screen, on the map of the m-th model."""
    box, (x, y) = tab.locator("figure canvas").nth(m).bounding_box(), view.maps["pca"][document]
    return box["x"] + 20 + x * (box["width"] - 40), box["y"] + 42 + y * (box["height"] - 62)


def pool_members(view, layer: int, among: np.ndarray) -> list[int]:
    """The oracle of a histogram of experts: documents with each expert among their eight best."""
    mean_UN = view.routing.mean[layer][among]
    best = np.argsort(-mean_UN, axis=1, kind="stable")[:, :8]
    return [int((best == e).sum()) for e in range(mean_UN.shape[1])]


# ---- filters


def test_histograms_count_what_the_other_filters_leave(page, made):
    documents, views, _ = made
    cluster_U, domain_U = views[0].cluster_U, documents.domain_U
    assert counts(page, 0) == np.bincount(domain_U).tolist()
    assert counts(page, 1) == np.bincount(cluster_U).tolist()
    assert counts(page, 2) == pool_members(views[0], 1, np.arange(COUNT))
    page.locator("#filters .row").nth(0).click()
    page.locator("#filters .row").nth(4).click()
    in_domain, in_cluster = domain_U == 0, cluster_U == 1
    assert counts(page, 0) == np.bincount(domain_U[in_cluster], minlength=3).tolist()
    assert counts(page, 1) == np.bincount(cluster_U[in_domain], minlength=3).tolist()
    assert counts(page, 2) == pool_members(views[0], 1, np.flatnonzero(in_domain & in_cluster))
    assert title(page) == f"{(in_domain & in_cluster).sum()} of {COUNT} documents"
    # A second value of a kind adds its documents.
    page.locator("#filters .row").nth(1).click()
    assert title(page).startswith(f"{((domain_U < 2) & in_cluster).sum()} of")
    page.get_by_role("button", name="Clear all").click()
    assert title(page) == f"{COUNT} documents"


def test_an_expert_filters_by_the_pools_of_its_layer(page, made):
    show(page, "layer=0&expert0=0.3")
    expected = pool_members(made[1][0], 0, np.arange(COUNT))[3]
    assert title(page) == f"{expected} of {COUNT} documents"
    assert page.locator(".row[aria-pressed=true]").inner_text().startswith("Expert 3")


# ---- search


def test_search_finds_text_domains_clusters_and_experts(page):
    expected = sum("bread salt" in text for text in texts())
    page.keyboard.press("/")
    page.keyboard.type("Bread SALT")
    until(page, f"document.getElementById('found').textContent.includes('in {expected} documents')")
    page.keyboard.press("Enter")
    until_title(page, f"{expected} of")
    assert "text=Bread+SALT" in address(page)
    page.keyboard.press("Escape")
    assert title(page) == f"{COUNT} documents"
    for words, shown in (
        ("domain harb", "harbour ✕"),
        ("cluster 2", "cluster 2 label of 2 of emo ✕"),
    ):
        page.fill("#search", words)
        page.keyboard.press("ArrowDown")
        assert page.locator("#found [aria-selected=true]").count() == 1
        page.keyboard.press("Enter")
        settle(page)
        assert page.locator("#panel .chips button").first.inner_text() == shown
        page.keyboard.press("Escape")
        settle(page)
    page.fill("#search", "expert 0.7")
    page.locator("#found li:has(small:text-is('Expert'))").first.click()
    assert title(page) == "Expert 7" and "layer=0" in address(page)


# ---- keys, links, themes


def test_keys(page):
    page.keyboard.press("ArrowRight")
    assert title(page) == "Document 100"
    page.keyboard.press("ArrowRight")
    until_title(page, "Document 101")
    page.keyboard.press("ArrowLeft")
    until_title(page, "Document 100")
    page.keyboard.press("Escape")
    assert title(page) == f"{COUNT} documents"
    page.keyboard.press("?")
    assert page.locator("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("t")  # not a key in the box
    page.keyboard.press("Escape")
    assert "theme" not in address(page)
    page.keyboard.press("t")
    settle(page)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_link_opens_what_it_was_taken_of_and_back_goes_back(page, made):
    page.locator("#filters .row").nth(1).click()
    settle(page)
    page.locator(".entry").nth(2).click()
    until_title(page, "Document")
    document, link = title(page), address(page)
    page.locator(".facts button", has_text="%").first.click()
    until_title(page, "Expert")
    expert = title(page)
    page.go_back(wait_until="commit")
    until_title(page, "Document")
    assert title(page) == document
    page.go_back(wait_until="commit")
    assert "of 320 documents" in title(page)
    page.go_back(wait_until="commit")
    assert title(page) == f"{COUNT} documents"
    open_anew(page, made, link.split("#")[1])
    until_title(page, "Document")
    assert title(page) == document and expert.startswith("Expert")
    assert page.locator(".row[aria-pressed=true]").count() == 1


@pytest.mark.parametrize(
    "fragment",
    [
        "doc=999999&layer=9&model=7&color=red&page=0.99999&theme=<b>",
        "domain=nowhere&cluster0=99&cluster1=-1&expert0=0.12&expert0=x&doc=1e3",
        "text=" + "a" * 5000 + "&doc=%ff%fe",
        "__proto__=1&page=constructor&map=toString",
    ],
)
def test_what_a_link_asks_wrongly_is_passed_over(page, made, fragment):
    show(page, fragment)
    assert title(page) in (f"{COUNT} documents", f"0 of {COUNT} documents")


RATIO = """([a, b]) => {
  const light = (name) => {
    const probe = document.createElement("i");
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    const rgb = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
    probe.remove();
    const [r, g, b] = rgb.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const [x, y] = [light(a), light(b)];
  return Math.max(x, y) / Math.min(x, y);
}"""


def test_both_themes_can_be_read(page):
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        until(page, f"document.documentElement.dataset.theme === '{theme}'")
        for text in ("ink", "soft", "accent"):
            for ground in ("panel", "page", "hover"):
                assert page.evaluate(RATIO, [text, ground]) >= 4.5, (theme, text, ground)
        for mark in range(8):
            assert page.evaluate(RATIO, [f"c{mark}", "panel"]) >= 3, (theme, mark)
    page.emulate_media(color_scheme="light")
    page.locator("#theme").click()
    assert "theme=dark" in address(page)
    assert page.evaluate("getComputedStyle(document.body).colorScheme") == "dark"


# ---- text


def test_characters_are_whole_or_shown_as_their_bytes(page, made):
    show(page, "doc=5")
    tokens = page.locator("article").first.locator(".tokens")
    shown = tokens.evaluate(
        "(p) => [...p.querySelectorAll('.t')]"
        ".map((t) => [t.textContent, t.querySelectorAll('code').length])"
    )
    assert "".join(text for text, partial in shown if not partial) == FOREIGN
    assert len(shown) == len(FOREIGN.encode())
    assert [text for text, partial in shown if partial][:2] == ["‹C3›", "‹E6›"]
    assert "\ufffd" not in page.content()


def test_bytes_that_are_no_character_are_shown_as_bytes(page):
    """The whole alphabet of faults: cut, overlong, surrogates, too large, stray."""
    wrong = [
        [0x61, 0xE4],
        [0xC0, 0x80],
        [0xED, 0xA0, 0x80],
        [0xF5],
        [0x80, 0x62],
        [0xF0, 0x9F, 0x61],
    ]
    for ids in wrong:
        shown = page.evaluate(
            """(ids) => Data.prototype.pieces.call({bytesOfToken: (id) => [id]}, ids)
                .flat().map(([text, isBytes]) => (isBytes ? text : `(${text})`)).join("")""",
            ids,
        )
        in_hex = [int(value, 16) for value in re.findall("[0-9A-F]{2}", shown)]
        as_text = [ord(letter) for letter in re.findall(r"\((.)\)", shown)]
        assert sorted(in_hex + as_text) == sorted(ids) and "\ufffd" not in shown, (ids, shown)


def test_nothing_of_the_data_is_run_or_becomes_markup(page, made):
    documents, views, _ = made
    for number, text in enumerate(HOSTILE, start=6):
        show(page, f"doc={number}&model=1&color=cluster&tokens=cluster")
        whole = page.locator(".tokens").first.evaluate(
            "(p) => [...p.querySelectorAll('.t')].filter((t) => !t.querySelector('code'))"
            ".map((t) => t.textContent).join('')"
        )
        assert whole == text
    for fragment in ("model=1", "model=1&page=1.299", "cluster1=0&model=1&text=<img src=x>"):
        show(page, fragment)
    page.fill("#search", "<img")
    assert page.locator("#found li").count() >= 2
    show(page, "")
    for number in (7, 8):
        page.mouse.move(*place_of(page, views[1], 1, number))
        until(
            page,
            f"document.getElementById('tip').textContent.includes({HOSTILE[number - 6][:20]!r})",
        )
    assert HOSTILE[0] in page.locator("#tip").inner_text()  # its domain
    assert page.locator("img, iframe, svg:not(.mark), script[src], object, embed").count() == 0
    scripts = page.locator("script").evaluate_all("(all) => all.map((s) => s.type)")
    assert scripts.count("") == 1 and set(scripts) == {"", "text/plain"}


def test_a_file_that_is_not_whole_says_so(page, made, tmp_path):
    """Cut between two blocks, and inside of one: the tokens of some documents are missing."""
    whole = Path(made[2].removeprefix("file://")).read_bytes()
    cuts = {"between": whole.index(b'<script type="text/plain" id="block-tokens1"'), "inside": -900}
    for name, cut in cuts.items():
        (tmp_path / name).with_suffix(".html").write_bytes(whole[:cut])
        page.goto((tmp_path / name).with_suffix(".html").as_uri())
        until(page, "document.querySelector('#panel').textContent.includes('cannot be shown')")


# ---- the map, two models, a small screen


def test_the_map_is_pointed_at_and_clicked(page, made):
    documents, views, _ = made
    at = place_of(page, views[0], 0, 42)
    page.mouse.move(*at)
    until(page, "!document.getElementById('tip').hidden")
    assert documents.domains[documents.domain_U[42]] in page.locator("#tip").inner_text()
    page.mouse.click(*at)
    until_title(page, "Document 142")
    before = page.locator("figure canvas").first.screenshot()
    page.keyboard.press("+")
    page.wait_for_timeout(100)
    assert page.locator("figure canvas").first.screenshot() != before


def test_two_models_stand_side_by_side(page, made):
    boxes = [canvas.bounding_box() for canvas in page.locator("figure canvas").all()]
    assert len(boxes) == 2 and boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    show(page, "doc=3&numbers=yes")
    assert page.locator(".tokens").count() == 2
    numbers = page.locator(".tokens").nth(1).locator("sub").all_inner_texts()
    start = made[0].start_U[3]
    assert numbers == [str(e) for e in made[1][1].routing.first[1][start : start + len(numbers)]]
    for m, view in enumerate(made[1]):
        links = page.locator("article").nth(m).locator(".facts").nth(1).locator("button")
        pool = np.argsort(-view.routing.mean[1][3], kind="stable")[:8]
        assert [text.split()[0] for text in links.all_inner_texts()] == [str(e) for e in pool]
    page.select_option("#model", "1")
    settle(page)
    assert "of </script>" in page.locator("#filters h2").nth(1).inner_text()


def test_an_expert_has_a_page(page, made):
    show(page, "page=1.4")
    expected = made[1][0].pages[1][4]
    assert title(page) == "Expert 4"
    cards = page.locator("article")
    names = ["Tokens", "Domains", "Documents", "Pool partners", "Neighbours"]
    assert [h3.split(" ")[0] for h3 in cards.locator("h3").all_inner_texts()] == [
        name.split(" ")[0] for name in names
    ]
    assert cards.nth(0).locator("li").count() == len(expected["tokens"])
    assert cards.nth(2).locator(".entry").count() == len(expected["documents"])
    neighbour = expected["neighbours"][0][0]
    cards.nth(4).locator("button").first.click()
    assert title(page) == f"Expert {neighbour}"


def test_it_fits_a_small_screen_and_has_names_for_everything(page, made):
    page.set_viewport_size({"width": 390, "height": 800})
    for fragment in ("", "doc=5", "page=1.4"):
        show(page, fragment)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, fragment
        nameless = page.locator("button, input, select, canvas[tabindex]").evaluate_all(
            "(all) => all.filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length))"
            ".map((e) => e.outerHTML)"
        )
        assert nameless == []
    page.set_viewport_size({"width": 1280, "height": 800})
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "panel"
