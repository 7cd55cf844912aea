"""Tokenizers of the kinds that bases have, trained on the spot on a few lines."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "[CLS]", "[SEP]"]
LINES = [
    "Answer: yes no the red cat dog sorts four is a token hello 12 legs? many",
    "Question: how many legs has a dog?\nAnswer: a dog has 4 legs!",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z A Q S I 0 1 2 3 4 5 6 7 8 9 : ? ! . , / < > | _ [ ] \n",
] * 20
KINDS = (
    "byte level",
    "byte level, trimmed offsets",
    "metaspace always",
    "metaspace first",
    "metaspace never",
    "prepend",
    "byte fallback",
    "unigram",
    "wordpiece",
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content.strip() }} </s>"
    "{% else %}<s>[INST] {{ m.content.strip() }} [/INST]{% endif %}{% endfor %}"
)
# Gives its thoughts to the last answer alone, as Qwen3's does: an earlier turn is rewritten when a later one comes.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(
    kind: str, *, bos: bool = True, eos: bool = False, chat: str | None = None, end: str = "</s>"
) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind that adds BOS and EOS to a text, or does not."""
    core = _core(kind)
    _add_ends(core, bos=bos, eos=eos, trimmed=kind.endswith("trimmed offsets"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=end, unk_token="<unk>", chat_template=chat
    )


def _core(kind: str) -> Tokenizer:
    match kind.split(",")[0].split():
        case ["byte", "level"]:
            core = Tokenizer(models.BPE())
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            core.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            _train(core, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet))
        case ["metaspace", scheme]:
            core = _sentencepiece(scheme)
        case ["prepend"]:
            core = _llama(_sentencepiece("first"))
        case ["byte", "fallback"]:
            core = _llama(_sentencepiece("first", bytes_=[f"<0x{byte:02X}>" for byte in range(256)]))
        case ["unigram"]:
            core = Tokenizer(models.Unigram())
            core.pre_tokenizer = pre_tokenizers.Metaspace()
            core.decoder = decoders.Metaspace()
            _train(core, trainers.UnigramTrainer(vocab_size=160, special_tokens=SPECIAL, unk_token="<unk>"))
        case _:
            core = Tokenizer(models.WordPiece(unk_token="<unk>"))
            core.normalizer = normalizers.BertNormalizer(lowercase=False)
            core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            core.decoder = decoders.WordPiece()
            _train(core, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL))
    return core


def _train(core: Tokenizer, trainer: trainers.Trainer) -> None:
    trainer.show_progress = False
    core.train_from_iterator(LINES, trainer)


def _sentencepiece(scheme: str, bytes_: list[str] | None = None) -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=bool(bytes_), fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    _train(core, trainers.BpeTrainer(vocab_size=300 + len(bytes_ or ()), special_tokens=SPECIAL + (bytes_ or [])))
    described = json.loads(core.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(described))


def _llama(core: Tokenizer) -> Tokenizer:
    """The same vocabulary under the normaliser that Llama 2's files have: a space before each part of a text."""
    core.pre_tokenizer = None
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def _add_ends(core: Tokenizer, *, bos: bool, eos: bool, trimmed: bool) -> None:
    ends = [name for name, there in (("<s>", bos), ("</s>", eos)) if there]
    template = " ".join([*ends[:bos], "$A", *ends[bos:]])
    steps = [processors.ByteLevel(trim_offsets=True)] if trimmed else []
    if ends:
        steps.append(processors.TemplateProcessing(template, None, [(name, core.token_to_id(name)) for name in ends]))
    if steps:
        core.post_processor = processors.Sequence(steps) if len(steps) > 1 else steps[0]
