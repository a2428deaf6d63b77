"""Groups of random tokens for tests of the learner."""

from __future__ import annotations

import random

from rluf.types import Group, Prompt, Sample


def make_random_groups(seed: int, logprob: float = -5.5) -> list[Group]:
    generator = random.Random(seed)

    def random_ids(length: int) -> tuple[int, ...]:
        return tuple(generator.randrange(3, 250) for _ in range(length))

    groups = []
    for index in range(5):
        prompt_ids = random_ids(generator.randrange(4, 12))
        lengths = [generator.randrange(1, 12) for _ in range(4)]
        samples = tuple(
            Sample(str(index), prompt_ids, random_ids(length), (logprob,) * length, ((0, 0),), "stop", "")
            for length in lengths
        )
        groups.append(Group(Prompt(str(index), (), prompt_ids, "", "train"), samples, 0))
    return groups
