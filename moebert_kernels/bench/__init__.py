"""How long models take: clocks, models in turns, and tables of the result."""
