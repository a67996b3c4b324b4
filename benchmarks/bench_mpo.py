"""`mpo_expert_weights`: the weights of all experts from one shared central tensor, T5-base's wi."""

from __future__ import annotations

import torch

from benchmarks.measuring import Case, Outputs, Provider
from moebert_kernels import mpo_expert_weights, reference

SECONDS = 2.0
PROVIDERS = ("moebert_kernels", "site_by_site")
# row factors, column factors, bonds
T5_BASE = ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4), (1, 12, 192, 384, 16, 1))
SMOKE = ((2, 2, 3, 2, 2), (2, 2, 2, 3, 2), (1, 4, 16, 16, 4, 1))


def cases(smoke: bool) -> list[Case]:
    num_experts = 3 if smoke else 8
    return [
        Case(
            name=f"mpo_expert_weights-E{num_experts}",
            parameters={"op": "mpo_expert_weights", "direction": "forward", "dtype": "float32", "E": num_experts},
            providers=PROVIDERS,
            build=lambda: _build(*(SMOKE if smoke else T5_BASE), num_experts),
            baseline="site_by_site",
        )
    ]


def _build(rows: tuple[int, ...], columns: tuple[int, ...], bonds: tuple[int, ...], E: int) -> dict[str, Provider]:
    generator = torch.Generator().manual_seed(0)
    shapes = list(zip(bonds[:-1], rows, columns, bonds[1:], strict=True))
    central, *aux = (
        torch.randn(*shape, generator=generator) / bond**0.5
        for shape, bond in [(shapes[2], bonds[2]), *(((E, *shapes[k]), bonds[k]) for k in (0, 1, 3, 4))]
    )

    def exact(dtype: torch.dtype) -> Outputs:
        return (reference.mpo_expert_weights(central.to(dtype), [site.to(dtype) for site in aux]),)

    return {
        "moebert_kernels": Provider(lambda: (mpo_expert_weights(central, aux),), exact),
        "site_by_site": Provider(lambda: (reference.mpo_expert_weights(central, aux),), exact),
    }


def test_mpo_expert_weights(case, provider, run_provider):
    run_provider(case, provider)
