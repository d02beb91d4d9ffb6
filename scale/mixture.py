"""
mixture.py: some pictures more often than others                    (Transfusion §4.1 "Data", §4.4)

THE IDEA    The flagship reads three collections of pictures, one of them more often than once per
            epoch, and in the last 1% of its steps it reads beautiful pictures more often. Here a
            collection is a folder of shards within --data-dir. Its weight says how many times its
            rows come in an epoch. The rows stay where they are: only the order knows of weights.
A PICTURE   packed/web/ (3 rows)  packed/people/ (2 rows)         --mixture people=2

            one epoch     w0 w1 w2 | p0 p1 p0 p1                  shuffled, when it is read
            weight 1.5    w0 w1 w2 | p0 p1 p0                     the next one has p1 p0 p1
THE RULE    A folder of n rows and weight w has round(w n) places in an epoch; place v of epoch e
            is its row (v + e round(w n)) mod n. So after some epochs all rows came equally often.
PAPER/HERE  same: "we upsample 80M Shutterstock images containing people", and "upweight the portion
            of high-aesthetic images in the last 1% of the training schedule".
            The paper's 692M pairs per epoch are 380M + 220M + 12M (CC12M) + 80M: so those with
            people come twice, --mixture people=2. Our choice: by how much beauty is upweighted.
READ NEXT   shards.py       TEST  tests/test_mixture.py     TRY IT  python -m scale.mixture
"""
import math
from dataclasses import dataclass

import numpy as np

from support.common import UserError, end_with_the_reader

# Paper: §4.1, "the last 1% of the training schedule".
LAST = 0.01


def read_weights(text, option="--mixture"):
    """{folder: weight} of "people=2,web=0.5". Raises UserError if it says something else."""
    weights = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        name = name.strip()
        if not name or not 0 <= weight < math.inf:
            raise UserError(f"{option} wants folders and how often they are read, e.g. "
                            f"people=2,web=0.5, not {part!r}")
        if name in weights:
            raise UserError(f"{option} names {name} twice")
        weights[name] = weight
    return weights


def last_from(steps):
    """The first step (counted from 0) of the last 1% of a run of so many steps."""
    return steps - math.ceil(LAST * steps)


@dataclass
class Source:
    """The rows of one kind in one folder of shards.

    folder      its name within the folder of all
    first       the number of its first row, among all rows of the kind
    rows        how many of its rows are learned from
    """
    folder: str
    first: int
    rows: int


class Order:
    """An epoch of all rows of a kind, in which a row may have several places, or none.

    sources     list of Source          weights     {folder: weight}; any other has 1

    n           how many places an epoch has"""

    def __init__(self, sources, weights):
        self.sources = sources
        self.places = [round(source.rows * weights.get(source.folder, 1)) for source in sources]
        self.begins = np.cumsum([0, *self.places])
        self.n = int(self.begins[-1])

    def row(self, place, epoch):
        """The number of the row, among all rows of the kind, at a place 0..n-1 of an epoch."""
        k = int(np.searchsorted(self.begins, place, side="right")) - 1
        source = self.sources[k]
        v = place - int(self.begins[k])
        # With 1.5 places for each row, half of the rows come twice: the next epoch begins with the
        # other half.
        return source.first + (v + epoch * self.places[k]) % source.rows

    def describe(self):
        """"people 240 places for 120 rows, web ..." """
        parts = []
        for source, places in zip(self.sources, self.places, strict=True):
            parts.append(f"{source.folder} {places:,} places for {source.rows:,} rows")
        return ", ".join(parts)


def check_folders(weights, folders, where):
    """Raise UserError if a weight is that of no folder of shards.

    folders     names of all that there are within the folder `where`"""
    unknown = [name for name in weights if name not in folders]
    if unknown:
        raise UserError(f"--mixture names {unknown[0]}, but the folders of shards in {where} are "
                        f"{', '.join(folders)}: pack each collection into a folder of its own "
                        f"there, with --out {where}/{unknown[0]}")


if __name__ == "__main__":
    end_with_the_reader()
    order = Order([Source("web", 0, 3), Source("people", 3, 2)], {"people": 1.5})
    print("rows 0 1 2 are web's, 3 4 are people's, which has a weight of 1.5; before shuffling:")
    for epoch in range(2):
        print(f"  epoch {epoch}: {[order.row(place, epoch) for place in range(order.n)]}")
    print(f"of 500,000 steps the last 1% begins at {last_from(500_000):,}")
