"""The key under which tokens are kept: all that they depend on."""

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.date import asks_for_date
from trainer.data.encode import Reading
from trainer.data.files import SourceName, digest
from trainer.data.shapes import ANSWERS, JUDGED, PAIRS, PAIRS_WITH_MARGINS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS_FORMAT = 5


def key_of(source: SourceName, tokenizer: "PreTrainedTokenizerBase", reading: Reading, shard_rows: int) -> str:
    """A digest of all that the tokens depend on; the date only where the chat template asks for it."""
    import transformers

    version = transformers.__version__
    families = (ANSWERS, PAIRS, PAIRS_WITH_MARGINS, JUDGED)
    of_source = digest(source)
    data = (_TOKENS_FORMAT, shard_rows, families, version, of_source)
    drop = reading.too_long == "drop"
    max_tokens = reading.max_tokens
    choices = (max_tokens, reading.ends, reading.parse_special, drop, reading.rows)
    columns = reading.columns or {}
    date = None
    template = str(tokenizer.chat_template)
    if asks_for_date(template):
        date = str(reading.date)
    sorted_columns = sorted(columns.items())
    options = (data, choices, sorted_columns, date)
    written_options = repr(options)
    key = hashlib.sha256(written_options.encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = sorted(Path(folder).rglob("*"))
        for path in paths:
            if path.is_file():
                name = path.name.encode()
                content = path.read_bytes()
                key.update(name + content)
    return key.hexdigest()[:32]
