import warnings

import pytest
import torch

from moebert_kernels.distill import TeacherCache
from moebert_kernels.distill.alignment import pool
from moebert_kernels.distill.microbert import MicroBertObjective
from moebert_kernels.distill.orders import numbered
from moebert_kernels.distill.teacher import LiveTeacher
from moebert_kernels.errors import UserError
from tests.distill.tiny import TinyBatches, tiny_bert, weights
from tests.distill.tiny_trainer import tiny_data, trainer


def one_by_one(data):
    """Batches of one example."""
    names = ("input_ids", "attention_mask", "example_id")
    return [{name: torch.tensor([row[name]]) for name in names} for row in data]


def outputs_close(got, wanted, mask, tolerance):
    for ours, theirs in zip(got.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=0, atol=tolerance)
        assert not ours[~mask].any()
    for name in ("logits", "start_logits", "end_logits"):
        ours, theirs = getattr(got, name), getattr(wanted, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            ours, theirs = (ours, theirs) if name == "logits" else (ours[mask], theirs[mask])
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("kind", "dtype", "tolerance"), [
    ("classification", None, 1e-6), ("qa", None, 1e-6), ("classification", "float16", 2e-3),
    ("qa", "bfloat16", 2e-2),
])  # fmt: skip
def test_equals_the_live_teacher(tmp_path, kind, dtype, tolerance):
    teacher = tiny_bert(1, dropout=0.1, qa=kind == "qa")
    data = TinyBatches(kind=kind)
    cache = TeacherCache.build(teacher, data, tmp_path, dtype=dtype, shard_mib=0)  # a shard per batch
    assert len(cache) == 22
    live = LiveTeacher(teacher, torch.device("cpu"))
    for batch in data(5):  # other batches than those it was built from, so other paddings
        got = TeacherCache(tmp_path)(batch)
        assert got.hidden_states[0].dtype == torch.float32
        outputs_close(got, live(batch), batch["attention_mask"] == 1, tolerance)


def test_keeps_only_the_layers_it_is_told(tmp_path):
    cache = TeacherCache.build(tiny_bert(1), TinyBatches(), tmp_path, layers=[2, 0])
    states = cache(next(TinyBatches()(0))).hidden_states
    assert cache.info.layers == (0, 2)
    assert [state is None for state in states] == [False, True, False]
    with pytest.raises(UserError, match="layers: expected hidden states between 0 and 2"):
        TeacherCache.build(tiny_bert(1), TinyBatches(), tmp_path / "other", layers=[3])


def test_keeps_sentence_vectors(tmp_path):
    """[CLS], maximum and mean of the chosen states, much smaller than the states; the rest as the live teacher's."""
    teacher, data = tiny_bert(1), TinyBatches(examples=40)
    cache = TeacherCache.build(teacher, data, tmp_path / "pooled", layers=[1, 2], pooled=True)
    TeacherCache.build(teacher, data, tmp_path / "states", layers=[1, 2])
    live = LiveTeacher(teacher, torch.device("cpu"))
    for batch in data(3):
        got, wanted = cache(batch), live(batch)
        assert got.hidden_states == (None,) * 3
        torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=1e-6)
        for layer in (1, 2):
            vectors = pool(wanted.hidden_states[layer], batch["attention_mask"])
            torch.testing.assert_close(got.pooled[layer], vectors, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"of other pooled \(it was True and is False now\)"):
        TeacherCache.build(teacher, data, tmp_path / "pooled", layers=[1, 2])
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).glob("*.safe*")) for name in ("pooled", "states")]
    assert sizes[0] < sizes[1]  # three vectors of an example against five or six tokens


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_lean_distillation_from_the_cache_equals_the_live_teacher(tmp_path, distance):
    """Sentence vectors, soft targets and the discriminator: five epochs end at the same weights to 1e-6."""
    teacher, data = tiny_bert(1, layers=3, hidden=32), numbered(tiny_data())
    cache = TeacherCache.build(teacher, one_by_one(data), tmp_path / "cache", layers=[2, 3], pooled=True)
    runs = []
    teacher.register_forward_hook(lambda *_: runs.append(1))
    ends = []
    for name, source in (("live", teacher), ("cached", cache)):
        student, before = tiny_bert(0), len(runs)
        objective = MicroBertObjective("classification", ("alignment", "soft", "adversarial"), distance=distance)
        run = {"num_train_epochs": 5, "learning_rate": 1e-3}
        trainer(tmp_path / name, student, data, teacher=source, objective=objective, **run).train()
        ends.append(weights(student))
    assert len(runs) == before  # the cached run asked for nothing
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=1e-6, msg=name)


class Interrupted(TinyBatches):
    """Stops with an error after a few batches."""

    def __call__(self, epoch):
        for i, batch in enumerate(super().__call__(epoch)):
            if i == 3:
                raise KeyboardInterrupt
            yield batch


