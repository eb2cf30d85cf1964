"""Conversations on the page: kept, listed, taken up again, changed, exported and brought back; in a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builders.pages import Opener, Page, answer, expect, finished, needs_chromium, ready, send, shown, watch
from builders.serving import CONTEXT, Running

pytestmark = needs_chromium

KEY = "genarm:conversation:"


def stored(page: Page) -> dict[str, Any]:
    found = page.evaluate("({ ...localStorage })")
    return {key.removeprefix(KEY): json.loads(text) for key, text in found.items() if key.startswith(KEY)}


def titles(page: Page) -> list[str]:
    return list(page.locator("#list .title").all_text_contents())


def reload(page: Page) -> None:
    page.reload()
    ready(page)


def said(page: Page) -> list[str]:
    return list(page.locator("#turns .prompt").all_text_contents())


def messages(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


# --- keeping ---------------------------------------------------------------------------------------------------------


def test_a_conversation_is_taken_up_again_where_it_was_left(page: Page) -> None:
    page.fill("#system", "w9")
    send(page, "w1", tokens=6)
    send(page, "w2", tokens=6)
    replies = [shown(page, 0), shown(page, 1)]
    about = page.locator(".reply .about").last.inner_text()
    reload(page)
    assert said(page) == ["w1", "w2"]
    assert [shown(page, 0), shown(page, 1)] == replies
    assert page.locator(".reply .about").last.inner_text() == about
    assert page.input_value("#system") == "w9"
    asked = send(page, "w3", tokens=2)
    assert asked["messages"] == [
        {"role": "system", "content": "w9"},
        *messages("w1", replies[0], "w2", replies[1], "w3"),
    ]
    page.get_by_role("switch", name="Heat map").check()
    expect(page.locator(".unknown").first).to_be_visible()  # that its tokens are not known any more is said


def test_the_list_shows_opens_renames_and_deletes(page: Page) -> None:
    for prompt in ("w1 first", "w2 second"):
        send(page, prompt, tokens=3)
        page.get_by_role("button", name="New").click()
    assert titles(page) == ["w2 second", "w1 first"]
    page.get_by_role("button", name="w1 first").first.click()
    assert said(page) == ["w1 first"]
    expect(page.locator("[aria-current]")).to_contain_text("w1 first")
    page.get_by_role("button", name="Rename “w1 first”").click()
    field = page.get_by_label("Name of the conversation")
    expect(field).to_be_focused()
    field.fill("dropped")
    field.press("Escape")
    page.get_by_role("button", name="Rename “w1 first”").click()
    field.fill("<b>eggs</b>")
    field.press("Enter")
    expect(page.get_by_role("button", name="Rename “<b>eggs</b>”")).to_be_focused()
    send(page, "w3", tokens=2)  # which keeps the name
    assert titles(page) == ["<b>eggs</b>", "w2 second"]
    page.get_by_role("button", name="Delete “<b>eggs</b>”").click()
    assert (titles(page), said(page)) == (["w2 second"], [])
    page.get_by_role("button", name="Undo").click()
    assert (titles(page), said(page)) == (["<b>eggs</b>", "w2 second"], ["w1 first", "w3"])
    page.get_by_role("button", name="w2 second").first.hover()
    page.get_by_role("button", name="Delete “w2 second”").click()
    assert said(page) == ["w1 first", "w3"]
    reload(page)
    assert titles(page) == ["<b>eggs</b>"]
    assert {one["title"] for one in stored(page).values()} == {"<b>eggs</b>"}


def test_a_reply_that_is_being_written_is_kept_as_far_as_it_came(page: Page, server: Running) -> None:
    server.pace.seconds = 0.05
    try:
        page.fill("#max_tokens", "60")
        page.fill("#message", "w1")
        page.press("#message", "Enter")
        expect(page.locator(".token").nth(4)).to_be_attached()
        page.get_by_role("button", name="New").click()
        finished(page)
        page.get_by_role("button", name="w1").first.click()
        assert page.locator(".reply .about").inner_text().endswith("stopped")
        assert shown(page)
        page.fill("#message", "w2")
        page.press("#message", "Enter")
        expect(page.locator(".turn:last-child .token").nth(4)).to_be_attached()
        reload(page)
    finally:
        server.pace.seconds = 0.0
    assert said(page) == ["w1", "w2"]
    assert shown(page)


def test_what_cannot_be_read_is_passed_over(page: Page) -> None:
    """Of another version, damaged, not ours: the rest is there, and nothing of it is lost or changed."""
    send(page, "w1", tokens=3)
    [(key, good)] = stored(page).items()
    reply = good["turns"][0]["reply"]

    def with_turn(**changes: Any) -> str:
        return json.dumps({**good, "turns": [{"prompt": "w", "reply": {**reply, **changes}}]})

    strange = {
        "newer": json.dumps({**good, "version": 2, "turns": "other"}),
        "cut": json.dumps(good)[:-9],
        "null": "null",
        "list": "[]",
        "number": json.dumps({**good, "updated": "yesterday"}),
        "turns": json.dumps({**good, "turns": [None]}),
        "reply": with_turn(text=3),
        "request": with_turn(request=None),
        "weights": with_turn(request={**reply["request"], "reward_weights": [1]}),
    }
    page.evaluate(
        "([prefix, all]) => Object.entries(all).forEach(([id, text]) => localStorage.setItem(prefix + id, text))",
        [KEY, strange],
    )
    page.evaluate("localStorage.setItem('somebody-elses', 'x'); sessionStorage.setItem('genarm:open', '../..')")
    reload(page)
    assert titles(page) == ["w1"]
    send(page, "w2", tokens=3)
    left = page.evaluate("({ ...localStorage })")
    assert {name: left[KEY + name] for name in strange} == strange
    assert {name for name in left if name.startswith(KEY)} > {KEY + name for name in [*strange, key]}


@pytest.mark.parametrize("how", ["none", "full"])
def test_a_browser_that_keeps_nothing(server: Running, open_page: Opener, how: str) -> None:
    page = open_page("about:blank")
    page.add_init_script(
        """for (const name of ["localStorage", "sessionStorage"]) {
            Object.defineProperty(window, name, { get() { throw new DOMException("no", "SecurityError"); } });
        }"""
        if how == "none"
        else "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"
    )
    page.goto(server.url)
    ready(page)
    send(page, "w1", tokens=3)
    if how == "full":
        expect(page.get_by_role("status")).to_contain_text("no room")
    page.get_by_role("button", name="New").click()
    send(page, "w2", tokens=3)
    page.get_by_role("button", name="w1").first.click()
    assert said(page) == ["w1"]


def test_what_is_kept_is_bounded(page: Page) -> None:
    """In number and in size; the oldest go, which is said, and a full browser makes room in the same way."""
    found = page.evaluate(
        """async () => {
            const { History } = await import("/assets/history.js");
            const request = { model: "m", temperature: 1, top_p: 1, seed: 1, reward_weights: {} };
            const kept = (id, updated, text) => ({ id, title: id, updated, left: 0, turns: [{ prompt: "p", reply: {
                request, system: "", first: 0, text, finish_reason: "stop", kl: null, count: 1, error: "" } }] });
            const told = [];
            const history = new History(() => {}, (message) => told.push(message));
            for (let i = 0; i < 103; i += 1) history.put(kept(`c${i}`, i, "short"));
            const number = [history.list.length, history.list.at(-1).id, localStorage.length, told.length];
            for (let i = 0; i < 5; i += 1) history.put(kept(`long${i}`, 1000 + i, "x".repeat(900_000)));
            const size = history.list.map(({ id }) => id).filter((id) => id.startsWith("long"));
            const set = Storage.prototype.setItem;
            let refusals = 1;
            Storage.prototype.setItem = function (key, text) {
                if (refusals-- > 0) throw new DOMException("full", "QuotaExceededError");
                set.call(this, key, text);
            };
            history.put(kept("last", 2000, "short"));
            Storage.prototype.setItem = set;
            const again = new History(() => {}, () => {});
            return { number, size, told: told.at(-1), after: again.list.map(({ id }) => id).filter((id) => id > "d") };
        }"""
    )
    assert found["number"] == [100, "c3", 100, 3]
    assert found["size"] == ["long4", "long3", "long2"]
    assert found["told"] == "The oldest conversation made room for this one"
    assert found["after"] == ["last", "long4", "long3"]


def test_two_windows_lose_nothing_of_each_other(server: Running, open_page: Opener) -> None:
    one = ready(open_page(server.url))
    send(one, "w1", tokens=3)
    other = one.context.new_page()
    ready_other = other.goto(server.url)
    assert ready_other is not None
    ready(other)
    other.get_by_role("button", name="w1").first.click()
    send(other, "w2", tokens=3)
    expect(one.locator("#list li")).to_have_count(1)
    send(one, "w3", tokens=3)
    expect(one.locator("#list li")).to_have_count(2)
    expect(other.locator("#list li")).to_have_count(2)
    prompts = sorted([turn["prompt"] for turn in kept["turns"]] for kept in stored(one).values())
    assert prompts == [["w1", "w2"], ["w1", "w3"]]


# --- saying it otherwise ---------------------------------------------------------------------------------------------


def test_an_earlier_message_is_edited_and_the_conversation_goes_on_from_there(page: Page) -> None:
    for prompt in ("w1", "w2", "w3"):
        send(page, prompt, tokens=4)
    first = shown(page, 0)
    before = page.locator(".reply .text").all_text_contents()
    page.get_by_role("button", name="Edit the message").nth(1).click()
    field = page.get_by_label("Edited message")
    expect(field).to_be_focused()
    field.fill("other")
    field.press("Escape")
    expect(page.get_by_role("button", name="Edit the message").nth(1)).to_be_focused()
    page.get_by_role("button", name="Edit the message").nth(1).click()
    assert field.input_value() == "w2"
    field.fill("w4")
    with page.expect_request("**/chat/completions") as made:
        field.press("Enter")
    finished(page)
    assert made.value.post_data_json["messages"] == messages("w1", first, "w4")
    assert said(page) == ["w1", "w4"]
    expect(page.get_by_role("status")).to_contain_text("1 later turn taken away")
    page.get_by_role("button", name="Undo").click()
    assert said(page) == ["w1", "w2", "w3"]
    assert page.locator(".reply .text").all_text_contents() == before
    reload(page)
    assert said(page) == ["w1", "w2", "w3"]


def test_any_reply_is_tried_again_with_the_present_weights_or_its_own(page: Page) -> None:
    page.get_by_label("helpful, weight as a number").fill("0.25")
    page.fill("#temperature", "0.5")
    send(page, "w1", tokens=4)
    send(page, "w2", tokens=4)
    page.get_by_label("helpful, weight as a number").fill("2")
    page.fill("#temperature", "1")
    page.fill("#max_tokens", "5")
    for name, weight, temperature, most in (("Same weights", 0.25, 0.5, 4), ("Try again", 2, 1, 5)):
        with page.expect_request("**/chat/completions") as made:
            page.get_by_role("button", name=name).first.click()
        finished(page)
        asked = made.value.post_data_json
        assert (asked["messages"], asked["reward_weights"]["helpful"]) == (messages("w1"), weight)
        assert (asked["temperature"], asked["max_tokens"]) == (temperature, most)
        page.get_by_role("button", name="Undo").click()
        assert said(page) == ["w1", "w2"]
    reload(page)
    with page.expect_request("**/chat/completions") as made:
        page.get_by_role("button", name="Same weights").first.click()
    finished(page)
    assert made.value.post_data_json["reward_weights"]["helpful"] == 0.25
    assert said(page) == ["w1"]


def test_wishes_are_among_the_weights_that_a_reply_had(page: Page) -> None:
    line = page.get_by_label("Type a wish, get a slider")
    line.fill("w5")
    line.press("Enter")
    page.get_by_role("slider", name="Distance from the base").press("ArrowLeft")
    asked = send(page, "w1", tokens=3)
    reload(page)
    with page.expect_request("**/chat/completions") as made:
        page.get_by_role("button", name="Same weights").click()
    finished(page)
    again = made.value.post_data_json
    assert (again["wishes"], again["max_kl"]) == (asked["wishes"], asked["max_kl"])
    assert again["seed"] != asked["seed"]  # else it would be the same reply


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_an_error_stays_at_its_turn_until_it_is_tried_again(page: Page) -> None:
    page.route("**/chat/completions", lambda route: route.abort())
    send(page, "w1")
    alert = page.locator(".turn").get_by_role("alert")
    expect(alert).to_contain_text("cannot be reached")
    expect(page.locator("#banner")).to_be_hidden()
    page.unroute("**/chat/completions")
    reload(page)
    expect(page.locator(".failure")).to_contain_text("cannot be reached")
    page.fill("#max_tokens", "9")
    page.get_by_role("button", name="Try again").click()
    finished(page)
    assert said(page) == ["w1"]
    expect(page.locator(".failure button")).to_have_count(0)
    assert shown(page)


def test_where_the_context_is_full_the_oldest_turns_can_be_left_out(page: Page) -> None:
    """As many as the button says, which is as many as are needed; afterwards the rest goes on."""
    requests = watch(page)
    for i in range(8):
        send(page, f"w{i} w{i} w{i} w{i}", tokens=20)
        if page.locator(".failure button").count():
            break
    count = len(said(page)) - 1
    assert 2 <= count < 7
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text(str(CONTEXT))
    button = page.locator(".failure").get_by_role("button", name="Leave out the oldest")
    label = button.inner_text()
    left = 1 if label == "Leave out the oldest turn and try again" else int(label.split()[4])
    button.click()
    finished(page)
    expect(page.locator(".failure button")).to_have_count(0)
    sent = requests[-1].post_data_json["messages"]
    assert len(sent) == 2 * (count - left) + 1
    assert sent[-1]["content"] == said(page)[-1]
    expect(page.locator(".divider")).to_contain_text(f"no longer reads what is above ({left} turn")
    assert len(said(page)) == count + 1  # and all of it can still be read
    send(page, "w1", tokens=1)
    assert len(requests[-1].post_data_json["messages"]) == 2 * (count + 1 - left) + 1
    reload(page)
    expect(page.locator(".divider")).to_be_visible()
    send(page, "w2", tokens=1)
    assert len(requests[-1].post_data_json["messages"]) == 2 * (count + 2 - left) + 1


def test_how_many_turns_to_leave_out(page: Page) -> None:
    full = "This model's maximum context length is 100 tokens; "
    said = full + "the request has {} in the messages{}. Shorten the messages."
    characters = full + "the messages has 900 characters, and this server reads "
    cases = [
        ([said.format(110, " and 20 for the reply"), [50, 50, 50], 220], 2),  # 30 tokens are 60 characters
        ([said.format(100, ""), [50, 50, 50], 200], 1),  # a quarter of the context for the reply: 50 characters
        ([said.format(101, " and 1 for the reply"), [2, 2], 202], 2),
        ([said.format(400, " and 20 for the reply"), [50, 50], 800], 0),  # the message alone is too long
        ([characters + "up to 600 (6 for each token, which is its longest). Shorten.", [200, 200, 200], 900], 3),
        (["Too long, says another server", [9, 9], 90], 1),
        (["Too long, says another server", [], 90], 0),
    ]
    found = page.evaluate(
        """async (cases) => {
            const { surplus } = await import("/assets/chat.js");
            return cases.map((given) => surplus(...given));
        }""",
        [arguments for arguments, _ in cases],
    )
    assert found == [count for _, count in cases]


# --- taking it along -------------------------------------------------------------------------------------------------


def test_an_exported_conversation_comes_back_whole(page: Page, tmp_path: Path) -> None:
    page.fill("#system", "w9")
    send(page, "w1 <b>x</b>", tokens=5)
    send(page, "w2", tokens=5)
    replies = page.locator(".reply .text").all_text_contents()
    about = page.locator(".reply .about").all_inner_texts()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / "c.json"
    file.write_bytes(saved.value.path().read_bytes())
    page.evaluate("localStorage.clear(); sessionStorage.clear()")
    reload(page)
    assert titles(page) == []
    page.set_input_files("#file", file)
    expect(page.get_by_role("status")).to_contain_text("is imported")
    assert (titles(page), said(page)) == (["w1 <b>x</b>"], ["w1 <b>x</b>", "w2"])
    assert page.locator(".reply .text").all_text_contents() == replies
    assert [text.split(" · ")[0] for text in page.locator(".reply .about").all_inner_texts()] == [
        text.split(" · ")[0] for text in about
    ]
    assert send(page, "w3", tokens=2)["messages"][0] == {"role": "system", "content": "w9"}
    page.set_input_files("#file", file)  # a second time it is another one
    expect(page.locator("#list li")).to_have_count(2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "it is no JSON"),
        ("[1, 2]", "it is no conversation exported from this page"),
        ('{"format": "genarm-conversation", "version": 7}', "it is of version 7, and this page reads version 1"),
        ('{"format": "genarm-conversation", "version": 1, "turns": []}', "it has no turns of a chat"),
        ('{"format": "genarm-conversation", "version": 1, "turns": 3}', "its turns is not a list of up to 2000"),
        (
            '{"format": "genarm-conversation", "version": 1, "turns": [{"prompt": 1, "reply": {}}]}',
            "its turns[0].prompt is not a text of up to 1000000 characters",
        ),
    ],
)
def test_a_wrong_file_is_one_clear_line(page: Page, tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(content)
    page.set_input_files("#file", file)
    expect(page.locator("#banner p")).to_have_text(f"Cannot import wrong.json: {words}.")
    assert titles(page) == []


def test_hostile_words_in_what_is_imported_stay_words(page: Page, tmp_path: Path) -> None:
    bad = "<img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script>"
    request = {"model": bad, "temperature": 1, "top_p": 1, "seed": 1, "reward_weights": {bad: 1, "__proto__": 2}}
    reply = {"request": request, "text": f"{bad} [x](javascript:hacked=1)", "finish_reason": bad, "error": bad}
    content = {"format": "genarm-conversation", "version": 1, "id": "../x", "title": bad, "system": bad}
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({**content, "turns": [{"prompt": bad, "reply": reply}]}))
    page.set_input_files("#file", file)
    expect(page.get_by_role("status")).to_contain_text("is imported")
    assert titles(page) == [bad]
    assert page.locator("main img, main script, nav img, main a").count() == 0
    answer(page, bad)
    page.get_by_role("button", name="Try again").click()
    finished(page)
    assert page.evaluate("window.hacked") is None
