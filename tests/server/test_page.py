"""The page of the server: a real headless Chromium on a real `genarm serve`; skipped where there is no Chromium."""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from builders.pages import PAGE, Opener, Page, expect, finished, needs_chromium, ready, send, shown, token_view, watch
from builders.serving import running
from builders.tiny import SPECIAL, save_member, tiny_tokenizer
from genarm.model.compose import compose

HOSTILE = ["<img/src=x/onerror=window.hacked=1>", "<script>window.hacked=1</script>", "<b>bold</b>", "&amp;"]
WORDS = [*HOSTILE, "it's", '"quoted"', "back\\slash", "$(touch", "`x`", "café", "日本", *(f"w{i}" for i in range(10))]
DEFAULTS = {"helpful": 1.0, "harmless": 0.5, "brief": 0.0}
KEY = "sesame-sesame"

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rewards on a base that goes on for ever; only `brief` ends its turns."""
    root = tmp_path_factory.mktemp("page")
    tokenizer = tiny_tokenizer(words=WORDS)
    members = [save_member(endless(seed), root / f"m{seed}", tokenizer) for seed in range(3)]
    brief = save_member(endless(3, end=1.0), root / "m3", tokenizer)
    rewards = {"helpful": members[1], "harmless": members[2], "brief": brief}
    compose(members[0], rewards, root / "tiny", weights=DEFAULTS)
    presets = {"bold": {"helpful": 2.0, "harmless": -0.5}, "careful": {"helpful": 0.5, "harmless": 1.5}}
    presets["near"] = {"helpful": 1.5, "max_kl": 0.25}
    (root / "tiny" / "presets.json").write_text(json.dumps(presets))
    return root / "tiny"


def endless(seed: int, end: float = -1.0) -> GPT2LMHeadModel:
    """A random model whose last norm has a bias of ones, so that the end of turn has the logit `end` × width."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(SPECIAL) + len(WORDS),
        n_positions=2048,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.25,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<end>"),
        pad_token_id=SPECIAL.index("<pad>"),
    )
    model = GPT2LMHeadModel(config).eval()
    model.transformer.ln_f.bias.data.fill_(1.0)
    model.lm_head.weight.data[: len(SPECIAL)] = -1.0
    model.lm_head.weight.data[SPECIAL.index("<end>")] = end
    return model


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    process: subprocess.Popen[str]

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply by the API when it is asked without the page."""
        return dict(self.answer(request)["choices"][0])

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """All that the API answers."""
        plain = {key: value for key, value in request.items() if key not in ("stream", "stream_options")}
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(plain).encode(), headers)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return dict(json.load(answer))


@contextlib.contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[Served]:
    command = [sys.executable, "-m", "genarm", "serve", str(folder), "--port", "0", *options]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=settings) as process:
        try:
            assert process.stdout is not None
            found = next((at for line in process.stdout if (at := re.search(r"served at (http://\S+)", line))), None)
            assert found, "the server did not start"
            yield Served(found[1], process)
        finally:
            process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with serving(folder) as served:
        yield served


@pytest.fixture
def page(server: Served, open_page: Opener) -> Page:
    return ready(open_page(server.url))


def compare_view(page: Page) -> None:
    page.get_by_role("radio", name="Compare").check()


# --- chat -----------------------------------------------------------------------------------------------------------


def test_a_reply_is_what_the_api_answers(page: Page, server: Served) -> None:
    asked = send(page, "w1 w2")
    assert asked["messages"] == [{"role": "user", "content": "w1 w2"}]
    assert asked["reward_weights"] == DEFAULTS
    assert shown(page) == server.reply(asked)["message"]["content"] != ""
    expect(page.locator(".reply .about")).to_contain_text("24 tokens")
    expect(page.locator(".reply .about")).to_contain_text("seed 7")


def test_the_conversation_goes_on_with_what_was_said(page: Page) -> None:
    page.fill("#system", "w9 w9")
    send(page, "w1")
    first = shown(page)
    asked = send(page, "w2")
    said = [("system", "w9 w9"), ("user", "w1"), ("assistant", first), ("user", "w2")]
    assert asked["messages"] == [{"role": role, "content": content} for role, content in said]


def test_a_reply_comes_piece_by_piece_and_can_be_stopped(page: Page, server: Served) -> None:
    page.fill("#max_tokens", "1900")
    page.fill("#message", "w1")
    page.press("#message", "Enter")
    expect(page.locator(".token").nth(20)).to_be_attached()
    assert page.locator(".reply.writing").count() == 1
    page.get_by_role("button", name="Stop").click()
    finished(page)
    expect(page.locator(".reply .about")).to_contain_text("stopped")
    partial = shown(page)
    assert 20 < page.locator(".token").count() < 1900
    asked = send(page, "w2")
    assert asked["messages"][1] == {"role": "assistant", "content": partial}


def test_the_last_reply_can_be_written_again_with_other_weights(page: Page) -> None:
    send(page, "w1")
    page.get_by_role("button", name="Base", exact=True).click()
    with page.expect_request("**/chat/completions") as made:
        page.get_by_role("button", name="Write this reply again").click()
    finished(page)
    asked = made.value.post_data_json
    assert (asked["messages"], asked["reward_weights"]) == (
        [{"role": "user", "content": "w1"}],
        dict.fromkeys(DEFAULTS, 0),
    )
    assert page.locator(".turn:visible").count() == 1
    expect(page.locator(".reply .about")).to_contain_text("base, no guidance")


def test_the_end_stays_in_sight_until_the_reader_scrolls_up(page: Page) -> None:
    page.set_viewport_size({"width": 1000, "height": 500})
    left = """() => { const at = document.getElementById("scroller");
        return at.scrollHeight - at.scrollTop - at.clientHeight; }"""
    send(page, "w1", tokens=300)
    assert page.evaluate("document.getElementById('scroller').scrollTop") > 0
    assert page.evaluate(left) < 2
    page.fill("#max_tokens", "1500")
    page.fill("#message", "w1")
    page.press("#message", "Enter")
    expect(page.locator(".turn:last-child .token").nth(20)).to_be_attached()
    page.mouse.move(300, 250)
    page.mouse.wheel(0, -250)
    expect(page.locator(".turn:last-child .token").nth(120)).to_be_attached()
    assert page.evaluate(left) > 150
    page.get_by_role("button", name="Stop").click()
    finished(page)


def test_a_new_conversation_can_be_undone(page: Page) -> None:
    send(page, "w1")
    before = shown(page)
    page.get_by_role("button", name="New").click()
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    assert shown(page) == before
    assert len(send(page, "w2")["messages"]) == 3


def test_model_output_is_text(page: Page, server: Served) -> None:
    page.get_by_role("button", name="Base", exact=True).click()  # which likes them
    asked = send(page, HOSTILE[0], tokens=150)
    text = server.reply(asked)["message"]["content"]
    written = [hostile for hostile in HOSTILE if hostile in text]
    assert {"<img/src=x/onerror=window.hacked=1>", "<script>window.hacked=1</script>"} <= set(written)
    assert shown(page) == text
    for hostile in written:
        expect(page.locator(".prose")).to_contain_text(hostile.replace("&amp;", "&"))
    token_view(page)
    for hostile in written:  # in the popover as well
        page.locator(".token", has_text=hostile).first.hover()
        expect(page.locator("#popover .token-name")).to_contain_text(hostile)
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script, main b, #popover img, #popover script").count() == 0


def test_enter_sends_and_shift_enter_begins_a_line(page: Page) -> None:
    page.focus("#message")
    page.keyboard.type("w1")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("w2")
    with page.expect_request("**/chat/completions") as made:
        page.keyboard.press("Enter")
    assert made.value.post_data_json["messages"][0]["content"] == "w1\nw2"
    finished(page)


# --- weights, presets, map ------------------------------------------------------------------------------------------


def test_a_slider_and_its_field_are_one_and_reach_the_request(page: Page) -> None:
    slider, field = page.get_by_label("helpful", exact=True), page.get_by_label("helpful, weight as a number")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert float(field.input_value()) == pytest.approx(1.02)
    field.fill("0.25")
    assert float(slider.input_value()) == pytest.approx(0.26)  # the slider has steps, the field has not
    field.fill("-3.5")  # beyond the slider, but the server takes it
    assert send(page, "w1")["reward_weights"] == {**DEFAULTS, "helpful": -3.5}


def test_a_field_takes_only_what_the_server_would(page: Page) -> None:
    field = page.get_by_label("helpful, weight as a number")
    for wrong in ("99", ""):
        field.fill(wrong)
        assert field.get_attribute("aria-invalid") == "true"
        assert send(page, "w1")["reward_weights"] == DEFAULTS  # sending leaves the field, and its last value comes back
        assert (field.input_value(), field.get_attribute("aria-invalid")) == ("1", None)


def test_a_number_that_is_refused_is_said(page: Page) -> None:
    """In every number field of the page: below and above what it takes, half a step, none where one is needed."""
    toast = page.locator("#toast")
    fields = page.locator("input[type=number]")
    assert fields.count() == len(DEFAULTS) + 4
    for i in range(fields.count()):
        field = fields.nth(i)
        low, high, step = (str(field.get_attribute(name) or "") for name in ("min", "max", "step"))
        before = field.input_value()
        wrong = [str(float(low) - 1), *([str(float(high) + 1)] if high else []), *(["2.5"] if step == "1" else [])]
        for value in [*wrong, *([""] if field.get_attribute("required") is not None else [])]:
            field.fill(value)
            field.blur()
            assert field.input_value() == before
            expect(toast).to_contain_text(f"from {low} to {high}" if high else f"of {low} or more")
            expect(toast).to_contain_text(f"not {value}" if value else "takes a number")
            expect(toast).to_contain_text(f"it stays {before or field.get_attribute('placeholder')}")
            page.evaluate("document.getElementById('toast').replaceChildren()")
    page.fill("#temperature", "9")
    assert send(page, "w1", tokens=2)["temperature"] == 0.7
    expect(toast).to_contain_text("Temperature takes a number from 0 to 2, not 9; it stays 0.7")  # still after sending


def test_the_default_is_marked_where_the_thumb_then_stands(page: Page) -> None:
    for name, default in DEFAULTS.items():
        slider = page.get_by_label(name, exact=True)
        box = slider.bounding_box()
        low, high = (float(str(slider.get_attribute(end))) for end in ("min", "max"))
        thumb = box["x"] + 8 + (default - low) / (high - low) * (box["width"] - 16)
        mark = slider.locator("xpath=following-sibling::*[@class='default']").bounding_box()
        assert mark["x"] + mark["width"] / 2 == pytest.approx(thumb, abs=1)
        expect(page.locator(f"#weight-{name}-about")).to_contain_text(f"default {default:g}")


def test_sampling_reaches_the_request(page: Page) -> None:
    requests = watch(page)
    for name, value in {"temperature": "0.5", "top_p": "0.8", "max_tokens": "3"}.items():
        page.fill(f"#{name}", value)
    for _ in range(2):
        page.fill("#message", "w1")
        page.press("#message", "Enter")
        finished(page)
    first, second = (request.post_data_json for request in requests)
    assert (first["temperature"], first["top_p"], first["max_tokens"]) == (0.5, 0.8, 3)
    assert first["seed"] != second["seed"]  # the field is empty: each reply has a seed of its own, which it shows
    expect(page.locator(".reply .about").last).to_contain_text(f"seed {second['seed']}")
    page.fill("#max_tokens", "")
    page.fill("#message", "w1")
    page.press("#message", "Enter")
    expect(page.locator(".turn:last-child .token").nth(3)).to_be_attached()
    page.get_by_role("button", name="Stop").click()
    finished(page)
    assert "max_tokens" not in requests[2].post_data_json


def test_presets_set_all_weights(page: Page) -> None:
    bold = page.get_by_role("button", name="bold")
    assert bold.get_attribute("aria-pressed") == "false"
    bold.click()
    assert bold.get_attribute("aria-pressed") == "true"
    assert send(page, "w1")["reward_weights"] == {"helpful": 2, "harmless": -0.5, "brief": 0}


def test_the_map_sets_two_weights_by_pointing(page: Page) -> None:
    frame = page.locator(".map .frame").bounding_box()
    page.mouse.click(frame["x"] + 0.25 * frame["width"], frame["y"] + 0.2 * frame["height"])
    weights = send(page, "w1")["reward_weights"]
    assert weights["helpful"] == pytest.approx(0.5, abs=0.03)
    assert weights["harmless"] == pytest.approx(1.5, abs=0.04)  # of −0.5 to 2, four fifths up
    assert weights["brief"] == 0
    point = page.locator(".map .point.active").bounding_box()
    assert point["x"] + point["width"] / 2 == pytest.approx(frame["x"] + 0.25 * frame["width"], abs=4)


def test_the_map_can_be_dragged_and_holds_at_its_edge(page: Page) -> None:
    frame = page.locator(".map .frame").bounding_box()
    page.mouse.move(frame["x"] + 5, frame["y"] + 5)
    page.mouse.down()
    page.mouse.move(frame["x"] + 2 * frame["width"], frame["y"] + 2 * frame["height"])
    page.mouse.up()
    assert send(page, "w1")["reward_weights"] == {"helpful": 2, "harmless": -0.5, "brief": 0}


def test_the_map_takes_the_arrow_keys_and_says_where_it_is(page: Page) -> None:
    plane = page.get_by_role("slider", name="Trade-off of helpful (across) and harmless (up)")
    plane.focus()
    for key in ("ArrowRight", "ArrowUp", "Shift+ArrowUp", "ArrowDown"):
        page.keyboard.press(key)
    text = str(plane.get_attribute("aria-valuetext"))
    assert text == "helpful 1.02, harmless 0.75"
    assert send(page, "w1")["reward_weights"] == {"helpful": 1.02, "harmless": 0.75, "brief": 0}


def test_the_axes_of_the_map_are_chosen(page: Page) -> None:
    page.get_by_role("combobox", name="Up").select_option("brief")
    page.locator(".map").focus()
    page.keyboard.press("ArrowUp")
    assert send(page, "w1")["reward_weights"] == {**DEFAULTS, "brief": 0.02}
    page.get_by_role("combobox", name="Across").select_option("brief")  # which then changes places with helpful
    assert page.get_by_role("combobox", name="Up").input_value() == "helpful"


@pytest.mark.parametrize(("count", "mapped", "chosen"), [(2, True, False), (1, False, False), (0, False, False)])
def test_fewer_rewards(server: Served, open_page: Opener, count: int, mapped: bool, chosen: bool) -> None:
    with urllib.request.urlopen(f"{server.url}/v1/rewards") as answer:
        described = json.load(answer)
    described["data"], described["presets"] = described["data"][:count], []
    page = open_page("about:blank")
    page.route("**/v1/rewards", lambda route: route.fulfill(json=described))
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("tiny")
    assert page.locator("#trade-off").is_visible() == mapped
    assert page.locator("#axes").is_visible() == chosen
    assert page.locator(".reward").count() == count
    assert page.locator("#presets").is_visible() == (count > 0)
    assert page.locator("#wish-form").is_visible()  # a base alone takes wishes, too
    described["request_wishes"] = None
    page.reload()
    expect(page.locator("#model")).to_have_text("tiny")
    assert page.locator("#wish-form").is_hidden()
    assert page.locator("#steering").is_visible() == (count > 0)


# --- wishes and the budget ------------------------------------------------------------------------------------------

WISH = "w3 <b>bold</b> w4"


def wish(page: Page, text: str) -> None:
    page.get_by_label("Type a wish, get a slider").fill(text)
    page.keyboard.press("Enter")


def test_a_typed_wish_is_a_slider_and_that_system_message(page: Page, server: Served) -> None:
    page.get_by_role("button", name="Base", exact=True).click()
    page.fill("#temperature", "0")
    base = server.reply(send(page, "w1 w2"))
    page.get_by_role("button", name="New").click()
    wish(page, WISH)
    slider = page.get_by_label(f"“{WISH}”", exact=True)
    expect(slider).to_be_focused()  # the keys go on with it
    asked = send(page, "w1 w2")
    assert asked["wishes"] == [{"text": WISH, "weight": 1}]
    assert asked["reward_weights"] == dict.fromkeys(DEFAULTS, 0)
    system = [{"role": "system", "content": WISH}, *asked["messages"]]
    prompted = server.reply({k: v for k, v in asked.items() if k != "wishes"} | {"messages": system})
    assert shown(page) == prompted["message"]["content"] != base["message"]["content"]
    about = page.locator(".reply .about").last
    expect(about).to_contain_text(f"“{WISH}” 1")
    kl = server.answer(asked)["usage"]["kl"]
    expect(about).to_contain_text(f"{round(kl, 1):g} nats from the base ({round(kl / 24, 3):g} a token)")
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.get_by_role("button", name="New").click()
    assert send(page, "w1")["wishes"] == [{"text": WISH, "weight": 1.02}]
    page.get_by_role("button", name="Base", exact=True).click()
    assert send(page, "w1")["wishes"] == [{"text": WISH, "weight": 0}]
    expect(page.locator(".reply .about").last).to_contain_text("base, no guidance")


def test_up_to_four_wishes_that_can_be_removed(page: Page) -> None:
    line = page.get_by_label("Type a wish, get a slider")
    for text in ("w1", "  ", "w2", "w1", "w3", "w4"):
        wish(page, text)
        if text == "w1" and page.locator("#wishes .reward").count() > 1:
            expect(page.locator("#toast")).to_contain_text("there already")
    expect(page.locator("#wishes .reward")).to_have_count(4)
    expect(line).to_be_disabled()
    page.get_by_label("“w2”, weight as a number").fill("-1.5")
    assert [w["weight"] for w in send(page, "w5", tokens=2)["wishes"]] == [1, -1.5, 1, 1]
    page.get_by_role("button", name="Remove “w1”").click()
    expect(line).to_be_focused()
    assert [w["text"] for w in send(page, "w5", tokens=2)["wishes"]] == ["w2", "w3", "w4"]
    for text in ("w2", "w3", "w4"):
        page.get_by_role("button", name=f"Remove “{text}”").click()
    assert "wishes" not in send(page, "w5", tokens=2)


def test_wishes_in_a_comparison_in_the_heat_map_and_behind_a_token(page: Page, server: Served) -> None:
    wish(page, WISH)
    compare_view(page)
    requests = watch(page)
    send(page, "w1 w2")
    assert [request.post_data_json["wishes"][0]["weight"] for request in requests] == [0, 1]
    asked = requests[1].post_data_json
    page.get_by_role("radio", name="Chat").check()
    page.reload()  # nothing is kept but in memory, as weights are
    ready(page)
    assert page.locator("#wishes .reward").count() == 0
    wish(page, "w9")
    wish(page, WISH)
    page.get_by_role("button", name="Remove “w9”").click()
    assert send(page, "w1 w2") == asked
    shares = server.reply(asked)["rewards"]
    page.get_by_role("switch", name="Heat map").check()
    page.get_by_label("Colour by").select_option(label=f"“{WISH}”")
    check_colours(page, [share["rewards"]["wish 1"]["logprob"] for share in shares])
    page.locator(".token").nth(3).hover()
    row = page.locator("#popover tbody tr").nth(2).inner_text().split("\t")
    share = shares[3]["rewards"]["wish 1"]
    assert row == [f"“{WISH}”", f"1 × {minus(share['logprob'])}", minus(share["contribution"])]


def test_the_dial_bounds_how_far_a_reply_goes(page: Page, server: Served) -> None:
    dial = page.get_by_role("slider", name="Distance from the base")
    assert dial.get_attribute("aria-valuetext") == "no bound"
    free = send(page, "w1")
    assert "max_kl" not in free
    page.get_by_role("button", name="near").click()
    assert (dial.get_attribute("aria-valuetext"), page.locator("#budget-says").inner_text()) == (
        "0.25 nats a token",
        "0.25 nats a token",
    )
    page.get_by_role("button", name="New").click()
    asked = send(page, "w1")
    assert (asked["max_kl"], asked["reward_weights"]["helpful"]) == (0.25, 1.5)
    kl = server.answer(asked)["usage"]["kl"]
    assert 0 < kl <= 24 * 0.25 + 1e-3
    expect(page.locator(".reply .about")).to_contain_text(f"{round(kl, 1):g} nats from the base")
    expect(page.locator(".reply .about")).to_contain_text("at most 0.25 nats a token")
    dial.focus()
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("button", name="near").get_attribute("aria-pressed") == "false"
    assert send(page, "w1", tokens=2)["max_kl"] == 0.2
    page.keyboard.press("Home")
    dial.press("Home")
    assert send(page, "w1", tokens=2)["max_kl"] == 0
    dial.press("End")
    assert "max_kl" not in send(page, "w1", tokens=2)
    page.get_by_role("button", name="near").click()
    page.get_by_role("button", name="Default").click()
    assert dial.get_attribute("aria-valuetext") == "no bound"


def test_a_wish_of_the_model_shows_its_text(open_page: Opener) -> None:
    with running(wishes={"warm": "w3 w4"}) as server:
        page = ready(open_page(server.url))
        expect(page.locator("#weight-warm-about")).to_contain_text("“w3 w4”")
        assert send(page, "w1 w2", tokens=4)["reward_weights"]["warm"] == 1
        expect(page.locator("#banner")).to_be_hidden()


# --- compare --------------------------------------------------------------------------------------------------------


def test_compare_draws_base_and_guided_side_by_side_at_once(page: Page, server: Served) -> None:
    compare_view(page)
    page.fill("#max_tokens", "300")
    requests = watch(page)
    page.fill("#message", "w1 w2")
    page.press("#message", "Enter")
    expect(page.locator(".reply.writing .token:nth-child(4)")).to_have_count(2)
    finished(page)
    first, second = (request.post_data_json for request in requests)
    assert first["reward_weights"] == dict.fromkeys(DEFAULTS, 0)
    assert second["reward_weights"] == DEFAULTS
    assert {k: v for k, v in first.items() if k != "reward_weights"} == {
        k: v for k, v in second.items() if k != "reward_weights"
    }
    columns = page.locator(".column")
    for i, asked in enumerate((first, second)):
        assert columns.nth(i).locator(".text").text_content() == server.reply(asked)["message"]["content"]
    left, right = (columns.nth(i).bounding_box() for i in range(2))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]


def test_both_settings_of_a_comparison_can_be_changed(page: Page) -> None:
    compare_view(page)
    page.get_by_role("radio", name="A", exact=True).check()
    page.get_by_role("button", name="careful").click()
    page.get_by_role("radio", name="B", exact=True).check()
    page.get_by_label("brief, weight as a number").fill("0.1")
    requests = watch(page)
    send(page, "w1")
    assert [request.post_data_json["reward_weights"] for request in requests] == [
        {"helpful": 0.5, "harmless": 1.5, "brief": 0},
        {**DEFAULTS, "brief": 0.1},
    ]
    headings = page.locator(".column h3")
    assert headings.all_text_contents() == [
        "A helpful 0.5 · harmless 1.5 · brief 0",
        "B helpful 1 · harmless 0.5 · brief 0.1",
    ]
    page.get_by_role("radio", name="Chat").check()
    assert send(page, "w1")["reward_weights"] == {**DEFAULTS, "brief": 0.1}  # B is the chat's


def test_stop_stops_both_sides(page: Page) -> None:
    compare_view(page)
    page.fill("#max_tokens", "1900")
    page.fill("#message", "w1")
    page.press("#message", "Enter")
    expect(page.locator(".token").nth(20)).to_be_attached()
    page.get_by_role("button", name="Stop").click()
    finished(page)
    assert [("stopped" in text) for text in page.locator(".column .about").all_text_contents()] == [True, True]


def test_the_sharpened_base_stands_beside_a_comparison(page: Page) -> None:
    """What rewards that learnt nothing come to, with B's weights: the base at T / (1 + Σw)."""
    compare_view(page)
    page.get_by_role("switch", name="Sharpened base").check()
    page.fill("#temperature", "0.8")
    requests = watch(page)
    send(page, "w1", tokens=8)
    base, guided, sharp = (request.post_data_json for request in requests)
    assert sharp["temperature"] == pytest.approx(0.8 / (1 + sum(DEFAULTS.values())))
    assert sharp["reward_weights"] == base["reward_weights"] == dict.fromkeys(DEFAULTS, 0)
    assert {**sharp, "temperature": 0.8} == base
    assert {**guided, "reward_weights": sharp["reward_weights"]} == base
    expect(page.locator(".column h3").nth(2)).to_have_text("sharpened base, temperature 0.32")
    page.get_by_role("button", name="Base", exact=True).click()
    send(page, "w1", tokens=2)
    expect(page.locator("#toast")).to_contain_text("No sharpened base")
    expect(page.locator(".turn").last.locator(".column")).to_have_count(2)


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_a_token_says_what_stands_behind_it(page: Page, server: Served) -> None:
    asked = send(page, "w1 w2")
    choice = server.reply(asked)
    token_view(page)
    for i in (0, 11):
        page.locator(".token").nth(i).hover()
        said, shares = choice["logprobs"]["content"][i], choice["rewards"][i]
        text = page.locator("#popover").inner_text()
        assert f"{100 * math.exp(shares['base_logprob']):.1f} %" in text
        assert f"{100 * math.exp(shares['logprob']):.1f} %" in text
        rows = [row.split("\t") for row in page.locator("#popover tbody tr").all_inner_texts()]
        total = sum(share["contribution"] for share in shares["rewards"].values())
        assert rows[:3] == [
            *(
                [name, f"{share['weight']:g} × {minus(share['logprob'])}", minus(share["contribution"])]
                for name, share in shares["rewards"].items()
            ),
            ["Sum", "", minus(total)],
        ]
        assert list(shares["rewards"]) == ["helpful", "harmless"]  # brief has no weight
        likely = [(candidate["token"].strip(), candidate["logprob"]) for candidate in said["top_logprobs"]]
        assert len(likely) == 5
        for row, (token, logprob) in zip(rows[3:], likely, strict=True):
            assert token in row[0]
            assert ("(chosen)" in row[0]) == (token == said["token"].strip())
            assert row[2] in (f"{100 * math.exp(logprob):.1f} %", f"{100 * math.exp(logprob):.2f} %", "< 0.01 %")
    page.mouse.move(700, 5)
    expect(page.locator("#popover")).to_be_hidden()


