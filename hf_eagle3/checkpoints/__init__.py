"""Loading published drafters of every known flavour, and writing them."""
