"""Tasks of EleutherAI's lm-evaluation-harness with many adapters at once, through its own interface of a model.

    results = evaluate_by_harness(engine, tokenizer, [None, "alice", "bob"], ["arc_easy", "gsm8k"], limit=100)

Each adapter is a model of its own to the harness, in a thread of its own; all of their requests meet in one engine.
It needs the package `lm_eval` (`pip install 'fleetune[harness]'`).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lm_eval.api.model import TemplateLM

from serving.engine import Engine
from serving.sequence import Request
from serving.shared import Asked, SharedEngine

NEW_TOKENS = 256  # of an answer, where a task does not say
HarnessScore = tuple[float, bool]  # a log-likelihood, and whether it is of the likeliest tokens
HarnessTask = Any  # a name, the path of a YAML file, a config as plain data, or a task of the harness


class HarnessModel(TemplateLM):  # type: ignore[misc]  # a package without types
    """One adapter, or the base, as the harness sees a model."""

    def __init__(self, shared: SharedEngine, adapter: str | None) -> None:
        super().__init__()
        self.shared = shared
        self.adapter = adapter
        self.tokenizer = shared.tokenizer
        virtual = 0
        if adapter is not None:
            virtual = shared.engine.pool.packed_of(adapter).adapter.virtual
        self.max_length = shared.engine.positions - virtual

    @property
    def tokenizer_name(self) -> str:
        """What requests are kept under, where the harness keeps them."""
        name = str(self.tokenizer.name_or_path)
        return name.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text that has nothing in front of it."""
        begin = self.tokenizer.bos_token_id
        if begin is None:
            return self.eot_token_id
        return int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A text as token ids; its own BOS, where a chat template has written one, is not doubled."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = begin is None or not string.startswith(begin)
        return list(self.shared.encode(string, add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns of a chat as the base's template writes them."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[HarnessScore]:
        """The log-likelihood of each continuation behind its context; what is too long loses its beginning."""
        asked = Asked([], [], [])
        for _texts, context, continuation in requests:
            whole = [*context, *continuation]
            ids = whole[1 - self.max_length :]
            start = len(ids) - len(continuation)
            self._add(asked, ids, max(1, start))
        results: list[HarnessScore] = []
        for sequence in self.shared.complete(asked):
            total = sum(sequence.scores)
            are_likeliest = all(sequence.are_likeliest)
            results.append((total, are_likeliest))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """The log-likelihood of whole texts, each token behind as many as there are positions for."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        asked = Asked([], [], [])
        counts: list[int] = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            pairs = list(map(make_disjoint_window, windows))
            counts.append(len(pairs))
            for context, continuation in pairs:
                self._add(asked, [*context, *continuation], len(context))
        sequences = iter(self.shared.complete(asked))
        totals: list[float] = []
        for count in counts:
            total = 0.0
            for _ in range(count):
                sequence = next(sequences)
                total += sum(sequence.scores)
            totals.append(total)
        return totals

    def _add(self, asked: Asked, ids: list[int], start: int) -> None:
        """Ask also for the log-likelihood of a text from a token on."""
        request = Request(tuple(ids), self.adapter, new_tokens=1)
        asked.requests.append(request)
        asked.starts.append(start)
        asked.stop_texts.append(())

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """What is written behind each prompt, up to the first of the texts that end it."""
        asked = Asked([], [], [])
        for request in requests:
            prompt, settings = request.args
            asked.requests.append(self._request(prompt, settings))
            asked.starts.append(None)
            asked.stop_texts.append(_until(settings))
        texts: list[str] = []
        for sequence, stop_texts in zip(self.shared.complete(asked), asked.stop_texts, strict=True):
            text = str(self.tokenizer.decode(sequence.answer, skip_special_tokens=True))
            for stop in stop_texts:
                text, _, _ = text.partition(stop)
            texts.append(text)
        return texts

    def _request(self, prompt: str, settings: dict[str, Any]) -> Request:
        """A prompt as the settings of a task want it gone on with; one that is too long loses its beginning."""
        wanted = settings.get("max_gen_toks") or settings.get("max_new_tokens") or NEW_TOKENS
        new_tokens = min(int(wanted), self.max_length // 2)
        room = self.max_length - new_tokens
        ids = self.tok_encode(prompt)
        prompt_ids = tuple(ids[-room:])
        temperature = 0.0
        if settings.get("do_sample"):
            temperature = float(settings.get("temperature", 1.0))
        end = (self.eot_token_id,)
        return Request(prompt_ids, self.adapter, new_tokens, end, temperature)


def _until(settings: dict[str, Any]) -> tuple[str, ...]:
    """The texts that end an answer."""
    until = settings.get("until") or ()
    if isinstance(until, str):
        return (until,)
    return tuple(text for text in until if text)


def evaluate_by_harness(
    engine: Engine,
    tokenizer: Any,
    adapters: Sequence[str | None],
    tasks: Sequence[HarnessTask],
    **settings: Any,
) -> dict[str | None, Any]:
    """What the harness says of each adapter that the engine has, and of the base (None); all are asked at once.

    `settings` are those of the harness's own `evaluate`: limit, apply_chat_template, ... Raises KeyError for a task
    that it does not know.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    shared = SharedEngine(engine, tokenizer)
    manager = TaskManager()
    task_dicts = [manager.load(list(tasks)) for _ in adapters]  # a task keeps its requests and answers

    def results(adapter: str | None, task_dict: Any) -> Any:
        model = HarnessModel(shared, adapter)
        return evaluate(lm=model, task_dict=task_dict, **settings)

    with shared.working(), ThreadPoolExecutor(len(adapters)) as threads:
        found = list(threads.map(results, adapters, task_dicts))
    return dict(zip(adapters, found, strict=True))