def minus(value: float) -> str:
    return f"{value:.2f}".replace("-", "−").replace("−0.00", "0.00")


def test_tokens_are_walked_with_the_arrow_keys(page: Page) -> None:
    send(page, "w1")
    token_view(page)
    page.locator(".token").first.focus()
    for key, at in [
        ("ArrowRight", 1),
        ("ArrowDown", 2),
        ("ArrowLeft", 1),
        ("End", 23),
        ("ArrowRight", 23),
        ("Home", 0),
    ]:
        page.keyboard.press(key)
        assert page.evaluate("[...document.querySelectorAll('.token')].indexOf(document.activeElement)") == at
        expect(page.locator("#popover")).to_be_visible()
    assert page.locator(".token[tabindex='0']").count() == 1  # one stop of the Tab key for the whole reply
    assert page.locator(".token:focus").get_attribute("aria-describedby") == "popover"
    page.keyboard.press("Escape")
    expect(page.locator("#popover")).to_be_hidden()


LOOKS = [("", ""), ("DejaVu Sans", "19px"), ("Liberation Serif", "13px"), ("monospace", "15px")]
"""Fonts and sizes; where a font is missing, the browser has another in its place."""


def dress(page: Page, family: str, size: str) -> None:
    """As on a machine with other fonts."""
    page.evaluate(
        "([family, size]) => Object.assign(document.body.style, { fontFamily: family, fontSize: size })", [family, size]
    )


