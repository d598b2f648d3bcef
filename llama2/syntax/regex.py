r"""Owns the way from a regular expression to the rules of a grammar that writes exactly what it matches.

The expression is read by Python's own parser and made a deterministic automaton, with a rule for each state. So however
ambiguous the expression is, following it costs nothing, and one that is too large is refused before it costs anything.

The text matches as a whole. What a grammar cannot know is refused: back references, look-around, flags, word borders.
`\d \w \s` and their opposites write ASCII where the dialects of regular expressions differ on the rest.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from llama2.syntax.charset import ALL, DIGITS, CharSet, as_ebnf

if sys.version_info >= (3, 11):
    from re import _constants as ops  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as ops
    import sre_parse as parser

MAX_LENGTH = 4096
MAX_STATES = 300
_MAX_NODES = 20_000
_MAX_WORK = 500_000

_ASCII = CharSet.of([(0, 0x7F)])
_BEYOND_ASCII = ~_ASCII
_WORD = CharSet.of([(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
_SPACE = CharSet.chars(" \t\n\r\f\v")
_ANY_SPACE = _SPACE | CharSet.chars(
    "\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\ufeff"
)
_LINE_ENDS = CharSet.chars("\n\r\u2028\u2029")
# Of each category what every dialect has in it, and what some dialect has in it.
_CATEGORIES = {
    ops.CATEGORY_DIGIT: (DIGITS, DIGITS | _BEYOND_ASCII),
    ops.CATEGORY_WORD: (_WORD, _WORD | _BEYOND_ASCII),
    ops.CATEGORY_SPACE: (_SPACE, _ANY_SPACE),
    ops.CATEGORY_NOT_DIGIT: (_ASCII - DIGITS, ~DIGITS),
    ops.CATEGORY_NOT_WORD: (_ASCII - _WORD, ~_WORD),
    ops.CATEGORY_NOT_SPACE: (~_ANY_SPACE, ~_SPACE),
}
_UNSUPPORTED = {
    ops.ASSERT: "look-around",
    ops.ASSERT_NOT: "look-around",
    ops.GROUPREF: "a back reference",
    ops.GROUPREF_EXISTS: "a back reference",
    ops.AT: "a border of words, or ^ or $ inside of it",
}

# What stands for itself in a JSON string, and what needs a backslash.
JSON_PLAIN = CharSet.of([(0x20, 0x10FFFF)]) & ~CharSet.chars('"\\')
_JSON_ESCAPES = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
JSON_CHARACTERS = JSON_PLAIN | CharSet.chars("".join(_JSON_ESCAPES))


def to_rules(pattern: str, name: str, *, alphabet: CharSet = ALL, in_json: bool = False) -> list[str]:
    """The rules that write what `pattern` matches; the first is called `name`, the others begin with it.

    Args:
        alphabet: the characters that can be written at all.
        in_json: write it as the inside of a JSON string.

    Raises:
        ValueError: the pattern is invalid, has what a grammar cannot know, is too large, or matches nothing.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"it must have at most {MAX_LENGTH} characters, got {len(pattern)}")
    try:
        tree: Any = parser.parse(pattern)
        if tree.state.flags & ~re.UNICODE:
            raise ValueError("flags are not supported")
        nodes = _Nodes(alphabet & JSON_CHARACTERS if in_json else alphabet)
        end = nodes.add(tree, 0, first=True, last=True)
    except (re.error, OverflowError) as error:
        raise ValueError(f"it is not valid: {error}") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    states = _determinize(nodes, end)
    live = _live(states)
    if 0 not in live:
        raise ValueError("it matches no text that this model can write")
    names = [name if index == 0 else f"{name}_{index}" for index in range(len(states))]
    write = json_character if in_json else CharSet.as_ebnf
    rules = []
    for index in sorted(live):
        accepts, moves = states[index]
        options = ['""'] if accepts else []
        options += [f"{write(chars)} {names[target]}" for chars, target in moves if target in live]
        rules.append(f"{names[index]} ::= {' | '.join(options)}")
    return rules


def json_character(chars: CharSet) -> str:
    """One of `chars` inside a JSON string, escaped where it must be, and only there."""
    raw = chars & JSON_PLAIN
    escapes = CharSet.chars("".join(letter for character, letter in _JSON_ESCAPES.items() if character in chars))
    options = [raw.as_ebnf()] if raw else []
    options += [f"{as_ebnf(chr(92))} {escapes.as_ebnf()}"] if escapes else []
    return options[0] if len(options) == 1 else f"({' | '.join(options)})"


