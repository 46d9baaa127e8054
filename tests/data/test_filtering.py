"""Filtering by tags (§3.1): the rules, their lists, and lists of a user's."""

from __future__ import annotations

import pytest
from refusal import sentence

from retrieval_core.data.filtering import (
    CLOTHING,
    LISTS,
    TRIVIAL,
    UNWANTED,
    Rules,
    find_rejection,
    load_rules,
    normalize_tag,
)

RULES = Rules(frozenset({"sketch"}), frozenset({"blue_dress"}))
ALICE = ["alice_(wonderland)"]


@pytest.mark.parametrize(
    ("tags", "characters", "reason"),
    [
        (["1girl", "blue_dress"], ALICE, None),
        (["1girl", "blue_dress", "sketch"], ALICE, "unwanted tag"),
        (["1girl", "blue_dress"], [], "no character tag"),
        (["1girl", "blue_dress"], [*ALICE, "bill_(wonderland)"], "several characters"),
        (["1girl", "shoes"], ALICE, "no clothing tag"),
        ([], ALICE, "no clothing tag"),
        (None, ALICE, None),  # a source without tags says nothing of clothes
        (None, [], "no character tag"),
    ],
)
def test_each_filter_of_the_paper_has_its_reason(tags, characters, reason):
    assert find_rejection(tags, characters, RULES) == reason


def test_the_packs_lists_hold_garments_and_not_shoes():
    rules = load_rules()
    assert {"white_shirt", "pleated_skirt", "serafuku", "red_bikini"} <= rules.clothing
    assert rules.clothing.isdisjoint({"black_footwear", "white_gloves", "hair_ribbon", "necklace"})
    assert {"monochrome", "sketch", "comic", "2girls"} <= rules.unwanted
    assert len(rules.clothing) > 1000  # the paper's were 1298
    assert rules.unwanted.isdisjoint(rules.clothing)


@pytest.mark.parametrize("name", [UNWANTED, CLOTHING, TRIVIAL])
def test_the_packs_lists_are_normalized_and_free_of_repetitions(name):
    lines = (LISTS / name).read_text(encoding="utf-8").splitlines()
    tags = [line for line in lines if line and not line.startswith("#")]
    assert tags == [normalize_tag(tag) for tag in tags]
    assert len(tags) == len(set(tags))


def test_trivial_tags_are_all_clothing_tags():
    texts = [(LISTS / name).read_text(encoding="utf-8") for name in (TRIVIAL, CLOTHING)]
    trivial, clothing = (
        {line for line in text.splitlines() if line and not line.startswith("#")} for text in texts
    )
    assert trivial < clothing


def test_a_users_list_replaces_the_packs_of_its_name_only(tmp_path):
    (tmp_path / UNWANTED).write_text("# mine\n\nBad Hands # never\nsmile\n#hash\n")
    rules = load_rules(tmp_path)
    assert rules.unwanted == {"bad_hands", "smile"}
    assert rules.clothing == load_rules().clothing
    (tmp_path / CLOTHING).write_text("dress\nshoes\n")
    (tmp_path / TRIVIAL).write_text("shoes\n")
    assert load_rules(tmp_path).clothing == {"dress"}


def test_a_folder_without_lists_or_an_unreadable_list_is_refused(tmp_path):
    assert "no list of tags" in sentence(load_rules, tmp_path)
    (tmp_path / TRIVIAL).write_bytes(b"\xff\xfe\x00")
    message = sentence(load_rules, tmp_path)
    assert TRIVIAL in message and "UTF-8" in message


@pytest.mark.parametrize(
    ("tag", "normalized"),
    [
        (" Blue Dress ", "blue_dress"),
        (r"star \(symbol\)", "star_(symbol)"),
        ("6+girls", "6+girls"),
    ],
)
def test_tags_of_captions_become_danboorus(tag, normalized):
    assert normalize_tag(tag) == normalized
