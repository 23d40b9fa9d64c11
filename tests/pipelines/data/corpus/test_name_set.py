import random

from pipelines.data.corpus.name_set import NameSet


def test_every_name_is_new_once():
    chance = random.Random(0)
    names_so_far, known = NameSet(), set()
    for _ in range(60):
        names = [f"n{chance.randrange(3000)}" for _ in range(chance.choice([0, 1, 7, 100]))]
        expected = []
        for name in names:
            expected.append(name not in known)
            known.add(name)
        assert names_so_far.add(names).tolist() == expected
    assert len(names_so_far._runs) < 12  # merged
