from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.engine.block_manager import BlockManager
from llama2.engine.sequence import Request, Sequence


def make_sequence(arrival: int = 0) -> Sequence:
    return Sequence.of(Request(request_id=f"r{arrival}", prompt_ids=(1, 2, 3)), arrival)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_table_has_the_fewest_blocks_that_hold_the_positions(num_tokens: int, num_blocks: int) -> None:
    blocks, sequence = BlockManager(10, 4), make_sequence()
    assert blocks.grow(sequence, num_tokens)
    assert len(sequence.block_table) == num_blocks
    assert blocks.num_free == 10 - num_blocks


def test_growing_keeps_the_blocks_that_are_written_and_never_shrinks() -> None:
    blocks, sequence = BlockManager(10, 4), make_sequence()
    blocks.grow(sequence, 6)
    before = list(sequence.block_table)
    assert blocks.grow(sequence, 17)
    assert list(sequence.block_table[:2]) == before
    assert blocks.grow(sequence, 1)
    assert len(sequence.block_table) == 5


def test_a_growth_that_does_not_fit_changes_nothing() -> None:
    blocks, first, second = BlockManager(4, 4), make_sequence(0), make_sequence(1)
    assert blocks.grow(first, 8)
    assert blocks.grow(second, 4)
    table = list(second.block_table)
    assert not blocks.grow(second, 13)
    assert list(second.block_table) == table
    assert blocks.num_free == 1
    assert blocks.grow(second, 8)


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(0, 40))), max_size=60), st.integers(1, 12)
)
def test_no_block_is_lost_or_held_twice_whatever_grows_and_is_freed(
    operations: list[tuple[int, int | None]], num_blocks: int
) -> None:
    blocks, sequences = BlockManager(num_blocks, 4), [make_sequence(index) for index in range(4)]
    for index, num_tokens in operations:
        if num_tokens is None:
            blocks.free(sequences[index])
            assert not sequences[index].block_table
        else:
            blocks.grow(sequences[index], num_tokens)
        blocks.check_integrity(sequences)
        assert blocks.num_free == num_blocks - sum(len(sequence.block_table) for sequence in sequences)
    for sequence in sequences:
        blocks.free(sequence)
    assert blocks.num_free == num_blocks


def test_integrity_names_a_lost_block() -> None:
    blocks, sequence = BlockManager(3, 4), make_sequence()
    blocks.grow(sequence, 4)
    with pytest.raises(RuntimeError, match=rf"block {sequence.block_table[0]} is lost"):
        blocks.check_integrity([])


def test_integrity_names_both_holders_of_a_block() -> None:
    blocks, first, second = BlockManager(3, 4), make_sequence(0), make_sequence(1)
    blocks.grow(first, 4)
    second.block_table.append(first.block_table[0])
    with pytest.raises(RuntimeError, match="block 0 counts 1 holders, but is held by request 'r0', request 'r1'"):
        blocks.check_integrity([first, second])


def test_integrity_notices_a_block_that_is_freed_while_in_use_and_one_that_does_not_exist() -> None:
    blocks, sequence = BlockManager(3, 4), make_sequence()
    blocks.grow(sequence, 4)
    table = list(sequence.block_table)
    blocks.free(sequence)
    sequence.block_table.extend(table)
    with pytest.raises(RuntimeError, match="the free list, request 'r0'"):
        blocks.check_integrity([sequence])
    sequence.block_table[:] = array("i", [7])
    with pytest.raises(RuntimeError, match="block 7 of request 'r0' does not exist"):
        blocks.check_integrity([sequence])


