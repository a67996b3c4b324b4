"""Expert against data parallelism: the arithmetic by hand, and the page that shows it."""

import pytest

from benchmarks.__main__ import main
from benchmarks.model import ENCODERS, Encoder, encoder_cost
from benchmarks.scaling import (
    NVLINK,
    Link,
    Roof,
    Step,
    break_even_tokens,
    busiest,
    enough_tokens,
    inference_us,
    step_pair,
    tables,
    training,
)
from tests.helpers import ROOT

FAST = Roof(tflops=1e9, gbytes_per_s=1e9)  # computes in no time, so that only what is sent remains
TINY = Encoder(L=2, H=16, D=32, V=10)
BERT = ENCODERS["bert-base"]


def test_the_page_shows_what_the_command_prints(capsys):
    assert main(["model"]) == 0
    printed = capsys.readouterr().out
    page = (ROOT / "docs/guide/scaling.md").read_text()
    assert page.partition("<!-- scaling: begin -->\n")[2].partition("<!-- scaling: end -->")[0] == printed
    assert printed == tables(Roof()) + "\n"
    assert main(["model", "--tflops", "100"]) == 0
    assert "Roof: 100 TFLOP/s, 4300 GB/s." in capsys.readouterr().out


def test_break_even_is_about_experts_times_their_neurons():
    assert break_even_tokens(BERT, 4) == pytest.approx(4 * 768, rel=0.01)  # biases and norms are the rest
    assert break_even_tokens(BERT, 64, top_k=2) == pytest.approx(32 * 768, rel=0.01)


def test_at_break_even_both_send_the_same():
    link, T = Link("any", 7.0, latency_us=0.0), break_even_tokens(BERT, 8)
    dp, ep = (training(BERT, 8, T=128 * 50, link=link, roof=FAST, expert_parallel=p) for p in (False, True))
    assert dp.sums == pytest.approx(ep.sums + ep.exchanges * T / (128 * 50))


def test_bytes_of_a_training_step_by_hand():
    link = Link("any", 1.0, latency_us=3.0)  # 1 GB/s: a megabyte takes a millisecond
    dp, ep = (training(TINY, 4, T=128, link=link, roof=FAST, expert_parallel=p) for p in (False, True))
    attention = 4 * 16 * 16 + 4 * 16 + 2 * 16  # weights, biases, norm
    expert = 2 * 16 * 8 + 8 + 16 + 2 * 16  # D / 4 = 8 neurons
    shared = 2 * attention + 10 * 16
    assert dp.sums == pytest.approx(2 * 3 / 4 * (shared + 2 * 4 * expert) * 2 / 1e6)
    assert ep.sums == pytest.approx(2 * 3 / 4 * shared * 2 / 1e6)
    assert ep.exchanges == pytest.approx(4 * 2 * (3 / 4 * 128 * 16 * 2 / 1e6 + 3e-3)) and dp.exchanges == 0


def test_sums_run_beside_the_backward_pass():
    assert Step(compute=3.0, sums=1.9, exchanges=0.5).total == 3.5
    assert Step(compute=3.0, sums=2.5, exchanges=0.0).total == 3.5


def test_compute_is_the_cost_models():
    got = training(BERT, 8, T=1024, link=NVLINK, roof=Roof(), expert_parallel=True).compute
    cost = encoder_cost(BERT, "forward_backward", B=8, S=128, E=1, I=768, dtype="bfloat16")  # one expert on each GPU
    assert got == cost.roof_ms(790, 4300)


def test_inference_sends_tokens_there_and_back():
    link = Link("any", 1.0, latency_us=3.0)
    assert inference_us(TINY, 4, 100, link, FAST, expert_parallel=True) == pytest.approx(
        2 * 3 / 4 * 100 * 16 * 2 / 1e3 + 2 * 3, rel=1e-3
    )
    assert inference_us(TINY, 4, 100, link, FAST, expert_parallel=False) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("E", [4, 64])
def test_enough_tokens_is_where_the_order_turns(E):
    T = enough_tokens(BERT, E, NVLINK, Roof())
    dp, ep = step_pair(BERT, E, T, NVLINK, Roof())
    dp_before, ep_before = step_pair(BERT, E, T // 2, NVLINK, Roof())
    assert dp <= ep and dp_before > ep_before


def test_busiest_expert_of_real_text():
    assert 1 < busiest("hash-balance") < busiest("hash-random") < 4
