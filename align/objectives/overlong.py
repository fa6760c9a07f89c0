"""What a long completion loses of its score."""


def soft_overlong_punishment(length: int, *, longest: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (Yu et al. 2025, arXiv 2503.14476, eq. 13), 0 to -1, of a completion of `length`
    tokens. longest: L_max. buffer: L_cache, tokens below it over which the punishment grows.

        0                                     length <= L_max - L_cache
        ((L_max - L_cache) - length) / L_cache    up to L_max
        -1                                    above
    """
    return -min(max(length - (longest - buffer), 0) / buffer, 1.0)
