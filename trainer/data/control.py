"""Control tokens: the names of special tokens (`<|im_end|>`, `</s>`) inside the text of the data are text.

What a chat template writes are control tokens; what a user wrote is no command to the model. So names inside of data
are hidden while a template is rendered, and what is rendered is read by a copy of the tokenizer whose special tokens
have other names, of the same length: then all offsets stay what they are.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from tokenizers import Tokenizer

from trainer.data.files import RowError
from trainer.data.offsets import IdList, IdsAndOffsets, Offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private characters that no text has: in place of a name in the data, and of a special token of the template.
_IN_DATA, _IN_TEMPLATE, _FILLER = 0xF0000, 0xF8000, "\U0010fffd"

NamePattern = re.Pattern[str]  # what matches names of special tokens


class ControlTokens:
    """The special tokens of a tokenizer, and a way to read text in which their names are only text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        names = _special_token_ids(tokenizer)
        self._names = names
        longest_first = sorted(names, key=len, reverse=True)
        escaped = map(re.escape, longest_first)
        self._name = _any_of(escaped)
        self._renamed = _stand_ins(names, _IN_TEMPLATE)
        hidden_names = _stand_ins(names, _IN_DATA)
        self._hidden = hidden_names
        self._hidden_name = _any_of(hidden_names.values())
        self._shown: dict[str, str] = {}
        for name, hidden in hidden_names.items():
            self._shown[hidden] = name
        # An unknown character is read as `<unk>`, which is no command.
        commands = set(names.values())
        commands.discard(tokenizer.unk_token_id)
        self._commands = commands
        self._backend = tokenizer.backend_tokenizer
        self._copy: Tokenizer | None = None
        self._original: dict[int | None, int] = {}

    @property
    def commands(self) -> set[int]:
        """The ids of the special tokens, but for the one of unknown characters."""
        return self._commands

    def first(self, text: str) -> str | None:
        """The first name of a special token in a text."""
        name = self._name.search(text)
        if name is None:
            return None
        return name[0]

    def has_stand_in(self, text: str) -> bool:
        """Whether a text has a character that stands for a name where names are hidden."""
        largest = max(text, default="")
        return largest >= chr(_IN_DATA)

    def hide(self, text: str) -> str:
        """A text of the data with other characters in place of each name."""
        hidden = self._hidden
        return _replaced(self._name, hidden, text)

    def read(self, text: str, *, add_special_tokens: bool, where: str) -> IdsAndOffsets:
        """Ids and offsets of a text with hidden names, which are read as text; all other names are special tokens.

        Raises RowError for a tokenizer that cannot tell them apart.
        """
        if self._copy is None:
            self._copy = self._renaming_copy()
        renamed = _replaced(self._name, self._renamed, text)
        shown = _replaced(self._hidden_name, self._shown, renamed)
        encoding = self._encoded(shown, add_special_tokens, where)
        offsets = encoding.offsets
        ids = []
        for id_of_copy in encoding.ids:
            id_ = self._original.get(id_of_copy, id_of_copy)
            ids.append(id_)
        allowed = self._renamed.values()
        self.check(ids, offsets, shown, where, allowed)
        return ids, offsets

    def check(
        self, ids: IdList, offsets: Offsets, text: str, where: str, allowed: Iterable[str] | None = None
    ) -> None:
        """Raise RowError where a text of the data was read as a control token, or one of a template as text.

        `allowed` are the names by which a text has its own control tokens; all names unless said otherwise.
        """
        names = set(self._names)
        if allowed is not None:
            names = set(allowed)
        commands = 0
        read = zip(ids, offsets, strict=True)
        for id_, (start, stop) in read:
            if start >= stop:
                continue
            if id_ not in self._commands:
                continue
            commands += 1
            name = text[start:stop].strip()
            if name not in names:
                self._refuse(name, where)
        if allowed is None:
            return
        written = 0
        for name in names:
            written += text.count(name)
        if commands != written:
            self._refuse("control tokens beside their names", where)

    def _refuse(self, name: str, where: str) -> NoReturn:
        fix = "leave it out, or say data.parse_special: true"
        problem = f"this tokenizer has no way to write {name!r} as text"
        raise RowError(f"{where}: {problem}: {fix}")

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
        written = self._backend.to_str()
        description = json.loads(written)
        for token in description["added_tokens"]:
            name = token["content"]
            if name in self._renamed:
                token["content"] = self._renamed[name]
        changed = json.dumps(description)
        copy = Tokenizer.from_str(changed)
        copy.no_truncation()
        copy.no_padding()
        self._original = {}
        for name, id_ in self._names.items():
            renamed = self._renamed[name]
            id_of_copy = copy.token_to_id(renamed)
            self._original[id_of_copy] = id_
        return copy


def _special_token_ids(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """The names of the special tokens, with their ids, by which they are ordered."""
    special = {}
    added = sorted(tokenizer.added_tokens_decoder.items())
    for id_, token in added:
        if token.special:
            name = token.content
            special[name] = id_
    return special


def _any_of(patterns: Iterable[str]) -> NamePattern:
    """What matches where one of some patterns does; nowhere where there are none."""
    alternatives = "|".join(patterns)
    return re.compile(alternatives or r"(?!)")


def _stand_ins(names: Iterable[str], first: int) -> dict[str, str]:
    """For each name a text as long as it is, which begins with a character of its own, counted from `first`."""
    stand_ins = {}
    for character, name in enumerate(names, first):
        beginning = chr(character)
        following = len(name) - 1
        filler = _FILLER * following
        stand_ins[name] = beginning + filler
    return stand_ins


def _replaced(pattern: NamePattern, replacements: Mapping[str, str], text: str) -> str:
    """A text with the replacement of each match of a pattern in its place."""

    def replacement(match: re.Match[str]) -> str:
        matched = match[0]
        return replacements[matched]

    return pattern.sub(replacement, text)
