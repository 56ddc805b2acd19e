"""Captions: what each rule takes away, what it leaves, and that no text of the web can trip them."""

import unicodedata

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.data import CaptionConfig, CaptionRules
from stages.select.captions import CLEANING, DROPPING, clean_captions

CONFIG = CaptionConfig()


def only(rule: str) -> CaptionConfig:
    return CaptionConfig(rules=CaptionRules(**{name: name == rule for name in CaptionRules.model_fields}))


def clean(text: str, config: CaptionConfig = CONFIG) -> str:
    return clean_captions(pa.array([text]), config).captions[0].as_py()


def reference(text: str, config: CaptionConfig = CONFIG) -> str:
    """Every rule on every caption, without triggers, without batches."""
    while True:
        before, text = text, text[: config.max_characters]
        for name, rule in CLEANING.items():
            text = rule.clean(text) if getattr(config.rules, name) else text
        if text == before:
            return text


EXAMPLES = [
    ("unescape_html", "Tom &amp;amp; Jerry&#39;s <b>house</b>", "Tom & Jerry's  house "),
    ("unescape_html", "5 &lt; 6 <3", "5 < 6 <3"),
    ("normalise_unicode", "cafe\u0301 x² ½ ™ ﬁ", "café x² ½ ™ ﬁ"),
    ("strip_control", "a\u200b cat\x00 \u202eon\ufeff a\tmat \U0001f469\u200d\U0001f680", "a cat on a\tmat \U0001f469\u200d\U0001f680"),
    ("strip_urls", "a cat (https://a.example/b?c=d&e) and www.cats.org, mail me@cats.co.uk", "a cat ( ) and  , mail  "),
    ("strip_urls", "cheap.cats.com/shop/1 sells cats", "  sells cats"),
    ("strip_urls", "version 2.0 of node.js at St. Ives", "version 2.0 of node.js at St. Ives"),
    ("strip_file_names", "IMG_1234.JPG a cat DSC00012 _MG_0042-Edit (my-cat_2.png) P1010020", "  a cat     ( )  "),
    ("strip_file_names", "Lexus GX 470, room 101, Apollo 11, sample 123", "Lexus GX 470, room 101, Apollo 11, sample 123"),
    ("strip_camera", "Canon EOS 5D Mark II, f/2.8, 1/200s, ISO 100", " ,  ,  ,  "),
    ("strip_camera", "the bay | Nikon D750 | 24-70mm f/4", "the bay | |   "),
    ("strip_camera", "a fox, taken with my Sony ILCE-7M3", "a fox,  "),
    ("strip_camera", "a Nikon D750 on a wooden table", "a Nikon D750 on a wooden table"),
    ("strip_camera", "a 1/2 cup of ISO 9001 milk, 35 mm film", "a 1/2 cup of ISO 9001 milk, 35 mm film"),
    ("strip_boilerplate", "a red barn stock photo", "a red barn  "),
    ("strip_boilerplate", "Royalty-Free Stock Photography: a barn, by Getty Images", " : a barn,  "),
    ("strip_boilerplate", "a barn | Flickr", "a barn |  "),
    ("strip_boilerplate", "a barn © 2014, all rights reserved", "a barn  ,  "),
    ("strip_boilerplate", "stock car race, a royalty visit, download speed", "stock car race, a royalty visit, download speed"),
    ("strip_sizes", "mountains 1920x1080 px, 300 dpi (2.4 MB)", "mountains  ,   ( )"),
    ("strip_sizes", "a 4x4 truck on 24x36 boards, 3 mp3 players", "a 4x4 truck on 24x36 boards, 3 mp3 players"),
    ("strip_dates", "the parade on 4 July 2012, 10:30 pm and 2012-07-05", "the parade  ,   and  "),
    ("strip_dates", "in May 2012 we may see 2012 cats of route 66, John 3:16", "  we may see 2012 cats of route 66, John 3:16"),
    ("tidy_punctuation", " | a cat ( ) , , on a mat - - ", "a cat, on a mat"),
    ("tidy_punctuation", "Who? It's a well-known cat, isn't it. (Yes!)", "Who? It's a well-known cat, isn't it. (Yes!)"),
    ("collapse_spaces", "\u00a0a \t\n cat\u3000\u2009on ", "a cat on"),
]


