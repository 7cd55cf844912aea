"""Pages of prompts that were computed before, for sequences that begin with the same tokens.

A page is known by what its keys and values depend on: the tenant and the adapter's digest, the tokens that fill it,
and all tokens in front of them. So another adapter under an old name finds nothing, and no tenant can tell from the
time of an answer what another one has asked.
"""

import hashlib
from collections.abc import Iterator

from serving.cache import PAGE, Cache
from serving.integers import integers
from serving.sequence import Sequence

PageKey = bytes
WholePrompt = tuple[str, str, tuple[int, ...]]  # whose it is, the digest of its adapter, and its tokens


class Prefixes:
    """Finds the beginnings of prompts in a cache, and puts new ones there."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def adopt(self, sequence: Sequence) -> PageKey | None:
        """Take pages that others have computed in the place of a sequence's next ones, as far as there are any.

        Gives the key of the page behind them, which nobody has computed; None where it has no key.
        """
        while (key := next_key(sequence)) is not None:
            page = self.cache.shared(key)
            if page is None:
                return key
            number = sequence.computed // PAGE
            own = sequence.pages[number]
            sequence.own_pages.remove(own)
            self.cache.free([own])
            self.cache.join(page)
            sequence.pages[number] = page
            sequence.joined_pages.append(page)
            sequence.computed += PAGE
        return None

    def follow(self, sequence: Sequence) -> int | None:
        """Let a sequence count as computed whose whole prompt another one has just computed.

        Gives the number of the page on which the prompt ends, to be copied for it; None where it lacks more.
        """
        self.adopt(sequence)
        if sequence.computed % PAGE or sequence.uncomputed > PAGE:
            return None
        number = sequence.computed // PAGE
        sequence.computed = sequence.prompted
        return number

    def add_computed(self, sequence: Sequence, count: int) -> None:
        """Note that so many more positions of a prompt are computed; the pages that they fill are shared."""
        first = sequence.computed // PAGE
        sequence.computed += count
        stop = sequence.computed // PAGE
        keys = page_keys(sequence)
        for number in range(first, stop):
            key = keys.get(number)
            page = sequence.pages[number]
            if key is None or self.cache.shared(key) is not None:
                continue
            self.cache.share(page, key)
            sequence.own_pages.remove(page)
            sequence.joined_pages.append(page)


def whole_prompt(sequence: Sequence) -> WholePrompt | None:
    """What a sequence's prompt is known by, to be computed once for all that ask for an answer to it.

    None where it is scored, or where virtual tokens end within a page.
    """
    if sequence.scored_from is not None or sequence.virtual % PAGE:
        return None
    request = sequence.request
    return request.tenant, digest_of_adapter(sequence), request.prompt


def digest_of_adapter(sequence: Sequence) -> str:
    """The digest of a sequence's adapter; empty for the base."""
    if sequence.packed is None:
        return ""
    return sequence.packed.digest


def next_key(sequence: Sequence) -> PageKey | None:
    """The key of the page that a sequence computes next; None where it must compute that page itself."""
    if sequence.computed % PAGE:
        return None
    last = len(sequence.request.prompt)
    if sequence.scored_from is not None:
        last = sequence.scored_from
    needed = sequence.virtual + last - 1  # the first position whose output is read
    if sequence.computed + PAGE > needed:
        return None
    number = sequence.computed // PAGE
    return page_keys(sequence).get(number)


def page_keys(sequence: Sequence) -> dict[int, PageKey]:
    """The key of each page that the prompt fills, by its number; none where virtual tokens end within a page."""
    if sequence.page_keys is None:
        sequence.page_keys = {}
        if sequence.virtual % PAGE == 0:
            first = sequence.virtual // PAGE
            sequence.page_keys.update(enumerate(_keys(sequence), first))
    return sequence.page_keys


def _keys(sequence: Sequence) -> Iterator[PageKey]:
    """The keys of a prompt's full pages: each is a digest of whose it is, and of all tokens up to its end."""
    request = sequence.request
    digest = digest_of_adapter(sequence)
    owner = f"{digest} {request.tenant}"
    owner_digest = hashlib.sha256(owner.encode()).digest()  # of one size: no name can pass for tokens
    of_all = hashlib.sha256(owner_digest)
    ids = integers(request.prompt)
    size = PAGE * ids.itemsize
    content = ids.tobytes()
    full = len(ids) // PAGE
    for number in range(full):
        first = number * size
        of_all.update(content[first : first + size])
        yield of_all.digest()
