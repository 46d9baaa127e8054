"""Translations: locales/<language>, which the frontend merges, and the help pages beside them.

English is in the nodes' schemas alone: the frontend shows it wherever a language has no text.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_api.latest import io
from retrieval_pack.nodes import RetrievalExtension

PACK = Path(__file__).resolve().parents[2]
LOCALES, DOCS = PACK / "locales", PACK / "web" / "docs"
SCHEMAS = [node.GET_SCHEMA() for node in asyncio.run(RetrievalExtension().get_node_list())]
# Language -> the letters that it is written in.
LETTERS = {
    "ja": re.compile("[\u3040-\u30ff\u4e00-\u9fff]"),
    "ko": re.compile("[\uac00-\ud7af]"),
    "zh": re.compile("[\u4e00-\u9fff]"),
}
# Names of things that these languages write as English does.
SAME = {"clip", "vae", "latent", "retrieval controlnet"}
languages = pytest.mark.parametrize("language", LETTERS)


def read_locale(language: str, name: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def flatten(texts: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and text of every leaf."""
    for key, value in texts.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def list_english() -> Iterator[tuple[str, str]]:
    """Key in nodeDefs.json and English text of all that a node shows."""
    for schema in SCHEMAS:
        yield f"{schema.node_id}.display_name", schema.display_name
        yield f"{schema.node_id}.description", schema.description
        slots = [(f"inputs.{key}", given) for key, given in list_inputs(schema)]
        slots += [(f"outputs.{index}", made) for index, made in enumerate(schema.outputs)]
        for slot, shown in slots:
            yield f"{schema.node_id}.{slot}.name", shown.display_name or shown.id
            if shown.tooltip:
                yield f"{schema.node_id}.{slot}.tooltip", shown.tooltip


def list_inputs(schema: io.Schema) -> Iterator[tuple[str, io.Input]]:
    """Inputs by their keys; the frontend writes a choice's field `network.file` network_file."""
    for given in schema.inputs:
        yield given.id, given
        if isinstance(given, io.DynamicCombo.Input):
            for choice in given.options:
                for field in choice.inputs:
                    yield f"{given.id}_{field.id}", field


ENGLISH = dict(list_english())


def test_these_are_all_languages():
    assert {folder.name for folder in LOCALES.iterdir()} == set(LETTERS)


@languages
def test_every_text_of_the_nodes_is_translated_and_no_other(language):
    assert set(dict(flatten(read_locale(language, "nodeDefs")))) == set(ENGLISH)


@languages
def test_categories_are_translated(language):
    categories = {part for schema in SCHEMAS for part in schema.category.split("/")}
    translated = read_locale(language, "main")["nodeCategories"]
    assert translated.keys() == categories
    assert all(LETTERS[language].search(name) for name in translated.values())


@languages
def test_texts_are_in_the_language_and_not_english(language):
    english = [
        (key, text)
        for key, text in flatten(read_locale(language, "nodeDefs"))
        if text.casefold() not in SAME and not LETTERS[language].search(text)
    ]
    assert not english


@languages
def test_translations_name_the_folders_and_repositories_of_the_english_text(language):
    """`models/VQA` or `facebook/sam-vit-base` is a name, and whoever renames it must see these."""
    translated = dict(flatten(read_locale(language, "nodeDefs")))
    missing = [
        (key, name)
        for key, text in ENGLISH.items()
        for name in re.findall(r"[\w-]+/[\w/.-]*\w", text)
        if name not in translated[key]
    ]
    assert not missing


@languages
def test_texts_have_no_character_that_the_frontend_would_interpret(language):
    """vue-i18n reads {name} as a value to fill in, @:key as another text and | as a plural."""
    texts = dict(flatten(read_locale(language, "nodeDefs")))
    assert not [key for key, text in texts.items() if re.search("[{}@|]", text)]


@languages
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.node_id)
def test_the_help_page_has_the_parts_of_the_english_one_and_the_nodes_name(language, schema):
    page = (DOCS / schema.node_id / f"{language}.md").read_text(encoding="utf-8")
    english = (DOCS / f"{schema.node_id}.md").read_text(encoding="utf-8")
    assert list_parts(page) == list_parts(english)
    name = read_locale(language, "nodeDefs")[schema.node_id]["display_name"]
    # What is in brackets stands behind the English name in the heading.
    name = re.split(" ?[(\uff08]", name)[0]
    assert page.startswith(f"# {name} (")


def list_parts(page: str) -> dict[str, list[str]]:
    """Levels of headings, names of the inputs and outputs in tables, and paths of pictures."""
    return {
        "headings": re.findall("^#+(?= )", page, re.MULTILINE),
        "named": re.findall(r"^\| (?:`([^`]+)`)?", page, re.MULTILINE),
        "pictures": re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page),
    }


def read_drawn() -> dict[str, dict[str, str]]:
    """Language -> key -> text of what web/retrieval.js draws on nodes."""
    script = (PACK / "web" / "retrieval.js").read_text(encoding="utf-8")
    table = script.partition("\nconst TEXTS = {\n")[2].partition("\n};")[0]
    blocks = re.findall(r"^  (\w+): {\n(.*?)^  },", table + "\n", re.DOTALL | re.MULTILINE)
    entry = re.compile(r'^    (\w+):((?:\s*"[^"]*"(?: \+)?)+),$', re.MULTILINE)
    return {
        language: {
            key: "".join(re.findall('"([^"]*)"', text)) for key, text in entry.findall(block)
        }
        for language, block in blocks
    }


@languages
def test_what_is_drawn_on_nodes_is_translated_with_its_values(language):
    drawn = read_drawn()
    english, translated = drawn["en"], drawn[language]
    script = (PACK / "web" / "retrieval.js").read_text(encoding="utf-8")
    assert translated.keys() == english.keys() >= set(re.findall(r'\bsay\("(\w+)"', script))
    assert all(f'"{key}"' in script for key in english)
    for key, text in translated.items():
        values = (sorted(re.findall(r"{\w+}", one)) for one in (text, english[key]))
        assert len({tuple(names) for names in values}) == 1, key
        assert key == "range" or LETTERS[language].search(text), key


def test_the_server_gives_the_frontend_all_translations(server):
    served = server.json("/i18n")
    for language in LETTERS:
        expected = {
            "nodeDefs": read_locale(language, "nodeDefs"),
            **read_locale(language, "main"),
        }
        assert served[language] == expected
