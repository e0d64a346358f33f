"""Questions about a text that nobody has to write: what follows some words, what fills a gap in a quote.

They teach a decoder to read soft tokens by what they hold (train/objectives.py), and soft tokens to be found so
(refine.py).
"""

import random

# Words that a lookup quotes, words that are to follow, and words that fill a gap: least and most.
QUOTED_WORDS = (2, 5)
FOLLOWING_WORDS = (1, 8)
GAP_WORDS = (1, 3)
NAMES = 0.7  # of the gaps are where a name or number begins, if there is one


def quotes(text: str, instruction: str, turns: int, rng: random.Random) -> list[tuple[str, list[str]]]:
    """Questions about what follows some words of a text, as (prompt, answers): reading soft tokens by content.

    "{words}" in the instruction becomes the quoted words. They are `turns` at most, since quotes that do not occur
    exactly once are passed over.
    """
    words = text.split()
    whole = " ".join(words)
    found: dict[str, list[str]] = {}
    for _ in range(turns):
        quoted, following = rng.randint(*QUOTED_WORDS), rng.randint(*FOLLOWING_WORDS)
        if len(words) < quoted + following:
            continue
        start = rng.randrange(len(words) - quoted - following + 1)
        quote = " ".join(words[start : start + quoted])
        if whole.count(quote) == 1:
            prompt = instruction.replace("{words}", quote)
            found[prompt] = [" ".join(words[start + quoted : start + quoted + following])]
    return list(found.items())


def gaps(text: str, instruction: str, turns: int, rng: random.Random) -> list[tuple[str, list[str]]]:
    """The same about what fills a gap in a quote, mostly a name or a number: nearer to a question than `quotes`."""
    words = text.split()
    found: dict[str, list[str]] = {}
    for _ in range(turns):
        before, after, size = rng.randint(3, 7), rng.randint(2, 6), rng.randint(*GAP_WORDS)
        places = range(before, len(words) - after - size + 1)
        if not places:
            continue
        named = [place for place in places if words[place][0].isupper() or words[place][0].isdigit()]
        place = rng.choice(named) if named and rng.random() < NAMES else rng.choice(places)
        missing = " ".join(words[place : place + size]).strip(".,;:()\"'")
        if missing:
            quote = [*words[place - before : place], "___", *words[place + size : place + size + after]]
            found[instruction.replace("{words}", " ".join(quote))] = [missing]
    return list(found.items())