def test_an_interrupted_build_goes_on(tmp_path):
    teacher = tiny_bert(1)
    with pytest.raises(KeyboardInterrupt):
        TeacherCache.build(teacher, Interrupted(), tmp_path, shard_mib=0)
    with pytest.raises(UserError, match=r"expected example_id 1.* among the 12 examples in .*, got none"):
        TeacherCache(tmp_path)(TinyBatches().batch(torch.arange(22)))
    runs = []
    teacher.register_forward_hook(lambda *_: runs.append(1))
    assert len(TeacherCache.build(teacher, TinyBatches(), tmp_path, shard_mib=0)) == 22
    assert len(runs) == 3  # of 6 batches
    TeacherCache.build(teacher, TinyBatches(), tmp_path)
    assert len(runs) == 3


def test_belongs_to_one_teacher_and_one_data_set(tmp_path):
    TeacherCache.build(tiny_bert(1), TinyBatches(), tmp_path)
    with pytest.raises(UserError, match=r"with those of other teacher weights \(use"):
        TeacherCache.build(tiny_bert(2), TinyBatches(), tmp_path)
    with pytest.raises(UserError, match=r"of other cache_dtype \(it was float32 and is float16 now\)"):
        TeacherCache.build(tiny_bert(1), TinyBatches(), tmp_path, dtype="float16")
    with pytest.raises(UserError, match=r"of other layers \(it was \[0, 1, 2\] and is \[0\] now\)"):
        TeacherCache.build(tiny_bert(1), TinyBatches(), tmp_path, layers=[0])
    with pytest.raises(UserError, match=r"the token ids of example_id 1.., got others"):
        TeacherCache.build(tiny_bert(1), TinyBatches(seed=1), tmp_path)
    cache = TeacherCache(tmp_path)
    with pytest.raises(UserError, match=r"the token ids of example_id 1.., got others"):
        cache(next(TinyBatches(seed=1)(0)))
    with pytest.raises(UserError, match="expected example_id 122 among the 22 examples in"):
        cache(TinyBatches(examples=30).batch(torch.tensor([22])))
    swapped = next(TinyBatches()(0))
    swapped["input_ids"][0, :2] = swapped["input_ids"][0, :2].flip(0)
    with pytest.raises(UserError, match="got others"):
        cache(swapped)
    unnamed = {name: tensor for name, tensor in swapped.items() if name != "example_id"}
    with pytest.raises(UserError, match="expected a column example_id, the row's number, got batches of input_ids"):
        cache(unnamed)


@pytest.mark.parametrize("harm", ["overwritten", "cut", "gone", "empty"])
def test_a_damaged_shard_is_noticed_and_computed_anew(harm, tmp_path):
    """One in the middle: the others stay as they are, the teacher runs for its examples alone, the end is the same."""
    teacher, runs = tiny_bert(1), []
    TeacherCache.build(teacher, TinyBatches(), tmp_path, shard_mib=0)
    shards = sorted(tmp_path.glob("*.safetensors"))
    whole = {shard.name: shard.read_bytes() for shard in shards}
    assert len(whole) == 6
    data, middle = shards[2].read_bytes(), shards[2].stat().st_size - 400
    if harm == "gone":
        shards[2].unlink()
        assert len(TeacherCache(tmp_path)) < 22
    else:
        shards[2].write_bytes({"overwritten": data[:middle] + b"x" * 400, "cut": data[:-1], "empty": b""}[harm])
        with pytest.raises(
            UserError, match=rf"expected whole files in .*, got a damaged {shards[2].name} \(its CRC-32"
        ):
            TeacherCache(tmp_path)
    teacher.register_forward_hook(lambda *_: runs.append(1))
    with warnings.catch_warnings(record=True) as said:
        mended = TeacherCache.build(teacher, TinyBatches(), tmp_path, shard_mib=0)
    assert [shards[2].name in str(one.message) for one in said] == [True] * (harm != "gone")
    assert len(runs) == 1 and len(mended) == 22
    assert {shard.name: shard.read_bytes() for shard in tmp_path.glob("*.safetensors")} == whole
    assert len(TeacherCache(tmp_path)) == 22
    TeacherCache.build(teacher, TinyBatches(), tmp_path, shard_mib=0)
    assert len(runs) == 1


def test_rejects_what_it_cannot_read_or_write(tmp_path):
    with pytest.raises(UserError, match=r"expected one in .*, got none"):
        TeacherCache(tmp_path / "nowhere")
    with pytest.raises(UserError, match="dtype: expected one of float32, float16, bfloat16, got 'int8'"):
        TeacherCache.build(tiny_bert(1), TinyBatches(), tmp_path / "a", dtype="int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder to write"):
        TeacherCache.build(tiny_bert(1), TinyBatches(), tmp_path / "file")
    huge = tiny_bert(1)
    torch.nn.init.constant_(huge.classifier.bias, 1e6)
    with pytest.raises(UserError, match="dtype: expected one that holds the teacher's outputs, got float16"):
        TeacherCache.build(huge, TinyBatches(), tmp_path / "b", dtype="float16")
