"""A bad text in every prompt of an item would mislead rankings; a good text rejected costs a GPU pass."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlrank.generation.quality import problem

QUESTION = "Urban Mug: An urban mug by Fenna for every day.\nSummarise this product for a recommender in one sentence."


@pytest.mark.parametrize(
    "text",
    [
        "A red ceramic mug with a white handle.",
        "Red mug.",
        "A blue striped cushion, made of cotton, for people who like a calm living room.",
        "An urban mug by Fenna, in red, for people who drink coffee every day and like plain things.",
        "A 12-piece set of stainless steel spoons, spoons, forks and knives; dishwasher safe.",
        "Café crème mug with a naïve drawing of the Eiffel Tower.",
    ],
)
def test_what_a_person_would_accept_passes(text: str) -> None:
    assert problem(text, question=QUESTION) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" . ", "empty"),
        ("12345 67", "empty"),
        ("I'm sorry, but I cannot see any image.", "refusal"),
        ("I’m unable to view the picture.", "refusal"),
        ("As an AI language model I have no eyes.", "refusal"),
        ("I can't describe this product.", "refusal"),
        ("There is no image attached.", "refusal"),
        ("The red mug is red, the red mug is red, the red mug is red.", "repetition"),
        ("a a a a a a a a a a a a", "repetition"),
        ("Mug!!!!!!!!!!!!!!!!!!!!!!!!!", "repetition"),
        ("Summarise this product for a recommender in one sentence.", "copy"),
        ("Urban Mug: An urban mug by Fenna for every day.", "copy"),
        ("这是一个红色的陶瓷杯子。", "wrong_language"),
        ("Eine rote Tasse mit weißem Henkel, die für das Büro ist und nicht bricht.", "wrong_language"),
        ("Una taza roja con asa blanca para los amantes del café y para la oficina.", "wrong_language"),
    ],
)
def test_what_nobody_would_want_is_named(text: str, reason: str) -> None:
    assert problem(text, question=QUESTION) == reason


def test_a_text_that_hit_the_token_limit_is_truncated() -> None:
    assert problem("A red ceramic mug with a", question=QUESTION, cut_off=True) == "truncated"


def test_any_language_can_be_allowed() -> None:
    assert problem("这是一个红色的陶瓷杯子。", question=QUESTION, language="any") is None


@pytest.mark.parametrize(
    "phrase",
    [
        "红色陶瓷杯",
        "这是一个红色的陶瓷杯子，适合每天早上喝咖啡",
        "赤いマグカップ",
        "毎朝のコーヒーにぴったりの赤いマグカップです",
        "แก้วสีแดง",
        "แก้วเซรามิกสีแดงสำหรับดื่มกาแฟทุกเช้า",
    ],
)
@pytest.mark.parametrize("between", ["", " ", "，", "。", "\n", "1"])
def test_a_phrase_without_blanks_between_its_words_is_a_repetition_too(phrase: str, between: str) -> None:
    assert problem(phrase, question=QUESTION, language="any") is None
    assert problem(between.join([phrase] * 6), question=QUESTION, language="any") == "repetition"
    assert problem(f"{phrase}x{between.join([phrase] * 6)}", question=QUESTION, language="any") == "repetition"


@pytest.mark.parametrize(
    "text",
    [
        "这款红色陶瓷马克杯配有白色手柄，容量三百毫升，适合喜欢在办公室喝咖啡的人。红色陶瓷易于清洗，也可放入微波炉。",
        "白い取っ手の付いた赤い陶器のマグカップです。容量は三百ミリリットルで、オフィスでコーヒーを飲む人に向いています。"
        "マグカップは電子レンジでも使えます。",
        "แก้วมัคเซรามิกสีแดงพร้อมหูจับสีขาว ความจุสามร้อยมิลลิลิตร เหมาะสำหรับคนที่ชอบดื่มกาแฟในที่ทำงาน ทำความสะอาดง่าย",
    ],
)
def test_good_texts_of_such_languages_pass(text: str) -> None:
    assert problem(text, question=QUESTION, language="any") is None


@given(st.text(max_size=200), st.text(max_size=200), st.booleans())
def test_no_text_breaks_the_gate(text: str, question: str, cut_off: bool) -> None:
    """Models say anything; an exception would send a whole batch into quarantine."""
    reason = problem(text, question=question, cut_off=cut_off)
    assert reason is None or reason in {"empty", "refusal", "repetition", "copy", "wrong_language", "truncated"}
