"""Which tokens end an answer."""

from types import SimpleNamespace

from trainer.end_tokens import end_tokens, until_end


def test_every_end_that_anybody_names_counts() -> None:
    tokenizer = SimpleNamespace(eos_token_id=7)
    assert end_tokens(tokenizer) == (7,)
    assert end_tokens(tokenizer, {"eos_token_id": 2}, {"eos_token_id": [9, 2]}) == (2, 7, 9)
    assert end_tokens(tokenizer, {"eos_token_id": None}, {}, {"text_config": {"eos_token_id": [1, 106]}}) == (
        1,
        7,
        106,
    )
    assert end_tokens(tokenizer, {"eos_token_id": 0, "text_config": None}) == (0, 7)
    assert end_tokens(SimpleNamespace(eos_token_id=None), {"eos_token_id": 3}) == (3,)


def test_an_answer_ends_before_its_first_end() -> None:
    assert until_end([5, 6, 2, 5, 7], (2, 7)) == [5, 6]
    assert until_end([5, 6], (2,)) == [5, 6]
    assert until_end([7, 5], (2, 7)) == []
