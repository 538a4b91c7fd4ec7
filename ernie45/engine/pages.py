"""The page pool: who owns which page of the key/value store, and which pages hold a known prefix.

    free       nobody's, content worthless
    in use     held by one sequence or by several that share a prefix
    cached     held by nobody, but full of a known prefix: found again by its key, and taken from the longest unused one on
               when free pages run out

Every page is in exactly one of the three; `check` proves it. Ids and counts only, no tensors.

A page is known by a key that depends on everything before it: BLAKE2b, keyed with a secret of this pool, over the key of
the page before and the page's tokens; the first page's parent is the digest of a salt. So a key cannot be made up from
outside, and tenants with different salts never see whether the other sent the same prompt.
"""

from __future__ import annotations

import secrets
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

_KEY_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Books:
    """How many pages are where."""

    free: int
    cached: int
    in_use: int
    total: int

    @property
    def balanced(self) -> bool:
        """free + cached + in use = all."""
        return self.free + self.cached + self.in_use == self.total


class PagePool:
    """The one owner of all pages. What it is asked for must be there: callers look at `available` first."""

    def __init__(self, num_pages: int, page_size: int, *, remembers: bool = True) -> None:
        """Args: page_size: tokens per page. remembers: False keeps no prefixes: pages without a user are free."""
        self.num_pages, self.page_size = num_pages, page_size
        self._secret = secrets.token_bytes(_KEY_BYTES)
        self._remembers = remembers
        self._free = list(range(num_pages - 1, -1, -1))
        self._users: dict[int, int] = {}  # how many sequences hold a page, for pages in use
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached pages, longest unused first

    @property
    def available(self) -> int:
        """Pages that `take` can give: free ones and cached ones."""
        return len(self._free) + len(self._unused)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """Pages for new content, one user each; forgets the prefixes that were unused longest if free pages do not suffice."""
        assert count <= self.available, f"{count} pages taken, {self.available} available"
        taken = []
        for _ in range(count):
            if not self._free:
                page, _ = self._unused.popitem(last=False)
                self._forget(page)
                self._free.append(page)
            page = self._free.pop()
            self._users[page] = 1
            taken.append(page)
        return taken

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest known prefix of a chain of keys. They stay where they are: `share` holds on to them."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def num_unused(self, pages: Iterable[int]) -> int:
        """How many of these pages are cached, so that sharing them makes fewer available."""
        return sum(page in self._unused for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """One more user for each of these pages, which are in use or cached."""
        for page in pages:
            assert page in self._users or page in self._unused, f"page {page} is free and cannot be shared"
            self._users[page] = self._users.get(page, 0) + 1
            self._unused.pop(page, None)

    def publish(self, page: int, key: bytes) -> None:
        """Let others find a full page in use by its key; of several pages of equal content the first one is known."""
        assert page in self._users, f"page {page} is published without a user"
        if self._remembers and page not in self._key_of and key not in self._page_of:
            self._key_of[page] = key
            self._page_of[key] = page

    def give_back(self, pages: Sequence[int]) -> None:
        """One user less for the pages of a sequence. The last ones are the first to be forgotten: nothing hangs on them."""
        for page in reversed(pages):
            assert page in self._users, f"page {page} is given back and has no user"
            self._users[page] -= 1
            if self._users[page]:
                continue
            del self._users[page]
            if page in self._key_of:
                self._unused[page] = None
            else:
                self._free.append(page)

    def forget_all(self) -> None:
        """Drop every prefix, as after a change of weights; pages in use stay with their users, known to nobody else."""
        self._free.extend(self._unused)
        self._unused.clear()
        self._key_of.clear()
        self._page_of.clear()

    def extend_keys(self, keys: list[bytes], tokens: Sequence[int], salt: str) -> None:
        """Append to `keys` those of all full pages of `tokens` that it does not hold yet."""
        size = self.page_size
        for at in range(len(keys), len(tokens) // size):
            parent = keys[-1] if keys else self._digest(b"salt", salt.encode("utf-8", "surrogatepass"))
            keys.append(self._digest(parent, array("q", tokens[at * size : (at + 1) * size]).tobytes()))

    def books(self) -> Books:
        """Where the pages are."""
        return Books(free=len(self._free), cached=len(self._unused), in_use=len(self._users), total=self.num_pages)

    def check(self, held: Iterable[Sequence[int]] = ()) -> Books:
        """Prove the books. Args: held: the pages of every sequence. Raises: AssertionError. Returns: the books."""
        users = Counter(page for pages in held for page in pages)
        assert users == self._users, "users of pages differ from what sequences hold"
        free, unused, in_use = set(self._free), set(self._unused), set(self._users)
        assert len(free) == len(self._free), "a page is free twice"
        assert free.isdisjoint(unused | in_use), "a free page is somewhere else, too"
        assert unused.isdisjoint(in_use), "a cached page has a user"
        assert {self._page_of[key] for key in self._page_of} == set(self._key_of), "keys and pages disagree"
        assert unused <= set(self._key_of), "a cached page has no key"
        books = self.books()
        assert books.balanced, f"the books do not balance: {books}"
        return books

    def _digest(self, *parts: bytes) -> bytes:
        digest = blake2b(key=self._secret, digest_size=_KEY_BYTES)
        for part in parts:
            digest.update(part)
        return digest.digest()

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
