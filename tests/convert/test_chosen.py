"""Experts and tables chosen by text: better than random ones, in any family, saved, repeatable, resumed."""

import copy

import pytest
import torch
from transformers import AutoModel

from moebert_kernels.convert import choose_experts, convert_to_moe, report_table
from moebert_kernels.convert.replace import resolved
from moebert_kernels.convert.sites import find_sites
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, moe_layers
from tests.convert.families import FAMILIES, IMAGES, ONE_OF_EACH_SHAPE, TWO_STACKS, make

CONFIG = MoEConfig.chosen(num_experts=3, expert_size=16)


def text(family="bert", count=12, seed=0, vocab=(3, 40)):
    """Batches of four sequences of 12 tokens, the last one of each shorter."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(*vocab, (4, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[3, 8:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
        if family in TWO_STACKS:
            batches[-1]["decoder_input_ids"] = ids.flip(1)
    return batches


def chosen_for(model, config=CONFIG, batches=None, **options):
    sites = find_sites(model)
    config = resolved(config, model, sites, sites[0].weights())
    return choose_experts(model, config, text() if batches is None else batches, **options)


def same(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    "family",
    [f if f in ONE_OF_EACH_SHAPE else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in IMAGES],
)
def test_every_family_is_converted_by_text_and_loads(family, tmp_path):
    model, batches = make(family), text(family)
    state = copy.deepcopy(model.state_dict())
    choices = chosen_for(model, batches=batches)
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    for choice in choices:
        assert choice.report.best <= choice.report.chosen
        assert choice.report.load < 2
    moe = convert_to_moe(model, CONFIG, batches=batches)
    for layer, choice in zip(moe_layers(moe), choices, strict=True):
        assert torch.equal(layer.router.table.long(), choice.table)
        torch.testing.assert_close(layer.experts.w2, choice.w2)
    moe.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        for name in ("last_hidden_state",):
            torch.testing.assert_close(loaded(**batches[0])[name], moe(**batches[0])[name])
    assert loaded.config.quantization_config.router == "hash-chosen"