def covered(page: Page) -> int:
    """A token that lies under the popover, or -1."""
    return int(
        page.evaluate(
            """() => {
                const box = document.getElementById("popover").getBoundingClientRect();
                return [...document.querySelectorAll(".token")].findIndex((token) => {
                    const { left, right, top, bottom } = token.getClientRects()[0];
                    const [x, y] = [(left + right) / 2, (top + bottom) / 2];
                    return box.left < x && x < box.right && box.top < y && y < box.bottom;
                });
            }"""
        )
    )


def test_the_popover_keeps_no_pointer_from_the_next_token(page: Page) -> None:
    """It lies within the window, and over other tokens, whatever the font: they are pointed at all the same."""
    send(page, "w1", tokens=120)
    token_view(page)
    popover, under = page.locator("#popover"), []
    for look in LOOKS:
        dress(page, *look)
        for at in (0, 60, 119, 61):
            token = page.locator(".token").nth(at)
            token.hover()
            expect(token).to_have_class(re.compile("inspected"))
            box = popover.bounding_box()
            assert box["x"] >= 0
            assert box["y"] >= 0
            assert box["x"] + box["width"] <= 1400
            assert box["y"] + box["height"] <= 900
            under.append(covered(page))
            if under[-1] >= 0:
                page.locator(".token").nth(under[-1]).hover()
                expect(page.locator(".token").nth(under[-1])).to_have_class(re.compile("inspected"))
        page.mouse.move(700, 5)
        expect(popover).to_be_hidden()
    assert max(under) >= 0


