"""The report shows losses and gaps as readily as wins, is the same twice, and refuses what must not be shown."""

import json

import pytest

from benchmarks import charts, gpu
from benchmarks.__main__ import main
from benchmarks.report import load_folder, markdown
from benchmarks.results import FORMAT_VERSION
from benchmarks.views import is_ours, ours, rows_of, series_over_tokens
from tests.benchmarks.results_of import ENVIRONMENT, case, encoder_case, entry, ffn_case, result, some_results, write


def text_of(folder, results) -> str:
    return markdown(load_folder(write(folder, results)), {})


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("results"), some_results())
    (folder / gpu.RECORD).write_text('{"steps": {}}')  # of `make gpu`, no suite's result
    (folder / "speed-gone.png").write_bytes(b"")
    assert main(["report", "--results", str(folder)]) == 0
    return folder


def test_writes_text_and_small_pictures(reported):
    from PIL import Image

    text = (reported / "REPORT.md").read_text()
    pictures = {path.name for path in reported.glob("*.png")}
    assert pictures == {
        "overview.png", "speed-fused_moe_ffn.png", "models-encoder.png"
    }  # fmt: skip
    for name in pictures:
        assert f"]({name})" in text
        assert (reported / name).stat().st_size < 60_000
        image = Image.open(reported / name)
        assert min(image.size) > 200 and image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_the_same_results_give_the_same_bytes(reported, tmp_path):
    write(tmp_path, some_results()[::-1])
    assert main(["report", "--results", str(tmp_path)]) == 0
    for path in reported.glob("*.[mp][dn]*"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_says_what_was_measured_on_what(reported):
    text = (reported / "REPORT.md").read_text()
    assert text.startswith("# Benchmarks on Intel Xeon Processor @ 2.50GHz, 2 threads\n")
    assert "float32, torch 2.13.0+cpu, commit 0123456789ab, 2026-11-21." in text
    assert "| encoder | 2026-11-21 | 0.2 | 10 | 0.1 | 1.2 | 12 |" in text


def test_required_passes_and_failures(reported):
    text = (reported / "REPORT.md").read_text()
    assert "6 of 8 hold." in text
    assert "| fused_moe_ffn-forward-T1 | moebert_kernels 0.80x [0.80, 0.80] dense, wanted >= 1.0x | **FAIL** |" in text
    assert "wanted >= 1.0x | pass |" in text


def test_losses_stand_by_name_and_the_ideal_is_none(reported):
    losses = (reported / "REPORT.md").read_text().partition("## Where another way is faster")[2].partition("##")[0]
    assert "In 2 of 12 comparisons" in losses  # T = 1, both directions
    assert "| fused_moe_ffn-forward-T1 | dense | 1 ms [0.98, 1.02] | 1.25 ms [1.225, 1.275] | 0.80x |  |" in losses
    assert "ideal" not in losses


def test_a_loss_within_the_spread_says_so(tmp_path):
    close = encoder_case(ours_ms=121)
    assert "| 0.99x | within the spread |" in text_of(tmp_path, [result("encoder", [close])])


def test_no_losses_are_said_too(tmp_path):
    assert "Nowhere: in none of 2 comparisons." in text_of(tmp_path, [result("encoder", [encoder_case()])])


def test_what_was_not_measured_stands_with_its_reason(tmp_path):
    peers = {"moebert_kernels": entry(1, 2), "dense": entry(2, 1), "scattermoe": {"refused": "output 0: too far"}}
    gone = {"not_run": ["T64", "T512"], "broken": {"T512": "OutOfMemoryError: no memory"}}
    results = [result("ffn", [ffn_case(8), case("a", peers)], **gone)]
    text = text_of(tmp_path, results)
    assert "| megablocks | skipped | not installed | fused_moe_ffn-forward-T8 |" in text
    assert "| scattermoe | **refused** | output 0: too far | a |" in text
    assert "| all | not run | the suite's time was over | T64 |" in text
    assert "| all | **broken** | OutOfMemoryError: no memory | T512 |" in text and text.count("T512") == 1
    assert "Nothing of this kind was measured." in text


def test_roof_latency_and_memory_stand_beside_the_times(reported):
    text = (reported / "REPORT.md").read_text()
    assert "| 2.00x [1.96, 2.04] | p99 8 ms, 50% of the roof, 12.0 MiB |" in text
    assert "| fused_moe_ffn-forward-T8 | dense | 8 ms [7.84, 8.16] | 1.00x [0.98, 1.02] | p99 12 ms, 32.0 MiB |" in text


def test_a_training_step_has_tokens_per_second_and_what_is_kept_for_backward(tmp_path):
    step = {"moebert_kernels": entry(100, 1.5, tokens_per_s=10240.0, saved_mib=80.5), "dense": entry(150, 1.0)}
    text = text_of(tmp_path, [result("distill", [case("step", step)])])
    assert "| 1.50x [1.47, 1.53] | 10,240 tokens/s, 80.5 MiB kept for backward |" in text


def broken(change) -> list:
    results = some_results()
    change(results)
    return results


def refuse(results, provider):
    results[0]["cases"][1]["providers"][provider] = {"refused": "output 0: expected an error of at most 1e-06, got 2"}


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda r: refuse(r, "moebert_kernels"),
         "ffn.json: fused_moe_ffn-forward-T8: moebert_kernels failed the gate: output 0: expected an error"),
        (lambda r: refuse(r, "dense"), "ffn.json: fused_moe_ffn-forward-T8: dense failed the gate"),
        (lambda r: r[1].update(smoke=True), "encoder.json: expected shapes that count, got those of --smoke"),
        (lambda r: r[0].update(environment=ENVIRONMENT | {"commit": "f00"}),
         "ffn.json: expected the commit of encoder.json, 0123456789ab, got f00"),
        (lambda r: r[0].update(environment=ENVIRONMENT | {"gpu": "NVIDIA H200"}),
         "ffn.json: expected the gpu of encoder.json, None, got NVIDIA H200"),
        (lambda r: r[0].update(format_version=1), f"expected format_version {FORMAT_VERSION}, got 1"),
        (lambda r: r.clear(), "expected results of python -m benchmarks run, got none"),
    ],
)  # fmt: skip
def test_refuses(tmp_path, capsys, change, message):
    folder = write(tmp_path, broken(change))
    assert main(["report", "--results", str(folder)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (folder / "REPORT.md").exists() and not list(folder.glob("*.png"))


def test_a_peer_that_fails_the_gate_is_left_out_by_name(tmp_path):
    assert "| ideal | **refused** |" in text_of(tmp_path, broken(lambda r: refuse(r, "ideal")))


def test_ours_is_found_by_name_or_comes_first():
    assert ours(case("a", {"dense": {}, "moebert_kernels_graph": {}, "moebert_kernels": {}})) == "moebert_kernels"
    assert ours(case("a", {"dense": {}, "moebert_kernels_graph": {}})) == "moebert_kernels_graph"
    grouping = case("a", {"group_tokens_by_hash": {}, "original": {}, "group_tokens_by_hash_cuda": {}})
    assert ours(grouping) == "group_tokens_by_hash"
    assert [is_ours(grouping, name) for name in grouping["providers"]] == [True, False, True]


def test_series_keep_shapes_apart():
    other = [ffn_case(T) for T in (1, 8, 64)]
    for one in other:
        one["parameters"]["H"] = 384
    rows = rows_of([result("ffn", [ffn_case(T) for T in (64, 1, 8)] + other)])
    first, second = series_over_tokens(rows + rows_of([result("tiny", [ffn_case(8)])]))
    assert all(row.what == "ffn" for row in first.rows)
    assert [row.tokens for row in first.rows] == [1, 8, 64] and "H 768" in first.shape and "H 384" in second.shape


def test_many_bars_are_continued_in_another_picture(tmp_path):
    cases = [encoder_case(f"encoder-{i}") for i in range(charts.BARS_PER_PICTURE // 3 + 1)]
    pictures = charts.draw_all(rows_of([result("encoder", cases)]), tmp_path)
    assert pictures["end-to-end"] == ["models-encoder.png", "models-encoder-2.png"]


def test_json_stays_as_it_was(reported):
    assert json.loads((reported / "ffn.json").read_text()) == some_results()[0]
