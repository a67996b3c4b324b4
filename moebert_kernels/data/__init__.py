"""Tasks and their data: what rows are, where they come from, what a model is fed, and how it is judged."""
