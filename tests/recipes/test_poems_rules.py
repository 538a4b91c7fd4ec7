"""Lines, characters and rhyme of poems that everybody knows, and of what a model could try instead of a poem."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ConfigError, NotFoundError
from recipes.poems import rhyme, rules
from recipes.poems.rules import FORMS, OTHER, answer_reward, check, form_named, form_of, reward, split_lines

QUIET_NIGHT = "床前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。"
STORK_TOWER = "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。"
MAPLE_BRIDGE = "月落烏啼霜滿天，江楓漁火對愁眠。姑蘇城外寒山寺，夜半鐘聲到客船。"
AUTUMN_DUSK = "空山新雨後，天氣晚來秋。明月松間照，清泉石上流。竹喧歸浣女，蓮動下漁舟。隨意春芳歇，王孫自可留。"
CLIMBING = (
    "風急天高猿嘯哀，渚清沙白鳥飛迴。無邊落木蕭蕭下，不盡長江滾滾來。"
    "萬里悲秋常作客，百年多病獨登臺。艱難苦恨繁霜鬢，潦倒新停濁酒杯。"
)
POEMS = {
    "五言絕句": (QUIET_NIGHT, STORK_TOWER),
    "七言絕句": (MAPLE_BRIDGE,),
    "五言律詩": (AUTUMN_DUSK,),
}


@pytest.fixture
def hand_tracks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rhymes typed in, for what has to be told apart from the readings of a package."""
    table = {"霜": "ang", "鄉": "ang", "光": "ang", "流": "ou", "樓": "ou", "月": "ie", "行": "ang eng"}
    monkeypatch.setattr(rhyme, "tracks_of", lambda char: frozenset(table.get(char, "").split()))


def test_lines_end_at_marks_and_line_feeds() -> None:
    assert split_lines(QUIET_NIGHT) == ["床前明月光", "疑是地上霜", "舉頭望明月", "低頭思故鄉"]
    assert split_lines("「白日！依山」 盡?\n\n") == ["白日", "依山", "盡"]
    assert split_lines("") == split_lines("。\n") == []


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_told_from_lines_and_characters(form: str) -> None:
    lines = ["山" * FORMS[form].line_chars] * FORMS[form].num_lines
    assert form_of(lines) == form
    assert form_of(lines[1:]) == OTHER
    assert form_of([*lines[1:], "山" * 6]) == OTHER


@pytest.mark.usefixtures("hand_tracks")
def test_each_part_by_hand() -> None:
    quatrain = form_named("五言絕句")
    whole = check(QUIET_NIGHT, quatrain)
    assert (whole.lines, whole.characters, whole.rhyme, whole.reward, whole.complies) == (1, 1, 1, 1, True)
    short = check("床前明月光，疑是地上霜。舉頭望明月，低頭故鄉。", quatrain)
    assert (short.lines, short.characters, short.rhyme) == (1, 3 / 4, 1)
    assert not short.complies
    missing = check("床前明月光，疑是地上霜。舉頭望明月。", quatrain)
    assert (missing.lines, missing.characters, missing.rhyme) == (3 / 4, 3 / 4, 0)
    more = check(QUIET_NIGHT + "黃河入海流。", quatrain)
    assert (more.lines, more.characters, more.rhyme) == (3 / 4, 1, 1)
    astray = check("床前明月光，黃河入海流。舉頭望明月，低頭思故鄉。", quatrain)
    assert (astray.lines, astray.characters, astray.rhyme) == (1, 1, 0)
    assert astray.reward == pytest.approx(2 / 3)
    again = check("床前明月光，疑是地上霜。床前明月光，低頭思故鄉。", quatrain)
    assert (again.lines, again.characters, again.rhyme) == (1, 3 / 4, 1), "a line said twice counts once"
    letters = check("abcde，12345。fghij，床前明月、。", quatrain)
    assert (letters.lines, letters.characters, letters.rhyme) == (1, 0, 0), "only Chinese characters count"


@pytest.mark.usefixtures("hand_tracks")
def test_rhymes_of_eight_lines_count_one_by_one() -> None:
    lines = ["甲乙丙丁戊"] * 8
    for ends, expected in (
        ("霜鄉光行", 1.0),
        ("霜鄉光流", 2 / 3),
        ("霜鄉流樓", 1 / 3),
        ("霜流月甲", 0),
        ("霜霜霜霜", 0),
    ):
        for at, end in zip((1, 3, 5, 7), ends, strict=True):
            lines[at] = "甲乙丙丁" + end
        assert check("，".join(lines), form_named("五言律詩")).rhyme == pytest.approx(expected), ends


