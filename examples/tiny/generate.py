"""Make the data of the tiny base and of its downstream tasks, and its tokenizer, from a seed alone.

python examples/tiny/generate.py rows mixture OUT_DIR --train 200000 --eval 500
python examples/tiny/generate.py rows record OUT_DIR
python examples/tiny/generate.py tokenizer FOLDER

A row is held out when the checksum of its prompt says so: training and held-out rows never share a prompt, whatever
the seeds and the numbers of rows.
"""

import argparse
import json
import random
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CATEGORIES = {
    kind: words.split()
    for kind, words in {
        "animal": "dog cat horse bird fish mouse cow sheep bear wolf fox goat",
        "food": "bread milk apple soup rice cheese egg cake honey plum corn salt",
        "tool": "hammer rope knife lamp brush key spade needle ladder bucket saw pen",
        "colour": "red blue green yellow black white brown grey pink gold",
        "cloth": "coat hat shirt shoe scarf glove belt sock dress boot",
    }.items()
}
NAMES, PLACES, OPPOSITES = (
    words.split()
    for words in (
        "anna ben cora dan emma finn gina hugo iris jack kate leo mia nick olga paul rosa sam tina viktor",
        "park house garden school market kitchen river forest tower bridge station library harbour field",
        "hot-cold big-small fast-slow old-new long-short hard-soft light-dark wet-dry "
        "high-low loud-quiet early-late full-empty rich-poor strong-weak open-closed near-far",
    )
)
COLOURS = CATEGORIES["colour"]
THINGS = [word for kind, words in CATEGORIES.items() for word in words if kind != "colour"]
COUNTED = [word for word in CATEGORIES["tool"] + CATEGORIES["cloth"] if word[-1] not in "fhs" and word != "knife"]
WORDS = [word for words in CATEGORIES.values() for word in words]
# The words of the downstream tasks are known as words, so that tuning need not make them from nothing.
TASK_WORDS = "record place name thing | swap only".split()  # noqa: SIM905
ALL_WORDS = WORDS + NAMES + PLACES + TASK_WORDS

Row = dict[str, str]
Fact = tuple[str, str, str, str]
Skill = Callable[[random.Random], tuple[str, str]]
SPECIAL = {"pad_token": "<|pad|>", "eos_token": "<|end|>"}
VOCABULARY = 768
HELD_OUT_ONE_IN = 16
# A turn reads like a prompt or a completion of the training rows, so that the base answers chats too.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ ' ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def _some(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample(ALL_WORDS, rng.randint(low, high))


def copy(rng: random.Random) -> tuple[str, str]:
    words = " ".join(_some(rng, 2, 8))
    return f"copy {words} ->", words


def reverse(rng: random.Random) -> tuple[str, str]:
    words = _some(rng, 2, 6)
    return f"reverse {' '.join(words)} ->", " ".join(reversed(words))


def pick(rng: random.Random) -> tuple[str, str]:
    """The first, the last, or the one after another."""
    words = _some(rng, 3, 8)
    at = rng.randrange(1, len(words))
    question, answer = rng.choice([("first", words[0]), ("last", words[-1]), (f"after {words[at - 1]}", words[at])])
    return f"{' '.join(words)}. {question}?", answer


def count(rng: random.Random) -> tuple[str, str]:
    words = _some(rng, 1, 8)
    return f"how many words? {' '.join(words)} ->", str(len(words))


def member(rng: random.Random) -> tuple[str, str]:
    words = _some(rng, 2, 7)
    word = rng.choice(words if rng.random() < 0.5 else ALL_WORDS)
    return f"{' '.join(words)}. is {word} there?", "yes" if word in words else "no"


def category(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(1, 5))
    kinds = [next(kind for kind, members in CATEGORIES.items() if word in members) for word in words]
    return f"kinds of {' '.join(words)} ->", " ".join(kinds)


def opposite(rng: random.Random) -> tuple[str, str]:
    pairs = [rng.sample(pair.split("-"), 2) for pair in rng.sample(OPPOSITES, rng.randint(1, 4))]
    return f"opposite of {' '.join(a for a, _ in pairs)} ->", " ".join(b for _, b in pairs)


def arithmetic(rng: random.Random) -> tuple[str, str]:
    a, b = sorted((rng.randint(0, 20), rng.randint(0, 20)), reverse=True)
    return rng.choice([(f"{a} + {b} =", str(a + b)), (f"{b} + {a} =", str(a + b)), (f"{a} - {b} =", str(a - b))])


def sort(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(21), rng.randint(2, 5))
    return f"sort {' '.join(map(str, numbers))} ->", " ".join(map(str, sorted(numbers)))


def ring(rng: random.Random) -> tuple[str, str]:
    """Once around a circle of words, from any of them: each step is a look for the last word in the prompt."""
    words = _some(rng, 3, 8)
    at = rng.randrange(len(words))
    around = words[at:] + words[:at]
    return f"ring {' '.join([*words, words[0]])}. from {around[0]} ->", " ".join(around[1:])


def lookup(rng: random.Random) -> tuple[str, str]:
    """The numbers of some words, in the order in which they are asked for, each after its word."""
    keys = _some(rng, 1, 6)
    values = {key: str(rng.randint(0, 20)) for key in keys}
    asked = rng.sample(keys, rng.randint(1, len(keys)))
    told = ", ".join(f"{key} {value}" for key, value in values.items())
    return f"{told}. {' '.join(asked)} ->", " ".join(f"{key} {values[key]}" for key in asked)


