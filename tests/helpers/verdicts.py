"""Verdicts of a target that follows given rates."""

from hf_eagle3.speculation.rates import rank_nodes


def walk(shape, rates, generator):
    """A node at which a verdict ends that follows these rates exactly."""
    node = 0
    places = rank_nodes(shape.parents)
    while True:
        number = generator.random()
        for child in [n for n, parent in enumerate(shape.parents, start=1) if parent == node]:
            depth, rank = places[child - 1]
            number -= rates[depth][rank]
            if number < 0:
                node = child
                break
        else:
            return node