@pytest.mark.parametrize(("sizes", "name"), [((0, 4), "num_blocks"), ((4, 0), "block_size")])
def test_sizes_are_positive(sizes: tuple[int, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        BlockManager(*sizes)


def fill(blocks: BlockManager, sequence: Sequence) -> list[int]:
    """Compute all tokens of a sequence, as a step would; returns its blocks."""
    assert blocks.adopt_prefix(sequence)
    before = sequence.num_computed
    assert blocks.grow(sequence, len(sequence.token_ids))
    sequence.num_computed = len(sequence.token_ids)
    blocks.name_blocks(sequence, before)
    return list(sequence.block_table)


def of(token_ids: range, arrival: int = 0) -> Sequence:
    return Sequence.of(Request(request_id=f"r{arrival}", prompt_ids=tuple(token_ids)), arrival)


def test_a_prefix_is_shared_while_its_owner_lives_and_found_again_afterwards() -> None:
    blocks, first, second, third = BlockManager(20, 4), of(range(10)), of(range(14), 1), of(range(9), 2)
    table = fill(blocks, first)
    assert fill(blocks, second)[:2] == table[:2]
    blocks.check_integrity([first, second])
    blocks.free(first)
    blocks.free(second)
    assert blocks.num_free == 20
    assert fill(blocks, third)[:2] == table[:2]
    blocks.check_integrity([third])


def test_a_forgotten_prefix_is_computed_again_and_then_known() -> None:
    blocks, first, second, third = BlockManager(20, 4), of(range(10)), of(range(10), 1), of(range(10), 2)
    table = fill(blocks, first)
    blocks.forget_prefixes()
    again = fill(blocks, second)
    assert not set(table) & set(again)
    assert fill(blocks, third)[:2] == again[:2]
    blocks.check_integrity([first, second, third])


def test_the_last_token_is_always_left_to_compute() -> None:
    blocks, first, second = BlockManager(20, 4), of(range(8)), of(range(8), 1)
    fill(blocks, first)
    assert blocks.adopt_prefix(second)
    assert second.num_computed == 4


def test_a_block_is_known_by_all_tokens_before_it_too() -> None:
    blocks, first, second = BlockManager(20, 4), of(range(8)), of(range(100, 104), 1)
    fill(blocks, first)
    second.token_ids += [4, 5, 6, 7, 8]  # `first`'s second block, after another first block
    assert blocks.adopt_prefix(second)
    assert second.num_computed == 0


def test_the_least_recently_used_block_goes_first_and_a_prefix_after_what_follows_it() -> None:
    blocks, old, new = BlockManager(4, 4), of(range(8)), of(range(100, 108), 1)
    fill(blocks, old)
    fill(blocks, new)
    blocks.free(old)
    blocks.free(new)
    other = of(range(200, 204), 2)
    fill(blocks, other)  # takes the second block of `old`
    blocks.free(other)
    again = [of(range(9), 3), of(range(100, 109), 4)]
    assert [len(blocks._find_prefix(sequence)) for sequence in again] == [1, 2]
    blocks.check_integrity([])


def test_a_request_that_wants_the_logits_of_its_prompt_computes_it() -> None:
    blocks, first = BlockManager(20, 4), of(range(10))
    fill(blocks, first)
    request = Request(request_id="scored", prompt_ids=tuple(range(10)), prompt_logprobs=0)
    scored = Sequence.of(request, 1)
    assert blocks.adopt_prefix(scored)
    assert scored.num_computed == 0


def test_without_a_prefix_cache_nothing_is_shared() -> None:
    blocks, first, second = BlockManager(20, 4, prefix_cache=False), of(range(10)), of(range(10), 1)
    fill(blocks, first)
    assert not set(fill(blocks, second)) & set(first.block_table)


def test_a_prefix_that_does_not_leave_room_for_the_rest_is_not_taken() -> None:
    blocks, first, second = BlockManager(4, 4), of(range(12)), of(range(20), 1)
    fill(blocks, first)
    blocks.free(first)
    assert not blocks.adopt_prefix(second)
    assert (list(second.block_table), second.num_computed, blocks.num_free) == ([], 0, 4)
    blocks.check_integrity([])


def test_a_shared_block_is_not_written_into_without_a_block_for_the_copy() -> None:
    blocks, first = BlockManager(2, 4), make_sequence()
    assert blocks.grow(first, 3)
    first.num_computed = 3
    first.num_forks = 1
    (second,) = first.fork()
    blocks.share(second.block_table)
    other = make_sequence(2)
    assert blocks.grow(other, 4)
    assert not blocks.grow(second, 4)
    assert (second.block_table, blocks.take_copies()) == (first.block_table, ())
    blocks.free(other)
    assert blocks.grow(second, 4)
    assert second.block_table != first.block_table
    assert blocks.take_copies() == ((first.block_table[0], second.block_table[0]),)
    blocks.check_integrity([first, second])
