"""From a package file to rows: cleaning, the held-out part, requests, damaged poems."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ernie45.errors import NotFoundError, TransferError
from recipes.poems import compliance, fetch, make_pairs, make_sft, prompts
from recipes.poems.clean import UnusableError, clean
from recipes.poems.instructions import balanced, instruction
from recipes.poems.make_pairs import DAMAGES, damage
from recipes.poems.poem import HELD_OUT_SHARE, Poem, draw_key, read_poems, sample, write_rows
from recipes.poems.rules import FORMS, OTHER, check, form_named


def record(*paragraphs: str, title: str = "題", author: str = "某") -> dict[str, Any]:
    return {"title": title, "author": author, "paragraphs": list(paragraphs)}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def poems(make_package: Callable[..., Path]) -> list[Poem]:
    return fetch.collect(make_package())[0]


def test_a_record_becomes_a_poem() -> None:
    poem = clean(record("床前明月光，疑是地上霜。", "舉頭望明月，低頭思故鄉。", title="靜夜思", author="李白"), "唐")
    assert poem.lines == ("床前明月光，", "疑是地上霜。", "舉頭望明月，", "低頭思故鄉。")
    assert poem.verses == ["床前明月光", "疑是地上霜", "舉頭望明月", "低頭思故鄉"]
    assert (poem.form, poem.dynasty) == ("五言絕句", "唐")
    assert poem.body == "床前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。"
    assert poem.text == "《靜夜思》\n唐·李白\n床前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。\n"
    assert Poem.of_row(json.loads(json.dumps(poem.as_row()))) == poem


def test_notes_quotes_and_foreign_marks_go() -> None:
    poem = clean(
        record("「白日（一作「日（頭）」）依山盡」,黃河[注]入海流. ", "欲窮千里目；", title="登樓（二首） 其一"), "唐"
    )
    assert poem.lines == ("白日依山盡，", "黃河入海流。", "欲窮千里目；")
    assert (poem.form, poem.title) == (OTHER, "登樓其一")


def test_a_last_line_without_mark_gets_one() -> None:
    assert clean(record("白日依山盡，黃河入海流"), "唐").lines[-1] == "黃河入海流。"


@pytest.mark.parametrize(
    ("paragraphs", "reason"),
    [
        (["白日□山盡，黃河入海流。"], "other signs"),
        (["白日（依山盡，黃河入海流。"], "other signs"),
        (["白日abc盡，黃河入海流。"], "other signs"),
        ([], "empty"),
        (["（缺）"], "empty"),
        (["白日依山盡。"], "a single line"),
        ("白日依山盡，黃河入海流。", "no paragraphs"),
        ([1], "no paragraphs"),
    ],
)
def test_what_is_damaged_is_left_out_with_its_reason(paragraphs: Any, reason: str) -> None:
    with pytest.raises(UnusableError, match=reason):
        clean({"title": "題", "author": "某", "paragraphs": paragraphs}, "唐")


def test_missing_title_and_author_have_names() -> None:
    poem = clean({"paragraphs": ["白日依山盡，黃河入海流。"]}, "宋")
    assert (poem.title, poem.author) == ("無題", "佚名")


def test_the_package_is_read_and_copies_are_dropped(make_package: Callable[..., Path], poem_records: Any) -> None:
    tang, song = poem_records["tang"], poem_records["song"]
    copy = {**tang[0], "title": "別題", "paragraphs": ["床前明月光。疑是地上霜；舉頭望明月，低頭思故鄉"]}
    poems, left_out = fetch.collect(make_package({"tang": tang, "song": [*song, copy]}))
    assert [poem.title for poem in poems] == ["靜夜思", "登鸛雀樓", "楓橋夜泊", "山居秋暝", "登高", "題西林壁"]
    assert [poem.dynasty for poem in poems] == [*"唐唐唐唐唐宋"]
    assert left_out == {"other signs, as for lost characters": 1, "the same characters as another poem": 1}
    counts = fetch.summary(poems, left_out)
    assert counts["by_form"] == {"五言絕句": 2, "七言絕句": 2, "五言律詩": 1, "七言律詩": 1}
    assert counts["characters"] == sum(len(poem.text) for poem in poems)


def test_a_file_of_something_else_is_refused(make_package: Callable[..., Path]) -> None:
    with pytest.raises(NotFoundError, match="holds no files poet.tang"):
        fetch.collect(make_package({}))


def test_fetch_writes_both_parts(
    make_package: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("recipes.poems.poem.HELD_OUT_SHARE", 0.5)
    fetch.main(["-o", str(tmp_path / "data"), "--package-file", str(make_package())])
    train, held_out = (list(read_poems(tmp_path / "data" / name)) for name in (fetch.TRAIN, fetch.HELD_OUT))
    assert len(train) + len(held_out) == 6
    assert all(poem.held_out for poem in held_out)
    assert not any(poem.held_out for poem in train)
    assert json.loads(capsys.readouterr().out)["held_out"] == len(held_out)
    assert rows_of(tmp_path / "data" / fetch.TRAIN)[0]["text"] == train[0].text


def test_what_npm_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no such package >&2\nexit 3\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TransferError, match="npm pack some@1 failed with status 3: no such package"):
        fetch.pack("some@1", tmp_path)
    npm.write_text('#!/bin/sh\n: > "$4/$2.tgz"\n')
    assert fetch.pack("some@1", tmp_path) == tmp_path / "some@1.tgz"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(NotFoundError, match="npm is not installed"):
        fetch.pack("some@1", tmp_path)


def test_the_held_out_part_is_one_in_a_hundred_and_follows_the_text_alone() -> None:
    def poem(number: int, title: str) -> Poem:
        line = "".join(chr(0x4E00 + int(digit)) for digit in f"{number:05d}")
        return Poem(title=title, author="某", dynasty="唐", form=OTHER, lines=(line + "，", line + "。"))

    chosen = [poem(number, "甲").held_out for number in range(20000)]
    assert chosen == [poem(number, "乙").held_out for number in range(20000)]
    assert abs(sum(chosen) - 20000 * HELD_OUT_SHARE) < 5 * (20000 * HELD_OUT_SHARE) ** 0.5


def test_samples_follow_the_seed_and_not_the_order(poems: list[Poem]) -> None:
    assert sample(poems, 3, 0) == sample(poems[::-1], 3, 0) == sorted(poems, key=lambda p: draw_key(p, 0))[:3]
    assert len({tuple(poem.title for poem in sample(poems, 6, seed)) for seed in range(5)}) > 1


def test_requests_name_the_form_and_something_of_the_poem(poems: list[Poem]) -> None:
    asked = {seed: instruction(poems[0], seed) for seed in range(40)}
    assert asked == {seed: instruction(poems[0], seed) for seed in range(40)}
    texts = {text for text in asked.values() if text is not None}
    assert len(texts) >= 3, "title and words, in several phrasings"
    assert all("五言絕句" in text for text in texts)
    assert all("靜夜思" in text or "明月" in text for text in texts)


def test_words_inside_of_longer_ones_are_not_asked_for() -> None:
    poem = Poem(title="句", author="某", dynasty="唐", form="五言絕句", lines=("甲乙明月丁，",) * 4)
    assert {instruction(poem, seed) for seed in range(20)} == {"寫一首五言絕句，詩中要有「明月」。"}


def test_what_is_no_topic_is_not_asked_for(poems: list[Poem]) -> None:
    form = {"author": "某", "dynasty": "唐", "form": "五言絕句", "lines": ("白日依盡窮，",) * 4}
    for title in ("句", "詠史十首其二", "偶成", "一個很長很長的題目在這裡"):
        assert instruction(Poem(title=title, **form), 0) is None  # type: ignore[arg-type]
    assert instruction(Poem(title="詠史", **form), 0) is not None  # type: ignore[arg-type]
    assert instruction(Poem(**{**form, "title": "詠史", "form": OTHER}), 0) is None  # type: ignore[arg-type]
    assert {poem.form for poem in balanced(poems, 1, 0)} == set(FORMS)
    assert max(Counter(poem.form for poem in balanced(poems, 1, 0)).values()) == 1


def test_rows_to_tune_on(poems: list[Poem], tmp_path: Path) -> None:
    write_rows(tmp_path / "poems.jsonl", (poem.as_row() for poem in poems))
    for name, module, turns in (("sft", make_sft, ["user", "assistant"]), ("prompts", prompts, ["user"])):
        for seed in ("0", "0", "1"):
            module.main([str(tmp_path / "poems.jsonl"), "-o", str(tmp_path / f"{name}.{seed}"), "--seed", seed])
        rows = rows_of(tmp_path / f"{name}.0")
        assert len(rows) == 6
        assert all([message["role"] for message in row["messages"]] == turns for row in rows)
        assert all(row["form"] in row["messages"][0]["content"] for row in rows)
        assert rows != rows_of(tmp_path / f"{name}.1")
        module.main([str(tmp_path / "poems.jsonl"), "-o", str(tmp_path / "few"), "--per-form", "1"])
        assert len(rows_of(tmp_path / "few")) == 4
    by_title = {poem.title: poem for poem in poems}
    for row in rows_of(tmp_path / "sft.0"):
        answer = row["messages"][1]["content"]
        assert answer in {poem.body for poem in poems if poem.form == row["form"]}
        if "《" in row["messages"][0]["content"]:
            assert by_title[row["messages"][0]["content"].split("《")[1].split("》")[0]].body == answer


def test_the_three_damages() -> None:
    pytest.importorskip("pypinyin")
    verses = ["床前明月光", "疑是地上霜", "舉頭望明月", "低頭思故鄉"]
    for seed in range(20):
        draw = random.Random(seed)
        swapped = DAMAGES["swapped lines"](verses, draw)
        assert swapped in (
            ["疑是地上霜", "床前明月光", "舉頭望明月", "低頭思故鄉"],
            ["床前明月光", "疑是地上霜", "低頭思故鄉", "舉頭望明月"],
        )
        dropped = DAMAGES["dropped character"](verses, draw)
        assert dropped is not None
        assert sorted(map(len, dropped)) == [4, 5, 5, 5]
        broken = DAMAGES["broken rhyme"](verses, draw)
        assert broken is not None
        assert sum(a != b for a, b in zip(broken, verses, strict=True)) == 1
        parts = check("，".join(broken), form_named("五言絕句"))
        assert (parts.lines, parts.characters, parts.rhyme) == (1, 1, 0)


def test_pairs_differ_in_one_damage_and_follow_the_seed(poems: list[Poem], tmp_path: Path) -> None:
    pytest.importorskip("pypinyin")
    write_rows(tmp_path / "poems.jsonl", (poem.as_row() for poem in poems))
    kinds: Counter[str] = Counter()
    for seed in range(12):
        make_pairs.main([str(tmp_path / "poems.jsonl"), "-o", str(tmp_path / "pairs"), "--seed", str(seed)])
        rows = rows_of(tmp_path / "pairs")
        assert rows == make_pairs.rows(poems[::-1], 5000, seed), "the order of the poems does not matter"
        assert len(rows) == 6
        for row in rows:
            assert row["chosen"] != row["rejected"]
            assert row["chosen"].count("，") == row["rejected"].count("，")
            kinds[row["damage"]] += 1
    assert kinds.keys() == DAMAGES.keys()
    assert min(kinds.values()) > 72 / 3 / 2
    assert damage(poems[0], 3) == damage(poems[0], 3)


def test_compliance_is_counted_by_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pypinyin")
    quiet_night, half = "床前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。", "床前明月光，疑是地上霜。"
    rows = [
        {"messages": [{"role": "user", "content": form}], "form": form} for form in ("五言絕句", "五言絕句", "七言絕句")
    ]
    (tmp_path / "prompts").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: list[Any] = []

    class Model:
        def __init__(self, name: str) -> None:
            asked.append(name)

        def chat(self, conversations: list[Any], params: list[Any]) -> list[SimpleNamespace]:
            asked.append([(one.temperature, one.seed) for one in params])
            assert conversations == [row["messages"] for row in rows]
            return [SimpleNamespace(text=text) for text in (quiet_night, half, quiet_night)]

    monkeypatch.setattr("ernie45.LLM", Model, raising=False)
    arguments = ["m", str(tmp_path / "prompts"), "--temperature", "0.5", "--seed", "7", "-o", str(tmp_path / "answers")]
    compliance.main(arguments)
    assert asked == ["m", [(0.5, 7), (0.5, 8), (0.5, 9)]]
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| 五言絕句 | 2 | 50.0% | 0.750 | 0.750 | 0.500 | 0.667 |",
        "| 七言絕句 | 1 | 0.0% | 1.000 | 0.000 | 1.000 | 0.667 |",
        "| all | 3 | 33.3% | 0.833 | 0.500 | 0.667 | 0.667 |",
    ]
    assert [row["answer"] for row in rows_of(tmp_path / "answers")] == [quiet_night, half, quiet_night]
