"""Our decode loop. It knows no `generate()`."""