def test_a_click_keeps_the_popover(page: Page) -> None:
    """So that the pointer can be moved onto it, and what it says be selected."""
    send(page, "w1", tokens=120)
    token_view(page)
    popover, token = page.locator("#popover"), page.locator(".token").nth(60)
    for look in LOOKS[:2]:
        dress(page, *look)
        token.click()
        popover.hover()
        page.wait_for_timeout(400)
        expect(popover).to_be_visible()
        popover.click()
        page.wait_for_timeout(400)
        expect(popover).to_be_visible()
        page.mouse.move(700, 5)
        token.click()
        page.mouse.move(700, 5)
        page.wait_for_timeout(400)
        expect(token).to_have_class(re.compile("inspected"))
        page.keyboard.press("Escape")
        expect(popover).to_be_hidden()


def test_a_server_that_does_not_explain(open_page: Opener) -> None:
    """With vLLM nobody knows what each reward made of a token: no colours, and the popover shows what there is."""
    with running() as server:
        server.backend.explains = False
        page = ready(open_page(server.url))
        expect(page.locator("#tools")).to_contain_text("Tokens")
        expect(page.locator(".welcome").first).to_contain_text("how likely each of them was")
        asked = send(page, "w1 w2", tokens=8)
        assert "return_rewards" not in asked
        expect(page.locator("#banner")).to_be_hidden()
        token_view(page)
        expect(page.locator("#heat-tools")).to_be_hidden()
        page.locator(".token").first.hover()
        card = page.locator("#popover .token-card").first  # one token has no text, and joins the next one
        expect(card.locator("dt")).to_have_text(["Guided"])
        expect(card).to_contain_text("does not say what the base and each reward made of it")
        expect(card.locator("tbody tr")).to_have_count(5)