class _Nodes:
    """The expression as an automaton that may be in several nodes at once (Thompson 1968). Node 0 is the beginning."""

    def __init__(self, alphabet: CharSet) -> None:
        self.moves: list[tuple[CharSet, int] | None] = [None]
        self.empty: list[list[int]] = [[]]
        self._alphabet = alphabet

    def add(self, items: Iterable[tuple[Any, Any]], start: int, *, first: bool, last: bool) -> int:
        """Append what `items` match behind node `start`; the node that is reached then. `first` and `last` say that
        nothing can stand before or after it, so that ^ and $ hold."""
        items = list(items)
        for index, (op, value) in enumerate(items):
            is_first, is_last = first and index == 0, last and index == len(items) - 1
            start = self._add_one(op, value, start, first=is_first, last=is_last)
        return start

    def _add_one(self, op: Any, value: Any, start: int, *, first: bool, last: bool) -> int:
        if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
            return self._move(start, _chars(op, value))
        if op is ops.SUBPATTERN:
            _, added, removed, items = value
            if added or removed:
                raise ValueError("flags are not supported")
            return self.add(items, start, first=first, last=last)
        if op is ops.BRANCH:
            ends = [self.add(items, self._step(start), first=first, last=last) for items in value[1]]
            join = self._node()
            for end in ends:
                self.empty[end].append(join)
            return join
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            low, high, items = value
            return self._repeat(low, high, items, start)
        if op is ops.AT and (
            (first and value in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING))
            or (last and value in (ops.AT_END, ops.AT_END_STRING))
        ):
            return start
        raise ValueError(f"{_UNSUPPORTED.get(op, 'a possessive or atomic group')} is not supported")

    def _repeat(self, low: int, high: int, items: Any, start: int) -> int:
        for _ in range(low):
            start = self.add(items, start, first=False, last=False)
        if high == ops.MAXREPEAT:
            loop = self._step(start)
            self.empty[self.add(items, self._step(loop), first=False, last=False)].append(loop)
            return self._step(loop)
        skips = [start]
        for _ in range(high - low):
            start = self.add(items, self._step(start), first=False, last=False)
            skips.append(start)
        join = self._node()
        for node in skips:
            self.empty[node].append(join)
        return join

    def _node(self) -> int:
        if len(self.moves) >= _MAX_NODES:
            raise ValueError("it is too large: its repetitions multiply")
        self.moves.append(None)
        self.empty.append([])
        return len(self.moves) - 1

    def _step(self, start: int) -> int:
        node = self._node()
        self.empty[start].append(node)
        return node

    def _move(self, start: int, chars: CharSet) -> int:
        before, after = self._step(start), self._node()
        self.moves[before] = (chars & self._alphabet, after)
        return after


def _chars(op: Any, value: Any) -> CharSet:
    if op is ops.LITERAL:
        return CharSet.of([(value, value)]) & ALL
    if op is ops.NOT_LITERAL:
        return ~CharSet.of([(value, value)])
    if op is ops.ANY:
        return ~_LINE_ENDS
    negated = value[0][0] is ops.NEGATE
    chars = CharSet()
    for kind, item in value[negated:]:
        if kind is ops.CATEGORY:
            chars |= _CATEGORIES[item][negated]
        else:
            chars |= CharSet.of([item if kind is ops.RANGE else (item, item)])
    return ~chars if negated else chars & ALL


# For each state whether a text may end there, and where it goes on to with which characters.
_States = list[tuple[bool, list[tuple[CharSet, int]]]]


def _determinize(nodes: _Nodes, end: int) -> _States:
    """An automaton that is always in one state: each stands for a set of nodes. State 0 is the beginning."""
    work = 0
    atoms_of = _atoms({move[0] for move in nodes.moves if move})

    def closure(seeds: Iterable[int]) -> frozenset[int]:
        nonlocal work
        reached, todo = set(seeds), list(seeds)
        while todo:
            node = todo.pop()
            work += 1
            fresh = [target for target in nodes.empty[node] if target not in reached]
            reached.update(fresh)
            todo += fresh
        if work > _MAX_WORK:
            raise ValueError("it is too large: too many of its parts may match at once")
        return frozenset(node for node in reached if nodes.moves[node] or node == end)

    found = {closure([0]): 0}
    states: _States = []
    for members in _growing(found):
        targets: dict[tuple[int, int], set[int]] = defaultdict(set)
        for node in members:
            move = nodes.moves[node]
            for atom in atoms_of[move[0]] if move else ():
                work += 1
                targets[atom].add(move[1])  # type: ignore[index]
        by_target: dict[frozenset[int], list[tuple[int, int]]] = defaultdict(list)
        for atom, goals in targets.items():
            by_target[frozenset(goals)].append(atom)
        moves: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for goals_of_atoms, atoms in by_target.items():
            moves[found.setdefault(closure(goals_of_atoms), len(found))] += atoms
        states.append((end in members, [(CharSet.of(atoms), target) for target, atoms in moves.items()]))
        if len(found) > MAX_STATES:
            raise ValueError(f"it is too large: it needs more than {MAX_STATES} states")
    return states


def _growing(found: dict[frozenset[int], int]) -> Iterator[frozenset[int]]:
    """The keys of a dictionary, those too that are added meanwhile."""
    position = 0
    keys: list[frozenset[int]] = []
    while position < len(found):
        if position >= len(keys):
            keys = list(found)
        yield keys[position]
        position += 1


def _atoms(sets: Iterable[CharSet]) -> dict[CharSet, list[tuple[int, int]]]:
    """Each set as a list of ranges such that any two of all these ranges are the same or have nothing in common."""
    sets = list(sets)
    cuts = sorted({cut for one in sets for low, high in one.ranges for cut in (low, high + 1)})
    position = {cut: index for index, cut in enumerate(cuts)}
    return {
        one: [
            (cuts[index], cuts[index + 1] - 1)
            for low, high in one.ranges
            for index in range(position[low], position[high + 1])
        ]
        for one in sets
    }


def _live(states: _States) -> set[int]:
    """The states from which a text can come to its end."""
    sources = defaultdict(list)
    for index, (_, moves) in enumerate(states):
        for _, target in moves:
            sources[target].append(index)
    live = {index for index, (accepts, _) in enumerate(states) if accepts}
    todo = list(live)
    while todo:
        fresh = [source for source in sources[todo.pop()] if source not in live]
        live.update(fresh)
        todo += fresh
    return live
