"""Every case through pytest-benchmark, see conftest.py; `-k` chooses by the names of cases and providers."""


def test_case(case, provider, run_provider):
    run_provider(case, provider)