def plural(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(COUNTED, 2)
    numbers = [rng.randint(2, 20) for _ in words]
    asked = ", ".join(f"{n} x {word}" for n, word in zip(numbers, words, strict=True))
    return f"{asked} ->", " and ".join(f"{n} {word}s" for n, word in zip(numbers, words, strict=True))


def _facts(rng: random.Random, people: int) -> list[Fact]:
    """Who has what, is where and likes which colour; nothing occurs twice."""
    columns = [rng.sample(words, people) for words in (NAMES, THINGS, PLACES, COLOURS)]
    return list(zip(*columns, strict=True))


def _told(fact: Fact) -> list[str]:
    name, thing, place, colour = fact
    return [f"{name} has the {thing}.", f"{name} is at the {place}.", f"{name} likes {colour}."]


def _shuffled(rng: random.Random, sentences: list[str]) -> str:
    return " ".join(rng.sample(sentences, len(sentences)))


def story(rng: random.Random) -> tuple[str, str]:
    """One fact of each of several people, and a question about one of them."""
    facts = _facts(rng, rng.randint(2, 5))
    told = [(fact[0], rng.choice(_told(fact))) for fact in facts]
    name, sentence = rng.choice(told)
    question, answer = rng.choice(
        [(f"what of {name}?", sentence), (f"who{sentence.removeprefix(name).rstrip('.')}?", name)]
    )
    return f"{' '.join(sentence for _, sentence in told)} {question}", answer


def retell(rng: random.Random) -> tuple[str, str]:
    """The facts of one person, put in order."""
    told = _told(*_facts(rng, 1))
    return f"{_shuffled(rng, told)} retell:", " ".join(told)


def record(rng: random.Random) -> tuple[str, str]:
    """New format: the facts of a person as a record, whose fields have an order of their own."""
    [fact] = _facts(rng, 1)
    name, thing, place, colour = fact
    fields = f"place {place} | colour {colour} | name {name} | thing {thing}"
    return f"{_shuffled(rng, _told(fact))} record:", fields


def swap(rng: random.Random) -> tuple[str, str]:
    """New rule: the first and the last word change places."""
    words = _some(rng, 3, 6)
    return f"swap {' '.join(words)} ->", " ".join([words[-1], *words[1:-1], words[0]])


def only(rng: random.Random) -> tuple[str, str]:
    """New rule: keep the words of one kind."""
    kind = rng.choice(sorted(CATEGORIES))
    kept = rng.sample(CATEGORIES[kind], rng.randint(2, 3))
    words = kept + rng.sample([word for word in WORDS if word not in CATEGORIES[kind]], rng.randint(1, 3))
    rng.shuffle(words)
    return f"only {kind}: {' '.join(words)} ->", " ".join(word for word in words if word in kept)


SKILLS: tuple[Skill, ...] = (
    copy, reverse, pick, count, member, category, opposite, arithmetic, sort, plural,
    ring, ring, ring, ring, lookup, lookup, story, story, retell,
)  # fmt: skip
TASKS: dict[str, Skill] = {"record": record, "swap": swap, "only": only}


def mixture(rng: random.Random) -> tuple[str, str]:
    return rng.choice(SKILLS)(rng)


SOURCES: dict[str, Skill] = {"mixture": mixture, **TASKS}


def held_out(prompt: str) -> bool:
    return zlib.crc32(prompt.encode()) % HELD_OUT_ONE_IN == 0


def rows(source: str, seed: int, held: bool) -> Iterator[Row]:
    """Rows without end; the completion begins with a space, as its first word does in running text."""
    rng = random.Random(f"{source} {seed}")
    while True:
        prompt, completion = SOURCES[source](rng)
        if held_out(prompt) == held:
            yield {"prompt": prompt, "completion": f" {completion}"}


def write_rows(source: str, folder: Path, seed: int, train: int, evaluation: int) -> None:
    """Write FOLDER/<source>-train.jsonl and FOLDER/<source>-eval.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, number, held in (("train", train, False), ("eval", evaluation, True)):
        with (folder / f"{source}-{name}.jsonl").open("w") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in islice(rows(source, seed, held), number))


def tokenizer() -> "Tokenizer":
    """A byte-level BPE that knows every word of the tiny language as one token, and any other text byte by byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (row["prompt"] + row["completion"] for row in islice(rows("mixture", 0, False), 20000))
    made.train_from_iterator(texts, trainer)
    return made


def write_tokenizer(folder: Path) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("rows", help="write <source>-train.jsonl and <source>-eval.jsonl")
    data.add_argument("source", choices=SOURCES)
    data.add_argument("folder", type=Path)
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("--train", type=int, default=8000, help="number of training rows")
    data.add_argument("--eval", type=int, default=100, help="number of held-out rows")
    words = commands.add_parser("tokenizer", help="write tokenizer.json and tokenizer_config.json")
    words.add_argument("folder", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if arguments.command == "rows":
        write_rows(arguments.source, arguments.folder, arguments.seed, arguments.train, arguments.eval)
    else:
        write_tokenizer(arguments.folder)


if __name__ == "__main__":
    main()
