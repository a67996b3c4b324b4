"""Speed: what is measured, against what, and the results. Start with benchmarks/README.md."""
