"""Owns which block of the paged KV cache belongs to which sequences, and which blocks hold a known prefix.

A block is a number: the manager knows no tensors, no scheduling order and no model. Blocks leave the free list in
`_take` and come back in `_give_back`, nowhere else; between them a block counts the sequences that hold it.

Sequences that share a block may only read it. A sequence about to write into one gets a copy first: `grow` puts
another block in its place and notes the pair, and the next step first copies what `take_copies` returns.

A full block is named by a digest of all tokens up to its end, and of the adapter that computed it. It keeps its name
and content while it is free, until it is taken for something else: least recently freed blocks go first.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import OrderedDict
from collections.abc import Iterable

from llama2.engine.sequence import Sequence

_MAX_NAMED_LEAKS = 5


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` token positions each; `prefix_cache=False` shares no prefixes.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        # In the order in which they will be taken, unnamed ones first: they hold nothing to reuse.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._num_holders = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._copies: list[tuple[int, int]] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the sequence's block table until it holds `num_tokens` positions; a table never shrinks here.

        The positions from num_computed on will be written: a shared block that holds some is replaced by a copy.
        Returns False, and changes nothing, when too few blocks are free.
        """
        table = sequence.block_table
        place = self._shared_place(sequence)
        num_more = -(-num_tokens // self.block_size) - len(table)
        if num_more <= 0 and place is None:
            return True  # as in most steps of most sequences
        if max(0, num_more) + (place is not None) > len(self._free):
            return False
        if place is not None:
            shared, table[place] = table[place], self._take()
            self._copies.append((shared, table[place]))
            self._give_back(shared)
        for _ in range(num_more):
            table.append(self._take())
        return True

    def adopt_prefix(self, sequence: Sequence) -> bool:
        """Give a sequence without blocks those that already hold its first tokens, and count these as computed.

        Its last token is left to compute, for its logits. Returns False, and changes nothing, when too few blocks are
        free for the rest of its tokens.
        """
        assert not sequence.block_table
        assert not sequence.num_computed
        prefix = self._find_prefix(sequence) if self._prefix_cache else []
        num_needed = math.ceil(sequence.num_tokens / self.block_size) - len(prefix)
        if num_needed > len(self._free) - sum(not self._num_holders[block] for block in prefix):
            return False
        for block in prefix:
            self._free.pop(block, None)
        self.share(prefix)
        sequence.block_table = array("i", prefix)
        sequence.num_computed = len(prefix) * self.block_size
        return True

    def name_blocks(self, sequence: Sequence, num_computed_before: int) -> None:
        """Name the blocks that the sequence has filled since it had computed `num_computed_before` tokens."""
        if not self._prefix_cache:
            return
        for place in range(num_computed_before // self.block_size, sequence.num_computed // self.block_size):
            digest, block = self._digest(sequence, place), sequence.block_table[place]
            if digest not in self._block_of and block not in self._digest_of:
                self._block_of[digest] = block
                self._digest_of[block] = digest

    def forget_prefixes(self) -> None:
        """No block has a name any more: what comes next computes its prompt from the start."""
        self._block_of.clear()
        self._digest_of.clear()

    def share(self, block_table: Iterable[int]) -> None:
        """One more sequence holds these blocks."""
        for block in block_table:
            self._num_holders[block] += 1

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """The (from, to) pairs of blocks to copy, in this order, before the next step writes; each is returned once."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def free(self, sequence: Sequence) -> None:
        """Release the sequence's hold on its blocks, and empty its table."""
        while sequence.block_table:  # from the end, so that prefixes are evicted last
            self._give_back(sequence.block_table.pop())

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        """Check that every block is in the free list once, or in as many tables of `live` as it counts holders.

        Raises:
            RuntimeError: it is not; the message names the blocks and who holds them.
        """
        holders: dict[int, list[str]] = {block: [] for block in range(self.num_blocks)}
        for block in self._free:
            holders.setdefault(block, []).append("the free list")
        for sequence in live:
            for block in sequence.block_table:
                holders.setdefault(block, []).append(f"request {sequence.request.request_id!r}")
        faults = []
        for block, names in holders.items():
            if not 0 <= block < self.num_blocks:
                faults.append(f"block {block} of {', '.join(names)} does not exist")
            elif not names:
                faults.append(f"block {block} is lost: neither free nor in a live sequence")
            elif names != ["the free list"] and ("the free list" in names or len(names) != self._num_holders[block]):
                counted = self._num_holders[block]
                faults.append(f"block {block} counts {counted} holders, but is held by {', '.join(names)}")
        if {digest: block for block, digest in self._digest_of.items()} != self._block_of:
            faults.append("the names of the blocks and the blocks of the names do not match")
        if faults:
            more = f"; and {len(faults) - _MAX_NAMED_LEAKS} more" if len(faults) > _MAX_NAMED_LEAKS else ""
            raise RuntimeError(f"KV cache of {self.num_blocks} blocks: {'; '.join(faults[:_MAX_NAMED_LEAKS])}{more}")

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        if sequence.request.wants_prompt_logits and not sequence.num_generated:
            return []  # what is not computed has no logits
        prefix = []
        for place in range((len(sequence.token_ids) - 1) // self.block_size):
            block = self._block_of.get(self._digest(sequence, place))
            if block is None:
                break
            prefix.append(block)
        return prefix

    def _digest(self, sequence: Sequence, place: int) -> bytes:
        """The name of the full block at `place`: of its tokens and all before them. Each is computed once."""
        digests = sequence.block_digests
        while len(digests) <= place:
            start = len(digests) * self.block_size
            tokens = array("q", sequence.token_ids[start : start + self.block_size])
            # A cryptographic hash: after a collision, by chance or on purpose, two prompts would share their replies.
            parent = digests[-1] if digests else sequence.adapter
            digests.append(hashlib.blake2b(parent + tokens.tobytes(), digest_size=32).digest())
        return digests[place]

    def _shared_place(self, sequence: Sequence) -> int | None:
        """Where in its table the sequence's next position falls, if that is a block that others hold too."""
        table, place = sequence.block_table, sequence.num_computed // self.block_size
        return place if place < len(table) and self._num_holders[table[place]] > 1 else None

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
        self._num_holders[block] = 1
        return block

    def _give_back(self, block: int) -> None:
        self._num_holders[block] -= 1
        if self._num_holders[block] == 0:
            self._free[block] = None
            self._free.move_to_end(block, last=block in self._digest_of)
