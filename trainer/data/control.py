"""Control tokens: the names of special tokens (`<|im_end|>`, `</s>`) inside the text of the data are text.

What a chat template writes are control tokens; what a user wrote is no command to the model. So names inside of data
are hidden while a template is rendered, and what is rendered is read by a copy of the tokenizer whose special tokens
have other names, of the same length: then all offsets stay what they are.
"""

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

from tokenizers import Tokenizer

from trainer.data.files import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private characters that no text has: in place of a name in the data, and of a special token of the template.
_IN_DATA, _IN_TEMPLATE, _FILLER = 0xF0000, 0xF8000, "\U0010fffd"

Read = tuple[list[int], list[tuple[int, int]]]  # ids, and of each the characters [start, stop) that it stands for


class ControlTokens:
    """The special tokens of a tokenizer, and a way to read text in which their names are only text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._names = {
            token.content: id_ for id_, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special
        }
        longest_first = sorted(self._names, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._hidden = {name: _stand_in(_IN_DATA + i, name) for i, name in enumerate(self._names)}
        self._renamed = {name: _stand_in(_IN_TEMPLATE + i, name) for i, name in enumerate(self._names)}
        self._shown = {hidden: name for name, hidden in self._hidden.items()}
        self._placeholder = re.compile("|".join(self._hidden.values()) or r"(?!)")
        # An unknown character is read as `<unk>`, which is no command.
        self._commands = set(self._names.values()) - {tokenizer.unk_token_id}
        self._backend = tokenizer.backend_tokenizer
        self._copy: Tokenizer | None = None
        self._original: dict[int | None, int] = {}

    @property
    def commands(self) -> set[int]:
        """The ids of the special tokens, but for the one of unknown characters."""
        return self._commands

    def first(self, text: str) -> str | None:
        """The first name of a special token in a text."""
        found = self._any.search(text)
        return found[0] if found else None

    def has_stand_in(self, text: str) -> bool:
        """Whether a text has a character that stands for a name where names are hidden."""
        return any(ord(character) >= _IN_DATA for character in text)

    def hide(self, text: str) -> str:
        """A text of the data with other characters in place of each name."""
        return self._any.sub(lambda name: self._hidden[name[0]], text)

    def read(self, text: str, *, add_special_tokens: bool, where: str) -> Read:
        """Ids and offsets of a text with hidden names, which are read as text; all other names are special tokens.

        Raises RowError for a tokenizer that cannot tell them apart.
        """
        if self._copy is None:
            self._copy = self._renaming_copy()
        renamed = self._any.sub(lambda name: self._renamed[name[0]], text)
        shown = self._placeholder.sub(lambda hidden: self._shown[hidden[0]], renamed)
        encoding = self._encoded(shown, add_special_tokens, where)
        ids = [self._original.get(id_, id_) for id_ in encoding.ids]
        self.check(ids, encoding.offsets, shown, where, self._renamed.values())
        return ids, encoding.offsets

    def check(
        self,
        ids: list[int],
        offsets: list[tuple[int, int]],
        text: str,
        where: str,
        allowed: Iterable[str] | None = None,
    ) -> None:
        """Raise RowError where a text of the data was read as a control token, or one of a template as text.

        `allowed` are the names by which a text has its own control tokens; all names unless said otherwise.
        """
        names = set(self._names if allowed is None else allowed)
        found = 0
        for id_, (start, stop) in zip(ids, offsets, strict=True):
            if start < stop and id_ in self._commands:
                found += 1
                if text[start:stop].strip() not in names:
                    self._refuse(text[start:stop].strip(), where)
        if allowed is not None and found != sum(text.count(name) for name in names):
            self._refuse("control tokens beside their names", where)

    def _refuse(self, name: str, where: str) -> NoReturn:
        mend = "leave it out, or say data.parse_special: true"
        raise RowError(f"{where}: this tokenizer has no way to write {name!r} as text: {mend}")

    def _encoded(self, text: str, add_special_tokens: bool, where: str) -> Any:
        assert self._copy is not None
        try:
            return self._copy.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust, which is no Exception
                raise
            raise RowError(f"{where}: the tokenizer fails on this text: {error}") from None

    def _renaming_copy(self) -> Tokenizer:
        """The tokenizer with other names for its special tokens; their ids are kept in `_original`."""
        described = json.loads(self._backend.to_str())
        for token in described["added_tokens"]:
            if token["content"] in self._renamed:
                token["content"] = self._renamed[token["content"]]
        copy = Tokenizer.from_str(json.dumps(described))
        copy.no_truncation()
        copy.no_padding()
        self._original = {copy.token_to_id(self._renamed[name]): id_ for name, id_ in self._names.items()}
        return copy


def _stand_in(character: int, name: str) -> str:
    return chr(character) + _FILLER * (len(name) - 1)
