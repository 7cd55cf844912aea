"""What a request goes through: whose it is, what it may have, its turn in the engine, and what is counted of it."""

import asyncio
import logging
import secrets
from dataclasses import dataclass, replace

from serving.gateway.account import Account
from serving.gateway.answering import Answering
from serving.gateway.answers import AnswerText, OpenAnswers
from serving.gateway.bodies import MOST_CHOICES, ChatBody, CompletionBody, Sampling
from serving.gateway.library import Library, Registered
from serving.gateway.metrics import Measured
from serving.gateway.refusal import ApiRefusal, broken, invalid
from serving.gateway.replies import ChatReply, CompletionReply
from serving.gateway.tenants import EVERYBODY, Tenant, Tenants
from serving.gateway.text import Codec
from serving.gateway.usage import UsageFolder
from serving.sequence import Request

SETTLE_S = 5.0  # between two times that what is used of quotas is written down
COLDEST = 1e-3  # a temperature below is greedy: logits divided by less are no numbers any more


@dataclass(frozen=True)
class Allowed:
    """What a server takes at most."""

    body_bytes: int = 4 * 2**20
    upload_bytes: int = 2**30
    answers: int = 4096  # that wait or run; each tenant has a limit of its own
    new_tokens: int = 512  # of a chat that names no number
    completion_tokens: int = 16  # of a completion that names none: OpenAI's default
    head_s: float = 30  # that a connection may be open without a request on it
    body_s: float = 60  # that a body may take to come
    upload_s: float = 900
    stalled_s: float = 60  # that a reader may take nothing


