"""Between text and tokens: prompts in, answers out chunk by chunk."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serving.gateway.refusal import invalid

CONTEXT_TOKENS = 6  # of the prompt, with which an answer's first chunk is read: alone some begin without their space
PATIENCE = 8  # tokens after which bytes that make no character are given as they are
REPLACEMENT = "\ufffd"
Turns = list[dict[str, Any]]


class Codec:
    """A base's tokenizer, twice: one encodes in a thread of its own, one decodes; neither waits for the other."""

    def __init__(self, folder: str | Path) -> None:
        """Read the tokenizer of a base."""
        from transformers import AutoTokenizer

        self._encoder: Any = AutoTokenizer.from_pretrained(folder)
        self._decoder: Any = AutoTokenizer.from_pretrained(folder)
        self._thread = ThreadPoolExecutor(1, "encoder")
        self.ends: tuple[int, ...] = ()
        if self._encoder.eos_token_id is not None:
            self.ends = (self._encoder.eos_token_id,)

    async def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a prompt."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._encode, text, True)

    async def encode_chat(self, messages: Turns) -> tuple[int, ...]:
        """The tokens of a chat, up to where the answer begins; raises ApiRefusal."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._encode_chat, messages)

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self._decoder.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        bos = self._encoder.bos_token
        if bos and text.startswith(bos):
            special = False
        ids = self._encoder.encode(text, add_special_tokens=special)
        return tuple(ids)

    def _encode_chat(self, messages: Turns) -> tuple[int, ...]:
        if not self._encoder.chat_template:
            raise invalid("messages: this base has no chat template; allowed: /v1/completions")
        try:
            text = self._encoder.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template can raise whatever Python's operators do
            raise invalid(f"messages: the chat template refuses them: {error}") from error
        return self._encode(text, False)


class Detokenizer:
    """Turns tokens into text as they come, whole characters only."""

    def __init__(self, codec: Codec, prompt: tuple[int, ...]) -> None:
        """Begin behind a prompt."""
        self._codec = codec
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._first = 0  # of the tokens that the next chunk is read with
        self._read = len(self._ids)  # tokens whose text was given

    def push(self, tokens: list[int], last: bool = False) -> str:
        """The text that has become sure with these tokens; with the last ones, all that is left."""
        decode = self._codec.decode
        self._ids += tokens
        pending = len(self._ids) - self._read
        known = decode(self._ids[self._first : self._read])
        text = decode(self._ids[self._first :])
        incomplete = text.endswith(REPLACEMENT) and pending < PATIENCE
        if incomplete and not last:
            return ""
        self._first = self._read
        self._read = len(self._ids)
        return text[len(known) :]


class StopFilter:
    """Lets text through up to the first of some strings; what may be the beginning of one waits."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, chunk: str, last: bool = False) -> str:
        """The text that can be given now; with the last chunk, all that is left."""
        text = self._held + chunk
        self._held = ""
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        if last:
            return text
        kept = self._beginning(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _beginning(self, text: str) -> int:
        """The length of the longest end of a text that one of the strings begins with."""
        longest = 0
        for stop in self._stops:
            most = min(len(stop) - 1, len(text))
            for length in range(most, longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