@pytest.mark.parametrize(("rule", "text", "expected"), EXAMPLES)
def test_each_rule_alone(rule: str, text: str, expected: str) -> None:
    once = CLEANING[rule].clean(text)
    assert once.split() == expected.split()
    assert clean_captions(pa.array([text, "a cat"]), only(rule)).changed == ({rule: 1} if text != expected else {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sunset over the bay | Nikon D750, f/8, ISO 100 | Flickr", "Sunset over the bay"),
        ("IMG_1234.JPG", ""),
        ("&lt;a href=&quot;http://x.example&quot;&gt;A quiet  lake&lt;/a&gt; stock photo 1920x1080", "A quiet lake"),
        ("A fox (DSC_0042), 12 March 2011", "A fox"),
        ("Ein Hund läuft über die Brücke", "Ein Hund läuft über die Brücke"),
    ],
)
def test_all_rules_together(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_a_rule_counts_the_rows_that_it_changed() -> None:
    captions = pa.array(["a cat &amp; a dog"] * 3 + ["a  cat", None, "a cat", "x" * 1001])
    cleaned = clean_captions(captions, CONFIG)
    assert cleaned.captions.to_pylist() == ["a cat & a dog"] * 3 + ["a cat", "", "a cat", "x" * 1000]
    assert cleaned.changed == {"max_characters": 1, "unescape_html": 3, "collapse_spaces": 1}
    assert cleaned.examples["unescape_html"] == (("a cat &amp; a dog", "a cat & a dog"),)
    assert clean_captions(pa.array([], pa.string()), CONFIG).captions.to_pylist() == []


@pytest.mark.parametrize(
    ("rule", "config", "dropped", "kept"),
    [
        ("empty", CONFIG, [""], ["a"]),
        ("too_short", CONFIG, ["", "a ca"], ["a cat", "chats"]),
        ("all_numbers", CONFIG, ["2012 - 05", "\U0001f600 100%"], ["2012 cats", "猫"]),
        ("wrong_script", CONFIG, ["красная лодка", "東京の夜 ok", "λόγος"], ["red лод", "Ångström", "12345", "naïve café"]),
        ("wrong_script", CaptionConfig(scripts=("Cyrillic", "Han")), ["a red boat"], ["красная лодка", "東京 ok", "42"]),
    ],
)
def test_what_is_dropped(rule: str, config: CaptionConfig, dropped: list[str], kept: list[str]) -> None:
    assert DROPPING[rule](pa.array(dropped + kept), config).to_pylist() == [True] * len(dropped) + [False] * len(kept)


def test_unknown_rules_and_scripts_are_refused() -> None:
    with pytest.raises(ValidationError, match="strip_everything"):
        CaptionConfig.model_validate({"rules": {"strip_everything": True}})
    with pytest.raises(ValidationError, match="scripts"):
        CaptionConfig.model_validate({"scripts": ["Klingon"]})


PIECES = """
& &amp; amp; &#x1D160; &#38;lt; &nbsp &#0; &#99999999999999999999; <b> </ > < http:// https://a.b/c) www. .com cats.com @ a@b.cd IMG _ 1234 .JPG
DSC00012 Canon EOS 5D II , f/2.8 f / 1/200s ISO 100 50mm stock photo royalty free Getty Images | Flickr © (c) 1920 x 1080 px × MB dpi
4 July 2012 2012-05-03 10:30 pm ( ) [ ] - – — · • / ; : ! ? . .. # é 猫 лод ſ K İ \u0958 \u0344 \U0001d160 \ufeff \ufffd \u200b \u200d
"""
SPACES = (" ", "  ", "\n", "\t", "\x00", "\x0b", "\x1c", "\u0085", "\u00a0", "\u2000", "\u3000", "e\u0301")
NASTY = st.lists(st.one_of(st.text(max_size=6), st.sampled_from(PIECES.split()), st.sampled_from(SPACES)), max_size=12).map("".join)


class TestAnyText:
    @settings(max_examples=400)
    @given(st.one_of(NASTY, st.text(max_size=60)))
    def test_cleaning_twice_is_cleaning_once(self, text: str) -> None:
        once = clean(text)
        assert clean(once) == once
        assert unicodedata.is_normalized("NFC", once)
        assert once == " ".join(once.split())

    @settings(max_examples=150)
    @given(st.lists(st.one_of(st.none(), NASTY), max_size=6), st.sets(st.sampled_from(sorted(CaptionRules.model_fields)), max_size=8))
    def test_triggers_and_batches_change_nothing(self, texts: list[str | None], off: set[str]) -> None:
        config = CaptionConfig(rules=CaptionRules(**dict.fromkeys(off, False)), max_characters=40)
        cleaned = clean_captions(pa.array(texts, pa.string()), config)
        assert cleaned.captions.to_pylist() == [reference(text or "", config) for text in texts]
        for rule in DROPPING.values():
            assert rule(cleaned.captions, config).null_count == 0

    @settings(max_examples=300)
    @given(st.one_of(NASTY, st.text(max_size=40)), st.sampled_from(sorted(CLEANING)))
    def test_no_rule_acts_without_its_trigger(self, text: str, rule: str) -> None:
        reached = clean_captions(pa.array([text]), only(rule)).captions[0].as_py()
        assert reached == reference(text, only(rule))

    @given(st.text(st.characters(codec=None), max_size=30))
    def test_lone_surrogates_are_stripped(self, text: str) -> None:
        assert clean(reference(text)) == reference(text)

    @pytest.mark.parametrize("piece", ["&amp;", "&", "a.", "-", " -", "(", "<a ", "1/", "1-", "Canon ", "x" * 60 + ".", "a-", "on "])
    def test_long_rubbish_takes_no_time(self, piece: str) -> None:
        text = piece * 20_000
        assert clean(text) == reference(text)