def test_the_heat_map_shows_what_guidance_added(page: Page, server: Served) -> None:
    asked = send(page, "w1 w2", tokens=60)
    spans = page.locator(".token")
    assert page.locator(".plus, .minus").count() == 0
    page.get_by_role("switch", name="Heat map").check()
    shares = server.reply(asked)["rewards"]
    values = [share["logprob"] - share["base_logprob"] for share in shares]
    check_colours(page, values)
    for reward in ("helpful", "harmless"):
        page.get_by_label("Colour by").select_option(label=reward)
        check_colours(page, [share["rewards"][reward]["logprob"] - share["base_logprob"] for share in shares])
        expect(page.locator("#meaning")).to_contain_text(reward)
    lines = page.evaluate(
        """() => ["plus", "minus"].map((kind) => document.querySelector(`.${kind} .core`))
            .map((core) => getComputedStyle(core).borderBottomStyle)"""
    )
    assert lines == ["solid", "dotted"]  # so that nobody needs to tell the colours apart
    page.get_by_role("switch", name="Heat map").uncheck()
    assert page.locator(".plus, .minus").count() == 0
    assert spans.count() == 60


def check_colours(page: Page, values: list[float]) -> None:
    """Every token's sign and strength, and the legend, from the API's numbers."""
    sizes = sorted(map(abs, values))
    limit = max(1.0, math.ceil(10 * sizes[math.ceil(0.9 * len(sizes)) - 1]) / 10)
    seen = page.evaluate(
        """() => [...document.querySelectorAll(".token")].map(span => [
            span.classList.contains("plus") - span.classList.contains("minus"),
            Number(span.style.getPropertyValue("--strength"))])"""
    )
    for (sign, strength), value in zip(seen, values, strict=True):
        expected = min(1.0, abs(value) / limit)
        assert strength == pytest.approx(expected, abs=1e-3)
        if abs(expected - 0.05) > 1e-3:
            assert sign == (0 if expected < 0.05 else math.copysign(1, value))
    expect(page.locator("#legend")).to_contain_text(f"≥ {limit:g}")