@pytest.mark.usefixtures("hand_tracks")
@pytest.mark.parametrize(
    "cheat",
    [
        "床前明月光，疑是地上霜。床前明月光，疑是地上霜。",  # the same couplet again
        "霜霜霜霜霜，霜霜霜霜霜，霜霜霜霜霜，霜霜霜霜霜。",
        "abcde，12345。fghij，67890。",
        "床前明月光疑是地上霜舉頭望明月低頭思故鄉",
        QUIET_NIGHT * 3,
        "",
    ],
)
def test_what_only_looks_like_a_poem_is_worth_less(cheat: str) -> None:
    assert reward(cheat, "五言絕句") <= 2 / 3
    assert not check(cheat, form_named("五言絕句")).complies


def test_the_length_must_be_that_of_the_form_that_was_asked_for() -> None:
    pytest.importorskip("pypinyin")
    assert reward(MAPLE_BRIDGE, "五言絕句") < reward(MAPLE_BRIDGE, "七言絕句") == 1
    assert reward(QUIET_NIGHT, "五言律詩") < 1


@pytest.mark.parametrize(("form", "poem"), [(form, poem) for form, poems in POEMS.items() for poem in poems])
def test_poems_that_everybody_knows_keep_to_their_form(form: str, poem: str) -> None:
    pytest.importorskip("pypinyin")
    assert form_of(split_lines(poem)) == form
    assert reward(poem, form) == 1


def test_sounds_have_changed_since_and_that_is_said() -> None:
    """Du Fu's 迴 and 臺 rhymed in his time; by today's readings they are of two tracks."""
    pytest.importorskip("pypinyin")
    parts = check(CLIMBING, form_named("七言律詩"))
    assert (parts.lines, parts.characters) == (1, 1)
    assert 0 < parts.rhyme < 1


def test_tracks_of_readings() -> None:
    pypinyin = pytest.importorskip("pypinyin")
    assert rhyme.tracks_of("光") == rhyme.tracks_of("鄉") == {"ang"}
    assert rhyme.tracks_of("流") == {"ou"}
    assert rhyme.tracks_of("行") >= {"ang", "eng"}, "every reading counts"
    assert rhyme.tracks_of("x") == rhyme.tracks_of("。") == frozenset()
    finals = {
        final
        for char in map(chr, range(0x4E00, 0x9FA6, 7))
        for found in pypinyin.pinyin(char, style=pypinyin.Style.FINALS, errors="ignore")
        for final in found
    }
    assert len(finals - {final for track in rhyme.TRACKS.values() for final in track} - {""}) <= 3, (
        "of the rarest readings"
    )


def test_simplified_names_of_forms_are_understood_and_others_refused() -> None:
    assert form_named("五言绝句") is form_named("五言絕句")
    assert form_named("七言律诗") is form_named("七言律詩")
    with pytest.raises(ConfigError, match="there is no form '十四行詩': known are 五言絕句"):
        reward(QUIET_NIGHT, "十四行詩")


def test_the_reward_that_training_calls_takes_the_form_from_the_row() -> None:
    pytest.importorskip("pypinyin")
    assert answer_reward("寫一首五言絕句", QUIET_NIGHT, {"form": "五言絕句"}) == 1
    assert answer_reward("寫一首五言絕句", QUIET_NIGHT, {"form": "七言絕句"}) < 1


@given(text=st.text(st.sampled_from("床前明月光霜鄉，。\n x「"), max_size=60), form=st.sampled_from([*FORMS]))
@settings(max_examples=200, deadline=None)
def test_a_reward_is_a_share_and_full_only_for_a_poem_that_complies(text: str, form: str) -> None:
    pytest.importorskip("pypinyin")
    parts = check(text, form_named(form))
    for part in (parts.lines, parts.characters, parts.rhyme, parts.reward):
        assert 0 <= part <= 1
    assert (parts.reward == 1) == parts.complies
    if parts.complies:
        assert form_of(split_lines(text)) == form


def test_it_is_fast() -> None:
    pytest.importorskip("pypinyin")
    reward(AUTUMN_DUSK, "五言律詩")
    start = time.perf_counter()
    for _ in range(1000):
        reward(AUTUMN_DUSK, "五言律詩")
    assert time.perf_counter() - start < 2


def test_without_pypinyin_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pypinyin", None)
    rhyme.tracks_of.cache_clear()
    with pytest.raises(NotFoundError, match="pip install pypinyin"):
        rules.reward(QUIET_NIGHT, "五言絕句")