class Service:
    """All parts of a gateway, and the way of a request through them."""

    def __init__(
        self,
        answering: Answering,
        codec: Codec,
        base_name: str,
        tenants: Tenants | None,
        allowed: Allowed,
        usage: UsageFolder | None = None,
    ) -> None:
        """Without `tenants` everybody may do everything, and nobody has a key; without `usage` quotas begin anew."""
        self.answering = answering
        self.codec = codec
        self.library = Library(answering, base_name)
        self.metrics = Measured()
        self.allowed = allowed
        self.draining = False
        self.tenants = tenants
        self._usage = usage
        self._accounts: dict[str, Account] = {}
        self.under_way = 0  # answers that wait or run, or are being read

    def tenant_of(self, authorization: str | None) -> Tenant:
        """Whose an Authorization header is; raises ApiRefusal where it is nobody's."""
        if self.tenants is None:
            return EVERYBODY
        scheme, _, key = (authorization or "").partition(" ")
        tenant = None
        if scheme.lower() == "bearer":
            tenant = self.tenants.of_key(key.strip())
        if tenant is None:
            raise ApiRefusal(401, "Authorization: allowed: Bearer and a key of this server", "invalid_api_key")
        return tenant

    async def complete(self, tenant: Tenant, body: CompletionBody) -> OpenAnswers:
        """The answers to a completion's prompts; raises ApiRefusal."""
        adapter = self.library.find(tenant, body.model)
        prompts: list[tuple[int, ...]] = []
        if len(body.prompts) * body.choices > MOST_CHOICES:
            raise invalid(f"prompt: found more than {MOST_CHOICES} answers in one request, which are allowed")
        for prompt in body.prompts:
            if isinstance(prompt, str):
                self._check_text(prompt)
                prompts.append(await self.codec.encode(prompt))
            else:
                prompts.append(tuple(prompt))
        tokens = body.tokens or self.allowed.completion_tokens
        reply = CompletionReply(body.model)
        return await self._begin(tenant, adapter, body, prompts, tokens, reply)

    async def chat(self, tenant: Tenant, body: ChatBody) -> OpenAnswers:
        """The answers to a chat; raises ApiRefusal."""
        adapter = self.library.find(tenant, body.model)
        messages = [message.plain() for message in body.messages]
        contents = [message["content"] for message in messages]
        self._check_text("".join(contents))
        prompt = await self.codec.encode_chat(messages)
        tokens = body.tokens
        if tokens is None:
            space = self.answering.positions - len(prompt)
            if adapter is not None:
                space -= adapter.loaded.virtual
            most = min(space, self.allowed.new_tokens)
            tokens = max(1, most)
        reply = ChatReply(body.model)
        return await self._begin(tenant, adapter, body, [prompt], tokens, reply)

    def account(self, tenant: Tenant) -> Account:
        """What a tenant used."""
        name = tenant.name
        if name not in self._accounts:
            self._accounts[name] = Account(tenant, self._usage)
        return self._accounts[name]

    async def settle_on(self) -> None:
        """Write down what is used of quotas now and then, until this is cancelled, and once more then."""
        try:
            while True:
                await asyncio.sleep(SETTLE_S)
                await self._settle()
        finally:
            await self._settle(margin=0)

    async def _settle(self, margin: int | None = None) -> None:
        """Write down what is used of quotas, where that is a margin below what is written."""
        for account in list(self._accounts.values()):
            if account.quota is None:
                continue
            try:
                await account.quota.settle(margin)
            except ApiRefusal:
                logging.getLogger(__name__).exception("what is used of a quota is not written down")

    def check_open(self) -> None:
        """Raise ApiRefusal where nothing is answered: while the server drains, or after the engine has failed."""
        if self.draining:
            raise ApiRefusal(503, "this server is about to end", "draining", 1.0)
        if self.answering.broken:
            raise broken()

    def _check_text(self, text: str) -> None:
        """Raise ApiRefusal for what is longer than any text of so many tokens, or no text."""
        most = 64 * self.answering.positions
        if len(text) > most:
            raise invalid(f"prompt: found {len(text)} characters; allowed: at most {most}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise invalid(f"prompt: found half a surrogate at {error.start}; allowed: Unicode") from error

    async def _begin(
        self,
        tenant: Tenant,
        adapter: Registered | None,
        body: Sampling,
        prompts: list[tuple[int, ...]],
        tokens: int,
        reply: CompletionReply,
    ) -> OpenAnswers:
        """Let a request's answers wait for their turn; raises ApiRefusal."""
        requests = self._requests(tenant, adapter, body, prompts, tokens)
        count = len(requests)
        if self.under_way + count > self.allowed.answers:
            raise ApiRefusal(429, f"requests: found {self.under_way} under way, no more now", "queue_full", 2.0)
        account = self.account(tenant)
        account.begin(count)
        self.under_way += count
        reserved = sum(map(_most_tokens, requests))
        try:
            day = await account.reserve(reserved)
            try:
                streams = await self.answering.submit(requests)
            except BaseException:
                account.give_back(reserved, day)
                raise
        except BaseException:
            self.under_way -= count
            account.end(count)
            raise
        self.metrics.under_way.set(self.under_way)
        answers: list[AnswerText] = []
        for stream in streams:
            answers.append(AnswerText(stream, self.codec, body.stops, self.answering.cancel))

        def closed(ended: OpenAnswers) -> None:
            self.under_way -= count
            self.metrics.under_way.set(self.under_way)
            account.end(count)
            used = self._count(tenant, adapter, ended)
            account.give_back(reserved - used, day)

        return OpenAnswers(answers, reply, body.choices, closed)

    def _requests(
        self, tenant: Tenant, adapter: Registered | None, body: Sampling, prompts: list[tuple[int, ...]], tokens: int
    ) -> list[Request]:
        """What the engine is asked: n answers to each prompt, with seeds that follow each other."""
        seed = body.seed
        if seed is None:
            seed = secrets.randbits(32)
        temperature = 1.0 if body.temperature is None else body.temperature
        common = Request(
            prompt=(),
            adapter=adapter.key if adapter else None,
            new_tokens=tokens,
            stop=self.codec.ends,
            temperature=0.0 if temperature < COLDEST else temperature,
            top_k=body.top_k or 0,
            top_p=body.top_p or 1.0,
            tenant=tenant.name,
        )
        requests: list[Request] = []
        for prompt in prompts:
            for number in range(body.choices):
                requests.append(replace(common, prompt=prompt, seed=seed + number))
        return requests

    def _count(self, tenant: Tenant, adapter: Registered | None, ended: OpenAnswers) -> int:
        """Count the tokens of answers that are over, and cancel those that are not; how many were used."""
        name = self.library.base_name
        if adapter is not None:
            name = adapter.name if self.library.holds(adapter) else "(gone)"
        used = 0
        for answer in ended.answers:
            stream = answer.stream
            if not stream.ended:
                self.answering.cancel(stream)
            prompt = len(stream.request.prompt)
            used += prompt + stream.count
            self.metrics.answer(tenant.name, name, prompt, stream.count, stream.first_token_s)
        return used


def _most_tokens(request: Request) -> int:
    """What a request uses at most: its prompt, and the longest answer that it may have."""
    prompt = len(request.prompt)
    return prompt + request.new_tokens