def test_the_end_of_a_turn_is_a_token_too_but_no_text(page: Page) -> None:
    page.get_by_role("button", name="Base", exact=True).click()
    page.get_by_label("brief, weight as a number").fill("1.2")
    send(page, "w1", tokens=200)
    token_view(page)
    last = page.locator(".token").last
    assert "silent" in str(last.get_attribute("class"))
    assert last.text_content() == ""
    last.focus()
    expect(page.locator("#popover .token-name")).to_contain_text("<end>")
    expect(page.locator(".reply .about")).not_to_contain_text("cut")


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_the_servers_own_words_stand_at_the_turn(page: Page) -> None:
    send(page, "w1 " * 3000)
    banner = page.get_by_role("alert")
    expect(banner).to_contain_text("2048")
    expect(page.locator(".reply .about")).to_contain_text("failed")
    assert send(page, "w2")["messages"] == [{"role": "user", "content": "w2"}]  # the failed turn is no part of it
    expect(page.locator(".turn").first.get_by_role("alert")).to_contain_text("2048")  # but stands where it happened


CHUNK = 'data: {"choices": [{"delta": {"content": "begun"}}]}\n\n'
LOST, DAMAGED = "connection was lost", "damaged on its way"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (CHUNK + 'data: {"choices": [{"del\n\n', DAMAGED),
        (CHUNK + "data: null\n\n", DAMAGED),
        (CHUNK + 'data: {"object": "other"}\n\n', DAMAGED),
        (CHUNK + 'data: {"choices": [null]}\n\n', "cannot make sense"),
        (CHUNK + 'data: {"error": {}}\n\n', "failed in mid-reply"),
        (CHUNK, LOST),
        ("<html>Sign in to the network</html>", LOST),
    ],
)
def test_a_stream_that_breaks_is_told_in_words(page: Page, body: str, words: str) -> None:
    """No parser's own; what had come stays, and it can be tried again."""
    page.route("**/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    send(page, "w1")
    banner = page.get_by_role("alert")
    expect(banner).to_contain_text(words)
    assert not re.search("JSON|token|undefined|null|iterable|properties", banner.inner_text())
    expect(page.locator(".reply .about")).to_contain_text("failed")
    assert shown(page) == ("begun" if CHUNK in body else "")
    page.unroute("**/chat/completions")
    page.get_by_role("button", name="Write this reply again").click()
    finished(page)
    expect(banner).to_be_hidden()


def test_something_else_that_answers(server: Served, open_page: Opener) -> None:
    page = open_page("about:blank")
    page.route("**/v1/rewards", lambda route: route.fulfill(body="<html>Sign in</html>", content_type="text/html"))
    page.goto(server.url)
    expect(page.get_by_role("alert")).to_contain_text("is no genarm server. Is there a proxy in between?")


def test_a_key_a_full_house_and_a_dead_server(folder: Path, open_page: Opener) -> None:
    with serving(folder, "--streams", "1", "--queue", "0", GENARM_API_KEYS=KEY) as served:
        page = open_page(served.url)
        banner = page.get_by_role("alert")
        expect(banner).to_contain_text("API key")
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use").click()
        expect(banner).to_contain_text("valid API key is needed")
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Use").click()
        ready(page)
        expect(banner).to_be_hidden()
        send(page, "w1")
        assert shown(page)

        check_copied_key(page)
        kept = page.evaluate("JSON.stringify([{ ...localStorage }, { ...sessionStorage }, document.cookie])")
        assert "w1" in kept
        assert KEY not in kept

        page.fill("#max_tokens", "1900")
        page.fill("#message", "w1")
        compare_view(page)  # two replies where there is room for one
        page.press("#message", "Enter")
        alert = page.locator("#compare").get_by_role("alert")
        expect(alert).to_contain_text("server is full")
        expect(alert).to_contain_text("Try again in")
        page.get_by_role("button", name="Stop").click()
        finished(page)

        page.get_by_role("radio", name="Chat").check()
        page.fill("#message", "w1")
        page.press("#message", "Enter")
        while not page.locator("#chat .turn:last-child .token").count():  # a stopped reply is gone a moment later
            if page.locator("#chat").get_by_role("alert").count():
                page.get_by_role("button", name="Write this reply again").last.click()
            page.wait_for_timeout(100)
        expect(page.locator("#chat .turn:last-child .token").nth(20)).to_be_attached()
        served.process.kill()
        expect(page.get_by_role("alert")).to_contain_text("connection was lost")
        assert page.locator("#chat .turn:last-child .token").count() > 20
        page.fill("#message", "w1")
        page.press("#message", "Enter")
        expect(page.get_by_role("alert").last).to_contain_text("cannot be reached")


def check_copied_key(page: Page) -> None:
    """A key is asked for in what is copied or exported, but never in it."""
    for kind in ("curl", "Python"):
        copied = copy(page, f"Copy the request as {kind}")
        assert KEY not in copied
        assert "GENARM_API_KEY" in copied
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export").click()
    assert KEY not in saved.value.path().read_text()


# --- taking things along --------------------------------------------------------------------------------------------


def copy(page: Page, name: str) -> str:
    page.get_by_role("button", name=name).last.click()
    expect(page.get_by_role("status")).to_contain_text("copied")
    return str(page.evaluate("navigator.clipboard.readText()"))


def test_what_is_copied_runs_and_gives_the_same_reply(page: Page, tmp_path: Path) -> None:
    page.fill("#system", "it's \"so\" \\ $HOME `x` $(touch hacked) café 日本\n'''")
    wish(page, 'it\'s "so" $(touch hacked)')
    page.get_by_role("slider", name="Distance from the base").press("ArrowLeft")
    assert {"wishes", "max_kl"} <= {*send(page, "it's $(touch hacked)")}
    reply = shown(page)
    assert copy(page, "Copy the reply") == reply
    curl = copy(page, "Copy the request as curl")
    ran = subprocess.run(
        ["sh", "-c", curl.replace("curl ", "curl -s ", 1)], capture_output=True, cwd=tmp_path, check=True
    )
    assert json.loads(ran.stdout)["choices"][0]["message"]["content"] == reply
    assert list(tmp_path.iterdir()) == []
    program = tmp_path / "program.py"
    program.write_text(copy(page, "Copy the request as Python"), encoding="utf-8")
    utf8 = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    ran = subprocess.run([sys.executable, program], capture_output=True, cwd=tmp_path, check=True, env=utf8)
    assert ran.stdout.decode() == reply + "\n"
    assert list(tmp_path.iterdir()) == [program]


def test_the_export_holds_what_was_said_and_how(page: Page, server: Served) -> None:
    page.get_by_role("button", name="Export").click()
    expect(page.get_by_role("status")).to_contain_text("nothing to export")
    wish(page, "w3")
    page.get_by_label("“w3”, weight as a number").fill("0")
    asked = send(page, "w1")
    compare_view(page)
    send(page, "w2", tokens=5)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export").click()
    assert re.fullmatch(r"conversation-\d{4}-\d\d-\d\dT\d{6}\.json", saved.value.suggested_filename)
    exported = json.loads(saved.value.path().read_text(encoding="utf-8"))
    assert (exported["format"], exported["version"], exported["model"]) == ("genarm-conversation", 1, "tiny")
    [turn], [comparison] = exported["turns"], exported["comparisons"]
    api = server.reply(asked)
    assert turn["prompt"] == "w1"
    assert turn["reply"]["text"] == api["message"]["content"]
    assert turn["reply"]["finish_reason"] == "length"
    assert turn["reply"]["request"]["reward_weights"] == DEFAULTS
    assert turn["reply"]["request"]["wishes"] == [{"text": "w3", "weight": 0}]
    assert (exported["settings"]["wishes"], exported["settings"]["budgets"]) == (["w3"], {"a": None, "b": None})
    assert turn["reply"]["kl"] == server.answer(asked)["usage"]["kl"]
    for token, share in zip(turn["reply"]["tokens"], api["rewards"], strict=True):
        assert token["token"] == share["token"]
        assert token["base"] == pytest.approx(share["base_logprob"], abs=1e-4)
    assert comparison["a"]["request"]["reward_weights"] == dict.fromkeys(DEFAULTS, 0)
    assert comparison["b"]["request"]["seed"] == comparison["a"]["request"]["seed"] == 7


# --- for everybody --------------------------------------------------------------------------------------------------


def test_all_of_it_can_be_done_with_the_keyboard(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("w1")
    page.keyboard.press("Enter")
    token_view(page)
    page.wait_for_selector(".token")
    page.locator(".skip").focus()
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                """() => {
                    const at = document.activeElement;
                    return at.id || at.getAttribute("aria-label") || at.name || at.classList[0] || at.textContent;
                }"""
            )
        )
    wanted = {
        "mode",
        "import",
        "conversation",
        "export",
        "clear",
        "heat",
        "token",
        "message",
        "Default",
        "bold",
        "weight-helpful",
        "map-plane",
    }
    wanted |= {
        "helpful, weight as a number",
        "temperature",
        "top_p",
        "max_tokens",
        "seed",
        "system",
        "key",
        "wish",
        "budget",
    }
    named = {"Trade-off of helpful (across) and harmless (up)": "map-plane", "chip": "Default"}
    assert wanted - {named.get(name, name) for name in reached} <= {"bold"}


