"""The suites, in order of importance: suite X is `cases(target)` of benchmarks/bench_X.py."""

OPS = ("ffn", "ffn_backward", "tiny", "ffn_add_norm", "peers", "routing", "expert_gemm", "mpo")
MODELS = ("encoder", "distill", "loading", "importance")  # importance last: minutes of the original's way
ALL = (*OPS, *MODELS)
