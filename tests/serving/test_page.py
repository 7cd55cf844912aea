"""The page at `/` in a real browser: adapters are picked, one prompt is asked, answers stand side by side."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from adapters import Exported
from gateway_server import KEYS, client_of, gateway, tenants_of

pytestmark = pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")

if shutil.which("chromium"):
    from browser import Tab, browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Tab"]:
    """A browser with one tab."""
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


ANSWERS = "[...document.querySelectorAll('article')].map(a => [a.children[0], a.children[1]].map(e => e.textContent))"
DONE = "document.getElementById('said').textContent === 'Done.'"


def write(tab: "Tab", name: str, value: str) -> None:
    tab.run(f"document.getElementById('{name}').value = {value!r}")


def test_answers_stand_side_by_side(tab: "Tab", tiny_base: Path, served: dict[str, Exported]) -> None:
    hostile = "What is <img src=x onerror=document.title='broken'> 12 + 30?"
    folders = {name: exported.folder for name, exported in served.items()}
    with gateway(tiny_base, folders) as server:
        tab.open(f"{server.address}/?mode=completions&model=lora&model=tiny")
        tab.until("document.querySelectorAll('#models input').length === 4")
        tab.run("[...document.querySelectorAll('#models label')].find(l => l.innerText.includes('dora')).click()")
        write(tab, "prompt", hostile)
        write(tab, "tokens", "24")
        tab.run("document.getElementById('go').click()")
        tab.until(DONE)
        client = client_of(server)
        expected = []
        for model in ("lora", "tiny", "dora"):
            asked = {"model": model, "prompt": hostile, "max_tokens": 24, "temperature": 0}
            expected.append([model, client.completions.create(**asked).choices[0].text])
        assert tab.run(ANSWERS) == expected
        assert tab.run("document.title") == "Fleetune: side by side"
        assert not tab.errors


def test_a_key_is_asked_for_and_what_is_refused_is_shown(
    tab: "Tab", tiny_base: Path, served: dict[str, Exported]
) -> None:
    with gateway(tiny_base, {"lora": served["lora"].folder}, tenants_of()) as server:
        tab.open(server.address)
        tab.until("!document.getElementById('keyed').hidden")
        assert not tab.run("document.querySelectorAll('#models input').length")
        tab.run(f"part('key').value = '{KEYS['alice']}'; part('key').onchange()")
        tab.until("document.querySelectorAll('#models input').length === 2")
        write(tab, "prompt", "1")
        write(tab, "tokens", "100000")
        tab.run("document.getElementById('go').click()")
        tab.until(DONE)
        shown = tab.run("[...document.querySelectorAll('footer.wrong')].map(f => f.textContent)")
        assert len(shown) == 2 and all("allowed: at most 256" in text for text in shown)


def test_the_page_loads_nothing_from_elsewhere(tiny_base: Path) -> None:
    with gateway(tiny_base, {}) as server:
        page = httpx2.get(server.address)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "http" not in page.text.replace("http-equiv", "")