def test_landmarks_and_names(page: Page) -> None:
    for role in ("banner", "main", "complementary"):
        assert page.get_by_role(role).count() == 1
    wish(page, WISH)
    send(page, "w1")
    page.get_by_role("switch", name="Heat map").check()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, [role=slider]")].filter(control =>
            !control.labels?.length && !control.getAttribute("aria-label") && !control.textContent.trim()
        ).map(control => control.outerHTML)"""
    )
    assert nameless == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    referred = page.evaluate(
        """() => ["aria-describedby", "aria-labelledby", "aria-controls", "for"].flatMap(name =>
            [...document.querySelectorAll(`[${name}]`)].flatMap(e => e.getAttribute(name).split(" ")))"""
    )
    assert set(referred) <= set(ids)


def test_what_is_read_out_is_what_is_seen(page: Page) -> None:
    """Three of axe-core's rules: visible words are part of a control's name, no header is empty, headings in order."""
    send(page, "w1", tokens=4)
    token_view(page)
    for view in ("Chat", "Compare"):
        page.get_by_role("radio", name=view).check()
        send(page, "w1", tokens=4)
        page.locator(".token:visible").first.focus()
        found = page.evaluate(
            """() => {
                const all = (what) => [...document.querySelectorAll(what)].filter((e) => e.checkVisibility());
                const said = (text) => text.toLowerCase().replace(/\\s+/g, " ").trim();
                return {
                    mismatched: all("[aria-label]:is(button, a)").filter((e) =>
                        !said(e.getAttribute("aria-label")).includes(said(e.textContent))).map((e) => e.outerHTML),
                    empty: all("th").filter((e) => !e.textContent.trim()).length,
                    headings: all("h1, h2, h3, h4").map((e) => Number(e.tagName[1])),
                    tables: all("th").length,
                };
            }"""
        )
        assert found["mismatched"] == []
        assert (found["empty"], found["tables"] > 0) == (0, True)
        assert found["headings"][0] == 1
        assert all(low + 1 >= high for low, high in itertools.pairwise(found["headings"]))


def test_replies_are_read_out_politely_and_whole(page: Page) -> None:
    live = page.locator("#live")
    assert live.get_attribute("aria-live") == "polite"
    send(page, "w1")
    assert " ".join(live.locator("p").all_text_contents()).split() == shown(page).split()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_in_both_schemes(server: Served, open_page: Opener, scheme: str) -> None:
    page = ready(open_page(server.url, color_scheme=scheme))
    wish(page, WISH)
    send(page, "w1", tokens=60)
    page.get_by_role("switch", name="Heat map").check()
    worst = page.evaluate(CONTRASTS)
    assert worst["count"] > 40
    assert worst["ratio"] >= 4.5, worst
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 384) == (scheme == "dark")


# Of every text, its colour against what lies behind it (WCAG 2.2), painted on a canvas to resolve any notation.
CONTRASTS = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const paint = (colours) => {
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    };
    const luminance = (colours) => { const [r, g, b] = paint(colours); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    let worst = { ratio: 99, count: 0 };
    while (walker.nextNode()) {
        const holder = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !holder.checkVisibility()) continue;
        if (holder.closest(".hidden, .skip, option, svg")) continue;
        const behind = [];
        for (let at = holder; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
        const both = [luminance(behind), luminance([...behind, getComputedStyle(holder).color])];
        const [low, high] = both.sort((a, b) => a - b);
        const ratio = (high + 0.05) / (low + 0.05);
        worst = { ...(ratio < worst.ratio ? { ratio, text: walker.currentNode.data } : worst), count: worst.count + 1 };
    }
    return worst;
}"""


def test_reduced_motion_is_respected(server: Served, open_page: Opener) -> None:
    for motion, moving in (("no-preference", True), ("reduce", False)):
        page = ready(open_page(server.url, reduced_motion=motion))
        page.fill("#max_tokens", "1900")
        page.fill("#message", "w1")
        page.press("#message", "Enter")
        page.wait_for_selector(".reply.writing .prose p")
        name = page.evaluate("getComputedStyle(document.querySelector('.writing .prose p'), '::after').animationName")
        assert (name != "none") == moving
        page.get_by_role("button", name="Stop").click()


def test_a_phone(server: Served, open_page: Opener) -> None:
    page = ready(open_page(server.url, viewport={"width": 360, "height": 740}, has_touch=True))
    assert page.locator("#settings").is_hidden()
    send(page, "w1", tokens=100)
    page.get_by_role("switch", name="Heat map").check()
    page.locator(".token").nth(80).tap()
    token, sheet = page.locator(".token").nth(80).bounding_box(), page.locator("#popover").bounding_box()
    assert (sheet["x"], sheet["width"], round(sheet["y"] + sheet["height"])) == (0, 360, 740)
    assert token["y"] + token["height"] <= sheet["y"] + 1  # the token is not under the sheet that describes it
    page.keyboard.press("Escape")
    compare_view(page)
    send(page, "w1", tokens=30)
    upper, lower = (page.locator(".column").nth(i).bounding_box() for i in range(2))
    assert upper["y"] + upper["height"] <= lower["y"]
    opener = page.get_by_role("button", name="Settings")
    opener.click()
    assert opener.get_attribute("aria-expanded") == "true"
    expect(page.locator("#close-settings")).to_be_focused()
    page.get_by_label("helpful, weight as a number").fill("0.3")
    page.keyboard.press("Escape")
    assert page.locator("#settings").is_hidden()
    expect(opener).to_be_focused()
    opener.click()
    assert page.evaluate("document.getElementById('main').inert")
    page.set_viewport_size({"width": 1200, "height": 740})
    expect(page.locator("#settings")).to_be_visible()
    expect(page.locator("#close-settings")).to_be_hidden()
    expect(page.locator("#main")).to_have_js_property("inert", False)  # the event comes after the layout
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360


# --- parts ----------------------------------------------------------------------------------------------------------


def test_the_page_brings_everything_along_and_no_inline_code(server: Served) -> None:
    with urllib.request.urlopen(server.url) as answer:
        assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
    for file in PAGE.glob("*.*"):
        text = file.read_text(encoding="utf-8").replace('"http://www.w3.org/2000/svg"', "")
        assert "http://" not in text, file
        assert "https://" not in text, file
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), file
    index = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", index)
    for asset in re.findall(r'(?:href|src)="(assets/[^"]+)"', index):
        with urllib.request.urlopen(f"{server.url}/{asset}") as answer:
            assert answer.status == 200


def test_events_are_read_however_they_are_cut(page: Page) -> None:
    stream = ': hello\r\n\r\ndata: {"a": "é"}\r\n\r\ndata:two\ndata:  lines\nid: 3\n\nevent: x\n\ndata\r\r'
    stream += "data: [DONE]\n\nrest"
    found = page.evaluate(
        """async (stream) => {
            const { EventParser } = await import("/assets/sse.js");
            const read = (pieces) => {
                const parser = new EventParser();
                return pieces.flatMap((piece) => parser.push(piece));
            };
            const places = [...Array(stream.length + 1).keys()];
            return [...places.map((at) => read([stream.slice(0, at), stream.slice(at)])), read([...stream])];
        }""",
        stream,
    )
    assert len(found) == len(stream) + 2
    for events in found:
        assert events == ['{"a": "é"}', "two\n lines", "", "[DONE]"]


NASTY = ["", "'", "''", "it's", '"', "\\", "\\'", "$HOME `x` $(x)", "a\nb\r\tc", "!x", "-n", "%s"]
NASTY += ["\u2028", "\x07\x7f", "日本 🙂"]


def test_quoting_for_the_shell(page: Page) -> None:
    words = page.evaluate(
        "async (texts) => texts.map((await import('/assets/request.js')).shellQuote)",
        NASTY,
    )
    for text, word in zip(NASTY, words, strict=True):
        said = subprocess.run(["sh", "-c", f"printf '%s.' {word}"], capture_output=True, check=True)
        assert said.stdout == (text + ".").encode()


def test_python_literals(page: Page) -> None:
    values = [*NASTY, None, True, False, 0, -1.5, 1e21, 1e-9, [], {}, {"a": [1, {"b'": None}], "c": [True, "x"]}]
    literals = page.evaluate(
        """async (values) => {
            const { pythonLiteral } = await import("/assets/request.js");
            return values.map((value) => pythonLiteral(value));
        }""",
        values,
    )
    assert [ast.literal_eval(literal) for literal in literals] == values
    alone = page.evaluate("async () => (await import('/assets/request.js')).pythonLiteral('\\ud800')")
    assert ast.literal_eval(alone) == "\ud800"


def test_text_and_tokens_are_matched(page: Page) -> None:
    """Tokens without text join the next piece; several tokens of one chunk are told apart where their texts say so."""
    pushes = [
        ["Hello", ["Hello"]],
        ["", ["bytes:\\xe6"]],
        ["日", ["bytes:\\x97\\xa5"]],
        [" one two", [" one", " two"]],
        [" three!", ["three", "!"]],
        ["\n\n", ["\n", "\n"]],
        ["", [" held"]],
        [" held back", [" back"]],
        ["rest", []],
        ["", ["<end>"]],
    ]
    pieces = page.evaluate(
        """async (pushes) => {
            const { Aligner } = await import("/assets/tokens.js");
            const aligner = new Aligner();
            const pieces = pushes.flatMap(([text, tokens]) => aligner.push(text, tokens.map((token) => ({ token }))));
            return [...pieces, ...aligner.finish()].map(({ text, tokens }) => [text, tokens.map(({ token }) => token)]);
        }""",
        pushes,
    )
    assert pieces == [
        ["Hello", ["Hello"]],
        ["日", ["bytes:\\xe6", "bytes:\\x97\\xa5"]],
        [" one", [" one"]],
        [" two", [" two"]],
        [" three", ["three"]],
        ["!", ["!"]],
        ["\n", ["\n"]],
        ["\n", ["\n"]],
        [" held", [" held"]],
        [" back", [" back"]],
        ["rest", []],
        ["", ["<end>"]],
    ]
